"""What the commands share: output that no console stops, notes and errors."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def quiet() -> None:
    """No progress bars of transformers between ours; what it warns of is for the user."""
    from transformers.utils import logging

    logging.disable_progress_bar()


class App(typer.Typer):
    """Commands whose output no console stops, whatever its encoding and whether there is one."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        sys.stdout, sys.stderr = _writable(sys.stdout), _writable(sys.stderr)
        return super().__call__(*arguments, **options)


def _writable(stream: TextIO | None) -> TextIO:
    if stream is None:
        # pythonw, or closed by the shell.
        return Path(os.devnull).open("w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        # Windows has consoles and pipes of cp1252; what it lacks is written as \u escapes.
        stream.reconfigure(errors="backslashreplace")
    return stream


@contextmanager
def errors(console: Console) -> Iterator[None]:
    """What a user can mend is one line and exit code 1, not a traceback; what was left out of a picture is a note."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        # Importing it here would import torch, which may be what warns.
        ours = issubclass(category, getattr(sys.modules.get("hide.images"), "PictureWarning", ()))
        if ours or "PIL" in Path(str(place[0])).parts:
            console.print(f"[yellow]note[/yellow] {escape(str(message))}", highlight=False, soft_wrap=True)
        else:
            shown(message, category, *place, **more)

    warnings.showwarning = show
    try:
        yield
    except (ValueError, TypeError, OSError, MemoryError) as error:
        console.print(f"[red]error[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    finally:
        warnings.showwarning = shown


def progress_bar(console: Console) -> Progress:
    """What is going on, how much of it is done, and how long it takes."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def left_out(console: Console, text: str) -> None:
    """A line about something that is not taken along."""
    console.print(f"[yellow]left out[/yellow] {escape(text)}", highlight=False, soft_wrap=True)
