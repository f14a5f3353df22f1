"""`attention_received` beside SDPA's forward, which sees as many pairs, and the expression with the whole matrix.

8,192 queries and keys, causal and not: `python -m benchmarks.attention_received`, one core (`--save` keeps the result);
`--device cuda` for a GPU, with a 7B's 28 heads, and there beside flash-colreduce 0.2.2 where that is installed. It runs
on CUDA alone and knows no grouped heads, so that it gets keys repeated; nor chosen columns, windows, softcaps, packed
or paged keys; its sums are float atomics. Errors are the largest relative ones to float64 over all keys. Exit code 1 if
a check fails, or if on the host ours takes more than 1.5 times SDPA's time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import (
    WITHHELD,
    Failure,
    alone,
    cuda_times,
    interleaved_cpu_times,
    new_memory,
    spread,
)
from hide.texts import named
from hide_kernels import attention_received
from hide_kernels.testing.cases import RECEIVED_CASES, RECEIVED_SERVING_CASES, received_error_of

# (query heads, key/value heads, head size), dtype and queries, which are as many as keys.
SHAPES: dict[str, tuple[tuple[int, int, int], torch.dtype, int]] = {
    "cpu": ((4, 4, 64), torch.float32, 8_192),
    "cuda": ((28, 4, 128), torch.bfloat16, 8_192),
}
SLOWEST = 1.5  # times SDPA's forward


def inputs(device: str, sizes: tuple[int, int, int], dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor]:
    """Query (1, Hq, N, D) and key (1, Hkv, N, D)."""
    heads, kv_heads, depth = sizes
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, h, length, depth, generator=generator) for h in (heads, kv_heads))
    return query.to(device, dtype), key.to(device, dtype)


def eager(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """The mean of the matrix's columns over the queries that see each key, then over heads: N x N per head."""
    length = key.shape[2]
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * query.shape[-1] ** -0.5
    seen = torch.full((length,), length, device=key.device)
    if causal:
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1), -torch.inf)
        seen = torch.arange(length, 0, -1, device=key.device)
    dtype = torch.promote_types(torch.float32, scores.dtype)
    return (torch.softmax(scores, -1, dtype=dtype).sum(2) / seen).mean(1)


def exact(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """The same in float64, of one head after another."""
    group = query.shape[1] // key.shape[1]
    total = torch.zeros(key.shape[0], key.shape[2], dtype=torch.float64, device=key.device)
    for head in range(query.shape[1]):
        one, keys = query[:, head, None].double(), key[:, head // group, None].double()
        total += eager(one, keys, causal)
    return total / query.shape[1]


def colreduce(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """flash-colreduce's means over queries, of keys that are repeated for their heads, and then over heads."""
    try:
        from flash_colreduce import flash_colreduce
    except ImportError:
        raise ImportError("not installed: pip install flash-colreduce==0.2.2") from None
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    found: Tensor = flash_colreduce(query, repeated, reduction="mean", is_causal=causal)
    return found.float().mean(1)


def sdpa_lse(query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """The log-sum-exp that PyTorch's FlashAttention for the CPU keeps; `None` elsewhere."""
    if query.device.type != "cpu" or query.shape[1] != key.shape[1]:
        return None
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: Tensor = fused(query, key, key, is_causal=causal)[1]
    return found


def variants(query: Tensor, key: Tensor, causal: bool) -> dict[str, Callable[[], Tensor]]:
    """The calls that are compared; SDPA's with the keys for values."""
    mask = {"q_positions": torch.arange(key.shape[2], device=key.device), "causal": True} if causal else {}
    received = partial(attention_received, query, key, reduction="mean", **mask)
    calls: dict[str, Callable[[], Tensor]] = {"attention_received": lambda: received().received}
    if (lse := sdpa_lse(query, key, causal)) is not None:
        calls["attention_received, lse given"] = lambda: received(lse=lse).received
    calls["SDPA's forward"] = partial(
        scaled_dot_product_attention, query, key, key, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
    )
    calls["whole matrix"] = partial(eager, query, key, causal)
    return calls


def error_of(call: Callable[[], Tensor], want: Tensor) -> float | None:
    """The largest relative error of a key; `None` for what SDPA returns."""
    found = call()
    return None if found.shape != want.shape else (found.double() / want - 1).abs().max().item()


def failures(device: str) -> Iterator[Failure]:
    """The correctness gate: calls of every kind whose error exceeds the budget."""
    backend = "triton" if device == "cuda" else "torch"
    for case in [*RECEIVED_CASES, *RECEIVED_SERVING_CASES]:
        for dtype in (torch.bfloat16,) if device == "cuda" else (torch.bfloat16, torch.float32):
            name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
            try:
                much = max(received_error_of(case, dtype, device, backend=backend))
            except Exception as error:
                yield Failure(name, backend, named(error), ("attention_received",))
                continue
            if not much <= 1:
                yield Failure(name, backend, f"{much:.2f} times the budget", ("attention_received",))


def whole_table(device: str, runs: int = 3) -> list[dict[str, Any]]:
    """Milliseconds and new memory of each variant, measured in turn; the matrix in memory where there is room."""
    table = []
    for causal in (False, True):
        given = inputs(device, *SHAPES[device])
        calls, want = variants(*given, causal), exact(*given, causal)
        times = interleaved_cpu_times(calls, runs)
        for name, call in calls.items():
            row = {"variant": name, "causal": causal, "new_bytes": new_memory(call, device)}
            row["error"] = error_of(call, want)
            table.append({**row, "milliseconds": times[name]})
    return table


def gpu_table(seconds: float, device: str = "cuda", withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Milliseconds and new memory of each variant; takes some seconds."""
    for causal in (False, True):
        given = inputs(device, *SHAPES["cuda"])
        want = exact(*given, causal)
        calls = variants(*given, causal) | {"flash-colreduce, keys repeated": partial(colreduce, *given, causal)}
        for name, call in calls.items():
            row = {"variant": name, "causal": causal}
            if name.startswith("attention_received") and "attention_received" in withheld:
                yield {**row, "skipped": WITHHELD}
                continue
            try:
                error = error_of(call, want)
                times = cuda_times(call, runs=20)
                milliseconds = {point: microseconds / 1e3 for point, microseconds in times.items()}
                yield {**row, "new_bytes": new_memory(call, device), "error": error, "milliseconds": milliseconds}
            except Exception as error:
                yield {**row, "failed" if name.startswith("attention_received") else "skipped": named(error)}


def ratios(table: list[dict[str, Any]]) -> dict[str, float]:
    """Of ours without lse: time over SDPA's, and new memory over that of the whole matrix (less is better)."""
    found = {}
    for causal in (False, True):
        rows = {row["variant"]: row for row in table if row["causal"] == causal}
        ours, which = rows["attention_received"], "causal" if causal else "every key"
        other = rows["SDPA's forward"]["milliseconds"]["median"]
        found[f"time over SDPA's, {which}"] = ours["milliseconds"]["median"] / other
        found[f"memory over the matrix's, {which}"] = ours["new_bytes"] / rows["whole matrix"]["new_bytes"]
    return found


def within_limit(table: list[dict[str, Any]]) -> bool:
    """Ours takes at most 1.5 times as long as SDPA, and a fiftieth of the matrix's memory."""
    found = ratios(table)
    return all(value <= (SLOWEST if name.startswith("time") else 0.02) for name, value in found.items())


def line(row: dict[str, Any]) -> str:
    """One row of the table as text."""
    what = f"{row['variant']:<30} {'causal' if row['causal'] else 'every key':<9}"
    if "milliseconds" not in row:
        return f"{what} {row.get('failed') or row['skipped']}"
    wrong = f"  error {row['error']:.1e}" if row["error"] is not None else ""
    return f"{what} {spread(row['milliseconds'], 'ms')}  new {row['new_bytes'] / 1e6:.2f} MB{wrong}"


if __name__ == "__main__":
    sys.exit(alone(sys.modules[__name__], 60))
