"""`token_maps` by each of its backends: rows of a picture to purified maps."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.regions_to_collage import GRID, MAPS, line, measure, synthetic_maps
from hide_kernels import explain, token_maps
from hide_kernels.testing.map_cases import MAP_CASES, MAP_ERROR, map_error

__all__ = ["failures", "gpu_table", "line"]

PRIOR = 8
SIGMA = 3.0
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# What a question takes, then sizes around it.
SHAPES = [(MAPS, GRID), *((tokens, grid) for tokens in (8, 48, 100) for grid in ((32, 32), (64, 64), (200, 200)))]


def failures(device: str) -> list[str]:
    """What is wrong on a device: calls of every kind, by every backend that serves them, beside the reference."""
    failed = []
    for case in MAP_CASES:
        for backend in _backends(case.inputs(DTYPES[device], device)):
            try:
                error = map_error(case, DTYPES[device], device, backend=backend)
            except Exception as problem:
                failed.append(f"{case.name}, {backend}: {type(problem).__name__}: {problem}")
                continue
            if not error <= MAP_ERROR:
                failed.append(f"{case.name}, {backend}: error {error:.1e}")
    return failed


def gpu_table(seconds: float, device: str = "cuda") -> list[dict[str, Any]]:
    """All measurements on the GPU, as far as they fit into the time."""
    end, table = time.monotonic() + seconds, []
    for tokens, grid in SHAPES:
        if time.monotonic() > end:
            table.append({"what": f"rows to maps, {tokens} of {grid}", "skipped": "no time left"})
            continue
        table += shape_rows(tokens, grid, torch.device(device))
    return table


def shape_rows(tokens: int, grid: tuple[int, int], device: torch.device) -> list[dict[str, Any]]:
    """Every backend at one shape."""
    rows = synthetic_maps(PRIOR + tokens, grid).to(device, DTYPES[device.type])
    moved = rows.nbytes + 4 * tokens * grid[0] * grid[1]
    table = []
    for backend in _backends([rows]):
        run = functools.partial(token_maps, [rows], prior_rows=PRIOR, sigma=SIGMA, backend=backend)
        table.append(measure("rows to maps", f"{tokens} x {grid[0]}x{grid[1]}", backend, run, moved, device)._asdict())
    return table


def _backends(rows: list[Tensor]) -> Iterator[str]:
    return (backend.name for backend, reason in explain("token_maps", rows=rows).candidates if reason is None)
