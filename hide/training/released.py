"""The published training data of Q-Zoom as files that `hide train` reads: `python -m hide.training.released`.

They are pickles, which run whatever code they name when they are read plainly. Here only arrays and what Python itself
is made of are taken, and anything else is refused by its name.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Iterator
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
    it, to whole cells.
    """
    found = read_pickle(path)
    entries = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
        raise ValueError(f"data: {path} holds no list of records")
    routes = "ms_answers" in entries[0]
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    records = list(_routes(entries) if routes else _labels(entries, images))
    questions = [
        {
            "id": record["id"],
            "question": record["question"],
            "labels": record["answer"],
            "image_path": str((images / record["picture"]).resolve()),
        }
        for record in records
    ]
    stem = "routes" if routes else "labels"
    lines = [{"settings": {"stage": stem, "source": path.name}}, *records]
    put(out / f"{stem}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    put(out / "questions.json", json.dumps(questions).encode())
    more = ""
    if routes:
        budgets = {tuple(map(int, entry["res"])) for entry in entries}
        if len(budgets) > 1:
            raise ValueError(f"data: {path} has questions of different budgets: {sorted(budgets)}")
        more = f' --set "routes={budgets.pop()}"'
    stage = "gate" if routes else "region"
    return f"hide train q-zoom --data list:{out / 'questions.json'} --stages {stage} --out {out}{more}"


def _record(number: int, entry: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    sample = Sample(str(number), lambda: (), Question.parse(question), answer, "all", picture=str(entry["image"]))
    return {**blank_record(sample, ""), "error": None}


def _labels(entries: list[dict[str, Any]], images: Path) -> Iterator[dict[str, Any]]:
    for number, entry in enumerate(entries):
        maps = [None if entry.get(name) is None else _grid(entry[name]) for name in ("grounding_attn_o2i", "sink_attn")]
        if maps[0] is None:
            raise ValueError(f"data: record {number} has no grounding_attn_o2i")
        with Image.open(images / str(entry["image"])) as opened:
            width, height = opened.size
        shown = [
            _covered(length, max(width, height), cells)
            for length, cells in zip((height, width), maps[0].shape, strict=True)
        ]
        outside = torch.ones_like(maps[0], dtype=torch.bool)
        outside[shown[0], shown[1]] = False
        labels = tri_state(maps[0], maps[1], outside)[shown[0], shown[1]]
        said = str(entry["text"]) or "nothing"
        yield {
            **_record(number, entry, str(entry["prompt"]), said),
            "reply": said,
            "grid": list(labels.shape),
            "labels": to_text(labels),
        }


def _grid(value: Any) -> Tensor:
    found = torch.from_numpy(np.asarray(value, dtype=np.float32).copy())
    if found.dim() != 2:
        raise ValueError(f"data: got a map of shape {tuple(found.shape)}, want rows and columns")
    return found


def _covered(length: int, side: int, cells: int) -> slice:
    """The cells of a square's axis that a picture in its middle covers, at least one."""
    first = (side - length) // 2 * cells / side
    start = min(round(first), cells - 1)
    return slice(start, max(start + 1, round(first + length * cells / side)))


def _routes(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, entry in enumerate(entries):
        replies = dict(zip(map(str, entry["res"]), map(str, entry["ms_answers"]), strict=True))
        yield {**_record(number, entry, str(entry["prompt"]), str(entry["text"])), "replies": replies}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pickle", type=Path, help="a file of labels, or of answers at several budgets")
    parser.add_argument("--images", type=Path, required=True, help="the folder that its pictures are named from")
    parser.add_argument("--out", type=Path, required=True, help="the folder for hide train")
    arguments = parser.parse_args()
    print(convert(arguments.pickle, arguments.images, arguments.out))


if __name__ == "__main__":
    main()
