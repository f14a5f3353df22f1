"""What the commands share: their common options, loading a model, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, cast

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
    """No progress bars and warnings of transformers, and of torchao, which it imports, between ours."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    from hide.doctor import NOISY

    for name in NOISY:
        getLogger(name).setLevel(ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def errors(console: Console) -> Iterator[None]:
    """What a user can mend is one line and exit code 1, not a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, MemoryError) as error:
        console.print(f"[red]error[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
