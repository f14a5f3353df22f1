"""The definition in SciPy: one labelling of the whole batch, no loop over maps or regions."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

# All eight neighbours within a map, none in the map before or after.
NEIGHBOURS = np.zeros((3, 3, 3), bool)
NEIGHBOURS[1] = True


# A threshold or score that the dtype cannot hold is infinite, as documented, and nothing to warn of.
@np.errstate(over="ignore")
def regions_reference(
    maps: Tensor, threshold: float, valid: Tensor | None, max_regions: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, scores, counts and overflow; arguments as `regions` documents."""
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
    scores = np.bincount(region, weights=values[mask], minlength=found).astype(np.float32)
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
    out_boxes[slots] = boxes[:, order].T
    out_scores[slots] = scores[order]
    out = (out_boxes, out_scores, counts.astype(np.int32), counts > max_regions)
    boxes_, scores_, counts_, overflow = (torch.from_numpy(array).to(maps.device) for array in out)
    return boxes_, scores_, counts_, overflow
