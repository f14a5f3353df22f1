"""What a recording says: stages, the peak and what held it; as text, JSON or a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

GB = 10**9


@dataclass(frozen=True)
class Owner:
    """Tensors alive at a peak that one line made with one shape and dtype: `count` storages of `bytes` together.

    `operator` is the dispatcher's name, or "parameter", "buffer", "input" for roots and "before" for other memory that
    existed. `line` is "file:line function", the innermost frame outside torch; `module` the path of the `nn.Module` that
    ran, with "*" where several differ by a number.
    """

    bytes: int
    count: int
    shape: tuple[int, ...]
    dtype: str
    operator: str
    line: str | None
    module: str | None
    group: str


@dataclass(frozen=True)
class Stage:
    """All calls of one stage; `name` has the enclosing stages in front ("prefill/attention"). Bytes.

    `peak` is the most while it ran, `live` what was allocated when its last call ended. `reserved` and `requested` are the
    CUDA allocator's peaks, `None` elsewhere: with its cache, and before it rounds up. `owners` go with this stage's peak.
    """

    name: str
    calls: int
    peak: int
    live: int
    reserved: int | None
    requested: int | None
    owners: tuple[Owner, ...]


@dataclass(frozen=True)
class Sample:
    """The highest point of a few steps (allocations and releases): bytes alive, in all and by group."""

    step: int
    live: int
    stage: str
    groups: dict[str, int]


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one device over one block of code, in bytes.

    `start` was allocated before, `live` when the block ended. `peak_stage` is the innermost stage of the peak, "" outside
    all. `tracked` is the peak of the tensors' storages alone, `None` where they were not followed: a GPU without
    `owners`; what the allocator's `peak` has above it are kernels' workspaces and rounding. `error` is the exception that ended the block, if any;
    everything up to it counts.
    """

    kind: str
    device: str
    start: int
    peak: int
    live: int
    peak_stage: str
    reserved: int | None
    requested: int | None
    tracked: int | None
    stages: tuple[Stage, ...]
    owners: tuple[Owner, ...]
    timeline: tuple[Sample, ...]
    notes: tuple[str, ...]
    error: str | None

    def table(self, beside: MemoryReport | None = None) -> str:
        """Text in GB (10^9 bytes); `beside` adds the peaks of another report, such as a prediction, and the difference."""
        rows = [["", "peak", "live at end", "reserved"]]
        for stage in self.stages:
            rows.append([_indented(stage.name, stage.calls), _gb(stage.peak), _gb(stage.live), _gb(stage.reserved)])
        rows.append(["whole", _gb(self.peak), _gb(self.live), _gb(self.reserved)])
        if beside is not None:
            others = {stage.name: stage.peak for stage in beside.stages}
            rows[0] += [beside.kind, "difference"]
            peaks = [(stage.peak, others.get(stage.name)) for stage in self.stages] + [(self.peak, beside.peak)]
            for row, (peak, other) in zip(rows[1:], peaks, strict=True):
                row += [_gb(other), "-" if other is None else f"{(peak - other) / max(other, 1):+.1%}"]
        lines = [f"{self.kind} on {self.device}, GB; {_gb(self.start)} before", *_aligned(rows)]
        if self.owners:
            lines += ["", f"alive at the peak ({self.peak_stage or 'outside stages'}):"]
            held = [
                [_gb(o.bytes), f"{o.count} x", f"{list(o.shape)} {o.dtype}", o.group, _where(o)] for o in self.owners
            ]
            lines += _aligned(held, left=2)
        lines += [f"note: {note}" for note in self.notes]
        if self.error:
            lines.append(f"ended early: {self.error}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, under the names of the fields."""
        return json.dumps(asdict(self), indent=1)

    def plot(self, path: str | Path) -> None:
        """Draw memory over the run, stacked by group where owners were recorded, to an image file.

        Raises:
            ValueError: nothing was recorded over time (a GPU without `owners`).
        """
        if not self.timeline:
            raise ValueError("plot: this report has no timeline; record with owners=True")
        from matplotlib.figure import Figure

        steps = [sample.step for sample in self.timeline]
        names = sorted({name for sample in self.timeline for name in sample.groups})
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        axes = figure.add_subplot()
        if names:
            # The largest lies at the bottom, where it is the calmest.
            names.sort(key=lambda name: -max(sample.groups.get(name, 0) for sample in self.timeline))
            heights = [[sample.groups.get(name, 0) / GB for sample in self.timeline] for name in names]
            axes.stackplot(steps, heights, labels=names, step="post")
            axes.legend(loc="upper left", fontsize="small")
        else:
            axes.fill_between(steps, [sample.live / GB for sample in self.timeline], step="post")
        named = ""
        for sample in self.timeline:
            if sample.stage != named:
                named = sample.stage
                axes.axvline(sample.step, color="0.6", linewidth=0.5)
                axes.text(sample.step, 1.0, named, transform=axes.get_xaxis_transform(), fontsize="small", rotation=30)
        axes.set(xlabel="allocations and releases", ylabel="GB", ylim=(0, None), xlim=(steps[0], max(steps[-1], 1)))
        figure.savefig(path, dpi=120)


def _gb(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / GB:.2f}" if abs(count) >= GB else f"{count / GB:.6f}"


def _indented(name: str, calls: int) -> str:
    *parents, last = name.split("/")
    return "  " * len(parents) + last + (f" ({calls} calls)" if calls > 1 else "")


def _where(owner: Owner) -> str:
    made = owner.line or "-"
    path, _, function = made.rpartition(" ")
    short = f"{Path(path).name} {function}" if path else made
    return ", ".join(part for part in (owner.operator, short, owner.module) if part)


def _aligned(rows: list[list[str]], left: int = 1) -> list[str]:
    """Columns of equal width: the first of a stage table and the words of a list to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if left == 1:
        return ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    return ["  ".join(cell.ljust(w) if i >= left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
