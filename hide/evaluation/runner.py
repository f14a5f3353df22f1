"""Ask a model every question of a data set, and lose nothing when the run is killed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO, NamedTuple

import torch

from hide.evaluation.data import BadRecord, Sample, distinct
from hide.evaluation.scoring import Scorer, Share, share
from hide.evaluation.views import METHODS, VIEWS
from hide.images import picture_notes
from hide.output import make_folder, remove_folders
from hide.pipeline import HiDe
from hide.questions import Question


class ResultFile:
    """JSON lines, one per question, each on the disk before the next question is asked.

    `records` holds what the file holds: by id, the last line of each. A line that a killed run left half-written is cut
    off. One process at a time: a second one is refused.

    The first line says what the results were made with; opening the file with other settings is refused, so that no run
    mixes two. A file without a record is as none: it gets the new settings, and is not left behind.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        """Open or make the file.

        Raises:
            ValueError: results of other settings are in it, it is no result file, it cannot be written, or another run
                writes to it.
        """
        self.path = Path(path)
        self.records: dict[str, dict[str, Any]] = {}
        self._made = make_folder(self.path.parent)
        try:
            self._file: BinaryIO = self.path.open("a+b")
        except OSError as error:
            remove_folders(self._made)
            raise ValueError(f"results: {self.path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            lines = self._whole_lines()
            if lines:
                found = self._settings(lines[0])
                if len(lines) > 1:
                    self._check_settings(found, settings)
            for number, line in enumerate(lines[1:], 2):
                record = self._record(number, line)
                self.records[record["id"]] = record
            if not self.records:
                self._file.truncate(0)
                self._write({"settings": settings})
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Add one question's record; on return it is on the disk."""
        self._write(record)
        self.records[record["id"]] = record

    def close(self) -> None:
        """Let another run have the file; one without a record is removed."""
        if not self._file.closed and not self.records:
            with suppress(OSError):  # Windows removes no open file; there it stays, and is as none.
                self.path.unlink()
            remove_folders(self._made)
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

    def _settings(self, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)["settings"]
        except (ValueError, KeyError, TypeError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"results: {self.path} is not a result file")
        return found

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if record.keys() >= blank_record(_NOTHING, "").keys() - _LATER:
                return record
        except (ValueError, AttributeError, RecursionError):
            pass
        raise ValueError(f"results: line {number} of {self.path} is no record; mend it, or use another folder")

    def _check_settings(self, found: dict[str, Any], settings: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(settings))
        different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if different:
            changes = "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now" for name in different)
            raise ValueError(f"results: {self.path} was made with other settings ({changes}); use another folder")

    def _write(self, record: dict[str, Any]) -> None:
        # A surrogate, as in a broken file's name, becomes its JSON escape.
        self._file.write(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def evaluate(
    ask: Callable[[Iterable[Sample]], Iterable[dict[str, Any]]],
    samples: Iterable[Sample | BadRecord],
    results: ResultFile,
    *,
    retry_failed: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Ask every sample that `results` has no record of, and record each as soon as it is answered.

    A bad record is recorded and not asked. Ids are made unique (`hide.evaluation.data.distinct`). Where the data set
    has another question, options or picture under an id than the result, it is asked again; where only the right answer
    or the split is another, the result gets the new one.

    Args:
        ask: samples -> their records, in any order, each as soon as it is known: `partial(ask_here, hide)`, or
            `hide.evaluation.on_ray`. It may be handed no sample.
        samples: as the readers of `hide.evaluation.data` yield or raise them.
        retry_failed: ask those again whose record is an error.
        progress: called with each record, also with those that were there before.
    """

    def keep(record: dict[str, Any]) -> None:
        if record != results.records.get(record["id"]):
            results.append(record)
        if progress is not None:
            progress(record)

    def open_questions() -> Iterator[Sample]:
        for sample in distinct(samples):
            if isinstance(sample, BadRecord):
                keep(bad_record(sample))
                continue
            record = results.records.get(sample.id)
            if record is None or (retry_failed and record["error"]):
                yield sample
                continue
            now = blank_record(sample, "")
            if any(record.get(name, now[name]) != now[name] for name in ("question", "options", "picture")):
                note = "asked again: under this id the data set had another question before"
                yield replace(sample, notes=(*sample.notes, note))
            else:
                keep({**record, "answer": sample.answer, "split": sample.split})

    for record in ask(open_questions()):
        keep(record)


def ask_here(
    hide: HiDe, samples: Iterable[Sample], methods: Sequence[str] = ("plain", "hide")
) -> Iterator[dict[str, Any]]:
    """One question after the other, in this process."""
    for sample in samples:
        yield answer(hide, sample, methods)


def blank_record(sample: Sample, error: str) -> dict[str, Any]:
    """What is recorded of a question that could not be answered."""
    return {
        "id": sample.id,
        "split": sample.split,
        "question": sample.question.stem,
        "options": list(sample.question.options),
        "answer": sample.answer,
        "picture": sample.picture,
        "notes": list(sample.notes),
        "error": error,
        "replies": {},
        "tokens": {},
        "seconds": {},
    }


def bad_record(bad: BadRecord) -> dict[str, Any]:
    """What is recorded of a record that is no question: `place` says where it is, and `error` what is wrong."""
    return {**blank_record(replace(_NOTHING, id=bad.id), bad.reason), "place": bad.place}


def sound(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of questions; those that are none are not scored."""
    return [record for record in records if "place" not in record]


_NOTHING = Sample("", lambda: (), Question(""), "", "all")
# Fields that older result files do not have.
_LATER = {"picture", "notes"}


def answer(hide: HiDe, sample: Sample, methods: Sequence[str] = ("plain", "hide")) -> dict[str, Any]:
    """One question's record: each method's reply, tokens and seconds, the boxes and notes; or the error.

    `methods` are names in `METHODS`. Tokens are all that went through the model for the method, prompts and replies;
    seconds its wall time; the prefix and other steps that methods share are counted for each. "true-boxes" is left out
    where the data set has no boxes.
    """
    record = blank_record(sample, "")
    try:
        with picture_notes() as seen:
            image = sample.image()
        start = time.perf_counter()
        with hide.open(image) as session:
            opened = time.perf_counter() - start
            result = hide.ask(session, sample.question, plain="plain" in methods)
            record["replies"] = {"plain": result.plain_answer, "hide": result.answer}
            seconds, tokens = result.seconds, result.tokens
            last = seconds.get("answer", 0.0)
            before = opened + sum(seconds.values()) - seconds.get("plain answer", 0.0) - last
            tokens_before = session.length + tokens["entities"] + tokens["attention rows"]
            record["seconds"] = {"plain": opened + seconds.get("plain answer", 0.0), "hide": before + last}
            record["tokens"] = {
                "plain": session.length + tokens.get("plain answer", 0),
                "hide": tokens_before + tokens.get("answer", tokens.get("plain answer", 0)),
            }
            for method in methods:
                if method not in VIEWS:
                    continue
                own = method == "true-boxes"
                if own and not sample.boxes:
                    continue
                boxes = [torch.tensor(sample.boxes)] if own else result.boxes
                start = time.perf_counter()
                # The data set's boxes are those of the first picture.
                views = [
                    VIEWS[method](picture, of_picture, hide.config.fill) if len(of_picture) else None
                    for picture, of_picture in zip(result.images, boxes, strict=False)
                ]
                reply = hide.answer(session, sample.question, views)
                spent = time.perf_counter() - start
                record["replies"][method] = reply.text
                record["seconds"][method] = (opened if own else before) + spent
                record["tokens"][method] = (session.length if own else tokens_before) + reply.tokens
    except Exception as error:  # whatever one question does, the others are asked
        return blank_record(sample, f"{type(error).__name__}: {error}")
    facts = result.to_dict()
    kept = {name: facts[name] for name in ("images", "entities", "boxes", "collages", "image_tokens", "notes")}
    kept["notes"] = [*sample.notes, *seen, *kept["notes"]]
    asked = {name: {m: of[m] for m in methods if m in of} for name, of in record.items() if isinstance(of, dict)}
    return {**record, **asked, **kept, "error": None}


class MethodScore(NamedTuple):
    """One method over all questions: how many are right; replies that could not be read; mean tokens and seconds of
    the questions that did not fail; how many it answers right that the plain question does not, and the reverse.
    """

    share: Share
    unreadable: int
    tokens: float
    seconds: float
    gained: int
    lost: int


def score_methods(records: Sequence[dict[str, Any]], scorer: Scorer) -> dict[str, MethodScore]:
    """Each method's score over all questions that it was asked; a failed question counts as wrong for all."""
    found, records = {}, sound(records)
    for method in _methods(records):
        asked = [record for record in records if record["error"] or method in record["replies"]]
        answered = [record for record in asked if not record["error"]]
        right = [verdict(record, method, scorer) for record in asked]
        plain = [verdict(record, "plain", scorer) for record in asked]
        tokens, seconds = (
            fmean(record[what][method] for record in answered) if answered else math.nan
            for what in ("tokens", "seconds")
        )
        found[method] = MethodScore(
            share(right),
            sum(one is None and not record["error"] for one, record in zip(right, asked, strict=True)),
            tokens,
            seconds,
            gained=sum(bool(ours) and not theirs for ours, theirs in zip(right, plain, strict=True)),
            lost=sum(bool(theirs) and not ours for ours, theirs in zip(right, plain, strict=True)),
        )
    return found


def score_groups(records: Sequence[dict[str, Any]], scorer: Scorer) -> Iterator[tuple[str, dict[str, Share], int]]:
    """Per split, then per size, then for all: (name, share of right replies by method, failed questions)."""
    records = sound(records)
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["split"]):
        groups.setdefault(record["split"], []).append(record)
    for record in sorted(records, key=_image_tokens):
        groups.setdefault(_size(_image_tokens(record)), []).append(record)
    groups["all"] = list(records)
    for name, chosen in groups.items():
        yield (
            name,
            {
                method: share([verdict(r, method, scorer) for r in chosen if r["error"] or method in r["replies"]])
                for method in _methods(records)
            },
            sum(bool(record["error"]) for record in chosen),
        )


# Image tokens: a thumbnail, a screen, a photograph, 4K, what is shrunk to the limit of 16,384.
_SIZES = (100, 1_000, 4_000, 12_000)


def _image_tokens(record: dict[str, Any]) -> float:
    """Of the pictures, without the collages."""
    return sum(record["image_tokens"][: len(record["boxes"])]) if not record["error"] else math.inf


def _size(tokens: float) -> str:
    if tokens == math.inf:
        return "size unknown"
    above = [limit for limit in _SIZES if limit >= tokens]
    return f"up to {above[0]:,} image tokens" if above else f"above {_SIZES[-1]:,} image tokens"


def _methods(records: Sequence[dict[str, Any]]) -> list[str]:
    asked = {method for record in records for method in record["replies"]}
    return [method for method in METHODS if method in asked] or ["plain", "hide"]


def verdict(record: dict[str, Any], method: str, scorer: Scorer) -> bool | None:
    """Whether a method's reply is right; `None`: it cannot be read, or there is none."""
    if method not in record["replies"]:
        return None
    return scorer(Question(record["question"], tuple(record["options"])), record["answer"], record["replies"][method])
