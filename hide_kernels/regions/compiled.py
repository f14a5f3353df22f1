"""The kernels of csrc/regions.h, on the host as C++ or on the device as CUDA: the same plan for both.

A map whose graph fits into shared memory is done by one block, and all of them in one launch. Larger ones take a launch
per step, for all maps at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hide_kernels import geometry, native

# Of csrc/regions.h, before the last.
STEPS = 6


def regions_compiled(
    maps: Tensor, threshold: float, valid: Tensor | None, max_regions: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Boxes, scores, counts, overflow and sizes; arguments as `regions` documents. Nothing is synchronised."""
    maps = maps.detach()
    number, height, width = maps.shape
    device = maps.device

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    boxes, sizes, counts = empty(number, max_regions, 4), empty(number, max_regions), empty(number)
    scores = empty(number, max_regions, dtype=torch.float32)
    overflow = empty(number, dtype=torch.bool)
    results = boxes, scores, counts, overflow, sizes
    if not number:
        return results
    used = empty(0, dtype=torch.bool) if valid is None else valid.contiguous()
    # Rounded to the dtype of the maps here, where what is beyond it becomes infinite.
    limit = float(torch.tensor(threshold, dtype=maps.dtype, device="cpu"))
    shape = (number, height, width, *maps.stride())
    dtype = str(maps.dtype).removeprefix("torch.")
    nodes, strips = geometry.blocks_of_map(height, width)

    one_block = geometry.regions_block(device, number, height, width)
    if one_block is not None:
        tables = empty(one_block.blocks, nodes, geometry.REGION_BYTES, dtype=torch.uint8)
        everything = (maps, used, tables, boxes, scores, sizes, counts, overflow)
        native.launch(f"regions_block_{dtype}", one_block, everything, (*shape, max_regions), (limit,))
        return results

    tables = empty(number, nodes, geometry.REGION_BYTES, dtype=torch.uint8)
    graph = (maps, used, empty(number, strips), empty(number, nodes), tables, counts)
    per_strip = geometry.regions_step(device, number, height, width)
    for step in range(STEPS):
        native.launch(f"regions_step_{dtype}", per_strip, graph, (*shape, step), (limit,))
    per_map = geometry.regions_finish(device, number)
    last = (tables, boxes, scores, sizes, counts, overflow)
    native.launch("regions_finish", per_map, last, (number, nodes, width, max_regions))
    return results
