"""Every `torch.library` registration, and nothing else: schema, kernel, fake and gradient of each operator.

Eager calls without gradients do not come here: they go straight to the implementation, which saves the dispatcher's
time. `torch.compile`, autograd and tensor subclasses do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .attention_received import dispatch as received_dispatch
from .attention_rows.backward import attention_rows_backward
from .attention_rows.dispatch import resolve, run
from .attention_rows.request import RowOutput, RowRequest
from .attention_rows.torch_blocked import without_autocast

# What lies between lse and backend is `RowRequest.flat`, in its order. The second result is the lse that was computed:
# empty for raw scores and where one was given.
SCHEMA = (
    "(Tensor query, Tensor key, Tensor? lse, Tensor? weights, Tensor? q_positions, Tensor? kv_starts, Tensor? kv_lens, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, SymInt[] spans, SymInt[] spans_per_sample, "
    "SymInt columns, SymInt? max_seqlen_q, SymInt? max_seqlen_k, str head_reduction, str? row_reduction, bool causal, "
    "SymInt? window, float scale, float? softcap, bool softmax, str? backend) -> (Tensor, Tensor)"
)
ARGUMENTS = tuple(argument.split()[-1] for argument in SCHEMA[1 : SCHEMA.index(")")].split(", "))


class _Call(NamedTuple):
    """One call of the operator, taken apart."""

    query: Tensor
    key: Tensor
    lse: Tensor | None
    request: RowRequest
    backend: str | None

    @classmethod
    def of(cls, *arguments: Any) -> _Call:
        """From the arguments of `SCHEMA`."""
        query, key, lse, *flat, backend = arguments
        request = RowRequest.of_flat(query, key, dict(zip(ARGUMENTS[3:-1], flat, strict=True)))
        return cls(query, key, lse, request, backend)

    @property
    def computes_lse(self) -> bool:
        """Whether there is a second result."""
        return self.request.softmax and self.lse is None

    def fake(self) -> tuple[Tensor, Tensor]:
        """Results of the right shapes and dtypes."""
        dtype = self.request.out_dtype(self.query)
        lse_shape = self.request.lse_shape if self.computes_lse else (0,)
        return self.query.new_empty(self.request.shape, dtype=dtype), self.query.new_empty(lse_shape, dtype=dtype)


@torch.library.custom_op(add_op_namespace_prefix("attention_rows"), mutates_args=(), schema=SCHEMA)
def attention_rows(*arguments):  # type: ignore[no-untyped-def]
    """The operator: arguments of `SCHEMA` -> (rows, lse); lse is empty where none is computed."""
    call = _Call.of(*arguments)
    name = resolve(call.backend, call.query, call.key, call.request)
    rows, lse = run(name, call.query, call.key, call.request, RowOutput(call.lse, return_lse=call.computes_lse))
    return rows, lse if call.computes_lse else rows.new_empty(0)


@attention_rows.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    return _Call.of(*arguments).fake()


@torch.library.custom_op(
    add_op_namespace_prefix("attention_received"), mutates_args=(), schema=f"(str reduction, {SCHEMA[1:]}"
)
def attention_received(reduction, *arguments):  # type: ignore[no-untyped-def]
    """As `attention_rows` with rows summed, but reduced over queries as the word before says; has no gradient."""
    call = _Call.of(*arguments)
    name = resolve(call.backend, call.query, call.key, call.request, "attention_received")
    output = RowOutput(call.lse, return_lse=call.computes_lse)
    received, lse = received_dispatch.run(name, call.query, call.key, call.request, reduction, output)
    return received, lse if call.computes_lse else received.new_empty(0)


@attention_received.register_fake
def _(reduction, *arguments):  # type: ignore[no-untyped-def]
    return _Call.of(*arguments).fake()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = {name: x for name, x in zip(ARGUMENTS, inputs, strict=True) if isinstance(x, Tensor)}
    ctx.others = {name: x for name, x in zip(ARGUMENTS, inputs, strict=True) if name not in tensors}
    ctx.names = tuple(tensors)
    ctx.save_for_backward(*tensors.values(), output[1])


def _backward(ctx: Any, grad_rows: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        # The gradients would pass for constants, and second derivatives lack what goes through them.
        raise RuntimeError("attention_rows differentiates once: got create_graph=True, want detached tensors")
    *tensors, computed = ctx.saved_tensors
    given = ctx.others | dict(zip(ctx.names, tensors, strict=True))
    call = _Call.of(*(given[name] for name in ARGUMENTS))
    if not call.request.dense:
        raise ValueError("query: packed and paged calls record no gradients")
    with without_autocast(call.query.device):
        gradients = attention_rows_backward(
            grad_rows,
            grad_lse if call.computes_lse else None,
            call.query,
            call.key,
            (computed if call.lse is None else call.lse) if call.request.softmax else None,
            call.lse is not None,
            call.request,
        )
    by_name = gradients._asdict()
    return tuple(by_name.get(name) for name in ARGUMENTS)


attention_rows.register_autograd(_backward, setup_context=_save)
