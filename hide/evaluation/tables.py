"""What an evaluation says, as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hide.evaluation.scoring import USUAL, Scorer, agreement, methods_in, score_groups, score_methods, sound
from hide.present.table import ResultTable
from hide.texts import one_line


def markdown(heading: str, command: str, tables: Iterable[ResultTable]) -> str:
    """A page with the command that makes it and its tables."""
    parts = [f"## {heading}\n", f"```sh\n{command}\n```\n", *(table.markdown() for table in tables)]
    return "\n".join(parts)


def method_table(
    records: Sequence[dict[str, Any]],
    scorer: Scorer,
    methods: Sequence[str] = USUAL,
    memory: Mapping[str, int] | None = None,
) -> ResultTable:
    """One line per method: what it answers, and what that costs; methods: as `score_methods`.

    memory: bytes at the predicted peak of each that has one.
    """
    rows = []
    for method, score in score_methods(records, scorer, methods).items():
        against = ("", "", "")
        if score.against_plain is None:
            against = ("not asked", "", "")
        elif method != "plain":
            lead, gained, lost, p = score.against_plain
            against = (str(lead), f"+{gained} −{lost}", f"{p:.3f}" if p >= 0.001 else "<0.001")
        costs = (_number(score.tokens, ",.0f"), _number(score.seconds, ".2f"))
        peak = [f"{memory[method] / 1e6:,.0f} MB" if method in memory else ""] if memory else []
        rows.append((method, str(score.share), *against, str(score.unreadable), *costs, *peak))
    asked = sound(records)
    failed = sum(bool(record["error"]) for record in asked)
    title = f"{len(asked)} questions, {failed} failed; right answers with 95 % intervals, means per question"
    header = ("method", "right", "points above plain", "gained, lost", "p", "unread", "tokens", "seconds")
    return ResultTable(title, (*header, *(["peak memory"] if memory else [])), rows)


def agreement_table(records: Sequence[dict[str, Any]], scorer: Scorer) -> ResultTable:
    """How often each two methods are both right or both wrong."""
    methods = methods_in(sound(records))
    rows = [
        (one, *("" if one == other else _number(agreement(records, scorer, one, other), ".0%") for other in methods))
        for one in methods
    ]
    return ResultTable("Agreement: questions that both get right, or both wrong", ("method", *methods), rows)


def group_table(records: Sequence[dict[str, Any]], scorer: Scorer, methods: Sequence[str] = USUAL) -> ResultTable:
    """One line per split and size: the share of right answers of each method; methods: as `score_methods`."""
    groups = list(score_groups(records, scorer, methods))
    methods = list(groups[0][1])
    rows = [
        (
            name,
            str(max(share.total for share in shares.values())),
            *(str(shares[method]) for method in methods),
            str(failed),
        )
        for name, shares, failed in groups
    ]
    return ResultTable(
        "Right answers by split and by the picture's size", ("group", "questions", *methods, "failed"), rows
    )


MOST = 24


def bad_table(records: Sequence[dict[str, Any]]) -> ResultTable | None:
    """The first bad records, with their places and what is wrong with them; `None` where there are none."""
    bad = [record for record in records if "place" in record]
    rows = [(record["place"], one_line(record["error"])) for record in bad[:MOST]]
    title = f"Bad records: {len(bad)}, not asked and not counted{'; the first' if len(bad) > MOST else ''}"
    return ResultTable(title, ("place", "what is wrong"), rows) if bad else None


def _number(value: float, form: str) -> str:
    return "none" if math.isnan(value) else format(value, form)
