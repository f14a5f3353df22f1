"""A validated call of `attention_rows`, as the implementations take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Spans = list[list[tuple[int, int]]]
HeadReduction = Literal["mean", "none", "kv_group"] | Tensor


@dataclass(frozen=True)
class RowRequest:
    """What `attention_rows` documents, with defaults filled in and lengths expanded.

    `rows` is R. `spans` holds one list of (start, stop) per sample, `q_positions` is (B, R), `head_reduction` a word or
    (Hq,) weights of the output's dtype, `shape` the shape of the result.
    """

    rows: int
    spans: Spans
    q_positions: Tensor | None
    causal: bool
    window: int | None
    kv_starts: Tensor | None
    kv_lens: Tensor | None
    scale: float
    softcap: float | None
    softmax: bool
    head_reduction: HeadReduction
    row_reduction: Literal["mean", "sum"] | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, query: Tensor, key: Tensor, **fields: Any) -> RowRequest:
        """A request for these tensors, with `rows` and `shape` filled in."""
        batch, heads, rows = query.shape[:3]
        reduction = fields["head_reduction"]
        kept = {"none": (heads,), "kv_group": (key.shape[1],)}.get(reduction, ()) if isinstance(reduction, str) else ()
        columns = max([0, *(sum(stop - start for start, stop in spans) for spans in fields["spans"])])
        shape = (batch, *kept, *(() if fields["row_reduction"] else (rows,)), columns)
        return cls(rows=rows, shape=shape, **fields)

    def head_weights(self, heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What each head counts in the sum that it goes into: (Hq,)."""
        if isinstance(self.head_reduction, Tensor):
            return self.head_reduction
        terms = {"mean": heads, "kv_group": heads // kv_heads, "none": 1}[self.head_reduction]
        return torch.full((heads,), 1 / terms, dtype=dtype, device=device)
