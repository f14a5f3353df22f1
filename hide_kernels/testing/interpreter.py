"""Run the Triton kernels on the CPU, interpreted, in a process that compiles them elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from hide_kernels.attention_rows import triton_kernels as row_kernels
from hide_kernels.attention_rows import triton_launch as row_launch
from hide_kernels.launch import Launch
from hide_kernels.token_maps import triton_kernels as map_kernels
from hide_kernels.token_maps import triton_launch as map_launch


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, `backend="triton"` of `attention_rows` and `token_maps` serves float16 and float32 tensors on the CPU.

    Triton decides when a function is decorated whether it is to be interpreted, for its own standard functions too.
    So their modules are loaded a second time with `TRITON_INTERPRET=1` and take the place of the first.

    Every address that a kernel reads or writes must lie in one of its tensors, or the call is an `IndexError`.
    """
    import triton.language as tl
    from triton.language import standard
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", TRITON_INTERPRET="1"))
        # The interpreter patches Triton's language and does not put all of it back.
        core = tl.core
        stack.enter_context(_put_back(tl, core, tl.math, core.tensor, core.dtype, core.tensor_descriptor_base))
        functions = _copy(standard)
        # The interpreter knows sums and maxima by the identity of their combining functions in here.
        stack.enter_context(mock.patch.object(tl, "standard", functions))
        for name, value in vars(standard).items():
            if isinstance(value, JITFunction) and getattr(tl, name, None) is value:
                stack.enter_context(mock.patch.object(tl, name, getattr(functions, name)))
        for launcher, kernels in ((row_launch, row_kernels), (map_launch, map_kernels)):
            stack.enter_context(mock.patch.object(launcher, "kernels", _copy(kernels)))
        # It would patch the language in every call of every function, a third of its time; here it does so once.
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": core}))
        patched = SimpleNamespace(restore=lambda: None)
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang", lambda function: patched))
        # It would work out whether integers overflow, half of its time, for an assertion that it then leaves out.
        builder = interpreter.interpreter_builder
        options = replace(builder.options, sanitize_overflow=False)
        stack.enter_context(mock.patch.object(builder, "options", options))
        # It would make its table of types anew for every value. Types of pointers have no hash, and one answer.
        of_pointers, of_scalars = np.dtype(np.uint64), functools.cache(interpreter._get_np_dtype)
        stack.enter_context(
            mock.patch.object(
                interpreter,
                "_get_np_dtype",
                lambda kind: of_pointers if kind.scalar.is_ptr() else of_scalars(kind.scalar),
            )
        )
        _check_addresses(stack)
        _round_products_once(stack)
        yield


@contextmanager
def _put_back(*owners: Any) -> Iterator[None]:
    """On leaving, the attributes of these modules and classes are what they were on entering."""
    before = [dict(vars(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, attributes in zip(owners, before, strict=True):
            for name, value in list(vars(owner).items()):
                if name not in attributes:
                    delattr(owner, name)
                elif attributes[name] is not value:
                    setattr(owner, name, attributes[name])


def _check_addresses(stack: ExitStack) -> None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    extents: list[tuple[int, int]] = []
    outside: list[str] = []
    run = Launch.run

    def run_checked(launch: Launch) -> None:
        tensors = [x for x in launch.arguments.values() if isinstance(x, Tensor) and x.numel()]
        extents[:] = [_extent(tensor) for tensor in tensors]
        outside.clear()
        try:
            run(launch)
        finally:
            extents.clear()
        if outside:
            raise IndexError(f"{launch.kernel.fn.__name__}: addresses lie outside the tensors in {outside[0]}")

    def checked(name: str, mask_at: int) -> Callable[..., Any]:
        access = getattr(InterpreterBuilder, name)

        def call(builder: Any, *arguments: Any) -> Any:
            if not extents:  # a kernel of someone else's
                return access(builder, *arguments)
            addresses, mask = arguments[0].data.astype(np.int64), arguments[mask_at]
            inside = np.zeros(addresses.shape, bool)
            for first, last in extents:
                inside |= (first <= addresses) & (addresses < last)
            # Not raised here: Triton would leave its language patched. The access itself is left out.
            allowed = mask.data.astype(bool) & inside
            if (allowed != mask.data).any():
                outside.append(name)
            masked = TensorHandle(allowed.astype(mask.data.dtype), mask.dtype)
            return access(builder, *arguments[:mask_at], masked, *arguments[mask_at + 1 :])

        return call

    stack.enter_context(mock.patch.object(Launch, "run", run_checked))
    for name, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
        stack.enter_context(mock.patch.object(InterpreterBuilder, name, checked(name, mask_at)))


def _round_products_once(stack: ExitStack) -> None:
    """An element of a product has the same bits in a tile of any shape, as on a card, whatever BLAS numpy calls."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(builder: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        exact = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + total.data
        return TensorHandle(exact.astype(total.data.dtype), total.dtype.scalar)

    stack.enter_context(mock.patch.object(InterpreterBuilder, "create_dot", dot))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor and the one past its last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _copy(module: ModuleType) -> ModuleType:
    """`module`, executed again under a name of its own. It stays in `sys.modules`, which takes it apart at exit."""
    name = f"{module.__name__}_interpreted"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, module.__file__)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
