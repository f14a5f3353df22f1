"""How Pillow resizes 8-bit pictures: which axis first, and the weights along one, in its fixed point."""

from __future__ import annotations

import math

import numpy as np
import PIL
from numpy.typing import NDArray

# As in csrc/pixel_values.h.
WEIGHT_BITS = 22
ROWS, COLUMNS = range(2)
# Of the bicubic kernel: half its width, and its free parameter.
SUPPORT, A = 2.0, -0.5


def rows_first(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether the installed Pillow starts with the rows, (height, width) to (height, width).

    Until version 12 it never does; later where the height loses pixels, and more than twice as many as the width.
    """
    fewer_rows, fewer_columns = size[0] - target[0], size[1] - target[1]
    return int(PIL.__version__.split(".")[0]) >= 13 and fewer_rows > 0 and fewer_rows > 2 * fewer_columns


def taps(sources: int, targets: int) -> NDArray[np.int32]:
    """(2 + K, targets) int32: first source of each target, number of sources, and their weights times 2**22.

    Float64 and the order of operations are Pillow's. Downscaling widens the kernel. The same length is a copy.
    """
    if sources == targets:
        return np.stack([np.arange(targets), np.ones(targets), np.full(targets, 1 << WEIGHT_BITS)]).astype(np.int32)
    scale = sources / targets
    widened = max(scale, 1.0)
    support = SUPPORT * widened
    centre = (np.arange(targets) + 0.5) * scale
    first = np.maximum(np.trunc(centre - support + 0.5), 0)
    count = np.minimum(np.trunc(centre + support + 0.5), sources) - first
    table = np.zeros((2 + 2 * math.ceil(support) + 1, targets))
    total = np.zeros(targets)
    for tap, weights in enumerate(table[2:]):
        weights[:] = np.where(tap < count, _bicubic((tap + first - centre + 0.5) * (1.0 / widened)), 0.0)
        total += weights
    weights = table[2:] / np.where(total == 0, 1.0, total)
    table[2:] = np.trunc(weights * (1 << WEIGHT_BITS) + np.copysign(0.5, weights))
    table[0], table[1] = first, count
    return table.astype(np.int32)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((A + 2.0) * x - (A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * A
    return np.where(x < 1, near, np.where(x < SUPPORT, far, 0.0))
