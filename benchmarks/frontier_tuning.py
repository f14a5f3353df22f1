"""Policies replayed from a recorded run: `python -m benchmarks.frontier_tuning frontier-tuning`.

The argument is a folder of `benchmarks.frontier --tune`; nothing is asked again. Each question's record holds the
reply, tokens, seconds and signals of every way, so that a rule for the view, a gate, a limit for the second look or a
ladder of two views can be tried at any threshold: what it would have answered, and what that would have cost. The
constants that are chosen go into `RunSettings.auto_view`, `HiDeConfig.look_again` and `benchmarks.frontier.GATE`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.frontier import ALWAYS, AUTO, NEVER, hide_way, plain_way
from hide.evaluation.scoring import strict, verdict
from hide.present.table import ResultTable
from hide.presets import TOKEN_PIXELS

Record = dict[str, Any]

FACTORS = (0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 14.0, 17.0, 20.0, 24.0, 28.0)
EXPONENTS = (0.35, 0.5, 0.65, 0.8, 1.0)
MARGINS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, math.inf)
LIMITS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, math.inf)
PEAKS = (0.0, 50.0, 100.0, 200.0, 300.0, 500.0, 700.0, 1000.0, math.inf)


class Outcome(NamedTuple):
    """What one question comes to: whether the reply is right, and costs as parts of the plain answer's."""

    right: bool
    tokens: float
    seconds: float


Policy = Callable[[Record], Outcome]


def outcome(record: Record, way: str, *more: tuple[str, str]) -> Outcome:
    """The reply of a way, at its costs and, for each (way, session) of `more`, that way's without opening the session
    that was open already; "" for a session of its own."""
    costs = []
    for what in ("tokens", "seconds"):
        total = record[what][way]
        for other, session in more:
            total += record[what][other] - (record["opened"][session][what] if session else 0)
        costs.append(total / record[what]["plain"])
    return Outcome(verdict(record, way, strict) is True, *costs)


def signal(record: Record, way: str, name: str) -> float:
    """One of a way's signals; of several peaks the least, and minus infinity where there is none."""
    found = record["details"][way].get("signals", {}).get(name)
    if isinstance(found, list):
        return min((one for one in found if one is not None), default=-math.inf)
    return -math.inf if found is None else float(found)


# -- policies ---------------------------------------------------------------------------------------------------------


def nearest_view(record: Record, tokens: float) -> int | None:
    """The recorded view that is nearest, in proportion, to so many tokens; `None`: the whole image."""
    (width, height), *_ = record["images"]
    views = [int(name.partition(" ")[2]) for name in record["replies"] if name.startswith("hide ")]
    whole = width * height / TOKEN_PIXELS
    found = min([*views, whole], key=lambda view: abs(math.log(view / tokens)))
    return None if found == whole else int(found)


def by_size(factor: float, exponent: float) -> Policy:
    """HiDe on a view of factor * N ** exponent tokens, N being those of the whole image."""

    def policy(record: Record) -> Outcome:
        (width, height), *_ = record["images"]
        whole = width * height / TOKEN_PIXELS
        return outcome(record, hide_way(nearest_view(record, min(factor * whole**exponent, whole))))

    return policy


def fixed(view: int) -> Policy:
    """HiDe on one view, and on the whole image where that has fewer tokens."""
    return lambda record: outcome(record, hide_way(view) if hide_way(view) in record["replies"] else "hide")


def gated(view: int | str, margin: float) -> Policy:
    """The plain answer on a view where its margin is at least so much, else HiDe's on the same session."""

    def policy(record: Record) -> Outcome:
        own: int | str | None = view if hide_way(view) in record["replies"] else None
        plain, hide = plain_way(own), hide_way(own)
        if signal(record, plain, "margin") >= margin:
            return outcome(record, plain)
        return outcome(record, hide, (plain, hide))

    return policy


def second_look(limit: float) -> Policy:
    """The chosen view, with a second look where the collage is larger than so much of it."""
    return lambda record: outcome(record, ALWAYS if signal(record, NEVER, "collage") > limit else NEVER)


def ladder(small: int, large: int, name: str, least: float) -> Policy:
    """HiDe on the small view; where its signal is below `least`, on the large one too, whose reply counts."""

    def policy(record: Record) -> Outcome:
        if hide_way(small) not in record["replies"]:
            return outcome(record, "hide")
        if signal(record, hide_way(small), name) >= least:
            return outcome(record, hide_way(small))
        finer = hide_way(large) if hide_way(large) in record["replies"] else hide_way(None)
        return outcome(record, finer, (hide_way(small), ""))

    return policy


def policies(views: Sequence[int]) -> Iterator[tuple[str, str, Policy]]:
    """(family, name, policy) of all that are tried."""
    for view in views:
        yield "fixed views", f"hide {view}", fixed(view)
    for exponent in EXPONENTS:
        for factor in FACTORS:
            yield "views by the image's size", f"{factor:g} * N ** {exponent:g}", by_size(factor, exponent)
    sessions: list[int | str] = [*views, "auto"]
    for session in sessions:
        for margin in MARGINS:
            yield "gates", f"{session}, plain from {margin:g} on", gated(session, margin)
    for limit in LIMITS:
        yield "second looks", f"collage above {limit:g}", second_look(limit)
    for small, large in pairwise(views):
        for name, steps in (("margin", MARGINS), ("peaks", PEAKS)):
            for least in steps[1:-1]:
                yield "ladders", f"{small}, then {large} with {name} below {least:g}", ladder(small, large, name, least)


# -- what comes of them -----------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """Means over sizes, which count alike, of the means over their questions."""

    name: str
    right: float
    tokens: float
    seconds: float
    by_size: dict[str, tuple[float, float]]


def score(name: str, policy: Policy, records: Sequence[Record]) -> Score:
    """A policy over all questions that did not fail."""
    sizes: dict[str, list[Outcome]] = {}
    for record in records:
        sizes.setdefault(record["split"], []).append(policy(record))
    means = {size: [fmean(map(float, values)) for values in zip(*found, strict=True)] for size, found in sizes.items()}
    right, tokens, seconds = (fmean(column) for column in zip(*means.values(), strict=True))
    return Score(name, right, tokens, seconds, {size: (own[0], own[1]) for size, own in means.items()})


def undominated(scores: Sequence[Score]) -> list[Score]:
    """Those than which no other is right as often for fewer tokens, the cheapest first."""
    kept: list[Score] = []
    for one in sorted(scores, key=lambda score: (score.tokens, -score.right)):
        if not kept or one.right > kept[-1].right:
            kept.append(one)
    return kept


def table(family: str, scores: Sequence[Score]) -> ResultTable:
    """The undominated ones of a family of policies."""
    sizes = list(scores[0].by_size)
    rows = [
        (
            one.name,
            f"{one.right:.1%}",
            f"{one.tokens:.3f}",
            f"{one.seconds:.3f}",
            *(f"{right:.1%} for {tokens:.2f}" for right, tokens in (one.by_size[size] for size in sizes)),
        )
        for one in undominated(scores)
    ]
    header = ("policy", "right", "tokens, of plain", "seconds, of plain", *sizes)
    return ResultTable(f"{family}: {len(scores)} tried, the undominated ones", header, rows)


def read(path: Path) -> list[Record]:
    """The records of a folder that `benchmarks.frontier` wrote, the last of each question, without the failed ones."""
    lines = (json.loads(line) for line in (path / "results.jsonl").read_text(encoding="utf-8").splitlines()[1:])
    return [record for record in {one["id"]: one for one in lines}.values() if not record["error"]]


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="what benchmarks.frontier wrote, with --tune")
    arguments = parser.parse_args()
    records = read(arguments.folder)
    if not records:
        raise SystemExit(f"folder: {arguments.folder} has no answered question")
    views = sorted(
        {int(name.partition(" ")[2]) for one in records for name in one["replies"] if name.startswith("hide ")}
    )
    families: dict[str, list[Score]] = {"as it is": [score(AUTO, lambda one: outcome(one, AUTO), records)]}
    for family, name, policy in policies(views):
        families.setdefault(family, []).append(score(name, policy, records))
    for family, scores in families.items():
        print(table(family, scores).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
