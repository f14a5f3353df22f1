"""Calls that cover the contract of `token_maps`, for tests on any device and before any benchmark.

Sizes are no powers of two, every other image is strided between NaN, and memory is poisoned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hide_kernels.testing.rows import poisoned_empty
from hide_kernels.token_maps import TokenMaps, token_maps

# Maps are computed in float64 and rounded once: a unit in the last place of float32.
MAP_ERROR = 1.2e-7


def _untouched(images: list[Tensor]) -> None:
    pass


@dataclass(frozen=True)
class MapCase:
    """One call: grids of the images, arguments, and what is done to the random rows."""

    name: str
    grids: tuple[tuple[int, int], ...] = ((5, 9),)
    rows: int = 4
    prior_rows: int = 1
    sigma: float = 1.0
    change: Callable[[list[Tensor]], None] = _untouched

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> list[Tensor]:
        """Rows per image; the first, the third and so on lie strided in wider memory between NaN."""
        generator = torch.Generator().manual_seed(len(self.name))
        images = [torch.rand(self.rows, *grid, generator=generator) for grid in self.grids]
        self.change(images)
        placed = [image.to(device, dtype) for image in images]
        for i in range(0, len(images), 2):
            height, width = self.grids[i]
            wide = torch.full((width + 2, height + 3, self.rows), torch.nan, dtype=dtype, device=device)
            placed[i] = wide[1:-1, 2:-1].permute(2, 1, 0).copy_(placed[i])
        return placed


def _constant(images: list[Tensor]) -> None:
    images[0][0], images[0][2] = 0.25, -3.0


def _not_finite(images: list[Tensor]) -> None:
    """A row of the prior, a token in one image by each kind of value, a token in all of them."""
    images[0][0, 1, 2] = torch.nan
    images[0][2, 0, 0], images[1][3, 1, 1] = -torch.inf, torch.inf
    for image in images:
        image[5, 0, 1] = torch.nan


def _tied(images: list[Tensor]) -> None:
    for image, peak in zip(images, (1.0, 2.0, 2.0), strict=True):
        image[:, 1, 2] = peak


def _cancelled(images: list[Tensor]) -> None:
    """One token is the prior, one is all but the prior."""
    images[0][:4] = images[0][0].clone()
    images[0][3, 2, 4] += 1e-6


def _brightest_last(images: list[Tensor]) -> None:
    for image in images[:-1]:
        image *= 0.5


MAP_CASES = [
    MapCase("several tiles of lines, columns and cells", grids=((17, 70),), rows=3),
    MapCase("37 x 53", grids=((37, 53),), rows=3, sigma=0.3),
    MapCase("no smoothing", grids=((37, 53),), sigma=0.0),
    MapCase("a sigma without a second weight", sigma=1e-310),
    MapCase("grids of one line, column and cell", grids=((1, 1), (1, 7), (6, 1), (1, 1)), rows=7, sigma=3.0),
    MapCase("taps far beyond the map", grids=((5, 9), (11, 3), (1, 2)), rows=5, sigma=40.0),
    MapCase("sigma of a thousand", grids=((2, 3),), rows=3, sigma=1000.0),
    MapCase("no prior", prior_rows=0),
    MapCase("eight rows of prior", rows=11, prior_rows=8),
    MapCase("nothing but prior", rows=3, prior_rows=3),
    MapCase("no row", rows=0, prior_rows=0),
    MapCase("more tokens than a program takes", grids=((3, 4), (4, 3)), rows=21, sigma=0.5),
    MapCase("more images than a launch takes", grids=((2, 3), (3, 2)) * 5, rows=3, sigma=0.0),
    MapCase("one image takes all", grids=((3, 4), (2, 2), (4, 5)), change=_brightest_last),
    MapCase("constant rows", change=_constant),
    MapCase("rows that are not finite", grids=((3, 4), (5, 3)), rows=6, prior_rows=2, change=_not_finite),
    MapCase("equal peaks", grids=((3, 4), (2, 5), (4, 4)), sigma=0.5, change=_tied),
    MapCase("tokens that the prior cancels", rows=5, prior_rows=2, change=_cancelled),
]


def map_error(
    case: MapCase,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    backend: str | None = None,
    call: Callable[..., TokenMaps] = token_maps,
) -> float:
    """Largest difference between a call's maps and the reference's; infinite if images, validity or types differ."""
    rows = case.inputs(dtype, device)
    arguments: dict[str, Any] = {"prior_rows": case.prior_rows, "sigma": case.sigma}
    want = token_maps([image.cpu() for image in rows], backend="scipy", **arguments)
    with poisoned_empty():
        got = call(rows, backend=backend, **arguments)
    same = torch.equal(got.image_index.cpu(), want.image_index) and torch.equal(got.valid.cpu(), want.valid)
    for one, other in zip(got.maps, want.maps, strict=True):
        same = same and one.shape == other.shape and one.dtype == other.dtype and one.device == rows[0].device
    if not same:
        return torch.inf
    errors = [(one.cpu() - other).abs().max() for one, other in zip(got.maps, want.maps, strict=True) if one.numel()]
    return torch.stack(errors).max().nan_to_num(torch.inf).item() if errors else 0.0
