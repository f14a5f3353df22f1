"""Pinned host memory, made for the device that it is copied to."""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of `tensor` in pinned memory, from which `device` copies while the host goes on.

    PyTorch pins under the current device, where it would make a context of its own for nothing.
    """
    with torch.cuda.device(device):
        return tensor.pin_memory()
