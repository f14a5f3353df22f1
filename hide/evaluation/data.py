"""Questions with answers: drawn scenes, and benchmarks from local files in the formats they are published in."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from hide.evaluation.files import Entry, json_records, table
from hide.evaluation.scoring import right_answer
from hide.images import base64_bytes, load_image
from hide.questions import LETTERS, Question


@dataclass(frozen=True)
class Sample:
    """One question.

    id: unique in its data set. image: reads the picture, or a tuple of several. question: with its options, if any.
    answer: the right letter, or for free questions the text. split: what results are grouped by. boxes: where the
    things asked about are, pixels x0, y0, x1, y1 half-open, of the first picture; empty where the data set does not
    say. entities: what to look for, where it is known. picture: what the data set calls the picture, or a digest of its
    bytes. notes: what the reader did that is not in the file; they are repeated in the result.
    """

    id: str
    image: Callable[[], Image.Image | tuple[Image.Image, ...]]
    question: Question
    answer: str
    split: str
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    entities: tuple[str, ...] = ()
    picture: str = ""
    notes: tuple[str, ...] = ()


class BadRecord(ValueError):
    """A record of a data set that is no question: its id, or what stands for it; where it is; what is wrong with it."""

    def __init__(self, id: str, place: str, reason: str) -> None:
        super().__init__(f"data: {place}: {reason}")
        self.id, self.place, self.reason = id, place, reason


class Samples(Iterator[Sample]):
    """What a reader yields. A record that is no question is raised as `BadRecord`, and the next call of `next` goes on
    behind it; `distinct` hands it over instead."""

    def __init__(self, found: Iterator[Sample | BadRecord]) -> None:
        self._found = distinct(found)

    def __next__(self) -> Sample:
        one = next(self._found)
        if isinstance(one, BadRecord):
            raise one
        return one


def distinct(samples: Iterable[Sample | BadRecord]) -> Iterator[Sample | BadRecord]:
    """All records, the bad ones too, each with an id of its own.

    Ids are texts: 1 and "1" are the same. Of records with the same id "7" the second becomes "7#2", and says so.
    """
    times: dict[str, int] = {}
    records = iter(samples)
    while True:
        one: Sample | BadRecord
        try:
            one = next(records)
        except StopIteration:
            return
        except BadRecord as bad:
            one = bad
        own = given = str(one.id)
        while own in times:
            times[given] += 1
            own = f"{given}#{times[given]}"
        times[own] = 1
        if isinstance(one, BadRecord):
            yield BadRecord(own, one.place, one.reason)
        elif own == given:
            yield replace(one, id=own)
        else:
            note = f"id: {given!r} stands there more than once; this is {own!r}"
            yield replace(one, id=own, notes=(*one.notes, note))


def scenes(
    count: int,
    *,
    seed: int = 1_000_000,
    sizes: Sequence[tuple[int, int]] = ((280, 196), (700, 560), (1540, 1120)),
    tokens: int | None = None,
    lettered: bool = False,
) -> Iterator[Sample]:
    """Questions about drawn scenes (`hide.tiny.scenes`), one per scene, attributes and positions in turn.

    seed: the first scene's; training draws from other ones.

    sizes: (width, height) of the scenes in pixels, in turn; the default ones have 70, 500 and 2,200 image tokens.

    tokens: instead of `sizes`, so many image tokens, give or take a tenth, in other shapes and with more things.
    """
    import numpy as np

    from hide.tiny.scenes import draw_scene, large_scene, questions

    number = 0
    while count > 0:
        scene_seed, number = seed + number, number + 1
        # Two questions of each size, one of each kind.
        wanted = ("attribute", "position")[scene_seed % 2]
        if tokens is None:
            scene = draw_scene(scene_seed, *sizes[scene_seed // 2 % len(sizes)], objects=5, object_size=(28, 80))
        else:
            scene = large_scene(scene_seed, (round(0.9 * tokens), round(1.1 * tokens)))
        asked = [q for q in questions(scene, np.random.default_rng(scene_seed)) if q.split == wanted]
        if not asked:  # no two things are apart from left to right
            continue
        count -= 1
        one = asked[0]
        question = Question.parse(one.text, one.options if lettered else None)
        answer = LETTERS[one.options.index(one.answer)] if lettered else one.answer
        boxes = tuple(scene.objects[target].box for target in one.targets)
        yield Sample(f"scene-{scene_seed}", _held(scene.image), question, answer, one.split, boxes, one.entities)


def scene_questions(seed: int, tokens: tuple[int, int], name: str) -> list[Sample]:
    """Up to six questions about one large scene, as many about colors as about sides, in turn.

    tokens: of the image, least and most. name: what ids and the split begin with: "name-seed-place".
    """
    import numpy as np

    from hide.tiny.scenes import large_scene, questions

    scene = large_scene(seed, tokens)
    found = questions(scene, np.random.default_rng(seed))
    splits = [[one for one in found if one.split == split] for split in ("attribute", "position")]
    each = min(3, *map(len, splits))
    chosen = [one for pair in zip(*(group[:each] for group in splits), strict=True) for one in pair]
    return [
        Sample(
            f"{name}-{seed}-{place}",
            _held(scene.image),
            Question.parse(one.text),
            one.answer,
            name,
            tuple(scene.objects[target].box for target in one.targets),
            one.entities,
            f"{name}-{seed}",
        )
        for place, one in enumerate(chosen)
    ]


def vstar(path: str | Path) -> Samples:
    """V*Bench: the folder with `test_questions.jsonl` and, beside each picture, a JSON file with the targets' boxes."""
    folder = Path(path)

    def read(record: Any, entry: Entry) -> Sample:
        name = _text(_field(record, "image"), "image")
        boxes, entities = _targets((folder / name).with_suffix(".json"))
        question = Question.parse(_text(_field(record, "text"), "text"))
        return Sample(
            id=_id(record.get("question_id"), entry),
            question=question,
            answer=right_answer(question, _text(_field(record, "label"), "label")),
            split=_split(_field(record, "category")),
            **_pictures(folder, [name]),
            boxes=boxes,
            entities=entities,
        )

    return _samples(json_records(folder / "test_questions.jsonl"), read, "question_id")


def hr_bench(path: str | Path) -> Samples:
    """HR-Bench 4K or 8K: the TSV or parquet file with columns index, question, A to D, answer, category and a base64
    image. Every question stands there several times with its options in another order; each is a sample.

    Empty cells behind the last option are no options; an empty one between others is a bad record, as the letters of
    those behind it would be others.
    """
    file = Path(path)

    def read(row: Any, entry: Entry) -> Sample:
        options = [_text(row.get(letter), letter, "") for letter in "ABCDEFGH"]
        while options and not options[-1].strip():
            options.pop()
        question = Question.parse(_text(_field(row, "question"), "question"), options)
        return Sample(
            id=_id(row.get("index"), entry),
            question=question,
            answer=right_answer(question, _text(_field(row, "answer"), "answer")),
            split=_split(row.get("category")),
            **_pictures(file.parent, [_embedded(_field(row, "image"))]),
        )

    return _samples(table(file, ("question", "A", "B", "answer", "image")), read, "index")


def mme_realworld(path: str | Path) -> Samples:
    """MME-RealWorld, its Lite and its CN: the JSON list with Text, Answer choices, Ground truth and Image, a path from
    the file's folder; or the TSV or parquet file that harnesses read, with columns index, question, multi-choice
    options, answer, category, and the image in base64 as bytes or image.
    """
    file = Path(path)

    def row(cells: Any, entry: Entry) -> Sample:
        text, listed = _text(_field(cells, "question"), "question"), _field(cells, _CHOICES)
        # One text of lettered lines in TSV.
        question = (
            Question.parse(f"{text}\n{listed}")
            if isinstance(listed, str)
            else Question.parse(text, _options(listed, _CHOICES))
        )
        if not question.options:
            raise ValueError(f"{_CHOICES}: got {_short(listed)}, want lettered lines or a list")
        return Sample(
            id=_id(cells.get("index"), entry),
            question=question,
            answer=right_answer(question, _text(_field(cells, "answer"), "answer")),
            split=_split(cells.get("category")),
            **_pictures(file.parent, [_embedded(_field(cells, "bytes" if cells.get("bytes") else "image"))]),
        )

    def read(record: Any, entry: Entry) -> Sample:
        options = _options(_field(record, "Answer choices"), "Answer choices")
        question = Question.parse(_text(_field(record, "Text"), "Text"), options)
        category = record.get("Category")
        return Sample(
            id=_id(record.get("Question_id"), entry),
            question=question,
            answer=right_answer(question, _text(_field(record, "Ground truth"), "Ground truth")),
            split=_split(record.get("Subtask") if category in (None, "") else category),
            **_pictures(file.parent, [_field(record, "Image")]),
        )

    if file.suffix in (".tsv", ".parquet"):
        return _samples(table(file, ("question", _CHOICES, "answer")), row, "index")
    return _samples(json_records(file), read, "Question_id")


def published_list(path: str | Path) -> Samples:
    """The JSON list that HiDe (id, question, labels, image_path, category) and Zoom-Refine (messages, images) read.

    Also with several pictures, with `options` beside the question, as chats in parts, and as `conversations` with
    from and value. A chat is one question of the user and the assistant's answer; pictures are shown before the text,
    whose `<image>` marks are left out.
    """
    file = Path(path)

    def read(record: Any, entry: Entry) -> Sample:
        chat = next((name for name in ("messages", "conversations") if name in _object(record)), None)
        if chat is not None:
            text, answer, shown = _chat(record[chat], chat)
            listed = record.get("images", record.get("image"))
        else:
            text, answer = _text(_field(record, "question"), "question"), _field(record, "labels")
            listed, shown = _field(record, "image_path"), [_HERE] * text.count(_MARK)
        options = _options(record["options"], "options") if record.get("options") else None
        question = Question.parse(text.replace(_MARK, "").strip(), options)
        return Sample(
            id=_id(record.get("id"), entry),
            question=question,
            answer=right_answer(question, _text(answer[0] if _single(answer) else answer, "answer")),
            split=_split(record.get("category")),
            **_pictures(file.parent, _placed(shown, listed if isinstance(listed, list) else [listed])),
        )

    return _samples(json_records(file), read, "id")


READERS: dict[str, Callable[[str | Path], Samples]] = {
    "vstar": vstar,
    "hr-bench": hr_bench,
    "mme-realworld": mme_realworld,
    "list": published_list,
}


def read_data(data: str, limit: int, *, seed: int = 1_000_000) -> Iterator[Sample | BadRecord]:
    """At most so many questions of what commands call `--data`, bad records among them, read as they are asked for: a
    benchmark's pictures are gigabytes.

    data: "scenes", "scenes:TOKENS", or "FORMAT:PATH" with a format of `READERS`. seed: of the first scene.

    Raises `ValueError` for anything else.
    """
    kind, _, path = data.partition(":")
    if kind == "scenes" and re.fullmatch(r"scenes(:[1-9]\d{1,5})?", data):
        return scenes(limit, seed=seed, tokens=int(path) if path else None)
    if kind not in READERS or not path:
        formats = ", ".join(READERS)
        raise ValueError(f"data: got {data!r}, want scenes, scenes:TOKENS, or FORMAT:PATH with FORMAT one of {formats}")
    return islice(distinct(READERS[kind](path)), limit)


def _samples(entries: Iterator[Entry], read: Callable[[Any, Entry], Sample], id_name: str) -> Samples:
    """The records as samples, lazily; `id_name` is the field that names a bad one too, where that can be read."""

    def found() -> Iterator[Sample | BadRecord]:
        for entry in entries:
            known = entry.value.get(id_name) if isinstance(entry.value, dict) else None
            try:
                if isinstance(entry.value, ValueError):
                    raise entry.value
                sample = read(_object(entry.value), entry)
            except Exception as error:  # whatever is in one record, the others are read
                meant = isinstance(error, (ValueError, TypeError))
                reason = str(error) if meant else f"{type(error).__name__}: {error}"
                yield BadRecord(_id(known, entry), entry.place, reason)
            else:
                yield sample

    return Samples(found())


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"want an object with fields, got {_short(record)}")
    return record


def _field(record: dict[str, Any], name: str) -> Any:
    if record.get(name) is None:
        given = sorted(str(key) for key, value in record.items() if value is not None)
        raise ValueError(f"without {name!r}; it has {str(given)[:400]}")
    return record[name]


def _text(value: Any, name: str, default: str | None = None) -> str:
    """A cell as text: numbers in digits, true and false as JSON writes them. `None` is `default`, or refused."""
    if value is None and default is not None:
        return default
    if isinstance(value, bool):
        value = json.dumps(value)
    if value is None or isinstance(value, (list, dict, bytes)):
        raise ValueError(f"{name}: got {_short(value)}, want a text")
    text = str(value)
    if not _is_unicode(text):
        raise ValueError(f"{name}: got {text[:80]!r}, want Unicode; it has a surrogate")
    return text


def _id(value: Any, entry: Entry) -> str:
    """A text or a number as text; for anything else, and for nothing, the record's number in the file, from 0."""
    usable = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    text = str(value) if usable and not (isinstance(value, float) and not math.isfinite(value)) else ""
    return text if text.strip() and _is_unicode(text) else str(entry.number)


def _split(value: Any) -> str:
    return " ".join(_text(value, "category", "").split()) or "all"


_CHOICES = "multi-choice options"
_LETTERED = re.compile(r"\s*[(（\[【]?([A-Za-z])[)）\]】.．:：、](?:[.．:：](?=\s))?\s*(.*)", re.DOTALL)


def _options(value: Any, name: str) -> list[str]:
    """Options from a list, or from an object with letters as keys. Letters before them are taken off where each has its
    own; where they are in another order, what the answer means is unknown."""
    if isinstance(value, dict):
        lettered = {str(letter).upper(): _text(option, name) for letter, option in value.items()}
        if sorted(lettered) != list(LETTERS[: len(value)]):
            raise ValueError(f"{name}: got the letters {sorted(lettered)}, want A, B and so on")
        return [lettered[letter] for letter in sorted(lettered)]
    if not isinstance(value, list):
        raise ValueError(f"{name}: got {_short(value)}, want a list of options")
    texts = [_text(option, name) for option in value]
    found = [_LETTERED.fullmatch(text) for text in texts]
    letters = "".join(match[1] for match in found if match).upper()
    if len(letters) < len(texts) or sorted(letters) != sorted(LETTERS[: len(letters)]):
        return texts
    if letters != LETTERS[: len(letters)]:
        raise ValueError(f"{name}: lettered in the order {letters}, want {LETTERS[: len(letters)]}")
    return [match[2] for match in found if match]


def _targets(file: Path) -> tuple[tuple[tuple[int, int, int, int], ...], tuple[str, ...]]:
    """Boxes and things from the file beside a picture of V*Bench, where there is one."""
    if not file.is_file():
        return (), ()
    try:
        targets = _object(json.loads(file.read_bytes()))
        boxes = tuple((int(x), int(y), int(x + w), int(y + h)) for x, y, w, h in targets.get("bbox", ()))
        names = targets.get("target_object", ())
        entities = (names,) if isinstance(names, str) else tuple(_text(name, "target_object") for name in names)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the boxes in {file} cannot be read: {error}") from None
    return boxes, entities


_MARK, _HERE = "<image>", None
_ROLES = {"human": "user", "gpt": "assistant"}


def _chat(turns: Any, name: str) -> tuple[str, Any, list[Any]]:
    """(question, answer, its pictures in their order: what stands in the chat, or `_HERE` for one of a list)."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{name}: got {_short(turns)}, want a list of turns")
    said = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        text, shown = _content(turn.get("content", turn.get("value")))
        if role != "system" or text.strip() or shown:
            said.append((_ROLES.get(str(role), str(role)), text, shown))
    roles = [role for role, _, _ in said]
    if roles != ["user", "assistant"]:
        raise ValueError(f"{name}: turns of {', '.join(roles) or 'nobody'}, want one of user, then one of assistant")
    (_, question, shown), (_, answer, drawn) = said
    if drawn:
        raise ValueError(f"{name}: the answer holds a picture, want a text")
    return question, answer, shown


def _content(content: Any) -> tuple[str, list[Any]]:
    """The text of a turn and its pictures; a turn is a text, or a list of parts that are texts and pictures."""
    texts: list[str] = []
    shown: list[Any] = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type", next(iter(part), None)) if isinstance(part, dict) else "text"
        value = part.get(str(kind)) if isinstance(part, dict) else part
        if kind == "text":
            texts.append(_text(value, "content"))
            shown += [_HERE] * texts[-1].count(_MARK)
        elif kind in ("image", "image_url"):
            value = value or part.get("url") or part.get("path")
            if not value and isinstance(part.get("base64"), str):
                value = f"data:;base64,{part['base64']}"
            shown.append(value.get("url", value) if isinstance(value, dict) else value)
        else:
            raise ValueError(f"content: got a part {_short(part)}, want text, image or image_url")
    return "\n".join(texts), shown


def _placed(shown: Sequence[Any], listed: Sequence[Any]) -> list[Any]:
    """All pictures in their order: those in the text, with those of the list in the places that are kept for them."""
    given = [picture for picture in listed if picture is not None]
    places = sum(picture is _HERE for picture in shown)
    if not shown and not given:
        raise ValueError("images: got none, want at least one picture")
    if shown and places != len(given):
        raise ValueError(f"images: {len(given)} pictures for {places} places in the text")
    if not shown:
        return given
    rest = iter(given)
    return [next(rest) if picture is _HERE else picture for picture in shown]


def _embedded(value: Any) -> Any:
    """A cell with a picture: base64 or a data URI, or what `_pictures` takes; URLs are refused there."""
    return base64_bytes(value) if isinstance(value, str) and value.strip() and "://" not in value[:20] else value


def _pictures(folder: Path, values: Sequence[Any]) -> dict[str, Any]:
    """What `Sample` has of pictures, by name; relative paths begin at `folder`."""
    sources: list[Path | str | bytes] = []
    names = []
    for value in values:
        if isinstance(value, dict):  # as the datasets library stores pictures
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str) and value.lstrip()[:5].lower() == "data:":
            value = base64_bytes(value)
        if isinstance(value, bytes):
            sources.append(value)
            names.append(f"digest {hashlib.blake2b(value, digest_size=12).hexdigest()}")
        elif isinstance(value, str) and value.strip():
            sources.append(value if "://" in value else folder / _text(value, "image"))
            names.append(value)
        else:
            raise ValueError(f"image: got {_short(value)}, want a path or the bytes of a picture")

    def read() -> Image.Image | tuple[Image.Image, ...]:
        pictures = tuple(map(load_image, sources))
        return pictures if len(pictures) > 1 else pictures[0]

    return {"image": read, "picture": " ".join(names)}


def _held(image: Image.Image) -> Callable[[], Image.Image]:
    return lambda: image


def _single(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    """A value in an error: what it is and how it begins."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:80]!r}"
