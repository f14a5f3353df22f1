"""`attention_rows` in plain PyTorch: the definition, and the path that runs on any device.

Two passes over blocks of keys: the normaliser over all visible keys, then the probabilities of the key spans, reduced
over heads block by block. Arithmetic is float32 for 16- and 32-bit inputs and float64 for float64. One sample at a
time and a block size that does not depend on the batch: a sample's rows are the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hide_kernels.attention_rows.request import HeadReduction, RowRequest

# Scores held at once, in elements: 16 MB in float32.
BLOCK_ELEMENTS = 1 << 22
ROWS_AT_ONCE = 512


def attention_rows_reference(
    query: Tensor,
    key: Tensor,
    request: RowRequest,
    lse: Tensor | None,
    return_lse: bool,
    out: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rows and lse (or `None`) of a validated request."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if out is None:
        out = torch.zeros(request.shape, dtype=dtype, device=query.device)
    elif not accumulate:
        out.zero_()
    lses = []
    for sample in range(query.shape[0]):
        chunks = []
        for first in range(0, query.shape[2], ROWS_AT_ONCE):
            chunk = slice(first, first + ROWS_AT_ONCE)
            given = None if lse is None else lse[sample, :, chunk]
            chunks.append(
                _sample_rows(query[sample, :, chunk], key[sample], request, sample, first, given, out[sample])
            )
        if return_lse:
            lses.append(torch.cat(chunks, 1) if chunks else out.new_zeros(query.shape[1], 0))
    if not return_lse:
        return out, None
    return out, torch.stack(lses) if lses else out.new_zeros(query.shape[:3])


def _sample_rows(
    query: Tensor, key: Tensor, request: RowRequest, sample: int, first: int, lse: Tensor | None, out: Tensor
) -> Tensor:
    """Adds the rows of one sample, query (Hq, R, D) from row `first` on, to `out`; returns their lse (Hq, R)."""
    heads, rows, depth = query.shape
    kv_heads = key.shape[0]
    grouped = query.to(out.dtype).reshape(kv_heads, heads // kv_heads * rows, depth)

    def scores(start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        block = grouped @ key[:, start:stop].to(out.dtype).transpose(1, 2) * request.scale
        if request.softcap is not None:
            block = request.softcap * torch.tanh(block / request.softcap)
        return block.view(heads, rows, stop - start), _visible(request, sample, first, rows, start, stop, key.device)

    block_keys = max(128, BLOCK_ELEMENTS // max(1, heads * rows))
    normaliser: Tensor | None = None
    if request.softmax:
        if lse is None:
            lse = torch.full((heads, rows), -torch.inf, dtype=out.dtype, device=out.device)
            for start, stop in _blocks(0, key.shape[1], block_keys):
                block, visible = scores(start, stop)
                if visible is not None:
                    block = block.masked_fill(~visible, -torch.inf)
                lse = torch.logaddexp(lse, torch.logsumexp(block, -1))
        normaliser = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]

    column = 0
    for span_start, span_stop in request.spans[sample]:
        for start, stop in _blocks(span_start, span_stop, block_keys):
            block, visible = scores(start, stop)
            if visible is not None:
                # Before exp: a large hidden score would overflow, and its gradient be NaN.
                block = block.masked_fill(~visible, 0.0 if normaliser is None else -torch.inf)
            if normaliser is not None:
                block = torch.exp(block - normaliser)
            _add(out, _reduce_heads(block, request.head_reduction, kv_heads), request, first, rows, column)
            column += stop - start
    return lse if lse is not None else out.new_zeros(heads, rows)


def _blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _visible(
    request: RowRequest, sample: int, first: int, rows: int, start: int, stop: int, device: torch.device
) -> Tensor | None:
    """Which of the keys [start, stop) each row sees: bool, broadcastable to (R, stop - start); `None`: all of them."""
    keys = torch.arange(start, stop, device=device)
    conditions = []
    if request.kv_starts is not None:
        conditions.append(keys >= request.kv_starts[sample])
    if request.kv_lens is not None:
        conditions.append(keys < request.kv_lens[sample])
    if request.q_positions is not None:
        positions = request.q_positions[sample, first : first + rows, None]
        if request.causal:
            conditions.append(keys <= positions)
        if request.window is not None:
            conditions.append(keys > positions - request.window)
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible


def _reduce_heads(block: Tensor, reduction: HeadReduction, kv_heads: int) -> Tensor:
    """(Hq, R, n) -> (R, n), (Hq, R, n) or (Hkv, R, n)."""
    if isinstance(reduction, Tensor):
        return torch.einsum("h,hrn->rn", reduction, block)
    if reduction == "mean":
        return block.mean(0)
    if reduction == "kv_group":
        return block.unflatten(0, (kv_heads, -1)).mean(1)
    return block


def _add(out: Tensor, block: Tensor, request: RowRequest, first: int, rows: int, column: int) -> None:
    columns = slice(column, column + block.shape[-1])
    if request.row_reduction is None:
        out[..., first : first + rows, columns].add_(block)
        return
    reduced = block.sum(-2)
    if request.row_reduction == "mean":
        reduced = reduced / request.rows
    out[..., columns].add_(reduced)
