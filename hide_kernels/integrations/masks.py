"""Attention masks as frameworks make them -> which keys each query sees, and what `attention_rows` takes for that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def visible_keys(mask: Tensor, length: int) -> Tensor:
    """(B, Q, K) or, for a padding mask, (B, 1, K) bool of the keys that each query sees.

    mask: (B, keys) with 0 for padding, or (B, heads, Q, keys) that says it of every query, bool or added to the scores.
    length: of the keys, K. Raises `ValueError` for a mask of fewer keys, unless one stands for all.
    """
    if mask.shape[-1] == 1:
        mask = mask.expand(*mask.shape[:-1], length)
    if mask.shape[-1] < length:
        raise ValueError(f"attention_mask: got shape {tuple(mask.shape)}, want {length} keys or more")
    if mask.dim() == 2:
        return mask[:, None, -length:].bool()
    mask = mask[:, 0, :, :length]
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((hidden | (mask == 0)).all()):
        raise ValueError("attention_mask: an additive mask with values other than 0 and -inf changes the softmax")
    return ~hidden


def first_position(visible: Tensor | None, queries: int, keys: int) -> int:
    """Sequence position of the first query: keys - queries, or less where a preallocated cache is not full."""
    if visible is None or visible.shape[1] == 1 != queries:
        return keys - queries
    # The last key that a query sees is its own, unless the query is padding: then one at the other end tells.
    return int(torch.maximum(_last(visible[:, 0]), _last(visible[:, -1]) + 1 - queries).max())


def _last(visible: Tensor) -> Tensor:
    """Index of the last True along the last axis; -1 where there is none."""
    index = visible.shape[-1] - 1 - visible.flip(-1).int().argmax(-1)
    return torch.where(visible.any(-1), index, -1)


def mask_limits(
    visible: Tensor | None,
    here: list[int],
    first: int,
    window: int | None,
    causal: bool,
    batch: int,
    keys: int,
    device: torch.device,
    layer: int,
) -> dict[str, Any]:
    """The mask as `attention_rows` takes it: positions, starts and lengths. An equal mask or a `ValueError`."""
    positions = torch.tensor([first + row for row in here], device=device)
    if visible is None:
        return {"q_positions": positions}
    seen = visible.any(1).expand(batch, keys)
    starts = seen.int().argmax(-1)
    lens = _last(seen) + 1
    n = torch.arange(keys, device=device)
    expected = ((n >= starts[:, None]) & (n < lens[:, None]))[:, None]
    actual = seen[:, None]
    if causal and visible.shape[1] > 1:
        expected = expected & (n <= positions[:, None])
        if window is not None:
            expected = expected & (n > positions[:, None] - window)
        actual = visible[:, here].expand(batch, len(here), keys)
        # What a padding query sees is the implementation's affair: nobody reads its row.
        expected, actual = (x & (positions[:, None] >= starts[:, None, None]) for x in (expected, actual))
    if not torch.equal(expected.expand_as(actual), actual):
        raise ValueError(f"layer {layer}: its attention mask is not causal, sliding or padding; rows would be wrong")
    return {"q_positions": positions, "kv_starts": starts, "kv_lens": lens}
