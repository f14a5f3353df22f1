"""Every tensor storage of a run, from the operator that allocates it to its release: real ones and fake ones alike."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from hide_kernels.memory.report import Owner, Sample

# More points than a picture has columns; beyond it neighbours are merged.
MAX_SAMPLES = 2048
# Operators of roots whose group is "weights".
_WEIGHTS = ("parameter", "buffer")
# Kinds of owners kept for each stage: a model's weights alone can be thirty.
MAX_OWNERS = 64
# Frames of these are not where a tensor was made.
_INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__, "<frozen")
# Turns the data of torch.tensor(...) into a tensor: what it is given is new.
LIFT = torch.ops.aten.lift_fresh.default


class Source(NamedTuple):
    """How a storage came about, as far as `Owner` tells it."""

    shape: tuple[int, ...]
    dtype: str
    operator: str
    line: str | None
    module: str | None
    group: str


class Block:
    """One storage: bytes, the step it was made at (-1 before the recording), and its source if owners are recorded.

    on_host: it is not counted, whatever its size.
    """

    __slots__ = ("born", "bytes", "on_host", "reference", "source")

    def __init__(self, size: int, born: int, source: Source | None, *, on_host: bool = False) -> None:
        self.bytes, self.born, self.source, self.on_host = size, born, source, on_host
        self.reference: weakref.ref[Any] | None = None


class Window:
    """The peak since it was opened, and the blocks of that peak which have been released since."""

    __slots__ = ("fallen", "peak", "stage", "step")

    def __init__(self, live: int, step: int, stage: str) -> None:
        self.peak, self.step, self.stage = live, step, stage
        self.fallen: list[Block] = []


class Alive(NamedTuple):
    """Storages by source. Of the memory that existed before, the first `found` entries of the tracker's list are in."""

    sizes: Counter[Source]
    counts: Counter[Source]
    found: int

    def add(self, source: Source, size: int) -> None:
        """One storage. Modules that differ by a number only are one."""
        if source.module is not None:
            source = source._replace(module=re.sub(r"\b\d+\b", "*", source.module))
        self.sizes[source] += size
        self.counts[source] += 1


class StorageTracker(TorchDispatchMode):
    """Bytes of the storages alive on `device` (`None`: on any), each rounded up to a multiple of `rounding`.

    A storage is new when an operator returns it, and existed before when an operator is given one that was never seen:
    it is then counted from the beginning. So `live` and the peaks are relative to `existing`, which grows as such
    storages are found; a report adds it.
    """

    def __init__(
        self, device: torch.device | None, rounding: int, owners: bool, groups: Callable[[Owner], str] | None
    ) -> None:
        super().__init__()
        self.device, self.rounding, self._owners, self.groups = device, rounding, owners, groups
        self.live = self.existing = self.step = 0
        self.stage = ""
        # Whether new storages are the host's, and not counted.
        self.on_host = False
        self.windows: list[Window] = []
        self.elsewhere: set[str] = set()
        self._blocks: dict[int, Block] = {}
        self._by_group: dict[str, int] = {}
        self._existing: list[tuple[Source, int]] = []
        self._existing_by_group: dict[str, int] = {}
        self._samples: list[tuple[int, int, str, dict[str, int]]] = []
        self._stride = 1
        self.modules = ModulePath()
        # Bound once: a weak reference keeps its callback, and the tracker must not outlive the recording in there.
        this = weakref.ref(self)
        self._released = lambda reference: None if (tracker := this()) is None else tracker._release(reference.key)

    # -- what operators do --

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # Asked several times for each attention call, and slow to answer the long way.
            return args[0].fake_device
        if any(_wraps(kind) for kind in types):
            # A wrapper subclass: its own handler runs the operators on the tensors inside, and those come back here.
            return NotImplemented
        args, kwargs = self.prepare(func, args, kwargs or {})
        if func is not LIFT:
            for tensor in tensors_in((args, kwargs)):
                self.see(tensor, None)
        out = self.run(func, args, kwargs)
        for tensor in tensors_in(out):
            self.see(tensor, func)
        return out

    def prepare(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def see(self, tensor: Tensor, func: Any, name: str = "", kind: str = "before") -> None:
        """Count the storage of a tensor that `func` returned or, with `None`, that existed; note a new size."""
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        if device.type == "meta" or (self.device is not None and device != self.device):
            self.elsewhere.add(str(device))
            return
        for storage in _storages(tensor):
            size = -(-storage.nbytes() // self.rounding) * self.rounding
            block = self._blocks.get(storage._cdata)
            if block is None and func is not None and self.on_host:
                self._watch(storage, Block(0, self.step, None, on_host=True))
            elif block is None:
                self._add(storage, size, self._source(tensor, func, name, kind), func is None)
            elif block.bytes != size and not block.on_host:
                # Both are there while the old one is copied.
                del self._blocks[storage._cdata]
                self._add(storage, size, block.source, False)
                self._subtract(block)

    def _add(self, storage: Any, size: int, source: Source | None, existed: bool) -> None:
        if existed:
            self.existing += size
            block = Block(size, -1, source)
        else:
            self.step += 1
            self.live += size
            block = Block(size, self.step, source)
        self._watch(storage, block)
        if source is not None:
            totals = self._existing_by_group if existed else self._by_group
            if existed:
                self._existing.append((source, size))
            totals[source.group] = totals.get(source.group, 0) + size
        for window in self.windows:
            if self.live > window.peak:
                window.peak, window.step, window.stage = self.live, self.step, self.stage
                window.fallen.clear()
        if not existed:
            self._sample()

    def _watch(self, storage: Any, block: Block) -> None:
        block.reference = weakref.KeyedRef(storage, self._released, storage._cdata)
        self._blocks[storage._cdata] = block

    def _release(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self._subtract(block)

    def _subtract(self, block: Block) -> None:
        self.step += 1
        self.live -= block.bytes
        if block.source is not None:
            self._by_group[block.source.group] = self._by_group.get(block.source.group, 0) - block.bytes
            for window in self.windows:
                if block.born <= window.step:
                    window.fallen.append(block)
        self._sample()

    # -- what the recorder asks --

    def open(self) -> Window:
        window = Window(self.live, self.step, self.stage)
        self.windows.append(window)
        return window

    def alive_at_peak(self, window: Window) -> Alive:
        """Everything of the window's peak, as far as it is known by now."""
        alive = Alive(Counter(), Counter(), len(self._existing))
        for block in [*self._blocks.values(), *window.fallen]:
            if block.born <= window.step and block.bytes and block.source is not None:
                alive.add(block.source, block.bytes)
        return alive

    def owners(self, alive: Alive) -> tuple[Owner, ...]:
        """The largest kinds of storages, with the memory that existed and was found later."""
        whole = Alive(alive.sizes.copy(), alive.counts.copy(), 0)
        for source, size in self._existing[alive.found :]:
            whole.add(source, size)
        return tuple(Owner(size, whole.counts[source], *source) for source, size in whole.sizes.most_common(MAX_OWNERS))

    def timeline(self) -> tuple[Sample, ...]:
        """What was alive over time, at most `MAX_SAMPLES` points."""
        names = {**self._existing_by_group, **self._by_group}
        return tuple(
            Sample(
                step,
                live + self.existing,
                stage,
                {n: groups.get(n, 0) + self._existing_by_group.get(n, 0) for n in names},
            )
            for step, live, stage, groups in self._samples
        )

    def hooks(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, it is known which module runs; needed for owners only."""
        return self.modules.hooked() if self._owners else contextlib.nullcontext()

    def _sample(self) -> None:
        point = (self.step, self.live, self.stage, self._by_group.copy() if self._owners else self._by_group)
        samples = self._samples
        if samples and samples[-1][0] // self._stride == self.step // self._stride and samples[-1][2] == self.stage:
            if self.live >= samples[-1][1]:
                samples[-1] = point
            return
        samples.append(point)
        if len(samples) > MAX_SAMPLES:
            self._stride *= 2
            self._samples = [max(samples[i : i + 2], key=lambda sample: sample[1]) for i in range(0, len(samples), 2)]

    def _source(self, tensor: Tensor, func: Any, name: str, kind: str) -> Source | None:
        if not self._owners:
            return None
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if func is None:
            source = Source(shape, dtype, kind, None, name or None, "weights" if kind in _WEIGHTS else kind)
        else:
            node = torch._C._current_autograd_node()
            operator = f"{func} in {node.name()}" if node is not None else str(func)
            source = Source(
                shape, dtype, operator, line_of_caller(), self.modules.current, self.stage or "outside stages"
            )
        if self.groups is None:
            return source
        return source._replace(group=self.groups(Owner(tensor.untyped_storage().nbytes(), 1, *source)))


class ModulePath:
    """Which module runs, by its path from the outermost one."""

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._running: list[str] = []

    @property
    def current(self) -> str | None:
        return self._running[-1] if self._running else None

    def name(self, root: nn.Module) -> None:
        """Name the parts of a module that have no name yet."""
        for name, part in root.named_modules(prefix=type(root).__name__):
            self._names.setdefault(part, name)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if module not in self._names:
            self.name(module)
        self._running.append(self._names[module])

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._running and threading.get_ident() == self._thread:
            self._running.pop()

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        self._thread = threading.get_ident()
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@functools.cache
def _wraps(kind: type) -> bool:
    handler = kind.__torch_dispatch__  # type: ignore[attr-defined]
    return handler is not torch._C._disabled_torch_dispatch_impl and not issubclass(kind, FakeTensor)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors of an operator's arguments or results, which nest in tuples, lists and dictionaries only."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def line_of_caller() -> str | None:
    """ "file:line function" of the innermost frame that is neither torch's nor ours; `None` in a thread of C++."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _internal(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"


@functools.cache
def _internal(path: str) -> bool:
    return path.startswith(_INTERNAL)


def _storages(tensor: Tensor) -> list[Any]:
    """Storages behind a tensor: one, those of a sparse tensor's parts, or none where torch shows none."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        return [part.untyped_storage() for part in (tensor._indices(), tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [part.untyped_storage() for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values())]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [part.untyped_storage() for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values())]
    return []
