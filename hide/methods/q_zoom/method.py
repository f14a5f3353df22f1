"""Q-Zoom (arXiv 2604.06912): one look, a gate, and where it opens one crop, behind what the first look has computed.

The question goes through the first K layers behind the image. A gate reads the last token's state: below its threshold
the same states go on to a plain answer. Otherwise a region branch makes a map of the image; one box around what is
above its threshold is cut out of the original and put behind the image. The released code cuts its cache back to the
image and replays the rest; here the image's keys and values are the session's, of all layers, and the rest is a branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hide.engine.prefix import Branch, encode
from hide.images import on_colour, to_image
from hide.methods.base import Answer, AnswerSettings, Evidence, Method, Preset, Steps, presets_of
from hide.methods.prompts import SHORT_ANSWER
from hide.methods.q_zoom.branches import Branches, Glance, branches_of
from hide.methods.q_zoom.regions import (
    Region,
    blurred,
    component_box,
    inside_source,
    kept_tokens,
    one_box,
    pixel_box,
    without_corner,
    without_sinks,
)
from hide.models.inputs import Features, ImageInputs
from hide.presets import RunSettings
from hide.questions import Question
from hide.session import ImageSession, Message, Session, Turn
from hide_kernels import ImageTokens

Sinks = Literal["corner", "first token", "none"]
LABEL = "region branch"


class Layout(NamedTuple):
    """What differs between families. sinks: the rule for cells that score high whatever is asked. min_side: fewest
    pixels of a crop's sides. square: SD-RPN for LLaVA: boxes of components, crops stretched to the square, no tokens
    around them."""

    sinks: Sinks
    min_side: int
    square: bool = False


LAYOUTS = {
    "qwen2_5_vl": Layout("corner", 28),
    "qwen3_vl": Layout("first token", 28),
    "llava": Layout("none", 1, square=True),
}


@dataclass(frozen=True)
class QZoomSettings:
    """Settings of Q-Zoom.

    region_threshold: cells of the blurred map above it are the region.
    gate_threshold: from this probability on the region branch is asked; 0: always, above 1: never. Checkpoints without
        a gate always ask it.
    reuse_src_pos: the crop's tokens have positions between those of the source's tokens, in fractions; else those of a
        second image. `None`: as the checkpoint's config.json says.
    sinks: "corner" (Qwen2.5-VL), "first token" (Qwen3-VL), "none" (LLaVA); `None`: the family's.
    sink_cells: maps of more cells have their corner cleared; SD-RPN's code has 768.
    answer_request: what every question ends with, on a line of its own, unless it stands there already; may be empty.
    branches: a checkpoint whose branches are used beside the model, in place of the model's own.
    """

    region_threshold: float = 0.1
    gate_threshold: float = 0.1
    reuse_src_pos: bool | None = None
    sinks: Sinks | None = None
    sink_cells: int = 256
    answer_request: str = SHORT_ANSWER
    branches: str | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.gate_threshold):
            raise ValueError("gate_threshold: got NaN, want a number")
        if not math.isfinite(self.region_threshold):
            raise ValueError(f"region_threshold: got {self.region_threshold}, want a finite number")
        if self.branches is not None and not self.branches.strip():
            raise ValueError("branches: got no name, want a checkpoint's folder, or None for the model's own")
        if self.sinks not in (None, "corner", "first token", "none"):
            raise ValueError(f"sinks: got {self.sinks!r}, want 'corner', 'first token', 'none', or None")


_ANSWER = AnswerSettings(max_new_tokens=128)
_DOCUMENTS, _FEWER, _DETAILS = (RunSettings(min_tokens=least, max_tokens=most) for least, most in
                                ((256, 576), (128, 576), (512, 4096)))  # fmt: skip
# Task -> budget, then thresholds of region and gate: Qwen2.5-VL, Qwen3-VL.
_QWEN: dict[str, tuple[RunSettings, tuple[float, float], tuple[float, float]]] = {
    "textvqa": (_DOCUMENTS, (0.15, 0.05), (0.15, 0.1)),
    "infovqa": (_DOCUMENTS, (0.15, 0.05), (0.15, 0.1)),
    "chartqa": (_DOCUMENTS, (0.125, 0.05), (0.15, 0.1)),
    "docvqa": (_DOCUMENTS, (0.125, 0.05), (0.15, 0.1)),
    "ocrbench": (_FEWER, (0.15, 0.05), (0.125, 0.1)),
    "vstar": (_DETAILS, (0.03, 0.02), (0.1, 0.025)),
    "hr-bench": (_DETAILS, (0.04, 0.02), (0.1, 0.025)),
    "mme-realworld": (_DETAILS, (0.04, 0.02), (0.1, 0.025)),
}
# Task -> SD-RPN for LLaVA, whose questions end with another request in each; lettered ones have one already.
_LLAVA = {
    "textvqa": QZoomSettings(0.15),
    "infovqa": QZoomSettings(0.15),
    "chartqa": QZoomSettings(0.15, answer_request="Answer the question with a single word."),
    "docvqa": QZoomSettings(0.1),
    "ocrbench": QZoomSettings(0.05, answer_request=""),
    "pope": QZoomSettings(0.15),
    "vstar": QZoomSettings(0.1, answer_request=""),
    "hr-bench": QZoomSettings(0.1, answer_request=""),
}


def _presets() -> dict[str, Preset[QZoomSettings]]:
    """Published values: of each task under the model's name and its own, and of TextVQA under the model's alone."""
    found: dict[str, Preset[QZoomSettings]] = {}
    for task, (run, qwen2_5, qwen3) in _QWEN.items():
        found[f"qwen2.5-vl-7b-{task}"] = Preset(QZoomSettings(*qwen2_5), run, _ANSWER, "qwen2_5_vl")
        found[f"qwen3-vl-4b-{task}"] = Preset(QZoomSettings(*qwen3), run, _ANSWER, "qwen3_vl")
    for task, settings in _LLAVA.items():
        asked = replace(_ANSWER, letter_request="Answer the option letter directly.") if task == "hr-bench" else _ANSWER
        found[f"llava-1.5-7b-{task}"] = Preset(settings, RunSettings(), asked, "llava")
    found |= {model: found[f"{model}-textvqa"] for model in ("qwen2.5-vl-7b", "qwen3-vl-4b", "llava-1.5-7b")}
    sd_rpn = QZoomSettings(0.25, sink_cells=768)
    found["sd-rpn-qwen2.5-vl"] = Preset(sd_rpn, _DOCUMENTS, _ANSWER, "qwen2_5_vl")
    return found | presets_of({"tiny": QZoomSettings(0.15, 0.05, answer_request="", sinks="none")})


def prompt_of(preset: Preset[QZoomSettings], question: Question) -> str:
    """What a model is asked."""
    text, request = question.asked(preset.answer.letter_request), preset.settings.answer_request
    return text if not request or request in text else f"{text}\n{request}"


class QZoom(Method[QZoomSettings]):
    """The image, and one crop where the question needs it."""

    name: ClassVar[str] = "q-zoom"
    summary: ClassVar[str] = "the image, and one crop where trained branches of the checkpoint say so"
    needs: ClassVar[frozenset[str]] = frozenset({"branch", "crop", "hidden"})
    Settings: ClassVar[type[Any]] = QZoomSettings
    presets: ClassVar = _presets()
    branches: Branches

    def check(self) -> None:
        """See `Method`. The branches are loaded, unless the model has them: `ValueError` where there are none."""
        super().check()
        if self.settings.reuse_src_pos and self.model.family == "llava":
            raise ValueError(
                "reuse_src_pos: got True, but llava's positions have one axis, with no place inside an image"
            )
        self.branches = branches_of(self.model, self.settings.branches)

    @property
    def taps(self) -> tuple[int, ...]:
        """See `Method`."""
        return (self.branches.layer,)

    def answer(self, session: Session, question: Question, steps: Steps) -> Answer:
        """See `Method`. A prompt with several images is answered plainly: the branches were trained with one."""
        if not isinstance(session, ImageSession):
            raise TypeError(f"{self.name}: got a {type(session).__name__}, want a session of a local model")
        prompt, most = self.prompt(question), self.preset.answer.max_new_tokens
        if len(session.images) > 1:
            with steps("answer"):
                reply = session.ask(prompt, max_new_tokens=most)
            note = "gate: the branches are for one image, so the answer is the plain one"
            return Answer(reply.text, notes=(note,), details=self._details(None, None))
        turn = session.turn(prompt)
        evidence, notes, region = Evidence(), list[str](), None
        with ExitStack() as opened:
            with steps("gate"):
                branch = opened.enter_context(session.branch(turn.input_ids, room=most))
                states = branch.run(layers=range(self.branches.layer))
                places = branch.positions[..., session.length :]
                glance = self._glance(session, turn, branch)
                found = glance.gate(states, places)
                gate = None if found is None else float(found)
            if gate is not None and math.isnan(gate):
                notes.append("gate: its probability is NaN, so the answer is the plain one; a larger dtype may mend it")
            if gate is None or gate >= self.settings.gate_threshold:
                with steps("region"):
                    heat = self.map(glance.scores(states, places), glance.first_token_scores)
                    evidence = Evidence(maps=heat[None], labels=(LABEL,), threshold=self.settings.region_threshold)
                    region = self.region(heat)
                notes += self._doubts(heat)
                if region is None:
                    notes.append("region: no cell is above the threshold, so the answer is the plain one")
            if region is None:
                with steps("answer"):
                    branch.run()
                    ids = branch.reply(most)
                return Answer(self.model.decode(ids), (evidence,), tuple(notes), self._details(gate, None))
        with steps("crop"):
            box = self.box(region, turn.images[0].grid, session.images[0].size)
            crop = session.crop([box])[0].image
            assert crop is not None, "a box has an area"
        with steps("answer"), self.zoomed(session, turn, prompt, crop, region) as (branch, tokens):
            ids = branch.reply(most)
        evidence = replace(evidence, boxes=box, shown=to_image(crop), shown_tokens=tokens)
        return Answer(self.model.decode(ids), (evidence,), tuple(notes), self._details(gate, region))

    def prompt(self, question: Question) -> str:
        """What the model is asked, with and without the crop."""
        return prompt_of(self.preset, question)

    def map(self, scores: Tensor, first_token_scores: Callable[[], Tensor]) -> Tensor:
        """(rows, columns) float32 from 0 to 1: the region branch's scores as probabilities, without sinks, blurred."""
        found = scores.sigmoid()
        sinks = self.settings.sinks or LAYOUTS[self.model.family].sinks
        if sinks == "corner":
            found = without_corner(found, self.settings.sink_cells)
        elif sinks == "first token":
            found = without_sinks(found, first_token_scores())
        return blurred(found)

    def region(self, found: Tensor) -> Region | None:
        """What of a map is cut out; `None` where nothing is above the threshold."""
        positive = found > self.settings.region_threshold
        return component_box(positive) if LAYOUTS[self.model.family].square else one_box(positive)

    def box(self, region: Region, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """(1, 4) int64 pixels of a region in a map of `grid` (rows, columns), of an image of `size` (width, height)."""
        return torch.tensor([pixel_box(region.cells, grid, size, LAYOUTS[self.model.family].min_side)])

    def inside(self, ids: Tensor, images: Sequence[ImageTokens], both: ImageInputs, region: Region) -> Tensor | None:
        """Positions of (1, L) ids with the crop inside its source; `None`: it stands as a second image.

        images: where source and crop lie. both: the two, of which pixels are not needed.
        """
        wanted = self.settings.reuse_src_pos
        if not (self.branches.reuse_src_pos if wanted is None else wanted):
            return None
        source, crop = images
        positions, _ = self.model.positions(ids, both)
        return inside_source(positions, source.start, crop.start, crop.grid, region.cells)

    @contextmanager
    def zoomed(
        self, session: ImageSession, turn: Turn, prompt: str, crop: Tensor, region: Region
    ) -> Iterator[tuple[Branch, int]]:
        """A branch with the crop directly behind the image, and how many tokens the crop has.

        turn: of the prompt, with the image alone. crop: (H, W, 3 or 4) uint8.
        """
        if LAYOUTS[self.model.family].square:
            shown, features = self._square(session, crop, region)
            tokens = sum(shown.tokens)
            head, rest = turn.input_ids[:, : session.length], turn.input_ids[:, session.length :]
            ids = torch.cat([head, head.new_full((1, tokens), self.model.image_token), rest], 1)
            with session.branch(ids, shown, features=features, room=self.preset.answer.max_new_tokens) as branch:
                yield branch, tokens
            return
        both = session.turn([Message(prompt, [crop])])
        assert both.more is not None
        images = session.inputs + both.more.without_pixels()
        positions = self.inside(both.input_ids, both.images, images, region)
        behind = None if positions is None else positions[..., session.length :]
        room = self.preset.answer.max_new_tokens
        with session.branch(both.input_ids, both.more, positions=behind, room=room) as branch:
            yield branch, sum(both.more.tokens)

    def _square(self, session: ImageSession, crop: Tensor, region: Region) -> tuple[ImageInputs, Features]:
        """A crop as SD-RPN shows it to LLaVA: stretched to the square, and of its tokens those that are kept."""
        side = self.model.model.config.vision_config.image_size
        square = on_colour(to_image(crop)).resize((side, side), Image.Resampling.BILINEAR)
        inputs, features = encode(self.model, session.prepare([square]))
        (item,) = inputs.items
        kept = kept_tokens(region, item.grid)
        # Where so little is kept that nothing is left of it, all is.
        if kept is None or not kept.any():
            return inputs, features
        few = ImageInputs((item._replace(tokens=int(kept.sum())),))
        return few, Features(features.embeddings[kept.to(features.embeddings.device)])

    def _glance(self, session: ImageSession, turn: Turn, branch: Branch) -> Glance:
        layer = self.branches.layer
        return session.once(
            self.branches,
            lambda: Glance(
                self.model,
                self.branches,
                session.hidden(layer),
                branch.positions[..., : session.length],
                turn.images[0],
                session.run.prefill_chunk,
            ),
        )

    def _doubts(self, heat: Tensor) -> list[str]:
        """Notes about a map: what is no number, and in 16 bits cells that rounding could move over the threshold."""
        notes = []
        if not bool(heat.isfinite().all()):
            notes.append("region: the map holds NaN or inf; a larger dtype may mend it")
        error = torch.finfo(self.model.dtype).eps
        near = int(((heat - self.settings.region_threshold).abs() <= error).sum())
        if near and self.model.dtype.itemsize == 2:
            notes.append(
                f"region: {near} cells lie within {error:g} of the threshold, a step of {self.model.dtype} at 1"
            )
        return notes

    def _details(self, gate: float | None, region: Region | None) -> dict[str, Any]:
        cells = None if region is None else list(region.cells)
        shown = round(gate, 4) if gate is not None and math.isfinite(gate) else None
        return {"gate": shown, "zoomed": region is not None, "cells": cells}
