"""Tile sizes of `receive` by architecture and number of keys.

Reasoned, not measured: each entry compiles without a stack and fits the shared memory of every card of its class
(`benchmarks/static_report.md` has the figures). Nothing here may depend on the batch, as in `attention_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ..attention_rows.triton_configs import Family, family


@dataclass(frozen=True)
class ReceiveConfig:
    """A tile of `keys` keys, which stay, by `queries` queries, which pass by.

    The other fields are those of `LseConfig`, whose tiles these are with keys and queries exchanged.
    """

    keys: int
    queries: int
    warps: int
    stages: int = 2
    slice: int = 0
    registers: int | None = None
    resident: int = 2


# By the keys of a sample that are asked for: at most 64 (a window of a vision encoder), more.
RECEIVE: dict[tuple[Family, int], ReceiveConfig] = {
    ("mma", 64): ReceiveConfig(64, 64, 4),
    ("mma", 128): ReceiveConfig(128, 64, 8, registers=192),
    ("wgmma", 64): ReceiveConfig(64, 64, 4),
    ("wgmma", 128): ReceiveConfig(128, 32, 8),
    # A thread owns a key's whole row of queries, whose masks and lse it holds as well.
    ("tcgen05", 64): ReceiveConfig(64, 32, 4),
    ("tcgen05", 128): ReceiveConfig(128, 32, 8),
}
# D in slices: for float32, and for rows that are not 16-byte aligned.
RECEIVE_SLICED = ReceiveConfig(32, 64, 4, stages=1, slice=16, registers=224)


@cache
def receive_config(capability: tuple[int, int], keys: int, sliced: bool) -> ReceiveConfig:
    """Tiles for a sample's `keys` columns."""
    return RECEIVE_SLICED if sliced else RECEIVE[family(capability), 64 if keys <= 64 else 128]
