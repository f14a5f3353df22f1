"""The compiled kernels of csrc, and who launches them: the extension, or CuPy where the extension has no CUDA part.

Nothing is loaded before the first question. A kernel takes its tensors first, then its integers, then its reals.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hide_kernels.geometry import Geometry, shared_limit

# In an installed package, or in a checkout.
_HERE = Path(__file__).parent
SOURCES = next(path for path in (_HERE / "csrc", _HERE.parent / "csrc") if path.is_dir())
BUILD = "install a C++17 compiler (g++ or clang++), then reinstall: pip install --no-build-isolation ."


@functools.cache
def extension() -> tuple[Any, str]:
    """The extension module, or `None`; and why there is none."""
    try:
        return importlib.import_module("hide_kernels._csrc"), ""
    except ModuleNotFoundError:
        return None, "the extension is not built"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the extension does not load: {' '.join(str(error).split())[:160]}"


def missing(device: str) -> str | None:
    """Why no kernel can be launched on "cpu" or "cuda", or `None`."""
    module, reason = extension()
    if device == "cpu":
        return reason or None
    if module is not None and module.cuda:
        return None
    if find_spec("cupy"):
        return None
    return f"{reason or 'the extension has no CUDA part'}, and cupy is not installed"


def launch(
    kernel: str,
    geometry: Geometry,
    tensors: Sequence[Tensor],
    integers: Sequence[int] = (),
    reals: Sequence[float] = (),
) -> None:
    """Run a kernel on the device of its tensors, in order with that device's current stream.

    Tensors stand for the address of their first element; one without elements stands for null.
    """
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    module, _ = extension()
    if device.type == "cuda" and not (module is not None and module.cuda):
        _launch_cupy(kernel, geometry, tensors, integers, reals, stream)
    else:
        torch.ops.hide_kernels_csrc.launch(kernel, tensors, integers, reals, *geometry, stream)


def _launch_cupy(
    kernel: str,
    geometry: Geometry,
    tensors: Sequence[Tensor],
    integers: Sequence[int],
    reals: Sequence[float],
    stream: int,
) -> None:
    import cupy
    import numpy as np

    device = tensors[0].device
    arguments = (
        *(np.uint64(tensor.data_ptr()) for tensor in tensors),
        *(np.int64(integer) for integer in integers),
        *(np.float64(real) for real in reals),
    )
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream, device.index):
        function = _cupy_function(kernel, device)
        function((geometry.blocks,), (geometry.threads,), arguments, shared_mem=geometry.shared)


@functools.cache
def _cupy_function(kernel: str, device: torch.device) -> Any:
    """A kernel that may have all the shared memory that a block of the device, the current one, can have.

    Set once and never to what one call needs: another thread may be about to launch with more.
    """
    function = _cupy_module().get_function(kernel)
    function.max_dynamic_shared_size_bytes = shared_limit(device)
    return function


@functools.cache
def _cupy_module() -> Any:
    """The kernels through NVRTC, compiled at first use; CuPy keeps them on disk, per source and architecture."""
    import cupy

    return cupy.RawModule(code=device_source(), options=("-std=c++17",))


def device_source() -> str:
    """All device code in one text, so that a cache keyed on the text notices every change."""
    seen: set[str] = set()

    def inline(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        lines = []
        for line in (SOURCES / name).read_text(encoding="utf-8").splitlines():
            include = line.removeprefix('#include "').removesuffix('"')
            lines.append(inline(include) if include != line else "" if line == "#pragma once" else line)
        return "\n".join(lines)

    return "\n".join(inline(f"{operator}.cuh") for operator in ("regions", "collage", "pixel_values"))
