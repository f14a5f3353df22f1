"""Token maps with the Gaussian of CuPy or of cuCIM, image by image, in float64 as the reference; nothing waits.

Written against what CuPy shares with NumPy and cuCIM with scikit-image, with which the tests run it. Rows that another
image has taken are masked, not left out, so that all shapes are known to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .arrays import choose, purify

Result = tuple[tuple[Tensor, ...], Tensor, Tensor]


def token_maps_cupy(rows: Sequence[Tensor], prior_rows: int, sigma: float, flat: float) -> Result:
    """Maps per image, image index and validity of each row after the prior; arguments as `token_maps` documents."""
    from cupyx.scipy import ndimage

    return _on_device(rows, prior_rows, flat, by_ndimage(ndimage, sigma))


def token_maps_cucim(rows: Sequence[Tensor], prior_rows: int, sigma: float, flat: float) -> Result:
    """The same with cuCIM's filter."""
    from cucim.skimage import filters

    return _on_device(rows, prior_rows, flat, by_filters(filters, sigma))


def by_ndimage(ndimage: ModuleType, sigma: float) -> Callable[[Any], Any]:
    """Smoothing of (T, h, w) by `ndimage.gaussian_filter`; older versions of CuPy take no `axes`."""
    return lambda stack: ndimage.gaussian_filter(stack, (0, sigma, sigma), mode="reflect", truncate=4.0)


def by_filters(filters: ModuleType, sigma: float) -> Callable[[Any], Any]:
    """Smoothing of (T, h, w) by `filters.gaussian`, which would repeat the edge cell instead of mirroring the map."""
    return lambda stack: filters.gaussian(
        stack, sigma, mode="reflect", truncate=4.0, preserve_range=True, channel_axis=0
    )


def _on_device(rows: Sequence[Tensor], prior_rows: int, flat: float, smoothed: Callable[[Any], Any]) -> Result:
    import cupy

    device = rows[0].device
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream.cuda_stream, device.index):
        images = [cupy.from_dlpack(image.detach().double()) for image in rows]
        maps, image_index, valid = masked_maps(cupy, images, prior_rows, flat, smoothed)
        given = tuple(torch.from_dlpack(array) for array in maps)
        return given, torch.from_dlpack(image_index), torch.from_dlpack(valid.astype(cupy.uint8)).bool()


def masked_maps(
    xp: ModuleType, images: Sequence[Any], prior_rows: int, flat: float, smoothed: Callable[[Any], Any]
) -> tuple[list[Any], Any, Any]:
    """The same on float64 arrays of `xp` (CuPy or NumPy)."""
    images, image_index = choose(xp, images, prior_rows)
    maps, valid = [], xp.zeros(image_index.shape, bool)
    for i, image in enumerate(images):
        purified, holds = purify(xp, smoothed, image, prior_rows, flat)
        taken = image_index == i
        maps.append(xp.where(taken[:, None, None], purified, 0.0).astype(xp.float32))
        valid |= taken & holds
    return maps, image_index, valid
