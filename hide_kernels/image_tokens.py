"""From columns of attention rows to maps on a picture, and from cells of a map to its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ImageTokens(NamedTuple):
    """Where one image lies in a token sequence.

    start, stop: its half-open range of keys. cells: (rows, columns) int64, for each cell of the picture's grid, in
    reading order, the offset of its token from `start`. Tokens that show no cell of their own (thumbnails, line breaks)
    are in the range but not in `cells`.
    """

    start: int
    stop: int
    cells: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.cells.shape[0], self.cells.shape[1]

    @property
    def span(self) -> tuple[int, int]:
        """(start, stop), as `key_spans` takes it."""
        return self.start, self.stop


def rows_to_maps(rows: Tensor, images: Sequence[ImageTokens]) -> list[Tensor]:
    """Lay attention rows out as maps, one per image.

    Args:
        rows: (..., C), the columns being those of the images' spans one after another, as `attention_rows` returns
            them for `key_spans=[image.span for image in images]`.
        images: as `image_spans` finds them.

    Returns:
        Per image (..., rows, columns); views where the tokens lie in reading order.

    Raises:
        ValueError: if `rows` has another number of columns than the images have tokens.
    """
    lengths = [image.stop - image.start for image in images]
    if rows.dim() < 1 or rows.shape[-1] != sum(lengths):
        raise ValueError(f"rows: got shape {tuple(rows.shape)}, want {sum(lengths)} columns, the images' tokens")
    maps = []
    for image, columns in zip(images, rows.split(lengths, dim=-1), strict=True):
        cells = image.cells
        in_order = torch.arange(columns.shape[-1], device=cells.device)
        if torch.equal(cells.flatten(), in_order):
            maps.append(columns.unflatten(-1, image.grid))
        else:
            maps.append(columns[..., cells.to(columns.device)])
    return maps


def maps_to_pixels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge maps to the picture they belong to: bilinear between the centres of cells, constant beyond the outermost.

    Boxes in cells become boxes in pixels with `hide_kernels.collage.boxes_to_pixels`.

    Args:
        maps: (..., h, w) float. size: (height, width) of the picture in pixels.

    Returns:
        (..., height, width), same dtype; float32 for 16-bit maps.

    Raises:
        TypeError, ValueError: for maps that are not floats or have no cell, or a size below one pixel.
    """
    if not maps.is_floating_point():
        raise TypeError(f"maps: got {maps.dtype}, want floats")
    if maps.dim() < 2 or 0 in maps.shape[-2:]:
        raise ValueError(f"maps: got shape {tuple(maps.shape)}, want (..., h, w) with at least one cell")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size: got {size}, want (height, width) of at least one pixel")
    if maps.dtype in (torch.float16, torch.bfloat16):
        maps = maps.float()
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    pixels = torch.nn.functional.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False)
    return pixels.reshape(*maps.shape[:-2], height, width)
