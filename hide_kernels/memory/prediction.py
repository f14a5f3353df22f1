"""Memory of a run that does not happen: the same code on fake tensors, which have shapes and no data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from hide_kernels.memory.constants import Constants
from hide_kernels.memory.recorder import Recorder, adopt, named_tensors
from hide_kernels.memory.report import Owner
from hide_kernels.memory.storages import LIFT, StorageTracker, line_of_caller, tensors_in

Operators = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
"""Called with each operator (an `OpOverload`), its arguments, keywords and result."""


@contextlib.contextmanager
def predict(
    *roots: nn.Module | Tensor,
    owners: bool = False,
    groups: Callable[[Owner], str] | None = None,
    rounding: int = 512,
    operators: Operators | None = None,
) -> Iterator[Recorder]:
    """Predict the memory of the block without running it: `with predict() as recording: ...`, then `recording.report`.

    The block runs as it is, but on fake tensors (`torch._subclasses.FakeTensorMode`): models built inside take no
    memory and operators no time, so a 72B model runs on a laptop in seconds. Real tensors and modules from outside can
    be used, on any device, "meta" included; they are read for their shapes, and never written.

    All tensors count as one device's memory, whichever the code names; a move between devices is no copy. Operators are
    those of PyTorch's CPU dispatch, whose scaled_dot_product_attention allocates, as fused CUDA kernels do, its output
    and log-sum-exp. Small tensors that derive from constants or from real tensors keep their values, so that masks,
    lengths and indices can decide (`tolist`, `nonzero`, `if`); what depends on other values is refused.

    Not part of it: kernels' workspaces (cuBLAS: 8.1 MiB, from sm_90 on 32 MiB, for each stream that multiplies), memory
    lost between the allocator's blocks, the CUDA context. See docs/memory_profiler.md.

    Args:
        roots: as for `profile`; modules and tensors built inside the block need no mention.
        owners: as for `profile`.
        groups: as for `profile`.
        rounding: every storage takes a multiple of it, in bytes: 512 as in CUDA's allocator, 1 for the CPU.
        operators: told of every operator, in the stage that `current_stage` names.

    Raises:
        TypeError: a root is neither a module nor a tensor.
        ValueError: a recording is running; `rounding` is no positive integer; inside the block, from an operator whose
            result depends on values, or that has no fake implementation: it names the operator and the line.
    """
    if not isinstance(rounding, int) or rounding < 1:
        raise ValueError(f"rounding: expected a positive number of bytes, got {rounding!r}")
    tensors = named_tensors(roots, "predict")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = FakeStorages(mode, rounding, owners, groups, operators)
    recorder = Recorder("predicted", None, tracker, None)
    adopt(tracker, roots, [(tracker.fake(tensor), name, kind) for tensor, name, kind in tensors])
    # Module.to() swaps fake parameters, which fails for those that something refers to weakly.
    swap = mock.patch.object(torch.utils, "swap_tensors", _replace_data)
    # The fakes' own goes element by element.
    tolist = mock.patch.object(FakeTensor, "tolist", tracker.tolist)
    try:
        with recorder.running("predict", mode, tracker.hooks(), tracker, _OneDevice(), swap, tolist):
            yield recorder
    finally:
        for tensor, _, _ in tensors:
            if isinstance(tensor.grad, FakeTensor):
                tensor.grad = None


class FakeStorages(StorageTracker):
    """Storages of fake tensors. Real tensors are replaced by fakes at the door, small ones with their values."""

    def __init__(
        self,
        mode: FakeTensorMode,
        rounding: int,
        owners: bool,
        groups: Callable[[Owner], str] | None,
        operators: Operators | None = None,
    ) -> None:
        super().__init__(None, rounding, owners, groups)
        self._mode, self._operators = mode, operators
        self._fakes = WeakIdKeyDictionary()
        self._flat = WeakIdKeyDictionary()
        self._constants = Constants(mode)

    def fake(self, tensor: Tensor) -> Tensor:
        """The fake that stands for a real tensor: always the same one, sharing storage where the real ones do."""
        if isinstance(tensor, FakeTensor):
            return tensor
        fake: Tensor | None = self._fakes.get(tensor)
        if fake is None:
            fake = self._mode.from_tensor(tensor) if tensor.device.type == "cpu" else self._on_cpu(tensor)
            self._fakes[tensor] = fake
            self._constants.remember(fake, tensor)
        return fake

    def _on_cpu(self, tensor: Tensor) -> Tensor:
        """A fake CPU tensor for one of another device: a view of the storage's fake."""
        storage = tensor.untyped_storage()
        with self._mode:
            if storage not in self._flat:
                self._flat[storage] = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")
            whole = self._flat[storage][: storage.nbytes() // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
            return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    @property
    def tolist(self) -> Callable[[FakeTensor], Any]:
        """`Tensor.tolist` of fakes."""
        slow = FakeTensor.tolist

        def tolist(tensor: FakeTensor) -> Any:
            values = self._constants.values(tensor)
            return slow(tensor) if values is None else values.tolist()

        return tolist

    def prepare(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _cpu(kwargs["device"])}
        if func is LIFT or all(isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs))):
            return args, kwargs
        return tree_map_only(Tensor, self.fake, (args, kwargs))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            out = self._constants.run(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"predict: {error.func} at {line_of_caller()} depends on the values of a tensor that has none here. "
                "Values are known of small tensors made from constants or from real tensors alone: make what decides "
                "(indices, masks, lengths) before the block, or pass it in."
            ) from error
        except UnsupportedOperatorException as error:
            raise ValueError(
                f"predict: {error.func} at {line_of_caller()} has no fake implementation; "
                "give it one with torch.library.register_fake"
            ) from error
        if self._operators is not None:
            self._operators(func, args, kwargs, out)
        return out


class _OneDevice(TorchFunctionMode):
    """Reads every accelerator as the CPU: fake CUDA tensors need a CUDA build, and their attention would be unfused."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _cpu(kwargs["device"])}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.to:
            args = tuple(_cpu(a) if isinstance(a, (str, torch.device)) or type(a) is int else a for a in args)
        if func in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], (list, tuple)):
            # It reads the memory of tensors in the list, which fakes have none of.
            args = (tree_map_only(Tensor, Tensor.item, args[0]), *args[1:])
        return func(*args, **kwargs)


def _cpu(device: Any) -> Any:
    if device is None or (not isinstance(device, int) and torch.device(device).type in ("cpu", "meta")):
        return device
    return torch.device("cpu")


def _replace_data(parameter: Tensor, new: Tensor) -> None:
    parameter.data = new.detach()
