"""`token_maps` by each of its backends: rows of a picture to purified maps."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import WITHHELD, Failure, in_turn, wrong
from benchmarks.regions_to_collage import GRID, MAPS, line, measure, synthetic_maps
from hide.texts import named
from hide_kernels import explain, token_maps
from hide_kernels.testing.map_cases import MAP_CASES, MAP_ERROR, map_error
from hide_kernels.token_maps import TokenMaps

__all__ = ["failures", "gpu_table", "line"]

PRIOR = 8
SIGMA = 3.0
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# What a question takes, then sizes around it.
SHAPES = [(MAPS, GRID), *((tokens, grid) for tokens in (8, 48, 100) for grid in ((32, 32), (64, 64), (200, 200)))]


def failures(device: str) -> Iterator[Failure]:
    """What is wrong on a device: calls of every kind, by every backend that serves them, beside the reference."""
    for case in MAP_CASES:
        for backend in _backends(case.inputs(DTYPES[device], device)):
            try:
                error = map_error(case, DTYPES[device], device, backend=backend)
            except Exception as problem:
                yield Failure(case.name, backend, named(problem), (backend,))
                continue
            if not error <= MAP_ERROR:
                yield Failure(case.name, backend, f"error {error:.1e}", (backend,))


def gpu_table(seconds: float, device: str = "cuda", withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """All measurements on the GPU, as far as they fit into the time; each is checked before it is timed."""
    parts = {
        f"rows to maps, {tokens} of {grid}": functools.partial(shape_rows, tokens, grid, torch.device(device), withheld)
        for tokens, grid in SHAPES
    }
    return in_turn(parts, seconds)


def shape_rows(
    tokens: int, grid: tuple[int, int], device: torch.device, withheld: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Every backend at one shape."""
    rows = synthetic_maps(PRIOR + tokens, grid).to(device, DTYPES[device.type])
    moved = rows.nbytes + 4 * tokens * grid[0] * grid[1]
    (want,) = token_maps([rows.cpu()], prior_rows=PRIOR, sigma=SIGMA, backend="scipy").maps

    def right(got: TokenMaps) -> bool:
        return bool((got.maps[0].cpu() - want).abs().max() <= MAP_ERROR)

    for backend in _backends([rows]):
        about = {"what": "rows to maps", "shape": f"{tokens} x {grid[0]}x{grid[1]}", "implementation": backend}
        run = functools.partial(token_maps, [rows], prior_rows=PRIOR, sigma=SIGMA, backend=backend)
        if backend in withheld:
            yield {**about, "skipped": WITHHELD}
        elif error := wrong(run, right, "maps"):
            yield {**about, "failed": error}
        else:
            yield measure(*about.values(), run, moved, device)._asdict()


def _backends(rows: list[Tensor]) -> Iterator[str]:
    return (backend.name for backend, reason in explain("token_maps", rows=rows).candidates if reason is None)
