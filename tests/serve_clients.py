"""A server on loopback for tests, models that answer it at once or when they are told to, and clients of few lines."""

import base64
import io
import json
import socket
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection

from PIL import Image

from hide.serve.app import make_app
from hide.serve.engine import Worker
from hide.serve.limits import Limits
from hide.serve.server import bound, make_server
from hide.serve.wire import Answered

# Long enough for the slowest machine; reached only where something hangs.
PATIENCE = 60
PATH = "/v1/chat/completions"


class FakeModel:
    """Says the question's words; with a closed gate not before it is opened. `steps` are those that were begun."""

    ways = ("hide", "plain")

    def __init__(self, say=None):
        self.gate, self.asked, self.steps, self.closed = threading.Event(), [], [], False
        self.gate.set()
        self.say = say

    def answer(self, asked, progress):
        self.asked.append(asked)
        for step in ("look", "answer"):
            progress(step)
            self.steps.append((asked.question.stem, step))
            assert self.gate.wait(PATIENCE)
        return Answered(asked.question.stem if self.say is None else self.say(asked), 7, 1)

    def state(self):
        return {}

    def close(self):
        self.closed = True


class Running:
    """A server that runs, and what is inside."""

    def __init__(self, server, engine, port):
        self.server, self.engine, self.port = server, engine, port

    def request(self, method, path, body=None, headers=()):
        """(status, headers, body as JSON or text)"""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, dict(headers))
            reply = connection.getresponse()
            text = reply.read().decode()
            json_ = reply.headers.get_content_type() == "application/json"
            return reply.status, reply.headers, json.loads(text) if json_ else text
        finally:
            connection.close()

    def post(self, body, **headers):
        """(status, body) of a chat completion; body: bytes, or what becomes JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, said = self.request("POST", PATH, data, headers)
        return status, said

    def error(self, body, **headers):
        """(status, message) of one that is refused, in OpenAI's form."""
        status, said = self.post(body, **headers)
        assert set(said) == {"error"} and set(said["error"]) == {"message", "type", "param", "code"}, said
        return status, said["error"]["message"]

    @contextmanager
    def connected(self, *pieces):
        """A socket that has sent these."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as client:
            for piece in pieces:
                client.sendall(piece)
            yield client

    def state(self):
        return self.engine.state()


@contextmanager
def running(model, limits=None, keys=()):
    limits = limits or Limits()
    engine = Worker(model, limits)
    server, listening = make_server(make_app(engine, limits, keys), limits), bound("127.0.0.1", 0)
    server.config.log_level = "error"
    server.config.configure_logging()
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(server, engine, listening.getsockname()[1])
    finally:
        gate = getattr(model, "gate", None)
        if gate is not None:
            gate.set()
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive() and not engine.alive


def until(true, seconds=PATIENCE):
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)
    return found


def file_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def uri(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


DOT = uri(file_of(Image.new("RGB", (4, 4))))


def picture(url=DOT, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def words(text):
    return {"type": "text", "text": text}


def chat(*parts, model="hide", **more):
    """A request; texts among the parts may be plain."""
    content = [words(part) if isinstance(part, str) else part for part in parts]
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


def head(length, path=PATH, *more):
    """Of a request whose body comes, or does not come, behind it."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: here",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()
