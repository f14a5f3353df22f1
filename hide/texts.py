"""Small texts that several places need; of the standard library alone, for those who look at a broken installation."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any


def one_line(error: object, most: int = 240) -> str:
    """An error's text without line breaks, and no longer than one reads; of one that nobody expects, with its type."""
    text = " ".join(str(error).split())
    if isinstance(error, BaseException) and not isinstance(error, (ValueError, OSError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= most else f"{text[:most]}..."


def named(error: BaseException, most: int = 200) -> str:
    """An error of any type in one line, with its type."""
    return f"{type(error).__name__}: {one_line(str(error), most)}"


def listed(value: Any) -> list[str]:
    """A detail of an answer, which JSON holds, as one short text for each thing in it."""
    if isinstance(value, Mapping):
        return [f"{name} {', '.join(listed(own))}" for name, own in value.items()]
    return list(map(str, value)) if isinstance(value, (list, tuple)) else [str(value)]


def version(distribution: str) -> str | None:
    """Of an installed distribution; `None` where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
