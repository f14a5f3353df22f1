"""The definition in SciPy, float64: one vectorised filter per image, no loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from .arrays import choose, purify


def token_maps_reference(
    rows: Sequence[Tensor], prior_rows: int, sigma: float, flat: float
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Maps per image, image index and validity of each row after the prior; arguments as `token_maps` documents."""

    def smoothed(stack: NDArray[np.float64]) -> NDArray[np.float64]:
        if sigma == 0:
            return stack
        return ndimage.gaussian_filter(stack, sigma, mode="reflect", truncate=4.0, axes=(1, 2))

    device = rows[0].device
    arrays = [image.detach().to("cpu", torch.float64).numpy() for image in rows]
    arrays, image_index = choose(np, arrays, prior_rows)
    valid = np.zeros(image_index.shape, bool)
    maps = []
    for i, array in enumerate(arrays):
        purified = np.zeros((len(image_index), *array.shape[1:]), np.float32)
        taken = np.flatnonzero(image_index == i)
        if taken.size:
            stack = np.concatenate([array[:prior_rows], array[prior_rows + taken]])
            purified[taken], valid[taken] = purify(np, smoothed, stack, prior_rows, flat)
        maps.append(torch.from_numpy(purified).to(device))
    return tuple(maps), torch.from_numpy(image_index).to(device), torch.from_numpy(valid).to(device)
