"""Questions with answers: drawn scenes, and benchmarks from local files in the formats they are published in."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hide.images import load_image
from hide.questions import LETTERS, Question


@dataclass(frozen=True)
class Sample:
    """One question.

    id: unique in its data set. image: reads the picture. question: with its options, if any. answer: the right letter,
    or for free questions the text. split: what results are grouped by. boxes: where the things asked about are, pixels
    x0, y0, x1, y1 half-open; empty where the data set does not say. entities: what to look for, where it is known.
    """

    id: str
    image: Callable[[], Image.Image]
    question: Question
    answer: str
    split: str
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    entities: tuple[str, ...] = ()


def scenes(
    count: int,
    *,
    seed: int = 1_000_000,
    sizes: Sequence[tuple[int, int]] = ((280, 196), (700, 560), (1540, 1120)),
    lettered: bool = False,
) -> Iterator[Sample]:
    """Questions about drawn scenes (`hide.tiny.scenes`), one per scene, attributes and positions in turn.

    seed: the first scene's; training draws from other ones.

    sizes: (width, height) of the scenes in pixels, in turn; the default ones have 70, 500 and 2,200 image tokens.
    """
    import numpy as np

    from hide.tiny.scenes import draw_scene, questions

    number = 0
    while count > 0:
        scene_seed, number = seed + number, number + 1
        # Two questions of each size, one of each kind.
        wanted = ("attribute", "position")[scene_seed % 2]
        scene = draw_scene(scene_seed, *sizes[scene_seed // 2 % len(sizes)], objects=5, object_size=(28, 80))
        asked = [q for q in questions(scene, np.random.default_rng(scene_seed)) if q.split == wanted]
        if not asked:  # no two things are apart from left to right
            continue
        count -= 1
        one = asked[0]
        question = Question.parse(one.text, one.options if lettered else None)
        answer = LETTERS[one.options.index(one.answer)] if lettered else one.answer
        boxes = tuple(scene.objects[target].box for target in one.targets)
        yield Sample(f"scene-{scene_seed}", _held(scene.image), question, answer, one.split, boxes, one.entities)


def vstar(path: str | Path) -> Iterator[Sample]:
    """V*Bench: the folder with `test_questions.jsonl` and, beside each picture, a JSON file with the targets' boxes."""
    folder = Path(path)
    for record in _json_lines(folder / "test_questions.jsonl"):
        file = folder / _field(record, "image", folder)
        beside = file.with_suffix(".json")
        boxes: tuple[tuple[int, int, int, int], ...] = ()
        entities: tuple[str, ...] = ()
        if beside.is_file():
            targets = json.loads(beside.read_text(encoding="utf-8"))
            boxes = tuple((int(x), int(y), int(x + w), int(y + h)) for x, y, w, h in targets.get("bbox", ()))
            entities = tuple(targets.get("target_object", ()))
        yield Sample(
            str(_field(record, "question_id", folder)),
            _from_file(file),
            Question.parse(_field(record, "text", folder)),
            _field(record, "label", folder).strip().upper(),
            _field(record, "category", folder),
            boxes,
            entities,
        )


def hr_bench(path: str | Path) -> Iterator[Sample]:
    """HR-Bench 4K or 8K: the TSV or parquet file with columns index, question, A to D, answer, category and a base64
    image. Every question stands there several times with its options in another order; each is a sample."""
    for row in _table(Path(path)):
        options = [str(row[letter]) for letter in "ABCDEFGH" if row.get(letter) not in (None, "")]
        answer = str(_field(row, "answer", path)).strip().upper()
        question = Question.parse(str(_field(row, "question", path)), options)
        yield Sample(
            f"{_field(row, 'index', path)}",
            _from_base64(_field(row, "image", path), f"{path}, index {row['index']}"),
            question,
            answer,
            str(row.get("category") or "all"),
        )


def mme_realworld(path: str | Path) -> Iterator[Sample]:
    """MME-RealWorld: the JSON list with Text, Answer choices, Ground truth and Image, a path from the file's folder."""
    file = Path(path)
    for number, record in enumerate(_json_list(file)):
        options = [
            choice.split(")", 1)[-1].strip() if ")" in choice[:4] else choice
            for choice in _field(record, "Answer choices", file)
        ]
        yield Sample(
            str(record.get("Question_id", number)),
            _from_file(file.parent / _field(record, "Image", file)),
            Question.parse(_field(record, "Text", file), options),
            _field(record, "Ground truth", file).strip().upper(),
            str(record.get("Category") or record.get("Subtask") or "all"),
        )


def published_list(path: str | Path) -> Iterator[Sample]:
    """The JSON list that HiDe (id, question, labels, image_path, category) and Zoom-Refine (messages, images) read."""
    file = Path(path)
    for number, record in enumerate(_json_list(file)):
        if isinstance(record, dict) and "messages" in record:
            texts = {message["role"]: message["content"] for message in reversed(_field(record, "messages", file))}
            text, answer, image = texts["user"], texts["assistant"], _field(record, "images", file)[0]
        else:
            text, answer = _field(record, "question", file), _field(record, "labels", file)
            image = _field(record, "image_path", file)
        question = Question.parse(str(text).replace("<image>", "").strip())
        yield Sample(
            str(record.get("id", number)),
            _from_file(file.parent / str(image)),
            question,
            str(answer).strip().strip("()."),
            str(record.get("category") or "all"),
        )


READERS: dict[str, Callable[..., Iterator[Sample]]] = {
    "vstar": vstar,
    "hr-bench": hr_bench,
    "mme-realworld": mme_realworld,
    "list": published_list,
}


def _field(record: Any, name: str, where: object) -> Any:
    if not isinstance(record, dict) or record.get(name) is None:
        has = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"data: {where} has a record without {name!r}; it has {has}")
    return record[name]


def _json_lines(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise FileNotFoundError(f"data: {file} is not a file")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data: line {number} of {file} is not JSON: {error}") from None


def _json_list(file: Path) -> list[Any]:
    if not file.is_file():
        raise FileNotFoundError(f"data: {file} is not a file")
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {file} is not JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"data: {file} holds a {type(records).__name__}, want a list of records")
    return records


def _table(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a TSV or parquet file, read a part at a time: these files hold gigabytes of pictures."""
    if not file.is_file():
        raise FileNotFoundError(f"data: {file} is not a file")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("data: HR-Bench files are read with the datasets library; pip install datasets") from None
    kind = {".parquet": "parquet", ".tsv": "csv"}.get(file.suffix)
    if kind is None:
        raise ValueError(f"data: {file} is neither .tsv nor .parquet")
    extra = {"sep": "\t"} if kind == "csv" else {}
    yield from load_dataset(kind, data_files=str(file), split="train", streaming=True, **extra)


def _held(image: Image.Image) -> Callable[[], Image.Image]:
    return lambda: image


def _from_file(file: Path) -> Callable[[], Image.Image]:
    return lambda: load_image(file)


def _from_base64(text: str, where: str) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        try:
            return load_image(Image.open(io.BytesIO(base64.b64decode(text, validate=True))))
        except (binascii.Error, OSError) as error:
            raise ValueError(f"data: the image of {where} cannot be read: {error}") from None

    return read
