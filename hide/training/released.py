"""The published training data of Q-Zoom as files that `hide train` reads: `python -m hide.training.released`.

They are pickles, which run whatever code they name when they are read plainly. Here only arrays and what Python itself
is made of are taken, and anything else is refused by its name.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hide.evaluation.data import Sample
from hide.evaluation.store import blank_record
from hide.output import check_folder
from hide.questions import Question
from hide.training.labels import to_text, tri_state
from hide.training.loop import put

# What NumPy's arrays and numbers are made of, under the names of all its versions.
_ARRAYS = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
for _example, _protocol in ((np.zeros(1), 4), (np.zeros(1), 5), (np.float32(0), 4)):
    _made: Any = _example.__reduce_ex__(_protocol)[0]
    for _package in ("numpy.core", "numpy._core"):
        _ARRAYS[f"{_package}.{_made.__module__.rpartition('.')[2]}", _made.__name__] = _made


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Of `_ARRAYS`; `ValueError` for anything else."""
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        try:
            return _ARRAYS[module, name]
        except KeyError:
            raise ValueError(
                f"it names {module}.{name}, and arrays, lists, dicts, texts and numbers alone are read"
            ) from None


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles of Python 2's protocols hold the bytes of an array."""
    if encoding != "latin1":
        raise ValueError(f"it has bytes in {encoding}, want latin1")
    return text.encode(encoding)


def read_pickle(path: Path) -> Any:
    """What a pickle holds, if that is arrays, lists, dicts, texts and numbers.

    Raises `ValueError` for anything else, and for what is no pickle, without running any of it.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file).load()
    except Exception as error:  # whatever is in a file of somebody else's
        raise ValueError(f"data: {path}: {error}") from None


def convert(path: Path, images: Path, out: Path) -> str:
    """Write a file of pseudo-labels or of routing answers as `labels.jsonl` or `routes.jsonl`, with `questions.json`
    for `--data list:`; says what to run next.

    images: the folder that pictures are named from. Labels of a picture are cut out of those of the gray square around
    it, to whole cells. A record whose picture is not there or cannot be read is recorded as failed.

    Raises `ValueError` for what is no such file, with the number of the record that is none, and for a folder that
    cannot be written.
    """
    found = read_pickle(path)
    entries = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
        raise ValueError(f"data: {path} holds no list of records")
    routes = "ms_answers" in entries[0]
    budgets = _budgets(path, entries) if routes else ()
    check_folder(out)
    records, questions = [], []
    for number, entry in enumerate(entries):
        try:
            record = (_route if routes else _label)(number, entry, images)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"data: record {number} of {path}: {reason}") from None
        records.append(record)
        picture = str((images / record["picture"]).resolve())
        # With its options, which are read out of it.
        asked = {"id": record["id"], "question": str(entry["prompt"]), "labels": record["answer"]}
        questions.append({**asked, "image_path": picture})
    out.mkdir(parents=True, exist_ok=True)
    stem = "routes" if routes else "labels"
    lines = [{"settings": {"stage": stem, "source": path.name}}, *records]
    put(out / f"{stem}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    put(out / "questions.json", json.dumps(questions).encode())
    stage, more = ("gate", ["--set", f"routes={budgets}"]) if routes else ("region", [])
    data = f"list:{out / 'questions.json'}"
    return shlex.join(["hide", "train", "q-zoom", "--data", data, "--stages", stage, "--out", str(out), *more])


def _budgets(path: Path, entries: list[dict[str, Any]]) -> tuple[int, ...]:
    """Those that all questions were asked at, ascending."""
    found = {tuple(map(int, entry.get("res", ()))) for entry in entries}
    budgets = found.pop()
    if found or list(budgets) != sorted(set(budgets)):
        raise ValueError(f"data: {path} has budgets that differ or do not ascend: {sorted({budgets, *found})}")
    return budgets


def _record(number: int, entry: dict[str, Any], images: Path, answer: str) -> tuple[dict[str, Any], tuple[int, int]]:
    """What is recorded of any question, and its picture's width and height; of one that cannot be read the error."""
    picture, question = str(entry["image"]), Question.parse(str(entry["prompt"]))
    sample, size = Sample(str(number), lambda: (), question, answer, "all", picture=picture), (0, 0)
    try:
        with Image.open(images / picture) as opened:
            size = opened.size
    except OSError as error:
        return blank_record(sample, f"{type(error).__name__}: {error}"), size
    return {**blank_record(sample, ""), "error": None}, size


def _label(number: int, entry: dict[str, Any], images: Path) -> dict[str, Any]:
    said = str(entry["text"]) or "nothing"
    record, (width, height) = _record(number, entry, images, said)
    if record["error"]:
        return record
    attention = _grid(entry["grounding_attn_o2i"])
    sinks = None if entry.get("sink_attn") is None else _grid(entry["sink_attn"])
    rows, columns = (
        _covered(length, max(width, height), cells)
        for length, cells in zip((height, width), attention.shape, strict=True)
    )
    outside = torch.ones_like(attention, dtype=torch.bool)
    outside[rows, columns] = False
    labels = tri_state(attention, sinks, outside)[rows, columns]
    return {**record, "reply": said, "grid": list(labels.shape), "labels": to_text(labels)}


def _grid(value: Any) -> Tensor:
    found = torch.from_numpy(np.asarray(value, dtype=np.float32).copy())
    if found.dim() != 2:
        raise ValueError(f"got a map of shape {tuple(found.shape)}, want rows and columns")
    return found


def _covered(length: int, side: int, cells: int) -> slice:
    """The cells of a square's axis that a picture in its middle covers, at least one."""
    first = (side - length) // 2 * cells / side
    start = min(round(first), cells - 1)
    return slice(start, max(start + 1, round(first + length * cells / side)))


def _route(number: int, entry: dict[str, Any], images: Path) -> dict[str, Any]:
    # A reply that is none is empty, and agrees with nothing.
    said = ["" if reply is None else str(reply) for reply in entry["ms_answers"]]
    replies = dict(zip(map(str, entry["res"]), said, strict=True))
    record, _ = _record(number, entry, images, str(entry["text"]))
    return {**record, "replies": replies}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pickle", type=Path, help="a file of labels, or of answers at several budgets")
    parser.add_argument("--images", type=Path, required=True, help="the folder that its pictures are named from")
    parser.add_argument("--out", type=Path, required=True, help="the folder for hide train")
    arguments = parser.parse_args()
    try:
        print(convert(arguments.pickle, arguments.images, arguments.out))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error {error}\n")


if __name__ == "__main__":
    main()
