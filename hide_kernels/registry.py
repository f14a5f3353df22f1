"""Every `torch.library` registration, and nothing else: schema, kernel, fake and gradient of each operator.

Eager calls without gradients do not come here: they go straight to the implementation, which saves the dispatcher's
time. `torch.compile`, autograd and tensor subclasses do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hide_kernels import backends
from hide_kernels.attention_rows.api import run
from hide_kernels.attention_rows.backward import attention_rows_backward
from hide_kernels.attention_rows.request import RowRequest

# Spans are flat, start and stop in turn, with the number of spans of each sample. `weights` replaces the word
# `head_reduction`. The second result is the lse that was computed: empty for raw scores and where one was given.
SCHEMA = (
    "(Tensor query, Tensor key, Tensor? q_positions, Tensor? kv_starts, Tensor? kv_lens, Tensor? lse, Tensor? weights, "
    "SymInt[] spans, SymInt[] spans_per_sample, str head_reduction, str? row_reduction, bool causal, SymInt? window, "
    "float scale, float? softcap, bool softmax, str? backend) -> (Tensor, Tensor)"
)


def _request(
    query: Tensor,
    key: Tensor,
    q_positions: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    weights: Tensor | None,
    spans: list[int],
    spans_per_sample: list[int],
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
        spans=[[next(pairs) for _ in range(count)] for count in spans_per_sample],
        q_positions=q_positions,
        causal=causal,
        window=window,
        kv_starts=kv_starts,
        kv_lens=kv_lens,
        scale=scale,
        softcap=softcap,
        softmax=softmax,
        head_reduction=reduction,
        row_reduction=row_reduction,
    )


@torch.library.custom_op("hide_kernels::attention_rows", mutates_args=(), schema=SCHEMA)
def attention_rows(query, key, q_positions, kv_starts, kv_lens, lse, weights, *rest):  # type: ignore[no-untyped-def]
    """The operator: arguments of `SCHEMA` -> (rows, lse); lse is empty where none is computed."""
    *described, backend = rest
    request = _request(query, key, q_positions, kv_starts, kv_lens, weights, *described)
    name = backends.resolve("attention_rows", backend, query=query, key=key)
    rows, computed = run(name, query, key, request, lse, request.softmax and lse is None, None, False)
    return rows, rows.new_empty(0) if computed is None else computed


@attention_rows.register_fake
def _(query, key, q_positions, kv_starts, kv_lens, lse, weights, *rest):  # type: ignore[no-untyped-def]
    request = _request(query, key, q_positions, kv_starts, kv_lens, weights, *rest[:-1])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    computed = query.shape[:3] if request.softmax and lse is None else (0,)
    return query.new_empty(request.shape, dtype=dtype), query.new_empty(computed, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, q_positions, kv_starts, kv_lens, lse, weights, *ctx.described = inputs
    ctx.lse_given = lse is not None
    ctx.softmax = inputs[-2]
    ctx.save_for_backward(query, key, q_positions, kv_starts, kv_lens, weights, lse if ctx.lse_given else output[1])


def _backward(ctx: Any, grad_rows: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, q_positions, kv_starts, kv_lens, weights, lse = ctx.saved_tensors
    request = _request(query, key, q_positions, kv_starts, kv_lens, weights, *ctx.described[:-1])
    computed = ctx.softmax and not ctx.lse_given
    gradients = attention_rows_backward(
        grad_rows,
        grad_lse if computed else None,
        query,
        key,
        lse if ctx.softmax else None,
        ctx.lse_given,
        request,
    )
    return (gradients.query, gradients.key, None, None, None, gradients.lse, gradients.weights, *[None] * 10)


attention_rows.register_autograd(_backward, setup_context=_save)
