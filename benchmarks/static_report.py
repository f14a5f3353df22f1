"""What the kernels compile to for six architectures, and how fast the cards could run them at best: no GPU is needed.

`make static-report` rewrites `static_report.md` beside it with the figures of two Tritons, the locked one and that of a
card's PyTorch, so that a change for the worse shows in a diff; `--check` instead exits with 1 if anything uses the
stack or shared memory beyond its limit, or if threads that are neighbours read what is not. Each row ends with a hash
of all that it was compiled from: what has not changed since is taken from the report, here and in tests.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.attention_rows import ANCHOR, Shape
from hide_kernels.launch import Launch
from hide_kernels.testing.offline import (
    SHARED_LIMIT,
    Usage,
    compile_launch,
    fingerprint,
    planned,
    planned_maps,
    planned_received,
)

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
RAW = {"softmax": False, "softcap": 9.0, "row_reduction": "sum"}
# (name, head size, rows, further arguments of `planned`). All but one are causal and padded, which takes the most
# registers.
CONFIGURATIONS: list[tuple[str, int, int, dict[str, Any]]] = [
    *((f"bf16 D {depth} R {rows}", depth, rows, {}) for depth in (64, 80, 128, 256) for rows in (8, 16, 32)),
    ("bf16 D 72 R 16", 72, 16, {}),
    ("bf16 D 96 R 32", 96, 32, {}),
    ("bf16 D 128 R 1, no mask", 128, 1, {"masked": False}),
    ("bf16 D 128 R 32, heads apart", 128, 32, {"head_reduction": "none"}),
    ("bf16 D 128 R 32, raw, softcap, rows summed", 128, 32, RAW),
    ("bf16 D 128 R 32, raw, added, kv groups", 128, 32, {**RAW, "head_reduction": "kv_group", "accumulate": True}),
    ("bf16 D 128 R 32, weights", 128, 32, {"head_reduction": torch.empty(28, device="meta")}),
    ("bf16 D 128 R 32, not aligned", 128, 32, {"unaligned": True}),
    (
        "fp16 D 128 R 32, weights, not aligned",
        128,
        32,
        {"dtype": torch.float16, "head_reduction": torch.empty(28, device="meta"), "unaligned": True},
    ),
    ("fp32 D 128 R 32", 128, 32, {"dtype": torch.float32}),
    *((f"bf16 D 128 R {rows}, packed", 128, rows, {"packed": True}) for rows in (8, 16, 32)),
    *((f"bf16 D {depth} R 32, packed, paged", depth, 32, PAGED) for depth in (64, 80, 256)),
    *((f"bf16 D 128 R {rows}, packed, paged", 128, rows, PAGED) for rows in (8, 16, 32)),
    ("bf16 D 256 R 8, packed, paged", 256, 8, PAGED),
    ("bf16 D 256 R 16, packed, paged", 256, 16, PAGED),
    ("bf16 D 128 R 32, paged", 128, 32, {"block_size": 16}),
    ("bf16 D 128 R 32, packed, paged, heads apart", 128, 32, {**PAGED, "head_reduction": "none"}),
    ("fp32 D 128 R 32, packed, paged", 128, 32, {**PAGED, "dtype": torch.float32}),
]


CAUSAL_MEAN = {"masked": True, "reduction": "mean"}
WINDOWS = {"heads": 16, "kv_heads": 16, "packed": True, "length": 64, "batch": 8, "reduction": "mean"}
# (name, arguments of `planned_received`).
RECEIVED: list[tuple[str, dict[str, Any]]] = [
    *((f"bf16 D {depth}, causal, mean", {"depth": depth, **CAUSAL_MEAN}) for depth in (64, 80, 128, 256)),
    ("bf16 D 128, max, no mask", {"reduction": "max"}),
    ("bf16 D 72, packed windows of 64, mean", {"depth": 72, **WINDOWS}),
    ("bf16 D 128, causal, mean, packed, paged", {**PAGED, **CAUSAL_MEAN}),
    ("fp32 D 128, causal, mean", {"dtype": torch.float32, **CAUSAL_MEAN}),
]

# Types of the rows that token_maps reads; the other three kernels of it are the same for all.
MAP_KERNELS = ("scan_rows", "smooth_rows", "subtract_prior", "normalise_maps")
MAP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@functools.cache
def launches(capability: tuple[int, int]) -> list[tuple[str, Launch]]:
    """All that the report has of a card, for a model of 28 heads in 4 groups: the name of a row, and its launch."""
    found: list[tuple[str, Launch]] = []
    for name, depth, rows, arguments in CONFIGURATIONS:
        own = planned(capability, depth=depth, rows=rows, **{"masked": True, **arguments})
        found += [(name, launch) for launch in own if launch.kernel.fn.__name__ != "combine_lse"]
    found.append(("any", planned(capability)[1]))
    for name, settings in RECEIVED:
        own = planned_received(capability, **settings)
        found += [(name, launch) for launch in own if launch.kernel.fn.__name__ == "receive"]
    found.append(("any mean", planned_received(capability, reduction="mean")[-1]))
    card = {"capability": capability}
    found += [(f"{name} rows", planned_maps((95, 170), dtype=dtype, **card)[0]) for name, dtype in MAP_DTYPES.items()]
    return found + [("any", launch) for launch in planned_maps((95, 170), **card)[1:]]


@functools.cache
def committed() -> dict[str, Usage]:
    """The usages in the report by the hash of what they were compiled from."""
    rows = [[cell.strip() for cell in line.split("|")] for line in REPORT.read_text().splitlines() if "` |" in line]
    return {row[-2].strip("`"): Usage(row[2], *map(int, row[4:-2])) for row in rows}


def usage(launch: Launch, capability: tuple[int, int]) -> Usage:
    """As the report has it, or compiled now where the report is of another kernel."""
    return committed().get(fingerprint(launch, capability)) or compile_launch(launch, capability)


def acceptable(usage: Usage, capability: tuple[int, int], name: str) -> bool:
    """Nothing on the stack for 16-bit types and D <= 128, 32 bytes elsewhere, shared memory fits, all is coalesced.

    Four programs of `token_maps` share a multiprocessor.
    """
    if usage.uncoalesced:
        return False
    if usage.kernel in MAP_KERNELS:
        return not usage.stack and usage.registers <= 128 and usage.shared <= SHARED_LIMIT[capability] // 4
    stack = 32 if name.startswith("fp32") or "D 256" in name else 0
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


def report(usages: Sequence[Compiled]) -> str:
    """The committed table, a row of each Triton below the other."""
    lines = [
        "# What the Triton kernels compile to",
        "",
        "Written by `make static-report` (compiled offline, nothing was run); those of attention_rows as causal with "
        "padding, 28 heads in 4 groups; `receive` and `join_heads` are attention_received's; those of token_maps, from "
        "`scan_rows` on, are the same for every size, sigma and number of images. mma, wgmma, tcgen05: tensor-core "
        "instructions in the machine code. uncoalesced: accesses whose neighbouring threads do not lie along the "
        "columns. The last column is a hash of what was compiled.",
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
            "| configuration | kernel | Triton | registers | stack | shared | mma | wgmma | tcgen05 | instructions "
            "| uncoalesced | hash |",
            "|---" * 12 + "|",
        ]
        own = sorted((row for row in usages if row.capability == capability), key=lambda row: row.number)
        for row in own:
            name = launches(capability)[row.number][0]
            kernel, *figures = astuple(row.usage)
            cells = [name, kernel, row.triton, *map(str, figures), f"`{row.hash}`"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Compiled:
    """What one launch of the report compiled to. The hash is Triton's own, so it is taken where that Triton is."""

    capability: tuple[int, int]
    number: int
    triton: str
    usage: Usage
    hash: str

    @classmethod
    def here(cls, capability: tuple[int, int], number: int) -> Compiled:
        import triton

        launch = launches(capability)[number][1]
        return cls(capability, number, triton.__version__, usage(launch, capability), fingerprint(launch, capability))

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Compiled:
        own = {**fields, "capability": tuple(fields["capability"]), "usage": Usage(**fields["usage"])}
        return cls(**own)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the figures of this Triton there as JSON alone"
    )
    parser.add_argument("--beside", type=Path, metavar="FILE", help="such a file of another Triton, for the report")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    arguments = parser.parse_args()
    jobs = [(capability, number) for capability in CARDS for number in range(len(launches(capability)))]
    usages: list[Compiled] = []
    bad = 0
    with ProcessPoolExecutor(arguments.workers) as pool:
        for found in tqdm(pool.map(Compiled.here, *zip(*jobs, strict=True)), total=len(jobs), disable=None):
            usages.append(found)
            name = launches(found.capability)[found.number][0]
            if not acceptable(found.usage, found.capability, name):
                print(f"sm_{found.capability[0]}{found.capability[1]} {name}: {found.usage}")
                bad += 1
    if arguments.save:
        arguments.save.write_text(json.dumps([asdict(row) for row in usages]), encoding="utf-8")
    elif not arguments.check:
        if arguments.beside:
            usages = [*map(Compiled.read, json.loads(arguments.beside.read_text(encoding="utf-8"))), *usages]
        REPORT.write_text(report(usages), encoding="utf-8")
        print(f"written to {REPORT}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
