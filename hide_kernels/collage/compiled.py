"""The kernels of csrc/layout.h and csrc/collage.h, on the host as C++ or on the device as CUDA."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hide_kernels import geometry, native
from hide_kernels.collage.layout import Layout

# Statuses of csrc/layout.h.
DONE, INVALID, TOO_MANY = range(3)


class Plan(NamedTuple):
    """What the layout kernel found, read by the host at once.

    status: `DONE`, or why there is no plan: a box outside the image, or more boxes than one block takes.
    most: regions of the map that has most, also those beyond its slots; 0 where no counts were given.
    boxes: (K, 4) int32 merged boxes in reading order, on the CPU. layout: `None` without boxes.
    on_device: boxes and positions, (K, 4) int32 each, where the kernels are.
    """

    status: int
    most: int
    boxes: Tensor
    layout: Layout | None
    on_device: tuple[Tensor, Tensor]


def plan_compiled(boxes: Tensor, counts: Tensor | None, *, grid: tuple[int, int] | None, size: tuple[int, int]) -> Plan:
    """Pool, scale to pixels, merge and lay out, in one launch on the device of `boxes` and with one read by the host.

    Arguments are as `launch_plan` documents.
    """
    packed = launch_plan(boxes, counts, grid=grid, size=size)
    return read_plan(packed, packed.cpu())


def launch_plan(boxes: Tensor, counts: Tensor | None, *, grid: tuple[int, int] | None, size: tuple[int, int]) -> Tensor:
    """The plan as the kernel packs it, int32 on the device of `boxes`; the host waits for nothing.

    Args:
        boxes: (M, S, 4) int32 or int64, half-open x0, y0, x1, y1 in cells of `grid`, or in pixels without one.
        counts: (M,) int32, how many slots of each map are used; `None`: all.
        grid: (rows, columns) of cells. size: (height, width) of the image.
    """
    device = boxes.device
    maps, slots, _ = boxes.shape
    packed = torch.empty(geometry.PLAN_INTEGERS, dtype=torch.int32, device=device)
    used = torch.empty(0, dtype=torch.int32, device=device) if counts is None else counts.contiguous()
    dtype = str(boxes.dtype).removeprefix("torch.")
    native.launch(
        f"layout_boxes_{dtype}",
        geometry.layout_boxes(device),
        (boxes.contiguous(), used, packed),
        (maps, slots, *(grid or (0, 0)), *size),
    )
    return packed


def read_plan(packed: Tensor, host: Tensor) -> Plan:
    """The plan that `launch_plan` packed, and the copy of it that the host has read."""
    status, count, height, width, rows, columns, most, _ = host[: geometry.PLAN_HEADER].tolist()
    if status != DONE:
        count = 0

    def parts(packed_ints: Tensor) -> tuple[Tensor, ...]:
        capacity = geometry.CAPACITY
        lists = packed_ints[geometry.PLAN_HEADER :].split([4 * capacity, 4 * capacity, 2 * capacity, 2 * capacity])
        return tuple(
            part.view(capacity, -1)[:used] for part, used in zip(lists, (count, count, rows, columns), strict=True)
        )

    merged, positions, kept_rows, kept_columns = parts(host)
    layout = Layout(kept_columns.long(), kept_rows.long(), (height, width), positions.long()) if count else None
    return Plan(status, most, merged, layout, (parts(packed)[0], parts(packed)[1]))


def gather_compiled(
    image: Tensor,
    boxes: Tensor,
    positions: Tensor,
    size: tuple[int, int],
    fill: tuple[int, int, int] | None,
    blend: bool,
) -> Tensor | None:
    """Canvas of `size` with the pixels of each box at its position, on the device of all tensors.

    Arguments are as `collage` documents; boxes and positions are (K, 4) int32. `None` where there are more boxes than
    one row's list holds.
    """
    (height, width), channels = size, 4 if fill is None else 3
    launch = geometry.collage_rows(image.device, len(boxes), height, width)
    if launch is None:
        return None
    shape = (height, width, channels)
    if image.device.type == "cpu":
        # NumPy asks for huge pages: touching small new ones would take longer than the copy.
        canvas = torch.from_numpy(np.empty(shape, np.uint8))
    else:
        canvas = torch.empty(shape, dtype=torch.uint8, device=image.device)
    native.launch(
        "collage_rows",
        launch,
        (image, boxes.contiguous(), positions.contiguous(), canvas),
        (len(boxes), *image.stride(), image.shape[2], height, width, channels, *(fill or (0, 0, 0)), int(blend)),
    )
    return canvas
