"""Settings of Q-Zoom's training: published values, and those for the embedded model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, get_type_hints

from hide.models.base import Adapter
from hide.presets import RunSettings, check_count, of_kind
from hide.training.heads import Heads


@dataclass(frozen=True)
class Recipe:
    """How one stage is minimised, by AdamW without weight decay, the rate a cosine behind a linear warm-up.

    rate: the highest. batch: questions of a step, on all processes together. epochs: passes. warm_up: part of the
    steps. clip: longest gradient.
    """

    rate: float
    batch: int
    epochs: int = 1
    warm_up: float = 0.03
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_count("batch", self.batch)
        check_count("epochs", self.epochs)
        if not (0 < self.rate < math.inf and 0 <= self.warm_up <= 1 and self.clip > 0):
            raise ValueError(f"recipe: got {self}, want rate and clip above 0, and warm_up from 0 to 1")


@dataclass(frozen=True)
class TriState:
    """Which cells of a map are labelled 1, 0, or nothing.

    sink: from this attention of the sink heads on a cell is a sink. foreground: cells above this part of the peak are
    1. background: cells outside their box below this part are 0. largest: where the box has at least this part of the
    cells, and where the peak is below `least_peak`, the map says nothing.
    """

    sink: float = 1e-2
    foreground: float = 0.25
    background: float = 0.05
    largest: float = 0.5
    least_peak: float = 5e-3

    def __post_init__(self) -> None:
        if not (self.sink > 0 and 0 <= self.foreground < 1 and 0 <= self.background <= 1):
            raise ValueError(f"labels: got {self}, want sink above 0, and foreground and background from 0 to 1")
        if not (self.largest > 0 and self.least_peak >= 0):
            raise ValueError(f"labels: got {self}, want largest above 0, and least_peak not below")


@dataclass(frozen=True)
class Settings:
    """Of all stages.

    layer, depth: K and T, of both branches; K `None`: two thirds of the layers, with T behind it.
    heads: whose attention labels are made of; `None`: those published for the model.
    label_tokens: image tokens that labels are made in, at most.
    budgets: image tokens, at most, that the region branch and targeted tuning see images in; each image in one of them,
        another in the next epoch.
    routes: image tokens, ascending, in which the gate's questions are answered.
    min_tokens: fewest image tokens, unless a budget is lower; `None`: the budget itself, so that small images grow.
    max_new_tokens: bound on answers while data are made.
    reuse_src_pos: whether targeted tuning shows crops at positions inside their source; a checkpoint of a model that
        was not tuned asks for those of a second image, which the model knows.
    labels: of maps. region, tuning, gate: of each stage.
    most_routes: questions of the gate's stage, at most.
    seed: of orders and choices.
    """

    layer: int | None = None
    depth: int = 3
    heads: Heads | None = None
    label_tokens: int = 576
    budgets: tuple[int, ...] = (576,)
    routes: tuple[int, ...] = (64, 128, 256, 512)
    min_tokens: int | None = None
    max_new_tokens: int = 128
    reuse_src_pos: bool = True
    labels: TriState = field(default_factory=TriState)
    region: Recipe = field(default_factory=lambda: Recipe(1e-4, 128))
    tuning: Recipe = field(default_factory=lambda: Recipe(1e-6, 64))
    gate: Recipe = field(default_factory=lambda: Recipe(1e-4, 256))
    most_routes: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.budgets or list(self.routes) != sorted(set(self.routes)) or len(self.routes) < 3:
            raise ValueError(
                f"budgets, routes: got {self.budgets}, {self.routes}, want at least one, and at least three that ascend"
            )
        for name, values in (("budgets", self.budgets), ("routes", self.routes)):
            for value in values:
                check_count(name, value)
        for name in ("label_tokens", "max_new_tokens", "most_routes"):
            check_count(name, getattr(self, name))
        if self.min_tokens is not None:
            check_count("min_tokens", self.min_tokens)

    def run(self, tokens: int) -> RunSettings:
        """How an image is seen in at most so many tokens."""
        least = tokens if self.min_tokens is None else min(self.min_tokens, tokens)
        return RunSettings(min_tokens=least, max_tokens=tokens)

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """With other values, of parts too: {"depth": 3, "region.rate": 1e-3}.

        Raises `ValueError` for a field that there is not, or that is a part or heads as a whole, and `TypeError` for a
        value of another type.
        """
        found = self
        for name, value in changes.items():
            own, dot, inner = name.partition(".")
            part = getattr(found, own) if dot and hasattr(found, own) else found
            field = inner if dot else own
            hints = get_type_hints(type(part))
            if field not in hints or (dot and part is found):
                raise ValueError(f"set: there is no {name}; there are {', '.join(get_type_hints(Settings))}")
            if field == "heads":
                raise ValueError("set: heads are no value; `--heads` takes a file of them")
            if is_dataclass(hints[field]):
                raise ValueError(
                    f"set: {name} has parts: {', '.join(f'{name}.{one}' for one in get_type_hints(hints[field]))}"
                )
            changed = {field: of_kind(name, value, hints[field], getattr(part, field))}
            found = replace(found, **({own: replace(part, **changed)} if dot else changed))
        return found


# Of the embedded model: its words look at what they name in layer 2, which is the last of the branch's copies, and its
# things are of a size in pixels.
PRESETS = {
    "tiny": Settings(
        layer=1,
        depth=2,
        heads=Heads("question", {2: (0, 1, 2, 3, 4, 5)}),
        label_tokens=1200,
        budgets=(350, 700, 1000),
        routes=(120, 200, 350, 500, 1000),
        min_tokens=36,
        max_new_tokens=8,
        region=Recipe(3e-3, 16, epochs=8),
        tuning=Recipe(1e-5, 16, epochs=2),
        gate=Recipe(1e-3, 16, epochs=4),
    )
}


def settings_for(model: Adapter) -> Settings:
    """By the checkpoint's `"hide_preset"`, else the published ones; LLaVA's positions have no place inside an image."""
    published = Settings(reuse_src_pos=model.family != "llava")
    return PRESETS.get(getattr(model.model.config, "hide_preset", None) or "", published)
