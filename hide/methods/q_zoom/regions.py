"""From a region branch's map to what is cut out: sinks, blur, one box, its pixels, and positions of the crop."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hide_kernels import regions

Cells = tuple[int, int, int, int]
"""x0, y0, x1, y1 in cells of the map, half-open."""

# A cell stands out as a sink from this probability on.
SINK_PROBABILITY = 0.75
# Of LLaVA's components: fewest and most cells, and up to how many cells a box is widened, to how many a side.
FEWEST, MOST, SMALL, SMALL_SIDE = 2, 225, 3, 3


class Region(NamedTuple):
    """cells: the box. kept: (h, w) bool, the part of the box whose tokens are shown; `None`: all of it."""

    cells: Cells
    kept: Tensor | None = None


def without_corner(probabilities: Tensor, cells: int) -> Tensor:
    """Zeros in the first column of the upper quarter and the first row of the left quarter, where maps of more than
    `cells` cells have sinks (Qwen2.5-VL)."""
    height, width = probabilities.shape
    if height * width <= cells:
        return probabilities
    cleared = probabilities.clone()
    cleared[: max(1, height // 4), 0] = 0
    cleared[0, : max(1, width // 4)] = 0
    return cleared


def without_sinks(probabilities: Tensor, first_token_scores: Tensor) -> Tensor:
    """Zeros where the sequence's first token scores high, as it does on sinks alone (Qwen3-VL)."""
    return probabilities * (first_token_scores < math.log(SINK_PROBABILITY / (1 - SINK_PROBABILITY)))


def blurred(values: Tensor) -> Tensor:
    """A 3 x 3 Gaussian of sigma 1 over (h, w), reflected at the edges without repeating them, as torchvision's; along
    an axis of one cell nothing is blurred."""
    beside = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    for axis in (0, 1):
        length = values.shape[axis]
        if length > 1:
            places = torch.arange(length, device=values.device)
            before, after = (places - 1).abs(), length - 1 - (length - 2 - places).abs()
            ends = values.index_select(axis, before) + values.index_select(axis, after)
            values = (1 - 2 * beside) * values + beside * ends
    return values


def one_box(positive: Tensor) -> Region | None:
    """The tight box around all that is true in (h, w); `None` where nothing is."""
    down, across = (positive.any(axis).nonzero().flatten() for axis in (1, 0))
    if not len(down):
        return None
    return Region((int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1))


def component_box(positive: Tensor) -> Region | None:
    """The box of LLaVA's release: 8-connected components of one cell, or of more than 225, are left out.

    One that is left has its own box, at least 3 x 3 cells where it has 2 or 3. Of several the box is that of all that
    is true, and what lies in it and is not true is not kept.
    """
    height, width = positive.shape
    found = regions(positive.float().cpu()[None], 0.5, max_regions=height * width)
    count = int(found.counts[0])
    sizes, boxes = found.sizes[0, :count].tolist(), found.boxes[0, :count].tolist()
    taken = [(size, box) for size, box in zip(sizes, boxes, strict=True) if FEWEST <= size <= MOST]
    if not taken:
        return None
    if len(taken) > 1:
        whole = one_box(positive)
        assert whole is not None
        x0, y0, x1, y1 = whole.cells
        return Region(whole.cells, positive[y0:y1, x0:x1])
    size, (x0, y0, x1, y1) = taken[0]
    if size <= SMALL:
        x0, x1 = _widened(x0, x1, width)
        y0, y1 = _widened(y0, y1, height)
    return Region((x0, y0, x1, y1))


def _widened(first: int, last: int, length: int) -> tuple[int, int]:
    centre, side = (first + last) / 2, max(SMALL_SIDE, last - first + 1)
    return max(0, int(centre - side / 2)), min(length, int(centre + side / 2))


def kept_tokens(region: Region, grid: tuple[int, int]) -> Tensor | None:
    """(tokens,) bool: which tokens of a crop with `grid` (rows, columns) are shown; `None`: all of them."""
    if region.kept is None:
        return None
    part = region.kept.float()[None, None]
    enlarged = torch.nn.functional.interpolate(part, size=grid, mode="bilinear", align_corners=False)
    return (enlarged > 0.5).flatten()


def pixel_box(cells: Cells, grid: tuple[int, int], size: tuple[int, int], least: int) -> tuple[int, int, int, int]:
    """Pixels x0, y0, x1, y1, half-open, of a box in a map of `grid` (rows, columns) on an image of `size` (width,
    height). Sides shorter than `least` pixels grow on both ends, and slide back into the image."""
    edges = []
    for axis, length in enumerate(size):
        scale = length / grid[1 - axis]
        first, last = cells[axis] * scale, cells[axis + 2] * scale
        if last - first < least:
            first, last = (first + last - least) / 2, (first + last + least) / 2
            first, last = (0, last - first) if first < 0 else (first, last)
            first, last = (first - (last - length), length) if last > length else (first, last)
        start = min(int(max(0, first)), length - 1)
        edges.append((start, max(start + 1, int(min(length, last)))))
    (x0, x1), (y0, y1) = edges
    return x0, y0, x1, y1


def inside_source(positions: Tensor, source: int, start: int, grid: tuple[int, int], cells: Cells) -> Tensor:
    """Positions at which a crop's tokens lie where they were cut out, between the source's own (`reuse_src_pos`).

    Text and the time axis keep the places of a second image; height and width become fractions of the source's cells,
    from the centre of the box's first to that of its last.

    Args:
        positions: (P, 1, L) of a prompt with both images, the last two rows being height and width.
        source, start: places of the first token of the source and of the crop.
        grid: (rows, columns) of the crop. cells: the box, in cells of the source.

    Returns:
        The same in float32.
    """
    moved = positions.float()
    rows, columns = grid
    x0, y0, x1, y1 = cells
    for axis, first, last, steps in ((-2, y0, y1, rows), (-1, x0, x1, columns)):
        origin = float(moved[axis, 0, source])
        line = torch.linspace(origin + first, origin + last - 1, steps)
        place = line[:, None].expand(rows, columns) if axis == -2 else line[None].expand(rows, columns)
        moved[axis, 0, start : start + rows * columns] = place.flatten()
    return moved
