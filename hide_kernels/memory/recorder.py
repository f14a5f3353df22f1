"""One recording: stages over a storage tracker, the CUDA allocator or both, and the report at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hide_kernels.memory.report import MemoryReport, Owner, Stage
from hide_kernels.memory.storages import Alive, StorageTracker, Window

_active: ContextVar[Recorder | None] = ContextVar("hide_kernels_memory_recorder", default=None)


class Allocated(NamedTuple):
    """Bytes that the CUDA allocator reports: peaks of blocks handed out, of its cache, of what was asked for."""

    peak: int
    reserved: int
    requested: int

    def joined(self, other: Allocated) -> Allocated:
        return Allocated(*map(max, self, other))


class CudaAllocator:
    """Peaks since the last reading. Reading resets torch's own peak statistics of the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.live = 0
        self.read()

    def read(self) -> Allocated:
        statistics = torch.cuda.memory_stats(self.device)
        self.live = statistics.get("allocated_bytes.all.current", 0)
        names = ("allocated_bytes", "reserved_bytes", "requested_bytes")
        peaks = Allocated(*(statistics.get(f"{name}.all.peak", 0) for name in names))
        torch.cuda.reset_peak_memory_stats(self.device)
        return peaks


class _Open:
    """A stage that runs, or the whole block."""

    def __init__(self, window: Window | None) -> None:
        self.window = window
        self.allocated = Allocated(0, 0, 0)


class _Ended(NamedTuple):
    """What is kept of a stage: its calls so far. `peak` and `live` are relative to the tracker's `existing`."""

    calls: int = 0
    peak: int = 0
    live: int = 0
    allocated: Allocated = Allocated(0, 0, 0)
    alive: Alive | None = None


class Recorder:
    """What `profile` and `predict` yield: `report` says what was recorded; in the block, what is known so far."""

    def __init__(
        self, kind: str, device: torch.device | None, tracker: StorageTracker | None, allocator: CudaAllocator | None
    ) -> None:
        self._kind, self._device, self._tracker, self._allocator = kind, device, tracker, allocator
        self._stages: dict[str, _Ended] = {}
        self._names: list[str] = []
        self._start = allocator.live if allocator else 0
        self._peak_stage, self._highest = "", -1
        self._error: str | None = None
        self._failed = ""
        self._open: list[_Open] = []
        self._whole = self._enter()
        self._final: MemoryReport | None = None

    @property
    def report(self) -> MemoryReport:
        return self._final or self._report()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """As `hide_kernels.memory.stage`, for this recording."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a non-empty string, got {name!r}")
        self._boundary()
        self._names.append(name)
        path = "/".join(self._names)
        # Enclosing stages come first in the report.
        self._stages.setdefault(path, _Ended())
        self._label()
        current = self._enter()
        try:
            yield
        except BaseException:
            self._failed = self._failed or path
            raise
        finally:
            self._boundary()
            self._stages[path] = self._leave(current, self._stages[path])
            self._names.pop()
            self._label()

    def _enter(self) -> _Open:
        current = _Open(self._tracker.open() if self._tracker else None)
        self._open.append(current)
        return current

    def _leave(self, current: _Open, before: _Ended) -> _Ended:
        """Add a call to what is known of its stage, and close it."""
        peak, live = self._peak_and_live(current)
        highest = before.calls == 0 or peak > before.peak
        alive = before.alive
        if self._tracker is not None and current.window is not None:
            alive = self._tracker.alive_at_peak(current.window) if highest else alive
            self._tracker.windows.remove(current.window)
        self._open.remove(current)
        allocated = before.allocated.joined(current.allocated)
        return _Ended(before.calls + 1, peak if highest else before.peak, live, allocated, alive)

    def _peak_and_live(self, current: _Open) -> tuple[int, int]:
        """Relative to `existing` where only storages are followed."""
        if self._allocator is not None:
            return current.allocated.peak, self._allocator.live
        assert self._tracker is not None and current.window is not None
        return current.window.peak, self._tracker.live

    def _boundary(self) -> None:
        """Fold the allocator's peaks since the last boundary into everything that runs."""
        if self._allocator is not None:
            peaks = self._allocator.read()
            for current in self._open:
                current.allocated = current.allocated.joined(peaks)
            if peaks.peak > self._highest:
                self._highest, self._peak_stage = peaks.peak, "/".join(self._names)

    def _label(self) -> None:
        if self._tracker is not None:
            self._tracker.stage = "/".join(self._names)

    def _report(self) -> MemoryReport:
        self._boundary()
        tracker, whole, allocator = self._tracker, self._whole, self._allocator
        existed = tracker.existing if tracker is not None and allocator is None else 0
        peak, live = self._peak_and_live(whole)
        tracked = None if tracker is None or whole.window is None else whole.window.peak + tracker.existing
        stages = tuple(
            Stage(
                name,
                ended.calls,
                ended.peak + existed,
                ended.live + existed,
                ended.allocated.reserved if allocator else None,
                ended.allocated.requested if allocator else None,
                tracker.owners(ended.alive) if tracker and ended.alive else (),
            )
            for name, ended in self._stages.items()
            if ended.calls
        )
        notes = []
        if tracker is not None and tracked == 0 and tracker.elsewhere:
            notes.append(
                f"no tensor on {self._device}, but on {', '.join(sorted(tracker.elsewhere))}: name it as device"
            )
        return MemoryReport(
            kind=self._kind,
            device=str(self._device or ""),
            start=self._start if allocator else existed,
            peak=peak + existed,
            live=live + existed,
            peak_stage=whole.window.stage if allocator is None and whole.window else self._peak_stage,
            reserved=whole.allocated.reserved if allocator else None,
            requested=whole.allocated.requested if allocator else None,
            tracked=tracked,
            stages=stages,
            owners=tracker.owners(tracker.alive_at_peak(whole.window)) if tracker and whole.window else (),
            timeline=tracker.timeline() if tracker else (),
            notes=tuple(notes),
            error=self._error,
        )

    @contextlib.contextmanager
    def host_memory(self) -> Iterator[None]:
        """As `hide_kernels.memory.host_memory`, for this recording."""
        tracker = self._tracker
        if tracker is None or self._allocator is not None:
            # On CUDA tensors say by their device what is the host's.
            yield
            return
        before, tracker.on_host = tracker.on_host, True
        try:
            yield
        finally:
            tracker.on_host = before

    @contextlib.contextmanager
    def running(self, caller: str, *contexts: contextlib.AbstractContextManager[Any]) -> Iterator[Recorder]:
        """Record what runs inside, with `contexts` entered in order; the report stays whatever happens."""
        if _active.get() is not None:
            raise ValueError(f"{caller}: a recording is running already; mark parts of it with stage() instead")
        token = _active.set(self)
        try:
            with contextlib.ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context)
                yield self
        except BaseException as error:
            where = f" in stage {self._failed}" if self._failed else ""
            self._error = f"{type(error).__name__}{where}: {str(error).partition(chr(10))[0]}"
            raise
        finally:
            _active.reset(token)
            self._final = self._report()
            self._tracker = self._allocator = None


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Mark a part of a run, in any code: the recording that runs in this thread, if any, reports it by itself.

    Stages nest ("prefill" inside "answer" is "answer/prefill"); calls of the same name are one row of the report.

    Raises:
        ValueError: an empty name.
    """
    recorder = _active.get()
    with contextlib.nullcontext() if recorder is None else recorder.stage(name):
        yield


def current_stage() -> str:
    """The stage that runs in this thread, with those that it is in: "answer/encode"; "" where nothing records."""
    recorder = _active.get()
    return "" if recorder is None else "/".join(recorder._names)


@contextlib.contextmanager
def host_memory() -> Iterator[None]:
    """Inside, new tensors are the host's, in any code: a prediction, and a measurement on the CPU, do not count them.

    Both know one memory, which stands for a device's. For code that keeps tensors on the host on purpose, where on a
    GPU they would not be the device's. Nothing changes where nothing records in this thread, or CUDA is measured.
    """
    recorder = _active.get()
    with contextlib.nullcontext() if recorder is None else recorder.host_memory():
        yield


@contextlib.contextmanager
def profile(
    *roots: nn.Module | Tensor,
    device: str | torch.device | None = None,
    owners: bool = False,
    groups: Callable[[Owner], str] | None = None,
    snapshot: str | Path | None = None,
) -> Iterator[Recorder]:
    """Measure the memory of the block: `with profile(model) as recording: ...`, then `recording.report`.

    On a CUDA device the allocator's statistics say it, at no cost between stages; torch's peak statistics of the device
    are reset by it. On every other device each tensor storage is followed from its operator to its release, at some
    microseconds per operator; so it is on CUDA with `owners`, next to the statistics.

    Args:
        roots: modules and tensors that exist already. They count from the start, under their names; other memory
            that existed counts from the start too, once an operator uses it.
        device: which device's memory; default: that of the first root's tensor, without roots the current CUDA
            device, without CUDA the CPU.
        owners: find out what was alive at each peak and which line made it.
        groups: with `owners`, the group of a new storage in the timeline; by default "weights" for roots' parameters
            and buffers, "input" for tensors among them, "before" for other memory that existed, else the stage.
        snapshot: on CUDA, file for torch's own memory history of the block (pytorch.org/memory_viz reads it).

    Raises:
        TypeError: a root is neither a module nor a tensor.
        ValueError: a recording is running; a CUDA device or `snapshot` without CUDA.
    """
    tensors = named_tensors(roots, "profile")
    chosen = _device(device, tensors)
    cuda = chosen.type == "cuda"
    if snapshot is not None and not cuda:
        raise ValueError(f"snapshot: torch keeps a memory history on CUDA only, got device {chosen}")
    tracker = StorageTracker(chosen, 512 if cuda else 1, owners, groups) if owners or not cuda else None
    recorder = Recorder("measured", chosen, tracker, CudaAllocator(chosen) if cuda else None)
    contexts: list[contextlib.AbstractContextManager[Any]] = []
    if snapshot is not None:
        contexts.append(_history(Path(snapshot), chosen))
    if tracker is not None:
        adopt(tracker, roots, tensors)
        contexts += [tracker.hooks(), tracker]
    with recorder.running("profile", *contexts):
        yield recorder


def named_tensors(roots: tuple[nn.Module | Tensor, ...], caller: str) -> list[tuple[Tensor, str, str]]:
    """(tensor, name, "parameter", "buffer" or "input") of everything in `roots`."""
    found: list[tuple[Tensor, str, str]] = []
    for index, root in enumerate(roots):
        if isinstance(root, nn.Module):
            prefix = type(root).__name__
            found += [(tensor, f"{prefix}.{name}", "parameter") for name, tensor in root.named_parameters()]
            found += [(tensor, f"{prefix}.{name}", "buffer") for name, tensor in root.named_buffers()]
        elif isinstance(root, Tensor):
            found.append((root, "", "input"))
        else:
            raise TypeError(f"{caller}: roots are modules and tensors, got {type(root).__name__} in place {index}")
    return found


def adopt(
    tracker: StorageTracker, roots: tuple[nn.Module | Tensor, ...], tensors: list[tuple[Tensor, str, str]]
) -> None:
    """Tell the tracker what exists, and what the modules are called."""
    for root in roots:
        if isinstance(root, nn.Module):
            tracker.modules.name(root)
    for tensor, name, kind in tensors:
        for inner in _plain(tensor):
            tracker.see(inner, None, name, kind)


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors inside a wrapper subclass, or the tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain(getattr(tensor, name))]


def _device(device: str | torch.device | None, tensors: list[tuple[Tensor, str, str]]) -> torch.device:
    if device is not None:
        chosen = torch.device(device)
    elif tensors:
        chosen = tensors[0][0].device
    else:
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {chosen} cannot be measured, torch sees no CUDA device; predict() needs none")
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


@contextlib.contextmanager
def _history(path: Path, device: torch.device) -> Iterator[None]:
    """torch's history of allocations with their Python stacks, written to `path` at the end."""
    torch.cuda.memory._record_memory_history(device=device)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None, device=device)
