"""The ratios that a CPU can show: `python -m benchmarks.cpu`.

`attention_rows` beside the best grouped expression, repeated keys and the published loop, at the shape of Qwen2.5-VL-7B
with 16,384 keys, in bfloat16 and float32, measured in turn. Then SnapKV's scores (`window_scores`) beside its own
expression, what keys receive (`attention_received`) beside SDPA and the whole matrix, maps to boxes to a collage
(`regions_to_collage`) and rows to the pixel values of a collage (`rows_to_pixel_values`) beside the published steps,
and HiDe beside a plain answer and the published flow: on a shared prefix (`shared_prefix`), from a decoded picture to
the answer (`end_to_end`), and with the options for smaller cards (`smaller_cards`). Exit code 1 if a check of
correctness fails (then there are no figures of what it checks), if `attention_rows` is slower than the grouped
expression, less than three times as fast as the published loop, or takes more than a tenth of the new memory of
repeated keys, or if another misses its limit.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from benchmarks import (
    attention_received,
    attention_rows,
    end_to_end,
    regions_to_collage,
    rows_to_pixel_values,
    shared_prefix,
    smaller_cards,
    window_scores,
)
from benchmarks.measure import count, environment, found_wrong, write


def ratios(table: list[dict[str, Any]], dtype: str) -> dict[str, float]:
    """Time of (c) and (a) over ours (more is better), our new memory over that of (b) (less is better)."""
    by_name = {row["variant"]: row for row in table if row["dtype"] == dtype}
    ours = by_name["attention_rows"]

    def faster(name: str) -> float:
        return by_name[name]["milliseconds"]["median"] / ours["milliseconds"]["median"]

    return {
        "grouped": faster("grouped (c)"),
        "published": faster("published loop (a)"),
        "memory": ours["new_bytes"] / by_name["repeated keys (b)"]["new_bytes"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=count, default=9, help="timed runs of each (default 9)")
    parser.add_argument("--threads", type=count, default=1, help="threads (default 1: steady beside other work)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if failures := list(found_wrong(attention_rows, "cpu")):
        print("attention_rows: checks failed, its speed is not reported", *failures, sep="\n  ")
        return 1
    table = attention_rows.cpu_table(arguments.runs)
    for row in table:
        print(attention_rows.line(row))
    good = True
    summary = {dtype: ratios(table, dtype) for dtype in ("bfloat16", "float32")}
    for dtype, found in summary.items():
        good = good and found["grouped"] >= 1 and found["published"] >= 3 and found["memory"] <= 0.1
        print(
            f"{dtype}: {found['grouped']:.2f} x as fast as (c), {found['published']:.2f} x as fast as (a), "
            f"{found['memory']:.3f} of the new memory of (b)"
        )
    operators: dict[str, Any] = {"attention_rows": {"table": table, "ratios": summary}}
    modules = {
        "window_scores": window_scores,
        "attention_received": attention_received,
        "regions_to_collage": regions_to_collage,
        "rows_to_pixel_values": rows_to_pixel_values,
        "shared_prefix": shared_prefix,
        "end_to_end": end_to_end,
        "smaller_cards": smaller_cards,
    }
    for name, module in modules.items():
        if failures := list(found_wrong(module, "cpu")):
            print(f"{name}: checks failed, its speed is not reported", *failures, sep="\n  ")
            operators[name] = {"failures": [failure._asdict() for failure in failures]}
            good = False
            continue
        wholes = module.whole_table("cpu")
        for row in wholes:
            print(module.line(row))
        good = good and module.within_limit(wholes)
        operators[name] = {"table": wholes}
    result = {"environment": environment(), "operators": operators}
    print(f"written to {write('cpu', result)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
