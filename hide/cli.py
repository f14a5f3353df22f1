"""The `hide` command."""

from __future__ import annotations

import json
import tempfile
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


@app.callback()
def main() -> None:
    """Commands share nothing; this makes `ask` a subcommand also while it is the only one."""


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
    out: Annotated[Path, typer.Option(help="Folder for the pictures and result.json.")] = Path("hide-out"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Answer a QUESTION about an IMAGE, with and without HiDe, and draw what was looked at.

    [bold]Example:[/bold] hide ask street.jpg "What is the color of the umbrella?" --model Qwen/Qwen2.5-VL-7B-Instruct
    """
    console = Console(stderr=True)
    try:
        with console.status("loading transformers") as status:
            from transformers.utils import logging

            from hide.report import save_pictures

            logging.set_verbosity_error()
            logging.disable_progress_bar()
            status.update(f"loading {model or 'the untrained model'}")
            hide = _load(model, preset, layer, sigma, threshold, device, dtype)
            result = hide.ask(image, question, options=option or None, progress=status.update)
            status.update("drawing")
            pictures = save_pictures(result, out)
            document = result.to_dict()
            if model is None:
                document["model"] = "untrained"
            (out / "result.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except (ValueError, TypeError, OSError) as error:
        console.print(f"[red]error[/red] {_plain(str(error))}", highlight=False)
        raise typer.Exit(1) from None
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
    console.print(f"pictures: {pictures[-1]} and {len(pictures) - 1} more in {out}/", highlight=False, soft_wrap=True)


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
