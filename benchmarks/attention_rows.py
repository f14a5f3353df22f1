"""`attention_rows` beside what people use today, at shapes of real models: one table for a GPU, one for a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    NO_TIME,
    WITHHELD,
    Failure,
    cuda_times,
    interleaved_cpu_times,
    new_memory,
    spread,
)
from hide.texts import named
from hide_kernels import attention_rows
from hide_kernels.testing import error_budget
from hide_kernels.testing.cases import CASES, SERVING_CASES, Case, ServingCase, error_of


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


def failures(device: str) -> Iterator[Failure]:
    """The correctness gate: calls of every kind whose error exceeds the budget."""
    for case in [*CASES, *SERVING_CASES]:
        for dtype in DTYPES[device]:
            name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
            backend = "triton" if device == "cuda" else "torch"
            try:
                rows, lse = error_of(case, dtype, device, backend=backend)
            except Exception as error:
                yield Failure(name, backend, named(error), _figures(case))
                continue
            if not max(rows, lse) <= 1:
                much = f"{rows:.2f} and {lse:.2f} times the budget (rows, lse)"
                yield Failure(name, backend, much, _figures(case))


def _figures(case: Case) -> tuple[str, ...]:
    """Whose figures rest on a case: of its layout, all of which are means over heads without a mask."""
    if case.arguments or case.depth not in (shape.depth for shape in shapes()):
        return ()
    if not isinstance(case, ServingCase):
        return ("dense",)
    return ("paged",) if case.block_size else ("packed",)


def _rests_on(variant: str) -> str:
    """The layout that a variant is a figure of; a baseline has none."""
    layouts = {"attention_rows, packed": "packed", "attention_rows, paged": "paged", "attention_rows": "dense"}
    return next((layout for name, layout in layouts.items() if name in variant), "")


def oracle(query: Tensor, key: Tensor) -> Tensor:
    """Mean rows in float64, head by head."""
    group = query.shape[1] // key.shape[1]
    total = torch.zeros(query.shape[0], query.shape[2], key.shape[2], dtype=torch.float64, device=query.device)
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // group].double().transpose(1, 2) * query.shape[-1] ** -0.5
        total += torch.softmax(scores, -1)
    return total / query.shape[1]


def gpu_table(seconds: float, device: str = "cuda", withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Microseconds, error and new memory of every variant at every shape, until the time is used up."""
    deadline = time.monotonic() + seconds
    for shape in shapes():
        if time.monotonic() > deadline:
            yield {**asdict(shape), "skipped": NO_TIME}
            continue
        query, key = shape.inputs(torch.bfloat16, device)
        want, plain = oracle(query, key), repeated_keys(query.float(), key.float())
        out = torch.zeros(want.shape, device=device)
        variants: dict[str, Callable[[], Tensor]] = {
            "attention_rows": lambda q=query, k=key: attention_rows(q, k).rows,  # type: ignore[misc]
            "attention_rows, lse given": made_at_first(partial(lse_given, query, key)),
            "attention_rows, out given": lambda q=query, k=key, o=out: attention_rows(q, k, out=o).rows,  # type: ignore[misc]
            "grouped, eager (c)": partial(grouped, query, key),
            "repeated keys (b)": partial(repeated_keys, query, key),
        }
        if shape.keys == ANCHOR.keys and shape.rows == ANCHOR.rows:  # compiling takes longer than all runs together
            variants["grouped, compiled (c)"] = partial(torch.compile(grouped, dynamic=False), query, key)
        if shape == ANCHOR:
            variants["published loop (a)"] = partial(published_loop, query, key)
            variants["FlexAttention's lse, then attention_rows (d)"] = made_at_first(partial(flex_lse, query, key))
        yield from _measured(asdict(shape), variants, want, plain, withheld, deadline)
    batch = {**asdict(ANCHOR), "model": f"{ANCHOR.model} x {len(REQUESTS)}", "keys": sum(REQUESTS)}
    if time.monotonic() > deadline:
        yield {**batch, "skipped": NO_TIME}
        return
    calls, want, plain = serving_calls(REQUESTS, torch.bfloat16, device)
    yield from _measured(batch, calls, want, plain, withheld, deadline)


def made_at_first(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """A call that is prepared when it is first made, so that what preparing it throws is thrown by the call."""
    made = cache(make)
    return lambda: made()()


def lse_given(query: Tensor, key: Tensor) -> Callable[[], Tensor]:
    """The second pass alone."""
    lse = attention_rows(query, key, return_lse=True).lse
    return lambda: attention_rows(query, key, lse=lse).rows


def _measured(
    about: dict[str, Any],
    calls: dict[str, Callable[[], Tensor]],
    want: Tensor,
    plain: Tensor,
    withheld: Collection[str],
    deadline: float,
) -> Iterator[dict[str, Any]]:
    for name, call in calls.items():
        row = {**about, "variant": name}
        if _rests_on(name) in withheld:
            yield {**row, "skipped": WITHHELD}
        elif time.monotonic() > deadline:
            yield {**row, "skipped": NO_TIME}
        else:
            # Ours must be within budget at this shape too; a baseline may err as it does.
            ours = name.startswith("attention_rows")
            budget = error_budget(plain, want, torch.bfloat16) if ours else math.inf
            yield {**row, **_gpu_entry(name, call, want, budget)}


def _gpu_entry(name: str, call: Callable[[], Tensor], want: Tensor, budget: float) -> dict[str, Any]:
    captured = name != "published loop (a)"  # it copies to the host
    # A baseline that cannot run is a result.
    verdict = "failed" if name.startswith("attention_rows") else "skipped"
    try:
        error = (call().to(want.device, torch.float64) - want).abs().max().item()
        if not error <= budget:
            return {verdict: f"error {error:.1e} above the budget of {budget:.1e}"}
        memory = new_memory(call, want.device.type)
        times = cuda_times(call, runs=50 if captured else 5, capture=captured)
    except Exception as failure:
        return {verdict: named(failure)}
    return {"microseconds": times, "graph": captured, "error": error, "new_bytes": memory}


# Keys of the requests of a batch; 32 rows each.
REQUESTS = (16_384, 9_001, 12_000, 4_096, 2_500, 16_000, 700, 8_192)


def one_by_one(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """(c) for each request, its columns padded to those of the longest: (total rows, N)."""
    longest = max(key.shape[2] for key in keys)
    rows = [grouped(query, key)[0] for query, key in zip(queries, keys, strict=True)]
    return torch.cat([torch.nn.functional.pad(x, (0, longest - x.shape[-1])) for x in rows])


def serving_calls(
    lengths: tuple[int, ...], dtype: torch.dtype, device: str, shape: Shape = ANCHOR, block_size: int = 16
) -> tuple[dict[str, Callable[[], Tensor]], Tensor, Tensor]:
    """Calls for a batch of requests, packed and paged; their rows in float64; those of (b) in float32."""
    each = [Shape(**{**asdict(shape), "keys": keys}).inputs(dtype, device) for keys in lengths]
    queries, keys = [query for query, _ in each], [key for _, key in each]
    packed = torch.cat([query[0].transpose(0, 1) for query in queries])
    bounds = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device) * shape.rows
    sizes = {"cu_seqlens_q": bounds, "max_seqlen_q": shape.rows, "max_seqlen_k": max(lengths)}
    key_bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    packed_keys = torch.cat([key[0].transpose(0, 1) for key in keys])
    # Pages in an order of chance, as after a while of serving.
    pages = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).to(device)
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device=device)
    cache = torch.zeros(sum(pages), block_size, shape.kv_heads, shape.depth, dtype=dtype, device=device)
    for b, (key, own) in enumerate(zip(keys, order.split(pages), strict=True)):
        table[b, : len(own)] = own
        padded = torch.nn.functional.pad(key[0].transpose(0, 1), (0, 0, 0, 0, 0, len(own) * block_size - lengths[b]))
        cache[own] = padded.unflatten(0, (len(own), block_size))
    heads_first = cache.transpose(1, 2).contiguous().transpose(1, 2)
    paged = {"block_table": table, "kv_lens": torch.tensor(lengths, dtype=torch.int32, device=device), **sizes}
    calls: dict[str, Callable[[], Tensor]] = {
        "attention_rows, packed": lambda: attention_rows(packed, packed_keys, cu_seqlens_k=key_bounds, **sizes).rows,
        f"attention_rows, paged, {block_size} keys": lambda: attention_rows(packed, cache, **paged).rows,
        f"attention_rows, paged, {block_size} keys, HND": lambda: attention_rows(packed, heads_first, **paged).rows,
        "grouped, eager, one by one (c)": lambda: one_by_one(queries, keys),
    }
    want, plain = torch.zeros(2, len(packed), max(lengths), dtype=torch.float64, device=device)
    for b, (query, key) in enumerate(each):
        some = slice(b * shape.rows, (b + 1) * shape.rows), slice(0, lengths[b])
        want[some], plain[some] = oracle(query, key)[0], repeated_keys(query.float(), key.float())[0]
    return calls, want, plain


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
    if "error" not in row:
        return f"{where} {row['variant']:<46} {row.get('failed') or row['skipped']}"
    unit = "us" if "microseconds" in row else "ms"
    times = spread(row["microseconds"] if unit == "us" else row["milliseconds"], unit)
    return f"{where} {row['variant']:<46} {times}  error {row['error']:.1e}  new {row['new_bytes'] / 1e6:.2f} MB"
