"""How much a server takes of whom: bounds on requests, and places that the newest gets when they are all taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server. What a request asks beyond them is refused before it costs anything.

    body_bytes: of one request; all_body_bytes: of those that are held at once, waiting ones included.
    values: commas and brackets in a body, and so what its JSON takes as objects: a picture's text has none.
    images, pixels, text: of one request, in all; text in characters.
    waiting: requests in line for the model. in_a_row: how many about one picture go before those of another that wait.
    heads, bodies: connections whose request's head, or body, is on its way.
    head_seconds, body_seconds: how long it may be on its way.
    """

    body_bytes: int = 64 << 20
    all_body_bytes: int = 512 << 20
    values: int = 100_000
    images: int = 8
    pixels: int = 64_000_000
    text: int = 8192
    waiting: int = 64
    in_a_row: int = 8
    heads: int = 512
    bodies: int = 128
    head_seconds: float = 10.0
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name}: got {value}, want more than 0")


class Places:
    """At most so many are inside; one more puts out whoever has been there longest.

    Those who do what they came for are quick, so that it meets those who only hold a place.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside: dict[object, Callable[[], object]] = {}

    def enter(self, who: object, put_out: Callable[[], object]) -> None:
        """put_out: called if the place is wanted before `leave`."""
        if len(self._inside) >= self._most:
            self.put_out()
        self._inside[who] = put_out

    def leave(self, who: object) -> None:
        """Also of who is not inside any more."""
        self._inside.pop(who, None)

    def put_out(self) -> object | None:
        """Whoever has been there longest, and says who; `None`: nobody is inside."""
        first = next(iter(self._inside), None)
        if first is not None:
            self._inside.pop(first)()
        return first
