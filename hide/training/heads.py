"""Whose attention labels are made of: heads that look at what is asked about, and heads that look at sinks.

They are published for four models; for another, `choose` takes them from questions with boxes (`hide calibrate
--heads`). Rows are those of the reply's tokens, as published, or of the words in the question that name things, which
HiDe reads too: a model that fetches what it needs while it reads the question looks at it there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hide.models.base import Adapter
from hide.present.table import ResultTable

Rows = Literal["reply", "question"]
Chosen = Mapping[int, Sequence[int]]
"""Zero-based layer -> its heads."""

BOX_LINES = (
    "Write a line for each region that the question needs: x_min y_min x_max y_max {label}. Plain text, no JSON."
)
"""What a question may be followed by when labels are made, so that the reply names regions ("natural" heads)."""


@dataclass(frozen=True)
class Heads:
    """rows: whose. grounding: the heads whose mean is the map. sinks: those whose mean shows sinks; empty: none.
    request: what questions are followed by, on a line of its own."""

    rows: Rows
    grounding: Chosen
    sinks: Chosen = field(default_factory=dict)
    request: str = ""

    def __post_init__(self) -> None:
        if self.rows not in get_args(Rows):
            raise ValueError(f"heads: rows is {self.rows!r}, want 'reply' or 'question'")
        if not self.grounding or not all([*self.grounding.values(), *self.sinks.values()]):
            raise ValueError(f"heads: got {self.grounding} and {self.sinks}, want heads in each layer, one at least")

    @property
    def layers(self) -> list[int]:
        """All that are looked at."""
        return sorted({*self.grounding, *self.sinks})

    def check(self, model: Adapter) -> None:
        """`ValueError` for what the model has not."""
        heads = model.model.config.get_text_config().num_attention_heads
        for layer, own in [*self.grounding.items(), *self.sinks.items()]:
            if not 0 <= layer < model.num_layers or not all(0 <= head < heads for head in own):
                raise ValueError(
                    f"heads: got {list(own)} of layer {layer}, and the model has {model.num_layers} layers of {heads}"
                )

    def to_dict(self) -> dict[str, Any]:
        """For JSON, whose keys are texts."""
        chosen = {name: {str(layer): list(own) for layer, own in getattr(self, name).items()} for name in _CHOSEN}
        return {"rows": self.rows, **chosen, "request": self.request}

    @classmethod
    def read(cls, path: Path) -> Heads:
        """What `hide calibrate --heads` wrote, or another JSON object of this form; `ValueError` for what is none, and
        for a file that cannot be read."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            chosen = {
                name: {int(layer): tuple(map(int, own)) for layer, own in found.get(name, {}).items()}
                for name in _CHOSEN
            }
            return cls(found["rows"], **chosen, request=str(found.get("request", "")))
        except OSError as error:
            raise ValueError(f"heads: {path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"heads: {path} has no heads: {type(error).__name__}: {error}") from None


_CHOSEN = ("grounding", "sinks")

# Family and hidden size -> heads for questions as they are, of models in which they are published.
PUBLISHED = {
    ("qwen2_5_vl", 2048): Heads("reply", {20: (1, 4), 22: (14,)}),
    ("qwen2_5_vl", 3584): Heads("reply", {22: (1, 4), 23: (6, 11)}),
    ("qwen3_vl", 2560): Heads("reply", {19: (24, 27), 24: (21, 23)}, {24: (6, 10)}),
    ("qwen3_vl", 4096): Heads("reply", {19: (24, 26, 27), 24: (21, 22, 23)}, {24: (1, 2)}),
}
# The same for questions that are followed by a request for boxes.
PUBLISHED_BOXES = {
    ("qwen2_5_vl", 2048): Heads("reply", {21: (9, 11), 22: (0, 7)}, {8: (1, 13)}, BOX_LINES),
    ("qwen2_5_vl", 3584): Heads("reply", {16: (1, 7, 17), 19: (17, 20)}, {9: (4, 22)}, BOX_LINES),
    ("qwen3_vl", 2560): Heads("reply", {20: (15, 21, 23), 21: (8, 10, 11)}, {20: (1, 24)}, BOX_LINES),
    ("qwen3_vl", 4096): Heads("reply", {20: (15, 21, 23), 21: (8, 10, 11)}, {21: (7,)}, BOX_LINES),
}


def published(model: Adapter, *, boxes: bool = False) -> Heads:
    """Those of a model; boxes: for questions that are followed by `BOX_LINES`. `ValueError` where there are none."""
    key = model.family, model.model.config.get_text_config().hidden_size
    found = (PUBLISHED_BOXES if boxes else PUBLISHED).get(key)
    if found is None:
        raise ValueError(
            f"heads: none are published for {key[0]} of width {key[1]}; choose some with `hide calibrate --heads`"
        )
    return found


# -- choosing ----------------------------------------------------------------------------------------------------------

# Heads that are taken for grounding, and for sinks; least part of a row on the image for one to count; from which
# attention on a cell is a sink, and of the boxes' cells how many may be taken for one.
GROUNDING, SINKS, LEAST_ON_IMAGE, SINK, MOST_LOST = 4, 2, 0.05, 1e-2, 0.02


class HeadScore(NamedTuple):
    """One head's rows over the image, means over questions.

    image: part of the attention that goes to the image. inside: part of that in the boxes. sink: the largest cell
    outside of them. lost: part of the boxes' cells that are no less than `SINK`.
    """

    rows: Rows
    layer: int
    head: int
    image: float
    inside: float
    sink: float
    lost: float


def head_scores(maps: Sequence[tuple[Rows, Tensor, Tensor]]) -> list[HeadScore]:
    """Of every layer and head.

    maps: per question and kind of rows, (layers, heads, h, w) attention and (h, w) bool, the cells in the boxes.
    """
    measured: dict[Rows, list[Tensor]] = {}
    for rows, found, inside in maps:
        found, inside = found.flatten(2).double().cpu(), inside.flatten().cpu()
        image = found.sum(-1)
        part = found[..., inside].sum(-1) / image.clamp(min=1e-30)
        outside = found[..., ~inside].amax(-1) if bool((~inside).any()) else torch.zeros_like(image)
        lost = (found[..., inside] >= SINK).double().mean(-1)
        measured.setdefault(rows, []).append(torch.stack([image, part, outside, lost]))
    scores = []
    for rows, every in measured.items():
        means = torch.stack(every).mean(0)
        layers, heads = means.shape[1:]
        scores += [
            HeadScore(rows, layer, head, *means[:, layer, head].tolist())
            for layer in range(layers)
            for head in range(heads)
        ]
    return scores


def choose(scores: Sequence[HeadScore], request: str = "") -> Heads:
    """The heads whose rows over the image lie in the boxes with the largest part, all of the kind of rows of the best,
    and none half as good; for sinks those that look hardest at a cell outside, and hardly at the boxes.

    Raises `ValueError` where no head looks at the image, or none into the boxes.
    """
    looking = sorted((one for one in scores if one.image >= LEAST_ON_IMAGE), key=lambda one: -one.inside)
    if not looking:
        raise ValueError(f"heads: no head gives the image {LEAST_ON_IMAGE:.0%} of its attention")
    if not looking[0].inside:
        raise ValueError("heads: no head looks into the boxes")
    rows = looking[0].rows
    of_kind = [one for one in looking if one.rows == rows]
    grounding = [one for one in of_kind[:GROUNDING] if one.inside > of_kind[0].inside / 2]
    blind = [one for one in of_kind if one not in grounding and one.sink >= 5 * SINK and one.lost <= MOST_LOST]
    sinks = sorted(blind, key=lambda one: -one.sink)[:SINKS]
    return Heads(rows, _by_layer(grounding), _by_layer(sinks), request)


def _by_layer(chosen: Sequence[HeadScore]) -> dict[int, tuple[int, ...]]:
    layers = sorted({one.layer for one in chosen})
    return {layer: tuple(sorted(one.head for one in chosen if one.layer == layer)) for layer in layers}


def head_table(scores: Sequence[HeadScore], most: int = 12) -> ResultTable:
    """The heads whose rows lie in the boxes with the largest part."""
    best = sorted((one for one in scores if one.image >= LEAST_ON_IMAGE), key=lambda one: -one.inside)[:most]
    rows = [(f"{one.rows}, layer {one.layer}, head {one.head}", *(f"{share:.1%}" for share in one[3:])) for one in best]
    header = (
        "rows, layer, head",
        "on the image",
        "of that in the boxes",
        "largest cell outside",
        "boxes lost to sinks",
    )
    return ResultTable("Heads that look at what is asked about", header, rows)
