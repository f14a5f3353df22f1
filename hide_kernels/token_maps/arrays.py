"""The steps of `token_maps` on float64 arrays of NumPy or CuPy, all rows at once, without a loop over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

FLOAT32_MAX = 3.4028234663852886e38


def choose(xp: ModuleType, images: Sequence[Any], prior_rows: int) -> tuple[list[Any], Any]:
    """Images (T, h, w) with zeros for rows that are not finite, and which image takes each row after the prior."""
    finite = xp.stack([xp.abs(image).max(axis=(1, 2)) <= FLOAT32_MAX for image in images])
    # A row of zeros is constant, so what is not finite ends up not valid.
    cleared = [xp.where(ok[:, None, None], image, 0.0) for ok, image in zip(finite, images, strict=True)]
    peaks = xp.where(finite, xp.stack([image.max(axis=(1, 2)) for image in cleared]), -xp.inf)
    return cleared, peaks[:, prior_rows:].argmax(axis=0)


def purify(xp: ModuleType, smoothed: Callable[[Any], Any], stack: Any, prior_rows: int, flat: float) -> tuple[Any, Any]:
    """Smoothed, normalised maps of the rows after the prior without its mean map, and which of them hold anything."""
    stack = smoothed(stack)
    low = stack.min(axis=(1, 2), keepdims=True)
    high = stack.max(axis=(1, 2), keepdims=True)
    span = high - low
    varied = span > flat * xp.maximum(xp.abs(low), xp.abs(high))
    stack = xp.where(varied, stack - low, 0.0) / xp.where(varied, span, 1.0)

    noise = stack[:prior_rows].sum(axis=0) / max(prior_rows, 1)
    maps = xp.maximum(stack[prior_rows:] - noise, 0.0)
    # The lowest cell of a normalised map is 0 and the noise is not negative, so the minimum is 0 already.
    peak = maps.max(axis=(1, 2), keepdims=True)
    kept = peak > flat
    return xp.where(kept, maps, 0.0) / xp.where(kept, peak, 1.0), kept[:, 0, 0]
