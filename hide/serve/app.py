"""The routes of the server, and what stands before all of them: keys, and nothing for web pages."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hide.serve.engine import FAILED, Engine
from hide.serve.limits import Limits, Places
from hide.serve.metrics import Metrics
from hide.serve.wire import Answered, Asked, Refused, chunks, completion, read

_PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/metrics")


class _Gone(Exception):
    """The client has closed its connection."""


def make_app(engine: Engine, limits: Limits | None = None, keys: Sequence[str] = ()) -> FastAPI:
    """The server as an ASGI application, which closes the engine when it ends.

    keys: one of which every request must have as `Authorization: Bearer KEY`, whatever its path; none: nobody is asked.
    """
    limits = limits or Limits()
    metrics = Metrics()
    bodies = _Bodies(limits)
    # Parsing and base64 of large bodies, off the event loop.
    readers = ThreadPoolExecutor(2, "hide.serve.read")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        readers.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(engine.close)

    # Its own pages load scripts of other hosts.
    api = FastAPI(title="hide", lifespan=lifespan, openapi_url=None)
    api.add_middleware(Guard, keys=keys, metrics=metrics)

    @api.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _refusal(error)

    @api.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        return _refusal(Refused(error.status_code, f"path: {error.detail}; there are {', '.join(_PATHS)}"))

    @api.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _refusal(Refused(500, FAILED))

    @api.exception_handler(_Gone)
    async def gone(_: Request, error: _Gone) -> Response:
        return Response(status_code=499)  # for the count; nobody reads it

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        found = [{"id": way, "object": "model", "created": 0, "owned_by": "hide-kernels"} for way in engine.ways]
        return {"object": "list", "data": found}

    @api.get("/health")
    async def health() -> JSONResponse:
        alive = engine.alive
        status = {"status": "ok" if alive else "the engine has ended", **engine.state()}
        return JSONResponse(status, 200 if alive else 503)

    @api.get("/metrics")
    async def counts() -> PlainTextResponse:
        state = {**engine.state(), "held_bytes": bodies.held}
        return PlainTextResponse(metrics.text(state), media_type="text/plain; version=0.0.4")

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        with bodies.place() as place:
            asked, start = await read_from(request, place), time.perf_counter()
            answered = await _answer(request, engine, asked)
            _count(metrics, asked, answered, time.perf_counter() - start)
        if asked.stream:
            # In one piece: all of it is known, and what is sent piece by piece waits for a client that does not read.
            return Response("".join(chunks(asked, answered)), media_type="text/event-stream")
        return JSONResponse(completion(asked, answered))

    async def read_from(request: Request, place: object) -> Asked:
        # Nobody holds the body once it is read: it may be large, and the line long.
        return await asyncio.get_running_loop().run_in_executor(
            readers, read, await bodies.body(request, place), engine.ways, limits, request.state.owner
        )

    return api


async def _answer(request: Request, engine: Engine, asked: Asked) -> Answered:
    """The engine's answer, for as long as the client is there."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(engine.ask(asked)), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([work, left], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _Gone
        return work.result()
    finally:
        for task in (work, left):
            task.cancel()
        # Each would hold an error that holds this frame, and so the request's pictures.
        del work, left, task


def _count(metrics: Metrics, asked: Asked, answered: Answered, seconds: float) -> None:
    metrics.add("answers_total", way=asked.way)
    metrics.seconds("answer_seconds", seconds)
    computed = answered.prompt_tokens - answered.cached_tokens
    counts = {"prompt": computed, "cached": answered.cached_tokens, "reply": answered.completion_tokens}
    for kind, tokens in counts.items():
        metrics.add("tokens_total", tokens, kind=kind)


def _refusal(error: Refused) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


class _Bodies:
    """Bodies of requests: bounded one by one, in all, and in time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._arriving = Places(limits.bodies)
        self._sizes: dict[object, int] = {}

    @property
    def held(self) -> int:
        """Bytes of all requests that are arriving, waiting or being answered."""
        return sum(self._sizes.values())

    @contextmanager
    def place(self) -> Iterator[object]:
        """Of one request, whose body counts as held inside."""
        who = object()
        try:
            yield who
        finally:
            self._arriving.leave(who)
            self._sizes.pop(who, None)

    async def body(self, request: Request, who: object) -> bytes:
        """A request's body, for one that has a place; raises `Refused` and `_Gone`."""
        seconds = self._limits.body_seconds
        claimed = request.headers.get("content-length", "")
        if claimed.isdecimal() and (len(claimed) > 18 or int(claimed) > self._limits.body_bytes):
            raise self._too_large()
        try:
            async with asyncio.timeout(seconds) as deadline:

                def put_out() -> None:
                    self._sizes.pop(who, None)
                    deadline.reschedule(0)

                self._arriving.enter(who, put_out)
                return await self._received(request, who)
        except TimeoutError:
            message = f"body: it did not arrive within {seconds:g} s, or others wanted its place"
            raise Refused(408, message) from None
        finally:
            self._arriving.leave(who)

    async def _received(self, request: Request, who: object) -> bytes:
        taken, more = bytearray(), True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            taken += message.get("body", b"")
            more = message.get("more_body", False)
            if len(taken) > self._limits.body_bytes:
                raise self._too_large()
            self._sizes[who] = len(taken)
            while self.held > self._limits.all_body_bytes:
                if self._arriving.put_out() in (who, None):
                    raise Refused(429, f"server: it holds {self._limits.all_body_bytes:,} bytes of requests already")
        return bytes(taken)

    def _too_large(self) -> Refused:
        return Refused(413, f"body: want at most {self._limits.body_bytes:,} bytes")


class Guard:
    """Before all paths alike: one check of keys, none for web pages, and the count of what came of it."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics) -> None:
        """See `make_app`."""
        self._app, self._metrics = app, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def seen(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            scope.setdefault("state", {})["owner"] = self._owner(dict(scope["headers"]))
            await self._app(scope, receive, seen)
        except Refused as error:
            await _refusal(error)(scope, receive, seen)
        finally:
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self._metrics.add("requests_total", path=path, status=str(status))

    def _owner(self, headers: Mapping[bytes, bytes]) -> bytes:
        """What tells the clients apart: the digest of their key."""
        # A page that somebody else wrote, open in a browser on this machine: the server may be bound to loopback alone.
        if b"origin" in headers:
            raise Refused(403, "origin: got a request of a web page, and those are not answered")
        if not self._keys:
            return b""
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        # Against all of them, so that the time says nothing.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if not any(matches) or kind.lower() != b"bearer":
            raise Refused(401, "authorization: want 'Bearer KEY' with a key of this server", code="invalid_api_key")
        return digest
