"""Small texts that several places need; of the standard library alone, for those who look at a broken installation."""

from __future__ import annotations

from importlib import metadata


def one_line(error: object, most: int = 240) -> str:
    """An error's text without line breaks, and no longer than one reads; of one that nobody expects, with its type."""
    text = " ".join(str(error).split())
    if isinstance(error, BaseException) and not isinstance(error, (ValueError, OSError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= most else f"{text[:most]}..."


def named(error: BaseException, most: int = 200) -> str:
    """An error of any type in one line, with its type."""
    return f"{type(error).__name__}: {one_line(str(error), most)}"


def version(distribution: str) -> str | None:
    """Of an installed distribution; `None` where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
