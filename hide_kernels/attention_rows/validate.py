"""The checks of `attention_rows`: arguments as a caller gives them -> a `RowRequest` and a `RowOutput`."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

import torch
from torch import Tensor

from .request import HeadReduction, KeySpans, RowOutput, RowRequest, Spans

QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def validated_request(
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
    """The request that these arguments of `attention_rows` make; raises as it documents."""
    if cu_seqlens_k is not None and block_table is not None:
        raise ValueError("block_table: got a table together with cu_seqlens_k, want kv_lens for lengths of paged keys")
    _check_query_key(query, key, cu_seqlens_q is not None, cu_seqlens_k is not None, block_table is not None)
    # Python's own numbers: plans are kept by their values, which others may equal.
    window = _check_int("window", window)
    max_seqlen_q, max_seqlen_k = _check_int("max_seqlen_q", max_seqlen_q), _check_int("max_seqlen_k", max_seqlen_k)
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
        causal=bool(causal),
        window=window,
        kv_starts=_check_integers("kv_starts", kv_starts, (batch,), query.device),
        kv_lens=_check_integers("kv_lens", kv_lens, (batch,), query.device),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        softmax=bool(softmax),
        head_reduction=_check_head_reduction(head_reduction, query.shape[1], dtype, query.device),
        row_reduction=row_reduction,
    )


def validated_output(
    query: Tensor,
    request: RowRequest,
    *,
    lse: Tensor | None,
    return_lse: bool,
    out: Tensor | None,
    accumulate: bool,
    workspace: Tensor | None,
    recorded: bool,
) -> RowOutput:
    """Where the results of a request go; raises as `attention_rows` documents. recorded: gradients are."""
    if not request.softmax and (lse is not None or return_lse):
        raise ValueError("softmax: got False together with lse or return_lse, which belong to the softmax")
    if lse is not None:
        _check_tensor("lse", lse, request.lse_shape, (request.out_dtype(query),), query.device)
    if accumulate and out is None:
        raise ValueError("accumulate: got True without out, want the tensor to add to")
    if out is not None:
        _check_tensor("out", out, request.shape, (request.out_dtype(query),), query.device)
        if any(size > 1 and step == 0 for size, step in zip(out.shape, out.stride(), strict=True)):
            raise ValueError(f"out: got strides {out.stride()}, want elements that share no memory")
        if recorded or (torch.is_grad_enabled() and out.requires_grad):
            raise ValueError("out: cannot be written where gradients are recorded; use torch.no_grad() or drop out=")
    if workspace is not None:
        _check_tensor("workspace", workspace, tuple(getattr(workspace, "shape", ())), (torch.float32,), query.device)
        if workspace.dim() != 1 or not workspace.is_contiguous():
            shape = f"shape {tuple(workspace.shape)}, strides {workspace.stride()}"
            raise ValueError(f"workspace: got {shape}, want one contiguous dimension")
    return RowOutput(lse, return_lse, out, bool(accumulate), workspace)


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


def _check_positions(positions: Tensor | None, query: Tensor, batch: int) -> Tensor | None:
    if positions is None:
        return None
    if query.dim() == 3:
        return _check_integers("q_positions", positions, (query.shape[0],), query.device)
    rows = query.shape[2]
    shape = (batch, rows) if isinstance(positions, Tensor) and positions.dim() == 2 else (rows,)
    _check_tensor("q_positions", positions, shape, INTEGERS, query.device)
    return positions.expand(batch, rows)


def _check_int(name: str, given: int | None) -> int | None:
    if given is None or isinstance(given, int):
        return given
    try:
        return operator.index(given)
    except TypeError:
        raise TypeError(f"{name}: got {given!r}, want an int") from None


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
