"""From a validated request to the implementation that serves it."""

from __future__ import annotations

from torch import Tensor

from ..attention_rows.request import RowOutput, RowRequest
from .request import AttentionReceived, Reduction
from .torch_blocked import attention_received_torch


def run(
    name: str, query: Tensor, key: Tensor, request: RowRequest, reduction: Reduction, output: RowOutput
) -> AttentionReceived:
    """The results of a validated request, by the backend of this name."""
    return attention_received_torch(query, key, request, reduction, output)
