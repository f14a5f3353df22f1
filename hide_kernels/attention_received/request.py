"""What `attention_received` takes and returns beside the request that it shares with `attention_rows`."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Reduction = Literal["sum", "mean", "max"]


class AttentionReceived(NamedTuple):
    """`received` as `attention_received` documents; `lse` (B, Hq, R), natural log, or `None` if not asked for."""

    received: Tensor
    lse: Tensor | None
