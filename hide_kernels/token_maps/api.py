"""The public operator: validation, dispatch, documentation."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends

FLAT = 1e-6
"""A map whose range is at most this part of its magnitude is constant: less is rounding in float32."""

MAX_SIGMA = 1000
"""Cells: far beyond any grid, where the smoothing is a constant that takes minutes."""

ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TokenMaps(NamedTuple):
    """Purified maps of the T - P rows after the prior; fixed shapes, what is empty is masked.

    maps: per image (T - P, h_i, w_i) float32 in 0..1, peak exactly 1; zeros where another image took the token or
        `valid` is False.
    image_index: (T - P,) int64, the image that took the token.
    valid: (T - P,) bool, whether the token has a map at all.
    """

    maps: tuple[Tensor, ...]
    image_index: Tensor
    valid: Tensor


def token_maps(rows: Sequence[Tensor], *, prior_rows: int, sigma: float, backend: str | None = None) -> TokenMaps:
    """Turn raw attention rows into one purified map per token: Token-wise Attention Decoupling of HiDe (2510.00054).

    The first `prior_rows` rows P are the fixed words of the prompt. Each later row goes to the image where its raw peak
    is largest (ties: the first image). There, with f = Gaussian smoothing, then min-max::

        map = f(row) - mean over the prior rows of f(prior row);  map[map < 0] = 0;  map = map / max(map)

    The Gaussian extends the map by its mirror image with the edge cell repeated (scipy's `reflect`) and ends at four
    standard deviations. A constant or non-finite map has no place in it: such a row is zeros and not valid, a prior row
    of that kind counts as zeros in the mean, and a row that is not finite in one image goes to another one if it can.
    Constant means a range of at most 1e-6 of the largest magnitude after smoothing; a map that the prior cancels to
    within 1e-6 of its own peak is not valid either. Finite means in float32. Nothing is ever NaN.

    Every backend computes in float64, and their maps agree to a unit in the last place of float32. On a GPU, "scipy"
    synchronises, the others never, and a call of "triton" may be captured in a CUDA graph after an eager call of the
    same shapes, which compiles and loads the kernels.

    Args:
        rows: per image (T, h_i, w_i) float tensor, the rows reduced over heads and layers, laid out on the token grid
            of that image. Same T, dtype and device for all images; any strides. Cut the tail of template tokens before.
        prior_rows: P, how many rows come first as the noise prior; 0 for none.
        sigma: standard deviation of the smoothing in grid cells, at most 1000; 0 for none.
        backend: `None` picks (`hide_kernels.explain("token_maps")` says which); a name is used or refused.

    Returns:
        `TokenMaps(maps, image_index, valid)` on the device of `rows`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    rows = _check_rows(rows)
    length = rows[0].shape[0]
    if not isinstance(prior_rows, int) or isinstance(prior_rows, bool):
        raise TypeError(f"prior_rows: got {type(prior_rows).__name__}, want an int")
    if not 0 <= prior_rows <= length:
        raise ValueError(f"prior_rows: got {prior_rows}, want 0 to {length}, the number of rows")
    if not isinstance(sigma, Real) or isinstance(sigma, bool):
        raise TypeError(f"sigma: got {type(sigma).__name__}, want a float")
    if not 0 <= sigma <= MAX_SIGMA:
        raise ValueError(f"sigma: got {sigma}, want 0 to {MAX_SIGMA} cells")
    name = backends.resolve("token_maps", backend, rows=rows, prior_rows=prior_rows, sigma=sigma)

    # Imported here so that importing the package loads neither Triton nor SciPy nor CuPy.
    if name == "triton":
        from .triton_launch import token_maps_triton as implementation
    elif name == "cupy":
        from .cupy import token_maps_cupy as implementation
    elif name == "cucim":
        from .cupy import token_maps_cucim as implementation
    else:
        from .reference import token_maps_reference as implementation
    return TokenMaps(*implementation(rows, prior_rows, float(sigma), FLAT))


def _check_rows(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(rows, Tensor) or not isinstance(rows, Sequence):
        raise TypeError(f"rows: got {type(rows).__name__}, want a sequence of tensors, one per image")
    if not rows:
        raise ValueError("rows: got no image, want at least one (T, h, w) tensor")
    for i, row in enumerate(rows):
        if not isinstance(row, Tensor):
            raise TypeError(f"rows[{i}]: got {type(row).__name__}, want a torch.Tensor")
        if row.dtype not in ROW_DTYPES:
            raise TypeError(f"rows[{i}]: got dtype {row.dtype}, want one of {list(ROW_DTYPES)}")
        if row.ndim != 3 or 0 in row.shape[1:]:
            raise ValueError(f"rows[{i}]: got shape {tuple(row.shape)}, want (T, h, w) with h and w at least 1")
        for what in ("dtype", "device"):
            if getattr(row, what) != getattr(rows[0], what):
                raise ValueError(
                    f"rows[{i}]: got {what} {getattr(row, what)}, want {getattr(rows[0], what)} as in rows[0]"
                )
        if row.shape[0] != rows[0].shape[0]:
            raise ValueError(f"rows[{i}]: got T = {row.shape[0]}, want {rows[0].shape[0]} as in rows[0]")
    return tuple(rows)
