"""The commands `hide eval`, `hide export`, `hide calibrate` and `hide entities`."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hide.cli.console import errors, left_out, progress_bar, quiet
from hide.cli.loading import LoadOptions, ModelOptions, options_of, view_or_whole, way_names
from hide.output import check_folder

if TYPE_CHECKING:
    from hide.evaluation.data import BadRecord, Sample
    from hide.methods.base import Method
    from hide.methods.hide.method import HiDe
    from hide.present.table import ResultTable

DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="scenes, scenes:TOKENS for large ones, or FORMAT:PATH with FORMAT one of vstar, hr-bench, mme-realworld,"
        " list.",
    ),
]


@options_of(LoadOptions)
def evaluate(
    load: LoadOptions,
    data: DataOption = "scenes",
    limit: Annotated[int, typer.Option(help="At most so many questions.")] = 200,
    methods: Annotated[
        str,
        typer.Option(
            help="Ways of answering, separated by commas, or all: methods of `hide methods`, with a view or settings"
            " where they have some of their own: hide@auto, plain@700, hide@auto\\[gate=3]."
        ),
    ] = "plain,hide",
    scorer: Annotated[str, typer.Option(help="strict, or compat: the published metric.")] = "strict",
    corrupt_entities: Annotated[
        str | None, typer.Option(help="drop, wrong or add: make one entity of every question wrong, for HiDe.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask questions again that failed.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Run on Ray: 'local' starts it here, else the address of a cluster, such as auto."),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(help="Models to run on Ray; default: one per GPU, without GPUs one per CPU.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results.jsonl, summary.md and report.html; a killed run goes on there.")
    ] = Path("hide-eval"),
) -> None:
    """Ask a data set's questions, plain and by methods, and score the answers.

    Every answer is on the disk before the next question: run the same command again after a crash and it goes on.

    [bold]Examples:[/bold]

    hide eval --methods all --limit 60

    hide eval --methods "plain,hide,hide@auto,hide@auto\\[gate=3]" --limit 60

    hide eval --data vstar:vstar_bench --model Qwen/Qwen2.5-VL-7B-Instruct --out vstar-7b

    hide eval --data hr-bench:hr_bench_4k.tsv --model Qwen/Qwen2.5-VL-7B-Instruct --ray local
    """
    console = Console(stderr=True)
    with errors(console):
        quiet()
        import torch

        from hide.evaluation.data import read_data
        from hide.evaluation.gallery import frontier, save_gallery
        from hide.evaluation.on_ray import ask_on_ray
        from hide.evaluation.predicted_memory import held, predicted_memory
        from hide.evaluation.runner import ask_here
        from hide.evaluation.runner import evaluate as run
        from hide.evaluation.scoring import SCORERS
        from hide.evaluation.store import ResultFile
        from hide.evaluation.tables import agreement_table, bad_table, group_table, method_table
        from hide.present.pages import Section
        from hide.tiny import CHECKPOINT

        if scorer not in SCORERS:
            raise ValueError(f"scorer: got {scorer!r}, want one of {', '.join(SCORERS)}")
        if actors is not None and (ray is None or actors < 1):
            raise ValueError(f"actors: got {actors}, want at least 1, together with --ray")
        _check_count("limit", limit)
        names = way_names(methods, load.model or CHECKPOINT, functools.partial(left_out, console))
        samples = functools.partial(read_data, data, limit)
        _check_readable(data, samples())
        check_folder(out, ("results.jsonl", "summary.md", "report.html"))
        make = functools.partial(_ways, load, names, corrupt_entities, data)
        asked = make()
        settings = {
            "data": data,
            **load.facts(),
            "methods": names,
            "corrupt_entities": corrupt_entities,
            **{f"{way}.{name}": value for way, one in asked.items() for name, value in one.preset.to_dict().items()},
        }
        ways = {way: held(one, load.weights) for way, one in asked.items()}
        records: list[dict[str, Any]] = []
        with ResultFile(out / "results.jsonl", settings) as results, progress_bar(console) as bar:
            task = bar.add_task("questions", total=limit)

            def done(record: dict[str, Any]) -> None:
                records.append(record)
                bar.advance(task)

            ask: Callable[..., Any]
            if ray is None:
                ask = functools.partial(ask_here, asked)
            else:
                # The actors have models of their own, on the same GPUs.
                del asked
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                ask = functools.partial(ask_on_ray, make, address=ray, actors=actors)
            run(ask, samples(), results, retry_failed=retry_failed, progress=done)
            bar.update(task, total=len(records))
        score, bad = SCORERS[scorer], bad_table(records)
        table = method_table(records, score, names, predicted_memory(ways, records))
        alike = agreement_table(records, score)
        about = (
            "p is of McNemar's exact test against the plain answers. Tokens and seconds of a session that ways share "
            "are counted for each. Memory is predicted, for the largest image."
        )
        parts = [
            Section("Side by side", about, [table]),
            frontier(records, score),
            Section("Agreement", tables=[alike]) if len(alike.rows) > 1 else None,
            Section("Splits and sizes", tables=[group_table(records, score, names), *([bad] if bad else [])]),
        ]
        sections = [part for part in parts if part is not None]
        tables = [table for part in sections for table in part.tables]
        title = f"{data}, {load.model or 'the embedded model'}, {scorer} scorer"
        page = save_gallery(out / "report.html", title, sections, records, samples(), score, settings)
        _finish(console, out, title, tables, [page, out / "results.jsonl"])


@options_of(LoadOptions)
def export(
    load: LoadOptions,
    data: DataOption = "scenes",
    limit: Annotated[int, typer.Option(help="At most so many questions.")] = 200,
    method: Annotated[
        str, typer.Option(help="Whose pictures stand behind the image, as in `hide eval`; plain: none.")
    ] = "hide",
    form: Annotated[str, typer.Option(help="llava, messages or webdataset; another one later asks nothing again.")] = (
        "llava"
    ),
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try questions again that failed.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for pictures, records and the form; a killed run goes on there.")
    ] = (Path("hide-export")),
) -> None:
    """Write a data set to train on: images, what a method shows of them, questions, right answers.

    llava: one JSON list of conversations. messages: chat messages, a line each, as Qwen-VL's processor takes them.
    webdataset: tar files with pictures and JSON. The boxes of data set and method are in results.jsonl and webdataset.

    [bold]Example:[/bold] hide export --data vstar:vstar_bench --model Qwen/Qwen2.5-VL-7B-Instruct --form messages
    """
    console = Console(stderr=True)
    with errors(console):
        quiet()
        from hide.evaluation.data import read_data
        from hide.evaluation.export import FORMS, export_here, save
        from hide.evaluation.runner import evaluate as run
        from hide.evaluation.store import ResultFile

        if form not in FORMS:
            raise ValueError(f"form: got {form!r}, want one of {', '.join(FORMS)}")
        _check_count("limit", limit)
        _check_readable(data, read_data(data, limit))
        check_folder(out, ("results.jsonl",))
        made = load.methods([method])[0]
        settings = {"data": data, **load.facts(), "method": method, **made.preset.to_dict()}
        records: list[dict[str, Any]] = []
        with ResultFile(out / "results.jsonl", settings) as results, progress_bar(console) as bar:
            task = bar.add_task("questions", total=limit)

            def done(record: dict[str, Any]) -> None:
                records.append(record)
                bar.advance(task)

            ask = functools.partial(export_here, made, out)
            run(ask, read_data(data, limit), results, retry_failed=retry_failed, progress=done)
            bar.update(task, total=len(records))
            written = save(out, records, form)
    failed = [f"{record['id']}: {record['error']}" for record in records if record["error"]]
    console.print(escape(f"{written}: {len(records) - len(failed)} questions"), highlight=False, soft_wrap=True)
    if failed:
        left_out(console, f"{len(failed)} questions, which results.jsonl names; the first is {failed[0]}")


@options_of(ModelOptions)
def calibrate(
    load: ModelOptions,
    data: DataOption = "scenes",
    limit: Annotated[int, typer.Option(help="Questions for layers, view, sigma and threshold.")] = 100,
    answers: Annotated[int, typer.Option(help="Questions to answer in every form of collage; 0: none.")] = 40,
    preset: Annotated[str | None, typer.Option(help="Name of a preset; default: the one for the model.")] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Zero-based decoder layer, instead of the best; repeat it to average.")
    ] = None,
    views: Annotated[
        str,
        typer.Option(
            help="Views to choose from, separated by commas: tokens, auto, whole; layers: on whole, or the first."
        ),
    ] = "whole,auto,500,1000,2000,4000",
    heads: Annotated[
        bool, typer.Option("--heads", help="Instead, the heads that `hide train q-zoom` makes labels of: heads.json.")
    ] = False,
    request: Annotated[str, typer.Option(help="With --heads: what questions are followed by.")] = "",
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, calibration.json, summary.md and pictures.")
    ] = Path("hide-calibrate"),
) -> None:
    """Find the layer, view, sigma and threshold for a model, from questions with the boxes of what they ask about.

    The view is the smallest one that finds as much as any, within the error of so many questions.

    The scenes it draws are others than those of `hide eval`. Of the benchmarks, V*Bench has boxes.

    [bold]Example:[/bold] hide calibrate --data vstar:vstar_bench --model Qwen/Qwen2.5-VL-7B-Instruct --out calibrate-7b
    """
    console = Console(stderr=True)
    with errors(console), progress_bar(console) as bar:
        quiet()
        from hide.evaluation import calibrate as experiments
        from hide.evaluation.data import Sample, read_data
        from hide.evaluation.runner import ask_here
        from hide.evaluation.runner import evaluate as run
        from hide.evaluation.scoring import SCORERS
        from hide.evaluation.store import ResultFile
        from hide.evaluation.tables import bad_table, method_table
        from hide.methods.hide.method import HiDe

        _check_count("limit", limit)
        _check_count("answers", answers, least=0)
        given = dict.fromkeys(name.strip() for name in views.split(","))
        looks: list[experiments.View] = [view_or_whole(name) for name in given]
        read = functools.partial(read_data, data, seed=_CALIBRATION_SEED)
        _check_readable(data, read(limit))
        check_folder(out, ("calibration.json", "answers.jsonl", "summary.md", "report.html", "layers.png", "grid.png"))
        chosen = [one for one in read(limit) if isinstance(one, Sample) and one.boxes]
        if not chosen:
            raise ValueError(f"data: {data} has no boxes, and without them there is nothing to calibrate by")
        failed: dict[str, str] = {}

        def fail(sample: Sample, error: Exception) -> None:
            failed[sample.id] = f"{type(error).__name__}: {error}"

        model = load.load()
        if heads:
            from hide.training.heads import choose, head_table

            task = bar.add_task("heads", total=len(chosen))
            advance = functools.partial(bar.advance, task)
            scores = experiments.head_sweep(model, chosen, request=request, progress=advance, failed=fail)
            file = out / "heads.json"
            out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(choose(scores, request).to_dict(), indent=1) + "\n", encoding="utf-8")
            title = f"{data}, {load.model or 'the embedded model'}"
            _finish(console, out, title, [head_table(scores), *_failed_table(failed, len(chosen))], [file])
            return
        known, notes = HiDe.preset_for(model, preset)
        known = known.changed(view_tokens=None if None in looks else looks[0])
        hide = HiDe(model, known.changed(layers=tuple(layer)) if layer else known, notes=notes)
        task = bar.add_task("layers", total=len(chosen))
        layers = experiments.layer_sweep(hide, chosen, progress=functools.partial(bar.advance, task), failed=fail)
        hide = hide.changed(layers=tuple(layer or [experiments.best_layer(layers)]))
        task = bar.add_task("view, sigma and threshold", total=len(chosen))
        swept = experiments.view_sweep(hide, chosen, looks, progress=functools.partial(bar.advance, task), failed=fail)
        view = experiments.best_view(swept)
        _, sigma, threshold, _, _, grid = swept[view]
        hide = hide.changed(view_tokens=view, sigma=sigma, threshold=threshold)
        out.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {
            "data": data,
            **load.facts(),
            "questions": len(chosen),
            "failed": failed,
            **experiments.to_dict(layers, swept, grid),
            "recommended": {
                "layers": hide.settings.layers,
                "view_tokens": view,
                "sigma": sigma,
                "threshold": threshold,
            },
        }
        file = out / "calibration.json"

        def save() -> None:
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

        save()  # what was measured is not lost for an error in the answers
        pictures = experiments.save_pictures(out, layers, grid)
        forms: list[ResultTable] = []
        if answers:
            task = bar.add_task("answers", total=answers)
            settings = {"data": data, **load.facts(), **hide.preset.to_dict()}
            records: list[dict[str, Any]] = []

            def done(record: dict[str, Any]) -> None:
                records.append(record)
                bar.advance(task)

            with ResultFile(out / "answers.jsonl", settings) as results:
                ask = functools.partial(ask_here, forms_of_collage(hide))
                with_boxes = (one for one in read(answers) if not isinstance(one, Sample) or one.boxes)
                run(ask, with_boxes, results, progress=done)
            forms = [method_table(records, SCORERS["strict"]), *([bad] if (bad := bad_table(records)) else [])]
            found["answers"] = records
            save()
    changes = {
        name: value
        for name, value in dataclasses.asdict(hide.settings).items()
        if value != next(f.default for f in dataclasses.fields(hide.settings) if f.name == name)
    }
    recommended = f"HiDeConfig({', '.join(f'{name}={value!r}' for name, value in changes.items())})"
    sections = experiments.sections(layers, swept, grid, pictures, forms, _failed_table(failed, len(chosen)))
    title = f"{data}, {load.model or 'the embedded model'}"
    about = {"data": data, **load.facts(), "questions": len(chosen), "preset": preset, "views": views}
    page = experiments.save_page(out / "report.html", title, sections, view, recommended, about)
    tables = [table for part in sections for table in part.tables]
    _finish(console, out, title, tables, [page, file, *pictures])
    Console().print(f"recommended: {recommended}")
    if view is not None:
        Console().print(f"on a view: RunSettings(view_tokens={view!r}), --view {view}")


def _failed_table(failed: dict[str, str], asked: int) -> list[ResultTable]:
    """One table, or none where nothing failed."""
    from hide.present.table import ResultTable

    title = f"Questions that could not be measured: {len(failed)} of {asked}"
    return [ResultTable(title, ("question", "error"), list(failed.items()))] if failed else []


def forms_of_collage(hide: HiDe) -> dict[str, Method[Any]]:
    """Plain and HiDe, its boxes shown in other forms, and the right boxes, all with its settings."""
    from hide.methods.ablations import Masked, OneCrop, Tiles, TrueBoxes
    from hide.methods.base import NoSettings
    from hide.methods.plain import Plain

    plain = Plain(hide.model, hide.preset.with_settings(NoSettings()))
    forms = [plain, hide, *(form(hide.model, hide.preset) for form in (Tiles, Masked, OneCrop, TrueBoxes))]
    return {form.name: form for form in forms}


@options_of(ModelOptions)
def entities(
    load: ModelOptions,
    data: Annotated[
        Path | None,
        typer.Option(help="JSON lines with question, entities and, if any, options; default: the project's own 76."),
    ] = None,
    misses: Annotated[bool, typer.Option("--misses", help="Print every question that differs.")] = False,
) -> None:
    """Precision and recall of entity extraction, by rules and, with --model, by the model.

    Things: an entity is right if its content words are those of an annotated one. Words: each counts by itself, as each
    token has its own map in HiDe.

    [bold]Example:[/bold] hide entities --model Qwen/Qwen2.5-VL-7B-Instruct --misses
    """
    console = Console(stderr=True)
    with errors(console), progress_bar(console) as bar:
        quiet()
        from hide.evaluation.entity_quality import labelled_questions, score_entities
        from hide.methods.hide.entities import entities_by_rules
        from hide.methods.hide.method import HiDe
        from hide.present.table import ResultTable

        questions = labelled_questions(data, bad=functools.partial(left_out, console))
        extractors: dict[str, Any] = {"rules": entities_by_rules}
        if load.model is not None:
            extractors[load.model] = HiDe(load.load()).changed(entities_from="model").entities
        rows, wrong = [], {}
        for name, extract in extractors.items():
            task = bar.add_task(name, total=len(questions))
            scores = score_entities(extract, questions, progress=functools.partial(bar.advance, task))
            wrong[name] = scores.wrong
            shares = (share for s in (scores.things, scores.words) for share in (s.precision, s.recall))
            rows.append((name, *(f"{share:.1%}" for share in shares)))
    header = ("extractor", "things: precision", "recall", "words: precision", "recall")
    Console().print(ResultTable(f"Entities of {len(questions)} questions", header, rows).rich())
    for name, differing in wrong.items() if misses else ():
        for annotated, found in differing:
            Console().print(
                f"[bold]{escape(annotated.question.text)}[/bold]\n  wanted: {escape(', '.join(annotated.entities))}\n"
                f"  {escape(name)}: {escape(', '.join(found))}"
            )


# Scenes of `hide eval` begin at a million, training's at 2**40.
_CALIBRATION_SEED = 500_000


def _check_readable(data: str, records: Iterator[Sample | BadRecord]) -> None:
    """Refuse a data set without any question, before anything is written: it may be of another format."""
    from hide.evaluation.data import BadRecord

    bad: list[BadRecord] = []
    for record in records:
        if not isinstance(record, BadRecord):
            return
        bad.append(record)
    if bad:
        raise ValueError(
            f"data: none of the {len(bad)} records of {data} is a question; {bad[0].place}: {bad[0].reason}"
        )
    raise ValueError(f"data: {data} holds no question")


def _check_count(name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise ValueError(f"{name}: got {value}, want at least {least}")


def _ways(load: LoadOptions, names: Sequence[str], corrupt: str | None, data: str) -> dict[str, Method[Any]]:
    """The ways of answering on one model; those that extract entities with wrong ones, where that is asked for."""
    from hide.methods.hide.method import HiDe

    made = dict(zip(names, load.methods(names), strict=True))
    if corrupt is None:
        return made
    from hide.evaluation.entity_quality import other_things, with_wrong_entities

    others = other_things(data)
    return {
        name: with_wrong_entities(method, corrupt, others) if isinstance(method, HiDe) else method
        for name, method in made.items()
    }


def _finish(console: Console, out: Path, title: str, tables: Sequence[ResultTable], files: Sequence[Path]) -> None:
    """Write the tables with the command that made them, and print them."""
    from hide.evaluation.tables import markdown

    command = shlex.join(["hide", *sys.argv[1:]])
    (out / "summary.md").write_text(markdown(title, command, tables), encoding="utf-8", errors="replace")
    screen = Console()
    unlimited = screen.options.update(width=10_000)
    for table in tables:
        drawn = table.rich()
        # A table of all methods by all methods cannot be read with its words cut off.
        if len(table.header) > 9 and screen.measure(drawn, options=unlimited).minimum > screen.width:
            screen.print(escape(f"{table.title}: too wide for this terminal, see summary.md"), highlight=False)
        else:
            screen.print(drawn)
    for file in (out / "summary.md", *files):
        console.print(escape(str(file)), highlight=False, soft_wrap=True)
