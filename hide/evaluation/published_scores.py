"""Zoom-Refine's results as its authors score them: `python -m hide.evaluation.published_scores out/results.jsonl`.

The published scorer compares letters and leaves a question out where it reads none in the first reply, so that replies
which nobody can read raise its shares. Beside it stands the share of all questions, as `hide eval` counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hide.evaluation.scoring import Share, share, strict, verdict
from hide.methods.plain import Plain
from hide.methods.zoom_refine.method import ZoomRefine
from hide.methods.zoom_refine.parse import published_first_letter
from hide.present.table import ResultTable

__all__ = ["PublishedScores", "main", "published_baseline", "published_scores"]


class PublishedScores(NamedTuple):
    """strict: right replies of all lettered questions. The rest are of those whose first reply has a letter: combined,
    the rechecked letter or else the first; rechecked, of those that have one; first, the first letter. left_out: the
    questions without, failed ones included.
    """

    strict: Share
    combined: Share
    rechecked: Share
    first: Share
    left_out: int


def published_scores(records: Iterable[Mapping[str, Any]], method: str = ZoomRefine.name) -> PublishedScores:
    """The scores of records of `hide.evaluation.runner.answer`. Free questions, which nobody publishes a scorer for,
    and records that are no question are not counted.

    Raises `ValueError` where no question has a record of the method.
    """
    right: list[bool | None] = []
    letters: list[tuple[str, str | None, str]] = []
    for record in records:
        if "place" in record or not record["options"] or not (record["error"] or method in record["replies"]):
            continue
        right.append(verdict(dict(record), method, strict))
        own = {} if record["error"] else record["details"][method]
        if own.get("first_answer") is not None:
            letters.append((record["answer"], own["rechecked_answer"], own["first_answer"]))
    if not right:
        raise ValueError(f"results: no lettered question was asked by {method}")
    return PublishedScores(
        share(right),
        share([(again or first) == answer for answer, again, first in letters]),
        share([again == answer for answer, again, _ in letters if again is not None]),
        share([first == answer for answer, _, first in letters]),
        len(right) - len(letters),
    )


def published_baseline(records: Iterable[Mapping[str, Any]]) -> Share:
    """The scores of plain answers by the published scorer of baselines: of lettered questions whose answer is one of A
    to E, those whose reply has one of these letters anywhere; the first counts, and "Error" is what a failure says."""
    right = []
    for record in records:
        if "place" in record or not record["options"] or record["answer"] not in tuple("ABCDE"):
            continue
        reply = "Error" if record["error"] else record["replies"].get(Plain.name, "")
        if (letter := published_first_letter(reply)) is not None:
            right.append(letter == record["answer"])
    return share(right)


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.jsonl of `hide eval --methods zoom-refine`")
    parser.add_argument("--method", default=ZoomRefine.name, help="whose replies are scored; default: %(default)s")
    arguments = parser.parse_args()
    try:
        lines = arguments.results.read_text(encoding="utf-8").split("\n")[1:-1]
        records = {record["id"]: record for record in map(json.loads, lines)}  # the last line of each id counts
        scores = published_scores(records.values(), arguments.method)
        plain = any(Plain.name in record["replies"] for record in records.values() if "place" not in record)
        baseline = published_baseline(records.values()) if plain else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {arguments.results} is no results file with {arguments.method}: {error}", file=sys.stderr)
        return 1
    names = {
        "strict: all questions": scores.strict,
        "published: rechecked, else first": scores.combined,
        "published: rechecked": scores.rechecked,
        "published: first": scores.first,
    }
    if baseline is not None:
        names["published: plain, the first letter from A to E"] = baseline
    rows = [(name, str(one), f"{one.right} of {one.total}") for name, one in names.items()]
    title = f"{arguments.method}: {scores.left_out} questions that the published scorer leaves out"
    print(ResultTable(title, ("scorer", "right, 95 %", "questions"), rows).markdown(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
