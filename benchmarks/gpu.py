"""Everything that is measured on a GPU, in one go: `python -m benchmarks.gpu`.

Correctness comes first: an operator whose check fails gets no figures, and the exit code is 1. One JSON file with the
machine and the versions goes to `benchmarks/results`, written anew after each operator, with Markdown and pictures
beside it at the end. Without a GPU: one line and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from typing import Any

import torch

from benchmarks import (
    attention_rows,
    end_to_end,
    measured_memory,
    regions_to_collage,
    rows_to_pixel_values,
    shared_prefix,
    smaller_cards,
    token_maps,
    window_scores,
)
from benchmarks.measure import environment, gpu_state, write
from benchmarks.render import render
from hide.texts import named

DEVICE = "cuda"
# Each has `failures(device)`, `gpu_table(seconds, device)` and `line(row)`; the quick ones first, those that share one
# 7B last. A row with "failed" says that ours is wrong, with "skipped" why something was not measured.
OPERATORS: dict[str, Any] = {
    "window_scores": window_scores,
    "token_maps": token_maps,
    "rows_to_pixel_values": rows_to_pixel_values,
    "regions_to_collage": regions_to_collage,
    "attention_rows": attention_rows,
    "end_to_end": end_to_end,
    "measured_memory": measured_memory,
    "shared_prefix": shared_prefix,
    "smaller_cards": smaller_cards,
}
# Parts of the time; what one leaves over is for those behind it.
SHARES = dict(zip(OPERATORS, (1, 2, 2, 3, 6, 6, 5, 3, 5), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=420, help="time to check and measure in (default 420)")
    parser.add_argument("--quick", action="store_true", help="two minutes in all: the first shapes of each")
    parser.add_argument("--only", action="append", choices=OPERATORS, help="one operator; repeat it for more")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch sees none", file=sys.stderr)
        return 2
    start = time.monotonic()
    seconds = 90.0 if arguments.quick else arguments.seconds
    chosen = [name for name in OPERATORS if name in (arguments.only or OPERATORS)]
    result: dict[str, Any] = {"environment": environment(), "operators": {}}
    for name in chosen:
        result["operators"][name] = {"failures": _failures(name)}
        write("gpu", result)
    # However long the checks took, where kernels are compiled for the first time, something is measured.
    end = max(start + seconds, time.monotonic() + seconds / 2)
    passed = [name for name in chosen if not result["operators"][name]["failures"]]
    for i, name in enumerate(passed):
        share = SHARES[name] / sum(SHARES[other] for other in passed[i:])
        _measure(name, result["operators"][name], (end - time.monotonic()) * share)
        write("gpu", result)
    result["environment"]["gpu after"] = gpu_state()
    written = write("gpu", result)
    files = ", ".join(map(str, [written, *render(written)]))
    print(f"written to {files} after {time.monotonic() - start:.0f} s")
    return int(any(_failed(entry) for entry in result["operators"].values()))


def _failures(name: str) -> list[str]:
    """What an operator's check finds wrong; it says so."""
    try:
        found: list[str] = OPERATORS[name].failures(DEVICE)
    except Exception as error:
        found = [named(error, 500)]
    if found:
        print(f"{name}: {len(found)} checks failed, its speed is not reported", *found, sep="\n  ", flush=True)
    _free()
    return found


def _measure(name: str, entry: dict[str, Any], seconds: float) -> None:
    """An operator's table into its entry, and as text; whatever goes wrong stays its own."""
    if seconds <= 0:
        entry["skipped"] = "no time left"
        print(f"{name}: no time left", flush=True)
        return
    begun = time.monotonic()
    try:
        entry["table"] = OPERATORS[name].gpu_table(seconds, DEVICE)
        for row in entry["table"]:
            print(OPERATORS[name].line(row), flush=True)
    except Exception as error:
        entry["error"] = named(error, 500)
        print(f"{name}: {entry['error']}", flush=True)
    entry["seconds"] = time.monotonic() - begun
    _free()


def _failed(entry: dict[str, Any]) -> bool:
    return bool(entry["failures"]) or "error" in entry or any("failed" in row for row in entry.get("table", ()))


def _free() -> None:
    """Memory of one operator is not the next one's."""
    gc.collect()
    # After an error of the device itself nothing works on it any more.
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
