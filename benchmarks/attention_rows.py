"""`attention_rows` beside what people use today, at shapes of real models: one table for a GPU, one for a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import cuda_times, interleaved_cpu_times, new_memory
from hide_kernels import attention_rows
from hide_kernels.testing import error_budget
from hide_kernels.testing.cases import CASES, error_of


@dataclass(frozen=True)
class Shape:
    """One layer of a model: `rows` queries over `keys` keys."""

    model: str
    heads: int
    kv_heads: int
    depth: int
    rows: int
    keys: int

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """Query and key as a cache holds it, (B, N, H, D) in memory."""
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(1, self.heads, self.rows, self.depth, generator=generator)
        key = torch.randn(1, self.keys, self.kv_heads, self.depth, generator=generator)
        return query.to(device, dtype), key.to(device, dtype).transpose(1, 2)


# (query heads, key/value heads, head size) of the language models.
MODELS = {
    "Qwen2.5-VL-7B": (28, 4, 128),
    "Qwen2.5-VL-3B": (16, 2, 128),
    "Qwen2.5-VL-72B": (64, 8, 128),
    "Qwen3-VL-4B and 8B": (32, 8, 128),
    "InternVL3-8B": (28, 4, 128),
    "LLaVA-OneVision-0.5B": (14, 2, 64),
}
ANCHOR = Shape("Qwen2.5-VL-7B", *MODELS["Qwen2.5-VL-7B"], rows=32, keys=16_384)


def shapes() -> list[Shape]:
    """The anchor first, then lengths and rows around it, then the other models."""
    around = [Shape("Qwen2.5-VL-7B", 28, 4, 128, 32, n) for n in (1_024, 4_096, 65_536)]
    around += [Shape("Qwen2.5-VL-7B", 28, 4, 128, r, 16_384) for r in (1, 8, 64, 256)]
    others = [
        Shape(name, *sizes, 32, 16_384)
        for name, sizes in MODELS.items()
        if name not in ("Qwen2.5-VL-7B", "InternVL3-8B")
    ]
    return [ANCHOR, *around, *others]


# Baselines: query (B, Hq, R, D), key (B, Hkv, N, D) -> mean over heads (B, R, N).


def published_loop(query: Tensor, key: Tensor) -> Tensor:
    """(a) As HiDe publishes it (arXiv 2510.00054): keys repeated, 128 rows at a time, head by head.

    Infinite scores become 0, softmax is in float32, heads are summed in the model's type, chunks go to the host.
    """
    heads = query.shape[1]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    chunks = []
    for chunk in query.split(128, dim=2):
        total = torch.zeros((len(chunk), chunk.shape[2], key.shape[2]), dtype=query.dtype, device=query.device)
        for head in range(heads):
            scores = chunk[:, head] @ key[:, head].transpose(1, 2) * query.shape[-1] ** -0.5
            scores = scores.masked_fill(scores.isinf(), 0.0)
            total += torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
        chunks.append((total / heads).float().cpu())
        if query.is_cuda:
            torch.cuda.empty_cache()
    return torch.cat(chunks, 1)


def repeated_keys(query: Tensor, key: Tensor) -> Tensor:
    """(b) The usual expression: keys repeated for every head, whole score matrix, softmax in float32."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    return torch.softmax(scores, -1, dtype=torch.float32).mean(1)


def grouped(query: Tensor, key: Tensor) -> Tensor:
    """(c) The best expression in PyTorch: query heads of a group as rows of one product, scale on the query."""
    batch, heads, rows, depth = query.shape
    kv_heads, length = key.shape[1:3]
    packed = (query * depth**-0.5).reshape(batch, kv_heads, heads // kv_heads * rows, depth)
    scores = packed @ key.transpose(2, 3)
    return torch.softmax(scores, -1, dtype=torch.float32).view(batch, heads, rows, length).mean(1)


def flex_lse(query: Tensor, key: Tensor) -> Callable[[], Tensor]:
    """(d) FlexAttention gives no rows, but their lse, with which `attention_rows` needs one pass."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    compiled = torch.compile(partial(flex_attention, enable_gqa=True, return_aux=AuxRequest(lse=True)), dynamic=False)

    def call() -> Tensor:
        lse = compiled(query, key, key)[1].lse
        return attention_rows(query, key, lse=lse.float()).rows

    return call


# SDPA returns neither rows nor lse: it is not in the tables.


# What is measured, and so what is checked before; the tests check every type.
DTYPES = {"cuda": (torch.bfloat16,), "cpu": (torch.bfloat16, torch.float32)}


def failures(device: str) -> list[str]:
    """The correctness gate: calls of every kind whose error exceeds the budget. Empty: speed may be reported."""
    failed = []
    for case in CASES:
        for dtype in DTYPES[device]:
            try:
                rows, lse = error_of(case, dtype, device, backend=None)
            except Exception as error:
                failed.append(f"{case.name}, {dtype}: {type(error).__name__}: {error}")
                continue
            if not max(rows, lse) <= 1:
                failed.append(f"{case.name}, {dtype}: {rows:.2f} and {lse:.2f} times the budget (rows, lse)")
    return failed


def oracle(query: Tensor, key: Tensor) -> Tensor:
    """Mean rows in float64, head by head."""
    group = query.shape[1] // key.shape[1]
    total = torch.zeros(query.shape[0], query.shape[2], key.shape[2], dtype=torch.float64, device=query.device)
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // group].double().transpose(1, 2) * query.shape[-1] ** -0.5
        total += torch.softmax(scores, -1)
    return total / query.shape[1]


def gpu_table(seconds: float) -> list[dict[str, Any]]:
    """Microseconds, error and new memory of every variant at every shape, until the time is used up."""
    deadline = time.monotonic() + seconds
    table = []
    for shape in shapes():
        if time.monotonic() > deadline:
            table.append({**asdict(shape), "skipped": "out of time"})
            continue
        query, key = shape.inputs(torch.bfloat16, "cuda")
        want = oracle(query, key)
        _, lse = attention_rows(query, key, return_lse=True)
        out = torch.zeros(want.shape, device="cuda")
        variants: dict[str, Any] = {
            "attention_rows": lambda q=query, k=key: attention_rows(q, k).rows,
            "attention_rows, lse given": lambda q=query, k=key, given=lse: attention_rows(q, k, lse=given).rows,
            "attention_rows, out given": lambda q=query, k=key, o=out: attention_rows(q, k, out=o).rows,
            "grouped, eager (c)": lambda q=query, k=key: grouped(q, k),
            "repeated keys (b)": lambda q=query, k=key: repeated_keys(q, k),
        }
        if shape.keys == ANCHOR.keys and shape.rows == ANCHOR.rows:  # compiling takes longer than all runs together
            compiled = torch.compile(grouped, dynamic=False)
            variants["grouped, compiled (c)"] = lambda q=query, k=key, c=compiled: c(q, k)
        if shape == ANCHOR:
            variants["published loop (a)"] = lambda q=query, k=key: published_loop(q, k)
            variants["FlexAttention's lse, then attention_rows (d)"] = flex_lse(query, key)
        for name, call in variants.items():
            # Ours must be within budget at this shape too; a baseline may err as it does.
            budget = error_budget(repeated_keys(query, key), want) if name.startswith("attention_rows") else math.inf
            table.append({**asdict(shape), "variant": name, **_gpu_entry(name, call, want, budget)})
    return table


def _gpu_entry(name: str, call: Callable[[], Tensor], want: Tensor, budget: float) -> dict[str, Any]:
    captured = name != "published loop (a)"  # it copies to the host
    try:
        error = (call().to(want.device, torch.float64) - want).abs().max().item()
        if not error <= budget:
            return {"failed": f"error {error:.1e} above the budget of {budget:.1e}"}
        memory = new_memory(call, "cuda")
        times = cuda_times(call, runs=50 if captured else 5, capture=captured)
    except Exception as failure:  # a baseline that cannot run is a result
        return {"failed": f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"}
    return {"microseconds": times, "graph": captured, "error": error, "new_bytes": memory}


def cpu_table(runs: int, shape: Shape = ANCHOR) -> list[dict[str, Any]]:
    """Milliseconds, error and new memory of ours and (a) to (c), measured in turn."""
    table = []
    for dtype in DTYPES["cpu"]:
        query, key = shape.inputs(dtype, "cpu")
        want = oracle(query, key)
        calls: dict[str, Callable[[], Tensor]] = {
            "attention_rows": lambda q=query, k=key: attention_rows(q, k).rows,  # type: ignore[misc]
            "grouped (c)": partial(grouped, query, key),
            "repeated keys (b)": partial(repeated_keys, query, key),
            "published loop (a)": partial(published_loop, query, key),
        }
        times = interleaved_cpu_times(calls, runs)
        for name, call in calls.items():
            table.append(
                {
                    **asdict(shape),
                    "dtype": str(dtype).removeprefix("torch."),
                    "variant": name,
                    "milliseconds": times[name],
                    "error": (call().double() - want).abs().max().item(),
                    "new_bytes": new_memory(call, "cpu"),
                }
            )
    return table


def line(row: dict[str, Any]) -> str:
    """One row of a table as text."""
    where = f"{row['model']:<22} R {row['rows']:<4} N {row['keys']:<6} {row.get('dtype', 'bfloat16'):<9}"
    if "variant" not in row:
        return f"{where} {row['skipped']}"
    if "failed" in row:
        return f"{where} {row['variant']:<46} {row['failed']}"
    unit = "us" if "microseconds" in row else "ms"
    times = row["microseconds"] if unit == "us" else row["milliseconds"]
    spread = f"{times['median']:9.1f} {unit} ({times['p20']:.1f} to {times['p80']:.1f})"
    return f"{where} {row['variant']:<46} {spread}  error {row['error']:.1e}  new {row['new_bytes'] / 1e6:.2f} MB"
