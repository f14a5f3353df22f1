"""HiDe on a shared prefix beside a plain answer and the published flow: stage times and tokens.

`python -m benchmarks.shared_prefix` uses a mid-size Qwen2.5-VL with random weights on the CPU, `--device cuda` the real
configuration of the 7B with random weights. The boxes are the same in all: a collage of a tenth of the image's tokens
is given, and what comes between rows and collage is left out (`benchmarks.rows_to_pixel_values` has it).
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.measure import WITHHELD, Failure, count, found_wrong
from hide.engine import stock
from hide.engine.prefix import Prefix
from hide.methods.hide.config import SEARCH_PROMPT
from hide.models.inputs import ImageInput, ImageInputs
from hide.models.prompts import Turn
from hide.models.qwen2_5_vl import Qwen25VL
from hide.session import ImageSession, RunSettings
from hide.tiny.model import build
from hide_kernels import rows_to_maps
from hide_kernels.integrations.transformers import capture_attention

QUESTION = "Is the star on the left or right side of the ring?"
ENTITY_PROMPT = "List the things that this question speaks of. " * 12
# Limits on a CPU: how many times the plain answer, per token; per question with five; and the
# published flow over ours.
PER_TOKEN, OF_FIVE, PUBLISHED = 1.05, 0.6, 2.0
# On a GPU, at most.
RUNS = 5


class Scale(NamedTuple):
    """A configuration and the sizes that are asked: (rows, columns) of image tokens, new tokens of a reply.

    layer: whose rows are wanted; entity_tokens: new tokens of the entities' reply, 0 to leave that step out.
    """

    name: str
    text: dict[str, Any]
    vision: dict[str, Any]
    image: tuple[int, int]
    collage: tuple[int, int]
    layer: int
    answer_tokens: int
    entity_tokens: int


MID = Scale(
    "mid-size",
    {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
     "num_attention_heads": 8, "num_key_value_heads": 2},
    {"depth": 4, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "fullatt_block_indexes": [1, 3]},
    image=(44, 46), collage=(14, 14), layer=4, answer_tokens=4, entity_tokens=0,
)  # fmt: skip
SEVEN_B = Scale(
    "Qwen2.5-VL-7B",
    {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
     "num_attention_heads": 28, "num_key_value_heads": 4},
    {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
     "fullatt_block_indexes": [7, 15, 23, 31]},
    image=(96, 170), collage=(32, 32), layer=14, answer_tokens=8, entity_tokens=24,
)  # fmt: skip


OURS = ("shared prefix (c)", "shared prefix, five questions", "five questions, keys on the host")


class Row(NamedTuple):
    """One way. seconds: the median of all; stages: medians. tokens: through the decoder, prompts and replies."""

    what: str
    model: str
    seconds: float
    stages: dict[str, float]
    tokens: int


Way = Callable[[], "tuple[dict[str, float], int, list[list[int]]]"]
"""One run: seconds by stage, tokens, the replies."""


def model(scale: Scale, device: str, dtype: torch.dtype | None = None) -> Qwen25VL:
    """Random weights; bfloat16 on a GPU unless told otherwise. Its replies never end by themselves."""
    small, tokenizer, processor = build()
    config = small.config.to_dict()
    head = scale.text["hidden_size"] // scale.text["num_attention_heads"]
    sections = [head // 8, head * 3 // 16, head // 2 - head // 8 - head * 3 // 16]
    rope = {"rope_type": "default", "mrope_section": sections}
    text = {
        **config["text_config"],
        **scale.text,
        "max_position_embeddings": 65_536,
        "layer_types": None,
        "tie_word_embeddings": False,
    }
    text.update({"rope_parameters": {**rope, "rope_theta": 1e6}, "rope_scaling": rope, "rope_theta": 1e6})
    vision = {
        **config["vision_config"],
        **scale.vision,
        "out_hidden_size": scale.text["hidden_size"],
        "window_size": 112,
    }
    tokens = {name: config[name] for name in config if name.endswith("token_id")}
    torch.manual_seed(0)
    made = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens, tie_word_embeddings=False)
    with torch.device(device):
        # Made in its dtype, as checkpoints are loaded: never in float32, and rotary frequencies stay exact.
        built = Qwen2_5_VLForConditionalGeneration._from_config(
            made, dtype=dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
        )
    built.generation_config = small.generation_config
    built.generation_config.eos_token_id = None
    return Qwen25VL(built, tokenizer, processor)


@functools.cache
def seven_b(device: str = "cuda") -> Qwen25VL:
    """The 7B, made once for all benchmarks that use it."""
    return model(SEVEN_B, device)


def search_with_logits(adapter: Qwen25VL, turn: Turn, rows: range, shown: ImageInputs, layer: int) -> list[Tensor]:
    """The published search pass: a layer's rows over each picture, and logits of all tokens for nobody."""
    with (
        torch.no_grad(),
        capture_attention(
            adapter.model,
            layers=[layer],
            queries=rows,
            key_spans=[image.span for image in turn.images],
            causal=False,
        ) as captured,
    ):
        adapter.model(**stock.forward_inputs(adapter, turn.input_ids, shown), use_cache=True)
    return rows_to_maps(captured[layer].weights[0], turn.images)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, float32 is float32 in convolutions too, so that replies can be compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def clock(device: str) -> float:
    """Seconds: on the CPU those of this process, which other work on the machine does not lengthen much."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def pictures(grid: tuple[int, int], seed: int) -> ImageInputs:
    """Noise of (rows, columns) image tokens."""
    rows, columns = grid
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(4 * rows * columns, 3 * 2 * 14 * 14, generator=generator)
    return ImageInputs((ImageInput(pixels, (1, 2 * rows, 2 * columns), grid, rows * columns),))


class Bench:
    """The three ways on one model, each with what it needs prepared."""

    def __init__(self, scale: Scale, device: str, adapter: Qwen25VL | None = None) -> None:
        """adapter: of that scale on that device; `None`: one is made."""
        self.scale, self.device = scale, device
        self.model = adapter or model(scale, device)
        self.image, self.collage = pictures(scale.image, 0), pictures(scale.collage, 1)
        self.every = self.image + self.collage
        self.turn = self.model.turn(f"{SEARCH_PROMPT}star, ring", self.image)
        self.questions = [f"{QUESTION} {i}" for i in range(5)]
        self._entity_prefix: Prefix | None = None

    def _clock(self) -> float:
        return clock(self.device)

    def plain(self) -> tuple[dict[str, float], int, list[list[int]]]:
        """(a) One stock `generate`."""
        start = self._clock()
        ids = self.model.input_ids(self.questions[0], self.image)
        new = stock.generate_ids(self.model, ids, self.image, max_new_tokens=self.scale.answer_tokens)
        return {"answer": self._clock() - start}, ids.shape[1] + len(new), [new]

    def published(self) -> tuple[dict[str, float], int, list[list[int]]]:
        """(b) Every step over the image again, with logits of all tokens where the published code makes them."""
        stages, tokens = {}, 0
        start = self._clock()
        if self.scale.entity_tokens:
            ids = self.model.input_ids(ENTITY_PROMPT + self.questions[0])
            new = stock.generate_ids(self.model, ids, max_new_tokens=self.scale.entity_tokens)
            tokens += ids.shape[1] + len(new)
            stages["entities"] = self._clock() - start
        start = self._clock()
        search_with_logits(self.model, self.turn, self.turn.rows, self.image, self.scale.layer)
        tokens += self.turn.input_ids.shape[1]
        stages["rows"] = self._clock() - start
        start = self._clock()
        ids = self.model.input_ids(self.questions[0], self.every)
        new = stock.generate_ids(self.model, ids, self.every, max_new_tokens=self.scale.answer_tokens)
        stages["answer"] = self._clock() - start
        return stages, tokens + ids.shape[1] + len(new), [new]

    def ours(self, questions: int, *, offload: bool = False) -> tuple[dict[str, float], int, list[list[int]]]:
        """(c) One prefill, then rows and answer of each question as branches; offload: keys and values on the host."""
        stages: dict[str, float] = {}
        replies = []
        start = self._clock()
        with ImageSession(self.model, self.image, run=RunSettings(offload_kv=offload)) as session:
            stages["prefix"] = self._clock() - start
            tokens = session.length

            def timed(name: str, run: Callable[[], Any]) -> Any:
                begun = self._clock()
                result = run()
                stages[name] = stages.get(name, 0.0) + self._clock() - begun
                return result

            for question in self.questions[:questions]:
                if self.scale.entity_tokens:
                    tokens += timed("entities", lambda question=question: self._entities(question))
                timed("rows", lambda: session.attention(self.turn, layers=[self.scale.layer], causal=False))
                tokens += self.turn.input_ids.shape[1] - session.length
                ids = self.model.input_ids(question, self.every)
                new = timed(
                    "answer",
                    lambda ids=ids: session.reply(ids, self.collage, max_new_tokens=self.scale.answer_tokens),
                )
                tokens += ids.shape[1] - session.length + len(new)
                replies.append(new)
        return stages, tokens, replies

    def _entities(self, question: str) -> int:
        ids = self.model.input_ids(ENTITY_PROMPT + question)
        if self._entity_prefix is None:
            self._entity_prefix = Prefix(self.model, ids[:, :60])
        new = self._entity_prefix.reply(ids, max_new_tokens=self.scale.entity_tokens)
        return ids.shape[1] - 60 + len(new)

    def ways(self) -> dict[str, Way]:
        """All, by name."""
        return {
            "plain answer (a)": self.plain,
            "published flow (b)": self.published,
            OURS[0]: lambda: self.ours(1),
            OURS[1]: lambda: self.ours(5),
            OURS[2]: lambda: self.ours(5, offload=True),
        }

    def rows(self) -> tuple[list[Tensor], list[Tensor]]:
        """The maps' rows, with and without a shared prefix."""
        alone = stock.attention(self.model, self.turn, self.image, layers=[self.scale.layer], causal=False)
        with ImageSession(self.model, self.image) as session:
            return alone, session.attention(self.turn, layers=[self.scale.layer], causal=False)


def check(bench: Bench) -> Iterator[Failure]:
    """What differs between the ways. In float32 the replies are equal and the rows within 1e-5 of their peak, on a GPU,
    whose kernels depend on the sizes, 1e-4."""
    exact = bench.model.dtype == torch.float32
    limit = (1e-5 if bench.device == "cpu" else 1e-4) if exact else 3e-2
    for alone, shared in zip(*bench.rows(), strict=True):
        error = float((alone - shared).abs().max() / alone.max())
        if not error <= limit:
            yield Failure("rows", OURS[0], f"they differ by {error:.1e} of their peak", OURS)
    published, ours, host = bench.published()[2], bench.ours(5)[2], bench.ours(5, offload=True)[2]
    if exact and published[0] != ours[0]:
        yield Failure("replies", OURS[0], f"they differ: {published[0]} and {ours[0]}", OURS)
    if exact and host != ours:
        yield Failure("replies", OURS[2], f"they differ: {host} and {ours}", OURS[2:])


def table(bench: Bench, runs: int, seconds: float = math.inf, withheld: Collection[str] = ()) -> list[Row]:
    """Every way, run in turn, so that a busy spell of the machine falls on all; once, and as often as fits."""
    end = time.monotonic() + seconds
    ways = {name: way for name, way in bench.ways().items() if name not in withheld}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    tokens: dict[str, int] = {}
    for run in range(runs + 1):
        if run > 1 and time.monotonic() > end:
            break
        for name, way in ways.items():
            stages, tokens[name], _ = way()
            if run:
                samples[name].append(stages)
    return [
        Row(
            name,
            bench.scale.name,
            statistics.median(sum(stages.values()) for stages in own),
            {stage: statistics.median(one[stage] for one in own) for stage in own[0]},
            tokens[name],
        )
        for name, own in samples.items()
    ]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over a plain answer, for one question and for each of five; that over the ratio of tokens; and the published
    flow over ours. Five questions with keys on the host over those without, where that was run."""
    plain, published, ours, five, *host = rows
    shared = ours["seconds"] / plain["seconds"]
    found = {
        "ours over plain": shared,
        "ours over plain, per token": shared / (ours["tokens"] / plain["tokens"]),
        "ours over plain, each of five": five["seconds"] / 5 / plain["seconds"],
        "published over ours": published["seconds"] / ours["seconds"],
    }
    if host:
        found["keys on the host over on the device"] = host[0]["seconds"] / five["seconds"]
    return found


def within_limit(rows: list[dict[str, Any]]) -> bool:
    """Whether the ratios on a CPU are what they must be."""
    found = ratios(rows)
    return (
        found["ours over plain, per token"] <= PER_TOKEN
        and found["ours over plain, each of five"] <= OF_FIVE
        and found["published over ours"] >= PUBLISHED
    )


def failures(device: str) -> Iterator[Failure]:
    """What is wrong on a device, in float32, at a size that is quick."""
    scale = MID._replace(image=(20, 22), collage=(5, 8))
    with without_tf32():
        yield from check(Bench(scale, device, model(scale, device, torch.float32)))


def gpu_table(seconds: float, device: str = "cuda", withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The 7B, as often as fits into the time."""
    start = time.monotonic()
    bench = Bench(SEVEN_B, device, seven_b(device))
    for row in table(bench, RUNS, seconds - (time.monotonic() - start), withheld):
        yield row._asdict()
    for name in withheld:
        yield {"model": SEVEN_B.name, "what": name, "skipped": WITHHELD}


def whole_table(device: str, runs: int = 5) -> list[dict[str, Any]]:
    """The mid-size model."""
    return [row._asdict() for row in table(Bench(MID, device), runs)]


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    if "skipped" in row:
        return f"{row['model']:<15}{row['what']:<32}{row['skipped']}"
    stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["stages"].items())
    return f"{row['model']:<15}{row['what']:<32}{row['seconds']:8.3f} s  {row['tokens']:>6} tokens  ({stages})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=count, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if failed := list(found_wrong(sys.modules[__name__], arguments.device)):
        print("checks failed, no time is reported", *failed, sep="\n  ")
        return 1
    bench = Bench(SEVEN_B if arguments.device == "cuda" else MID, arguments.device)
    rows = [row._asdict() for row in table(bench, arguments.runs)]
    for row in rows:
        print(line(row))
    for name, ratio in ratios(rows).items():
        print(f"{name}: {ratio:.2f}")
    return 0 if arguments.device == "cuda" or within_limit(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
