"""A table of results: the same rows for the terminal, for Markdown and for HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from hide.present.pages import render


class ResultTable(NamedTuple):
    """A table of texts; the first column names the row, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=escape(self.title), title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(escape(name), justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """A heading and a table."""
        lines = [self.header, ("---", *("---:" for _ in self.header[1:])), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n"

    def html(self) -> str:
        """A heading and a table; markup to the templates of pages."""
        return render("table.html", table=self)
