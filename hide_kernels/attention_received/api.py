"""The public operator and its documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .._ops import ops
from ..attention_rows.dispatch import resolve
from ..attention_rows.request import KeySpans
from ..attention_rows.validate import validated_output, validated_request
from .dispatch import run
from .request import AttentionReceived, Reduction


def attention_received(
    query: Tensor,
    key: Tensor,
    *,
    reduction: Reduction = "sum",
    key_spans: KeySpans | None = None,
    q_positions: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    kv_starts: Tensor | None = None,
    kv_lens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    head_reduction: Literal["mean", "none", "kv_group"] | Tensor | Sequence[float] = "mean",
    lse: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> AttentionReceived:
    """How much attention each key receives from all queries, without the attention matrix.

    With scores s, lse and the key/value head g of query head h as `attention_rows` defines them, over the queries r
    that see key n::

        weight[b, h, r, n]   = exp(s[b, h, r, n] - lse[b, h, r])
        received[b, h, c]    = sum_r, mean_r or max_r weight[b, h, r, span(c)]
        then over heads:       mean_h, sum_h weights[h] * received[b, h, c], ... as `head_reduction` says

    "sum" is what H2O accumulates (arXiv 2306.14048). "mean" divides by the number of queries that see the key, so that
    under a causal mask early keys, which more queries see, have no advantage: the normalised score of kvpress's
    ObservedAttention. Where every query sees every key, as in a vision encoder, that is the number of queries: what a
    token receives on average in FastV (arXiv 2403.06764) and VisionZip (arXiv 2412.04467). To divide by another number
    take the sum. "max" is over queries, of each head by itself. Scores of chosen queries alone, a class token's in
    FasterVLM (arXiv 2412.01818) and VisPruner (arXiv 2412.01818), text raters' in SparseVLM (arXiv 2410.04417), are
    rows: pass these queries, here or to `attention_rows`.

    New memory is the output, lse, a few floats per head and key and, by backend, a block of weights: linear in queries
    and keys. Deterministic: sums have one order, whatever the batch. A key that no query sees receives 0, and may hold
    NaN or inf. `attention_rows(row_reduction="sum")` gives the same sums with gradients; here there are none.

    Query and key may be dense, packed and paged as in `attention_rows`, whose arguments these are. All of "a sample's"
    queries count: packed windows of a vision encoder are samples.

    Args:
        query: (B, Hq, R, D) or packed (total_q, Hq, D): all queries of the layer, after RoPE and q-norm; float16,
            bfloat16, float32 or float64.
        key: (B, Hkv, N, D), packed (total_k, Hkv, D) or paged (num_blocks, block_size, Hkv, D), same dtype and device.
        reduction: "sum", "mean" or "max" over queries.
        key_spans: as in `attention_rows`: only these columns are returned; `None`: all keys.
        q_positions, causal, window, kv_starts, kv_lens: as in `attention_rows`; `causal` and `window` need the
            positions, `torch.arange(N - R, N)` where queries stand at the end.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, scale, softcap: as in `attention_rows`.
        head_reduction: "mean"; "none" (all Hq heads); "kv_group" (mean over the Hq // Hkv heads of each key/value
            head); or Hq weights of a weighted sum. After the reduction over queries.
        lse: (B, Hq, R), packed (Hq, total_q), float32 natural-log normaliser of the same mask, scale and softcap, e.g.
            from FlashAttention: the keys are then read once. -inf and +inf both mean a query that sees nothing, which a
            mean does not count: so are queries of padding left out.
        return_lse: also return lse.
        out: contiguous or strided tensor of the result's shape and dtype to write into.
        accumulate: add to `out` instead of overwriting it: over layers, or a decode's steps.
        backend: `None` picks (`hide_kernels.explain("attention_received")` says which); a name is used or refused.

    Returns:
        `AttentionReceived(received, lse)`. received: float32 (float64 for float64 inputs), (B, C) for "mean" and
        weights, (B, Hq, C) for "none", (B, Hkv, C) for "kv_group", also of packed queries. B, R, N and C may be 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted; also where gradients would be
            recorded.
    """
    if reduction not in ("sum", "mean", "max"):
        raise ValueError(f"reduction: got {reduction!r}, want 'sum', 'mean' or 'max'")
    request = validated_request(
        query,
        key,
        key_spans=key_spans,
        q_positions=q_positions,
        causal=causal,
        window=window,
        kv_starts=kv_starts,
        kv_lens=kv_lens,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        block_table=block_table,
        scale=scale,
        softcap=softcap,
        head_reduction=head_reduction,
        row_reduction="sum",
    )
    name = backend
    if not torch.compiler.is_compiling():  # a compiled call resolves it when it runs
        name = resolve(backend, query, key, request, "attention_received")
    tensors = [x for x in (query, key, lse, request.head_reduction) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "query: attention_received records no gradients, want torch.no_grad() or detached tensors; "
            "attention_rows with row_reduction='sum' records them"
        )
    output = validated_output(
        query,
        request,
        lse=lse,
        return_lse=return_lse,
        out=out,
        accumulate=accumulate,
        workspace=None,
        recorded=False,
    )
    if not torch.compiler.is_compiling() and all(type(x) is Tensor for x in tensors):
        assert name is not None
        return run(name, query, key, request, reduction, output)
    result, computed = ops.attention_received(reduction, query, key, lse, *request.flat().values(), name)
    if out is not None:
        result = out.add_(result) if accumulate else out.copy_(result)
    return AttentionReceived(result, (computed if lse is None else lse) if return_lse else None)
