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
    if name == "triton":
        from .triton_launch import attention_received_triton

        return attention_received_triton(query, key, request, reduction, output)
    return attention_received_torch(query, key, request, reduction, output)
