"""Values of small fake tensors that follow from constants alone: what indices, masks and lengths are made of."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

from hide_kernels.memory.storages import LIFT, tensors_in

# Elements of a tensor whose values are kept: position ids of a long prompt, not activations.
LIMIT = 2**20
aten = torch.ops.aten
# The result does not depend on what the first tensor holds.
_BLIND = {
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
}  # fmt: skip
_SHAPED_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Constants:
    """Runs operators on fakes, and again on the values behind them where all of those are known.

    A fake's values are a real CPU tensor; views of one fake have views of one real tensor, so writing in place is seen
    through all of them, and a write that is not known makes them all unknown.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode

    def remember(self, fake: Tensor, real: Tensor) -> None:
        """Give a fake the values of a real tensor, unless it is large or holds none that can be read."""
        if real.layout is torch.strided and real.numel() <= LIMIT and real.device.type != "meta":
            with unset_fake_temporarily():
                self._set(fake, real.detach().cpu().clone())

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = self._values(func, args, kwargs)
        if known is not None and _SHAPED_BY_VALUES & set(func.tags):
            return tree_map_only(Tensor, self._fake_like, self._real(func, *known))
        out = func(*self._index(func, args), **kwargs)
        if func is LIFT:
            self.remember(out, args[0])
            return out
        fakes = [leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor)]
        if known is not None and fakes and all(fake.numel() <= LIMIT for fake in fakes):
            # Not every operator of every dtype has a CPU kernel.
            with contextlib.suppress(NotImplementedError):
                for fake, real in zip(fakes, tensors_in(self._real(func, *known)), strict=True):
                    self._set(fake, real)
                return out
        for position, name in _written(func):
            for tensor in tensors_in(kwargs.get(name, args[position] if position < len(args) else None)):
                self._forget(tensor)
        return out

    def _values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with values for fakes, or `None` where they do not decide the result."""
        if func.namespace != "aten" or torch.Tag.nondeterministic_seeded in func.tags or _uninitialised(func):
            return None
        tensors = list(tensors_in((args, kwargs)))
        if func in _BLIND:
            if tensors[0].numel() > LIMIT:
                return None
            with unset_fake_temporarily():
                args = (torch.empty(tensors[0].shape, dtype=tensors[0].dtype), *args[1:])
        elif any(self.values(tensor) is None for tensor in tensors) or not (tensors or _makes_tensors(func)):
            return None
        return tree_map_only(FakeTensor, self.values, (args, kwargs))

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _fake_like(self, real: Tensor) -> Tensor:
        fake = aten.empty_strided.default(real.size(), real.stride(), dtype=real.dtype, device=real.device)
        self._set(fake, real)
        return fake

    def _index(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Known masks as integer indices, whose number a fake can know."""
        if func is not aten.index.Tensor or not any(i is not None and i.dtype == torch.bool for i in args[1]):
            return args
        indices: list[Tensor | None] = []
        for index in args[1]:
            mask = None if index is None or index.dtype != torch.bool else self.values(index)
            if mask is None:
                indices.append(index)
            else:
                indices += [
                    self._fake_like(column) for column in self._real(aten.nonzero.default, (mask,), {}).unbind(1)
                ]
        return (args[0], indices, *args[2:])

    @staticmethod
    def values(fake: Tensor) -> Tensor | None:
        """The real tensor behind a fake, if it is known."""
        real: Tensor | None = getattr(fake, "_hide_values", None)
        return None if real is None or getattr(real.untyped_storage(), "_hide_unknown", False) else real

    @staticmethod
    def _set(fake: Any, real: Tensor) -> None:
        fake._hide_values = real

    @staticmethod
    def _forget(fake: Any) -> None:
        real = getattr(fake, "_hide_values", None)
        if real is not None:
            real.untyped_storage()._hide_unknown = True


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


@functools.cache
def _uninitialised(func: Any) -> bool:
    return "empty" in func._schema.name


@functools.cache
def _makes_tensors(func: Any) -> bool:
    return any(argument.name == "dtype" for argument in func._schema.arguments)
