"""Memory of every flow over the size of the image: writes docs/memory.md and the baseline of the memory tests.

`python -m benchmarks.memory` predicts all of it on one core, without GPU, weights or network; the baseline alone with
`--baseline`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from hide.models import qwen2_5_vl
from hide.present.table import ResultTable
from hide.profiling.flows import FLOWS, flows_of
from hide.profiling.models import WEIGHTS, read_config
from hide.profiling.output import fit_table, gigabytes, made_by
from hide.profiling.runs import FlowRun, Settings, fits, predict_flow
from hide.profiling.workload import MAX_TOKENS, Workload

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "memory.md"
BASELINE = ROOT / "tests" / "data" / "memory_baseline.json"
MODEL = "Qwen2.5-VL-7B-Instruct"
SIZES = (1024, 4096, 16384, 65536)
# The flows of a HiDe question.
QUESTION = flows_of("all")
# Where the page looks closer, and what the paper gives figures of.
LARGE = 16384
# What the baseline holds: quick enough for every run of the tests.
BASELINE_TOKENS = 4096
OWNERS = 5
CARDS = (24 * 10**9, 12 * 10**9)
FIT_FLOWS = ("eager, one layer alive", "published, last logits", "ours")

Quantised = Sequence[tuple[str, Workload, FlowRun]]
Runs = dict[tuple[str, int], FlowRun]


def all_runs(sizes: Sequence[int] = SIZES, flows: Sequence[str] = QUESTION) -> Runs:
    """Every flow at every size."""
    config = read_config(MODEL)
    found = {}
    for flow in flows:
        for tokens in sizes:
            found[flow, tokens] = predict_flow(config, flow, Workload(tokens))
            print(f"{flow}, {tokens}: {found[flow, tokens].report.peak / 1e9:.2f} GB", file=sys.stderr)
    return found


def steps_to_ours(ours: FlowRun) -> dict[str, FlowRun]:
    """Ours as it grew, at `LARGE` tokens: each is the one before it and what its name says."""
    config = read_config(MODEL)
    with mock.patch.object(qwen2_5_vl, "in_slices", nullcontext):
        found = {
            name: predict_flow(config, "ours", Workload(LARGE, chunk=chunk))
            for name, chunk in (("one prefill for all steps", MAX_TOKENS), ("the decoder in chunks", 2048))
        }
    return {**found, "the vision encoder in slices": ours}


def beside_weights(run: FlowRun) -> int:
    """Bytes at the peak that are not the weights'."""
    return run.report.peak - run.groups["weights"]


def exponent(small: FlowRun, large: FlowRun) -> float:
    """e in bytes beside the weights ~ tokens^e."""
    return math.log(beside_weights(large) / beside_weights(small)) / math.log(large.tokens / small.tokens)


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {name: metadata.version(name).partition("+")[0] for name in ("torch", "transformers")}


# -- the page ---------------------------------------------------------------------------------------------------------


def page(
    runs: Runs,
    grown: dict[str, FlowRun],
    quantised: Quantised,
    fitted: Sequence[ResultTable],
) -> str:
    """docs/memory.md."""
    at = {flow: runs[flow, LARGE] for flow in QUESTION}
    _, alive, published, last, ours = at.values()
    peak = {flow: gigabytes(run.report.peak) for flow, run in at.items()}
    matrix = next(owner for owner in alive.owners if owner.dtype == "float32")
    search = next(stage for stage in last.report.stages if stage.name == "search")
    logits = next(owner for owner in published.owners if owner.group == "logits")
    floor = ours.groups["weights"] + _cache_bytes(ours.tokens)
    parts = [
        "# Where the memory goes",
        f"Written by `python -m benchmarks.memory`, which predicts it ([how](memory_profiler.md)) for {MODEL} in "
        f"bfloat16 from its configuration, with torch {versions()['torch']} and transformers "
        f"{versions()['transformers']}: no GPU, no weights. `hide profile` does the same for other models and sizes, "
        "and says what fits on a card. No figure here was measured on a GPU. GB are 10^9 bytes; CUDA's context, "
        "workspaces and what its allocator loses between blocks come on top.",
        "A square image, a collage of 1,024 tokens at most, 30 tokens of text, chunks of 2,048 tokens. The flows:",
        "\n".join(f"- **{name}**: {FLOWS[name].about}." for name in QUESTION),
        _sizes_table(runs).markdown(),
        _exponents_table(runs).markdown(),
        "## The paper's 96 GB and 20 GB",
        f"The paper says that memory falls by 75 %, from 96 GB to 20 GB. At {LARGE:,} image tokens:",
        f"- **96 GB is eager attention with one layer's matrix alive: {peak['eager, one layer alive']} GB.** The "
        f"matrix of 28 heads over {alive.tokens + 46:,} tokens is there as bfloat16 scores, and twice in float32 while "
        f"the softmax runs ({gigabytes(matrix.bytes)} GB each). The vision encoder is not eager in this figure: one of "
        f"its four full layers alone would take {2 * 4 * 16 * (4 * LARGE) ** 2 / 1e9:,.0f} GB for the softmax's two "
        "float32 copies.",
        f"- **Maps of all layers would be {peak['eager, all layers kept']} GB**, which is what "
        "`output_attentions=True` returns; transformers 5 also keeps what the vision encoder's attention returns.",
        f"- **20 GB is fused attention with rows of one layer and the last token's logits: "
        f"{peak['published, last logits']} GB**, {gigabytes(search.peak)} of them in the search pass. "
        "The published script asks for the logits of all tokens in that pass, "
        f"{gigabytes(logits.bytes)} GB, and needs **{peak['published']} GB**.",
        f"- So the fall holds ({1 - last.report.peak / alive.report.peak:.0%}; "
        f"{1 - published.report.peak / alive.report.peak:.0%} as the script is), and it is a fall from a way of "
        "attending that nobody needs: the weights alone are "
        f"{gigabytes(ours.groups['weights'])} GB of the 20, and without them {gigabytes(beside_weights(alive))} become "
        f"{gigabytes(beside_weights(last))}. Beside the weights eager grows with the square of the tokens, all others "
        "in proportion.",
        f"- **Ours is {peak['ours']} GB**, with weights, keys and values being {gigabytes(floor)} GB. The image goes "
        f"through the model in chunks, no logits are made of it, and one encoding serves all steps. Its peak is in "
        f"the stage \"{ours.report.peak_stage}\".",
        f"## Who holds it, at {LARGE:,} tokens",
        *(_owners_table(run).markdown() for run in at.values()),
        "## How ours got there",
        "Each row is the one above it and one thing more. The tables are of what held most before and after it; the "
        "last is ours above.",
        _growth_table(grown).markdown(),
        *(_owners_table(run, name).markdown() for name, run in list(grown.items())[:-1]),
        "## On smaller cards",
        "Predicted for [`weights=\"int8\"` and `\"int4\"`](quantised_weights.md), as torchao lays them out: every "
        "linear layer but the head; int8 turns a layer's weight into bfloat16 for its product, int4 (groups of 64, "
        "input channels filled up to multiples of 1,024) reads packed weights in the kernel. Replies are then those of "
        "the quantised model. Keys and values on the host ([how](sessions.md)) leave two layers' on the device; "
        "replies are the same, and every step brings them over the bus.",
        _quantised_table(quantised).markdown(),
        *(table.markdown() for table in fitted),
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _cache_bytes(tokens: int) -> int:
    text = read_config(MODEL).get_text_config()
    head = text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * 2 * tokens


def _sizes_table(runs: Runs) -> ResultTable:
    sizes = sorted({tokens for _, tokens in runs})
    rows = [(flow, *(gigabytes(runs[flow, tokens].report.peak) for tokens in sizes)) for flow in QUESTION]
    return ResultTable("Peak in GB, by image tokens", ("flow", *(f"{tokens:,}" for tokens in sizes)), rows)


def _exponents_table(runs: Runs) -> ResultTable:
    sizes = sorted({tokens for _, tokens in runs})
    pairs = list(pairwise(sizes))
    rows = [(flow, *(f"{exponent(runs[flow, a], runs[flow, b]):.2f}" for a, b in pairs)) for flow in QUESTION]
    header = ("flow", *(f"{a:,} to {b:,}" for a, b in pairs))
    return ResultTable("Exponent of growth of what comes on top of the weights", header, rows)


def _growth_table(grown: dict[str, FlowRun]) -> ResultTable:
    names = ("encode", "prefill")
    peaks = {name: {stage.name: stage.peak for stage in run.report.stages} for name, run in grown.items()}
    rows = [(name, *(gigabytes(found[stage]) for stage in names)) for name, found in peaks.items()]
    return ResultTable(f"Ours at {LARGE:,} tokens, peak of each stage in GB", ("with", *names), rows)


def _owners_table(run: FlowRun, name: str | None = None) -> ResultTable:
    rows = [
        (made_by(owner), gigabytes(owner.bytes), str(owner.count), f"{list(owner.shape)} {owner.dtype}")
        for owner in run.owners[:OWNERS]
    ]
    title = f"{name or run.flow}: {gigabytes(run.report.peak)} GB, in {run.report.peak_stage}"
    return ResultTable(title, ("made by", "GB", "how many", "tensor"), rows)


def _quantised_table(quantised: Quantised) -> ResultTable:
    rows = [
        (
            kind,
            str(work.chunk),
            "host" if work.offload else "device",
            gigabytes(run.groups["weights"]),
            gigabytes(run.report.peak),
            run.report.peak_stage,
        )
        for kind, work, run in quantised
    ]
    title = f"Ours at {LARGE:,} tokens, GB"
    return ResultTable(title, ("weights", "chunk", "keys and values on", "weights alone", "peak", "in stage"), rows)


# -- the baseline -----------------------------------------------------------------------------------------------------


def baseline_runs() -> dict[str, FlowRun]:
    """What the baseline is made of, and compared with."""
    config = read_config(MODEL)
    flows = (flow for flow in QUESTION if flow != "eager, all layers kept")
    return {flow: predict_flow(config, flow, Workload(BASELINE_TOKENS)) for flow in flows}


def summary(run: FlowRun) -> dict[str, Any]:
    """A run's peak and its owners, as the baseline keeps them."""
    owners = {f"{made_by(owner)} {list(owner.shape)} {owner.dtype}": owner.bytes for owner in run.owners[:12]}
    return {"peak": run.report.peak, "stage": run.report.peak_stage, "owners": owners}


def risen(before: dict[str, Any], now: dict[str, Any], limit: float = 0.01) -> str | None:
    """What to say where a peak has risen by more than `limit`: by how much, and whose bytes have; else `None`."""
    if now["peak"] <= before["peak"] * (1 + limit):
        return None
    more = {owner: size - before["owners"].get(owner, 0) for owner, size in now["owners"].items()}
    owner, grown = max(more.items(), key=lambda item: item[1], default=("the weights", 0))
    return (
        f"peak {now['peak'] / 1e9:.3f} GB in stage {now['stage']}, was {before['peak'] / 1e9:.3f} "
        f"({now['peak'] / before['peak'] - 1:+.1%}); most of it: {owner}, {grown / 1e9:+.3f} GB"
    )


def write_baseline() -> None:
    """tests/data/memory_baseline.json."""
    flows = {flow: summary(run) for flow, run in baseline_runs().items()}
    document = {"versions": versions(), "model": MODEL, "tokens": BASELINE_TOKENS, "flows": flows}
    BASELINE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--baseline", action="store_true", help="write the baseline alone")
    arguments = parser.parse_args()
    write_baseline()
    if arguments.baseline:
        return 0
    config = read_config(MODEL)
    quantised = [
        (kind, own, predict_flow(config, "ours", own, Settings(weights=kind)))
        for kind in WEIGHTS
        for own in (Workload(LARGE, chunk=4096), Workload(LARGE, chunk=1024), Workload(LARGE, chunk=1024, offload=True))
    ]
    work = Workload(LARGE)
    fitted = []
    for card in CARDS:
        found = fits(config, FIT_FLOWS, card, work, Settings(), progress=lambda what: print(what, file=sys.stderr))
        fitted.append(fit_table(found, card, work))
    runs = all_runs()
    PAGE.write_text(page(runs, steps_to_ours(runs["ours", LARGE]), quantised, fitted), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
