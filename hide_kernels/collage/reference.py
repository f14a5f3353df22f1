"""The pixel copy in NumPy: one slice per box, only the boxes are read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def gather_reference(
    image: Pixels,
    boxes: NDArray[np.int64],
    positions: NDArray[np.int64],
    size: tuple[int, int],
    fill: tuple[int, int, int] | None,
    blend: bool,
) -> Pixels:
    """Canvas of `size` with the pixels of each box at its position; arguments as `collage` documents.

    Overlapping boxes are no matter: a canvas pixel comes from one source pixel, whichever box brings it.
    """
    if fill is None:
        canvas = np.zeros((*size, 4), np.uint8)
    else:
        canvas = np.full((*size, 3), fill[0] if len(set(fill)) == 1 else fill, np.uint8)
    for (x0, y0, x1, y1), (left, top, right, bottom) in zip(boxes.tolist(), positions.tolist(), strict=True):
        source, target = image[y0:y1, x0:x1], canvas[top:bottom, left:right]
        if fill is None and source.shape[2] == 3:
            target[..., :3], target[..., 3] = source, 255
        elif fill is None:
            target[:] = source
        elif blend and source.shape[2] == 4:
            target[:] = _over(source, fill)
        else:
            target[:] = source[..., :3]
    return canvas


def _over(source: Pixels, fill: tuple[int, int, int]) -> Pixels:
    """RGBA pixels over a colour, rounded as Pillow rounds: x / 255 is (y + (y >> 8)) >> 8 with y = x + 128."""
    alpha = source[..., 3:].astype(np.uint16)
    mixed = source[..., :3] * alpha + np.array(fill, np.uint16) * (255 - alpha) + 128
    return ((mixed + (mixed >> 8)) >> 8).astype(np.uint8)
