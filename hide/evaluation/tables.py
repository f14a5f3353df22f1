"""Results as tables: the same rows for the terminal, for Markdown and for HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from rich.markup import escape as escape_markup
from rich.table import Table

from hide.evaluation.scoring import Scorer, score_groups, score_methods, sound


class ResultTable(NamedTuple):
    """A table of texts; the first column names the row, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=escape_markup(self.title), title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(escape_markup(name), justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(escape_markup, row))
        return table

    def markdown(self) -> str:
        """A heading and a table."""
        lines = [self.header, ("---", *("---:" for _ in self.header[1:])), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n"

    def html(self) -> str:
        """A heading and a table."""
        cells = [
            "".join(f"<{tag}{' class=number' if i else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(line))
            for tag, line in (("th", self.header), *(("td", row) for row in self.rows))
        ]
        body = "".join(f"<tr>{line}</tr>" for line in cells[1:])
        table = f"<table><thead><tr>{cells[0]}</tr></thead><tbody>{body}</tbody></table>"
        return f'<h3>{escape(self.title)}</h3><div class="results">{table}</div>'


def markdown(heading: str, command: str, tables: Iterable[ResultTable]) -> str:
    """A page with the command that makes it and its tables."""
    parts = [f"## {heading}\n", f"```sh\n{command}\n```\n", *(table.markdown() for table in tables)]
    return "\n".join(parts)


def method_table(records: Sequence[dict[str, Any]], scorer: Scorer) -> ResultTable:
    """One line per method: what it answers, and what that costs."""
    rows = [
        (
            method,
            str(score.share),
            f"+{score.gained} −{score.lost}",
            str(score.unreadable),
            _number(score.tokens, ",.0f"),
            _number(score.seconds, ".2f"),
        )
        for method, score in score_methods(records, scorer).items()
    ]
    asked = sound(records)
    failed = sum(bool(record["error"]) for record in asked)
    title = f"{len(asked)} questions, {failed} failed; right answers with 95 % intervals, means per question"
    return ResultTable(title, ("method", "right", "against plain", "unread", "tokens", "seconds"), rows)


def group_table(records: Sequence[dict[str, Any]], scorer: Scorer) -> ResultTable:
    """One line per split and size: the share of right answers of each method."""
    groups = list(score_groups(records, scorer))
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
    rows = [(record["place"], " ".join(record["error"].split())) for record in bad[:MOST]]
    title = f"Bad records: {len(bad)}, not asked and not counted{'; the first' if len(bad) > MOST else ''}"
    return ResultTable(title, ("place", "what is wrong"), rows) if bad else None


def _number(value: float, form: str) -> str:
    return "none" if math.isnan(value) else format(value, form)
