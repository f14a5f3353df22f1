"""Where each box lands when the rows and columns that no box covers are deleted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hide_kernels.collage.checks import check_boxes


@dataclass(frozen=True, eq=False)
class Layout:
    """Plan of a collage; all tensors are int64 on the CPU, all intervals half-open.

    columns: (C, 2) kept source columns as start, stop; ascending, not adjacent.
    rows: (R, 2) kept source rows likewise.
    size: (height, width) of the canvas, the sums of the kept lengths.
    positions: (K, 4) x0, y0, x1, y1 of each box on the canvas, in the order of the boxes; same size as in the source.
    """

    columns: Tensor
    rows: Tensor
    size: tuple[int, int]
    positions: Tensor


def plan_layout(boxes: Tensor) -> Layout:
    """Push boxes together, left stays left and above stays above: Layout-Preserving Decoupling of HiDe (2510.00054).

    Every source column and row that some box covers is kept, all others are deleted.

    Args:
        boxes: (K, 4) int32 or int64, K at least 1, half-open x0, y0, x1, y1 with some area; they may overlap.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    array = check_boxes("boxes", boxes)
    if not len(array):
        raise ValueError("boxes: got none, want at least one")
    empty = (array[:, :2] == array[:, 2:]).any(axis=1)
    if empty.any():
        at = int(empty.argmax())
        raise ValueError(f"boxes[{at}]: got {array[at].tolist()} without area, want x0 < x1 and y0 < y1")
    columns, x = _squeeze(array[:, [0, 2]])
    rows, y = _squeeze(array[:, [1, 3]])
    height, width = (int((kept[:, 1] - kept[:, 0]).sum()) for kept in (rows, columns))
    positions = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    return Layout(torch.from_numpy(columns), torch.from_numpy(rows), (height, width), torch.from_numpy(positions))


def source_boxes(boxes: Tensor, layout: Layout) -> Tensor:
    """Boxes on a collage's canvas as boxes in its source: the inverse of the layout.

    Args:
        boxes: (K, 4) int32 or int64, half-open x0, y0, x1, y1, inside the canvas.
        layout: of `plan_layout`.

    Returns:
        (K', 4) int64, half-open x0, y0, x1, y1 in the source, in the order of `boxes`. A box that spans deleted rows
        or columns comes apart there, so K' is at least the number of boxes with an area.

    Raises:
        TypeError, ValueError: naming the argument; also for boxes outside the canvas.
    """
    found = [
        (left, top, right, bottom)
        for x0, y0, x1, y1 in check_boxes("boxes", boxes, layout.size).tolist()
        for top, bottom in _unsqueezed(y0, y1, layout.rows)
        for left, right in _unsqueezed(x0, x1, layout.columns)
    ]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 4)


def _unsqueezed(start: int, stop: int, runs: Tensor) -> list[tuple[int, int]]:
    """The parts of runs, laid end to end, that lie from start to stop."""
    parts, at = [], 0
    for first, last in runs.tolist():
        low, high = max(start - at, 0), min(stop - at, last - first)
        if low < high:
            parts.append((first + low, first + high))
        at += last - first
    return parts


def _squeeze(intervals: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Union of (K, 2) intervals as sorted disjoint runs, and each interval's place once the runs lie end to end."""
    by_start = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(by_start[:, 1])
    first = np.flatnonzero(np.concatenate([[True], by_start[1:, 0] > reach[:-1]]))
    last = np.append(first[1:], len(by_start)) - 1
    runs = np.stack([by_start[first, 0], reach[last]], axis=1)
    lengths = runs[:, 1] - runs[:, 0]
    run = np.searchsorted(runs[:, 0], intervals[:, 0], side="right") - 1
    shift = np.cumsum(lengths) - lengths - runs[:, 0]
    return runs, intervals + shift[run, None]
