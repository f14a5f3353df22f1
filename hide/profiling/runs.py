"""A flow's memory, predicted or measured, and the largest picture that fits on a card."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hide.profiling.flows import EVERY, SESSIONS, owner_group
from hide.profiling.models import DTYPES, WEIGHTS, build, fused_attention
from hide.profiling.workload import CELL, TooManyTokensError, Workload, picture_of
from hide_kernels.memory import MemoryReport, Owner, predict, profile, stage

ATTENTION = ("flash", "sdpa")
# A picture of a fit is (2, 3) times so many pixels times its size.
STEP = 14
FIT_TOKENS = 65_536
# Pieces of a session's prefill that a fit tries beside the one asked for.
SMALL_CHUNK = 1024
_BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Settings(NamedTuple):
    """How a model is held and run. weights: "bf16" stands for none quantised. attention: "flash" or "sdpa"."""

    dtype: str = "bfloat16"
    weights: str = "bf16"
    attention: str = "flash"

    def check(self) -> None:
        """`ValueError` for a value that there is not."""
        for name, known in (("dtype", tuple(DTYPES)), ("weights", WEIGHTS), ("attention", ATTENTION)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want one of {', '.join(known)}")


PLAIN = Settings()


@dataclass(frozen=True)
class FlowRun:
    """One flow's report. tokens: of the picture. seconds: that it took."""

    flow: str
    tokens: int
    report: MemoryReport
    seconds: float

    @property
    def groups(self) -> dict[str, int]:
        """Bytes at the peak by what they belong to, largest first."""
        return at_peak(self.report)

    @property
    def owners(self) -> tuple[Owner, ...]:
        """Tensors alive at the peak but for the weights, largest first."""
        return tuple(owner for owner in self.report.owners if owner.group != "weights")


def at_peak(report: MemoryReport) -> dict[str, int]:
    """Bytes at a report's peak by group, largest first; empty where owners were not recorded."""
    if not report.timeline:
        return {}
    sample = max(report.timeline, key=lambda sample: sample.live)
    return dict(sorted(((n, b) for n, b in sample.groups.items() if b > 0), key=lambda item: -item[1]))


def predict_flow(config: Any, flow: str, work: Workload, settings: Settings = PLAIN, *, owners: bool = True) -> FlowRun:
    """Predict a flow on a model that is never made; on any machine.

    Args:
        config: of the model, as `hide.profiling.models.read_config` gives it.
        flow: a name in `EVERY`.
        work, settings: sizes, and how the model is held.
        owners: find out what is alive at the peak; without it takes less time.

    Raises:
        ValueError: settings or sizes that the model does not take.
    """
    settings.check()
    start = time.perf_counter()
    with predict(owners=owners, groups=owner_group if owners else None) as recording:
        with stage("weights"):
            adapter = build(config, DTYPES[settings.dtype], settings.weights)
        tokens = picture_of(adapter, work.image).tokens
        with fused_attention(adapter) if settings.attention == "flash" else nullcontext():
            EVERY[flow].run(adapter, work)
    return FlowRun(flow, tokens, recording.report, time.perf_counter() - start)


def measure_flow(adapter: Any, flow: str, work: Workload, *, owners: bool = False) -> FlowRun:
    """Run a flow on a real model, where it is, and measure it; out of memory ends it early, with what was seen.

    owners: as for `hide_kernels.memory.profile`; without them CUDA's allocator is asked between stages only.
    """
    start = time.perf_counter()
    tokens = picture_of(adapter, work.image).tokens
    with profile(adapter.model, owners=owners, groups=_measured_group if owners else None) as recording:
        ended = None
        try:
            EVERY[flow].run(adapter, work)
        except (torch.OutOfMemoryError, MemoryError) as error:
            ended = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    report = recording.report if ended is None else dataclasses.replace(recording.report, error=ended)
    return FlowRun(flow, tokens, report, time.perf_counter() - start)


def _measured_group(owner: Owner) -> str:
    return "weights" if owner.operator in ("parameter", "buffer") else owner_group(owner)


# -- what fits --------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """The largest picture of a flow on a card.

    chunk: `None` where the flow has no pieces. tokens: 0 where not even a small picture fits. size: (width, height) in
    pixels. peak: bytes, at that size, or at the smallest. limited: the model takes no more
    tokens, or no more were tried. offload: keys and values are on the host.
    """

    flow: str
    weights: str
    chunk: int | None
    tokens: int
    size: tuple[int, int]
    peak: int
    limited: bool
    offload: bool = False


def parse_bytes(text: str) -> int:
    """ "24GB" -> 24 * 10^9, "24GiB" -> 24 * 2^30; `ValueError` for what is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)\s*", text, re.IGNORECASE)
    unit = _BYTES.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise ValueError(f"fit: got {text!r}, want a size such as 24GB (10^9 bytes) or 24GiB (2^30)")
    return round(float(match[1]) * unit)


def parse_pixels(text: str) -> tuple[int, int]:
    """ "7680x4320", width first -> (height, width); `ValueError` for anything else."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*", text, re.IGNORECASE)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ValueError(f"image: got {text!r}, want width x height in pixels such as 7680x4320")
    return int(match[2]), int(match[1])


def fits(
    config: Any,
    flows: Sequence[str],
    budget: int,
    work: Workload,
    settings: Settings,
    weights: Sequence[str] = WEIGHTS,
    progress: Callable[[str], None] | None = None,
) -> list[Fit]:
    """The largest picture, 3:2, of each flow with each kind of weights.

    Where a session's peak is in its prefill, smaller pieces are tried too; where it is then not in the encoder, which
    is done before there are any, keys and values on the host. No picture is larger than `FIT_TOKENS`.

    budget: bytes; the CUDA context and lost blocks need room beside it. work: its `image` is not used.
    """
    found = []
    for flow in flows:
        for kind in weights:
            own = settings._replace(weights=kind)
            if progress is not None:
                progress(f"{flow}, {kind} weights")
            fit, stage_of_peak = _largest(config, flow, budget, work, own)
            found.append(fit)
            if flow not in SESSIONS:
                continue
            tried = work
            if tried.chunk > SMALL_CHUNK and stage_of_peak == "prefill" and not fit.limited:
                tried = dataclasses.replace(tried, chunk=SMALL_CHUNK)
                fit, stage_of_peak = _largest(config, flow, budget, tried, own)
                found.append(fit)
            if fit.tokens and stage_of_peak != "encode" and not (fit.limited or tried.offload):
                found.append(_largest(config, flow, budget, dataclasses.replace(tried, offload=True), own)[0])
    return found


def _largest(config: Any, flow: str, budget: int, work: Workload, settings: Settings) -> tuple[Fit, str]:
    runs: dict[int, FlowRun] = {}

    def peak(size: int) -> int | None:
        own = dataclasses.replace(work, image=(2 * size * STEP, 3 * size * STEP))
        try:
            runs[size] = predict_flow(config, flow, own, settings, owners=False)
        except TooManyTokensError:
            return None
        return runs[size].report.peak

    size, limited = largest_within(peak, budget, math.isqrt(FIT_TOKENS * CELL**2 // (6 * STEP**2)))
    run = runs[max(size, 1)]
    pixels = (3 * size * STEP, 2 * size * STEP)
    session = flow in SESSIONS
    fit = Fit(
        flow,
        settings.weights,
        work.chunk if session else None,
        run.tokens if size else 0,
        pixels,
        run.report.peak,
        limited,
        session and work.offload,
    )
    return fit, run.report.peak_stage


def largest_within(peak: Callable[[int], int | None], budget: int, most: int) -> tuple[int, bool]:
    """The largest size, to about half a percent, whose peak is at most `budget`, or 0; and whether it is all there is.

    peak: grows about with the square of the size, so that guesses lie on the line through the two peaks next to the
        budget; `None` where the size itself is too large. It is asked once for each size. most: the largest size asked.
    """
    known: dict[int, int] = {}
    low, high, size, asked, left = 0, most + 1, 1, 0, 0
    # A hundredth of the bytes that a size may take is half a percent of it, as they grow with its square.
    while high - low > max(1, low // 200) and not (low > 1 and budget - known[low] <= left // 100):
        found = peak(size)
        asked += 1
        if found is not None:
            known[size] = found
        if found is not None and found <= budget:
            low = size
        else:
            high = size
        if asked == 1:
            size, left = 64, budget - known.get(1, budget)
        elif high in known and low and asked % 3:
            size = _on_the_line(known, low, high, budget - left // 200)
        elif high > most and len(known) > 1:
            one, other = sorted(known)[-2:]
            size = min(8 * low, _on_the_line(known, one, other, budget - left // 200))
        else:
            # Where the line misleads, halving ends it.
            size = (low + high) // 2
        size = min(max(size, low + 1), high - 1, most)
    return low, low == most or (low > 0 and high <= most and high not in known)


def _on_the_line(known: dict[int, int], one: int, other: int, budget: int) -> int:
    """Where the line through two peaks meets the budget."""
    part = (budget - known[one]) / max(known[other] - known[one], 1)
    return math.isqrt(max(0, round(one**2 + part * (other**2 - one**2))))
