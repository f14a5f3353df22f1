"""The public operator and its documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .._ops import ops
from .dispatch import resolve, run
from .request import AttentionRows, KeySpans
from .sharded import sharded_rows
from .validate import validated_output, validated_request

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
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
    softmax: bool = True,
    head_reduction: Literal["mean", "none", "kv_group"] | Tensor | Sequence[float] = "mean",
    row_reduction: Literal["mean", "sum"] | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
    workspace: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    shard: Literal["heads", "keys"] = "heads",
    backend: str | None = None,
) -> AttentionRows:
    """Attention rows of a few queries, without the attention matrix.

    For query head h of key/value head g = h // (Hq // Hkv), and the visible keys n of row r::

        s[b, h, r, n] = scale * <query[b, h, r], key[b, g, n]>        then softcap * tanh(s / softcap) if given
        lse[b, h, r]  = log sum_n exp s[b, h, r, n]                    over all visible keys
        rows[b, r, c] = sum_h weight[h] * exp(s[b, h, r, span(c)] - lse[b, h, r])

    The softmax normalises over every visible key, also those outside `key_spans`. New memory is the output and, by
    backend, a block of scores or a few floats per row and chunk of keys. A row that sees no key is zeros with lse -inf.
    Hidden keys may hold NaN or inf. Differentiable once, with respect to query, key, lse and weights. A call can be
    captured in a CUDA graph (weights as a tensor, not a list), after an eager call of the same shapes and arguments,
    which compiles and loads the kernels; spans and other Python arguments are then fixed.

    Batches of serving engines are read as they lie. Query and key are each dense, packed or, the key, paged, in any
    combination, and "its keys" below are then those of a sample, counted from its first::

        packed query  (total_q, Hq, D)                     with cu_seqlens_q and max_seqlen_q
        packed key    (total_k, Hkv, D)                    with cu_seqlens_k and max_seqlen_k
        paged key     (num_blocks, block_size, Hkv, D)     with block_table, and kv_lens where pages are not full

    What the index tensors hold is not checked, nor read by the host (the torch backend reads it): the kernels compile
    once for all lengths, tables and block sizes. Packed and paged calls record no gradients.

    Args:
        query: (B, Hq, R, D) or packed, float16, bfloat16, float32 or float64; the chosen rows only, after RoPE and
            q-norm.
        key: (B, Hkv, N, D), packed or paged, same dtype and device, any strides with a unit last one; Hkv divides Hq.
            A cache of (num_blocks, Hkv, block_size, D), FlashInfer's HND, is passed as `cache.transpose(1, 2)`.
        key_spans: half-open ranges of Python ints, `[(start, stop), ...]`, or one such list per sample where samples
            differ; output columns are the spans one after another. Samples with fewer columns are padded with zeros,
            as are columns of keys that a packed or paged sample has not. `None`: all keys, up to `max_seqlen_k`.
        q_positions: (R,) or (B, R) integers, the key index each row stands at, (total_q,) if packed; needed for
            `causal` and `window`.
        causal: row r sees keys n <= q_positions[r]. False is what published HiDe does (arXiv 2510.00054).
        window: row r sees keys n > q_positions[r] - window (sliding-window attention).
        kv_starts, kv_lens: (B,) integers; sample b sees keys kv_starts[b] <= n < kv_lens[b] (left and right padding).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) integers, ascending from 0; sample b is the rows (keys) from entry b up to
            entry b + 1, as in FlashAttention. Rows past the last entry belong to no sample: zeros with lse -inf.
        max_seqlen_q, max_seqlen_k: at least the most rows and keys of a packed sample; Python ints, for they size the
            launch. Rows and keys beyond are left out. With `block_table`, max_seqlen_k is optional.
        block_table: (B, max_blocks) integers; sample b's key n is key[block_table[b, n // block_size], n % block_size].
            Entries of pages in which no row sees a key may be anything.
        scale: factor on the dot products; default D ** -0.5.
        softcap: bound on the scores, applied after `scale`.
        softmax: False gives the scaled scores themselves, reduced over heads; hidden keys are 0.
        head_reduction: "mean"; "none" (all Hq heads); "kv_group" (mean over the Hq // Hkv heads of each key/value
            head); or Hq weights of a weighted sum (a subset of heads is a weight vector with zeros).
        row_reduction: `None` keeps the R rows, "mean" or "sum" reduces them, those of each sample.
        lse: (B, Hq, R), packed (Hq, total_q), float32 natural-log normaliser of the same mask, scale and softcap, e.g.
            from FlashAttention: the first pass is skipped. -inf and +inf both mean a row that sees nothing.
        return_lse: also return lse.
        out: contiguous or strided tensor of the result's shape and dtype to write into.
        accumulate: add to `out` instead of overwriting it (sum over layers).
        workspace: (n,) float32, n at least `attention_rows_workspace(...)` of the same arguments: with it and `out` a
            call allocates nothing (but the lse that `return_lse` asks for, and copies of index tensors, weights
            and queries whose last stride is not one).
        process_group: ranks that share the call, all of which make it; says with `shard` what each of them holds.
        shard: "heads": as many of the heads as every other rank, and their weights, with the same rows and keys;
            "mean" and weights then sum over all heads of all ranks, on every rank, and lse, "none" and "kv_group" are
            of the rank's own heads. "keys": a part of the keys, with all heads; the softmax normalises over the keys of
            all ranks, lse is the whole one, and rows are the columns of the rank's own keys, which `key_spans`,
            `q_positions` and the lengths count from (positions before the first are negative).
        backend: `None` picks (`hide_kernels.explain("attention_rows")` says which); a name is used or refused.

    Returns:
        `AttentionRows(rows, lse)`. rows: float32 (float64 for float64 inputs), of shape (B, R, C) for "mean" and
        weights, (B, Hq, R, C) for "none", (B, Hkv, R, C) for "kv_group"; without R where `row_reduction` is given.
        Packed rows lie as the query does: (total_q, C), (total_q, Hq, C), (total_q, Hkv, C); reduced, as dense ones.
        B, R, N and C may be 0: the other sizes are as ever (C from spans that all samples share, also where there is no
        sample), what sees no key is zeros, and so is a mean or sum of no rows.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
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
        softmax=softmax,
        head_reduction=head_reduction,
        row_reduction=row_reduction,
    )
    name = backend
    if not torch.compiler.is_compiling():  # a compiled call resolves it when it runs
        name = resolve(backend, query, key, request)
    differentiable = [x for x in (query, key, lse, request.head_reduction) if isinstance(x, Tensor)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    if recorded and not request.dense:
        raise ValueError("query: packed and paged calls record no gradients, want torch.no_grad() or detached tensors")
    output = validated_output(
        query,
        request,
        lse=lse,
        return_lse=return_lse,
        out=out,
        accumulate=accumulate,
        workspace=workspace,
        recorded=recorded,
    )
    if shard not in ("heads", "keys"):
        raise ValueError(f"shard: got {shard!r}, want 'heads' or 'keys'")
    direct = not (torch.compiler.is_compiling() or recorded or any(type(x) is not Tensor for x in differentiable))
    if process_group is not None:
        if not direct:
            raise ValueError("process_group: got one in a call that is compiled or records gradients, want None")
        assert name is not None
        return sharded_rows(name, query, key, request, output, process_group, shard)
    if direct:
        assert name is not None
        return run(name, query, key, request, output)
    result, computed = ops.attention_rows(query, key, lse, *request.flat().values(), name)
    if out is not None:
        result = out.add_(result) if accumulate else out.copy_(result)
    return AttentionRows(result, (computed if lse is None else lse) if return_lse else None)


def attention_rows_workspace(
    query: Tensor,
    key: Tensor,
    *,
    lse: Tensor | None = None,
    backend: str | None = None,
    **arguments: Any,
) -> int:
    """How many float32 elements `workspace` needs in `attention_rows(query, key, ...)` with these arguments.

    It depends on shapes, strides and Python arguments, not on what tensors hold; 0 where the backend takes none.
    `arguments` are those of `attention_rows` that say what is computed. Raises as it does.
    """
    request = validated_request(query, key, **arguments)
    if resolve(backend, query, key, request) != "triton" or lse is not None:
        return 0
    from .triton_launch import workspace_elements

    return workspace_elements(query, key, request)
