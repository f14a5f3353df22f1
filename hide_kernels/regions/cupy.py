"""Regions with CuPy: one labelling of the whole batch, then one batched reduction for edges and one for scores.

Written against what CuPy shares with NumPy and SciPy, with which the tests run it. CuPy's `label` reads the number of
labels back: one synchronisation.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# As in csrc/regions.h.
FRACTION_BITS = 62
ZERO_EXPONENT, INFINITE_EXPONENT = -(1 << 20), 1 << 20


def regions_cupy(
    maps: Tensor, threshold: float, valid: Tensor | None, max_regions: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Boxes, scores, counts, overflow and sizes; arguments as `regions` documents."""
    import cupy
    from cupyx.scipy import ndimage

    stream = torch.cuda.current_stream(maps.device)
    with cupy.cuda.Device(maps.device.index), cupy.cuda.ExternalStream(stream.cuda_stream, maps.device.index):
        used = None if valid is None else cupy.from_dlpack(valid.to(torch.uint8)).astype(bool)
        # A threshold beyond the dtype becomes infinite, as NumPy would have it.
        limit = float(torch.tensor(threshold, dtype=maps.dtype, device="cpu"))
        found = label_and_reduce(cupy, ndimage, cupy.from_dlpack(maps.detach()), limit, used, max_regions)
        boxes, scores, counts, overflow, sizes = (torch.from_dlpack(array) for array in found)
    return boxes, scores, counts, overflow.bool(), sizes


def label_and_reduce(
    xp: ModuleType, ndimage: ModuleType, values: Any, limit: float, used: Any, max_regions: int
) -> tuple[Any, Any, Any, Any, Any]:
    """The same on arrays of `xp` (CuPy or NumPy) with that library's `ndimage`; overflow comes as uint8."""
    number, height, width = values.shape
    mask = values >= values.dtype.type(limit)
    if used is not None:
        mask &= used[:, None, None]
    # All eight neighbours within a map, none in the map before or after.
    neighbours = xp.zeros((3, 3, 3), bool)
    neighbours[1] = True
    labels, found = ndimage.label(mask, neighbours)
    found = int(found)

    index = xp.flatnonzero(mask)
    region = labels.reshape(-1)[index].astype(xp.int64) - 1
    value = values.reshape(-1)[index].astype(xp.float64)
    cell = index % (height * width)
    row, column = cell // width, cell % width
    exponent = xp.where(value == 0, ZERO_EXPONENT, xp.frexp(value)[1])
    exponent = xp.where(xp.isinf(value), INFINITE_EXPONENT, exponent)
    edges = xp.stack([cell, column, -column - 1, -row - 1, -exponent, index // (height * width)], 1).astype(xp.int32)
    least = xp.full((found, edges.shape[1]), xp.iinfo(xp.int32).max, xp.int32)
    xp.minimum.at(least, (region[:, None], xp.arange(edges.shape[1])[None]), edges)
    first, left, right, bottom, exponent, owner = (least[:, i].astype(xp.int64) for i in range(edges.shape[1]))
    right, bottom, exponent = -right, -bottom, -exponent

    sizes = xp.bincount(region, minlength=found)
    infinite = exponent == INFINITE_EXPONENT
    exponent = xp.where(infinite | (exponent == ZERO_EXPONENT), 0, exponent)
    unit = (exponent + xp.frexp(sizes - 0.5)[1] - FRACTION_BITS).astype(xp.int32)
    whole = xp.where(infinite[region], 0, value)
    terms = xp.rint(xp.ldexp(whole, -unit[region])).astype(xp.int64)
    # CuPy adds 64-bit integers in place only as unsigned ones; the bits are the same.
    sums = xp.zeros(found, xp.uint64)
    xp.add.at(sums, region, terms.view(xp.uint64))
    scores = xp.ldexp(sums.view(xp.int64).astype(xp.float64), unit).astype(xp.float32)
    scores = xp.where(infinite, xp.float32(xp.inf), scores) + xp.float32(0)

    # Bits of a float32 that ascend as the score descends, then the first cell: 63 bits, all different within a map.
    bits = scores.view(xp.uint32).astype(xp.int64)
    ascending = xp.where(bits >> 31, 0xFFFFFFFF - bits, bits + (1 << 31))
    order = xp.lexsort(xp.stack([(0xFFFFFFFF - ascending) << 31 | first, owner]))
    owner = owner[order]
    counts = xp.bincount(owner, minlength=number)
    rank = xp.arange(found) - (xp.cumsum(counts) - counts)[owner]
    kept = rank < max_regions
    order, owner, rank = order[kept], owner[kept], rank[kept]
    out_boxes = xp.zeros((number, max_regions, 4), xp.int32)
    out_scores = xp.zeros((number, max_regions), xp.float32)
    out_sizes = xp.zeros((number, max_regions), xp.int32)
    out_boxes[owner, rank] = xp.stack([left, first // width, right, bottom], 1)[order]
    out_scores[owner, rank] = scores[order]
    out_sizes[owner, rank] = sizes[order]
    return out_boxes, out_scores, counts.astype(xp.int32), (counts > max_regions).astype(xp.uint8), out_sizes
