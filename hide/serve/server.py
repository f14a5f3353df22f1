"""The sockets of the server: uvicorn's, with an end for connections on which no request comes."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hide.serve.limits import Limits, Places
from hide.serve.wire import Refused


def bound(host: str, port: int) -> socket.socket:
    """A socket with an address of its own, which does not listen yet. port: 0 takes a free one.

    Raises `OSError` where somebody else has it, or there is no such host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise OSError(f"port: {port} of {host} cannot be had: {error.strerror}") from None
    return found


def make_server(app: Any, limits: Limits) -> uvicorn.Server:
    """A server of an ASGI application, to be `run` with sockets of `bound`."""
    config = uvicorn.Config(
        app,
        http=timed(limits),
        ws="none",
        lifespan="on",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
    )
    return uvicorn.Server(config)


def timed(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol, with bounds on what comes before a request and after its answer, where it has none.

    From the connection's start, and from the end of an answer, the next head may take `head_seconds`: what drips in
    slowly, a body that goes on behind a refusal, and an answer that nobody reads end then. Of connections that wait for
    a head the oldest ends where there would be more than `heads`.
    """
    heads = Places(limits.heads)

    class Timed(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _unsent: float = math.inf

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self._timer is None:
                heads.enter(self, self.transport.abort)
                self._timer = self.loop.call_later(limits.head_seconds, self._late)

        def _stop(self) -> None:
            heads.leave(self)
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._unsent = None, math.inf

        def _late(self) -> None:
            unsent = self.transport.get_write_buffer_size()
            if 0 < unsent < self._unsent:
                # Somebody reads the answer, slowly.
                self._unsent = unsent
                self._timer = self.loop.call_later(limits.head_seconds, self._late)
            elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0] and not unsent:
                self.transport.write(_late_head(limits))
                self.transport.close()
            else:
                self.transport.abort()

    return Timed


def _late_head(limits: Limits) -> bytes:
    body = json.dumps(Refused(408, f"head: it did not arrive within {limits.head_seconds:g} s").body).encode()
    head = f"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body
