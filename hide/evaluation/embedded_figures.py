"""All figures of the embedded model by one command: `python -m hide.evaluation.embedded_figures`.

On pictures that training never saw, of three sizes: words, option letters in all forms that data sets use, boxes, and
replies in Zoom-Refine's two turns; and on large pictures the plain answer beside HiDe's and that from the true boxes.
Each share has its 95 % Wilson interval. `--questions` asks fewer of each, for a trial.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count as numbers
from pathlib import Path
from typing import Any

import numpy as np

from hide.evaluation.embedded_model import measure_large, small_scene
from hide.evaluation.scoring import Share, share
from hide.methods.base import NoSettings
from hide.methods.hide.method import HiDe
from hide.methods.plain import Plain
from hide.methods.prompts import (
    ANSWER_FORM,
    BOX_FORM,
    RECHECKED_FORM,
    ZOOM_REFINE_ASK,
    ZOOM_REFINE_RECHECK,
    box_text,
    filled,
    where,
)
from hide.questions import Question as AskedQuestion
from hide.replies import read_letter
from hide.session import ImageSession, Message
from hide.tiny import CHECKPOINT
from hide.tiny.letter_forms import LETTER_FORMS
from hide.tiny.scenes import (
    COLORS,
    KINDS,
    NUMBERS,
    PLURALS,
    Question,
    Scene,
    draw_scene,
    large_scene,
    more_questions,
    questions,
)

__all__ = ["PARTS", "SIZES", "main", "measure_methods", "measure_size", "overlap", "read_box"]

SIZES: dict[str, Callable[[int], Scene]] = {
    "to 100 tokens": small_scene,
    "about 600": lambda seed: large_scene(seed, (500, 700)),
    "about 2,000": lambda seed: large_scene(seed, (1560, 2050)),
}
_LARGE = {"about 2,000": (1560, 2050), "about 4,000": (3600, 4400)}
_FIRST_SEED = 2_000_000  # behind those of `hide.evaluation.embedded_model`; training draws from 2**40 on
_MARGIN = 0.1
_NUMBER = r"([01]\.\d\d)"
_BOX = re.compile(rf"\[{', '.join([_NUMBER] * 4)}\]")
_FIRST = re.compile(
    re.escape(ANSWER_FORM).replace(re.escape("{answer}"), r"([A-Z])")
    + r"\n"
    + re.escape(BOX_FORM).replace(re.escape("{box}"), f"({_BOX.pattern})")
)
_SECOND = re.compile(re.escape(RECHECKED_FORM).replace(re.escape("{answer}"), r"([A-Z])"))
_BOX_TOKENS, _FIRST_TOKENS, _SECOND_TOKENS = 16, 40, 20

Box = tuple[float, float, float, float]


def read_box(text: str) -> Box | None:
    """The box that a reply is, in parts of width and height; `None` for another reply, and for a box without area."""
    found = _BOX.fullmatch(text.strip())
    if not found:
        return None
    x0, y0, x1, y1 = (float(edge) for edge in found.groups())
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes with an area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def _true_box(scene: Scene, targets: tuple[int, ...]) -> tuple[int, int, int, int]:
    boxes = np.array([scene.objects[i].box for i in targets])
    x0, y0, x1, y1 = (int(edge) for edge in (*boxes[:, :2].min(0), *boxes[:, 2:].max(0)))
    return x0, y0, x1, y1


def _two_turns(session: ImageSession, question: AskedQuestion) -> tuple[str, str] | None:
    """Both letters of a conversation in Zoom-Refine's form; `None` where a reply has not its form."""
    ask = Message(filled(ZOOM_REFINE_ASK, question))
    first = session.chat([ask], max_new_tokens=_FIRST_TOKENS)
    said = _FIRST.fullmatch(first.text)
    box = read_box(said[2]) if said else None
    if said is None or box is None:
        return None
    image = session.images[0]
    loose = np.clip(np.array(box) + np.array([-_MARGIN, -_MARGIN, _MARGIN, _MARGIN]), 0, 1)
    x0, y0, x1, y1 = (loose * np.tile(image.size, 2)).tolist()
    crop = image.crop((int(x0), int(y0), int(np.ceil(x1)), int(np.ceil(y1))))
    again = Message(filled(ZOOM_REFINE_RECHECK, question), [crop])
    second = _SECOND.fullmatch(session.chat([ask, first, again], max_new_tokens=_SECOND_TOKENS).text)
    return (said[1], second[1]) if second else None


def _scenes(draw: Callable[[int], Scene]) -> Iterator[tuple[Scene, np.random.Generator]]:
    for seed in numbers(_FIRST_SEED):
        try:
            scene = draw(seed)
        except ValueError:  # its things do not fit into so small a picture
            continue
        yield scene, np.random.default_rng(seed)


def _to_count(size: tuple[int, int], rng: np.random.Generator) -> tuple[Scene, Question] | None:
    """A picture with one to four things of a kind, each as often, and two others, and the question how many they are;
    `None` where there is no room for them.
    """
    kind, *others = (str(kind) for kind in rng.permutation(KINDS)[:3])
    number = int(rng.integers(1, len(NUMBERS) + 1))
    names = [(one, str(rng.choice(list(COLORS)))) for one in [*[kind] * number, *others]]
    try:
        scene = draw_scene(int(rng.integers(1 << 30)), *size, objects=names, object_size=(28, 70))
    except ValueError:
        return None
    asked = [one for one in more_questions(scene, rng) if one.split == "count" and PLURALS[kind] in one.text]
    return scene, asked[0]


def measure_size(hide: HiDe, count: int, draw: Callable[[int], Scene]) -> dict[str, Share]:
    """What plain answers are worth on pictures of one size, `count` questions of each kind."""
    kinds = ("words", "letters", "boxes", "two turns: form")
    right: dict[str, list[bool]] = {kind: [] for kind in kinds}
    plain = Plain(hide.model, hide.preset.with_settings(NoSettings()))
    forms = list(LETTER_FORMS.values())

    def note(what: str, one: bool) -> None:
        if len(right.setdefault(what, [])) < count:
            right[what].append(one)

    def said(session: ImageSession, question: Question) -> bool:
        return plain.ask(session, question.text).text.strip().lower().rstrip(".") == question.answer

    further = ("vertical", "existence")
    number = 0
    for scene, rng in _scenes(draw):
        if all(len(right.get(kind, ())) >= count for kind in kinds):
            break
        asked = questions(scene, rng)
        by_split = [[one for one in asked if one.split == split] for split in ("attribute", "position")]
        each = min(3, *map(len, by_split))
        chosen = [one for pair in zip(*(group[:each] for group in by_split), strict=True) for one in pair]
        with hide.open(scene.image) as session:
            for question in chosen:
                ok = said(session, question)
                note("words", ok)
                note(f"words: {question.split}", ok)
                reply = session.ask(
                    forms[number % len(forms)](question.text, question.options), max_new_tokens=_SECOND_TOKENS
                )
                number += 1
                note("letters", read_letter(reply.text, question.options) == question.letter)
            for question in chosen[:2]:
                turns = _two_turns(session, AskedQuestion(question.text, question.options))
                note("two turns: form", turns is not None)
                note("two turns: first letter", turns is not None and turns[0] == question.letter)
                note("two turns: rechecked letter", turns is not None and turns[1] == question.letter)
            for question in [one for one in asked if one.split == "attribute"][:3]:
                box = read_box(session.ask(where(question.entities[0]), max_new_tokens=_BOX_TOKENS).text)
                truth = read_box(box_text(_true_box(scene, question.targets), scene.image.size))
                note("boxes", box is not None and truth is not None and overlap(box, truth) >= 0.5)
            for split in further:
                for question in [one for one in more_questions(scene, rng) if one.split == split][:2]:
                    note(split, said(session, question))
        if crowd := _to_count(scene.image.size, rng):
            with hide.open(crowd[0].image) as session:
                note("count", said(session, crowd[1]))
    return {name: share(results) for name, results in right.items()}


def measure_methods(hide: HiDe, count: int, tokens: tuple[int, int]) -> dict[str, Share]:
    """Plain answers to `count` questions about large pictures, HiDe's, and those with collages from the true boxes."""
    answers: list[dict[str, Any]] = []
    measure_large(hide, count, tokens, answers)
    return {
        method: share([one["replies"][method].strip().lower().rstrip(".") == one["answer"] for one in answers])
        for method in ("plain", "hide", "true_boxes")
    }


PARTS: dict[str, Callable[[HiDe, int], dict[str, Share]]] = {
    **{name: partial(measure_size, draw=draw) for name, draw in SIZES.items()},
    **{f"{name}, methods": partial(measure_methods, tokens=tokens) for name, tokens in _LARGE.items()},
}
"""Name -> what measures so many questions of each kind."""


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--questions", type=int, default=500, help="of each kind and size")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all, if not given")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    hide = HiDe.from_pretrained(arguments.checkpoint, preset=arguments.preset)
    found = {}
    for part in arguments.parts:
        found[part] = PARTS[part](hide, arguments.questions)
        print(part)
        for name, one in found[part].items():
            print(f"  {name:28} {one.value:6.1%}  ({one.low:.1%} to {one.high:.1%} of {one.total})", flush=True)
    if arguments.json:
        report = {size: {name: one._asdict() for name, one in own.items()} for size, own in found.items()}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
