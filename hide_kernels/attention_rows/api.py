"""The public operator: validation, dispatch, documentation."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from hide_kernels import backends
from hide_kernels.attention_rows.reference import attention_rows_reference
from hide_kernels.attention_rows.request import HeadReduction, RowRequest, Spans

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
    process_group: ProcessGroup | None = None,
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

    Args:
        query: (B, Hq, R, D), float16, bfloat16, float32 or float64; the chosen rows only, after RoPE and q-norm.
        key: (B, Hkv, N, D), same dtype and device, any strides with a unit last one; Hkv divides Hq.
        key_spans: half-open ranges of Python ints, `[(start, stop), ...]`, or one such list per sample where samples
            differ; output columns are the spans one after another. Samples with fewer columns are padded with zeros.
            `None`: all keys.
        q_positions: (R,) or (B, R) integers, the key index each row stands at; needed for `causal` and `window`.
        causal: row r sees keys n <= q_positions[r]. False is what published HiDe does (arXiv 2510.00054).
        window: row r sees keys n > q_positions[r] - window (sliding-window attention).
        kv_starts, kv_lens: (B,) integers; sample b sees keys kv_starts[b] <= n < kv_lens[b] (left and right padding).
        cu_seqlens_q, cu_seqlens_k, block_table, process_group: packed, paged and sharded inputs; no backend serves
            them yet, a value is a `ValueError`.
        scale: factor on the dot products; default D ** -0.5.
        softcap: bound on the scores, applied after `scale`.
        softmax: False gives the scaled scores themselves, reduced over heads; hidden keys are 0.
        head_reduction: "mean"; "none" (all Hq heads); "kv_group" (mean over the Hq // Hkv heads of each key/value
            head); or Hq weights of a weighted sum (a subset of heads is a weight vector with zeros).
        row_reduction: `None` keeps the R rows, "mean" or "sum" reduces them.
        lse: (B, Hq, R) float32 natural-log normaliser of the same mask, scale and softcap, e.g. from FlashAttention:
            the first pass is skipped. -inf and +inf both mean a row that sees nothing.
        return_lse: also return lse.
        out: contiguous or strided tensor of the result's shape and dtype to write into.
        accumulate: add to `out` instead of overwriting it (sum over layers).
        backend: `None` picks (`hide_kernels.explain("attention_rows")` says which); a name is used or refused.

    Returns:
        `AttentionRows(rows, lse)`. rows: float32 (float64 for float64 inputs), of shape (B, R, C) for "mean" and
        weights, (B, Hq, R, C) for "none", (B, Hkv, R, C) for "kv_group"; without R where `row_reduction` is given.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    batch, heads, rows, depth, length = _check_query_key(query, key)
    name = backend
    if not torch.compiler.is_compiling():  # a compiled call resolves it when it runs
        name = backends.resolve(
            "attention_rows",
            backend,
            query=query,
            key=key,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            block_table=block_table,
            process_group=process_group,
        )
    elif any(x is not None for x in (cu_seqlens_q, cu_seqlens_k, block_table, process_group)):
        raise ValueError("cu_seqlens_q, cu_seqlens_k, block_table, process_group: got a value, want None")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    spans = _check_spans(key_spans, batch, length)
    if (causal or window is not None) and q_positions is None:
        raise ValueError("q_positions: got None, want (R,) or (B, R) integers, because causal or window is set")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, want None or at least 1")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, want None or a finite number")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: got {softcap}, want None or a finite positive number")
    reduction = _check_head_reduction(head_reduction, heads, dtype, query.device)
    if row_reduction not in (None, "mean", "sum"):
        raise ValueError(f"row_reduction: got {row_reduction!r}, want None, 'mean' or 'sum'")
    if not softmax and (lse is not None or return_lse):
        raise ValueError("softmax: got False together with lse or return_lse, which belong to the softmax")
    if lse is not None:
        _check_tensor("lse", lse, (batch, heads, rows), (dtype,), query.device)
    if accumulate and out is None:
        raise ValueError("accumulate: got True without out, want the tensor to add to")
    request = RowRequest.of(
        query,
        key,
        spans=spans,
        q_positions=_check_positions(q_positions, batch, rows, query.device),
        causal=causal,
        window=window,
        kv_starts=_check_lengths("kv_starts", kv_starts, batch, query.device),
        kv_lens=_check_lengths("kv_lens", kv_lens, batch, query.device),
        scale=depth**-0.5 if scale is None else float(scale),
        softcap=softcap,
        softmax=softmax,
        head_reduction=reduction,
        row_reduction=row_reduction,
    )
    differentiable = [x for x in (query, key, lse, reduction) if isinstance(x, Tensor)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    if out is not None:
        _check_tensor("out", out, request.shape, (dtype,), query.device)
        if recorded or (torch.is_grad_enabled() and out.requires_grad):
            raise ValueError("out: cannot be written where gradients are recorded; use torch.no_grad() or drop out=")
    if not (torch.compiler.is_compiling() or recorded or any(type(x) is not Tensor for x in differentiable)):
        assert name is not None
        return AttentionRows(*run(name, query, key, request, lse, return_lse, out, accumulate))
    result, computed = torch.ops.hide_kernels.attention_rows(
        query,
        key,
        request.q_positions,
        request.kv_starts,
        request.kv_lens,
        lse,
        reduction if isinstance(reduction, Tensor) else None,
        [bound for sample in spans for span in sample for bound in span],
        [len(sample) for sample in spans],
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


def run(
    name: str,
    query: Tensor,
    key: Tensor,
    request: RowRequest,
    lse: Tensor | None,
    return_lse: bool,
    out: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rows and lse (or `None`) of a validated request, by the backend of this name. Records no gradients."""
    if name == "triton":
        from hide_kernels.attention_rows.triton_launch import attention_rows_triton as implementation
    else:
        implementation = attention_rows_reference
    return implementation(query, key, request, lse, return_lse, out, accumulate)


def _check_query_key(query: Tensor, key: Tensor) -> tuple[int, int, int, int, int]:
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, want a torch.Tensor")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, want four dimensions (B, heads, rows, D)")
        if tensor.dtype not in QUERY_DTYPES:
            raise TypeError(f"{name}: got {tensor.dtype}, want one of {[str(d) for d in QUERY_DTYPES]}")
    if query.dtype != key.dtype:
        raise TypeError(f"key: got {key.dtype}, want query's {query.dtype}")
    if query.device != key.device:
        raise ValueError(f"key: got device {key.device}, want query's {query.device}")
    batch, heads, rows, depth = query.shape
    key_batch, kv_heads, length, key_depth = key.shape
    if key_batch != batch or key_depth != depth:
        raise ValueError(f"key: got shape {tuple(key.shape)}, want ({batch}, Hkv, N, {depth}) as query has")
    if depth < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"query: got {heads} heads of size {depth}, want a multiple of key's {kv_heads}, size >= 1")
    if length > 1 and key.stride(3) != 1:
        raise ValueError(f"key: got strides {key.stride()}, want a unit last stride")
    return batch, heads, rows, depth, length


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


def _check_positions(positions: Tensor | None, batch: int, rows: int, device: torch.device) -> Tensor | None:
    if positions is None:
        return None
    shape = (batch, rows) if isinstance(positions, Tensor) and positions.dim() == 2 else (rows,)
    _check_tensor("q_positions", positions, shape, INTEGERS, device)
    return positions.expand(batch, rows)


def _check_lengths(name: str, lengths: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    if lengths is not None:
        _check_tensor(name, lengths, (batch,), INTEGERS, device)
    return lengths


def _check_spans(key_spans: KeySpans | None, batch: int, length: int) -> Spans:
    """One list of spans per sample."""
    if key_spans is None:
        return [[(0, length)]] * batch
    if not isinstance(key_spans, (list, tuple)) or not all(isinstance(span, (list, tuple)) for span in key_spans):
        raise TypeError(f"key_spans: got {key_spans!r}, want a list of (start, stop), or one such list per sample")
    spans: list[Any] = list(key_spans)
    nested = any(len(span) == 0 or isinstance(span[0], (list, tuple)) for span in spans)
    if nested and len(spans) != batch:
        raise ValueError(f"key_spans: got {len(spans)} lists of spans, want one per sample ({batch}) or a single list")
    return [[_check_span(s, length) for s in sample] for sample in (spans if nested else [spans] * batch)]


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
