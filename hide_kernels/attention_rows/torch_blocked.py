"""`attention_rows` in plain PyTorch, in a buffer of fixed size: the path that runs on any device.

One matrix product per key/value head: the scores of a few rows over all keys fit a buffer of fixed size, are normalised
there and added to the result before the next rows take their place. Arithmetic is float32 for 16- and 32-bit inputs
and float64 for float64. One sample at a time, and tiles that do not depend on the batch: a sample's rows are the same
bits in any batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .request import AttentionRows, RowOutput, RowRequest

# Scores held at once, in elements: 16 MB in float32.
BLOCK_ELEMENTS = 1 << 22
# Keys per matrix product, and per conversion to the arithmetic's type.
BLOCK_KEYS = 1024
# Further than any key.
_FAR = 1 << 60


@torch.no_grad()
def attention_rows_torch(query: Tensor, key: Tensor, request: RowRequest, output: RowOutput) -> AttentionRows:
    """The results of a validated request."""
    out = output.out
    if out is None:
        out = torch.zeros(request.shape, dtype=request.out_dtype(query), device=query.device)
    elif not output.accumulate:
        out.zero_()
    lse = output.lse
    if lse is None and output.return_lse:
        lse = torch.full(request.lse_shape, -torch.inf, dtype=out.dtype, device=query.device)
    computed = None if lse is output.lse else lse
    with without_autocast(query.device):
        add = _add_rows if request.dense else _add_sample_by_sample
        add(out, query, key, request, output.lse, computed)
    return AttentionRows(out, lse if output.return_lse else None)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, products are not rounded to 16 bits."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _add_rows(
    out: Tensor, query: Tensor, key: Tensor, request: RowRequest, lse: Tensor | None, computed: Tensor | None
) -> None:
    """Adds the rows of dense inputs to `out`; writes their lse, where it is not given, into `computed`, if that is."""
    _, heads, rows, _ = query.shape
    kv_heads, length = key.shape[1:3]
    if length == 0:
        return
    group, dtype = heads // kv_heads, out.dtype
    normalise = request.softmax and lse is None
    masked = any(mask is not None for mask in (request.kv_starts, request.kv_lens, request.q_positions))
    weights = request.head_weights(heads, dtype, query.device)

    for sample, spans in enumerate(request.spans):
        # Where the normaliser is known, only the spans are computed, and they lie in the buffer as in the result.
        wanted = [(0, length)] if normalise else spans
        width = sum(stop - start for start, stop in wanted)
        heads_at_once = min(group, max(1, BLOCK_ELEMENTS // max(1, width)))
        rows_at_once = min(rows, max(1, BLOCK_ELEMENTS // max(1, heads_at_once * width)))
        # Memory is taken once: fresh pages for every block would cost more than the arithmetic on it.
        buffer = torch.empty(rows_at_once * heads_at_once * width, dtype=dtype, device=query.device)
        keys = torch.empty((BLOCK_KEYS, key.shape[3]), dtype=dtype, device=query.device)
        for first_head in (h for g in range(kv_heads) for h in range(g * group, (g + 1) * group, heads_at_once)):
            g = first_head // group
            some_heads = slice(first_head, min(first_head + heads_at_once, (g + 1) * group))
            for first in range(0, rows, max(1, rows_at_once)):
                some_rows = slice(first, min(first + rows_at_once, rows))
                # (rows, heads): the heads of a row lie side by side, to be summed by one small product.
                some = query[sample, some_heads, some_rows].transpose(0, 1).to(dtype)
                scores = buffer[: some.shape[0] * some.shape[1] * width].view(*some.shape[:2], width)
                _scores(scores, keys, some, key[sample, g], wanted, request, sample, some_rows)
                coefficient = weights[some_heads].expand(some.shape[:2])
                if normalise:
                    if masked or computed is not None:
                        top = scores.amax(-1)
                        blind = top == -torch.inf  # rows that see nothing
                        scores.masked_fill_(blind[..., None], 0.0)
                        coefficient = coefficient.masked_fill(blind, 0.0)
                    torch.softmax(scores, -1, out=scores)  # row by row, so in place
                    if computed is not None:
                        # The largest probability is exp(top - lse).
                        found = (top - scores.amax(-1).log()).masked_fill(blind, -torch.inf)
                        computed[sample, some_heads, some_rows] = found.T
                elif lse is not None:
                    known = lse[sample, some_heads, some_rows].T
                    scores.sub_(known.masked_fill(known == -torch.inf, torch.inf)[..., None]).exp_()
                _add(
                    out[sample],
                    scores,
                    coefficient,
                    request,
                    spans if normalise else [(0, width)],
                    some_heads,
                    some_rows,
                    g,
                )


def _add_sample_by_sample(
    out: Tensor, query: Tensor, key: Tensor, request: RowRequest, lse: Tensor | None, computed: Tensor | None
) -> None:
    """As `_add_rows`, of packed and paged inputs: each sample as a dense batch of one."""
    packed = request.cu_seqlens_q is not None
    for sample, (place, some, keys, alone) in enumerate(dense_samples(query, key, request)):
        rows = out[sample : sample + 1]
        if packed and request.row_reduction is None:
            rows = out[place].movedim(0, -2)[None]
        width = sum(stop - start for start, stop in alone.spans[0])
        _add_rows(rows[..., :width], some, keys, alone, *(of_sample(x, place, packed) for x in (lse, computed)))


def dense_samples(
    query: Tensor, key: Tensor, request: RowRequest
) -> Iterator[tuple[slice, Tensor, Tensor, RowRequest]]:
    """Each sample of a request as a dense one: its place along the samples, or along the rows of a packed query, its
    query (1, Hq, R, D) and key (1, Hkv, N, D), and a request for these. The host reads their lengths."""
    q_bounds = None if request.cu_seqlens_q is None else request.cu_seqlens_q.tolist()
    k_bounds = None if request.cu_seqlens_k is None else request.cu_seqlens_k.tolist()
    for sample, spans in enumerate(request.spans):
        one = slice(sample, sample + 1)
        if q_bounds is not None:
            one = slice(q_bounds[sample], min(q_bounds[sample + 1], q_bounds[sample] + request.rows))
        some = query[one] if q_bounds is None else query[one].transpose(0, 1)[None]
        positions = request.q_positions
        if positions is not None:
            positions = positions[one] if q_bounds is None else positions[one][None]
        keys = _keys_of(key, request, sample, k_bounds)
        length = keys.shape[2]
        columns = max([0, *(stop for _, stop in spans)])
        if columns > length:  # columns of keys that this sample has not
            keys = torch.nn.functional.pad(keys, (0, 0, 0, columns - length))
        lens = torch.tensor([length], device=query.device)
        if request.kv_lens is not None:
            lens = torch.minimum(lens, request.kv_lens[sample : sample + 1])
        alone = dataclasses.replace(
            request,
            rows=some.shape[2],
            length=keys.shape[2],
            spans=[spans],
            q_positions=positions,
            kv_starts=None if request.kv_starts is None else request.kv_starts[sample : sample + 1],
            kv_lens=lens,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            block_table=None,
        )
        yield one, some, keys, alone


def of_sample(lse: Tensor | None, place: slice, packed: bool) -> Tensor | None:
    """Of lse, or of what is laid like it, the part (1, Hq, R) of one sample of `dense_samples`: a view."""
    return None if lse is None else lse[:, place][None] if packed else lse[place]


def _keys_of(key: Tensor, request: RowRequest, sample: int, bounds: list[int] | None) -> Tensor:
    """The keys (1, Hkv, n, D) of one sample: a view, or a copy of its pages."""
    if bounds is not None:
        first, last = bounds[sample], min(bounds[sample + 1], bounds[sample] + request.length)
        return key[first:last].transpose(0, 1)[None]
    if request.block_table is None:
        return key[sample : sample + 1]
    length = request.length
    if request.kv_lens is not None:
        length = max(0, min(length, int(request.kv_lens[sample])))
    pages = request.block_table[sample, : -(-length // key.shape[1])].long()
    # Entries for keys that nobody sees may be anything.
    pages = pages.clamp(0, max(0, key.shape[0] - 1))
    return key[pages].flatten(0, 1)[:length].transpose(0, 1)[None]


def _scores(
    scores: Tensor,
    keys: Tensor,
    query: Tensor,
    key: Tensor,
    ranges: list[tuple[int, int]],
    request: RowRequest,
    sample: int,
    some_rows: slice,
) -> None:
    """Writes the scores of query (rows, heads, D) over the ranges of key (N, D); hidden ones are -inf, or 0 if raw.

    `keys` is memory for a block of keys in the arithmetic's type.
    """
    rows, heads, _ = query.shape
    flat = query.reshape(rows * heads, -1)
    column = 0
    for start, stop in ranges:
        for first, last in blocks(start, stop, BLOCK_KEYS):
            block = scores[..., column : column + last - first]
            column += last - first
            some_keys = key[first:last]
            if key.dtype != query.dtype:
                some_keys = keys[: last - first].copy_(some_keys)
            block.view(rows * heads, -1).addmm_(flat, some_keys.T, beta=0, alpha=request.scale)
            if request.softcap is not None:
                block.div_(request.softcap).tanh_().mul_(request.softcap)
            visible = visible_keys(request, sample, some_rows, first, last, key.device)
            if visible is not None:
                block.masked_fill_(~visible[:, None], -torch.inf if request.softmax else 0.0)


def blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in pieces of at most `size`."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def visible_keys(
    request: RowRequest, sample: int, rows: slice, start: int, stop: int, device: torch.device
) -> Tensor | None:
    """Which of the keys [start, stop) each of the rows sees: bool (rows or 1, stop - start); `None`: all of them."""
    by_position = request.q_positions is not None and (request.causal or request.window is not None)
    if not by_position and request.kv_starts is None and request.kv_lens is None:
        return None
    first, last = visible_interval(request, sample, rows, device)
    keys = torch.arange(start, stop, device=device)
    return (keys >= first[:, None]) & (keys < last[:, None])


def visible_interval(request: RowRequest, sample: int, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and one past the last key that each of the rows sees: int64, (rows or 1,), none where first >= last."""
    first, last = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), request.length, device=device)
    if request.kv_starts is not None:
        first = first.maximum(request.kv_starts[sample])
    if request.kv_lens is not None:
        last = last.minimum(request.kv_lens[sample])
    if request.q_positions is not None:
        # Sums with what lies further away overflow, in 64 bits too.
        positions = request.q_positions[sample, rows].long().clamp(-_FAR, _FAR)
        if request.causal:
            last = last.minimum(positions + 1)
        if request.window is not None:
            first = first.maximum(positions - min(request.window, 2 * _FAR) + 1)
    return first, last


def _add(
    out: Tensor,
    scores: Tensor,
    coefficient: Tensor,
    request: RowRequest,
    spans: list[tuple[int, int]],
    some_heads: slice,
    some_rows: slice,
    g: int,
) -> None:
    """Adds the spans of scores (rows, heads, n), times coefficient (rows, heads), to a sample's result."""
    if request.row_reduction == "mean":
        coefficient = coefficient / request.rows
    column = 0
    for start, stop in spans:
        part = scores[..., start:stop]
        columns = slice(column, column + stop - start)
        column += stop - start
        if request.head_reduction == "none":
            if request.row_reduction:
                each = torch.bmm(coefficient.T[:, None], part.transpose(0, 1))
                out[some_heads, columns].add_(each[:, 0])
            else:
                out[some_heads, some_rows, columns].add_((part * coefficient[..., None]).transpose(0, 1))
            continue
        target = out[g] if request.head_reduction == "kv_group" else out
        if request.row_reduction:
            target[columns].add_(coefficient.reshape(-1) @ part.flatten(0, 1))
        else:
            target[some_rows, columns].unsqueeze(1).baddbmm_(coefficient[:, None], part)
