"""Where a model is, and where it wants its inputs."""

from __future__ import annotations

from typing import Any

import torch

from hide.texts import one_line


def named_device(name: str | None) -> torch.device:
    """The device of a name, `None`: CUDA where there is one, else the CPU; `ValueError` for one that computes nothing
    here."""
    seen = torch.cuda.is_available()
    if name is None:
        name = "cuda" if seen else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cpu" and device.index:
            reason = "there is one CPU"
        elif device.type == "cuda" and not seen:
            reason = f"this PyTorch ({torch.__version__}) sees no CUDA device"
        elif torch.ones(1, device=device).add(1).item() == 2:
            return device
        else:
            reason = "it computes wrong"
    except Exception as error:  # a kind of its own from each device that a build lacks; meta has no values
        reason = one_line(str(error).partition(". ")[0], 160)
    raise ValueError(f"device: got {name!r}, but {reason}; want cuda, cuda:1, cpu, ... that is here")


def device_of(module: Any) -> torch.device:
    """Where a module wants its inputs; accelerate, which brings weights as they are needed, says so in a hook."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
