"""Right answers over the share of questions whose entities are wrong: `python -m benchmarks.wrong_entities`.

HiDe answers each question with the entities as they are, with one left out (drop), with another thing in the place of
one (wrong) and with another thing at the end (add); on the whole image and on a view that is chosen by its size; with
the noise prior and without it.

A question's clean and corrupted answers make every share: where each question's entities are corrupted with probability
p, whatever the others', it is right with probability (1 - p) clean + p corrupted, and the mean over questions is the
accuracy to expect. Intervals are Wilson's of that accuracy and so many questions, as for one run in which every
question is asked once; the expected value, which has both answers of each, varies less.

What absorbs such errors is counted: tokens without a map, which the noise prior leaves no place in the image; questions
whose own words took the place of entities, as none was left; questions without any region, which were answered from the
image alone, as the plain one is.

Every answer is on the disk before the next question: the same command goes on after a crash, and `--limit` may be
raised.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.measure import count
from hide.evaluation.data import read_data
from hide.evaluation.entity_quality import CORRUPTIONS, other_things, with_wrong_entities
from hide.evaluation.runner import ask_here, evaluate
from hide.evaluation.scoring import Share, group_of, paired, sound, strict, verdict, wilson
from hide.evaluation.store import ResultFile
from hide.evaluation.tables import markdown
from hide.methods.ablations import WithoutPrior
from hide.methods.base import Method, NoSettings
from hide.methods.hide.entities import MAX_LENGTH
from hide.methods.hide.method import HiDe
from hide.methods.plain import Plain
from hide.output import check_folder
from hide.present.draw import tenth_below
from hide.present.table import ResultTable
from hide.tiny import CHECKPOINT

Record = dict[str, Any]

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
VIEWS = {"": None, "@auto": "auto"}
METHODS: dict[str, type[HiDe]] = {"hide": HiDe, "no-prior": WithoutPrior}


def way(method: str, view: str, how: str = "") -> str:
    """What HiDe with its entities wrong is called; as they are without `how`."""
    return f"{method}{view}, {how}" if how else f"{method}{view}"


def ways_of(hide: HiDe, data: str) -> dict[str, Method[Any]]:
    """By name: plain, and HiDe with all entities, on each view."""
    others, found = other_things(data), dict[str, Method[Any]]()
    for view, tokens in VIEWS.items():
        preset = hide.preset.changed(view_tokens=tokens)
        found[f"plain{view}"] = Plain(hide.model, preset.with_settings(NoSettings()))
        for name, kind in METHODS.items():
            found[way(name, view)] = own = kind(hide.model, preset, notes=hide.notes)
            found |= {way(name, view, how): with_wrong_entities(own, how, others) for how in CORRUPTIONS}
    return found


def expected(clean: Sequence[bool | None], corrupted: Sequence[bool | None], part: float) -> Share:
    """Right answers to expect where each question's entities are corrupted with probability `part`."""
    right = [(1 - part) * (one is True) + part * (other is True) for one, other in zip(clean, corrupted, strict=True)]
    value = fmean(right)
    return Share(round(sum(right)), len(right), value, *wilson(value, len(right)))


def curves(records: Sequence[Record]) -> dict[str, list[Share]]:
    """For each way with corrupted entities, what is to be expected at each of `SHARES`."""
    found = {}
    for view in VIEWS:
        for name in METHODS:
            clean = verdicts(records, way(name, view))
            for how in CORRUPTIONS:
                corrupted = verdicts(records, way(name, view, how))
                found[way(name, view, how)] = [expected(clean, corrupted, part) for part in SHARES]
    return found


def verdicts(records: Sequence[Record], name: str) -> list[bool | None]:
    """Of one way, question by question."""
    return [verdict(record, name, strict) for record in records]


# -- what absorbs errors ----------------------------------------------------------------------------------------------


def without_map(record: Record, name: str) -> float:
    """The part of the entity tokens that have no map."""
    signals = record["details"][name]["signals"]
    return float(signals["without_map"] / max(1, len(signals["peaks"])))


def own_words(record: Record, name: str) -> float:
    """1 where the question's own words took the place of entities."""
    return float(record["details"][name]["entities"] == [" ".join(record["question"].split())[:MAX_LENGTH]])


def no_region(record: Record, name: str) -> float:
    """1 where no region was found, so that nothing but the image was shown."""
    return float(not any(map(len, record["boxes"][name])))


ABSORBED: dict[str, Callable[[Record, str], float]] = {
    "tokens without a map": without_map,
    "own words": own_words,
    "no region": no_region,
}


# -- tables and picture -----------------------------------------------------------------------------------------------


def curve_table(records: Sequence[Record]) -> ResultTable:
    """One line per way: right answers to expect at each share."""
    rows = [(name, *map(str, found)) for name, found in curves(records).items()]
    title = f"Right answers where so many questions' entities are wrong, of {len(records)}"
    return ResultTable(title, ("method, entities", *(f"{part:.0%}" for part in SHARES)), rows)


def absorbed_table(records: Sequence[Record]) -> ResultTable:
    """One line per way: what is lost where all questions' entities are wrong, what the prior gives, and what took the
    place of what was lost."""
    groups, rows = [group_of(record) for record in records], []
    for view in VIEWS:
        for name in METHODS:
            for how in ("", *CORRUPTIONS):
                own = way(name, view, how)
                right = verdicts(records, own)
                lost = paired(right, verdicts(records, way(name, view)), groups)
                prior = paired(right, verdicts(records, way("no-prior", view, how)), groups)
                absorbed = (f"{fmean(part(record, own) for record in records):.0%}" for part in ABSORBED.values())
                rows.append(
                    (
                        own,
                        f"{fmean(one is True for one in right):.0%}",
                        *((str(lost.lead), f"{lost.p:.3f}") if how else ("", "")),
                        "" if name == "no-prior" else str(prior.lead),
                        *absorbed,
                    )
                )
    header = ("method, entities", "right", "points above clean", "p", "above no prior", *ABSORBED)
    return ResultTable("All questions' entities wrong, and what absorbs it", header, rows)


def save_picture(path: Path, records: Sequence[Record]) -> None:
    """A column for each view, a line for each kind of error; dashed without the noise prior."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, len(VIEWS), sharey=True)
    found = curves(records)
    plain = {view: fmean(one is True for one in verdicts(records, f"plain{view}")) for view in VIEWS}
    lowest = tenth_below([*plain.values(), *(one.low for own in found.values() for one in own)])
    for axes, view in zip(panels, VIEWS, strict=True):
        for number, (how, (method, style)) in enumerate(
            (how, styled) for how in CORRUPTIONS for styled in (("hide", "-"), ("no-prior", "--"))
        ):
            own = found[way(method, view, how)]
            # Side by side, so that intervals do not hide each other.
            places = [100 * part + 0.8 * (number - 2.5) for part in SHARES]
            ends = [[one.value - one.low for one in own], [one.high - one.value for one in own]]
            axes.errorbar(
                places, [one.value for one in own], yerr=ends, label=f"{how}, {method}", linestyle=style,
                color=f"C{CORRUPTIONS.index(how)}", marker="os^"[CORRUPTIONS.index(how)], markersize=4, capsize=2,
                linewidth=1, alpha=1 if method == "hide" else 0.6,
            )  # fmt: skip
        axes.axhline(plain[view], color="0.4", linestyle=":", label="plain")
        axes.set(title=f"view {view.removeprefix('@') or 'whole'}", ylim=(lowest, 1.02))
        axes.set_xlabel("% of questions with wrong entities")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right answers")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("wrong-entities"), help="results, tables, picture")
    parser.add_argument("--limit", type=count, default=100, help="questions, at most")
    parser.add_argument("--data", default="scenes", help="as hide eval has it")
    parser.add_argument("--model", default=CHECKPOINT, help="a checkpoint; default: the embedded model")
    parser.add_argument("--threads", type=count, default=1, help="default 1: steady beside other work")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = ("results.jsonl", "curves.json", "wrong-entities.md", "wrong-entities.png")
    check_folder(arguments.out, names)
    hide = HiDe.from_pretrained(arguments.model)
    settings = {
        **hide.preset.to_dict(),
        "model": str(arguments.model) if arguments.model != CHECKPOINT else "embedded",
        "data": arguments.data,
    }
    records: list[Record] = []

    def done(record: Record) -> None:
        records.append(record)
        print(f"{record['id']}: {len(records)} of at most {arguments.limit}", file=sys.stderr, flush=True)

    with ResultFile(arguments.out / names[0], settings) as results:
        ask = partial(ask_here, ways_of(hide, arguments.data))
        evaluate(ask, read_data(arguments.data, arguments.limit), results, progress=done)
    answered = [record for record in sound(records) if not record["error"]]
    if not answered:
        raise SystemExit(f"none of {len(records)} questions was answered; {names[0]} says why")
    found = {name: [one._asdict() for one in own] for name, own in curves(answered).items()}
    document = {"shares": SHARES, "questions": len(answered), "failed": len(records) - len(answered), "curves": found}
    (arguments.out / names[1]).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    tables = [curve_table(answered), absorbed_table(answered)]
    command = shlex.join(["python", "-m", "benchmarks.wrong_entities", *sys.argv[1:]])
    (arguments.out / names[2]).write_text(markdown("Wrong entities", command, tables), encoding="utf-8")
    save_picture(arguments.out / names[3], answered)
    for table in tables:
        print(table.markdown())
    print(*(arguments.out / name for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
