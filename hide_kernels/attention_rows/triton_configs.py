"""Tile sizes of the Triton kernels by architecture, head size and number of rows.

Reasoned, not measured: each entry compiles without a stack and fits the shared memory of every card of its class
(`benchmarks/static_report.md` has the figures). `python -m benchmarks.tune_attention_rows` searches the table anew on
a GPU and prints it in this form. Nothing here may depend on the batch: another tile sums in another order, and a
sample's rows would change with its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal, Protocol

# What multiplies the tiles: mma.sync (sm_80, 86, 89, 120), wgmma (sm_90), tcgen05 (sm_100, 103, 110).
Family = Literal["mma", "wgmma", "tcgen05"]


class Tiles(Protocol):
    """What the options of a launch are taken from."""

    @property
    def warps(self) -> int: ...

    @property
    def stages(self) -> int: ...

    @property
    def registers(self) -> int | None: ...


@dataclass(frozen=True)
class LseConfig:
    """`partial_lse`: a tile of `block_m` packed (head, row) queries by `block_n` keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 2
    slice: int = 0
    # Most registers per thread. 128 lets two programs of 8 warps share an SM; where the assembler would by itself stop
    # at 128 and use the stack, a higher bound keeps it from that.
    registers: int | None = None
    # Programs that an SM holds at once, for the work model.
    resident: int = 2


@dataclass(frozen=True)
class RowsConfig:
    """`reduce_rows`: a tile of `heads` heads x `block_r` rows by `block_n` keys.

    `pair`: 2 where the accumulator folds pairs of heads; not on tcgen05, whose threads own whole rows. `fold`: how
    often the warps go over the tile, where their turns are heads. `slice`: columns of D that are copied and multiplied
    at a time; 0 for all of them.
    """

    block_r: int
    heads: int
    block_n: int
    warps: int
    pair: int = 2
    fold: int = 1
    stages: int = 2
    slice: int = 0
    registers: int | None = None


# By the number of queries of one key/value head, group * rows: at most 16, at most 64, more.
LSE: dict[tuple[Family, int], LseConfig] = {
    ("mma", 16): LseConfig(16, 128, 4),
    ("mma", 64): LseConfig(64, 64, 4),
    ("mma", 128): LseConfig(128, 64, 8, registers=168),
    ("wgmma", 16): LseConfig(16, 128, 4, registers=224),
    ("wgmma", 64): LseConfig(64, 128, 4),
    ("wgmma", 128): LseConfig(128, 128, 8, registers=128),
    ("tcgen05", 16): LseConfig(16, 128, 4),
    ("tcgen05", 64): LseConfig(64, 64, 4),
    ("tcgen05", 128): LseConfig(128, 64, 8),
}

# By rows: at most 8, 16, more. Slices make the tiles independent of the head size.
ROWS: dict[tuple[Family, int], RowsConfig] = {
    ("mma", 8): RowsConfig(8, 8, 64, 4, stages=3),
    ("mma", 16): RowsConfig(16, 8, 64, 8, stages=3),
    ("mma", 32): RowsConfig(32, 8, 64, 8, fold=2, stages=3, registers=255),
    ("wgmma", 8): RowsConfig(8, 8, 64, 4, stages=4),
    ("wgmma", 16): RowsConfig(16, 8, 128, 8, stages=3),
    ("wgmma", 32): RowsConfig(32, 8, 128, 8, fold=2, stages=3),
    ("tcgen05", 8): RowsConfig(8, 8, 64, 4, pair=1, stages=3),
    ("tcgen05", 16): RowsConfig(16, 8, 64, 4, pair=1, stages=3),
    ("tcgen05", 32): RowsConfig(32, 4, 128, 8, pair=1, stages=3),
}

# D in slices, one small tile for every card: for float32, which has no tensor-core path in IEEE arithmetic, and for
# rows that are not 16-byte aligned, whose narrow loads would put larger tiles on the stack.
LSE_SLICED = LseConfig(32, 64, 4, stages=1, slice=16, registers=224)
ROWS_SLICED = RowsConfig(16, 2, 64, 4, stages=1, slice=16, registers=168)
# One head per tile (heads not reduced, or a group of one) reads more than it multiplies: any tile will do.
ROWS_ONE_HEAD = RowsConfig(32, 1, 64, 4, pair=1, registers=168)

# Keys per block of packed and paged tensors: their bounds and pages take registers that wider tiles have not left.
NARROW = 64


def family(capability: tuple[int, int]) -> Family:
    """The class of a card; unknown ones get the tiles that ask for least."""
    return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(capability[0], "mma")  # type: ignore[return-value]


@cache
def lse_config(capability: tuple[int, int], queries: int, sliced: bool, dense: bool = True) -> LseConfig:
    """Tiles of `partial_lse` for `queries` = group * rows; `dense`: of tensors neither packed nor paged."""
    if sliced:
        return LSE_SLICED
    config = LSE[family(capability), next((most for most in (16, 64) if queries <= most), 128)]
    return config if dense else replace(config, block_n=NARROW)


@cache
def rows_config(
    capability: tuple[int, int], depth: int, rows: int, group: int, sliced: bool, dense: bool = True
) -> RowsConfig:
    """Tiles of `reduce_rows` for a sum over `group` heads (1: heads are not reduced); `dense` as above."""
    if sliced:
        config = ROWS_SLICED
    else:
        config = ROWS[family(capability), next((most for most in (8, 16) if rows <= most), 32)]
        if depth % 64 == 0:
            config = replace(config, slice=64)
        elif depth > 96 or depth % 32 == 0:
            config = replace(config, slice=32)
        else:
            config = replace(config, stages=2)
        if not dense:
            config = replace(config, block_n=NARROW)
    if group == 1:
        return replace(ROWS_ONE_HEAD, slice=config.slice, stages=config.stages)
    # A tile needs 16 queries; more heads than the group has would be idle.
    heads = min(config.heads, max(1 << (group - 1).bit_length(), 16 // config.block_r))
    return replace(config, heads=heads, fold=min(config.fold, max(1, heads // config.pair)))


# Costs of the work model, in units of one tile of scores: starting a program (its queries and the pipeline's first
# tiles are waited for), and one more chunk for `combine_lse` to read.
START, JOIN = 1.0, 1 / 64


@lru_cache(maxsize=1024)
def chunk_length(length: int, block: int, tiles: int, resident: int, processors: int) -> int:
    """Of `length` keys or queries, how many a program takes, a multiple of `block`: the split of least modelled time
    for one sample.

    `tiles` programs share a chunk. Long chunks leave processors idle in the last wave, short ones start too often.
    """
    slots = processors * resident
    blocks = -(-length // block)

    def cost(per_chunk: int) -> float:
        chunks = -(-blocks // per_chunk)
        return -(-chunks * tiles // slots) * (per_chunk + START) + JOIN * chunks

    candidates = {-(-blocks // max(1, waves * slots // tiles)) for waves in range(1, 9)}
    return min(sorted(candidates), key=cost) * block
