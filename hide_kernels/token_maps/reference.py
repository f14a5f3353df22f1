"""The definition in SciPy, float64: one vectorised filter per image, no loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

Array = NDArray[np.float64]


def token_maps_reference(
    rows: Sequence[Tensor], prior_rows: int, sigma: float, flat: float
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Maps per image, image index and validity of each row after the prior; arguments as `token_maps` documents."""
    device = rows[0].device
    arrays = [image.detach().to("cpu", torch.float64).numpy() for image in rows]
    finite = np.stack([np.abs(array).max(axis=(1, 2)) <= np.finfo(np.float32).max for array in arrays])
    # A row of zeros is constant, so what is not finite ends up not valid.
    arrays = [np.where(ok[:, None, None], array, 0.0) for ok, array in zip(finite, arrays, strict=True)]
    peaks = np.where(finite, np.stack([array.max(axis=(1, 2)) for array in arrays]), -np.inf)
    image_index = peaks[:, prior_rows:].argmax(axis=0)
    valid = np.zeros(image_index.shape, bool)
    maps = []
    for i, array in enumerate(arrays):
        purified = np.zeros((len(image_index), *array.shape[1:]), np.float32)
        taken = np.flatnonzero(image_index == i)
        if taken.size:
            purified[taken], valid[taken] = _purify(array[:prior_rows], array[prior_rows + taken], sigma, flat)
        maps.append(torch.from_numpy(purified).to(device))
    return tuple(maps), torch.from_numpy(image_index).to(device), torch.from_numpy(valid).to(device)


def _purify(prior: Array, entity: Array, sigma: float, flat: float) -> tuple[Array, NDArray[np.bool_]]:
    """Smoothed, normalised entity maps without the mean prior map, and which of them hold anything."""
    stack = np.concatenate([prior, entity])
    if sigma > 0:
        stack = ndimage.gaussian_filter(stack, sigma, mode="reflect", truncate=4.0, axes=(1, 2))
    low = stack.min(axis=(1, 2), keepdims=True)
    high = stack.max(axis=(1, 2), keepdims=True)
    span = high - low
    varied = span > flat * np.maximum(np.abs(low), np.abs(high))
    stack = np.where(varied, stack - low, 0.0) / np.where(varied, span, 1.0)

    noise = stack[: len(prior)].sum(axis=0) / max(len(prior), 1)
    maps = np.maximum(stack[len(prior) :] - noise, 0.0)
    # The lowest cell of a normalised map is 0 and the noise is not negative, so the minimum is 0 already.
    peak = maps.max(axis=(1, 2), keepdims=True)
    kept = peak > flat
    return np.where(kept, maps, 0.0) / np.where(kept, peak, 1.0), kept[:, 0, 0]
