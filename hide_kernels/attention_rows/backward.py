"""Gradients of `attention_rows` in plain PyTorch: probabilities are recomputed from lse, block by block of keys.

With p = exp(s - lse), P the gradient that reaches p (head weight times the gradient of the row's column, summed where
spans overlap) and L the gradient of lse::

    ds = p * (P - sum_n p P + L)      softmax, lse computed here
    ds = p * P,  dlse = -sum_n p P    softmax, lse given
    ds = P                            raw scores
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .request import RowRequest
from .torch_blocked import BLOCK_ELEMENTS, blocks, visible_keys

# Fewest keys per block, however many rows there are.
KEYS_AT_LEAST = 128


class Gradients(NamedTuple):
    """Of the differentiable inputs; `lse` and `weights` are `None` where none were given."""

    query: Tensor
    key: Tensor
    lse: Tensor | None
    weights: Tensor | None


@torch.no_grad()
def attention_rows_backward(
    grad_rows: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    lse_given: bool,
    request: RowRequest,
) -> Gradients:
    """Gradients from those of the rows and of the lse that the forward pass returned (`None`: not used).

    `lse` (B, Hq, R) is the forward pass's, given or computed; `None` for raw scores.
    """
    heads, rows = query.shape[1:3]
    kv_heads, length = key.shape[1:3]
    group = heads // kv_heads
    dtype = grad_rows.dtype
    weights = request.head_weights(heads, dtype, query.device)
    d_query, d_key = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key))
    d_lse = torch.zeros_like(lse) if lse is not None and lse_given else None
    d_weights = torch.zeros_like(weights) if isinstance(request.head_reduction, Tensor) else None
    block_keys = max(KEYS_AT_LEAST, BLOCK_ELEMENTS // max(1, group * rows))

    for sample, spans in enumerate(request.spans if rows else ()):
        by_key = _by_key(grad_rows[sample], spans, length, request)
        for g in range(kv_heads):
            some = slice(g * group, (g + 1) * group)
            q = query[sample, some].to(dtype).reshape(group * rows, -1)
            known = None
            if lse is not None:
                known = lse[sample, some].masked_fill(lse[sample, some] == -torch.inf, torch.inf)[..., None]
            # by_key is per head only where heads were kept apart.
            upstream = by_key[{"none": some, "kv_group": slice(g, g + 1)}.get(request.reduces, slice(0, 1))]
            mean = grad_lse[sample, some, :, None] * -1 if grad_lse is not None else None
            if known is not None and not lse_given:
                expected = torch.zeros(group, rows, 1, dtype=dtype, device=query.device)
                for start, stop in blocks(0, length, block_keys):
                    p, _, _ = _block(q, key[sample, g], known, request, sample, rows, start, stop)
                    expected += (p * upstream[..., start:stop] * weights[some, None, None]).sum(-1, keepdim=True)
                mean = expected if mean is None else expected + mean
            for start, stop in blocks(0, length, block_keys):
                p, k, slope = _block(q, key[sample, g], known, request, sample, rows, start, stop)
                received = p * upstream[..., start:stop] if known is not None else upstream[..., start:stop]
                # For raw scores `p` holds the scores, which the weights multiply.
                if d_weights is not None:
                    d_weights[some] += (p * upstream[..., start:stop]).sum((1, 2))
                ds = (received * weights[some, None, None]).expand(group, rows, stop - start)
                if d_lse is not None:
                    d_lse[sample, some] -= ds.sum(-1)
                elif mean is not None:
                    ds = ds - p * mean
                dx = (ds * slope * request.scale).reshape(group * rows, -1)
                d_query[sample, some] += (dx @ k).view(group, rows, -1)
                d_key[sample, g, start:stop] += dx.T @ q
    return Gradients(d_query.to(query.dtype), d_key.to(key.dtype), d_lse, d_weights)


def _by_key(grad: Tensor, spans: list[tuple[int, int]], length: int, request: RowRequest) -> Tensor:
    """Gradient of a sample's rows (heads or 1, rows or 1, C) at the keys its columns stand for: (.., .., N)."""
    if request.row_reduction:
        grad = grad.unsqueeze(-2)
        if request.row_reduction == "mean":
            grad = grad / request.rows
    if grad.dim() == 2:
        grad = grad[None]
    result = grad.new_zeros(*grad.shape[:2], length)
    column = 0
    for start, stop in spans:
        result[..., start:stop] += grad[..., column : column + stop - start]
        column += stop - start
    return result


def _block(
    q: Tensor,
    key: Tensor,
    lse: Tensor | None,
    request: RowRequest,
    sample: int,
    rows: int,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (raw: scores) of the keys [start, stop), those keys, and the softcap's derivative.

    q (group * rows, D) and lse (group, rows, 1) give (group, rows, stop - start). Hidden keys have probability,
    score and derivative 0, and those that no row sees are zeros: what they hold reaches no gradient.
    """
    k = key[start:stop].to(q.dtype)
    visible = visible_keys(request, sample, slice(0, rows), start, stop, key.device)
    if visible is not None:
        k = k.masked_fill(~visible.any(0)[:, None], 0.0)
    s = ((q @ k.T) * request.scale).view(-1, rows, stop - start)
    slope = s.new_ones(())
    if request.softcap is not None:
        s = torch.tanh(s / request.softcap)
        slope = 1 - s * s
        s = s * request.softcap
    if visible is not None:
        s = s.masked_fill(~visible, 0.0 if lse is None else -torch.inf)
        slope = slope.masked_fill(~visible, 0.0) if slope.dim() else visible.to(s.dtype)
    return (s if lse is None else torch.exp(s - lse)), k, slope
