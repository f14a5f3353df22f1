"""One read by the host for many small tensors: each read waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def host_read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU of tensors on one device, of any dtypes and shapes, in one transfer."""
    if not tensors:
        return []
    # The largest elements first, so that each tensor begins at a multiple of its own.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    # Tensors of one or no element may be contiguous with any stride, which a view as bytes does not take.
    flat = [tensors[i].contiguous().as_strided((tensors[i].numel(),), (1,)).view(torch.uint8) for i in order]
    read = torch.cat(flat).cpu()
    found: dict[int, Tensor] = {}
    for i, part in zip(order, read.split([part.numel() for part in flat]), strict=True):
        found[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return [found[i] for i in range(len(tensors))]
