"""How every compiled kernel is launched: blocks, threads per block, bytes of shared memory. Nowhere else.

On the CPU a block is one thread, and one block does everything: `threads` and the number of blocks follow the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# As csrc/device.cuh tells the compiler.
MAX_THREADS = 512
# Blocks that take maps in turn: about two for each multiprocessor of the largest GPU, and a bound on their tables.
MAX_BLOCKS = 256
# Without asking, a kernel may have this much; every GPU has it.
DEFAULT_SHARED = 48 * 1024
# What the structs of csrc take.
REGION_BYTES, SPAN_BYTES, LAYOUT_BYTES = 32, 16, 37 * 1024
# csrc/layout.h: boxes that one block lays out, and the integers of its plan.
CAPACITY = 1024
PLAN_HEADER, PLAN_INTEGERS = 8, 8 + 12 * CAPACITY
# csrc/pixel_values.h: rows that are resized at once on the host.
STRIP_ROWS = 16


class Geometry(NamedTuple):
    """Launch of one kernel."""

    blocks: int
    threads: int
    shared: int = 0


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block can be given."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", DEFAULT_SHARED))
    # On the host it is ordinary memory; as on the largest GPU, so that both take the same path.
    return 227 * 1024


def blocks_of_map(height: int, width: int) -> tuple[int, int]:
    """How many 2x2 blocks a map has, and how many strips of eight of them."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    return rows * columns, rows * -(-columns // 8)


def regions_block(device: torch.device, maps: int, height: int, width: int) -> Geometry | None:
    """One block per map, or `None` where a map does not fit into its shared memory."""
    nodes, strips = blocks_of_map(height, width)
    shared = 4 * (1 + nodes + strips)
    if shared > shared_limit(device):
        return None
    return _serial(shared) if device.type == "cpu" else Geometry(min(maps, MAX_BLOCKS), _threads(strips), shared)


def regions_step(device: torch.device, maps: int, height: int, width: int) -> Geometry:
    """One thread per strip."""
    strips = maps * blocks_of_map(height, width)[1]
    return _serial() if device.type == "cpu" else Geometry(min(-(-strips // 256), 2**31 - 1), 256)


def regions_finish(device: torch.device, maps: int) -> Geometry:
    """One block per map."""
    return _serial() if device.type == "cpu" else Geometry(min(maps, MAX_BLOCKS), MAX_THREADS)


def layout_boxes(device: torch.device) -> Geometry:
    """One block for everything."""
    return _serial(LAYOUT_BYTES) if device.type == "cpu" else Geometry(1, MAX_THREADS, LAYOUT_BYTES)


def collage_rows(device: torch.device, boxes: int, height: int, width: int) -> Geometry | None:
    """One block per canvas row, or `None` where the list of its boxes could outgrow the shared memory."""
    shared = SPAN_BYTES * (1 + boxes)
    if device.type == "cpu":
        return _serial(shared)
    return Geometry(height, _threads(width), shared) if shared <= DEFAULT_SHARED else None


def resize(device: torch.device, width: int, rows: int, columns: int, strip: int = 0) -> Geometry:
    """One block per row of the result; on the host strips of rows of the source, and one of the result, in memory."""
    if device.type == "cpu":
        return _serial(3 * (STRIP_ROWS * width + strip * columns))
    return Geometry(rows, _threads(columns))


def _serial(shared: int = 0) -> Geometry:
    return Geometry(1, 1, shared)


def _threads(items: int) -> int:
    """As many as there are items, in whole warps."""
    return min(-(-items // 32) * 32, MAX_THREADS)
