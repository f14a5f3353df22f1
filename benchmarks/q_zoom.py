"""Q-Zoom's two paths beside a plain answer and beside running both images anew.

`python -m benchmarks.q_zoom` counts what goes through the layers of Qwen2.5-VL-7B and predicts its floating-point
operations, from the configuration alone, for images of 256 to 4,096 tokens and a crop of as many; then it asks a
mid-size model with random weights and random branches on one core. `--predicted` leaves the second part out.

Full re-run: as the released code does for checkpoints without a gate, and as the plainest way to be exact: the first
look ends at layer K, and both images go through all layers from the embeddings.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import Failure, count, found_wrong
from benchmarks.shared_prefix import MID, Scale, clock, model, without_tf32
from hide.engine import stock
from hide.engine.beside import through
from hide.engine.decoder import extend
from hide.engine.kv_cache import PreallocatedCache
from hide.engine.prefix import Prefix, encode
from hide.methods.base import Preset
from hide.methods.q_zoom.branches import Branches, attach, branches_of, new_branches, region_scores
from hide.methods.q_zoom.method import QZoom, QZoomSettings
from hide.methods.q_zoom.regions import Region
from hide.models.base import Adapter
from hide.presets import AnswerSettings, RunSettings
from hide.profiling.models import read_config
from hide.questions import Question
from hide.session import ImageSession

MODEL, LAYER, DEPTH = "Qwen2.5-VL-7B-Instruct", 18, 3
# Image tokens; then tokens before the image, of the question, and around a crop.
SIZES, HEAD, TEXT, AROUND = (256, 576, 1024, 4096), 15, 30, 2
# Square images of the mid-size model, in tokens.
MEASURED = (256, 576, 1024)
QUESTION = Question("Is the star on the left or right side of the ring?")
# Path -> images that are encoded for it.
PATHS = {
    "plain answer": 1,
    "direct path": 1,
    "zoom path": 2,
    "further question, direct": 0,
    "further question, zoomed": 1,
    "zoom path, as released": 2,
    "full re-run": 2,
}
TIMED = ("plain answer", "direct path", "zoom path", "full re-run", "five zoomed questions", "five full re-runs")
# On a CPU, at most: seconds over what the counted tokens through layers let expect.
OVER = 1.15

# -- what is computed -------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """rows: tokens, behind `behind` others, through `layers` layers. made: what is made of them there: "all", or the
    projections alone, "k", "kv" or "qk"."""

    rows: int
    behind: int
    layers: int
    made: str = "all"


class Sizes(NamedTuple):
    """Of a decoder and its vision encoder; K and T are the branches'."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    depth: int
    inner: int
    vocabulary: int
    vision: Any
    K: int = LAYER
    T: int = DEPTH


def sizes(name: str = MODEL) -> Sizes:
    """Of a packaged configuration."""
    config = read_config(name)
    text = config.text_config
    return Sizes(
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.hidden_size // text.num_attention_heads,
        text.intermediate_size,
        text.vocab_size,
        config.vision_config,
    )


def parts(path: str, tokens: int, model: Sizes, text: int = TEXT, head: int = HEAD) -> list[Part]:
    """What a path sends through layers for one question, up to its reply's first token.

    tokens: of the image, and of the crop. text, head: tokens of the question and before the image.
    """
    L, K, T = model.layers, model.K, model.T
    prefix, cropped = head + tokens + 1, tokens + AROUND
    whole = prefix + text
    gate = [Part(prefix, 0, T - 1), Part(prefix, 0, 1, "kv"), Part(text, prefix, T)]
    regions = [Part(prefix, 0, T - 1), Part(tokens, 0, 1, "k"), Part(text, prefix, T - 1)]
    released = [Part(whole, 0, T), Part(whole, 0, T - 1), Part(whole, 0, 1, "qk")]
    return {
        "plain answer": [Part(whole, 0, L)],
        "direct path": [Part(prefix, 0, L), *gate, Part(text, prefix, L)],
        "zoom path": [Part(prefix, 0, L), Part(text, prefix, K), *gate, *regions, Part(cropped + text, prefix, L)],
        # On a session that has answered one: the image's part of everything is there.
        "further question, direct": [Part(text, prefix, L), Part(text, prefix, T)],
        "further question, zoomed": [
            Part(text, prefix, K), Part(text, prefix, T), Part(text, prefix, T - 1), Part(cropped + text, prefix, L),
        ],
        # It goes on from the last image token, and sends everything through the upper layers at once.
        "zoom path, as released": [
            Part(whole, 0, K), *released, Part(1 + cropped + text, prefix - 1, K), Part(whole + cropped, 0, L - K),
        ],
        "full re-run": [Part(whole, 0, K), *released, Part(whole + cropped, 0, L)],
    }[path]  # fmt: skip


def token_layers(found: list[Part]) -> int:
    """Tokens times whole layers."""
    return sum(part.rows * part.layers for part in found if part.made == "all")


def operations(found: list[Part], model: Sizes) -> float:
    """Floating-point operations of the decoder and its branches: a product and a sum are two."""
    of = {
        "q": model.hidden * model.heads * model.depth,
        "k": model.hidden * model.key_heads * model.depth,
    }
    of["v"], of["o"] = of["k"], of["q"]
    feed_forward = 3 * model.hidden * model.inner
    total = 2.0 * model.hidden * model.vocabulary
    for part in found:
        if part.made != "all":
            total += 2 * part.rows * part.layers * sum(of[kind] for kind in part.made)
            continue
        pairs = part.rows * part.behind + part.rows * (part.rows + 1) / 2
        attention = 2 * pairs * model.heads * model.depth
        total += 2 * part.layers * (part.rows * (sum(of.values()) + feed_forward) + attention)
    return total


def vision_operations(tokens: int, model: Sizes) -> float:
    """Of the vision encoder of Qwen2.5-VL for one image."""
    vision = model.vision
    patches, width = tokens * vision.spatial_merge_size**2, vision.hidden_size
    window = (vision.window_size // vision.patch_size) ** 2
    whole = len(vision.fullatt_block_indexes)
    linear = patches * (4 * width**2 + 3 * width * vision.intermediate_size) * vision.depth
    linear += patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
    attention = 2 * width * patches * (whole * patches + (vision.depth - whole) * min(window, patches))
    merged = width * vision.spatial_merge_size**2
    merger = tokens * (merged**2 + merged * vision.out_hidden_size)
    return 2.0 * (linear + attention + merger)


def predicted(images: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """A row for each path and size."""
    own = sizes()
    rows = []
    for tokens in images:
        found = {path: parts(path, tokens, own) for path in PATHS}
        work = {
            path: operations(found[path], own) + images_shown * vision_operations(tokens, own)
            for path, images_shown in PATHS.items()
        }
        rows += [
            {
                "what": path, "tokens": tokens, "token_layers": token_layers(found[path]), "tera": work[path] / 1e12,
                "over_plain": work[path] / work["plain answer"], "over_anew": work[path] / work["full re-run"],
            }
            for path in PATHS
        ]  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """`predicted` as Markdown: the whole of it, then each size over a plain answer at each other."""
    lines = [
        "| image tokens, crop tokens | | tokens x layers | TFLOP | over the plain answer | over the full re-run |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        crop = 0 if "plain" in row["what"] or "direct" in row["what"] else row["tokens"]
        lines.append(
            f"| {row['tokens']:,} + {crop:,} | {row['what']} | {row['token_layers']:,} | {row['tera']:.1f} "
            f"| {row['over_plain']:.2f} | {row['over_anew']:.2f} |"
        )
    plain = {row["tokens"]: row["tera"] for row in rows if row["what"] == "plain answer"}
    lines += ["", f"| over a plain answer with | {' | '.join(f'{tokens:,} tokens' for tokens in plain)} |"]
    lines.append("|---" * (len(plain) + 1) + "|")
    for row in rows:
        if row["what"] in ("direct path", "zoom path"):
            cells = " | ".join(f"{row['tera'] / other:.2f}" for other in plain.values())
            lines.append(f"| {row['what']}, {row['tokens']:,} tokens | {cells} |")
    return "\n".join(lines)


# -- seconds ----------------------------------------------------------------------------------------------------------


class FixedBox(QZoom):
    """Q-Zoom whose region is the middle of the image, whatever random branches say."""

    def region(self, found: Tensor) -> Region:
        """See `QZoom`."""
        rows, columns = found.shape
        return Region((columns // 4, rows // 4, columns - columns // 4, rows - rows // 4))


def with_branches(adapter: Adapter) -> Adapter:
    """Random branches at two thirds of the depth, as in the releases."""
    torch.manual_seed(1)
    made = new_branches(adapter, adapter.num_layers * 2 // 3, DEPTH, gate_depth=DEPTH)
    for module in made.modules().values():
        module.to(adapter.model.device, adapter.dtype).requires_grad_(False)
    attach(adapter, made)
    return adapter


def noise(tokens: int) -> Image.Image:
    """A square picture of so many tokens, of 28 pixels each."""
    side = 28 * round(tokens**0.5)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


class Bench:
    """The ways on one model and image; the crop has the image's budget."""

    def __init__(self, adapter: Adapter, tokens: int, answer_tokens: int, device: str) -> None:
        """adapter: of `with_branches`."""
        self.model, self.device = adapter, device
        self.run = RunSettings(min_tokens=tokens, max_tokens=tokens)
        # The replies of random weights do not end by themselves.
        self.answer = AnswerSettings(max_new_tokens=answer_tokens)
        self.image = noise(tokens)
        self.method = FixedBox(adapter, Preset(QZoomSettings(gate_threshold=0.0), self.run, self.answer))
        self.branches: Branches = branches_of(adapter)
        self.questions = [replace(QUESTION, stem=f"{QUESTION.stem} {number}") for number in range(5)]

    def inputs(self, *images: Any) -> Any:
        """As a session has them."""
        return self.model.preprocess(images, min_tokens=self.run.min_tokens, max_tokens=self.run.max_tokens)

    def plain(self) -> list[str]:
        """One stock `generate`."""
        shown = self.inputs(self.image)
        ids = self.model.input_ids(self.method.prompt(self.questions[0]), shown)
        new = stock.generate_ids(self.model, ids, shown, max_new_tokens=self.answer.max_new_tokens)
        return [self.model.decode(new)]

    def direct(self) -> list[str]:
        """The gate stays shut."""
        return [self.method.changed(gate_threshold=2.0).ask(self.image, self.questions[0]).text]

    def zoom(self, questions: int = 1) -> list[str]:
        """The gate opens, for so many questions on one session."""
        with self.method.open(self.image) as session:
            return [self.method.ask(session, question).text for question in self.questions[:questions]]

    @torch.no_grad()
    def anew(self, questions: int = 1) -> list[str]:
        """The first look up to layer K, both branches on all of its rows, and both images through all layers."""
        adapter, branches, found = self.model, self.branches, []
        for question in self.questions[:questions]:
            prompt = self.method.prompt(question)
            inputs, features = encode(adapter, self.inputs(self.image))
            turn = adapter.turn(prompt, inputs)
            places, _ = adapter.positions(turn.input_ids, inputs)
            cache = PreallocatedCache(adapter.num_layers, turn.input_ids.shape[1])
            states, _ = extend(adapter, cache, turn.input_ids, places, features, layers=range(branches.layer))
            assert branches.gate is not None and branches.head is not None
            with adapter.alone():
                branches.head(through(adapter, branches.gate, states, places)[:, -1])
                states = through(adapter, branches.regions[:-1], states, places)
                image = turn.images[0]
                query = branches.folded_query(adapter, states, places)[:, :, -1:]
                heat = region_scores(query, branches.keys(adapter, states, places)[:, :, image.start : image.stop])
            region = self.method.region(heat.view(image.grid))
            del cache, states
            crop, crop_features = encode(adapter, self.inputs(self._cut(region, image.grid)))
            both = inputs + crop
            ids = adapter.input_ids(prompt, both)
            joined = type(features)(torch.cat([features.embeddings, crop_features.embeddings]))
            with Prefix(adapter, adapter.image_prefix(both), both, features=joined) as prefix:
                found.append(adapter.decode(prefix.reply(ids, max_new_tokens=self.answer.max_new_tokens)))
        return found

    def _cut(self, region: Region, grid: tuple[int, int]) -> Image.Image:
        rows, columns = grid
        width, height = self.image.size
        x0, y0, x1, y1 = region.cells
        box = (x0 * width // columns, y0 * height // rows, x1 * width // columns, y1 * height // rows)
        return self.image.crop(box)

    def ways(self) -> dict[str, Callable[[], list[str]]]:
        """All, by name."""
        calls = (self.plain, self.direct, self.zoom, self.anew, lambda: self.zoom(5), lambda: self.anew(5))
        return dict(zip(TIMED, calls, strict=True))


@contextmanager
def counted_layers(adapter: Adapter) -> Iterator[list[int]]:
    """Inside, tokens are counted that go through whole layers of the decoder and of the branches."""
    branches = branches_of(adapter)
    rows: list[int] = []

    def add(_: Any, arguments: Any, keywords: Any) -> None:
        rows.append((arguments[0] if arguments else keywords["hidden_states"]).shape[1])

    layers = [*adapter.language_model.layers, *branches.regions, *(branches.gate or ())]
    hooks = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def check(bench: Bench) -> Iterator[Failure]:
    """Replies that differ from the long way's, and tokens through layers that are not those counted on paper."""
    plain, direct, zoom, anew = bench.plain(), bench.direct(), bench.zoom(5), bench.anew(5)
    if plain != direct:
        yield Failure("replies", TIMED[1], f"it says {direct}, and the model {plain}", TIMED)
    if zoom != anew:
        yield Failure("replies", TIMED[2], f"{zoom} on the session, {anew} anew", TIMED)
    adapter, (rows, columns) = bench.model, bench.inputs(bench.image).grids[0]
    prompt = bench.method.prompt(bench.questions[0])
    with bench.method.open(bench.image) as session:
        head, text = _lengths(session, prompt)
    own = sizes()._replace(layers=adapter.num_layers, K=bench.branches.layer)
    for path, run in (("direct path", bench.direct), ("zoom path", bench.zoom)):
        with counted_layers(adapter) as through_layers:
            run()
        want = token_layers(parts(path, rows * columns, own, text, head))
        # Each token of the reply goes through the decoder, and the prompt's last one twice where it was decoded from.
        extra = bench.answer.max_new_tokens * adapter.num_layers
        if not want <= sum(through_layers) <= want + extra:
            yield Failure("tokens through layers", path, f"{sum(through_layers)}, want {want} and {extra} more", TIMED)


def _lengths(session: ImageSession, prompt: str) -> tuple[int, int]:
    turn = session.turn(prompt)
    return turn.images[0].start, turn.input_ids.shape[1] - session.length


def failures(device: str) -> Iterator[Failure]:
    """What is wrong on a device, in float32, at a size that is quick."""
    with without_tf32():
        yield from check(Bench(with_branches(model(MID, device, torch.float32)), 100, 3, device))


def measured(
    device: str, runs: int = 3, images: tuple[int, ...] = MEASURED, scale: Scale = MID
) -> list[dict[str, Any]]:
    """Seconds of each way at each size, medians of runs in turn behind one that is not counted."""
    adapter = with_branches(model(scale, device))
    rows = []
    for tokens in images:
        bench = Bench(adapter, tokens, scale.answer_tokens, device)
        spent: dict[str, list[float]] = {name: [] for name in TIMED}
        for number in range(runs + 1):
            for name, way in bench.ways().items():
                start = clock(device)
                way()
                if number:
                    spent[name].append(clock(device) - start)
        plain, anew = (statistics.median(spent[name]) for name in (TIMED[0], TIMED[3]))
        for name, own in spent.items():
            seconds = statistics.median(own)
            rows.append(
                {"what": name, "model": scale.name, "tokens": tokens, "seconds": seconds,
                 "over_plain": seconds / plain, "over_anew": seconds / anew}
            )  # fmt: skip
    return rows


def whole_table(device: str) -> list[dict[str, Any]]:
    """The mid-size model."""
    return measured(device)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the largest image: the direct path over a plain answer, the zoom path over the full re-run, alone and
    for five questions."""
    largest = max(row["tokens"] for row in rows)
    seconds = {row["what"]: row["seconds"] for row in rows if row["tokens"] == largest}
    return {
        "direct path over plain answer": seconds[TIMED[1]] / seconds[TIMED[0]],
        "zoom path over full re-run": seconds[TIMED[2]] / seconds[TIMED[3]],
        "five zoomed questions over five full re-runs": seconds[TIMED[4]] / seconds[TIMED[5]],
    }


def within_limit(rows: list[dict[str, Any]]) -> bool:
    """Whether each ratio of a CPU is what the tokens through layers of the mid-size model let expect, and a bit."""
    found, own = ratios(rows), sizes()._replace(layers=8, K=5)
    largest = max(row["tokens"] for row in rows)
    through = {path: token_layers(parts(path, largest, own)) for path in PATHS}
    limits = (
        through["direct path"] / through["plain answer"],
        through["zoom path"] / through["full re-run"],
        through["zoom path"] / through["full re-run"],
    )
    return all(one <= OVER * limit for one, limit in zip(found.values(), limits, strict=True))


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    return (
        f"{row['model']:<10}{row['tokens']:>6} tokens  {row['what']:<24}{row['seconds']:8.2f} s"
        f"{row['over_plain']:8.2f} of plain{row['over_anew']:8.2f} of the full re-run"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=count, default=3, help="timed runs of each (default 3)")
    parser.add_argument("--images", type=count, nargs="+", default=MEASURED, help="image tokens to time, about")
    parser.add_argument("--predicted", action="store_true", help="only what follows from the configuration")
    arguments = parser.parse_args()
    print(table(predicted()))
    if arguments.predicted:
        return 0
    torch.set_num_threads(1)
    if failed := list(found_wrong(sys.modules[__name__], arguments.device)):
        print("checks failed, no time is reported", *failed, sep="\n  ")
        return 1
    rows = measured(arguments.device, arguments.runs, tuple(arguments.images))
    for row in rows:
        print(line(row))
    for name, ratio in ratios(rows).items():
        print(f"{name}: {ratio:.2f}")
    return 0 if arguments.device == "cuda" or within_limit(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
