"""Folders that results are written to: looked at before the work begins, so that none of it is lost for them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def check_folder(folder: str | Path, files: Iterable[str] = (), *, argument: str = "out") -> None:
    """Make sure that `files`, and others, can be written into a folder, there or not yet; leaves nothing behind.

    Raises:
        ValueError: the folder, a folder above it or one of the files cannot be made or written; it names `argument`.
    """
    folder = Path(folder)
    made = make_folder(folder, argument)
    try:
        for path in (folder / name for name in files):
            if path.exists():
                path.open("ab").close()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{argument}: {_cannot(folder, error)}") from None
    finally:
        remove_folders(made)


def make_folder(folder: Path, argument: str = "out") -> list[Path]:
    """Make a folder and those above it; returns those that were not there, the uppermost first.

    Raises `ValueError`, with nothing left behind.
    """
    made: list[Path] = []
    try:
        for one in reversed([folder, *folder.parents]):
            if not one.is_dir():
                one.mkdir(exist_ok=True)
                made.append(one)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
        remove_folders(made)
        raise ValueError(f"{argument}: {_cannot(folder, error)}") from None
    return made


def remove_folders(made: list[Path]) -> None:
    """Remove what `make_folder` made, as far as nothing lies in it."""
    with suppress(OSError):
        for one in reversed(made):
            one.rmdir()


def _cannot(folder: Path, error: Exception) -> str:
    place = getattr(error, "filename", None)
    why = getattr(error, "strerror", None) or str(error)
    return f"{folder} cannot be written: {why}{f' ({place})' if isinstance(place, str) else ''}"
