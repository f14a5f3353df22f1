"""A validated call of `attention_rows`, as the implementations take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
