"""The kernels of csrc/pixel_values.h, on the host as C++ or on the device as CUDA: a launch per pass, none waits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hide_kernels import geometry, native
from hide_kernels.pinned import pinned
from hide_kernels.pixel_values.levels import normalised_values
from hide_kernels.pixel_values.taps import COLUMNS, ROWS, rows_first, taps

Size = tuple[int, int]

# Tables that graphs read again whenever they are replayed.
_captured: list[Tensor] = []


class Pass(NamedTuple):
    """One axis of one resize: the size before it, and its length after it. The axis is as in csrc/pixel_values.h."""

    before: Size
    axis: int
    targets: int

    @property
    def after(self) -> Size:
        return (self.before[0], self.targets) if self.axis == COLUMNS else (self.targets, self.before[1])


def plan(size: Size, sizes: Sequence[Size], any_layout: bool) -> tuple[Pass, ...]:
    """The passes that change something, in Pillow's order, or one that changes nothing.

    Without `any_layout`, a pass over rows is never the first: one over columns makes the picture dense RGB.
    """
    passes, at = [], size
    for target in sizes:
        axes = (ROWS, COLUMNS) if rows_first(at, target) else (COLUMNS, ROWS)
        for axis in axes:
            if at[axis] != target[axis]:
                passes.append(Pass(at, axis, target[axis]))
                at = passes[-1].after
    if not passes or (passes[0].axis == ROWS and not any_layout):
        passes.insert(0, Pass(size, COLUMNS, size[1]))
    return tuple(passes)


def resize_compiled(image: Tensor, size: Size) -> Tensor:
    """(H', W', 3) uint8, always new; arguments as `resize` documents."""
    passes = _plan(image, [size])
    return _run(image, passes, _tables(image.device, passes))


def pixel_values_compiled(
    image: Tensor,
    sizes: Sequence[Size],
    mean: Sequence[float],
    std: Sequence[float],
    patch: int,
    merge: int,
    temporal: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of patches; arguments as `pixel_values` documents."""
    device = image.device
    passes = _plan(image, sizes)
    *tables, weights, values = _tables(device, passes, tuple(mean), tuple(std), dtype)
    pixels = _run(image, passes[:-1], tables)
    (rows, columns), bits = passes[-1].after, 8 * dtype.itemsize
    shape = (rows * columns // patch**2, 3 * temporal * patch**2)
    if device.type == "cpu":
        # NumPy asks for huge pages: touching small new ones would take longer than what is written to them.
        result = torch.from_numpy(np.empty(shape, f"int{bits}")).view(dtype)
    else:
        result = torch.empty(shape, dtype=dtype, device=device)
    native.launch(
        f"resize_to_patches_{bits}",
        geometry.resize(device, pixels.shape[1], rows, columns, patch),
        (pixels, weights, values, result),
        (*_integers(pixels, passes[-1]), patch, merge, temporal),
    )
    return result


def _plan(image: Tensor, sizes: Sequence[Size]) -> tuple[Pass, ...]:
    dense = image.shape[2] == 3 and image.is_contiguous()
    return plan((image.shape[0], image.shape[1]), sizes, any_layout=dense or image.device.type != "cpu")


def _run(image: Tensor, passes: Sequence[Pass], tables: Sequence[Tensor]) -> Tensor:
    for one, table in zip(passes, tables, strict=True):
        rows, columns = one.after
        resized = torch.empty((rows, columns, 3), dtype=torch.uint8, device=image.device)
        launch = geometry.resize(image.device, image.shape[1], rows, columns)
        native.launch("resize", launch, (image, table, resized), _integers(image, one))
        image = resized
    return image


def _integers(image: Tensor, one: Pass) -> tuple[int, ...]:
    return (*image.stride(), image.shape[2], image.shape[1], *one.after, one.axis)


def _tables(
    device: torch.device,
    passes: tuple[Pass, ...],
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Weights of each pass and, where there is a mean, the bits of the normalised values, on the device."""
    packed, lengths = _packed(passes, mean, std, dtype, device if device.type == "cuda" else None)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(packed)
    return packed.to(device, non_blocking=True).split(lengths)


@functools.lru_cache(maxsize=64)
def _packed(
    passes: tuple[Pass, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device | None,
) -> tuple[Tensor, list[int]]:
    """All tables in one int32 tensor, pinned for one copy to a GPU that nobody waits for; and their lengths."""
    parts = [torch.from_numpy(taps(one.before[one.axis], one.targets)).view(-1) for one in passes]
    if mean:
        parts.append(torch.from_numpy(normalised_values(mean, std)).to(dtype).view(-1).view(torch.int32))
    packed = torch.cat(parts)
    return packed if device is None else pinned(packed, device), [len(part) for part in parts]
