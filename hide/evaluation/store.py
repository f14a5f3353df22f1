"""Results on the disk: what is recorded of each question, and the file that keeps it through a killed run."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from hide.evaluation.data import BadRecord, Sample
from hide.output import make_folder, remove_folders
from hide.questions import Question


class ResultFile:
    """JSON lines, one per question, each on the disk before the next question is asked.

    `records` holds what the file holds: by id, the last line of each. A line that a killed run left half-written is cut
    off. One run at a time: a second one is refused, by a lock file beside it that dies with its run.

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
        self._lock = FileLock(f"{self.path}.lock", timeout=0)
        try:
            self._lock.acquire()
            self._file: BinaryIO = self.path.open("a+b")
        except Timeout:
            raise ValueError(f"results: another run is writing to {self.path}") from None
        except OSError as error:
            self._unlock()
            raise ValueError(f"results: {self.path} cannot be written: {error.strerror}") from None
        try:
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
                self._write({"settings": _as_json(settings)})
        except BaseException:
            self._file.close()
            self._unlock()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Add one question's record; on return it is on the disk."""
        self._write(record)
        self.records[record["id"]] = record

    def close(self) -> None:
        """Let another run have the file; one without a record is removed."""
        if self._file.closed:
            return
        self._file.close()
        if not self.records:
            with suppress(OSError):
                self.path.unlink()
        self._unlock()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unlock(self) -> None:
        """Leave no lock, and no folder that was made for nothing."""
        if self._lock.is_locked:
            with suppress(OSError):  # while it is held: the next run's would be another file. Windows removes it itself
                Path(self._lock.lock_file).unlink()
            self._lock.release()
        remove_folders(self._made)

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
        wanted = _as_json(settings)
        different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if different:
            changes = "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now" for name in different)
            raise ValueError(f"results: {self.path} was made with other settings ({changes}); use another folder")

    def _write(self, record: dict[str, Any]) -> None:
        # A surrogate, as in a broken file's name, becomes its JSON escape.
        self._file.write(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """As the file gives them back; what JSON does not hold, such as a path, as its text."""
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


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


_NOTHING = Sample("", lambda: (), Question(""), "", "all")
# Fields that older result files do not have.
_LATER = {"picture", "notes"}
