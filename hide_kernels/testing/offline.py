"""Compile Triton launches for cards that are not there, and read from the machine code what they use.

Triton's own path from arguments to machine code runs, with a driver that names the wanted card instead of asking for
one: what is compiled, and how often, is what a machine with that card would compile.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hide_kernels.attention_received import triton_launch as received_launch
from hide_kernels.attention_received.request import Reduction
from hide_kernels.attention_received.triton_configs import ReceiveConfig
from hide_kernels.attention_rows import triton_launch
from hide_kernels.attention_rows.request import RowRequest
from hide_kernels.launch import Launch
from hide_kernels.token_maps import triton_launch as map_launch
from hide_kernels.token_maps.api import FLAT

# Shared memory that a program may have, in bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {
    (8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448, (12, 0): 101_376,
}  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses: registers and stack bytes per thread, shared memory per program, instructions.

    `uncoalesced`: accesses of two-dimensional tiles to global memory whose neighbouring threads do not lie along the
    columns, where elements are adjacent.
    """

    kernel: str
    registers: int
    stack: int
    shared: int
    mma: int
    wgmma: int
    tcgen05: int
    instructions: int
    uncoalesced: int


class _Driver:
    """As much of a Triton driver as compiling takes. `device` is the key of Triton's cache of compiled kernels."""

    def __init__(self, capability: tuple[int, int], device: object) -> None:
        self.architecture = 10 * capability[0] + capability[1]
        self.device = device

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def target(capability: tuple[int, int], device: object = None) -> Iterator[None]:
    """Inside, Triton compiles for a card of this compute capability; nothing can be launched.

    What was compiled is kept under `device` (default: the capability).
    """
    from triton.runtime.driver import driver

    previous = driver._active  # `reset_active` would look for a card
    driver.set_active(_Driver(capability, capability if device is None else device))
    try:
        yield
    finally:
        driver._active = previous


def planned(
    capability: tuple[int, int],
    *,
    processors: int = 132,
    accumulate: bool = False,
    **arguments: Any,
) -> list[Launch]:
    """The launches of `attention_rows` for tensors that `_meta_request` describes, on such a card."""
    settings = {name: arguments.pop(name) for name in ("lse_tiles", "rows_tiles") if name in arguments}
    query, key, request = _meta_request(**arguments)
    out = torch.empty(request.shape, device="meta")
    card = triton_launch.Card.of(capability, processors)
    return triton_launch.plan(query, key, request, None, out, accumulate, card, **settings)[0]


def planned_received(
    capability: tuple[int, int],
    *,
    reduction: Reduction = "sum",
    processors: int = 132,
    accumulate: bool = False,
    tiles: ReceiveConfig | None = None,
    **arguments: Any,
) -> list[Launch]:
    """The launches of `attention_received` for such tensors, of as many queries as keys where no `rows` are given."""
    settings = {"rows": arguments.get("length", 16_384), "row_reduction": "sum", **arguments}
    query, key, request = _meta_request(**settings)
    out = torch.empty(request.shape, device="meta")
    card = triton_launch.Card.of(capability, processors)
    return received_launch.plan(query, key, request, reduction, None, out, accumulate, card, tiles=tiles)[0]


def _meta_request(
    *,
    batch: int = 1,
    heads: int = 28,
    kv_heads: int = 4,
    rows: int = 32,
    depth: int = 128,
    length: int = 16_384,
    dtype: torch.dtype = torch.bfloat16,
    spans: list[list[tuple[int, int]]] | None = None,
    masked: bool = False,
    key_heads_apart: bool = False,
    packed: bool = False,
    block_size: int = 0,
    unaligned: bool = False,
    **arguments: Any,
) -> tuple[Tensor, Tensor, RowRequest]:
    """Query and key on the "meta" device and the request for them; defaults are Qwen2.5-VL-7B's.

    `spans` are per sample. `masked` is causal with padding. Keys lie as (B, N, H, D), or as (B, H, N, D) with
    `key_heads_apart`. `packed`: the rows of all samples are packed, and the keys too where there is no `block_size`;
    with one, keys are paged, heads first with `key_heads_apart`.
    """
    query = torch.empty(batch, heads, rows, depth, dtype=dtype, device="meta")
    key = torch.empty(batch, kv_heads, length, depth, dtype=dtype, device="meta")
    if not key_heads_apart:
        width = depth + 3 if unaligned else depth
        key = torch.empty(batch, length, kv_heads, width, dtype=dtype, device="meta")[..., :depth].transpose(1, 2)
    layout: dict[str, Any] = {}
    if packed:
        query = query.transpose(1, 2).flatten(0, 1)
        layout |= {"cu_seqlens_q": torch.empty(batch + 1, dtype=torch.int32, device="meta"), "max_seqlen_q": rows}
    if block_size:
        shape = (9, kv_heads, block_size, depth) if key_heads_apart else (9, block_size, kv_heads, depth)
        key = torch.empty(shape, dtype=dtype, device="meta")
        key = key.transpose(1, 2) if key_heads_apart else key
        pages = -(-length // block_size)
        layout |= {"block_table": torch.empty(batch, pages, dtype=torch.int32, device="meta"), "max_seqlen_k": length}
    elif packed:
        key = key.transpose(1, 2).flatten(0, 1)
        layout |= {"cu_seqlens_k": torch.empty(batch + 1, dtype=torch.int32, device="meta"), "max_seqlen_k": length}
    positions = (batch * rows,) if packed else (batch, rows)
    request = RowRequest.of(
        query,
        key,
        **layout,
        spans=[[(0, length)]] * batch if spans is None else spans,
        q_positions=torch.empty(positions, dtype=torch.int64, device="meta") if masked else None,
        causal=masked,
        window=None,
        kv_starts=None,
        kv_lens=torch.empty(batch, dtype=torch.int64, device="meta") if masked else None,
        scale=arguments.pop("scale", depth**-0.5),
        softcap=arguments.pop("softcap", None),
        softmax=arguments.pop("softmax", True),
        head_reduction=arguments.pop("head_reduction", "mean"),
        row_reduction=arguments.pop("row_reduction", None),
    )
    return query, key, request


def planned_maps(
    *shapes: tuple[int, int],
    rows: int = 56,
    prior_rows: int = 8,
    sigma: float = 3.0,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    capability: tuple[int, int] = (9, 0),
) -> list[Launch]:
    """The launches of `token_maps` for images of these grids on a card; `strided` tensors have the rows last."""
    images = [
        torch.empty(h, w + 1, rows, dtype=dtype, device="meta")[:, 1:].permute(2, 0, 1)
        if strided
        else torch.empty(rows, h, w, dtype=dtype, device="meta")
        for h, w in shapes
    ]
    tokens = rows - prior_rows
    out = torch.empty(tokens * sum(h * w for h, w in shapes), device="meta")
    index, valid = (torch.empty(tokens, dtype=dtype, device="meta") for dtype in (torch.int64, torch.bool))
    return map_launch.plan(images, prior_rows, sigma, FLAT, out, index, valid, capability)


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Usage:
    """Compile one launch (tensors may be on the "meta" device) and read its machine code."""
    with target(capability):
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    return usage_of(launch.kernel.fn.__name__, compiled)


def variants(launches: Sequence[Launch], capability: tuple[int, int]) -> list[tuple[str, str]]:
    """Kernel and specialization (types, constants, options) that Triton would compile for each launch. Builds none."""
    from triton import knobs

    found = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append((fn.name, compile["specialization_data"]))
        return True  # "compiled elsewhere": nothing is built

    previous = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        with target(capability, object()):
            for launch in launches:
                launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    finally:
        knobs.runtime.jit_cache_hook = previous
    return found


def compilations(launches: Sequence[Launch], capability: tuple[int, int]) -> int:
    """How many variants of kernels Triton would compile for these launches in a fresh process. Builds none."""
    return len(set(variants(launches, capability)))


def fingerprint(launch: Launch, capability: tuple[int, int]) -> str:
    """Hash of all that decides the machine code: Triton's version, the kernel and what it calls, its specialization."""
    import triton

    ((_, specialization),) = variants([launch], capability)
    described = json.loads(specialization)
    # A path of this machine.
    described["options"].pop("extern_libs", None)
    text = "\n".join((triton.__version__, launch.kernel.cache_key, json.dumps(described, sort_keys=True)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sass(cubin: bytes, option: str = "-sass") -> str:
    """Machine code as text; with "-res-usage" what it takes."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def opcodes(code: str) -> list[str]:
    """The instructions of `sass` in order, without operands."""
    # An instruction stands after its address in a comment; @P0 and the like before it are predicates.
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)", code)


def uncoalesced(ttgir: str) -> int:
    """`Usage.uncoalesced` of a kernel in Triton's GPU representation. A layout that is not known counts."""
    blocked = r"^(#\w+) = #ttg\.blocked<\{.*threadsPerWarp = \[\d+, (?!1\])\d+\].*order = \[1, 0\]"
    along_columns = set(re.findall(blocked, ttgir, re.MULTILINE))
    access = r"(?:tt\.load|tt\.store|ttg\.async_copy_global_to_local)\b.*tensor<\d+x\d+x!tt\.ptr<\w+>, (#\w+)>"
    return sum(layout not in along_columns for layout in re.findall(access, ttgir))


def usage_of(name: str, compiled: Any) -> Usage:
    """What the kernel of this name uses, from what Triton compiled."""
    cubin = compiled.asm["cubin"]
    usage, instructions = sass(cubin, "-res-usage"), opcodes(sass(cubin))
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))  # type: ignore[index]
    return Usage(
        kernel=name,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        mma=sum(opcode.split(".")[0] in ("HMMA", "IMMA", "DMMA") for opcode in instructions),
        wgmma=sum(opcode.split(".")[0] == "HGMMA" for opcode in instructions),
        tcgen05=sum(opcode.split(".")[0] == "UTCHMMA" for opcode in instructions),
        instructions=len(instructions),
        uncoalesced=uncoalesced(compiled.asm["ttgir"]),
    )
