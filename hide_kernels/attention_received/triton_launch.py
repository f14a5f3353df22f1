"""`attention_received` on Triton: plans the launches of a call from shapes and strides alone, then runs them.

Without lse the first pass of `attention_rows`; then `receive`, once per four key spans and per run of samples that
share them, and `join_heads`. Nothing here waits for the device or depends on what a tensor holds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..attention_rows import triton_launch as rows_launch
from ..attention_rows.request import RowOutput, RowRequest
from ..attention_rows.triton_configs import chunk_length
from ..attention_rows.triton_launch import LOG2_E, Card, Layout
from ..launch import Launch, on_device
from . import triton_kernels as kernels
from .request import AttentionReceived, Reduction
from .triton_configs import ReceiveConfig, receive_config

# Columns of a program of `join_heads`.
JOINED = 128


def attention_received_triton(
    query: Tensor, key: Tensor, request: RowRequest, reduction: Reduction, output: RowOutput
) -> AttentionReceived:
    """The results of a validated request."""
    lse, out = output.lse, output.out
    if out is None:
        out = query.new_empty(request.shape, dtype=torch.float32)
    if lse is None and output.return_lse:
        lse = query.new_empty(request.lse_shape, dtype=torch.float32)
    if request.rows == 0:
        if lse is not None and lse is not output.lse:
            lse.fill_(-math.inf)
        return AttentionReceived(out if output.accumulate else out.zero_(), lse if output.return_lse else None)
    with on_device(query):
        launches, log2_lse = plan(
            query, key, request, reduction, output.lse, out, output.accumulate, rows_launch.card_of(query.device),
            need_lse=output.return_lse,
        )  # fmt: skip
        for launch in launches:
            launch.run()
        if output.return_lse and output.lse is None:
            assert lse is not None and log2_lse is not None
            torch.mul(log2_lse, math.log(2), out=lse)
    return AttentionReceived(out, lse if output.return_lse else None)


def plan(
    query: Tensor,
    key: Tensor,
    request: RowRequest,
    reduction: Reduction,
    lse: Tensor | None,
    out: Tensor,
    accumulate: bool,
    card: Card,
    *,
    need_lse: bool = False,
    tiles: ReceiveConfig | None = None,
) -> tuple[list[Launch], Tensor | None]:
    """The launches, and the lse in log2 units that they compute, if they do.

    Works on any device, also "meta". `tiles` replace the table's choice.
    """
    query, key, request = rows_launch.readable(query), rows_launch.readable(key), rows_launch.contiguous(request)
    launches: list[Launch] = []
    log2_lse = None
    if lse is None and (need_lse or out.numel()):
        launches, log2_lse = rows_launch.plan(
            query, key, request, None, out, False, card, need_rows=False, need_lse=True
        )
        lse = log2_lse
    if not out.numel():
        return launches, log2_lse
    assert lse is not None
    batch, heads, columns = len(request.spans), query.shape[1], request.shape[-1]
    layouts = rows_launch.layouts_of(request)
    shared, masked = rows_launch.shared_arguments(Layout.of(query), Layout.of(key), layouts)
    sliced = rows_launch.sliced(Layout.of(query), shared)
    tiles = tiles or receive_config(card.capability, columns, sliced)
    blocks = -(-columns // tiles.keys)
    per_chunk = chunk_length(request.rows, tiles.queries, blocks * heads, tiles.resident, card.processors)
    chunks = -(-request.rows // per_chunk)
    # A sample may have fewer columns than others.
    whole = all(sum(stop - start for start, stop in spans) == columns for spans in request.spans)
    make = query.new_empty if whole else query.new_zeros
    partial = make((chunks, batch * heads, columns), dtype=torch.float32)
    counts = make(partial.shape, dtype=torch.float32) if reduction == "mean" else None
    lse_strides = (0, *lse.stride())[-3:]
    arguments: dict[str, Any] = {
        **shared,
        "query": query,
        "key": key,
        "lse": lse,
        "positions": request.q_positions if request.causal or request.window is not None else None,
        "starts": request.kv_starts,
        "lens": request.kv_lens,
        "cu_q": request.cu_seqlens_q,
        "cu_k": request.cu_seqlens_k,
        "pages": request.block_table,
        "partial": partial,
        "counts": counts,
        "log2_scale": rows_launch.score_scale(request) * LOG2_E,
        "lse_scale": LOG2_E if log2_lse is None else 1.0,
        "chunk_rows": per_chunk,
        "total": batch * heads,
        "columns": columns,
        **dict(zip(("stride_lb", "stride_lh", "stride_lr"), lse_strides, strict=True)),
        "SLICE": tiles.slice,
        "BLOCK_N": tiles.keys,
        "BLOCK_R": tiles.queries,
        "MAXIMUM": reduction == "max",
        "MASKED": masked,
        **rows_launch.kernel_options(tiles),
        **rows_launch.dependent_options(card),
    }
    for first, samples, column, together in rows_launch.span_launches(request.spans):
        blocks, bounds = rows_launch.span_arguments(together, tiles.keys)
        own = {**bounds, "first_sample": first, "first_column": column}
        launches.append(Launch(kernels.receive, (blocks, chunks, samples * heads), {**arguments, **own}))
    launches.append(_join(request, heads, partial, counts, out, accumulate, card, reduction))
    return launches, log2_lse


def _join(
    request: RowRequest,
    heads: int,
    partial: Tensor,
    counts: Tensor | None,
    out: Tensor,
    accumulate: bool,
    card: Card,
    reduction: Reduction,
) -> Launch:
    chunks, total, columns = partial.shape
    terms = {"none": 1, "kv_group": heads // request.kv_heads}.get(request.reduces, heads)
    weighted = isinstance(request.head_reduction, Tensor)
    arguments = {
        "partial": partial,
        "counts": counts,
        "weights": request.head_reduction if weighted else None,
        "out": out,
        "out_scale": 1.0 if weighted else 1 / terms,
        "terms": terms,
        "total": total,
        "columns": columns,
        "chunks": chunks,
        "stride_ob": out.stride(0),
        "stride_oh": out.stride(1) if out.dim() == 3 else 0,
        "stride_oc": out.stride(-1),
        "BLOCK": JOINED,
        "MAXIMUM": reduction == "max",
        "ACCUMULATE": accumulate,
        "UNIT": out.stride(-1) == 1,
        "num_warps": 4,
        "enable_fp_fusion": False,
        **rows_launch.dependent_options(card),
    }
    return Launch(kernels.join_heads, (-(-columns // JOINED), heads // terms, total // heads), arguments)
