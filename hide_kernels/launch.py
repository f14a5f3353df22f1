"""One launch of a Triton kernel, as the launchers plan it and tests compile it without a GPU."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `arguments` by name, compile options included.

    `compiled` keeps what Triton compiled for it. Launches on one device that differ in nothing that Triton specialises
    on may share it: all but the first then skip Triton's own search for it, most of the time of a launch.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    compiled: list[Any] | None = None

    def __post_init__(self) -> None:
        _hash_in_order(self.kernel.fn.__module__)

    def run(self) -> None:
        if self.compiled:
            self.compiled[0][self.grid](*(self.arguments[name] for name in self.kernel.arg_names))
            return
        compiled = self.kernel[self.grid](**self.arguments)
        if self.compiled is not None and compiled is not None:  # the interpreter compiles nothing
            self.compiled.append(compiled)


@cache
def _hash_in_order(module: str) -> None:
    """Have Triton hash the functions of a module as they stand there, callees first.

    By its hash a kernel is found in Triton's cache on disk. In Triton 3.6 that of a function lacks the constants of
    callees that have no hash yet, and so would depend on which kernel of a process was launched first.
    """
    from triton.runtime.jit import JITFunction

    for function in list(vars(sys.modules[module]).values()):
        if isinstance(function, JITFunction):
            function.cache_key  # noqa: B018


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
