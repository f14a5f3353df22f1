"""Ask a model every question of a data set, and lose nothing when the run is killed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hide.evaluation.data import Sample
from hide.evaluation.scoring import Scorer, Share, share
from hide.pipeline import HiDe
from hide.questions import Question


class ResultFile:
    """JSON lines, one per question, each on the disk before the next question is asked.

    `records` holds what the file holds: by id, the last line of each. A line that a killed run left half-written is cut
    off. One process at a time: a second one is refused.

    The first line says what the results were made with; opening the file with other settings is refused, so that no run
    mixes two.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        """Open or make the file.

        Raises:
            ValueError: results of other settings are in it, it is no result file, or another run writes to it.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO = self.path.open("a+b")
        try:
            self._lock()
            lines = self._whole_lines()
            if lines:
                self._check_settings(lines[0], settings)
            else:
                self._write({"settings": settings})
            for line in lines[1:]:
                record = json.loads(line)
                self.records[record["id"]] = record
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Add one question's record; on return it is on the disk."""
        self._write(record)
        self.records[record["id"]] = record

    def close(self) -> None:
        """Let another run have the file."""
        self._file.close()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows has no such lock; there the user keeps runs apart.
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"results: another run is writing to {self.path}") from None

    def _whole_lines(self) -> list[bytes]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        return content[:whole].splitlines()

    def _check_settings(self, line: bytes, settings: dict[str, Any]) -> None:
        try:
            found = json.loads(line)["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"results: {self.path} is not a result file") from None
        wanted = json.loads(json.dumps(settings))
        different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if different:
            changes = "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now" for name in different)
            raise ValueError(f"results: {self.path} was made with other settings ({changes}); use another folder")

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def evaluate(
    hide: HiDe,
    samples: Iterable[Sample],
    results: ResultFile,
    *,
    retry_failed: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Ask every sample that `results` has no record of, plain and with HiDe, and record each as soon as it is answered.

    A question that fails is recorded with its error, and the run goes on.

    Args:
        retry_failed: ask those again whose record is an error.
        progress: called with each record, also with those that were there before.
    """
    for sample in samples:
        record = results.records.get(sample.id)
        if record is None or (retry_failed and record.get("error")):
            record = answer(hide, sample)
            results.append(record)
        if progress is not None:
            progress(record)


def answer(hide: HiDe, sample: Sample) -> dict[str, Any]:
    """One question's record: the replies of both ways, times, tokens, boxes and notes, or the error."""
    record: dict[str, Any] = {
        "id": sample.id,
        "split": sample.split,
        "question": sample.question.stem,
        "options": list(sample.question.options),
        "answer": sample.answer,
    }
    start = time.perf_counter()
    try:
        result = hide.ask(sample.image(), sample.question)
    except Exception as error:  # whatever one question does, the others are asked
        return {**record, "error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - start}
    facts = result.to_dict()
    return {
        **record,
        "error": None,
        "plain": result.plain_answer,
        "hide": result.answer,
        **{
            name: facts[name]
            for name in ("images", "entities", "boxes", "collages", "image_tokens", "notes", "seconds")
        },
    }


METHODS = ("plain", "hide")


def scores(records: Sequence[dict[str, Any]], scorer: Scorer) -> Iterator[tuple[str, dict[str, Share], int, int]]:
    """Per split, then for all: (name, share of right replies by method, unreadable replies, failed questions).

    A failed question counts as wrong for both methods.
    """
    splits = sorted({record["split"] for record in records})
    for name in [*splits, "all"] if len(splits) > 1 else splits:
        chosen = [record for record in records if name == "all" or record["split"] == name]
        unreadable = 0
        of_method = {}
        for method in METHODS:
            verdicts = [None if record["error"] else _verdict(record, method, scorer) for record in chosen]
            unreadable += sum(v is None and not r["error"] for v, r in zip(verdicts, chosen, strict=True))
            of_method[method] = share(verdicts)
        yield name, of_method, unreadable, sum(bool(record["error"]) for record in chosen)


def _verdict(record: dict[str, Any], method: str, scorer: Scorer) -> bool | None:
    question = Question(record["question"], tuple(record["options"]))
    with contextlib.suppress(KeyError):
        return scorer(question, record["answer"], record[method] or "")
    return None
