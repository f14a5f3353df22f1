"""The public operators: validation, dispatch, documentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hide_kernels import backends
from hide_kernels.collage.api import check_image
from hide_kernels.collage.checks import check_extent

# Backends on the kernels of csrc.
COMPILED = ("cuda", "cpp")
# Pixels, and of patches also rows and frames: what no picture has, and the kernels' 32-bit sizes are not made for.
MAX_SIDE, MAX_PATCH = 1 << 20, 256

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def resize(image: Tensor, size: tuple[int, int], *, backend: str | None = None) -> Tensor:
    """Resize as Pillow's `Image.resize` with `BICUBIC` does, bit for bit, where the picture is.

    Downscaling widens the kernel, so that nothing aliases. Transparency becomes white before.

    Args:
        image: (H, W, 3) RGB or (H, W, 4) RGBA, uint8, any strides: channels first is `image.permute(1, 2, 0)`.
        size: (height, width) in pixels.
        backend: `None` picks (`hide_kernels.explain("pixel_values")` says which); a name is used or refused.

    Returns:
        (height, width, 3) uint8 on the device of `image`, never a view of it.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    _check_image(image)
    size = _check_size("size", size)
    if backends.resolve("pixel_values", backend, image=image) in COMPILED:
        from hide_kernels.pixel_values.compiled import resize_compiled

        return resize_compiled(image, size)
    from hide_kernels.pixel_values.reference import resize_reference

    return torch.from_numpy(resize_reference(image, [size])).to(image.device)


def pixel_values(
    image: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    patch: int = 14,
    merge: int = 2,
    temporal: int = 2,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """A picture as the `pixel_values` of Qwen2-VL and Qwen2.5-VL, without a Pillow image on the way.

    Resized as `resize` does it, divided by 255, normalised, and cut into patches, with the bits of Hugging Face's
    `Qwen2VLImageProcessorPil`. The last pass of the resize writes the patches. On a GPU nothing is synchronised.

    Args:
        image: (H, W, 3) RGB or (H, W, 4) RGBA over white, uint8, any strides.
        sizes: one or two (height, width) in pixels, to which the picture is resized in turn: Qwen's loader resizes, and
            the processor does it again where that gave too few tokens. The last are multiples of `patch * merge`.
        mean, std: of R, G, B in 0..1, as the processor's `image_mean` and `image_std`.
        patch: side of a patch in pixels. merge: side of the blocks of patches that follow each other.
        temporal: how often a patch repeats its frame.
        dtype: float32, float16 or bfloat16, rounded from float32.

    Returns:
        (height * width / patch**2, 3 * temporal * patch**2) on the device of `image`: row blocks of merge x merge
        patches; in a row channel, frame, pixel row, pixel column.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    _check_image(image)
    for name, value in (("patch", patch), ("merge", merge), ("temporal", temporal)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: got {type(value).__name__}, want an int")
        if not 1 <= value <= MAX_PATCH:
            raise ValueError(f"{name}: got {value}, want 1 to {MAX_PATCH}")
    targets = _check_sizes(sizes, patch * merge)
    mean, std = _check_channels("mean", mean), _check_channels("std", std)
    if 0 in std:
        raise ValueError(f"std: got {std}, want no zero")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype}, want one of {list(DTYPES)}")
    name = backends.resolve("pixel_values", backend, image=image)

    # Imported here so that importing the package loads neither the extension nor Pillow.
    if name in COMPILED:
        from hide_kernels.pixel_values.compiled import pixel_values_compiled as implementation
    else:
        from hide_kernels.pixel_values.reference import pixel_values_reference as implementation
    return implementation(image, targets, mean, std, patch, merge, temporal, dtype)


def _check_image(image: Tensor) -> None:
    if max(check_image(image)) > MAX_SIDE:
        raise ValueError(f"image: got {tuple(image.shape)}, want at most {MAX_SIDE} pixels a side")


def _check_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    height, width = check_extent(name, size, "height, width")
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"{name}: got {tuple(size)}, want at most {MAX_SIDE} pixels a side")
    return height, width


def _check_sizes(sizes: Sequence[tuple[int, int]], cell: int) -> list[tuple[int, int]]:
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(f"sizes: got {type(sizes).__name__}, want one or two (height, width)")
    if not 1 <= len(sizes) <= 2:
        raise ValueError(f"sizes: got {len(sizes)}, want one or two (height, width)")
    targets = [_check_size(f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    if targets[-1][0] % cell or targets[-1][1] % cell:
        raise ValueError(f"sizes: got {targets[-1]} last, want multiples of patch * merge = {cell}")
    return targets


def _check_channels(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
        raise TypeError(f"{name}: got {values!r}, want three floats")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name}: got {values!r}, want finite numbers")
    return tuple(float(value) for value in values)
