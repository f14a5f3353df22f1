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

from hide_kernels import backends
from hide_kernels.attention_received import triton_kernels as received_kernels
from hide_kernels.attention_received import triton_launch as received_launch
from hide_kernels.attention_rows import triton_kernels as row_kernels
from hide_kernels.attention_rows import triton_launch as row_launch
from hide_kernels.launch import Launch
from hide_kernels.token_maps import triton_kernels as map_kernels
from hide_kernels.token_maps import triton_launch as map_launch


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, `backend="triton"` of `attention_rows`, `attention_received` and `token_maps` serves tensors on the CPU.

    With a GPU's arithmetic, which Triton's interpreter has not: products of bfloat16, additions that are contracted
    with a product where a launch allows it (`enable_fp_fusion`), and an exp2 in float32 that is wrong by up to two
    units in the last place.

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
        launchers = (row_launch, row_kernels), (received_launch, received_kernels), (map_launch, map_kernels)
        copies: dict[str, ModuleType] = {}  # one imports functions of another
        for launcher, kernels in launchers:
            with mock.patch.dict(sys.modules, copies):
                copy = _copy(kernels)
            sys.modules[copy.__name__] = copies[kernels.__name__] = copy
            stack.enter_context(mock.patch.object(launcher, "kernels", copy))
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
        _calculate_as_a_gpu(stack)
        stack.enter_context(mock.patch.object(backends, "INTERPRETS_BFLOAT16", True))
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


def _calculate_as_a_gpu(stack: ExitStack) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    fused = [False]
    run = Launch.run

    def run_fused(launch: Launch) -> None:
        fused[0] = bool(launch.arguments.get("enable_fp_fusion"))
        run(launch)

    def values(handle: Any) -> Any:
        """The numbers of a tile. The interpreter keeps bfloat16 as its bits."""
        bits = handle.data
        return (bits.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else bits

    def dot(builder: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        # An element has the same bits in a tile of any shape, as on a card, whatever BLAS numpy calls.
        exact = np.matmul(values(a).astype(np.float64), values(b).astype(np.float64)) + total.data
        return TensorHandle(exact.astype(total.data.dtype), total.dtype.scalar)

    def negative(builder: Any, x: Any) -> Any:
        flipped = x.data ^ np.uint16(1 << 15) if x.dtype.scalar == tl.bfloat16 else -x.data
        return TensorHandle(flipped, x.dtype.scalar)

    def exp2(builder: Any, x: Any) -> Any:
        result = np.exp2(x.data)
        if result.dtype == np.float32:
            # Two units up, two down or exact, as the argument's bits say; always exact at 0, as on a card.
            units = (np.ascontiguousarray(x.data).view(np.uint32) * np.uint32(2654435761) >> 16) % 3
            wrong = result + (units.astype(np.float32) - 1) * 2 * np.spacing(result)
            result = np.where((x.data == 0) | ~np.isfinite(result) | (result == 0), result, wrong)
        return TensorHandle(result, x.dtype.scalar)

    def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
        wide = wider[z.data.dtype]
        return TensorHandle((x.data.astype(wide) * y.data + z.data).astype(z.data.dtype), z.dtype.scalar)

    multiply, add, subtract = (getattr(InterpreterBuilder, f"create_f{name}") for name in ("mul", "add", "sub"))
    wider = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}

    def product(builder: Any, x: Any, y: Any) -> Any:
        result = multiply(builder, x, y)
        if fused[0] and result.data.dtype in wider:
            result.set_attr("factors", (x.data, y.data))
        return result

    def contracted(operation: Callable[..., Any], plainly: Callable[..., Any]) -> Callable[..., Any]:
        def call(builder: Any, x: Any, y: Any) -> Any:
            if x.dtype.scalar == tl.bfloat16:  # of zero and a number, in kernels: Triton 3.6 subtracts to negate
                exact = operation(values(x), values(y))
                return TensorHandle((exact.view(np.uint32) >> 16).astype(np.uint16), tl.bfloat16)
            of_x, of_y = (handle.attr.get("factors") if fused[0] else None for handle in (x, y))
            if of_x is None and of_y is None:
                return plainly(builder, x, y)
            wide = wider[x.data.dtype]
            # One of them is a product that is not rounded; the other is what it is.
            left, right = x.data.astype(wide), y.data.astype(wide)
            if of_x is not None:
                left = of_x[0].astype(wide) * of_x[1]
            elif of_y is not None:
                right = of_y[0].astype(wide) * of_y[1]
            return TensorHandle(operation(left, right).astype(x.data.dtype), x.dtype.scalar)

        return call

    stack.enter_context(mock.patch.object(Launch, "run", run_fused))
    if hasattr(InterpreterBuilder, "create_fneg"):
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_fneg", negative))
    for name, function in (
        ("dot", dot),
        ("exp2", exp2),
        ("fma", fma),
        ("fmul", product),
        ("fadd", contracted(np.add, add)),
        ("fsub", contracted(np.subtract, subtract)),
    ):
        stack.enter_context(mock.patch.object(InterpreterBuilder, f"create_{name}", function))


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
