"""Accuracy over cost: `python -m benchmarks.frontier --out frontier`.

Plain answers at several budgets, HiDe on several views cut from the original, views that are chosen by the image's
size (`view_tokens="auto"`) and the gate, on drawn scenes of about 2,000, 4,000 and 10,000 image tokens. All ways that
look at an image in the same number of tokens share one session per image, whose cost is counted for each. Tokens are
positions of the language model over all steps, a session's image once; the encoder's patches are not among them.
Seconds are from the decoded image to the answer.

Every image's questions are on the disk before the next one's: the same command goes on after a crash, and
`--questions` may be raised. With the embedded model a plain answer to 10,000 tokens takes over a minute;
`--questions 60` asks 60 of each size. `--tune` asks about images of other seeds, for `benchmarks.frontier_tuning`.
`--data` and `--model` take questions and a model of one's own, as `hide eval` has them.

`--q-zoom CHECKPOINT` adds Q-Zoom at several `--budgets`, each for image and crop: with its gate, with the gate always
open, and with untrained branches in place of its own, which must not help. Then the page also says how well the gate
tells the plain answer's mistakes, and what is saved at the plain answer's best accuracy.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from benchmarks.measure import count
from hide.cli.loading import assigned
from hide.evaluation.data import BadRecord, Sample, read_data, scene_questions
from hide.evaluation.predicted_memory import held, predicted_memory
from hide.evaluation.runner import answers
from hide.evaluation.scoring import Share, difference, group_of, share, strict, verdict
from hide.evaluation.store import ResultFile, blank_record
from hide.evaluation.tables import markdown
from hide.methods.base import Method, NoSettings
from hide.methods.hide.method import HiDe
from hide.methods.plain import Plain
from hide.methods.q_zoom.branches import attach, branches_of, new_branches
from hide.methods.q_zoom.method import QZoom, QZoomSettings
from hide.models import load
from hide.output import check_folder
from hide.present.draw import CostPoint, frontier_panel, tenth_below
from hide.present.table import ResultTable
from hide.presets import TOKEN_PIXELS, Preset
from hide.tiny import CHECKPOINT


class Size(NamedTuple):
    """Image tokens, least and most; how many questions are asked; the first seed, and that for tuning. Those of
    `hide.evaluation` begin at 500,000, 1,000,000 and 2,000,000, training's at 10,000,000 and 2**40."""

    tokens: tuple[int, int]
    questions: int
    seed: int
    tuning_seed: int


SIZES = {
    "2k": Size((1560, 2050), 500, 5_000_000, 4_000_000),
    "4k": Size((3900, 4300), 200, 5_100_000, 4_100_000),
    "10k": Size((9500, 10500), 60, 5_200_000, 4_200_000),
}
VIEWS = (350, 500, 700, 1000, 1400, 2000, 2800)
# Of the gate, for the embedded model: the margin from which on a plain answer is taken, and `auto_view` with it.
GATE, GATE_VIEW = 3.0, (17.0, 0.5)
AUTO, ALWAYS, NEVER = "auto", "auto, second look always", "auto, no second look"
SMALLER, GATED = f"auto {GATE_VIEW[0]:g}", f"auto {GATE_VIEW[0]:g}, gate"


BUDGETS = (350, 500, 700, 1000)
OPEN, UNTRAINED = ", gate open", ", untrained"


class Run(NamedTuple):
    """One view, in tokens, and the ways of answering that share a session on it; `None` is the whole image."""

    view: int | str | None
    ways: dict[str, Method[Any]]


def plain_way(view: int | str | None) -> str:
    """What the plain answer on a view is called."""
    return "plain" if view is None else f"plain {view}"


def hide_way(view: int | str | None) -> str:
    """What HiDe on a view is called."""
    return "hide" if view is None else AUTO if view == "auto" else f"hide {view}"


def zoom_way(budget: int) -> str:
    """What Q-Zoom at a budget is called."""
    return f"q-zoom {budget}"


def zoom_runs(trained: QZoom, untrained: QZoom, budgets: Sequence[int]) -> list[Run]:
    """Q-Zoom at each budget, for image and crop, on sessions of its own; and without training."""

    def made(method: QZoom, budget: int, **changes: Any) -> QZoom:
        least = min(method.preset.run.min_tokens, budget)
        return method.changed(min_tokens=least, max_tokens=budget, **changes)

    found = []
    for budget in budgets:
        own = made(trained, budget)
        found.append(Run(budget, {zoom_way(budget): own, zoom_way(budget) + OPEN: own.changed(gate_threshold=0.0)}))
        found.append(Run(budget, {zoom_way(budget) + UNTRAINED: made(untrained, budget, gate_threshold=0.0)}))
    return found


def without_training(checkpoint: str | Path, preset: Preset[QZoomSettings]) -> QZoom:
    """Q-Zoom on the same model with branches of random values."""
    model = load(checkpoint)
    trained = branches_of(load(checkpoint))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        branches = new_branches(model, trained.layer, len(trained.regions), gate_depth=len(trained.gate or ()))
    for module in branches.modules().values():
        module.to(model.input_device, model.dtype).requires_grad_(False)
    attach(model, branches)
    return QZoom(model, preset)


def runs_of(hide: HiDe, views: Sequence[int], gate: float) -> list[Run]:
    """The whole image, fixed views, and those that are chosen."""

    def made(**changes: Any) -> HiDe:
        # Each with an extractor of its own, so that each pays for the entities.
        return HiDe(hide.model, hide.preset.changed(**changes), notes=hide.notes)

    found = []
    for view in (None, *views, "auto"):
        own = made(view_tokens=view)
        plain = Plain(hide.model, own.preset.with_settings(NoSettings()))
        ways: dict[str, Method[Any]] = {plain_way(view): plain, hide_way(view): own}
        if view == "auto":
            # What `benchmarks.frontier_tuning` chooses the limit by.
            ways[ALWAYS] = made(view_tokens=view, look_again=0.0)
            ways[NEVER] = made(view_tokens=view, look_again=float("inf"))
        found.append(Run(view, ways))
    smaller = {"view_tokens": "auto", "auto_view": GATE_VIEW}
    return [*found, Run("auto", {SMALLER: made(**smaller), GATED: made(**smaller, gate=gate)})]


# -- asking -----------------------------------------------------------------------------------------------------------


def scene_samples(size: str, number: int, *, tuning: bool = False) -> Iterator[Sample]:
    """Questions about scenes of one of `SIZES`, up to six each, as many about colors as about sides."""
    tokens, _, first, tuning_seed = SIZES[size]
    seeds = itertools.count(tuning_seed if tuning else first)
    return islice((one for seed in seeds for one in scene_questions(seed, tokens, size)), number)


def ask_image(runs: Sequence[Run], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """A record for each of the questions about one image, with all ways that show it differently from the whole."""
    try:
        image = samples[0].image()
        if isinstance(image, tuple):
            raise ValueError(f"image: got {len(image)} images, want one")
    except Exception as error:  # whatever one image does, the others are asked
        return [blank_record(sample, f"{type(error).__name__}: {error}") for sample in samples]
    whole = image.width * image.height / TOKEN_PIXELS
    smaller = (run.ways for run in runs if not isinstance(run.view, int) or run.view < whole)
    return answers({name: method for ways in smaller for name, method in ways.items()}, samples)


def record_all(runs: Sequence[Run], samples: Iterator[Sample], results: ResultFile) -> list[dict[str, Any]]:
    """Records of all questions, those that `results` has already and the others, image by image."""
    found = []
    for _, group in groupby(samples, key=lambda sample: sample.picture or sample.id):
        own = list(group)
        if new := [sample for sample in own if sample.id not in results.records]:
            for record in ask_image(runs, new):
                results.append(record)
            print(f"{new[-1].id}: {len(results.records)} questions", file=sys.stderr, flush=True)
        found += [results.records[sample.id] for sample in own]
    return found


# -- tables -----------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One way of answering: right answers, means of tokens and seconds, and both as parts of the plain answer's."""

    share: Share
    tokens: float
    seconds: float
    token_part: float
    second_part: float


def points(records: Sequence[dict[str, Any]]) -> dict[str, Point]:
    """Of each way that was asked, over the questions that did not fail; see `told`."""
    sound = [record for record in records if not record["error"]]
    found = {}
    for way in dict.fromkeys(name for record in sound for name in record["replies"]):
        own = [(record, name) for record in sound if (name := told(record, way))]
        tokens, seconds = (fmean(record[what][name] for record, name in own) for what in ("tokens", "seconds"))
        all_tokens, all_seconds = (fmean(record[what]["plain"] for record, _ in own) for what in ("tokens", "seconds"))
        right = share([verdict(record, name, strict) for record, name in own])
        found[way] = Point(right, tokens, seconds, tokens / all_tokens, seconds / all_seconds)
    return found


def told(record: dict[str, Any], way: str) -> str | None:
    """What says what a way does: where an image has no more tokens than a view, the whole image; `None`: nothing."""
    if way in record["replies"]:
        return way
    return way.partition(" ")[0] if way.startswith(("plain ", "hide ")) else None


def lead(records: Sequence[dict[str, Any]], way: str, other: str) -> str:
    """How much more often one way is right than another, with the interval of `difference`; images are the groups."""
    sound = [record for record in records if not record["error"]]
    both = [(record, one, two) for record in sound if (one := told(record, way)) and (two := told(record, other))]
    ours, theirs = [verdict(r, one, strict) for r, one, _ in both], [verdict(r, two, strict) for r, _, two in both]
    return str(difference(ours, theirs, [group_of(record) for record, *_ in both]))


def size_table(size: str, records: Sequence[dict[str, Any]], memory: dict[str, int]) -> ResultTable:
    """One line per way. memory: bytes at the predicted peak."""
    rows = []
    for way, point in points(records).items():
        rows.append(
            (
                way,
                f"{point.share.value:.1%} ({point.share.low:.1%} to {point.share.high:.1%})",
                *(lead(records, way, other) if way != other else "" for other in ("plain", "hide")),
                f"{point.tokens:,.0f}",
                f"{point.token_part:.2f}",
                f"{point.seconds:.2f}",
                f"{point.second_part:.2f}",
                f"{memory[way] / 1e6:,.0f} MB" if way in memory else "",
            )
        )
    failed = sum(bool(record["error"]) for record in records)
    title = f"{size}: {len(records) - failed} questions about {len({one['picture'] for one in records})} images"
    header = ("way", "right", "points above plain", "above HiDe", "tokens", "of plain", "seconds", "of plain", "memory")
    return ResultTable(f"{title}, {failed} failed" if failed else title, header, rows)


def together_table(by_size: dict[str, Sequence[dict[str, Any]]]) -> ResultTable:
    """Each way over all sizes, which count alike; where an image has fewer tokens than a view, the whole image."""
    every = {size: points(records) for size, records in by_size.items()}
    rows = []
    for way in dict.fromkeys(name for of_size in every.values() for name in of_size):
        same = way.partition(" ")[0] if way.startswith(("plain ", "hide ")) else way
        own = [found for of_size in every.values() if (found := of_size.get(way) or of_size.get(same))]
        if len(own) < len(every):
            continue
        means = (
            fmean(values) for values in zip(*((p.share.value, p.token_part, p.second_part) for p in own), strict=True)
        )
        right, tokens, seconds = means
        rows.append((way, f"{right:.1%}", f"{tokens:.3f}", f"{seconds:.3f}"))
    header = ("way", "right", "tokens, of plain", "seconds, of plain")
    return ResultTable(f"Means of {', '.join(by_size)}", header, rows)


def gate_table(size: str, records: Sequence[dict[str, Any]]) -> ResultTable:
    """How well the gate tells questions that a plain answer at the same budget gets wrong: the area under the curve of
    hits over false alarms (Mann and Whitney 1947), and how often it opens."""
    sound = [record for record in records if not record["error"]]
    rows = []
    for way in dict.fromkeys(name for record in sound for name in record["replies"] if name.endswith(OPEN)):
        budget = way.removesuffix(OPEN).partition(" ")[2]
        asked = [r for r in sound if way in r["replies"] and plain_way(int(budget)) in r["replies"]]
        signals = [(r["details"][way]["gate"], verdict(r, plain_way(int(budget)), strict) is not True) for r in asked]
        wrong, right = ([gate for gate, failed in signals if failed is kind] for kind in (True, False))
        opened = [r["details"][zoom_way(int(budget))]["zoomed"] for r in asked]
        rows.append((budget, f"{area(wrong, right):.3f}", str(len(wrong)), str(len(right)), f"{fmean(opened):.1%}"))
    header = ("budget", "area under the curve", "plain wrong", "plain right", "zoomed")
    return ResultTable(f"{size}: the gate", header, rows)


def area(positive: Sequence[float], negative: Sequence[float]) -> float:
    """How often one of `positive` is larger than one of `negative`; of equal ones half. NaN where either is empty."""
    pairs = [(one > other) + (one == other) / 2 for one in positive for other in negative]
    return fmean(pairs) if pairs else float("nan")


def saved_table(by_size: dict[str, Sequence[dict[str, Any]]]) -> ResultTable:
    """Of plain, HiDe and Q-Zoom: the cheapest way that is right as often as the best plain answer, by seconds, and the
    best one."""
    rows = []
    for size, records in by_size.items():
        found = points(records)
        plain = max((found[way] for way in found if _kind(way) == "plain"), key=lambda p: p.share.value)
        for kind in ("hide", "q-zoom"):
            own = {way: point for way, point in found.items() if _kind(way) == kind}
            if not own:
                continue
            best = max(own, key=lambda way: own[way].share.value)
            able = [way for way in own if own[way].share.value >= plain.share.value]
            cheap = min(able, key=lambda way: own[way].seconds) if able else ""
            rows.append(
                (
                    f"{size}, {kind}",
                    f"{plain.share.value:.1%}",
                    f"{plain.seconds:.2f}",
                    cheap or "none",
                    f"{plain.seconds / own[cheap].seconds:.2f}" if cheap else "",
                    f"{plain.tokens / own[cheap].tokens:.2f}" if cheap else "",
                    f"{best}, {own[best].share.value:.1%}",
                    f"{100 * (own[best].share.value - plain.share.value):+.1f}",
                )
            )
    header = (
        "size",
        "best plain",
        "seconds",
        "as right, for less",
        "times faster",
        "times fewer tokens",
        "best",
        "above",
    )
    return ResultTable("At the plain answer's best accuracy, and at the most", header, rows)


def _kind(way: str) -> str:
    """The method of a way that counts for the frontier; "" for views that are chosen, and what is there to compare."""
    kind = way.partition(" ")[0].rstrip(",")
    return (
        ""
        if way == plain_way("auto") or way.endswith((OPEN, UNTRAINED)) or kind not in ("plain", "hide", "q-zoom")
        else kind
    )


def _view_of(way: str) -> float:
    """Tokens of a way's view; the whole image has the most."""
    number = way.partition(",")[0].rpartition(" ")[2]
    return float(number) if number.isdecimal() else float("inf")


def save_picture(path: Path, by_size: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Accuracy with 95 % intervals over tokens and over seconds, a column for each size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 4.6 * len(by_size)), 7), layout="constrained")
    panels = figure.subplots(2, len(by_size), squeeze=False, sharey=True)
    series = {
        "plain": lambda way: _kind(way) == "plain",
        "HiDe": lambda way: _kind(way) == "hide",
        AUTO: lambda way: way == AUTO,
        GATED: lambda way: way == GATED,
        "Q-Zoom": lambda way: _kind(way) == "q-zoom",
        f"Q-Zoom{UNTRAINED}": lambda way: way.endswith(UNTRAINED),
    }
    every = {size: points(records) for size, records in by_size.items()}
    shown = [
        p.share.low for found in every.values() for way, p in found.items() if any(f(way) for f in series.values())
    ]
    lowest = tenth_below(shown)
    for column, (size, found) in enumerate(every.items()):
        for row, cost in enumerate(("tokens", "seconds")):
            axes = panels[row, column]
            own = {
                name: [
                    CostPoint(getattr(point, cost), point.share.value, point.share.low, point.share.high)
                    # By the view, not by the cost: views too small for a map have large collages.
                    for way, point in sorted(found.items(), key=lambda one: _view_of(one[0]))
                    if belongs(way)
                ]
                for name, belongs in series.items()
            }
            frontier_panel(axes, own, f"{cost} of a question", lowest)
            if not row:
                axes.set_title(size)
            if not column:
                axes.set_ylabel("right answers")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=110)


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("frontier"), help="results, tables and picture; goes on there")
    parser.add_argument("--questions", type=count, help="of each size, at most; default: 500, 200 and 60")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of drawn scenes")
    parser.add_argument("--tune", action="store_true", help="images of other seeds, for benchmarks.frontier_tuning")
    parser.add_argument("--views", type=count, nargs="*", default=VIEWS, help="fixed views, in tokens")
    parser.add_argument("--gate", type=float, default=GATE, help="margin from which on a plain answer is taken")
    parser.add_argument("--q-zoom", help="a checkpoint with branches: Q-Zoom, with and without its training")
    parser.add_argument("--budgets", type=count, nargs="+", default=BUDGETS, help="of Q-Zoom, in tokens")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE, a setting of Q-Zoom; repeat it")
    parser.add_argument("--model", default=CHECKPOINT, help="a checkpoint; default: the embedded model")
    parser.add_argument("--data", help="FORMAT:PATH in place of drawn scenes, as hide eval reads it")
    parser.add_argument("--threads", type=count, default=1, help="default 1: steady beside other work")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = ("results.jsonl", "frontier.md", "frontier.png")
    check_folder(arguments.out, names)
    hide = HiDe.from_pretrained(arguments.model)
    runs = runs_of(hide, arguments.views, arguments.gate)
    zoom: dict[str, Any] = {}
    if arguments.q_zoom:
        trained = QZoom.from_pretrained(arguments.q_zoom, **assigned(arguments.set))
        untrained = without_training(arguments.q_zoom, trained.preset)
        runs += zoom_runs(trained, untrained, arguments.budgets)
        zoom = {f"q-zoom.{name}": value for name, value in trained.preset.to_dict().items()}
        zoom |= {"q-zoom": str(arguments.q_zoom), "budgets": list(arguments.budgets)}
    settings = {
        **zoom,
        **hide.preset.to_dict(),
        "model": str(arguments.model) if arguments.model != CHECKPOINT else "embedded",
        "data": arguments.data or ("tuning seeds" if arguments.tune else "unseen seeds"),
        "views": list(arguments.views),
        "gate": arguments.gate,
        "gate_view": list(GATE_VIEW),
    }
    by_size: dict[str, Sequence[dict[str, Any]]] = {}
    with ResultFile(arguments.out / names[0], settings) as results:
        if arguments.data:
            found = read_data(arguments.data, arguments.questions or sys.maxsize)
            asked = (one for one in found if not isinstance(one, BadRecord))
            by_size[arguments.data] = record_all(runs, asked, results)
        else:
            for size in arguments.sizes:
                wanted = SIZES[size].questions
                number = wanted if arguments.questions is None else min(arguments.questions, wanted)
                by_size[size] = record_all(runs, scene_samples(size, number, tuning=arguments.tune), results)
    ways = {name: held(method) for run in runs for name, method in run.ways.items()}
    tables = [size_table(size, records, predicted_memory(ways, records)) for size, records in by_size.items()]
    if arguments.q_zoom:
        tables += [*(gate_table(size, records) for size, records in by_size.items()), saved_table(by_size)]
    if len(by_size) > 1:
        tables.append(together_table(by_size))
    command = shlex.join(["python", "-m", "benchmarks.frontier", *sys.argv[1:]])
    (arguments.out / names[1]).write_text(markdown("Accuracy over cost", command, tables), encoding="utf-8")
    save_picture(arguments.out / names[2], by_size)
    for table in tables:
        print(table.markdown())
    print(*(arguments.out / name for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
