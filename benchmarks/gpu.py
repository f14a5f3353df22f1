"""Everything that is measured on a GPU, in one go: `python -m benchmarks.gpu`.

Correctness comes first: an operator whose check fails gets no figures, and the exit code is 1. One JSON file with the
machine and the versions goes to `benchmarks/results`. Without a GPU: one line and exit code 2.
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
    seconds = parser.parse_args().seconds
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch sees none", file=sys.stderr)
        return 2
    start = time.monotonic()
    result: dict[str, Any] = {"environment": environment(), "operators": {}}
    failed = False
    for i, (name, module) in enumerate(OPERATORS.items()):
        failures = module.failures("cuda")
        entry: dict[str, Any] = {"failures": failures}
        if failures:
            failed = True
            print(f"{name}: {len(failures)} checks failed, its speed is not reported", *failures, sep="\n  ")
        else:
            left = seconds - (time.monotonic() - start)
            entry["table"] = module.gpu_table(left / (len(OPERATORS) - i))
            for row in entry["table"]:
                print(module.line(row))
                failed = failed or ("failed" in row and row["variant"].startswith(name))
        result["operators"][name] = entry
    print(f"written to {write('gpu', result)} after {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
