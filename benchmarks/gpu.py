"""Everything that is measured on a GPU, in one go: `python -m benchmarks.gpu`.

Correctness comes first: an operator whose check fails gets no figures, and the exit code is 1. One JSON file with the
machine and the versions goes to `benchmarks/results`, with Markdown and pictures beside it. Without a GPU: one line and
exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from benchmarks import (
    attention_rows,
    regions_to_collage,
    rows_to_pixel_values,
    shared_prefix,
    token_maps,
    window_scores,
)
from benchmarks.measure import environment, write
from benchmarks.render import render

# Each has `failures(device)`, `gpu_table(seconds)` and `line(row)`.
OPERATORS = {
    "attention_rows": attention_rows,
    "window_scores": window_scores,
    "token_maps": token_maps,
    "regions_to_collage": regions_to_collage,
    "rows_to_pixel_values": rows_to_pixel_values,
    "shared_prefix": shared_prefix,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=420, help="time to measure in, of all operators (default 420)")
    parser.add_argument("--quick", action="store_true", help="two minutes in all: the first shapes of each")
    parser.add_argument("--only", action="append", choices=OPERATORS, help="one operator; repeat it for more")
    arguments = parser.parse_args()
    seconds = 90.0 if arguments.quick else arguments.seconds
    chosen = {name: OPERATORS[name] for name in arguments.only or OPERATORS}
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch sees none", file=sys.stderr)
        return 2
    start = time.monotonic()
    result: dict[str, Any] = {"environment": environment(), "operators": {}}
    failed = False
    for i, (name, module) in enumerate(chosen.items()):
        failures = module.failures("cuda")
        entry: dict[str, Any] = {"failures": failures}
        if failures:
            failed = True
            print(f"{name}: {len(failures)} checks failed, its speed is not reported", *failures, sep="\n  ")
        else:
            left = seconds - (time.monotonic() - start)
            entry["table"] = module.gpu_table(left / (len(chosen) - i))
            for row in entry["table"]:
                print(module.line(row))
                failed = failed or ("failed" in row and row["variant"].startswith(name))
        result["operators"][name] = entry
    written = write("gpu", result)
    print(f"written to {', '.join(map(str, [written, *render(written)]))} after {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
