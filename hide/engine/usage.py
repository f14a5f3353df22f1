"""How many tokens go through a language model, counted where they are sent and read where a step is timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Usage:
    """`tokens`: those of prompts, images included, and of replies; a prefix counts once, when it is made."""

    def __init__(self) -> None:
        self.tokens = 0


_open: ContextVar[tuple[Usage, ...]] = ContextVar("usage", default=())


@contextmanager
def counted() -> Iterator[Usage]:
    """Inside, what this thread sends is added up."""
    usage = Usage()
    token = _open.set((*_open.get(), usage))
    try:
        yield usage
    finally:
        _open.reset(token)


def count(tokens: int) -> None:
    """Add tokens to all that count in this thread."""
    for usage in _open.get():
        usage.tokens += tokens
