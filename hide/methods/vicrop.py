"""ViCrop (arXiv 2502.17422), relative attention: one square crop where the answer's first token looks more for the
question than for a general description of the image.

The published code runs the image four times; here it is one prefill and three short branches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hide.images import on_colour, to_image
from hide.methods.base import Answer, AnswerSettings, Evidence, Method, Preset, Steps, presets_of
from hide.methods.prompts import GENERAL_PROMPT, SHORT_PHRASE
from hide.questions import Question
from hide.session import RunSettings, Session

LABEL = "question / description"
RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)


@dataclass(frozen=True)
class ViCropSettings:
    """Settings of ViCrop.

    layers: zero-based decoder layers whose attention is averaged; `None`: the middle one.
    base: side of the smallest crop, in pixels of the image; the largest has twice as many.
    tile: images are cut into tiles of about so many pixels, each of which is looked at by itself; `None`: they are not.
    answer_request: what questions without options end with, and the general prompt; may be empty.
    general_prompt: what the question's attention is divided by that of.
    published_faults: do as the published code where it fails: take the upper left corner where a cell of the map is
        larger than the window, and refuse portraits with `tile`, for which it divides by zero.
    """

    layers: tuple[int, ...] | None = None
    base: int = 224
    tile: int | None = None
    answer_request: str = SHORT_PHRASE
    general_prompt: str = GENERAL_PROMPT
    published_faults: bool = False

    def __post_init__(self) -> None:
        for name in ("base", "tile"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: got {value}, want at least 1 pixel")
        if self.layers is not None and not self.layers:
            raise ValueError("layers: got none, want zero-based layer numbers, or None for the middle one")


class Window(NamedTuple):
    """A crop: pixels x0, y0, x1, y1, and how much its sum of the map stands out from those beside it, per cell."""

    box: tuple[int, int, int, int]
    sharpness: float


_RUN, _ANSWER = RunSettings(min_tokens=4, max_tokens=256), AnswerSettings(max_new_tokens=20)


class ViCrop(Method[ViCropSettings]):
    """The image, and one crop of it."""

    name: ClassVar[str] = "vicrop"
    summary: ClassVar[str] = "the image, and the one crop that the question attends to more than a description does"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "crop", "ask"})
    Settings: ClassVar[type[Any]] = ViCropSettings
    presets: ClassVar = {
        "qwen2.5-vl-3b": Preset(ViCropSettings(layers=(22,)), _RUN, _ANSWER, "qwen2_5_vl", 36),
        "qwen2.5-vl-7b": Preset(ViCropSettings(layers=(22,)), _RUN, _ANSWER, "qwen2_5_vl", 28),
        "llava-1.5-7b": Preset(ViCropSettings(layers=(14,), base=336), RunSettings(), _ANSWER, "llava", 32),
        **presets_of({"tiny": ViCropSettings(layers=(2,), base=112)}),
    }

    def answer(self, session: Session, question: Question, steps: Steps) -> Answer:
        """See `Method`. Of several images the one with the sharpest window is cropped."""
        with steps("attention"):
            maps = self.maps(session, question)
        with steps("window"):
            windows = [
                best_window(of_image.cpu(), image.size, self.settings)
                for of_image, image in zip(maps, session.images, strict=True)
            ]
            chosen = max(range(len(windows)), key=lambda index: windows[index].sharpness)
            boxes = [torch.zeros(0, 4, dtype=torch.int64) for _ in windows]
            boxes[chosen] = torch.tensor([windows[chosen].box])
            crops = [crop.image for crop in session.crop(boxes)]
        with steps("answer"):
            shown = [crop for crop in crops if crop is not None]
            reply = session.ask(self.prompt(question), shown, max_new_tokens=self.preset.answer.max_new_tokens)
        evidence = [Evidence(own, of_image[None], (LABEL,)) for own, of_image in zip(boxes, maps, strict=True)]
        if shown:
            tokens = sum(reply.image_tokens)
            evidence[chosen] = replace(evidence[chosen], shown=to_image(shown[0]), shown_tokens=tokens)
        return Answer(reply.text, tuple(evidence), details={"sharpness": [window.sharpness for window in windows]})

    def prompt(self, question: Question) -> str:
        """What the model is asked, with and without the crop."""
        if question.options:
            return question.asked(self.preset.answer.letter_request)
        return f"{question.text} {self.settings.answer_request}".strip()

    def maps(self, session: Session, question: Question) -> list[Tensor]:
        """Per image (h, w) float32: attention of the token that the answer is predicted from, after the question over
        that after the general prompt."""
        if self.settings.tile is None:
            return self._ratios(session, question)
        found = []
        for image in session.images:
            rows = []
            for row in _tiles(image, self.settings.tile, published_faults=self.settings.published_faults):
                parts = []
                for tile in row:
                    with self.open(tile) as part:
                        parts += self._ratios(part, question)
                rows.append(torch.cat(parts, 1))
            found.append(torch.cat(rows))
        return found

    def _ratios(self, session: Session, question: Question) -> list[Tensor]:
        general = f"{self.settings.general_prompt} {self.settings.answer_request}".strip()
        layers = self.settings.layers or (self.model.num_layers // 2,)
        rows = []
        for text in (self.prompt(question), general):
            turn = session.turn(text)
            last = turn.input_ids.shape[1] - 1
            rows.append(session.attention(turn, layers=layers, queries=range(last, last + 1)))
        # A cell that nothing attends to is no infinite ratio.
        least = 0.0 if self.settings.published_faults else torch.finfo(torch.float32).tiny
        return [asked[0] / over[0].clamp(min=least) for asked, over in zip(*rows, strict=True)]


def best_window(weights: Tensor, size: tuple[int, int], settings: ViCropSettings) -> Window:
    """The square crop of an image of `size` (width, height) that a (h, w) map speaks for.

    Of windows of `base` to 2 x `base` pixels, each where its sum of the map is largest, the one that stands out most
    from those one cell beside it. The whole image, where the smallest window covers the map.
    """
    base, least = settings.base, 0 if settings.published_faults else 1
    rows, columns = weights.shape
    cell = size[0] / columns, size[1] / rows
    best: tuple[float, float, int, int, int, int] | None = None
    for ratio in RATIOS:
        wide = max(least, min(int(base * ratio / cell[0]), columns))
        high = max(least, min(int(base * ratio / cell[1]), rows))
        if (wide, high) == (columns, rows):
            if ratio == 1:
                return Window((0, 0, *size), 0.0)
            continue
        sliding = weights.double().unfold(0, high, 1).unfold(1, wide, 1).sum((2, 3))
        # Of equal ones the leftmost, then the uppermost.
        x, y = divmod(int(sliding.T.flatten().argmax()), sliding.shape[0])
        beside = [
            float(sliding[y + down, x + across])
            for across, down in ((-1, 0), (1, 0), (0, -1), (0, 1))
            if 0 <= y + down < sliding.shape[0] and 0 <= x + across < sliding.shape[1]
        ]
        stands_out = float(sliding[y, x]) - sum(beside) / len(beside)
        sharpness = stands_out / (wide * high) if wide * high else math.nan
        # A maximum that is taken for NaN is how the published code ends in a corner.
        if best is None or sharpness > best[0] or (math.isnan(sharpness) and not math.isnan(best[0])):
            best = sharpness, ratio, x, y, wide, high
    assert best is not None, "the first ratio returns or sets it"
    sharpness, ratio, x, y, wide, high = best
    half = base * ratio // 2
    box: list[float] = []
    for start, cells, pixels, length in ((x, wide, cell[0], size[0]), (y, high, cell[1], size[1])):
        centre = min(max(int(start * pixels + pixels * cells / 2), half), length - half)
        box += [max(0, centre - half), min(length, centre + half)]
    x0, x1, y0, y1 = map(round, box)
    return Window((x0, y0, x1, y1), sharpness)


def _tiles(image: Image.Image, side: int, *, published_faults: bool) -> Iterator[list[Image.Image]]:
    """Rows of equal tiles of about `side` pixels; the last may reach beyond the image, where they are black."""
    rows = math.ceil(image.height / side)
    columns = int(rows * image.width / image.height)
    if columns < 1:
        if published_faults:
            raise ValueError(
                f"tile: an image of {image.width} x {image.height} pixels has no columns of tiles, and the published "
                "code divides by their number; leave published_faults out"
            )
        columns = 1
    width, height = math.ceil(image.width / columns), math.ceil(image.height / rows)
    whole = on_colour(image)
    for top in range(0, rows * height, height):
        yield [whole.crop((left, top, left + width, top + height)) for left in range(0, columns * width, width)]
