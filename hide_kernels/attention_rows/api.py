"""The public operator: validation, dispatch, documentation."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .._ops import ops
from .reference import attention_rows_reference
from .request import HeadReduction, RowRequest, Spans

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KeySpans = Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]]
QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionRows(NamedTuple):
    """`rows` as `attention_rows` documents; `lse` (B, Hq, R), natural log, or `None` when it was not asked for."""

    rows: Tensor
    lse: Tensor | None


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
    captured in a CUDA graph (weights as a tensor, not a list); spans and other Python arguments are then fixed.

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
    request = _validated(
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
        name = _resolve(backend, query, key, request)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    reduction = request.head_reduction
    if not softmax and (lse is not None or return_lse):
        raise ValueError("softmax: got False together with lse or return_lse, which belong to the softmax")
    if lse is not None:
        _check_tensor("lse", lse, request.lse_shape, (dtype,), query.device)
    if accumulate and out is None:
        raise ValueError("accumulate: got True without out, want the tensor to add to")
    differentiable = [x for x in (query, key, lse, reduction) if isinstance(x, Tensor)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    if recorded and not request.dense:
        raise ValueError("query: packed and paged calls record no gradients, want torch.no_grad() or detached tensors")
    if out is not None:
        _check_tensor("out", out, request.shape, (dtype,), query.device)
        if any(size > 1 and step == 0 for size, step in zip(out.shape, out.stride(), strict=True)):
            raise ValueError(f"out: got strides {out.stride()}, want elements that share no memory")
        if recorded or (torch.is_grad_enabled() and out.requires_grad):
            raise ValueError("out: cannot be written where gradients are recorded; use torch.no_grad() or drop out=")
    if shard not in ("heads", "keys"):
        raise ValueError(f"shard: got {shard!r}, want 'heads' or 'keys'")
    direct = not (torch.compiler.is_compiling() or recorded or any(type(x) is not Tensor for x in differentiable))
    if workspace is not None:
        _check_tensor("workspace", workspace, tuple(getattr(workspace, "shape", ())), (torch.float32,), query.device)
        if workspace.dim() != 1 or not workspace.is_contiguous():
            shape = f"shape {tuple(workspace.shape)}, strides {workspace.stride()}"
            raise ValueError(f"workspace: got {shape}, want one contiguous dimension")
    if process_group is not None:
        if not direct:
            raise ValueError("process_group: got one in a call that is compiled or records gradients, want None")
        from .sharded import sharded_rows

        assert name is not None
        return AttentionRows(
            *sharded_rows(name, query, key, request, lse, return_lse, out, accumulate, workspace, process_group, shard)
        )
    if direct:
        assert name is not None
        return AttentionRows(*run(name, query, key, request, lse, return_lse, out, accumulate, workspace))
    result, computed = ops.attention_rows(
        query,
        key,
        request.q_positions,
        request.kv_starts,
        request.kv_lens,
        request.cu_seqlens_q,
        request.cu_seqlens_k,
        request.block_table,
        lse,
        reduction if isinstance(reduction, Tensor) else None,
        [bound for sample in request.spans for span in sample for bound in span],
        [len(sample) for sample in request.spans],
        request.shape[-1],
        max_seqlen_q,
        max_seqlen_k,
        reduction if isinstance(reduction, str) else "weights",
        row_reduction,
        causal,
        window,
        request.scale,
        softcap,
        softmax,
        name,
    )
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
    request = _validated(query, key, **arguments)
    if _resolve(backend, query, key, request) != "triton" or lse is not None:
        return 0
    from .triton_launch import workspace_elements

    return workspace_elements(query, key, request)


def _validated(
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
    head_reduction: object = "mean",
    row_reduction: Literal["mean", "sum"] | None = None,
) -> RowRequest:
    """The request that these arguments of `attention_rows` make, or the error that they deserve."""
    if cu_seqlens_k is not None and block_table is not None:
        raise ValueError("block_table: got a table together with cu_seqlens_k, want kv_lens for lengths of paged keys")
    _check_query_key(query, key, cu_seqlens_q is not None, cu_seqlens_k is not None, block_table is not None)
    batch = _check_layout(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    length = max_seqlen_k
    if length is None:
        length = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[1]
    if (causal or window is not None) and q_positions is None:
        wanted = "(R,) or (B, R)" if cu_seqlens_q is None else "(total_q,)"
        raise ValueError(f"q_positions: got None, want {wanted} integers, because causal or window is set")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, want None or at least 1")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, want None or a finite number")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: got {softcap}, want None or a finite positive number")
    if row_reduction not in (None, "mean", "sum"):
        raise ValueError(f"row_reduction: got {row_reduction!r}, want None, 'mean' or 'sum'")
    spans, columns = _check_spans(key_spans, batch, length)
    return RowRequest.of(
        query,
        key,
        columns=columns,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        spans=spans,
        q_positions=_check_positions(q_positions, query, batch),
        causal=causal,
        window=window,
        kv_starts=_check_integers("kv_starts", kv_starts, (batch,), query.device),
        kv_lens=_check_integers("kv_lens", kv_lens, (batch,), query.device),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=softcap,
        softmax=softmax,
        head_reduction=_check_head_reduction(head_reduction, query.shape[1], dtype, query.device),
        row_reduction=row_reduction,
    )


def _resolve(backend: str | None, query: Tensor, key: Tensor, request: RowRequest) -> str:
    return backends.resolve("attention_rows", backend, query=query, key=key, **request.layout)


def run(
    name: str,
    query: Tensor,
    key: Tensor,
    request: RowRequest,
    lse: Tensor | None,
    return_lse: bool,
    out: Tensor | None,
    accumulate: bool,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rows and lse (or `None`) of a validated request, by the backend of this name. Records no gradients."""
    if name == "triton":
        from .triton_launch import attention_rows_triton

        return attention_rows_triton(query, key, request, lse, return_lse, out, accumulate, workspace)
    return attention_rows_reference(query, key, request, lse, return_lse, out, accumulate)


def _check_query_key(query: Tensor, key: Tensor, packed_q: bool, packed_k: bool, paged: bool) -> None:
    dense = "four dimensions (B, heads, rows, D)"
    wanted = {
        "query": "three dimensions (total_q, Hq, D)" if packed_q else dense,
        "key": "three dimensions (total_k, Hkv, D)" if packed_k else dense,
    }
    if paged:
        wanted["key"] = "four dimensions (num_blocks, block_size, Hkv, D)"
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, want a torch.Tensor")
        if tensor.dim() != (3 if wanted[name].startswith("three") else 4):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, want {wanted[name]}")
        if tensor.dtype not in QUERY_DTYPES:
            raise TypeError(f"{name}: got {tensor.dtype}, want one of {[str(d) for d in QUERY_DTYPES]}")
    if query.dtype != key.dtype:
        raise TypeError(f"key: got {key.dtype}, want query's {query.dtype}")
    if query.device != key.device:
        raise ValueError(f"key: got device {key.device}, want query's {query.device}")
    heads, depth = query.shape[1], query.shape[-1]
    kv_heads, keys = (key.shape[2], key.shape[1]) if paged else (key.shape[1], key.shape[0 if packed_k else 2])
    if key.shape[-1] != depth:
        raise ValueError(f"key: got shape {tuple(key.shape)}, want the last to be {depth} as query has")
    if depth < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"query: got {heads} heads of size {depth}, want a multiple of key's {kv_heads}, size >= 1")
    if paged and keys < 1:
        raise ValueError(f"key: got shape {tuple(key.shape)}, want blocks of at least one key")
    if keys > 1 and key.stride(-1) != 1:
        raise ValueError(f"key: got strides {key.stride()}, want a unit last stride")


def _check_layout(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    block_table: Tensor | None,
) -> int:
    """The number of samples, once query and key agree on it."""
    device = query.device
    batch = query.shape[0]
    if cu_seqlens_q is not None:
        batch = _check_bounds("cu_seqlens_q", cu_seqlens_q, device)
    for name, given, needed, allowed in (
        ("max_seqlen_q", max_seqlen_q, cu_seqlens_q is not None, cu_seqlens_q is not None),
        ("max_seqlen_k", max_seqlen_k, cu_seqlens_k is not None, cu_seqlens_k is not None or block_table is not None),
    ):
        if given is None and needed:
            raise ValueError(f"{name}: got None, want the most of a sample, because cu_seqlens{name[-2:]} is set")
        if given is not None and not allowed:
            raise ValueError(f"{name}: got {given} for tensors that are not packed, want None")
        if given is not None and given < 0:
            raise ValueError(f"{name}: got {given}, want at least 0")
    if block_table is not None:
        if isinstance(block_table, Tensor) and block_table.dim() != 2:
            raise ValueError(f"block_table: got shape {tuple(block_table.shape)}, want ({batch}, max_blocks)")
        _check_integers("block_table", block_table, (batch, *getattr(block_table, "shape", ())[1:]), device)
        reach = block_table.shape[1] * key.shape[1]
        if max_seqlen_k is not None and max_seqlen_k > reach:
            raise ValueError(f"max_seqlen_k: got {max_seqlen_k}, want at most {reach}, what block_table reaches")
    elif cu_seqlens_k is not None:
        if (samples := _check_bounds("cu_seqlens_k", cu_seqlens_k, device)) != batch:
            raise ValueError(f"cu_seqlens_k: got shape {tuple(cu_seqlens_k.shape)} ({samples} samples), want {batch}")
    elif key.shape[0] != batch:
        raise ValueError(f"key: got shape {tuple(key.shape)}, want {batch} samples as query has")
    return batch


def _check_bounds(name: str, bounds: Tensor, device: torch.device) -> int:
    """Samples that `bounds` (B + 1,) separate."""
    if isinstance(bounds, Tensor) and (bounds.dim() != 1 or bounds.shape[0] < 1):
        raise ValueError(f"{name}: got shape {tuple(bounds.shape)}, want (B + 1,)")
    _check_tensor(name, bounds, tuple(getattr(bounds, "shape", ())), INTEGERS, device)
    return bounds.shape[0] - 1


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, want a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got {tensor.dtype}, want {' or '.join(str(d) for d in dtypes)}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, want {shape}")
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, want query's {device}")


INTEGERS = (torch.int32, torch.int64)


def _check_positions(positions: Tensor | None, query: Tensor, batch: int) -> Tensor | None:
    if positions is None:
        return None
    if query.dim() == 3:
        return _check_integers("q_positions", positions, (query.shape[0],), query.device)
    rows = query.shape[2]
    shape = (batch, rows) if isinstance(positions, Tensor) and positions.dim() == 2 else (rows,)
    _check_tensor("q_positions", positions, shape, INTEGERS, query.device)
    return positions.expand(batch, rows)


def _check_integers(name: str, given: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    if given is not None:
        _check_tensor(name, given, shape, INTEGERS, device)
    return given


def _check_spans(key_spans: KeySpans | None, batch: int, length: int) -> tuple[Spans, int]:
    """One list of spans per sample, and how many columns they make: those that all share also where there is none."""
    if key_spans is None:
        return [[(0, length)]] * batch, length
    if not isinstance(key_spans, (list, tuple)) or not all(isinstance(span, (list, tuple)) for span in key_spans):
        raise TypeError(f"key_spans: got {key_spans!r}, want a list of (start, stop), or one such list per sample")
    spans: list[Any] = list(key_spans)
    nested = any(len(span) == 0 or isinstance(span[0], (list, tuple)) for span in spans)
    if nested and len(spans) != batch:
        raise ValueError(f"key_spans: got {len(spans)} lists of spans, want one per sample ({batch}) or a single list")
    checked = [[_check_span(s, length) for s in sample] for sample in (spans if nested else [spans])]
    # Without a sample the spans that all share still make columns.
    columns = max([0, *(sum(stop - start for start, stop in sample) for sample in checked)])
    return (checked if nested else checked * batch), columns


def _check_span(span: object, length: int) -> tuple[int, int]:
    try:
        # torch.compile would take what passes operator.index for a constant.
        start, stop = (x if isinstance(x, int) else operator.index(x) for x in span)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise TypeError(f"key_spans: got {span!r}, want a pair of ints (start, stop)") from None
    if not 0 <= start <= stop <= length:
        raise ValueError(f"key_spans: got ({start}, {stop}), want 0 <= start <= stop <= {length} (the number of keys)")
    return start, stop


def _check_head_reduction(reduction: object, heads: int, dtype: torch.dtype, device: torch.device) -> HeadReduction:
    if isinstance(reduction, str):
        if reduction not in ("mean", "none", "kv_group"):
            raise ValueError(f"head_reduction: got {reduction!r}, want 'mean', 'none', 'kv_group' or {heads} weights")
        return reduction  # type: ignore[return-value]
    if not isinstance(reduction, (Tensor, list, tuple)):
        raise TypeError(f"head_reduction: got {reduction!r}, want 'mean', 'none', 'kv_group' or {heads} weights")
    weights = torch.as_tensor(reduction, dtype=dtype, device=device)
    if tuple(weights.shape) != (heads,):
        raise ValueError(f"head_reduction: got weights of shape {tuple(weights.shape)}, want ({heads},)")
    return weights
