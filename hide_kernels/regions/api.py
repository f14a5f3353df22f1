"""The public operator: validation, dispatch, documentation."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from hide_kernels import backends


class Regions(NamedTuple):
    """Regions of M maps in fixed shapes; slots beyond `counts` are zeros.

    boxes: (M, max_regions, 4) int32, half-open cell ranges x0, y0, x1, y1.
    scores: (M, max_regions) float32, sum of the map in the region, descending.
    counts: (M,) int32, how many regions the map has, also those beyond `max_regions`.
    overflow: (M,) bool, whether the map has more regions than `max_regions`.
    sizes: (M, max_regions) int32, how many cells the region has.
    """

    boxes: Tensor
    scores: Tensor
    counts: Tensor
    overflow: Tensor
    sizes: Tensor


def regions(
    maps: Tensor, threshold: float, *, valid: Tensor | None = None, max_regions: int = 256, backend: str | None = None
) -> Regions:
    """Bounding boxes and scores of the 8-connected components of `maps >= threshold`: region step of HiDe (2510.00054).

    The threshold is inclusive and compared in the dtype of the maps, as NumPy and PyTorch compare an array with a
    Python float: a float32 cell of 0.7 reaches a threshold of 0.7. NaN cells never do. Regions are sorted by score as
    returned, largest first; equal scores by first cell in raster order. With more than `max_regions` the largest stay.
    A threshold beyond the dtype of the maps is infinite, and so is a score beyond float32.

    Scores are summed in fixed point: each cell is rounded by less than cells * 2**-61 of the region's largest, and the
    sum to float32 (`reference.py` says how). So they depend on nothing but the cells of the region, and scores and
    order are the same on every backend, bit for bit. On a GPU, backends "cupy" and "scipy" synchronise, "cuda" never.

    Args:
        maps: (M, h, w) float32 or float64, any strides.
        threshold: finite number.
        valid: (M,) bool, maps that are False have no region; `None`: all are valid.
        max_regions: slots per map, at least 1.
        backend: `None` picks (`hide_kernels.explain("regions")` says which); a name is used or refused.

    Returns:
        `Regions(boxes, scores, counts, overflow)` on the device of `maps`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    if not isinstance(maps, Tensor):
        raise TypeError(f"maps: got {type(maps).__name__}, want a torch.Tensor")
    if maps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"maps: got dtype {maps.dtype}, want float32 or float64")
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"maps: got shape {tuple(maps.shape)}, want (M, h, w) with h and w at least 1")
    if not isinstance(threshold, Real) or isinstance(threshold, bool):
        raise TypeError(f"threshold: got {type(threshold).__name__}, want a float")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold: got {threshold}, want a finite number")
    if valid is not None:
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            what = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
            raise TypeError(f"valid: got {what}, want None or a bool torch.Tensor")
        if valid.shape != maps.shape[:1] or valid.device != maps.device:
            raise ValueError(
                f"valid: got {tuple(valid.shape)} on {valid.device}, want {tuple(maps.shape[:1])} on {maps.device}"
            )
    if not isinstance(max_regions, int) or isinstance(max_regions, bool):
        raise TypeError(f"max_regions: got {type(max_regions).__name__}, want an int")
    if max_regions < 1:
        raise ValueError(f"max_regions: got {max_regions}, want at least 1")
    name = backends.resolve("regions", backend, maps=maps, threshold=threshold, valid=valid, max_regions=max_regions)

    # Imported here so that importing the package loads neither SciPy nor CuPy.
    if name in ("cuda", "cpp"):
        from hide_kernels.regions.compiled import regions_compiled as implementation
    elif name == "cupy":
        from hide_kernels.regions.cupy import regions_cupy as implementation
    else:
        from hide_kernels.regions.reference import regions_reference as implementation
    return Regions(*implementation(maps, float(threshold), valid, max_regions))
