"""Result files as Markdown and pictures, and the tables of docs/benchmarks.md: `python -m benchmarks.render`.

`python -m benchmarks.render FILE...` writes FILE.md and its pictures beside each JSON file; without files it rewrites
the tables between that page's markers from the newest results, `--check` only says whether they are up to date.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, Failure

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
NONE_YET = "No result exists yet: `python -m benchmarks.{kind}` makes one."


def newest(kind: str) -> dict[str, Any] | None:
    """The result of "cpu", "gpu" or one operator that was made last."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob(f"{kind}-*.json")]
    return max(found, key=lambda result: result["environment"]["time"], default=None)


def provenance(found: dict[str, Any]) -> str:
    """Where figures are from, in one sentence."""
    machine = found["gpu"]["name"] if found["gpu"] else f"{found['cpu']}, threads: {found['threads']}"
    dirty = ", with changes" if found["dirty"] else ""
    versions = f"torch {found['torch']}, triton {found['triton']}, Python {found['python']}"
    if "transformers" in found:
        versions = f"transformers {found['transformers']}, {versions}"
    return f"{machine}; {versions}; commit {(found['git'] or 'unknown')[:8]}{dirty}; {found['time'][:10]}"


def markdown(result: dict[str, Any]) -> str:
    """Everything in a result file, a part for each operator."""
    lines = ["# Measured", "", provenance(result["environment"]) + "."]
    for name, entry in result["operators"].items():
        lines += ["", f"## {name}", ""]
        if failures := [Failure(**failure) for failure in entry.get("failures", [])]:
            lines += ["Wrong, and so without figures:", ""]
            lines += [f"- {failure} ({', '.join(failure.figures) or 'not measured here'})" for failure in failures]
            lines.append("")
        if "table" not in entry:
            if not failures or "skipped" in entry:
                lines.append(f"Not measured: {entry.get('skipped') or 'the run ended before'}.")
            continue
        if ended := entry.get("error") or entry.get("cut off"):
            lines += [f"Ended early: {ended}.", ""]
        module = importlib.import_module(f"benchmarks.{name}")
        if note := getattr(module, "NOTE", None):
            lines += [note, ""]
        if name == "end_to_end":
            lines += [*stage_table(entry["table"]), ""]
        lines += ["```text", *(module.line(row).rstrip() for row in entry["table"]), "```"]
    return "\n".join(lines) + "\n"


def stage_table(rows: list[dict[str, Any]]) -> list[str]:
    """Seconds of each way of `end_to_end`, by stage, with tokens and memory."""
    timed = [row for row in rows if "seconds" in row]
    stages = list(dict.fromkeys(stage for row in timed for stage in row["stages"]))
    lines = [f"| | picture | seconds | {' | '.join(stages)} | tokens | peak, GB |", "|---" * (len(stages) + 5) + "|"]
    for row in timed:
        spent = " | ".join(f"{row['stages'][stage]:.3f}" if stage in row["stages"] else "" for stage in stages)
        lines.append(
            f"| {row['what']} | {row['picture']} | {row['seconds']:.2f} | {spent} | {row['tokens']:,} "
            f"| {row['peak'] / 1e9:.2f} |"
        )
    return lines


def pictures(result: dict[str, Any], stem: Path) -> list[Path]:
    """Pictures of what the result has: latency over keys and the roofline of attention_rows on a GPU, stages and
    latency over tokens of whole questions."""
    tables = {name: entry.get("table", []) for name, entry in result["operators"].items()}
    figures = _rows_figures([row for row in tables.get("attention_rows", []) if "microseconds" in row])
    figures |= _questions_figures([row for row in tables.get("end_to_end", []) if "seconds" in row])
    written = []
    for name, figure in figures.items():
        written.append(stem.with_name(f"{stem.name}-{name}.png"))
        figure.savefig(written[-1], dpi=120)
    return written


def _questions_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from matplotlib.figure import Figure

    if not rows:
        return {}
    largest = max(row["image_tokens"] for row in rows)
    bars = [row for row in rows if row["image_tokens"] == largest]
    stages = Figure(figsize=(9, 3.2), layout="constrained")
    axes = stages.subplots()
    names = [row["what"] for row in bars]
    left = [0.0] * len(bars)
    for stage in dict.fromkeys(stage for row in bars for stage in row["stages"]):
        spent = [row["stages"].get(stage, 0.0) for row in bars]
        axes.barh(names, spent, left=left, label=stage)
        left = [a + b for a, b in zip(left, spent, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="seconds", title=f"{bars[0]['model']}, {bars[0]['picture']}, {largest:,} image tokens")
    stages.legend(loc="outside right upper", fontsize=7)
    figures = {"end_to_end": stages}
    if any(row["image_tokens"] != largest for row in rows):
        figures["end_to_end-tokens"] = over_tokens = Figure(figsize=(7, 4.5), layout="constrained")
        axes = over_tokens.subplots()
        for name in names:
            own = sorted((row["image_tokens"], row["seconds"]) for row in rows if row["what"] == name)
            axes.plot(*zip(*own, strict=True), marker="o", label=name)
        axes.set(xlabel="image tokens", ylabel="seconds", title=bars[0]["model"], ylim=(0, None))
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    return figures


def _rows_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from matplotlib.figure import Figure

    if not rows:
        return {}
    model, wanted = rows[0]["model"], rows[0]["rows"]
    latency = Figure(figsize=(7, 4.5), layout="constrained")
    axes = latency.subplots()
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = sorted((r["keys"], r["microseconds"]["median"]) for r in rows
                     if r["variant"] == variant and r["model"] == model and r["rows"] == wanted)  # fmt: skip
        if own:
            axes.plot(*zip(*own, strict=True), marker="o", label=variant)
    axes.set(xscale="log", yscale="log", xlabel="keys", ylabel="microseconds", title=f"{model}, {wanted} rows")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    roofline = Figure(figsize=(7, 4.5), layout="constrained")
    axes = roofline.subplots()
    for row in rows:
        if row["variant"] == "attention_rows":
            # Both passes: the scores twice, the keys once from memory, the reduced rows once.
            flops = 4 * row["heads"] * row["rows"] * row["keys"] * row["depth"]
            moved = 2 * row["kv_heads"] * row["keys"] * row["depth"] + 4 * row["rows"] * row["keys"]
            speed = flops / row["microseconds"]["median"] / 1e6
            axes.scatter(flops / moved, speed, s=20)
            axes.annotate(f"R {row['rows']}, N {row['keys']}", (flops / moved, speed), fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of keys and rows", ylabel="TFLOP/s",
             title="attention_rows, both passes")  # fmt: skip
    axes.grid(alpha=0.3)
    return {"latency": latency, "roofline": roofline}


def render(path: Path) -> list[Path]:
    """Write Markdown and pictures beside a result file; the paths."""
    result = json.loads(path.read_text(encoding="utf-8"))
    drawn = pictures(result, path.with_suffix(""))
    shown = "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in drawn)
    target = path.with_suffix(".md")
    target.write_text(markdown(result) + shown, encoding="utf-8")
    return [target, *drawn]


def cpu_section(result: dict[str, Any]) -> str:
    """The page's tables of a CPU result."""
    tables = {name: entry.get("table", []) for name, entry in result["operators"].items()}
    lines = [f"{provenance(result['environment'])}. `python -m benchmarks.cpu`; medians.", ""]
    anchor = tables["attention_rows"][0]
    lines += [
        f"`attention_rows`, {anchor['rows']} rows over {anchor['keys']:,} keys at {anchor['model']}'s sizes:", "",
        "| | bfloat16 | float32 | new memory, bfloat16 |", "|---|---|---|---|",
    ]  # fmt: skip
    for variant in dict.fromkeys(row["variant"] for row in tables["attention_rows"]):
        half, full = (row for row in tables["attention_rows"] if row["variant"] == variant)
        times = " | ".join(f"{row['milliseconds']['median']:.0f} ms" for row in (half, full))
        lines.append(f"| {variant} | {times} | {half['new_bytes'] / 1e6:.0f} MB |")
    for name, title in (("regions_to_collage", "Maps to a collage"), ("rows_to_pixel_values", "Rows to pixel values")):
        rows = [row for row in tables.get(name, []) if "implementation" in row]
        if rows:
            lines += ["", f"{title}, {rows[0]['shape']}:", "", "| | ms |", "|---|---|"]
            lines += [f"| {row['implementation']} | {row['median'] / 1e3:,.1f} |" for row in rows]
    if rows := tables.get("shared_prefix", []):
        lines += ["", f"One question on a {rows[0]['model']} model with random weights, seconds of the process:", ""]
        lines += ["| | seconds | tokens |", "|---|---|---|"]
        lines += [f"| {row['what']} | {row['seconds']:.2f} | {row['tokens']:,} |" for row in rows]
    if rows := [row for row in tables.get("end_to_end", []) if "seconds" in row]:
        about = f"{rows[0]['picture']} image of {rows[0]['image_tokens']:,} tokens on a {rows[0]['model']} model"
        lines += ["", f"A question from the decoded image to the answer, a {about}, seconds of the process:", ""]
        lines += ["| | seconds | tokens |", "|---|---|---|"]
        lines += [f"| {row['what']} | {row['seconds']:.2f} | {row['tokens']:,} |" for row in rows]
    return "\n".join(lines)


def gpu_section(result: dict[str, Any]) -> str:
    """The page's words about a GPU result: where it is, whole questions, and rows of `attention_rows`."""
    stem = next(
        path for path in RESULTS.glob("gpu-*.json") if json.loads(path.read_text(encoding="utf-8")) == result
    ).stem
    page = f"benchmarks/results/{stem}.md"
    head = f"{provenance(result['environment'])}. All of it: [{page}](../{page})."
    tables = {name: entry.get("table", []) for name, entry in result["operators"].items()}
    lines = [head]
    if whole := tables.get("end_to_end"):
        lines += ["", *stage_table(whole)]
    if rows := tables.get("attention_rows"):
        module = importlib.import_module("benchmarks.attention_rows")
        lines += ["", "```text", *(module.line(row).rstrip() for row in rows[:8]), "```"]
    return "\n".join(lines)


def received_section(result: dict[str, Any]) -> str:
    """The page's table of what keys receive, beside SDPA and the whole matrix."""
    ((name, entry),) = result["operators"].items()
    lines = [f"{provenance(result['environment'])}. `taskset -c 1 python -m benchmarks.{name} --save`; medians.", ""]
    lines += ["| | | ms | new memory | largest relative error |", "|---|---|---|---|---|"]
    for row in entry["table"]:
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        mask = "causal" if row["causal"] else "every key"
        times = f"{row['milliseconds']['median']:,.0f} | {row['new_bytes'] / 1e6:,.1f} MB"
        lines.append(f"| {row['variant']} | {mask} | {times} | {error} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """docs/benchmarks.md with its marked tables made anew."""
    sections = {"cpu": cpu_section, "attention-received": received_section, "gpu": gpu_section}
    for kind, section in sections.items():
        result = newest(kind)
        body = NONE_YET.format(kind=kind.replace("-", "_")) if result is None else section(result)
        pattern = rf"(<!-- begin {kind} results -->\n).*?(<!-- end {kind} results -->)"
        text, found = re.subn(pattern, lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text, flags=re.S)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"docs/benchmarks.md: got {found} places for {kind} results, want 1")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", type=Path, help="result files; none: the tables of docs/benchmarks.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    arguments = parser.parse_args()
    for path in arguments.files:
        for written in render(path):
            print(f"written to {written}")
    if arguments.files:
        return 0
    before = PAGE.read_text(encoding="utf-8")
    after = page(before)
    if arguments.check:
        print(f"{PAGE.name} is {'up to date' if before == after else 'out of date: python -m benchmarks.render'}")
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
