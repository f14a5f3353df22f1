"""Validation that the functions of this folder share."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Sums of kept lengths must not overflow 64 bits; no picture comes near.
LIMIT = 2**31


def check_kind(name: str, boxes: Tensor) -> None:
    """What can be said of boxes without reading them: (K, 4) integers."""
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{name}: got {type(boxes).__name__}, want a torch.Tensor")
    if boxes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got dtype {boxes.dtype}, want int32 or int64")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: got shape {tuple(boxes.shape)}, want (K, 4) as x0, y0, x1, y1")


def check_boxes(name: str, boxes: Tensor, size: tuple[int, int] | None = None) -> NDArray[np.int64]:
    """`boxes` as a NumPy array, once they are (K, 4) integers in order and, if given, inside `size` (height, width)."""
    check_kind(name, boxes)
    array = boxes.cpu().numpy().astype(np.int64)
    wrong = (array[:, :2] > array[:, 2:]).any(axis=1) | (array < -LIMIT).any(axis=1) | (array >= LIMIT).any(axis=1)
    want = "x0 <= x1 and y0 <= y1, in 32 bits"
    if size is not None:
        height, width = size
        wrong |= (array[:, :2] < 0).any(axis=1) | (array[:, 2:] > (width, height)).any(axis=1)
        want = f"0 <= x0 <= x1 <= {width} and 0 <= y0 <= y1 <= {height}"
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"{name}[{at}]: got {array[at].tolist()}, want {want}")
    return array


def check_extent(name: str, extent: tuple[int, int], what: str) -> tuple[int, int]:
    """`extent` as two Python ints, once they are at least 1; `what` names them, first the vertical one."""
    if not isinstance(extent, (tuple, list)) or len(extent) != 2 or not all(isinstance(n, int) for n in extent):
        raise TypeError(f"{name}: got {extent!r}, want ({what}) as ints")
    if min(extent) < 1 or max(extent) >= LIMIT:
        raise ValueError(f"{name}: got {tuple(extent)}, want ({what}), each at least 1 and below {LIMIT}")
    return extent[0], extent[1]


def check_level(name: str, level: int) -> None:
    """An 8-bit alpha level: an int in 0..255."""
    if not isinstance(level, int) or isinstance(level, bool):
        raise TypeError(f"{name}: got {type(level).__name__}, want an int")
    if not 0 <= level <= 255:
        raise ValueError(f"{name}: got {level}, want 0 to 255")
