"""The commands `hide train`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hide.cli.console import errors, progress_bar, quiet
from hide.cli.loading import ModelOptions, assigned, options_of
from hide.output import check_folder

app = typer.Typer(no_args_is_help=True, help="Train what methods want trained.")


@app.callback()
def train() -> None:
    """Train what methods want trained."""


@app.command("q-zoom")
@options_of(ModelOptions)
def q_zoom(
    load: ModelOptions,
    data: Annotated[
        str,
        typer.Option("--data", help="scenes:TOKENS, which are training's own, or FORMAT:PATH, as hide eval reads it."),
    ] = "scenes:1000",
    limit: Annotated[
        int | None, typer.Option(help="At most so many questions; default: all, of scenes 6,000.", min=1)
    ] = None,
    stages: Annotated[
        str, typer.Option(help="Which, separated by commas; each goes on with what those before it have left in --out.")
    ] = "labels,region,tuning,gate",
    heads: Annotated[
        str | None,
        typer.Option(
            help="heads.json of `hide calibrate --heads`; boxes: those published for questions that ask for boxes;"
            " default: those published for questions as they are."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE for a setting (docs/q_zoom.md), such as region.rate=1e-3; repeat it."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for labels, losses, states and checkpoint/; a killed run goes on there.")
    ] = Path("hide-train"),
) -> None:
    """Train Q-Zoom's region branch and gate for a model, and tune the model to its crops (arXiv 2604.06912).

    On several GPUs: torchrun --nproc-per-node 4 -m hide train q-zoom ..., or accelerate launch.

    [bold]Example:[/bold] hide train q-zoom --model Qwen/Qwen2.5-VL-7B-Instruct --data list:train.json --out zoom-7b
    """
    first = int(os.environ.get("RANK", "0")) == 0
    console = Console(stderr=True, quiet=not first)
    # What ends one process is said by that process, whichever it is.
    with errors(Console(stderr=True)), progress_bar(console) as bar:
        quiet()
        import torch

        from hide.training.heads import Heads, published
        from hide.training.loop import Processes, save_picture
        from hide.training.q_zoom import STAGES, Pool, Training
        from hide.training.settings import settings_for

        asked = [name.strip() for name in stages.split(",")]
        if unknown := [name for name in asked if name not in STAGES]:
            raise ValueError(f"stages: got {', '.join(map(repr, unknown))}, want some of {', '.join(STAGES)}")
        if load.weights is not None:
            raise ValueError(f"weights: got {load.weights}, but branches are copies of layers that are not quantised")
        check_folder(out)
        if load.device is None and torch.cuda.is_available():
            load = dataclasses.replace(load, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        pool = Pool(data, limit)
        model = load.load()
        settings = settings_for(model).changed(assigned(setting or ()))
        if heads is not None:
            known = published(model, boxes=True) if heads == "boxes" else Heads.read(Path(heads))
            settings = dataclasses.replace(settings, heads=known)
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        def note(text: str) -> None:
            console.print(f"[yellow]note[/yellow] {escape(text)}", highlight=False, soft_wrap=True)

        processes = Processes.join(model.input_device)
        training = Training(model, pool, out, settings, processes=processes, progress=tell, note=note)
        for stage in (name for name in STAGES if name in asked):
            getattr(training, stage)()
        saved = training.save()
        files = [save_picture(out, STAGES), saved] if saved and first else []
    for file in files:
        console.print(escape(str(file)), highlight=False, soft_wrap=True)
