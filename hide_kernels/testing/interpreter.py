"""Run the Triton kernels on the CPU, interpreted, in a process that compiles them elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest import mock

from hide_kernels.attention_rows import triton_kernels, triton_launch


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, `attention_rows(..., backend="triton")` serves float16 and float32 tensors on the CPU.

    Triton decides when a function is decorated whether it is to be interpreted, for its own standard functions too.
    So both modules are loaded a second time with `TRITON_INTERPRET=1` and take the place of the first.
    """
    import triton.language as tl
    from triton.language import standard
    from triton.runtime.jit import JITFunction

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", TRITON_INTERPRET="1"))
        functions = _copy(standard)
        # The interpreter knows sums and maxima by the identity of their combining functions in here.
        stack.enter_context(mock.patch.object(tl, "standard", functions))
        for name, value in vars(standard).items():
            if isinstance(value, JITFunction) and getattr(tl, name, None) is value:
                stack.enter_context(mock.patch.object(tl, name, getattr(functions, name)))
        kernels = _copy(triton_kernels)
        stack.enter_context(mock.patch.object(triton_launch, "kernels", kernels))
        yield


def _copy(module: ModuleType) -> ModuleType:
    """`module`, executed again under a name of its own. It stays in `sys.modules`, which takes it apart at exit."""
    name = f"{module.__name__}_interpreted"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, module.__file__)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
