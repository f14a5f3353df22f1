"""Zoom-Refine (arXiv 2506.01663): one conversation of two turns on one prefill.

The model answers and names a box; it sees the box cut out of the image at full resolution, and checks its answer. The
published code encodes the image twice and runs everything before the second turn anew; here the second turn goes on
behind the first reply's own tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from hide.images import to_image, within_aspect
from hide.methods.base import Answer, AnswerSettings, Evidence, Method, Preset, Steps, presets_of
from hide.methods.prompts import ZOOM_REFINE_ASK, ZOOM_REFINE_RECHECK, filled
from hide.methods.zoom_refine.parse import (
    Box,
    answer_in,
    box_in,
    published_box,
    published_letter,
    published_rechecked,
)
from hide.presets import WHITE, RunSettings
from hide.questions import Question
from hide.session import Message, Session


@dataclass(frozen=True)
class ZoomRefineSettings:
    """Settings of Zoom-Refine.

    margin: what the crop has beyond the box on each side, in parts of the image's width and height.
    ask, recheck: the two turns, with the places that `hide.methods.prompts.filled` fills.
    compat: read replies as the published code does, which takes letters from A to E and boxes in parts of the image
        alone; then a question without options has no answer that it could read.
    """

    margin: float = 0.1
    ask: str = ZOOM_REFINE_ASK
    recheck: str = ZOOM_REFINE_RECHECK
    compat: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= 1:
            raise ValueError(f"margin: got {self.margin}, want 0 to 1, in parts of the image")
        if "{question}" not in self.ask:
            raise ValueError("ask: got a text without {question}, want the place where the question stands")


# 12 tiles and a thumbnail, as published.
_TILES = RunSettings(min_tokens=256, max_tokens=3328)
# Pixels of a side; what is less than an image token of most families shows no more than the image did.
_LEAST_SIDE = 28


class ZoomRefine(Method[ZoomRefineSettings]):
    """The image, then the one crop that the model asks for."""

    name: ClassVar[str] = "zoom-refine"
    summary: ClassVar[str] = "the model answers and names a box, sees it cut out, and checks its answer"
    needs: ClassVar[frozenset[str]] = frozenset({"chat", "crop"})
    Settings: ClassVar[type[Any]] = ZoomRefineSettings
    presets: ClassVar = {
        "internvl3-8b": Preset(ZoomRefineSettings(), _TILES, AnswerSettings(), "internvl", 28),
        **presets_of({"tiny": ZoomRefineSettings()}),
    }

    def answer(self, session: Session, question: Question, steps: Steps) -> Answer:
        """See `Method`. Of several images the box is one in the first."""
        most = self.preset.answer.max_new_tokens
        first = Message(filled(self.settings.ask, question))
        with steps("answer and box"):
            reply = session.chat([first], max_new_tokens=most)
        answered = self.read_answer(reply.text, question)
        box, notes = self.read_box(reply.text, session), list[str]()
        details: dict[str, Any] = {"first_reply": reply.text, "first_answer": answered, "box": box}
        details |= {"second_reply": None, "rechecked_answer": None}
        if len(session.images) > 1:
            notes.append("box: the method asks for one box, which is taken to be in the first image")
        if answered is None:
            notes.append("first answer: it has none in the form that was asked for")
        if box is None:
            notes.append("box: the reply names none, so the first answer stands")
            return Answer(reply.text if answered is None else answered, notes=tuple(notes), details=details)
        with steps("crop"):
            pixels = crop_box(box, session.images[0].size, self.settings.margin)
            if pixels == (0, 0, *session.images[0].size):
                notes.append("box: with its margin it is the whole image")
            none = torch.zeros(0, 4, dtype=torch.int64)
            boxes = [torch.tensor([pixels]), *[none] * (len(session.images) - 1)]
            crop = session.crop(boxes)[0].image
            assert crop is not None, "a box has an area"
            height, width = crop.shape[:2]
            if min(width, height) < _LEAST_SIDE:
                notes.append(f"crop: it has {width} x {height} pixels, which are enlarged to the least the model takes")
            crop = within_aspect(crop, session.max_aspect, WHITE)
        with steps("recheck"):
            second = Message(filled(self.settings.recheck, question), [crop])
            checked = session.chat([first, reply, second], max_new_tokens=most)
        rechecked = self.read_answer(checked.text, question, rechecked=True)
        if rechecked is None:
            notes.append("recheck: the reply names no answer in the form that was asked for, so the first one stands")
        text = rechecked or answered or checked.text
        evidence = [Evidence(own) for own in boxes]
        evidence[0] = replace(evidence[0], shown=to_image(crop), shown_tokens=sum(checked.image_tokens))
        details |= {"second_reply": checked.text, "rechecked_answer": rechecked}
        return Answer(text, tuple(evidence), tuple(notes), details)

    def read_answer(self, reply: str, question: Question, *, rechecked: bool = False) -> str | None:
        """The answer that a reply gives in the form that was asked for: a letter, or the words of a free question."""
        if self.settings.compat:
            return published_rechecked(reply) if rechecked else published_letter(reply)
        found = answer_in(reply, question.options, rechecked=rechecked)
        if found is None:
            return None
        return found.letter if question.options else found.text

    def read_box(self, reply: str, session: Session) -> Box | None:
        """The box that a reply names, in parts of the first image."""
        if self.settings.compat:
            return published_box(reply)
        inputs = getattr(session, "inputs", None)
        return box_in(reply, None if inputs is None else self.model.box_extent(inputs.items[0]))


def crop_box(box: Box, size: tuple[int, int], margin: float) -> tuple[int, int, int, int]:
    """Pixels x0, y0, x1, y1, half-open, of a box in parts of an image of `size` (width, height), and its margin."""
    edges = []
    for axis, length in enumerate(size):
        first = math.floor(max(0.0, box[axis] - margin) * length)
        last = math.ceil(min(1.0, box[axis + 2] + margin) * length)
        first = min(first, length - 1)
        edges.append((first, min(length, max(last, first + 1))))
    (x0, x1), (y0, y1) = edges
    return x0, y0, x1, y1
