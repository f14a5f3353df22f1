"""Everything that is measured on a GPU, in one go: `python -m benchmarks.gpu`.

Correctness comes first: each operator's check names every case and backend that is wrong, and what rests on it gets no
figures; the exit code is then 1. One JSON file with the machine and the versions goes to `benchmarks/results` or the
folder of `--out`, written anew after each row, with Markdown and pictures beside it at the end. Whenever the run is
stopped, what was found is there (`python -m benchmarks.render FILE` draws it).

`--seconds` bounds the whole run. What is going on at a bound is cut off between two steps of Python; so it is overrun
by one kernel, copy or step of a compiler at most, and by the pictures if they take longer than is kept for them.
Without a GPU: one line and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    attention_received,
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
from benchmarks.measure import EVERYTHING, NO_TIME, OutOfTime, environment, found_wrong, gpu_state, limit, write
from benchmarks.render import render
from hide.texts import named

DEVICE = "cuda"
# Each has `failures(device)`, which yields a `measure.Failure` for all that it finds wrong, `gpu_table(seconds, device,
# withheld)`, which yields rows and leaves out the figures named in `withheld`, and `line(row)`; the quick ones first,
# those that share one 7B last. A row with "failed" says that ours is wrong, with "skipped" why something was not
# measured.
OPERATORS: dict[str, Any] = {
    "window_scores": window_scores,
    "attention_received": attention_received,
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
SHARES = dict(zip(OPERATORS, (1, 1, 2, 2, 3, 6, 6, 5, 3, 5), strict=True))
# An operator begins nothing new in the rest of its time, so that what is going on comes to its end.
BEGIN = 0.8
# Seconds for Markdown and pictures.
DRAWING = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=420, help="bound on the whole run (default 420)")
    parser.add_argument("--quick", action="store_true", help="100 seconds in all: the first shapes of each")
    parser.add_argument("--only", action="append", choices=OPERATORS, help="one operator; repeat it for more")
    parser.add_argument("--out", type=Path, help="folder of the result (default benchmarks/results)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch sees none", file=sys.stderr)
        return 2
    start = time.monotonic()
    end = start + (100 if arguments.quick else arguments.seconds) - DRAWING
    chosen = [name for name in OPERATORS if name in (arguments.only or OPERATORS)]
    entries: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    compiled = {"found in the cache": 0, "compiled": 0}
    result: dict[str, Any] = {"environment": {**environment(), "triton kernels": compiled}, "operators": entries}

    def save() -> Path:
        return write("gpu", result, arguments.out)

    with _counted(compiled):
        for i, name in enumerate(chosen):
            _check(name, entries[name], (end - time.monotonic()) / 2)
            save()
            share = SHARES[name] / sum(SHARES[other] for other in chosen[i:])
            _measure(name, entries[name], (end - time.monotonic()) * share, save)
    print(f"Triton's kernels: {', '.join(f'{number} {what}' for what, number in compiled.items())}")
    result["environment"]["gpu after"] = gpu_state()
    written = save()
    files = ", ".join(map(str, [written, *render(written)]))
    print(f"written to {files} after {time.monotonic() - start:.0f} s")
    return int(any(_failed(entry) for entry in entries.values()))


@contextlib.contextmanager
def _counted(compiled: dict[str, int]) -> Iterator[None]:
    """Inside, counts the kernels that Triton has to compile, and those that it finds in its cache."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return

    def count(*, cache_hit: bool, **_: Any) -> None:
        compiled["found in the cache" if cache_hit else "compiled"] += 1

    before, knobs.compilation.listener = knobs.compilation.listener, count
    try:
        yield
    finally:
        knobs.compilation.listener = before


def _check(name: str, entry: dict[str, Any], seconds: float) -> None:
    """What an operator's check finds wrong into its entry, and as text."""
    entry["failures"] = []
    begun = time.monotonic()
    try:
        with limit(seconds):
            for failure in found_wrong(OPERATORS[name], DEVICE):
                entry["failures"].append(failure._asdict())
                print(f"{name}: {failure}", flush=True)
    except OutOfTime:
        # Of what was not checked there are no figures.
        entry["skipped"] = f"the checks were not done after {seconds:.0f} s" if seconds > 0 else NO_TIME
    entry["seconds of checks"] = time.monotonic() - begun
    _free()


def _measure(name: str, entry: dict[str, Any], seconds: float, save: Callable[[], Any]) -> None:
    """An operator's rows into its entry, and as text; whatever goes wrong stays its own."""
    withheld = {figure for failure in entry["failures"] for figure in failure["figures"]}
    if withheld:
        print(f"{name}: checks failed, no speed of {', '.join(sorted(withheld))}", flush=True)
    if EVERYTHING in withheld:
        return
    if seconds <= 0:
        entry.setdefault("skipped", NO_TIME)
    if "skipped" in entry:
        print(f"{name}: {entry['skipped']}", flush=True)
        return
    begun = time.monotonic()
    table = entry["table"] = []
    try:
        with limit(seconds):
            for row in OPERATORS[name].gpu_table(BEGIN * seconds, DEVICE, withheld):
                table.append(row)
                print(OPERATORS[name].line(row), flush=True)
                save()
    except OutOfTime:
        entry["cut off"] = f"after {seconds:.0f} s"
        print(f"{name}: cut off {entry['cut off']}", flush=True)
    except Exception as error:
        entry["error"] = named(error, 500)
        print(f"{name}: {entry['error']}", flush=True)
    entry["seconds"] = time.monotonic() - begun
    _free()
    save()


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
