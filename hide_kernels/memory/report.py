"""What a recording says: stages, the peak and what held it; as text, JSON or a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

# Owners in a table; JSON has all that were kept.
_SHOWN = 20
_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


@dataclass(frozen=True)
class Owner:
    """Tensors alive at a peak that one line made with one shape and dtype: `count` storages of `bytes` together.

    `operator` is the dispatcher's name, or "parameter", "buffer", "input" for roots and "before" for other memory that
    existed. `line` is "file:line function", the innermost frame outside torch; `module` is the path of the `nn.Module`
    that ran, or of the parameter, with "*" for numbers.
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

    `peak` is the most while it ran, `live` what was allocated when its last call ended. `reserved` and `requested` are
    the CUDA allocator's peaks, `None` elsewhere: with its cache, and before it rounds up. `owners` go with the peak.
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

    `start` was allocated before, `live` when the block ended. `peak_stage` is the innermost stage of the peak, ""
    outside all. `tracked` is the peak of the tensors' storages alone, `None` where they were not followed (a GPU
    without `owners`); above it the allocator's `peak` has kernels' workspaces and blocks larger than asked for. `error`
    is the exception that ended the block, if any; everything up to it counts. A prediction has no device: "".
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
        """Text; `beside` adds the peaks of another report, such as a prediction, and how far ours are above them."""
        unit, size = next(((unit, size) for unit, size in _UNITS if self.peak >= size), _UNITS[-1])

        def shown(count: int | None) -> str:
            return "-" if count is None else f"{count / size:.2f}"

        rows = [["", "peak", "live at end", "reserved"]]
        for stage in self.stages:
            rows.append([_indented(stage), shown(stage.peak), shown(stage.live), shown(stage.reserved)])
        rows.append(["whole", shown(self.peak), shown(self.live), shown(self.reserved)])
        if beside is not None:
            others = {stage.name: stage.peak for stage in beside.stages}
            peaks = [*((stage.peak, others.get(stage.name)) for stage in self.stages), (self.peak, beside.peak)]
            rows[0] += [beside.kind, "difference"]
            for row, (peak, other) in zip(rows[1:], peaks, strict=True):
                row += [shown(other), "-" if not other else f"{peak / other - 1:+.1%}"]
        lines = [f"{self.kind}{f' on {self.device}' if self.device else ''}, {unit}; {shown(self.start)} before"]
        lines += _aligned(rows, "<>>>>>")
        if self.owners:
            held = [
                [shown(o.bytes), str(o.count), f"x {list(o.shape)} {o.dtype}", o.group, _made(o)]
                for o in self.owners[:_SHOWN]
            ]
            lines += ["", f"alive at the peak ({self.peak_stage or 'outside stages'}):", *_aligned(held, ">><<<")]
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
            ImportError: matplotlib is not installed.
        """
        if not self.timeline:
            raise ValueError("plot: this report has no timeline; record with owners=True")
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise ImportError("plot: it draws with matplotlib; pip install 'hide-kernels[hide]'") from None

        steps = [sample.step for sample in self.timeline]
        names = sorted({name for sample in self.timeline for name in sample.groups})
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        axes = figure.add_subplot()
        if names:
            # The largest lies at the bottom, where it is the calmest.
            names.sort(key=lambda name: -max(sample.groups.get(name, 0) for sample in self.timeline))
            heights = [[sample.groups.get(name, 0) / 1e9 for sample in self.timeline] for name in names]
            axes.stackplot(steps, heights, labels=names, step="post")
            figure.legend(loc="outside right upper", fontsize="small")
        else:
            axes.fill_between(steps, [sample.live / 1e9 for sample in self.timeline], step="post")
        marked, free = {""}, steps[0]
        for sample in self.timeline:
            # A stage of many calls has its name once.
            if sample.stage not in marked:
                marked.add(sample.stage)
                axes.axvline(sample.step, color="0.6", linewidth=0.5)
                if sample.step < free:
                    continue
                free = sample.step + (steps[-1] - steps[0]) // 40
                axes.text(
                    sample.step, 1.0, sample.stage, transform=axes.get_xaxis_transform(), fontsize="small", rotation=30
                )
        axes.set(
            xlabel="allocations and releases",
            ylabel="GB",
            ylim=(0, None),
            xlim=(steps[0], max(steps[-1], steps[0] + 1)),
        )
        figure.savefig(path, dpi=120)


def _indented(stage: Stage) -> str:
    *parents, last = stage.name.split("/")
    return "  " * len(parents) + last + (f" ({stage.calls} calls)" if stage.calls > 1 else "")


def _made(owner: Owner) -> str:
    parts = [owner.operator]
    if owner.line is not None:
        path, _, function = owner.line.rpartition(" ")
        parts.append(f"{Path(path).name} {function}")
    return ", ".join(parts if owner.module is None else [*parts, owner.module])


def _aligned(rows: list[list[str]], sides: str) -> list[str]:
    """Columns of equal width, each to its side ("<" or ">")."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=False)).rstrip() for row in rows]
