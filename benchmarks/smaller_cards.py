"""What the options for smaller cards cost: keys and values on the host, int8 and int4 weights.

One question as in `end_to_end`, with each option: `python -m benchmarks.smaller_cards` asks the mid-size model on the
CPU, `--device cuda` the 7B about an 8K picture, and puts the memory of the flow beside its prediction.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks import measured_memory
from benchmarks.end_to_end import (
    GATE_TOKENS,
    LARGE_TOKENS,
    MIDDLE,
    MIDDLE_TOKENS,
    SIZES,
    SMALL,
    Bench,
    timed,
)
from benchmarks.end_to_end import line as time_line
from benchmarks.measure import NO_TIME, WITHHELD, Failure, alone
from benchmarks.shared_prefix import SEVEN_B, Scale, model, seven_b, without_tf32
from hide.models.quantised import check, quantise, quantised_layers
from hide.models.qwen2_5_vl import Qwen25VL
from hide.profiling.runs import Settings
from hide.profiling.workload import Workload
from hide.texts import named


class Option(NamedTuple):
    """weights: as `hide.models.load`, and "bf16" for the model's own. offload: `RunSettings.offload_kv`."""

    weights: str = "bf16"
    offload: bool = False


OPTIONS = {
    "as it is": Option(),
    "keys and values on the host": Option(offload=True),
    "int8 weights": Option("int8"),
    "int8, keys and values on the host": Option("int8", offload=True),
    "int4 weights": Option("int4"),
}
"""Those that share weights stand together. A CPU's int4 is another format, for tests only."""
RUNS = 3
# How far products with quantised weights may be from those with the model's own, as norms: about twice what rounding
# gives normal weights. A product that reads its weights wrongly is off by more than 1.
ROUNDING = {"int8": 0.02, "int4": 0.2}
# How many times as long a question may take on a CPU, where the host is as near as the device, with each option.
OFFLOADED, INT8 = 1.25, 1.35

NOTE = (
    "The question and the model of end_to_end, by `HiDe.ask`; on a GPU each with the flow `ours` "
    "of `hide profile` behind it."
)


def failures(device: str) -> Iterator[Failure]:
    """Whether an option changes what it must not, or quantised layers multiply with other weights."""
    host = tuple(name for name, option in OPTIONS.items() if option.offload)
    with without_tf32():
        adapter = model(SMALL, device, torch.float32)
        benches = [Bench(adapter, SMALL, device, SIZES["2K"], GATE_TOKENS, offload=on) for on in (False, True)]
        (plain,), (offloaded,) = (bench.ask().shown for bench in benches)
        if (plain.boxes, plain.answer) != (offloaded.boxes, offloaded.answer):
            yield Failure("one question", host[0], "other boxes or another answer", host)
    for weights in formats(device):
        these = tuple(name for name, option in OPTIONS.items() if option.weights == weights)
        try:
            for layer, error in _other_products(model(SMALL, device), weights):
                yield Failure(layer, weights, error, these)
        except Exception as error:
            yield Failure("products", weights, named(error), these)


def formats(device: str) -> list[str]:
    """Quantised weights that are served here."""
    served = []
    for weights in ("int8", "int4") if device == "cuda" else ("int8",):
        try:
            check(weights, torch.bfloat16 if device == "cuda" else torch.float32, torch.device(device))
        except ValueError:
            continue
        served.append(weights)
    return served


@torch.no_grad()
def _other_products(adapter: Qwen25VL, weights: str) -> list[tuple[str, str]]:
    """Layers whose products are too far away, and how far they are."""
    layers = quantised_layers(adapter.model, weights)
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(33, layer.in_features, generator=generator).to(layer.weight) for name, layer in layers.items()
    }
    want = {name: layer(given[name]).float() for name, layer in layers.items()}
    quantise(adapter.model, weights, adapter.model.device)
    wrong = []
    for name in layers:
        away = float((adapter.model.get_submodule(name)(given[name]).float() - want[name]).norm() / want[name].norm())
        if not 0 < away <= ROUNDING[weights]:
            wrong.append((name, f"products {away:.3f} of their norm away, want at most {ROUNDING[weights]}"))
    return wrong


def gpu_table(seconds: float, device: str = "cuda", withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The 7B and an 8K picture, as far as it fits into the time; then memory beside its prediction."""
    return _table(SEVEN_B, device, LARGE_TOKENS, "8K", time.monotonic() + seconds, withheld, memory=True)


def whole_table(device: str) -> list[dict[str, Any]]:
    """The mid-size model and a picture of 2,048 tokens at most."""
    return list(_table(MIDDLE, device, MIDDLE_TOKENS, "2K", time.monotonic() + 240, memory=False))


def _table(
    scale: Scale,
    device: str,
    max_tokens: int,
    picture: str,
    end: float,
    withheld: Collection[str] = (),
    *,
    memory: bool,
) -> Iterator[dict[str, Any]]:
    served, adapter, held = ["bf16", *formats(device)], None, None
    for i, (name, option) in enumerate(OPTIONS.items()):
        if option.weights not in served or name in withheld or time.monotonic() > end:
            missing = None if option.weights in served else f"{option.weights} weights are not served here"
            yield {"what": name, "skipped": missing or (WITHHELD if name in withheld else NO_TIME)}
            continue
        if option.weights != held:
            # One at a time: the last one's memory is free when the next is made.
            adapter = None
            adapter, held = _with_weights(scale, option.weights, device), option.weights
        bench = Bench(adapter, scale, device, SIZES[picture], max_tokens, offload=option.offload)
        share = (end - time.monotonic()) / (len(OPTIONS) - i)
        yield from timed(bench, {f"{name} (c)": bench.ask}, RUNS, share / 2)
        if memory:
            dtype = str(adapter.dtype).removeprefix("torch.")
            settings = Settings(dtype, option.weights)
            work = Workload(max_tokens, offload=option.offload)
            (row,) = measured_memory.compared(adapter, [work], settings, end, flows=["ours"])
            yield {**row, "flow": f"ours, {name}"}


def _with_weights(scale: Scale, weights: str, device: str) -> Qwen25VL:
    if weights == "bf16" and scale is SEVEN_B:
        return seven_b(device)
    seven_b.cache_clear()
    gc.collect()
    adapter = model(scale, device)
    if weights != "bf16":
        quantise(adapter.model, weights, adapter.model.device)
    return adapter


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds with each option that is served over those without any."""
    seconds = {row["what"].removesuffix(" (c)"): row["seconds"] for row in rows if "seconds" in row}
    plain = seconds.pop("as it is")
    return {name: own / plain for name, own in seconds.items()}


def within_limit(rows: list[dict[str, Any]]) -> bool:
    """Whether what is served ran, and no option takes too long on a CPU."""
    if any("failed" in row for row in rows):
        return False
    return all(ratio <= (INT8 if "int8" in name else OFFLOADED) for name, ratio in ratios(rows).items())


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    return measured_memory.line(row) if "flow" in row else time_line(row)


if __name__ == "__main__":
    sys.exit(alone(sys.modules[__name__], 180))
