"""What `hide profile` says: tables, JSON, CSV, a picture of each flow's run, and a page with all of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from hide.present.pages import embedded, render
from hide.present.table import ResultTable
from hide.profiling.flows import EVERY
from hide.profiling.runs import Fit, FlowRun, Settings, at_peak
from hide.profiling.workload import Workload
from hide_kernels.memory import Owner

# Largest tensors that are listed of each flow.
OWNERS = 5
GB = 10**9


@dataclass(frozen=True)
class Profile:
    """All that was asked for. budget: of the fits, in bytes. measured: real runs, by flow."""

    model: str
    parameters: int
    work: Workload
    settings: Settings
    runs: Sequence[FlowRun]
    measured: Sequence[FlowRun]
    fits: Sequence[Fit]
    budget: int | None

    @property
    def heading(self) -> str:
        """What was profiled, in one line."""
        held = self.settings.dtype if self.settings.weights == "bf16" else f"{self.settings.weights} weights"
        where = ", keys and values of sessions on the host" if self.work.offload else ""
        return f"{self.model}, {self.parameters / 1e9:.2f} billion parameters, {held}{where}"

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "workload": asdict(self.work),
            "settings": self.settings._asdict(),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
            "flows": [_flow(run) for run in (*self.runs, *self.measured)],
            "budget": self.budget,
            "fits": [fit._asdict() for fit in self.fits],
        }

    def tables(self) -> list[ResultTable]:
        """All of them, the overview first."""
        tables = []
        if self.runs:
            tables.append(self._overview())
            for run in self.runs:
                tables += [_stages(run), _owners(run)]
        if self.measured:
            tables.append(self._beside())
        if self.fits:
            tables.append(fit_table(self.fits, self.budget or 0, self.work))
        return tables

    def _overview(self) -> ResultTable:
        rows = []
        for run in self.runs:
            groups = run.groups
            rest = [f"{name} {gigabytes(size)}" for name, size in groups.items() if name != "weights"]
            beside = gigabytes(run.report.peak - groups.get("weights", 0))
            rows.append(
                (run.flow, f"{run.tokens:,}", gigabytes(run.report.peak), beside, run.report.peak_stage, *rest[:1])
            )
        title = f"{self.heading}: predicted peak in GB"
        header = ("flow", "image tokens", "peak", "beside weights", "in stage", "most of it")
        return ResultTable(title, header, rows)

    def _beside(self) -> ResultTable:
        predicted = {run.flow: run.report for run in self.runs}
        rows = []
        for run in self.measured:
            peaks = {stage.name: stage.peak for stage in predicted[run.flow].stages}
            for stage in run.report.stages:
                guess = peaks.get(stage.name)
                rows.append(
                    (
                        f"{run.flow}: {stage.name}",
                        gigabytes(stage.peak),
                        "-" if guess is None else gigabytes(guess),
                        "-" if not guess else f"{stage.peak / guess - 1:+.1%}",
                        run.report.error or "",
                    )
                )
        device = self.measured[0].report.device
        return ResultTable(
            f"Measured on {device} beside predicted, GB",
            ("stage", "measured", "predicted", "difference", "ended"),
            rows,
        )


def gigabytes(count: int) -> str:
    """Two digits behind the point; more of what is small."""
    return f"{count / GB:,.2f}" if count >= GB / 10 or not count else f"{count / GB:.4f}"


def made_by(owner: Owner) -> str:
    """The operator and the line that made a tensor, in the module that ran."""
    where = ""
    if owner.line is not None:
        path, _, function = owner.line.rpartition(" ")
        where = f", {Path(path).name} {function}"
    # The class of the outermost module says nothing.
    module = (owner.module or "").partition(".")[2]
    return f"{owner.operator.removeprefix('aten.')}{where}{f', {module}' if module else ''}"


def _stages(run: FlowRun) -> ResultTable:
    rows = []
    for stage in run.report.stages:
        largest = next((owner for owner in stage.owners if owner.group != "weights"), None)
        held = "-" if largest is None else f"{largest.group} {gigabytes(largest.bytes)}"
        rows.append((stage.name, gigabytes(stage.peak), gigabytes(stage.live), held))
    header = ("stage", "peak, GB", "live at its end", "largest beside weights")
    return ResultTable(f"{run.flow}: {EVERY[run.flow].about}", header, rows)


def _owners(run: FlowRun) -> ResultTable:
    rows = [
        (made_by(owner), gigabytes(owner.bytes), str(owner.count), f"{list(owner.shape)} {owner.dtype}", owner.group)
        for owner in run.owners[:OWNERS]
    ]
    title = f"{run.flow}: the largest tensors at its peak, beside the weights"
    return ResultTable(title, ("made by", "GB", "how many", "tensor", "of"), rows)


def fit_table(fits: Sequence[Fit], budget: int, work: Workload) -> ResultTable:
    """What fits on a card."""
    rows = []
    for fit in fits:
        width, height = fit.size
        most = f"{fit.tokens:,}{' or more' if fit.limited else ''}" if fit.tokens else "none"
        rows.append(
            (
                fit.flow,
                fit.weights,
                "-" if fit.chunk is None else str(fit.chunk),
                "host" if fit.offload else "device",
                most,
                f"{width} x {height}" if fit.tokens else "-",
                gigabytes(fit.peak),
            )
        )
    title = f"The largest image in {gigabytes(budget)} GB, with a collage of {work.collage:,} tokens at most"
    header = ("flow", "weights", "chunk", "keys and values on", "image tokens", "pixels, 3:2", "peak")
    return ResultTable(title, header, rows)


def _flow(run: FlowRun) -> dict[str, Any]:
    report = run.report
    return {
        "flow": run.flow,
        "about": EVERY[run.flow].about,
        "kind": report.kind,
        "device": report.device,
        "tokens": run.tokens,
        "seconds": round(run.seconds, 3),
        "peak": report.peak,
        "peak_stage": report.peak_stage,
        "reserved": report.reserved,
        "error": report.error,
        "groups": run.groups,
        "owners": [asdict(owner) for owner in report.owners],
        "stages": [
            {**asdict(stage), "owners": [asdict(owner) for owner in stage.owners[:OWNERS]]} for stage in report.stages
        ],
        "timeline": [[sample.step, sample.live, sample.stage] for sample in report.timeline],
    }


def save(found: Profile, folder: str | Path) -> list[Path]:
    """Write profile.json, profile.csv, a picture of each flow's run and profile.html; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "profile.json", folder / "profile.csv"]
    paths[0].write_text(json.dumps(found.document(), indent=1) + "\n", encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("flow", "kind", "tokens", "stage", "calls", "peak", "live"))
        for run in (*found.runs, *found.measured):
            for stage in run.report.stages:
                writer.writerow(
                    (run.flow, run.report.kind, run.tokens, stage.name, stage.calls, stage.peak, stage.live)
                )
            writer.writerow((run.flow, run.report.kind, run.tokens, "", 1, run.report.peak, run.report.live))
    figures = []
    for run in found.runs:
        path = folder / f"{run.flow.replace(',', '').replace(' ', '_')}.png"
        run.report.plot(path)
        paths.append(path)
        with Image.open(path) as picture:
            shares = ", ".join(f"{name} {gigabytes(size)} GB" for name, size in at_peak(run.report).items())
            figures.append((run.flow, embedded(picture.convert("RGB")), shares))
    settings = {**asdict(found.work), **found.settings._asdict()}
    page = render("profile.html", title=found.heading, tables=found.tables(), figures=figures, settings=settings)
    paths.append(folder / "profile.html")
    paths[-1].write_text(page, encoding="utf-8")
    return paths
