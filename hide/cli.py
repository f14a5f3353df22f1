"""The `hide` command."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from hide.pipeline import HiDe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="HiDe (arXiv 2510.00054): a multimodal model looks closer at what the question is about. No training.",
    pretty_exceptions_show_locals=False,
)


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="The picture: any file that Pillow reads.", show_default=False)],
    question: Annotated[
        str,
        typer.Argument(
            help="The question. Options go on lines of their own: '(A) red', '(B) blue', or into --option.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A Qwen2.5-VL checkpoint: folder or hub name. Without it, a small random-weight model."),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="An option to choose from; repeat it for each.")] = None,
    preset: Annotated[str | None, typer.Option(help="Name of a preset; default: the one for the model.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Zero-based decoder layer; repeat it to average.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Smoothing of the maps, in grid cells.")] = None,
    threshold: Annotated[float | None, typer.Option(help="A region's cells reach this part of the peak.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: CUDA where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the pictures and result.json; default: the one of --report, or hide-out."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, one page that shows and explains it all, with pictures and result."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Answer a QUESTION about an IMAGE, with and without HiDe, and draw what was looked at.

    [bold]Example:[/bold] hide ask street.jpg "What is the color of the umbrella?" --model Qwen/Qwen2.5-VL-7B-Instruct
    """
    console = Console(stderr=True)
    with _errors(console), console.status("loading transformers") as status:
        from hide.report import save_pictures, save_report

        _quiet()
        status.update(f"loading {model or 'the untrained model'}")
        hide = _load(model, preset, layer, sigma, threshold, device, dtype)
        result = hide.ask(image, question, options=option or None, progress=status.update)
        status.update("drawing")
        document = result.to_dict()
        if model is None:
            document["model"] = "untrained"
        for folder in dict.fromkeys(given for given in (out, report) if given) or [Path("hide-out")]:
            pictures = save_pictures(result, folder, hide.config.threshold)
            (folder / "result.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if report is not None:
            name = model or "untrained, random weights: what it sees and answers means nothing"
            page = save_report(result, report, hide.config, model=name)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return

    console = Console()
    if model is None:
        console.print(
            "[yellow]The model is untrained: random weights. Entities, maps, boxes and collage are computed for real, "
            "but what they show and what it answers mean nothing. Pass --model for answers.[/yellow]"
        )
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("question", _plain(result.question.stem))
    facts.add_row("entities", _plain(result.entities.text))
    facts.add_row("image tokens", " + ".join(str(count) for count in result.image_tokens))
    for index, boxes in enumerate(result.boxes):
        listed = "  ".join(str(tuple(box)) for box in boxes.tolist()[:6]) + (
            f"  … {len(boxes)} in all" if len(boxes) > 6 else ""
        )
        facts.add_row("boxes" if len(result.boxes) == 1 else f"boxes {index}", listed or "none")
    facts.add_row("plain answer", f"[bold]{_plain(result.plain_answer or '')}[/bold]")
    facts.add_row("HiDe answer", f"[bold]{_plain(result.answer)}[/bold]")
    for note in result.notes:
        facts.add_row("note", f"[yellow]{_plain(note)}[/yellow]")
    console.print(facts)
    times = Table("step", "seconds", "share", title="Time", title_justify="left")
    total = sum(result.seconds.values())
    for column in times.columns[1:]:
        column.justify = "right"
    for step, seconds in result.seconds.items():
        times.add_row(step, f"{seconds:.3f}", f"{seconds / total:.0%}")
    times.add_row("total", f"{total:.3f}", "", style="bold")
    console.print(times)
    if report is not None:
        console.print(f"report: {_plain(str(page))}", highlight=False, soft_wrap=True)
    saved = f"pictures: {pictures[-1]} and {len(pictures) - 1} more in {folder}/"
    console.print(_plain(saved), highlight=False, soft_wrap=True)


@app.command()
def attend(
    image: Annotated[Path, typer.Argument(help="The picture: any file that Pillow reads.", show_default=False)],
    text: Annotated[str, typer.Argument(help="What the model is told about it.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="A Qwen2.5-VL checkpoint: folder or hub name. Without it, a small random-weight model."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Zero-based layers to average: '14', '10,14', '8-15'; default: the preset's.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Draw so many tokens of the reply, at least 1.")] = 8,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: CUDA where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for attention.png and attention.npz.")] = Path("hide-attend"),
) -> None:
    """Draw what each token of a TEXT, and of the reply to it, attends to in an IMAGE. No HiDe in it.

    These are the model's own attention maps, with FlashAttention or SDPA running and no attention matrix made.

    [bold]Example:[/bold] hide attend street.jpg "Where is it?" --model Qwen/Qwen2.5-VL-7B-Instruct --layers 10-18
    """
    console = Console(stderr=True)
    with _errors(console), console.status("loading transformers") as status:
        from hide.attend import attend as attention_of

        _quiet()
        status.update(f"loading {model or 'the untrained model'}")
        hide = _load(model, None, None, None, None, device, dtype)
        status.update("attending")
        wanted = _layer_list(layers) if layers else hide.config.layers or range(hide.model.num_layers)
        found = attention_of(hide.model, image, text, layers=wanted, new_tokens=tokens)
        status.update("drawing")
        paths = found.save(out)
    console = Console()
    if model is None:
        console.print("[yellow]The model is untrained: random weights. Its attention means nothing.[/yellow]")
    table = Table(
        "token", "of", "share on the image", "peak at (x, y)", title=f"Attention, layers {list(found.layers)}"
    )
    rows, columns = found.maps.shape[1:]
    for index, (token, own) in enumerate(zip(found.tokens, found.maps, strict=True)):
        y, x = divmod(int(own.argmax()), columns)
        peak = f"{int((x + 0.5) / columns * found.image.width)}, {int((y + 0.5) / rows * found.image.height)}"
        table.add_row(
            _plain(token.strip() or repr(token)),
            "text" if index < found.prompt_tokens else "reply",
            f"{float(own.sum()):.1%}",
            peak,
        )
    console.print(table)
    console.print(f"reply: [bold]{_plain(found.reply)}[/bold]")
    console.print(f"pictures: {paths[0]}; maps as arrays: {paths[1]}", highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    data: Annotated[
        str,
        typer.Option(help="scenes, or FORMAT:PATH with FORMAT one of vstar, hr-bench, mme-realworld, list."),
    ] = "scenes",
    model: Annotated[
        str | None,
        typer.Option(help="A Qwen2.5-VL checkpoint: folder or hub name. Without it, a small random-weight model."),
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many questions.")] = 200,
    scorer: Annotated[str, typer.Option(help="strict, or compat: the published metric.")] = "strict",
    preset: Annotated[str | None, typer.Option(help="Name of a preset; default: the one for the model.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Zero-based decoder layer; repeat it to average.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Smoothing of the maps, in grid cells.")] = None,
    threshold: Annotated[float | None, typer.Option(help="A region's cells reach this part of the peak.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask questions again that failed.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: CUDA where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl; a killed run goes on there.")] = Path(
        "hide-eval"
    ),
) -> None:
    """Ask a data set's questions, plain and with HiDe, and score the answers.

    Every answer is on the disk before the next question: run the same command again after a crash and it goes on.

    [bold]Example:[/bold] hide eval --data vstar:vstar_bench --model Qwen/Qwen2.5-VL-7B-Instruct --out vstar-7b
    """
    console = Console(stderr=True)
    with _errors(console):
        from itertools import islice

        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from hide.evaluation.data import READERS, scenes
        from hide.evaluation.runner import METHODS, ResultFile, scores
        from hide.evaluation.runner import evaluate as run
        from hide.evaluation.scoring import SCORERS

        _quiet()
        if scorer not in SCORERS:
            raise ValueError(f"scorer: got {scorer!r}, want one of {', '.join(SCORERS)}")
        kind, _, path = data.partition(":")
        if data != "scenes" and (kind not in READERS or not path):
            raise ValueError(f"data: got {data!r}, want scenes or FORMAT:PATH with FORMAT one of {', '.join(READERS)}")
        # One at a time: a benchmark's pictures are gigabytes.
        samples = islice(READERS[kind](path), limit) if path else scenes(limit)
        hide = _load(model, preset, layer, sigma, threshold, device, dtype)
        settings = {"data": data, "model": model or "untrained", **dataclasses.asdict(hide.config)}
        bar = Progress(
            TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        with ResultFile(out / "results.jsonl", settings) as results, bar:
            task = bar.add_task("questions", total=limit)
            records: list[dict[str, Any]] = []

            def done(record: dict[str, Any]) -> None:
                records.append(record)
                bar.advance(task)

            run(hide, samples, results, retry_failed=retry_failed, progress=done)
            bar.update(task, total=len(records))
        if not records:
            raise ValueError(f"data: {data} holds no question")
    table = Table("split", *METHODS, "no answer read", "failed", title=f"{len(records)} questions, {scorer} scorer")
    for name, of_method, unreadable, failed in scores(records, SCORERS[scorer]):
        table.add_row(name, *(str(of_method[method]) for method in METHODS), str(unreadable), str(failed))
    Console().print(table)
    console.print(f"results: {out / 'results.jsonl'}", highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what this machine has, what each operator runs on and why, and what to install for more."""
    from hide.doctor import main as examine

    raise typer.Exit(examine(typer.echo))


def _layer_list(text: str) -> list[int]:
    """'14', '10,14', '8-15' -> layers, each once."""
    layers: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(
                f"layers: got {text!r}, want numbers such as 14, lists such as 10,14 or ranges such as 8-15"
            )
        layers.update(dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1)))
    return list(layers)


def _quiet() -> None:
    """No progress bars and warnings of transformers between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _errors(console: Console) -> Iterator[None]:
    """What a user can mend is one line and exit code 1, not a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        console.print(f"[red]error[/red] {_plain(str(error))}", highlight=False)
        raise typer.Exit(1) from None


def _load(
    model: str | None,
    preset: str | None,
    layer: list[int] | None,
    sigma: float | None,
    threshold: float | None,
    device: str | None,
    dtype: str,
) -> HiDe:
    from hide.pipeline import HiDe

    given = {"layers": tuple(layer) if layer else None, "sigma": sigma, "threshold": threshold}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if model is not None:
        return HiDe.from_pretrained(model, preset=preset, device=device, dtype=dtype, **changes)
    from hide.tiny.model import build, save

    with tempfile.TemporaryDirectory() as folder:
        save(folder, *build())
        return HiDe.from_pretrained(folder, preset=preset or "tiny", device=device, dtype=dtype, **changes)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
