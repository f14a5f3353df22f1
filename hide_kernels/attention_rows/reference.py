"""`attention_rows` as it is defined, in plain PyTorch: the whole score matrix, in the dtype of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .request import KeySpans, reduced_heads


def attention_rows_reference(
    query: Tensor,
    key: Tensor,
    *,
    key_spans: KeySpans | None = None,
    q_positions: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    kv_starts: Tensor | None = None,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    softmax: bool = True,
    head_reduction: Literal["mean", "none", "kv_group"] | Tensor | Sequence[float] = "mean",
    row_reduction: Literal["mean", "sum"] | None = None,
    grouped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows and lse (empty for raw scores) of dense inputs, as `attention_rows` documents its arguments.

    float64 inputs give an oracle, those of the dtype under test the error that a plain expression makes in it. Nothing
    is checked. grouped: as in `scaled_scores`.
    """
    visible = visible_keys(query, key, q_positions, causal, window, kv_starts, kv_lens)
    # Keys that no row of a sample sees may hold NaN.
    key = key.masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    scores = scaled_scores(query, key, scale=scale, softcap=softcap, grouped=grouped)
    if softmax:
        rows, lse = softmax_rows(scores, visible[:, None])
    else:
        rows, lse = scores.masked_fill(~visible[:, None], 0.0), scores.new_empty(0)
    rows = columns_of_spans(reduced_heads(rows, head_reduction, key.shape[1]), key_spans)
    if row_reduction is not None:
        rows = rows.mean(-2) if row_reduction == "mean" else rows.sum(-2)
    return rows, lse


def scaled_scores(
    query: Tensor, key: Tensor, *, scale: float | None = None, softcap: float | None = None, grouped: bool = False
) -> Tensor:
    """(B, Hq, R, N) scores of query (B, Hq, R, D) over key (B, Hkv, N, D), before any mask.

    grouped: multiply the heads of a group with their key at once instead of repeating it. The same sums, but a library
    of matrix products may add them up in another order, and err by several times more or less.
    """
    group = query.shape[1] // key.shape[1]
    if grouped:
        together = query.unflatten(1, (-1, group)).flatten(2, 3) @ key.transpose(2, 3)
        scores = together.view(*query.shape[:3], key.shape[2])
    else:
        scores = query @ key.repeat_interleave(group, dim=1).transpose(2, 3)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def softmax_rows(scores: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities (B, Hq, R, N) and lse (B, Hq, R) of scores; rows that see nothing are zeros with lse -inf.

    visible: bool, broadcastable to the scores; `None`: every key.
    """
    if visible is not None:
        scores = torch.where(visible, scores, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    seen = (lse > -torch.inf)[..., None]
    return torch.where(seen, torch.exp(scores - torch.where(seen, lse[..., None], 0.0)), 0.0), lse


def visible_keys(
    query: Tensor,
    key: Tensor,
    q_positions: Tensor | None,
    causal: bool,
    window: int | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
) -> Tensor:
    """(B, R, N) bool of the keys that each row sees."""
    batch, rows, length = query.shape[0], query.shape[2], key.shape[2]
    keys = torch.arange(length, device=query.device)
    visible = torch.ones(batch, rows, length, dtype=torch.bool, device=query.device)
    if q_positions is not None:
        positions = q_positions.expand(batch, rows)[..., None]
        if causal:
            visible = visible & (keys <= positions)
        if window is not None:
            visible = visible & (keys > positions - window)
    if kv_starts is not None:
        visible = visible & (keys >= kv_starts[:, None, None])
    if kv_lens is not None:
        visible = visible & (keys < kv_lens[:, None, None])
    return visible


def columns_of_spans(rows: Tensor, key_spans: KeySpans | None) -> Tensor:
    """The columns of the spans one after another; samples with fewer are padded with zeros."""
    if key_spans is None:
        return rows
    nested = any(len(span) == 0 or not isinstance(span[0], int) for span in key_spans)
    of_sample: Any = key_spans if nested else [key_spans] * len(rows)
    picked = [
        torch.cat([row[..., :0], *(row[..., start:stop] for start, stop in spans)], -1)
        for row, spans in zip(rows, of_sample, strict=True)
    ]
    width = max(row.shape[-1] for row in picked)
    return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[-1])) for row in picked])
