"""Training data out of a data set's questions: each picture, what a method showed of it, and the right answer.

Pictures and records are on the disk before the next question, as in an evaluation. From the records any of `FORMS` is
written at the end, one record after the other.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from hide.evaluation.data import Sample
from hide.evaluation.store import blank_record
from hide.methods.base import Method

__all__ = ["FORMS", "Form", "Record", "export_here", "save"]

Record = dict[str, Any]

SHARD = 1000
"""Samples of a WebDataset shard."""


def export_here(method: Method[Any], folder: Path, samples: Iterable[Sample]) -> Iterator[Record]:
    """A record for each sample, whose pictures are in `folder` by then; or with the error.

    A record is that of a question (`hide.evaluation.store.blank_record`) and "prompt", "pictures" (file names from
    `folder`: the images, then what the method showed of each), "boxes" (those of the data set, in pixels of the first
    image) and "found" (per image those of the method).
    """
    written: set[str] = set()
    for sample in samples:
        try:
            yield _record(method, folder, sample, written)
        except Exception as error:  # whatever one question does, the others are written
            yield blank_record(sample, f"{type(error).__name__}: {error}")


def _record(method: Method[Any], folder: Path, sample: Sample, written: set[str]) -> Record:
    bound = method.with_boxes(sample.boxes)
    if bound is None:
        raise ValueError(f"{method.name} wants the right boxes, which the data set does not have")
    image = sample.image()
    answer = bound.ask(list(image) if isinstance(image, tuple) else image, sample.question)
    shown = [one for one in answer.shown if one is not None]
    # Not by the question's number, which another limit or order would change; images of one file are kept once.
    names = []
    for owner, kind, pictures in ((sample.picture or sample.id, "image", answer.images), (sample.id, "shown", shown)):
        digest = hashlib.sha256(owner.encode(errors="replace")).hexdigest()[:16]
        for place, picture in enumerate(pictures):
            names.append(name := f"pictures/{digest}-{kind}{place}.png")
            if name not in written:
                _keep(folder / name, picture)
                written.add(name)
    return {
        **blank_record(sample, ""),
        "error": None,
        "prompt": sample.question.asked(bound.preset.answer.letter_request),
        "pictures": names,
        "boxes": [list(box) for box in sample.boxes],
        "found": [boxes.tolist() for boxes in answer.boxes],
        "notes": [*sample.notes, *answer.notes],
    }


def _keep(path: Path, picture: Image.Image) -> None:
    """Write a picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    picture.save(new, "PNG")
    new.replace(path)


# -- forms ------------------------------------------------------------------------------------------------------------


def _llava(folder: Path, records: Sequence[Record]) -> Path:
    def one(record: Record) -> Record:
        names = record["pictures"]
        return {
            "id": record["id"],
            "image": names[0] if len(names) == 1 else names,
            "conversations": [
                {"from": "human", "value": "<image>\n" * len(names) + record["prompt"]},
                {"from": "gpt", "value": record["answer"]},
            ],
        }

    path = folder / "llava.json"
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for place, record in enumerate(records):
            file.write((",\n" if place else "[\n") + json.dumps(one(record), ensure_ascii=False))
        file.write("\n]\n")
    return path


def _messages(folder: Path, records: Sequence[Record]) -> Path:
    path = folder / "messages.jsonl"
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for record in records:
            shown = [{"type": "image", "image": name} for name in record["pictures"]]
            asked = {"role": "user", "content": [*shown, {"type": "text", "text": record["prompt"]}]}
            said = {"role": "assistant", "content": [{"type": "text", "text": record["answer"]}]}
            file.write(json.dumps({"id": record["id"], "messages": [asked, said]}, ensure_ascii=False) + "\n")
    return path


def _webdataset(folder: Path, records: Sequence[Record]) -> Path:
    for first in range(0, len(records), SHARD):
        shard = folder / "webdataset" / f"{first // SHARD:06}.tar"
        shard.parent.mkdir(exist_ok=True)
        with tarfile.open(shard, "w") as tar:
            for number, record in enumerate(records[first : first + SHARD], first):
                # A key must not hold a dot, and the files of a sample follow each other.
                for place, name in enumerate(record["pictures"]):
                    _add(tar, f"{number:09}.{place}.png", (folder / name).read_bytes())
                facts = {name: record[name] for name in ("id", "prompt", "answer", "boxes", "found", "split")}
                _add(tar, f"{number:09}.json", json.dumps(facts).encode())
    return folder / "webdataset"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


class Form(NamedTuple):
    """A format that people train from."""

    summary: str
    write: Callable[[Path, Sequence[Record]], Path]


FORMS: dict[str, Form] = {
    "llava": Form("llava.json, a list of conversations with <image> in their texts", _llava),
    "messages": Form("messages.jsonl, chat messages as Qwen-VL's processor and TRL take them", _messages),
    "webdataset": Form(f"webdataset/*.tar, {SHARD:,} samples each: N.0.png, N.1.png, ..., N.json", _webdataset),
}
"""By name."""


def save(folder: Path, records: Sequence[Record], form: str) -> Path:
    """Write the records that did not fail in one of `FORMS`; the file, or folder, that it is in.

    Raises `ValueError` where all failed.
    """
    sound = [record for record in records if not record["error"]]
    if not sound:
        why = f"; the first: {records[0]['error']}" if records else ""
        raise ValueError(f"data: none of {len(records)} questions could be exported{why}")
    return FORMS[form].write(folder, sound)
