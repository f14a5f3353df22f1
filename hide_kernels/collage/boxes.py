"""What happens to boxes before they are laid out: cells to pixels, merging, cutting down to opaque parts."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hide_kernels.collage.checks import check_boxes, check_extent, check_level

Boxes = NDArray[np.int64]

# Boxes compared with all others at a time: bounds the memory, not the result.
BLOCK = 256


def boxes_to_pixels(boxes: Tensor, *, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Boxes in grid cells to boxes in pixels, as published HiDe (2510.00054) does before it cuts.

    Each edge is normalised in float64, scaled and cut to an integer, `int(x0 / columns * width)`, in that order: doing
    the product first would give other pixels. A box less than one pixel wide may come out with no area.

    Args:
        boxes: (K, 4) int32 or int64, half-open x0, y0, x1, y1 in cells, inside the grid.
        grid: (rows, columns) of cells.
        size: (height, width) of the image in pixels.

    Returns:
        (K, 4) int64, half-open x0, y0, x1, y1 in pixels, on the device of `boxes`.

    Raises:
        TypeError, ValueError: naming the argument; also for boxes outside the grid.
    """
    rows, columns = check_extent("grid", grid, "rows, columns")
    height, width = check_extent("size", size, "height, width")
    cells = check_boxes("boxes", boxes, (rows, columns))
    pixels = cells / np.array([columns, rows, columns, rows], np.float64) * np.array([width, height, width, height])
    return torch.from_numpy(pixels.astype(np.int64)).to(boxes.device)


def merge_boxes(boxes: Tensor) -> Tensor:
    """Replace boxes that overlap or touch by their common bounding box until all are strictly apart (HiDe, 2510.00054).

    Two boxes are apart when one ends before the other starts: `right < left` or `bottom < top`; a shared edge or corner
    merges. Boxes of no area are dropped first. Blockwise: 100,000 boxes need neither minutes nor a square matrix.

    Args:
        boxes: (K, 4) int32 or int64, half-open x0, y0, x1, y1.

    Returns:
        (K', 4) int64 in reading order (y0, then x0), on the device of `boxes`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    return torch.from_numpy(merge(check_boxes("boxes", boxes))).to(boxes.device)


def opaque_boxes(alpha: Tensor, boxes: Tensor, threshold: int = 10) -> Tensor:
    """Cut each box down to the opaque parts inside it (HiDe, 2510.00054: alpha step before the collage).

    A part is an 8-connected component of `alpha > threshold` inside the box; its bounding rectangle is a new box. A
    part that lies in a hole of another part belongs to that one. Rectangles may overlap. A box that is opaque
    throughout stays as it is; one without opaque pixels goes.

    Args:
        alpha: (H, W) uint8, any strides.
        boxes: (K, 4) int32 or int64, half-open x0, y0, x1, y1 in pixels, inside the image.
        threshold: 0 to 255; alpha above it is opaque.

    Returns:
        (K', 4) int64, the parts of the first box in raster order of their first pixels, then those of the second, and
        so on, on the device of `boxes`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    if not isinstance(alpha, Tensor):
        raise TypeError(f"alpha: got {type(alpha).__name__}, want a torch.Tensor")
    if alpha.dtype != torch.uint8:
        raise TypeError(f"alpha: got dtype {alpha.dtype}, want uint8")
    if alpha.ndim != 2:
        raise ValueError(f"alpha: got shape {tuple(alpha.shape)}, want (H, W)")
    check_level("threshold", threshold)
    array = check_boxes("boxes", boxes, (alpha.shape[0], alpha.shape[1]))
    return torch.from_numpy(opaque(alpha, array, threshold)).to(boxes.device)


def merge(boxes: Boxes) -> Boxes:
    """`merge_boxes` on NumPy arrays that were checked.

    The result is unique: boxes that are not apart end up together in every stable result, and hulls only grow, so any
    order of merging reaches the finest stable one.
    """
    # Imported here so that importing the package does not load SciPy.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    boxes = boxes[(boxes[:, :2] < boxes[:, 2:]).all(axis=1)]
    boxes = boxes[np.lexsort((boxes[:, 1], boxes[:, 0]))]
    apart = np.empty((0, 4), np.int64)
    for start in range(0, len(boxes), BLOCK):
        new = boxes[start : start + BLOCK]
        while len(new):
            hull = np.concatenate([new[:, :2].min(axis=0), new[:, 2:].max(axis=0)])[None]
            near = _touching(hull, apart)[0]
            pool = np.concatenate([new, apart[near]])
            edges = np.nonzero(_touching(new, pool))
            graph = coo_array((np.ones(len(edges[0]), bool), edges), shape=(len(pool), len(pool)))
            _, group = connected_components(graph, directed=False)
            order = np.argsort(group, kind="stable")
            sizes = np.bincount(group)
            starts = np.cumsum(sizes) - sizes
            hulls = np.concatenate(
                [
                    np.minimum.reduceat(pool[order, :2], starts, axis=0),
                    np.maximum.reduceat(pool[order, 2:], starts, axis=0),
                ],
                axis=1,
            )
            # A box that met no other is apart from all; one that grew may touch others now.
            apart = np.concatenate([apart[~near], hulls[sizes == 1]])
            new = hulls[sizes > 1]
    return apart[np.lexsort((apart[:, 0], apart[:, 1]))]


def opaque(alpha: Tensor, boxes: Boxes, threshold: int) -> Boxes:
    """`opaque_boxes` on arguments that were checked; of an image on a device, only the boxes come to the host."""
    parts = []
    for x0, y0, x1, y1 in boxes.tolist():
        solid = (alpha[y0:y1, x0:x1] > threshold).cpu().numpy()
        if solid.all():
            parts.append((x0, y0, x1, y1))
        else:
            parts += [(x0 + left, y0 + top, x0 + right, y0 + bottom) for left, top, right, bottom in _outlines(solid)]
    return np.array(parts, np.int64).reshape(-1, 4)


def _touching(a: Boxes, b: Boxes) -> NDArray[np.bool_]:
    """(len(a), len(b)): whether the boxes share at least an edge or a corner."""
    ax0, ay0, ax1, ay1 = (edge[:, None] for edge in a.T)
    bx0, by0, bx1, by1 = b.T
    return (ax0 <= bx1) & (bx0 <= ax1) & (ay0 <= by1) & (by0 <= ay1)


def _outlines(solid: NDArray[np.bool_]) -> list[tuple[int, int, int, int]]:
    """Bounding rectangles x0, y0, x1, y1 of the 8-connected parts of a mask whose holes are filled."""
    from scipy import ndimage

    # Holes are what a flood from outside the box does not reach, over edges only.
    holes, _ = ndimage.label(np.pad(~solid, 1, constant_values=True))
    filled = holes[1:-1, 1:-1] != holes[0, 0]
    parts, _ = ndimage.label(filled, np.ones((3, 3), bool))
    return [(cols.start, rows.start, cols.stop, rows.stop) for rows, cols in ndimage.find_objects(parts)]
