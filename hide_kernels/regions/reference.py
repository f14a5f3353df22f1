"""The definition in SciPy: one labelling of the whole batch, no loop over maps or regions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

# All eight neighbours within a map, none in the map before or after.
NEIGHBOURS = np.zeros((3, 3, 3), bool)
NEIGHBOURS[1] = True


# Bits of a fixed-point sum below its sign and a spare one.
FRACTION_BITS = 62


# A threshold or score that the dtype cannot hold is infinite, as documented, and nothing to warn of.
@np.errstate(over="ignore", under="ignore")
def regions_reference(
    maps: Tensor, threshold: float, valid: Tensor | None, max_regions: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Boxes, scores, counts, overflow and sizes; arguments as `regions` documents."""
    values = maps.detach().cpu().numpy()
    # NumPy would compare a float32 array with a float64 scalar in float64.
    mask = values >= values.dtype.type(threshold)
    if valid is not None:
        mask &= valid.cpu().numpy()[:, None, None]
    labels, found = ndimage.label(mask, NEIGHBOURS)

    cells = np.flatnonzero(mask)
    region = labels.reshape(-1)[cells] - 1
    of_map, row, column = np.unravel_index(cells, mask.shape)
    boxes = np.empty((4, found), np.int32)
    for edge, at in ((0, column), (1, row)):
        boxes[edge], boxes[edge + 2] = np.iinfo(np.int32).max, 0
        np.minimum.at(boxes[edge], region, at.astype(np.int32))
        np.maximum.at(boxes[edge + 2], region, at.astype(np.int32) + 1)
    sizes = np.bincount(region, minlength=found)
    scores = _scores(values[mask].astype(np.float64), region, sizes)
    first = np.full(found, mask.size)
    np.minimum.at(first, region, cells)
    owner = np.empty(found, np.int64)
    owner[region] = of_map

    order = np.lexsort((first, -scores, owner))
    owner = owner[order]
    counts = np.bincount(owner, minlength=len(mask))
    rank = np.arange(found) - (np.cumsum(counts) - counts)[owner]
    kept = rank < max_regions
    order, slots = order[kept], (owner[kept], rank[kept])
    out_boxes = np.zeros((len(mask), max_regions, 4), np.int32)
    out_scores = np.zeros((len(mask), max_regions), np.float32)
    out_sizes = np.zeros((len(mask), max_regions), np.int32)
    out_boxes[slots] = boxes[:, order].T
    out_scores[slots] = scores[order]
    out_sizes[slots] = sizes[order]
    out = (out_boxes, out_scores, counts.astype(np.int32), counts > max_regions, out_sizes)
    boxes_, scores_, counts_, overflow, sizes_ = (torch.from_numpy(array).to(maps.device) for array in out)
    return boxes_, scores_, counts_, overflow, sizes_


def _scores(values: NDArray[np.float64], region: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Sum of the values of each region in fixed point: the same whatever the order of summation.

    With 2**e above every magnitude in the region and 2**b not below its number of cells, values are rounded to
    multiples of 2**(e + b - 62), half to even, and added as integers; the sum is rounded to float64, then to float32.
    """
    infinite = np.isinf(values)
    values = np.where(infinite, 0, values)
    exponent = np.full(len(sizes), np.iinfo(np.int32).min)
    np.maximum.at(exponent, region, np.where(values == 0, np.iinfo(np.int32).min, np.frexp(values)[1]))
    # A region of zeros has no use for a unit.
    exponent = np.where(exponent == np.iinfo(np.int32).min, 0, exponent)
    unit = exponent + np.frexp(sizes - 0.5)[1] - FRACTION_BITS
    sums = np.zeros(len(sizes), np.int64)
    np.add.at(sums, region, np.rint(np.ldexp(values, -unit[region])).astype(np.int64))
    scores = np.ldexp(sums.astype(np.float64), unit).astype(np.float32)
    scores[region[infinite]] = np.inf
    # Adding zero makes -0 into 0, which it equals.
    return scores + np.float32(0)
