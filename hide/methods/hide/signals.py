"""How sure a question's steps are of themselves, by what they have anyway, and what HiDe decides by it.

Every answer records its signals in its details, so that thresholds can be chosen afterwards from any recorded run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hide.methods.hide.config import HiDeConfig
from hide.presets import TOKEN_PIXELS, RunSettings
from hide_kernels.collage import Collage


@dataclass(frozen=True)
class Signals:
    """What is `None` was not asked, or an engine does not say it.

    plain_margin, margin: of the gate's plain answer, and of the answer itself (`hide.session.Reply.margin`). peaks: of
    each entity token, the peak of its attention over the image as a multiple of its mean. without_map: how many entity
    tokens have no map, and so no region. collage: tokens that the collages would have at their own resolution, as a
    part of those of the session's images. second_look: whether they were searched again.
    """

    plain_margin: float | None = None
    margin: float | None = None
    peaks: tuple[float, ...] | None = None
    without_map: int | None = None
    collage: float | None = None
    second_look: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Those that there are, for JSON; numbers that are not finite, which it has no word for, are left out."""
        found = {name: _rounded(value) for name, value in dataclasses.asdict(self).items()}
        return {name: value for name, value in found.items() if value is not None}


def settles(signals: Signals, settings: HiDeConfig) -> bool:
    """Whether the plain answer is taken (`HiDeConfig.gate`)."""
    margin = signals.plain_margin
    return settings.gate is not None and margin is not None and margin >= settings.gate


def looks_again(signals: Signals, settings: HiDeConfig, run: RunSettings) -> bool:
    """Whether the collages are searched once more (`HiDeConfig.look_again`)."""
    return run.view_tokens == "auto" and signals.collage is not None and signals.collage > settings.look_again


def collage_part(collages: Sequence[Collage], image_tokens: Sequence[int]) -> float:
    """Tokens of collages at their own resolution, as a part of those of the images that they are cut out of."""
    pixels = sum(one.image.shape[0] * one.image.shape[1] for one in collages if one.image is not None)
    return pixels / TOKEN_PIXELS / sum(image_tokens)


def peak_over_mean(rows: Sequence[Tensor]) -> Tensor:
    """(T,) the peak of each of T rows as a multiple of its mean, on the image where that is highest.

    rows: per image (T, h, w), not negative.
    """
    return torch.stack([own.amax((1, 2)) / own.mean((1, 2)).clamp(min=1e-30) for own in rows]).amax(0)


def _rounded(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
