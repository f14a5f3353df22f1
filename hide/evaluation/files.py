"""Records of JSON, TSV and parquet files: the texts that stand there, with their place. A broken one costs itself."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hide.extra import INSTALL


class Entry(NamedTuple):
    """A record of a file. number: from 0. place: the file, and the line, row or record, from 1. value: as it was read,
    numbers as the texts that stand there; or the error with which it was not."""

    number: int
    place: str
    value: Any


def json_records(file: Path, *, lines: bool = False) -> Iterator[Entry]:
    """The records of a JSON list, or with `lines` or where the name ends in .jsonl, of JSON lines.

    A line that is cut off, or is not UTF-8, costs itself alone.

    Raises, before anything is yielded:
        FileNotFoundError, ValueError: the file is missing, cannot be read, or is no such list.
    """
    _check_file(file)
    if lines or file.suffix == ".jsonl":
        return _json_lines(file)
    try:
        records = _parse(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"data: {file}: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"data: {file} holds a {type(records).__name__}, want a list of records")
    return (Entry(number, f"record {number + 1} of {file}", value) for number, value in enumerate(records))


def _json_lines(file: Path) -> Iterator[Entry]:
    number = 0
    with file.open("rb") as lines:
        for place, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = _parse(line.decode("utf-8-sig" if place == 1 else "utf-8"))
            except ValueError as error:
                value = error
            yield Entry(number, f"line {place} of {file}", value)
            number += 1


def _parse(text: str) -> Any:
    """JSON with every number as the text that stands there: 1.50 is an option's text and 007 an id's."""
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None


def table(file: Path, columns: Sequence[str]) -> Iterator[Entry]:
    """Rows of a TSV or parquet file, read a part at a time: these files hold gigabytes of pictures.

    Raises, before anything is yielded:
        FileNotFoundError, ValueError: the file is missing, cannot be read, or lacks one of `columns`.
    """
    _check_file(file)
    reader = {".tsv": _tsv, ".parquet": _parquet}.get(file.suffix)
    if reader is None:
        raise ValueError(f"data: {file} is neither .tsv nor .parquet")
    header, rows = reader(file)
    missing = [name for name in columns if name not in header]
    if missing or len(set(header)) < len(header):
        wrong = f"lacks the columns {', '.join(missing)}" if missing else "has two columns of the same name"
        raise ValueError(f"data: {file} {wrong}; it has {str(header)[:400]}")
    return rows


def _tsv(file: Path) -> tuple[list[str], Iterator[Entry]]:
    """Cells are texts, quoted where they hold tabs, quotes (doubled) or line breaks."""
    csv.field_size_limit(2**31 - 1)

    def read() -> Iterator[tuple[int, list[str]]]:
        # Bytes that are no UTF-8 become surrogates, which cost their row alone.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            yield from _tsv_rows(lines)

    rows = read()
    _, header = next(rows, (0, []))

    def entries() -> Iterator[Entry]:
        for number, (line, cells) in enumerate(rows):
            whole = len(cells) == len(header)
            wrong = ValueError(f"it has {len(cells)} cells, want {len(header)}, as the header has")
            yield Entry(number, f"line {line} of {file}", dict(zip(header, cells, strict=True)) if whole else wrong)

    return header, entries()


def _tsv_rows(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, cells) of each row that is not empty. Where quotes do not make a row as wide as the
    header, they are part of the texts, and the row is one line."""
    ahead: list[str] = []
    taken: list[str] = []

    def line() -> str:
        one = ahead.pop() if ahead else next(lines, "")
        taken.extend([one] if one else [])
        return one

    number, width = 1, 0
    while True:
        try:
            cells = next(csv.reader(iter(line, ""), dialect="excel-tab", strict=True), [])
        except csv.Error:
            cells = None
        if not taken:
            return
        if cells is None or (width and cells and len(cells) != width):
            as_it_stands = taken[0].rstrip("\r\n").split("\t")
            if cells is None or len(as_it_stands) == width:
                cells = as_it_stands
                ahead += reversed(taken[1:])
                del taken[1:]
        if cells:
            yield number, cells
        width = width or len(cells)
        number += len(taken)
        taken.clear()


def _parquet(file: Path) -> tuple[list[str], Iterator[Entry]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"data: parquet files are read with pyarrow; {INSTALL}") from None
    try:
        opened = ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise ValueError(f"data: {file} is no parquet file: {error}") from None

    def entries() -> Iterator[Entry]:
        with opened:
            rows = (row for part in opened.iter_batches(batch_size=16) for row in part.to_pylist())
            try:
                for number, row in enumerate(rows):
                    # NaN is what NumPy has for no value.
                    cells = {name: None if cell != cell else cell for name, cell in row.items()}
                    yield Entry(number, f"row {number + 1} of {file}", cells)
            except (ArrowException, OSError) as error:
                raise ValueError(f"data: {file} cannot be read: {error}") from None

    return list(opened.schema_arrow.names), entries()


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"data: {file} is not a file")
    try:
        file.open("rb").close()
    except OSError as error:
        raise ValueError(f"data: {file} cannot be read: {error.strerror}") from None
