"""The ways of asking that are compared: plain, HiDe, and HiDe's boxes shown in another form than its collage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hide.config import WHITE
from hide.images import on_colour, to_tensor
from hide_kernels import collage

BLACK = (0, 0, 0)

METHODS: dict[str, str] = {
    "plain": "the picture alone",
    "hide": "picture and layout-preserving collage",
    "tiles": "picture and HiDe's boxes in one row, the largest first: no layout",
    "masked": "picture and a copy that is blank outside HiDe's boxes: all of the layout, nothing deleted",
    "crop": "picture and the one crop that holds all of HiDe's boxes",
    "true-boxes": "picture and the collage of the data set's own boxes: what perfect maps would give",
}

Fill = tuple[int, int, int] | None
View = Callable[[Image.Image, Tensor, Fill], Image.Image]
"""(picture, its merged boxes (K, 4), K >= 1, `HiDeConfig.fill`) -> what is shown beside the picture."""


def preserved(picture: Image.Image, boxes: Tensor, fill: Fill = WHITE) -> Image.Image:
    """HiDe's collage."""
    made = collage(to_tensor(picture), boxes, fill=fill).image
    if made is None:
        raise ValueError("boxes: none has an area")
    return Image.fromarray(made.numpy())


def tiles(picture: Image.Image, boxes: Tensor, fill: Fill = WHITE) -> Image.Image:
    """The boxes side by side, the largest first, on `fill`, or black."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    whole = on_colour(picture)
    crops = [whole.crop(box) for box in boxes[torch.argsort(area, descending=True, stable=True)].tolist()]
    row = Image.new("RGB", (sum(crop.width for crop in crops), max(crop.height for crop in crops)), fill or BLACK)
    left = 0
    for crop in crops:
        row.paste(crop, (left, 0))
        left += crop.width
    return row


def masked(picture: Image.Image, boxes: Tensor, fill: Fill = WHITE) -> Image.Image:
    """The whole picture, `fill` or black outside the boxes."""
    inside = np.zeros((picture.height, picture.width), bool)
    for x0, y0, x1, y1 in boxes.tolist():
        inside[y0:y1, x0:x1] = True
    return Image.composite(
        on_colour(picture),
        Image.new("RGB", picture.size, fill or BLACK),
        Image.fromarray(inside.astype(np.uint8) * 255),
    )


def crop(picture: Image.Image, boxes: Tensor, fill: Fill = WHITE) -> Image.Image:
    """The smallest crop that holds all boxes."""
    low, high = boxes[:, :2].amin(0).tolist(), boxes[:, 2:].amax(0).tolist()
    return on_colour(picture).crop((*low, *high))


VIEWS: dict[str, View] = {"tiles": tiles, "masked": masked, "crop": crop, "true-boxes": preserved}
