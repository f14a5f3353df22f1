"""Every `torch.library` registration, and nothing else: schema, kernel, fake and gradient of each operator.

Eager calls without gradients do not come here: they go straight to the implementation, which saves the dispatcher's
time. `torch.compile`, autograd and tensor subclasses do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from ._ops import add_op_namespace_prefix
from .attention_rows.api import run
from .attention_rows.backward import attention_rows_backward
from .attention_rows.reference import without_autocast
from .attention_rows.request import RowRequest

# Spans are flat, start and stop in turn, with the number of spans of each sample. `weights` replaces the word
# `head_reduction`. The second result is the lse that was computed: empty for raw scores and where one was given.
SCHEMA = (
    "(Tensor query, Tensor key, Tensor? q_positions, Tensor? kv_starts, Tensor? kv_lens, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? block_table, Tensor? lse, Tensor? weights, SymInt[] spans, "
    "SymInt[] spans_per_sample, SymInt columns, SymInt? max_seqlen_q, SymInt? max_seqlen_k, str head_reduction, "
    "str? row_reduction, bool causal, SymInt? window, float scale, float? softcap, bool softmax, str? backend) "
    "-> (Tensor, Tensor)"
)


def _request(
    query: Tensor,
    key: Tensor,
    q_positions: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    weights: Tensor | None,
    spans: list[int],
    spans_per_sample: list[int],
    columns: int,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    head_reduction: str,
    row_reduction: Any,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    softmax: bool,
) -> RowRequest:
    pairs = iter(zip(spans[::2], spans[1::2], strict=True))
    reduction: Any = head_reduction if weights is None else weights
    return RowRequest.of(
        query,
        key,
        columns=columns,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        spans=[[next(pairs) for _ in range(count)] for count in spans_per_sample],
        q_positions=q_positions,
        causal=causal,
        window=window,
        kv_starts=kv_starts,
        kv_lens=kv_lens,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        scale=scale,
        softcap=softcap,
        softmax=softmax,
        head_reduction=reduction,
        row_reduction=row_reduction,
    )


@torch.library.custom_op(add_op_namespace_prefix("attention_rows"), mutates_args=(), schema=SCHEMA)
def attention_rows(query, key, *arguments):  # type: ignore[no-untyped-def]
    """The operator: arguments of `SCHEMA` -> (rows, lse); lse is empty where none is computed."""
    *masks, lse, weights = arguments[:8]
    *described, backend = arguments[8:]
    request = _request(query, key, *masks, weights, *described)
    name = backends.resolve("attention_rows", backend, query=query, key=key, **request.layout)
    rows, computed = run(name, query, key, request, lse, request.softmax and lse is None, None, False)
    return rows, rows.new_empty(0) if computed is None else computed


@attention_rows.register_fake
def _(query, key, *arguments):  # type: ignore[no-untyped-def]
    *masks, lse, weights = arguments[:8]
    request = _request(query, key, *masks, weights, *arguments[8:-1])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    computed = request.lse_shape if request.softmax and lse is None else (0,)
    return query.new_empty(request.shape, dtype=dtype), query.new_empty(computed, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, *masks, lse, weights = inputs[:10]
    ctx.described = inputs[10:]
    ctx.lse_given = lse is not None
    ctx.save_for_backward(query, key, *masks, weights, lse if ctx.lse_given else output[1])


def _backward(ctx: Any, grad_rows: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        # The gradients would pass for constants, and second derivatives lack what goes through them.
        raise RuntimeError("attention_rows differentiates once: got create_graph=True, want detached tensors")
    query, key, *masks, weights, lse = ctx.saved_tensors
    described: list[Any] = [*masks, weights, *ctx.described[:-1]]
    request = _request(query, key, *described)
    if not request.dense:
        raise ValueError("query: packed and paged calls record no gradients")
    with without_autocast(query.device):
        gradients = attention_rows_backward(
            grad_rows,
            grad_lse if request.softmax and not ctx.lse_given else None,
            query,
            key,
            lse if request.softmax else None,
            ctx.lse_given,
            request,
        )
    return (gradients.query, gradients.key, *[None] * 6, gradients.lse, gradients.weights, *[None] * 13)


attention_rows.register_autograd(_backward, setup_context=_save)
