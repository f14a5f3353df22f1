"""From a validated request to the implementation that serves it."""

from __future__ import annotations

from torch import Tensor

from .. import backends
from .request import AttentionRows, RowOutput, RowRequest
from .torch_blocked import attention_rows_torch


def resolve(
    backend: str | None, query: Tensor, key: Tensor, request: RowRequest, operator: str = "attention_rows"
) -> str:
    """Name of the backend that serves the request; `ValueError` with every reason when none does."""
    return backends.resolve(operator, backend, query=query, key=key, **request.layout)


def run(name: str, query: Tensor, key: Tensor, request: RowRequest, output: RowOutput) -> AttentionRows:
    """The results of a validated request, by the backend of this name. Records no gradients."""
    if name == "triton":
        from .triton_launch import attention_rows_triton

        return attention_rows_triton(query, key, request, output)
    return attention_rows_torch(query, key, request, output)
