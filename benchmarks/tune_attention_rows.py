"""Search the tiles of `hide_kernels/attention_rows/triton_configs.py` anew: `python -m benchmarks.tune_attention_rows`.

For the GPU at hand it times each kernel alone, in a graph with a cold L2, over tiles that compile without a stack, and
prints the fastest of each bucket as lines of the tables. A tile is timed only where its rows are right.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.attention_rows import Shape, oracle
from benchmarks.measure import cuda_times
from hide_kernels.attention_rows import triton_launch
from hide_kernels.attention_rows.request import RowRequest
from hide_kernels.attention_rows.triton_configs import LSE, ROWS, LseConfig, RowsConfig, family
from hide_kernels.testing.offline import SHARED_LIMIT, compile_launch


def lse_candidates(bucket: int) -> Iterator[LseConfig]:
    """Tiles of `partial_lse` for a bucket of group * rows; `resident` decides into how many chunks keys are split."""
    block_m = {16: (16,), 64: (64,), 128: (64, 128)}[bucket]
    for m, n, warps, stages, registers, resident in itertools.product(
        block_m, (64, 128), (4, 8), (2, 3, 4), (None, 128, 168), (1, 2, 3)
    ):
        yield LseConfig(m, n, warps, stages=stages, registers=registers, resident=resident)


def rows_candidates(bucket: int) -> Iterator[RowsConfig]:
    """Tiles of `reduce_rows` for a bucket of rows, for one program on a multiprocessor or two."""
    for heads, n, warps, pair, stages, slice_, registers in itertools.product(
        (2, 4, 8), (64, 128), (4, 8), (1, 2), (2, 3, 4), (0, 32, 64), (None, 128)
    ):
        tile = heads * bucket
        if 16 <= tile <= 256:
            fold = max(1, min(tile // (16 * warps), heads // pair))
            yield RowsConfig(
                bucket, heads, n, warps, pair=pair, fold=fold, stages=stages, slice=slice_, registers=registers
            )


def time_of(
    query: Tensor, key: Tensor, want: Tensor, lse_tiles: LseConfig | None, rows_tiles: RowsConfig | None
) -> float | None:
    """Median microseconds of the kernel whose tiles are given; `None` if they use the stack, do not fit, or err."""
    properties = torch.cuda.get_device_properties(query.device)
    capability = (properties.major, properties.minor)
    request = RowRequest.of(
        query, key, spans=[[(0, key.shape[2])]], q_positions=None, causal=False, window=None, kv_starts=None,
        kv_lens=None, scale=query.shape[3] ** -0.5, softcap=None, softmax=True, head_reduction="mean",
        row_reduction=None,
    )  # fmt: skip
    out = torch.full(request.shape, torch.nan, device=query.device)
    launches, _ = triton_launch.plan(
        query, key, request, None, out, False, triton_launch.Card.of(capability, properties.multi_processor_count),
        lse_tiles=lse_tiles, rows_tiles=rows_tiles,
    )  # fmt: skip
    first, last = launches[0], launches[-1]
    chosen = first if lse_tiles else last
    try:
        usage = compile_launch(chosen, capability)
        if usage.stack > (0 if query.shape[3] <= 128 else 32) or usage.shared > SHARED_LIMIT.get(capability, 101_376):
            return None
        for launch in launches:
            launch.run()
        if not (out - want).abs().max() < 1e-4:
            return None
        return cuda_times(chosen.run, runs=30)["median"]
    except Exception as error:  # a tile that cannot be compiled is no candidate
        print(f"# {lse_tiles or rows_tiles}: {type(error).__name__}", file=sys.stderr)
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--keys", type=int, default=16_384)
    keys = parser.parse_args().keys
    if not torch.cuda.is_available():
        print("benchmarks.tune_attention_rows needs a CUDA device, and PyTorch sees none", file=sys.stderr)
        return 2
    own_family = family(torch.cuda.get_device_capability())
    for (name, bucket), now in LSE.items():
        if name == own_family:
            rows = {16: 2, 64: 8, 128: 32}[bucket]
            query, key = Shape("", 28, 4, 128, rows, keys).inputs(torch.bfloat16, "cuda")
            want = oracle(query, key)
            timed = {tiles: time_of(query, key, want, tiles, None) for tiles in {now, *lse_candidates(bucket)}}
            _show(f'("{own_family}", {bucket})', timed, now)
    for (name, bucket), tiles_now in ROWS.items():
        if name == own_family:
            query, key = Shape("", 28, 4, 128, bucket, keys).inputs(torch.bfloat16, "cuda")
            want = oracle(query, key)
            candidates = {replace(tiles_now, slice=64), *rows_candidates(bucket)}
            _show(
                f'("{own_family}", {bucket})',
                {t: time_of(query, key, want, None, t) for t in candidates},
                replace(tiles_now, slice=64),
            )
    return 0


def _show(entry: str, timed: dict, now: LseConfig | RowsConfig) -> None:  # type: ignore[type-arg]
    valid = {tiles: time for tiles, time in timed.items() if time is not None}
    if not valid:
        print(f"    # {entry}: no tile is valid")
        return
    best = min(valid, key=valid.__getitem__)
    print(f"    {entry}: {best},  # {valid[best]:.1f} us, now {valid.get(now, float('nan')):.1f} us")


if __name__ == "__main__":
    sys.exit(main())
