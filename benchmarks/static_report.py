"""What the kernels compile to for six architectures, and how fast the cards could run them at best: no GPU is needed.

`python -m benchmarks.static_report` rewrites `static_report.md` beside it, so that a change for the worse shows in a
diff; `--check` instead exits with 1 if anything uses the stack or shared memory beyond its limit.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_rows import ANCHOR, Shape
from hide_kernels.testing.offline import SHARED_LIMIT, Usage, compile_launch, planned, planned_maps

REPORT = Path(__file__).with_suffix(".md")


@dataclass(frozen=True)
class Card:
    """Data-sheet figures: multiprocessors, boost clock in GHz, memory in TB/s, dense bf16 TFLOP/s with fp32 sums."""

    name: str
    processors: int
    clock: float
    bandwidth: float
    tensor: float


CARDS = {
    (8, 0): Card("A100 80 GB SXM", 108, 1.41, 2.04, 312),
    (8, 6): Card("RTX 3090", 82, 1.70, 0.94, 71),
    (8, 9): Card("L40S", 142, 2.52, 0.86, 362),
    (9, 0): Card("H200 SXM", 132, 1.98, 4.8, 989),
    (10, 0): Card("B200", 148, 1.85, 8.0, 2250),
    (12, 0): Card("RTX 5090", 170, 2.41, 1.79, 210),
}
# exp2 per clock and multiprocessor.
EXPONENTIALS = 16

PAGED = {"packed": True, "block_size": 16}
# (name, head size, rows, further arguments of `planned`). All are causal and padded, which takes the most registers.
CONFIGURATIONS: list[tuple[str, int, int, dict[str, Any]]] = [
    *((f"bf16 D {depth} R {rows}", depth, rows, {}) for depth in (64, 80, 128, 256) for rows in (8, 16, 32, 64)),
    ("bf16 D 128 R 32, heads apart", 128, 32, {"head_reduction": "none"}),
    ("bf16 D 128 R 32, raw, softcap, rows summed", 128, 32, {"softmax": False, "softcap": 9.0, "row_reduction": "sum"}),
    ("bf16 D 128 R 32, weights", 128, 32, {"head_reduction": torch.empty(28, device="meta")}),
    ("bf16 D 128 R 32, not aligned", 128, 32, {"unaligned": True}),
    ("fp32 D 128 R 32", 128, 32, {"dtype": torch.float32}),
    *((f"bf16 D 128 R {rows}, packed", 128, rows, {"packed": True}) for rows in (8, 16, 32, 64)),
    *((f"bf16 D {depth} R 32, packed, paged", depth, 32, PAGED) for depth in (64, 80, 256)),
    *((f"bf16 D 128 R {rows}, packed, paged", 128, rows, PAGED) for rows in (8, 16, 32, 64)),
    ("bf16 D 256 R 8, packed, paged", 256, 8, PAGED),
    ("bf16 D 256 R 16, packed, paged", 256, 16, PAGED),
    ("bf16 D 128 R 32, paged", 128, 32, {"block_size": 16}),
    ("bf16 D 128 R 32, packed, paged, heads apart", 128, 32, {**PAGED, "head_reduction": "none"}),
    ("fp32 D 128 R 32, packed, paged", 128, 32, {**PAGED, "dtype": torch.float32}),
]


def compiled(capability: tuple[int, int], name: str, depth: int, rows: int, arguments: dict[str, Any]) -> list[Usage]:
    """Usage of the two kernels with tiles, for a model of 28 heads in 4 groups."""
    launches = planned(capability, depth=depth, rows=rows, masked=True, **arguments)
    return [compile_launch(launch, capability) for launch in launches if launch.kernel.fn.__name__ != "combine_lse"]


# Types of the rows that token_maps reads; the other three kernels of it are the same for all.
MAP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def compiled_maps(capability: tuple[int, int]) -> list[tuple[str, Usage]]:
    """Type of the rows and usage of the kernels of `token_maps`."""
    scans = [(name, planned_maps((95, 170), dtype=dtype)[0]) for name, dtype in MAP_DTYPES.items()]
    others = [("any", launch) for launch in planned_maps((95, 170))[1:]]
    return [(name, compile_launch(launch, capability)) for name, launch in scans + others]


def acceptable(usage: Usage, capability: tuple[int, int], name: str, depth: int) -> bool:
    """Nothing on the stack for 16-bit types and D <= 128, 32 bytes elsewhere, shared memory fits."""
    stack = 0 if depth <= 128 and "fp32" not in name else 32
    return usage.stack <= stack and usage.shared <= SHARED_LIMIT[capability]


def floors(shape: Shape = ANCHOR) -> list[str]:
    """Work of both passes at one shape in bf16, and the least microseconds that each card needs for it."""
    scores = shape.heads * shape.rows * shape.keys
    flops = 2 * scores * shape.depth
    key_bytes = 2 * shape.kv_heads * shape.keys * shape.depth
    out_bytes = 4 * shape.rows * shape.keys
    lines = [
        f"{shape.model}, {shape.heads} heads in {shape.kv_heads} groups, D {shape.depth}, R {shape.rows}, "
        f"N {shape.keys}, bf16, mean: {flops / 1e9:.2f} GFLOP and {scores / 1e6:.1f} M exponentials per pass, "
        f"{key_bytes / 1e6:.1f} MB of keys, {out_bytes / 1e6:.1f} MB of rows.",
        "",
        "| card | memory | products | exponentials | floor, units overlapped | floor, one after another |",
        "|---|---|---|---|---|---|",
    ]
    for card in CARDS.values():
        # The second pass is taken to find its keys in the L2.
        memory = (key_bytes + out_bytes) / card.bandwidth / 1e6
        products = 2 * flops / card.tensor / 1e6
        exponentials = 2 * scores / (EXPONENTIALS * card.processors * card.clock) / 1e3
        times = memory, products, exponentials, max(memory, products, exponentials), products + exponentials
        lines.append(f"| {card.name} | {' | '.join(f'{t:.1f}' for t in times)} |")
    return lines


def report(
    results: dict[tuple[tuple[int, int], str], list[Usage]], maps: dict[tuple[int, int], list[tuple[str, Usage]]]
) -> str:
    """The committed table."""
    import triton

    lines = [
        "# What the Triton kernels compile to",
        "",
        "Written by `python -m benchmarks.static_report` (compiled offline, nothing was run). "
        f"Triton {triton.__version__}; those of attention_rows as causal with padding, 28 heads in 4 groups. "
        "mma, wgmma, tcgen05: tensor-core instructions in the machine code.",
        "",
        "## Least time, in microseconds, from data sheets",
        "",
        *floors(),
    ]
    for capability in CARDS:
        lines += [
            "",
            f"## sm_{capability[0]}{capability[1]} (shared memory up to {SHARED_LIMIT[capability]} bytes)",
            "",
            "| configuration | kernel | registers | stack | shared | mma | wgmma | tcgen05 | instructions |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for (of, name), usages in results.items():
            for u in usages if of == capability else []:
                figures = (u.registers, u.stack, u.shared, u.mma, u.wgmma, u.tcgen05, u.instructions)
                lines.append(f"| {name} | {u.kernel} | {' | '.join(map(str, figures))} |")
    lines += [
        "",
        "## token_maps, the same for every size, sigma and number of images",
        "",
        "| card | rows | kernel | registers | stack | shared | instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    for capability, usages in maps.items():
        for name, u in usages:
            figures = (u.registers, u.stack, u.shared, u.instructions)
            card = f"sm_{capability[0]}{capability[1]}"
            lines.append(f"| {card} | {name} | {u.kernel} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    arguments = parser.parse_args()
    jobs = [(capability, *configuration) for capability in CARDS for configuration in CONFIGURATIONS]
    with ProcessPoolExecutor(arguments.workers) as pool:
        usages = list(pool.map(compiled, *zip(*jobs, strict=True)))
        maps = dict(zip(CARDS, pool.map(compiled_maps, CARDS), strict=True))
    results = {(job[0], job[1]): found for job, found in zip(jobs, usages, strict=True)}
    bad = [
        f"sm_{capability[0]}{capability[1]} {name}: {usage}"
        for (capability, name, depth, _, _), found in zip(jobs, usages, strict=True)
        for usage in found
        if not acceptable(usage, capability, name, depth)
    ]
    bad += [
        f"sm_{capability[0]}{capability[1]} {name}: {usage}"
        for capability, found in maps.items()
        for name, usage in found
        if usage.stack or usage.shared > SHARED_LIMIT[capability]
    ]
    for problem in bad:
        print(problem)
    if not arguments.check:
        REPORT.write_text(report(results, maps), encoding="utf-8")
        print(f"written to {REPORT}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
