"""Thousands of good and bad requests to `hide serve` in a process of its own: `python tests/soak.py`, or `make soak`.

Every good request must have the answer that it has alone, every bad one its status, and memory must stay where it was
after the first round. Says so round by round, and exits with 1 where it is not so.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from serve_clients import DOT, PATH, PATIENCE, Running, chat, file_of, head, picture, until, uri

from hide.tiny.scenes import draw_scene, questions

KEY = "the-soak"
HEADERS = {"Authorization": f"Bearer {KEY}"}
CLIENTS = 8
GROWTH = 0.05


class Soak:
    """Requests to a server that has `KEY` and takes 4 MiB at most; the same ones for the same seed."""

    def __init__(self, server, pictures=12, seed=0):
        self.server, self.random, self.wrong, self.sent = server, random.Random(seed), [], 0
        self.good = []
        for number in range(pictures):
            scene = draw_scene(number, 300 + 7 * number, 250, objects=3, object_size=(40, 70))
            for way, asked in zip(("plain", "hide"), questions(scene, np.random.default_rng(number)), strict=False):
                self.good.append(chat(picture(uri(file_of(scene.image))), asked.text, model=way))
        both = [body["messages"][0]["content"][0] for body in self.good[:4:2]]
        self.good.append(chat(*both, "What is the color of the star?", model="plain"))
        # What each is answered alone.
        self.answers = [self._said(self._post(body)) for body in self.good]
        broken = file_of(draw_scene(0, 300, 200, objects=1).image)[:4000]
        good = self.good[0]
        self.bad = [
            (400, b"{"), (400, b"[" * 50_000), (400, {**good, "n": 2}), (400, {**good, "messages": []}),
            (400, chat(picture("http://127.0.0.1:9/x.png"), "What?")), (400, chat(picture("file:///etc/passwd"), "What?")),
            (400, chat(picture(DOT[:-3]), "What?")), (400, chat(picture(uri(broken)), "What?")), (400, chat("no picture")),
            (400, chat(*[picture()] * 9, "What?")), (400, chat(picture(), "word " * 5000)), (404, {**good, "model": "gpt"}),
            (401, {**good, "key": "none"}), (403, {**good, "origin": "a page"}), (413, {**good, "pad": "A" * (5 << 20)}),
        ]  # fmt: skip

    def round(self, count):
        """So many requests from `CLIENTS` at once; what was answered otherwise than it should is in `wrong`."""
        half_open = []
        with ThreadPoolExecutor(CLIENTS) as clients:
            done = []
            for _ in range(count):
                kind = self.random.choices(("good", "bad", "leaves", "half open"), (6, 3, 1, 0.3))[0]
                if kind == "good":
                    done.append(clients.submit(self._good, self.random.randrange(len(self.good)), self.random.random()))
                elif kind == "bad":
                    done.append(clients.submit(self._bad, *self.random.choice(self.bad)))
                elif kind == "leaves":
                    done.append(clients.submit(self._leaves, self.random.choice(self.good), self.random.random() / 10))
                else:
                    half_open.append(socket.create_connection(("127.0.0.1", self.server.port)))
                    half_open[-1].sendall(head(1000) + b"{" if self.random.random() < 0.5 else b"POST /v1/ch")
            for one in done:
                one.result()
        for one in half_open:
            one.close()
        self.sent += count
        # Nobody is left behind.
        until(self._idle)

    def _post(self, body):
        return self.server.request("POST", PATH, json.dumps(body).encode(), HEADERS)

    def _said(self, reply):
        status, _, said = reply
        if status != 200:
            return status, said
        if isinstance(said, str):
            events = [json.loads(event[6:]) for event in said.strip().split("\n\n")[:-1]]
            return events[0]["choices"][0]["delta"]["content"], events[1]["hide"]["boxes"]
        return said["choices"][0]["message"]["content"], said["hide"]["boxes"]

    def _good(self, number, chance):
        said = self._said(self._post({**self.good[number], "stream": chance < 0.2}))
        if said != self.answers[number]:
            self.wrong.append(f"good request {number}: {said}, alone {self.answers[number]}")

    def _bad(self, wanted, body):
        headers = dict(HEADERS)
        if wanted == 401:
            headers["Authorization"] = "Bearer another"
        elif wanted == 403:
            headers["Origin"] = "https://example.org"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, said = self.server.request("POST", PATH, data, headers)
        if status != wanted or not said["error"]["message"]:
            self.wrong.append(f"bad request {data[:80]!r}: {status}, want {wanted}; {said}")

    def _leaves(self, body, seconds):
        data = json.dumps(body).encode()
        with self.server.connected(head(len(data), PATH, f"Authorization: Bearer {KEY}") + data):
            time.sleep(seconds)

    def _idle(self):
        text = self.server.request("GET", "/metrics", headers=HEADERS)[2]
        return all(f"hide_{name} 0\n" in text for name in ("waiting", "running", "held_bytes"))


def resident(pid):
    """Bytes of a process."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--round", type=int, default=500, help="so many are sent between two looks at the memory")
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile("w") as log:
        # So little memory for pictures that some are encoded again and again.
        command = [sys.executable, "-m", "hide", "serve", "--methods", "plain,hide", "--port", "0", "--pool-gb", "0.004",
                   "--max-body-mb", "4"]  # fmt: skip
        process = subprocess.Popen(command, env=os.environ | {"HIDE_API_KEY": KEY}, stdout=log, stderr=log)
        try:
            right = soak(process.pid, port_of(process, Path(log.name)), options.requests, options.round)
            process.send_signal(signal.SIGINT)
            print("ended with", code := process.wait(PATIENCE))
            sys.exit(not (right and code == 0))
        finally:
            process.kill()
            errors = [line for line in Path(log.name).read_text().splitlines() if re.search("Traceback|ERROR", line)]
            print(f"{len(errors)} errors in its log", *errors[:3], sep="\n  ")


def port_of(process, log):
    """Once it listens."""

    def said():
        assert process.poll() is None, log.read_text()
        found = re.search(r"http://127.0.0.1:(\d+)/v1", log.read_text())
        return found and int(found[1])

    def listens():
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    port = until(said, 10 * PATIENCE)
    until(listens)
    return port


def soak(pid, port, requests, size):
    """Whether all went well."""
    work, first, start = Soak(Running(None, None, port)), None, time.monotonic()
    print("requests, seconds, MiB resident")
    while work.sent < requests:
        work.round(min(size, requests - work.sent))
        last = resident(pid)
        first = first or last
        print(f"{work.sent:8}  {time.monotonic() - start:7.0f}  {last / 2**20:12.1f}", flush=True)
    counts = work.server.request("GET", "/metrics", headers=HEADERS)[2]
    print(*(line for line in counts.splitlines() if line.startswith("hide_requests_total")), sep="\n")
    print(
        f"resident memory {last / first - 1:+.1%} since the first {min(size, requests)}; {len(work.wrong)} wrong answers"
    )
    print(*work.wrong[:10], sep="\n")
    return not work.wrong and last <= (1 + GROWTH) * first


if __name__ == "__main__":
    main()
