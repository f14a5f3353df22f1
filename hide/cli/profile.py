"""`hide profile`: where the memory of each flow goes, and what fits on a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hide.cli.console import errors, quiet
from hide.cli.loading import view_tokens
from hide.output import check_folder

if TYPE_CHECKING:
    from hide.profiling.output import Profile


def profile(
    model: Annotated[
        str, typer.Option("--model", help="A packaged configuration, a JSON file, or a folder with config.json.")
    ] = "Qwen2.5-VL-7B-Instruct",
    tokens: Annotated[int | None, typer.Option(help="Image tokens, as a square picture; default: 16384.")] = None,
    image: Annotated[str | None, typer.Option(help="Pixels instead of tokens: 7680x4320, width first.")] = None,
    view: Annotated[
        str | None,
        typer.Option(
            "--view",
            help="Sessions too that look at the picture in so many tokens, or auto, and a plain answer beside.",
        ),
    ] = None,
    flow: Annotated[str, typer.Option(help="eager, published, ours, all of these; plain (no HiDe), q-zoom.")] = "all",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    chunk: Annotated[int, typer.Option(help="Tokens that a session sends through the decoder at once.")] = 2048,
    offload_kv: Annotated[
        bool, typer.Option("--offload-kv", help="A session keeps keys and values on the host; --fit tries it anyway.")
    ] = False,
    collage: Annotated[int, typer.Option(help="Tokens of the collage, at most.")] = 1024,
    weights: Annotated[
        str | None, typer.Option(help="bf16 (none quantised), int8 or int4; default: bf16, and all for --fit.")
    ] = None,
    attention: Annotated[
        str, typer.Option(help="flash, or sdpa with the masks that transformers makes for it.")
    ] = "flash",
    measure: Annotated[bool, typer.Option("--measure", help="Run it too, with random weights, and compare.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="Where to measure: cuda, cpu; default: CUDA where there is one.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="Size of a card, such as 24GB: the largest picture of each flow, and with what.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, CSV, pictures and a page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Say where the memory of a question about a picture goes: eager attention, published HiDe, and ours.

    And how many floating-point operations it takes. Predicted from the model's configuration: no GPU, no weights, no
    network, seconds for any size.

    [bold]Example:[/bold] hide profile --model Qwen2.5-VL-7B-Instruct --tokens 16384 --fit 24GB --out memory
    """
    console = Console(stderr=True)
    with errors(console), console.status("loading transformers") as status:
        quiet()
        if out is not None:
            check_folder(out, ("profile.json", "profile.csv", "profile.html"))
        found = _profile(
            status,
            model,
            tokens,
            image,
            view,
            flow,
            dtype,
            chunk,
            offload_kv,
            collage,
            weights,
            attention,
            measure,
            device,
            fit,
        )
        paths: list[Path] = []
        if out is not None:
            from hide.profiling.output import save

            status.update("drawing")
            paths = save(found, out)
    if as_json:
        typer.echo(json.dumps(found.document(), indent=1))
        return
    console = Console()
    for table in found.tables():
        console.print(table.rich())
    console.print(
        "GB are 10^9 bytes. Predictions count storages; CUDA's context and the allocator's losses come on top.",
        highlight=False,
    )
    if paths:
        console.print(escape(f"page: {paths[-1]}, and {len(paths) - 1} files more"), highlight=False, soft_wrap=True)


def _profile(
    status: Any,
    model: str,
    tokens: int | None,
    image: str | None,
    view: str | None,
    flow: str,
    dtype: str,
    chunk: int,
    offload_kv: bool,
    collage: int,
    weights: str | None,
    attention: str,
    measure: bool,
    device: str | None,
    fit: str | None,
) -> Profile:
    import dataclasses

    import torch

    from hide.models.devices import named_device
    from hide.models.quantised import check, quantise
    from hide.presets import RunSettings
    from hide.profiling.flows import FLOWS, flows_of
    from hide.profiling.models import DTYPES, WEIGHTS, build, parameter_count, read_config
    from hide.profiling.output import Profile
    from hide.profiling.runs import Settings, fits, measure_flow, parse_bytes, parse_pixels, predict_flow
    from hide.profiling.workload import Workload

    if tokens is not None and image is not None:
        raise ValueError("image: got --tokens and --image, want one of them")
    settings = Settings(dtype, weights or "bf16", attention)
    settings.check()
    quantised = settings.weights != "bf16"
    if device is not None and not measure:
        raise ValueError(f"device: got {device!r} without --measure, and predictions need none")
    target = named_device(device) if measure else None
    if target is not None and quantised:
        check(settings.weights, DTYPES[dtype], target)
        if settings.weights == "int4" and target.type == "cpu":
            raise ValueError("weights: a GPU's int4 is predicted, and a CPU's is laid out otherwise; measure on a GPU")
    names, budget = flows_of(flow), None if fit is None else parse_bytes(fit)
    size: int | tuple[int, int] = parse_pixels(image) if image else 16384 if tokens is None else tokens
    work = Workload(size, collage=collage, chunk=chunk, offload=offload_kv)
    works = [work]
    if view is not None:
        height, width = work.pixels
        most = RunSettings(view_tokens=view_tokens(view)).view(width, height)
        works.append(dataclasses.replace(work, view=most))
        names = tuple(dict.fromkeys((*names, "plain")))
    asked = [(name, own) for name in names for own in works if own.view is None or FLOWS[name].session]
    config = read_config(model)
    runs, measured, fitted = [], [], []
    # What fits is asked without a size, unless one is given.
    if fit is None or tokens is not None or image is not None or measure:
        for name, own in asked:
            status.update(f"predicting: {name}")
            runs.append(predict_flow(config, name, own, settings))
    if target is not None:
        status.update(f"building the model on {target}")
        with torch.device("cpu") if quantised else target:
            adapter = build(config, DTYPES[dtype])
        if quantised:
            quantise(adapter.model, settings.weights, target)
        for name, own in asked:
            status.update(f"measuring: {name}")
            measured.append(measure_flow(adapter, name, own))
    if budget is not None:
        kinds = WEIGHTS if weights is None else (weights,)
        fitted = fits(config, names, budget, work, settings, kinds, lambda what: status.update(f"fitting: {what}"))
    return Profile(Path(model).name, parameter_count(config), work, settings, runs, measured, fitted, budget)
