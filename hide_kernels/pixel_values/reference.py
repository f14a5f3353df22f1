"""The definition: Pillow resizes, NumPy normalises as Hugging Face's image processors do, a transpose makes patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hide_kernels.pixel_values.levels import normalised_values

Pixels = NDArray[np.uint8]


def resize_reference(image: Tensor, sizes: Sequence[tuple[int, int]]) -> Pixels:
    """(H', W', 3): the picture over white, at each of the sizes in turn."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image.cpu().numpy()))
    if picture.mode == "RGBA":
        canvas = Image.new("RGB", picture.size, (255, 255, 255))
        canvas.paste(picture, mask=picture.getchannel("A"))
        picture = canvas
    for height, width in sizes:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(picture)


def pixel_values_reference(
    image: Tensor,
    sizes: Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    patch: int,
    merge: int,
    temporal: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of patches; arguments as `pixel_values` documents."""
    pixels = resize_reference(image, sizes)
    values = normalised_values(mean, std)[np.arange(3), pixels]
    rows, columns = pixels.shape[0] // (merge * patch), pixels.shape[1] // (merge * patch)
    # Block row, row in it, pixel row; block column, column in it, pixel column; channel.
    cut = values.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    frames = np.repeat(cut[:, :, :, :, :, None], temporal, axis=5)
    return torch.from_numpy(frames.reshape(rows * columns * merge**2, -1)).to(image.device, dtype)
