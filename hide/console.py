"""What the commands share: output that no console stops, common options, loading a model, notes and errors."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from hide.models.quantised import Weights
    from hide.pipeline import HiDe

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="A checkpoint: folder or hub name; see `hide models`. Without it, the embedded model."
    ),
]
PresetOption = Annotated[str | None, typer.Option("--preset", help="Name of a preset; default: the one for the model.")]
LayerOption = Annotated[
    list[int] | None, typer.Option("--layer", help="Zero-based decoder layer; repeat it to average.")
]
SigmaOption = Annotated[float | None, typer.Option("--sigma", help="Smoothing of the maps, in grid cells.")]
ThresholdOption = Annotated[
    float | None, typer.Option("--threshold", help="A region's cells reach this part of the peak.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cuda, cuda:1, cpu; default: CUDA where there is one.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="int8 or int4: quantise the weights while loading; extra \\[quant].")
]
OffloadOption = Annotated[
    bool, typer.Option("--offload-kv", help="Keep keys and values in host memory: fits more, takes longer.")
]

EMBEDDED = "the embedded model: it knows drawn scenes only (star, ring, moon, ... in eight colors)"


def load_model(
    model: str | None,
    preset: str | None = None,
    layer: list[int] | None = None,
    sigma: float | None = None,
    threshold: float | None = None,
    device: str | None = None,
    dtype: str = "auto",
    weights: str | None = None,
    offload_kv: bool = False,
) -> HiDe:
    """The checkpoint, or without one the embedded model, with its preset and what the options change of it."""
    from hide.pipeline import HiDe
    from hide.tiny import CHECKPOINT

    given = {"layers": tuple(layer) if layer else None, "sigma": sigma, "threshold": threshold}
    given["offload_kv"] = offload_kv or None
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    known = cast("Weights | None", weights)
    return HiDe.from_pretrained(
        CHECKPOINT if model is None else model, preset=preset, device=device, dtype=dtype, weights=known, **changes
    )


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
        if issubclass(category, getattr(sys.modules.get("hide.images"), "PictureWarning", ())):
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
