"""`token_maps` on Triton: plans four launches, and one more for every eight images after the first eight.

Where images lie is a kernel argument, and what is launched depends on shapes alone. So nothing is uploaded, nothing
waits for the device, and a call may be captured in a CUDA graph. Scratch: 16 bytes per cell of all rows,
and 8 more of images as wide as the widest, in whole blocks of lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import Launch, on_device
from . import triton_kernels as kernels

IMAGES_AT_ONCE = 8
# Tiles: of the scan, of the smoothing (lines and columns), of what follows (cells and tokens).
SCAN, LINES, COLUMNS, CELLS, TOKENS = 2048, 16, 64, 256, 8
# Partial results that are read at once.
PARTS = 32
# Compute capabilities of cards that have one float64 unit for 64 of float32.
SLOW_FLOAT64 = {(8, 6), (8, 7), (8, 9), (10, 3), (11, 0), (12, 0), (12, 1)}
# What Triton's interpreter, on the CPU, is planned for.
INTERPRETED = (9, 0)
# Triton's default for fp fusion changes between versions.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def token_maps_triton(
    rows: Sequence[Tensor], prior_rows: int, sigma: float, flat: float
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Maps per image, image index and validity of each row after the prior; arguments as `token_maps` documents."""
    rows = [image.detach() for image in rows]
    tokens = rows[0].shape[0] - prior_rows
    sizes = [tokens * image.shape[1] * image.shape[2] for image in rows]
    out = rows[0].new_empty(sum(sizes), dtype=torch.float32)
    index = rows[0].new_empty(tokens, dtype=torch.int64)
    valid = rows[0].new_empty(tokens, dtype=torch.bool)
    if tokens:
        with on_device(out):
            capability = torch.cuda.get_device_capability(out.device) if out.is_cuda else INTERPRETED
            for launch in plan(rows, prior_rows, sigma, flat, out, index, valid, capability):
                launch.run()
    parts = zip(out.split(sizes), rows, strict=True)
    return tuple(part.view(tokens, *image.shape[1:]) for part, image in parts), index, valid


def plan(
    rows: Sequence[Tensor],
    prior_rows: int,
    sigma: float,
    flat: float,
    out: Tensor,
    index: Tensor,
    valid: Tensor,
    capability: tuple[int, int] = (9, 0),
) -> list[Launch]:
    """The launches of a call with at least one token on a card; works on any device, also "meta".

    `out` is flat: the maps of the images one after another.
    """
    pairs = capability in SLOW_FLOAT64 and all(image.dtype != torch.float64 for image in rows)
    length, device = rows[0].shape[0], rows[0].device
    tokens = length - prior_rows
    heights, widths = [image.shape[1] for image in rows], [image.shape[2] for image in rows]
    cells = [height * width for height, width in zip(heights, widths, strict=True)]
    lines = sum(-(-height // LINES) for height in heights)
    blocks = sum(-(-of_image // CELLS) for of_image in cells)

    def scratch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    radius = int(4 * sigma + 0.5)
    all_weights = sum(heights) + sum(widths) + 2 * len(rows)
    narrow = torch.float32 if pairs else torch.float64
    packed = {
        "packed": scratch(length * sum(cells), dtype=narrow),
        "weights": scratch(all_weights * (2 if pairs else 1), dtype=narrow),
        "sizes": scratch(len(rows), 2, dtype=torch.int32),
        "peaks": scratch(len(rows), length),
        "radius": radius,
        "all_weights": all_weights,
        "PAIRS": pairs,
    }
    shared = {
        "sizes": packed["sizes"],
        "peaks": packed["peaks"],
        "smooth": scratch(length * sum(cells)),
        "rows": length,
        "images": len(rows),
        "prior": prior_rows,
        **OPTIONS,
    }
    ranges = {"lows": scratch(lines, length), "highs": scratch(lines, length), "LINES": LINES}
    tops = {"tops": scratch(blocks, tokens), "flat": flat, "CELLS": CELLS, "PARTS": PARTS}
    scans = [
        Launch(
            kernels.scan_rows,
            (min(IMAGES_AT_ONCE, len(rows) - first) * (length + 2), 1, 1),
            {
                **_slots(rows[first : first + IMAGES_AT_ONCE]),
                **packed,
                # A radius of 0 has one weight, whatever sigma is.
                "falloff": -0.5 / sigma**2 if radius else 0.0,
                "rows": length,
                "first_image": first,
                "first_cell": sum(cells[:first]),
                "first_weight": sum(heights[:first]) + sum(widths[:first]) + 2 * first,
                "BLOCK": SCAN,
                **OPTIONS,
            },
        )
        for first in range(0, len(rows), IMAGES_AT_ONCE)
    ]
    return [
        *scans,
        Launch(
            kernels.smooth_rows,
            (lines * length, 1, 1),
            {
                **packed,
                **shared,
                **ranges,
                "half": scratch(lines * length, 2 if pairs else 1, max(widths), LINES, dtype=narrow),
                "most_columns": max(widths),
                "COLUMNS": COLUMNS,
                "enable_fp_fusion": not pairs,
            },
        ),
        Launch(
            kernels.subtract_prior,
            (blocks, 1, 1),
            {**shared, **ranges, **tops, "TOKENS": TOKENS},
        ),
        Launch(
            kernels.normalise_maps,
            (blocks * tokens, 1, 1),
            {**shared, **tops, "out": out, "index": index, "valid": valid},
        ),
    ]


def _slots(images: Sequence[Tensor]) -> dict[str, Any]:
    """What `scan_rows` takes of each image; a slot without one repeats the first, and no program looks at it."""
    arguments: dict[str, Any] = {}
    for slot in range(IMAGES_AT_ONCE):
        image = images[slot if slot < len(images) else 0]
        arguments |= {f"map{slot}": image, f"height{slot}": image.shape[1], f"width{slot}": image.shape[2]}
        arguments |= {f"step_{name}{slot}": step for name, step in zip("tyx", image.stride(), strict=True)}
    return arguments
