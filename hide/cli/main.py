"""The `hide` command: asking, attention maps, and what there is; the longer commands are in modules of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hide.cli.console import App, errors, quiet
from hide.cli.evaluate import calibrate, entities, evaluate, export
from hide.cli.loading import EMBEDDED, LoadOptions, ModelOptions, options_of
from hide.cli.profile import profile
from hide.cli.serve import serve
from hide.cli.train import app as train
from hide.output import check_folder
from hide.texts import listed

if TYPE_CHECKING:
    from hide.methods.base import Answer

app = App(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="HiDe (arXiv 2510.00054): a multimodal model looks closer at what the question is about. No training.",
    pretty_exceptions_show_locals=False,
)


@app.command()
@options_of(LoadOptions)
def ask(
    image: Annotated[
        str, typer.Argument(help="The picture: any file that Pillow reads, or a data URI.", show_default=False)
    ],
    question: Annotated[
        str,
        typer.Argument(
            help="The question. Options go on lines of their own: '(A) red', '(B) blue', or into --option.",
            show_default=False,
        ),
    ],
    load: LoadOptions,
    method: Annotated[str, typer.Option(help="How to answer; see `hide methods`.")] = "hide",
    option: Annotated[list[str] | None, typer.Option(help="An option to choose from; repeat it for each.")] = None,
    plain: Annotated[bool, typer.Option(help="Answer from the picture alone as well.")] = True,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens that each answer may have, at least 1; default: the preset's.")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure each step's memory as well; slower on a CPU.")
    ] = False,
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
    """Answer a QUESTION about an IMAGE, plainly and by a method, and draw what was looked at.

    [bold]Example:[/bold] hide ask street.jpg "What is the color of the umbrella?" --model Qwen/Qwen2.5-VL-7B-Instruct
    """
    console = Console(stderr=True)
    with errors(console), console.status("loading transformers") as status:
        quiet()
        from hide.methods.base import ask_all
        from hide.present.pages import save_pictures, save_report

        folders = list(dict.fromkeys(given for given in (out, report) if given)) or [Path("hide-out")]
        for folder in folders:
            check_folder(folder, ("result.json", "overview.png"), argument="report" if folder == report else "out")
        if report is not None:
            check_folder(report, ["report.html"], argument="report")
        status.update(f"loading {load.model or 'the embedded model'}")
        names = ["plain", method] if plain and method != "plain" else [method]
        methods = load.methods(names)
        answers = ask_all(
            methods,
            image,
            question,
            options=option or None,
            max_new_tokens=max_new_tokens,
            progress=status.update,
            memory=memory,
        )
        answer, beside = answers[-1], answers[0] if len(answers) > 1 else None
        status.update("drawing")
        document = answer.to_dict() | {"model": load.model or "embedded", "weights": load.weights}
        if beside is not None:
            document |= {"plain_answer": beside.text, "plain_letter": beside.letter}
        for folder in folders:
            pictures = save_pictures(answer, folder, plain=beside)
            (folder / "result.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if report is not None:
            page = save_report(answer, report, plain=beside, settings=methods[-1].preset.to_dict(), model=load.shown)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return

    console = Console()
    if load.model is None:
        console.print(f"[yellow]Answered by {EMBEDDED}. Pass --model for photographs.[/yellow]", highlight=False)
    console.print(_facts(answer, beside))
    console.print(_times(answer, beside))
    if report is not None:
        console.print(f"report: {escape(str(page))}", highlight=False, soft_wrap=True)
    saved = f"pictures: {pictures[-1]} and {len(pictures) - 1} more in {folder}/"
    console.print(escape(saved), highlight=False, soft_wrap=True)


def _facts(answer: Answer, plain: Answer | None) -> Table:
    """What was asked, seen and said."""
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("question", escape(answer.question.stem))
    for name, value in answer.details.items():
        facts.add_row(escape(name.replace("_", " ")), escape(", ".join(listed(value))))
    shown = [found.shown_tokens for found in answer.evidence if found.shown_tokens is not None]
    facts.add_row("image tokens", " + ".join(map(str, [*answer.image_tokens, *shown])))
    for index, boxes in enumerate(answer.boxes):
        corners = "  ".join(str(tuple(box)) for box in boxes.tolist()[:6]) + (
            f"  … {len(boxes)} in all" if len(boxes) > 6 else ""
        )
        facts.add_row("boxes" if len(answer.boxes) == 1 else f"boxes {index}", corners or "none")
    if plain is not None:
        facts.add_row("plain answer", f"[bold]{escape(plain.text)}[/bold]")
    facts.add_row(f"{escape(answer.method)} answer", f"[bold]{escape(answer.text)}[/bold]")
    for note in answer.notes:
        facts.add_row("note", f"[yellow]{escape(note)}[/yellow]")
    return facts


def _times(answer: Answer, plain: Answer | None) -> Table:
    """What it cost, step by step."""
    steps = dict(answer.steps)
    if plain is not None:
        steps = {"plain answer": plain.steps["answer"], **steps}
    total = sum(step.seconds for step in steps.values())
    measured = any(step.peak is not None for step in steps.values())
    columns = ["step", "seconds", "share", "tokens", *(["peak memory"] if measured else [])]
    times = Table(*columns, title="Time", title_justify="left")
    for column in times.columns[1:]:
        column.justify = "right"
    for name, (seconds, tokens, peak) in steps.items():
        memory = [] if not measured else ["" if peak is None else f"{peak / 1e9:.3f} GB"]
        share = f"{seconds / (total or 1):.0%}"
        times.add_row(escape(name), f"{seconds:.3f}", share, f"{tokens:,}" if tokens else "", *memory)
    times.add_row("total", f"{total:.3f}", "", f"{sum(step.tokens for step in steps.values()):,}", style="bold")
    return times


@app.command()
@options_of(ModelOptions)
def attend(
    image: Annotated[
        str, typer.Argument(help="The picture: any file that Pillow reads, or a data URI.", show_default=False)
    ],
    text: Annotated[str, typer.Argument(help="What the model is told about it.", show_default=False)],
    load: ModelOptions,
    layers: Annotated[
        str | None, typer.Option(help="Zero-based layers to average: '14', '10,14', '8-15'; default: the preset's.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Draw so many tokens of the reply, at least 1.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for attention.png and attention.npz.")] = Path("hide-attend"),
) -> None:
    """Draw what each token of a TEXT, and of the reply to it, attends to in an IMAGE. No HiDe in it.

    These are the model's own attention maps, with FlashAttention or SDPA running and no attention matrix made.

    [bold]Example:[/bold] hide attend street.jpg "Where is it?" --model Qwen/Qwen2.5-VL-7B-Instruct --layers 10-18
    """
    console = Console(stderr=True)
    with errors(console), console.status("loading transformers") as status:
        quiet()
        from hide.methods.attend import attend as attention_of
        from hide.methods.hide.method import HiDe
        from hide.present.pages import save_attention

        if tokens < 1:
            raise ValueError(f"tokens: got {tokens}, want at least 1")
        given = _layer_list(layers) if layers else None
        check_folder(out, ("attention.png", "attention.npz"))
        status.update(f"loading {load.model or 'the embedded model'}")
        model = load.load()
        status.update("attending")
        wanted = given or HiDe.preset_for(model)[0].settings.layers or range(model.num_layers)
        found = attention_of(model, image, text, layers=wanted, new_tokens=tokens)
        status.update("drawing")
        paths = save_attention(found, out)
    console = Console()
    if load.model is None:
        console.print(f"[yellow]Attention of {EMBEDDED}. Pass --model for photographs.[/yellow]", highlight=False)
    table = Table(
        "token", "of", "share on the image", "peak at (x, y)", title=f"Attention, layers {list(found.layers)}"
    )
    rows, columns = found.maps.shape[1:]
    for index, (token, own) in enumerate(zip(found.tokens, found.maps, strict=True)):
        y, x = divmod(int(own.argmax()), columns)
        peak = f"{int((x + 0.5) / columns * found.image.width)}, {int((y + 0.5) / rows * found.image.height)}"
        table.add_row(
            escape(token.strip() or repr(token)),
            "text" if index < found.prompt_tokens else "reply",
            f"{float(own.sum()):.1%}",
            peak,
        )
    console.print(table)
    for note in model.notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
    console.print(f"reply: [bold]{escape(found.reply)}[/bold]")
    console.print(f"pictures: {paths[0]}; maps as arrays: {paths[1]}", highlight=False, soft_wrap=True)


app.command("eval")(evaluate)
app.command()(export)
app.command()(calibrate)
app.command()(entities)
app.command()(profile)
app.command()(serve)
app.add_typer(train, name="train")


@app.command()
def models() -> None:
    """List the model families that HiDe knows: checkpoints, presets, and what they are tested with."""
    console = Console(stderr=True)
    with console.status("loading transformers"):
        quiet()
        from hide.methods.base import MODELS
        from hide.models import FAMILIES, adapter_class

        families = {model_type: adapter_class(model_type) for model_type in FAMILIES}
    table = Table("model_type", "", "")
    for model_type, family in families.items():
        default, *others = (name for name, preset in MODELS.items() if preset.family == model_type)
        table.add_row(f"[bold]{model_type}[/bold]", "class", family.model_class)
        table.add_row("", "checkpoints", "\n".join(family.checkpoints))
        table.add_row("", "presets", "\n".join([f"{default} (default)", *others]))
        table.add_row("", "tested with", family.tested, end_section=True)
    console = Console()
    console.print(table)
    console.print(
        "Loaded by the model_type of config.json, with transformers' own classes and no remote code. Each is held to "
        "transformers' own forward and generate, in small models with random weights: tests/test_families.py. "
        "Attention rows of any other decoder: hide_kernels.integrations.transformers.capture_attention.",
        highlight=False,
    )


@app.command()
def methods() -> None:
    """List the ways of answering: ours, and those of other packages that are installed (entry point hide.methods)."""
    console = Console(stderr=True)
    with errors(console), console.status("loading transformers"):
        quiet()
        from hide.methods import BUILT_IN, method_class, method_names

        table = Table("method", "what the model sees", "needs of a session", "from")
        for name in method_names():
            try:
                found = method_class(name)
            except ValueError as error:
                table.add_row(escape(name), f"[red]{escape(str(error))}[/red]", "", "")
                continue
            origin = "hide" if name in BUILT_IN else found.__module__.partition(".")[0]
            table.add_row(escape(name), escape(found.summary), ", ".join(sorted(found.needs)), escape(origin))
    Console().print(table)


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
