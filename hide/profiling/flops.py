"""How many floating-point operations the stages of a flow take, counted operator by operator, on fake tensors.

Two for each multiplication and its addition in matrix products, convolutions and attention; attention counts every
query with all keys of its call, masked ones too. The sum is what `torch.utils.flop_counter` counts of a real run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from hide_kernels.memory import current_stage

_stages: ContextVar[Counter[str] | None] = ContextVar("flops", default=None)


@contextmanager
def counted_flops() -> Iterator[Counter[str]]:
    """Inside, those of `of_operator` and `add_flops` are added up by stage."""
    found: Counter[str] = Counter()
    token = _stages.set(found)
    try:
        yield found
    finally:
        _stages.reset(token)


def add_flops(flops: int) -> None:
    """Of an operator that is only stood in for; nothing happens where nobody counts."""
    if (found := _stages.get()) is not None:
        found[current_stage()] += flops


def of_operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Add an operator's, as `hide_kernels.memory.predict` is told of it."""
    packet = func.overloadpacket
    if packet.__name__.startswith("_scaled_dot_product"):
        query, key, value = args[:3]
        add_flops(attention_flops(query.shape[0] * query.shape[1], query.shape[2], key.shape[2], query, value))
    elif packet in flop_registry:
        add_flops(flop_registry[packet](*args, **kwargs, out_val=out))


def attention_flops(heads: int, rows: int, keys: int, query: Tensor, value: Tensor) -> int:
    """Of so many query heads, rows and keys; query, value: for their channels, the last dimension."""
    return 2 * heads * rows * keys * (query.shape[-1] + value.shape[-1])
