"""`HiDe.ask` from a decoded picture to the answer, beside a plain answer and the published flow.

`python -m benchmarks.end_to_end` uses a mid-size Qwen2.5-VL with random weights on the CPU, `--device cuda` the real
configuration of the 7B with an 8K picture. Random weights see nothing, so what a trained model would see is planted:
every step runs and is timed as it is, but the entities that the model names are set aside for known ones, and to the
attention rows that were captured peaks at known places are added. The published flow gets the same. Nothing is timed
before the boxes are the planted ones, the collage is that of the references on the CPU, bit for bit, and the replies
are those of the published flow.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import functools
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import NO_TIME, WITHHELD, Failure, alone, in_turn
from benchmarks.regions_to_collage import SIZES, on_white, picture
from benchmarks.shared_prefix import (
    MID,
    QUESTION,
    SEVEN_B,
    Scale,
    clock,
    model,
    search_with_logits,
    seven_b,
    without_tf32,
)
from hide import Answer, HiDe, HiDeConfig, Plain, Preset
from hide.engine.stock import generate
from hide.images import to_tensor
from hide.methods.base import AnswerSettings, NoSettings, ask_all
from hide.methods.hide.entities import Entities, entity_request
from hide.methods.hide.method import EntityRows
from hide.methods.hide.search_prompt import search_prompt
from hide.models.inputs import ImageInput, ImageInputs
from hide.models.qwen2_5_vl import LOADER_CELL, LOADER_MIN_TOKENS, Qwen25VL, token_grid
from hide.questions import Question
from hide.session import RunSettings, Session, Turn
from hide.texts import named
from hide_kernels import collage, regions, token_maps
from hide_kernels.collage import boxes_to_pixels
from hide_kernels.memory import profile

# What the model is taken to have named, and where each thing is, in parts of the grid's rows and columns.
ENTITIES = Entities(("star", "ring"))
PLACES = ((0.25, 0.25), (0.7, 0.7))
# Where every row has a peak that means nothing, for the prior to take away.
SINK = (0.8, 0.1)
SIGMA, THRESHOLD = 3.0, 0.7
# A peak's spread in parts of the grid's rows: with the smoothing, collages of 1,024 tokens of an 8K picture.
SPREAD = 1 / 19
QUESTIONS = 4
# The ways that are compared.
ASK, BOTH, SEVERAL = "HiDe.ask (c)", "plain and HiDe on one session (c)", f"{QUESTIONS} questions on one session (c)"
PUBLISHED_FLOW = "published flow (b)"
# On a GPU: the largest first, and how often at most.
PICTURES, RUNS = ("8K", "2K", "4K"), 5
# Limits on a CPU: `ask` with and without the plain answer beside it over the plain answer alone, each of four questions
# on one session over it, and the published flow over `ask`, both with the plain answer.
WITH_PLAIN, WITHOUT_PLAIN, OF_FOUR, PUBLISHED = 1.35, 1.25, 0.55, 2.3
# (model, picture, most image tokens) of the gate and of the CPU's table.
SMALL = MID._replace(text={**MID.text, "num_hidden_layers": 4}, layer=2, entity_tokens=8)
MIDDLE = MID._replace(entity_tokens=8)
GATE_TOKENS, MIDDLE_TOKENS, LARGE_TOKENS = 800, 2048, 16_384


NOTE = (
    "Random weights, with planted entities and attention peaks. Every way starts from the decoded picture; (a) and (b) "
    "make pixel values by Pillow and Hugging Face's processor without torchvision, on the host; (b) has its rows from "
    "our kernel, a file that takes no time to decode, and no debugging pictures; (c) has the instruction for entities "
    "in its cache, as from a second question on. Peaks include the weights."
)


class Shown(NamedTuple):
    """What was found of a picture, and what was said."""

    boxes: list[list[int]]
    collage: Tensor
    plain_answer: str | None
    answer: str


class Run(NamedTuple):
    """One run of a way. tokens: through the decoder, prompts and replies. shown: of ways that look closer."""

    stages: dict[str, float]
    tokens: int
    shown: tuple[Shown, ...] = ()


class Row(NamedTuple):
    """One way. seconds, stages: medians. peak: most bytes on the device at one time, weights included."""

    what: str
    model: str
    picture: str
    image_tokens: int
    seconds: float
    stages: dict[str, float]
    tokens: int
    peak: int


class Marks:
    """Times of steps, each of which ends where the next begins; on a GPU the device is done with it then."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[tuple[str, float]] = []

    def __call__(self, step: str) -> None:
        self._marks.append((step, clock(self._device)))

    def seconds(self) -> dict[str, float]:
        """Of each step, until now."""
        self("")
        found: dict[str, float] = {}
        for (step, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            found[step] = found.get(step, 0.0) + end - start
        return found


@functools.cache
def planted(rows: int, prior: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """(rows, *grid) float32 peaks of 1, far above an attention row: in all of them the sink, behind the prior one of
    `PLACES` each."""
    height, width = grid
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")

    def peak(place: tuple[float, float]) -> Tensor:
        away = (y - int(place[0] * height)) ** 2 + (x - int(place[1] * width)) ** 2
        return torch.exp(-away / (2 * (SPREAD * height) ** 2))

    maps = peak(SINK).repeat(rows, 1, 1)
    for row in range(prior, rows):
        maps[row] += peak(PLACES[row % len(PLACES)])
    return maps.to(device)


def planted_boxes(grid: tuple[int, int], size: tuple[int, int]) -> list[tuple[list[int], list[int]]]:
    """Of each place the pixels that its box must have, and those that it must lie in; `size` is (height, width)."""
    # Where a peak, smoothed, falls to the threshold; a cell for the prior and the rows beneath.
    half = int((-2 * np.log(THRESHOLD) * ((SPREAD * grid[0]) ** 2 + SIGMA**2)) ** 0.5)
    found = []
    for place in PLACES:
        row, column = (int(part * length) for part, length in zip(place, grid, strict=True))
        cells = [[column - by, row - by, column + by + 1, row + by + 1] for by in (half - 1, half + 2)]
        inside = torch.tensor(cells).clamp(torch.zeros(4, dtype=torch.int64), torch.tensor([grid[1], grid[0]] * 2))
        inner, outer = boxes_to_pixels(inside, grid=grid, size=size).tolist()
        found.append((inner, outer))
    return found


class Planted(HiDe):
    """HiDe that is given its entities and where they are, after it has asked the model for both."""

    rows: EntityRows

    def entities(self, question: str | Question) -> Entities:
        # Else a question's entities would be known from the run before.
        self._extract._known.clear()
        super().entities(question)
        return ENTITIES

    def attention_rows(self, session: Session, entities: Entities | str) -> EntityRows:
        real = super().attention_rows(session, entities)
        maps = tuple(
            image_rows + planted(len(image_rows), real.prior_rows, tuple(image_rows.shape[1:]), image_rows.device)
            for image_rows in real.rows
        )
        self.rows = dataclasses.replace(real, rows=maps)
        return self.rows


class Numbered(Qwen25VL):
    """Replies as the numbers of their tokens: those of random weights are seldom text."""

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


class Prompts(Session):
    """The prompts of a session about images that no model has seen."""

    def __init__(self, model: Qwen25VL, inputs: ImageInputs) -> None:
        self._model, self._inputs = model, inputs

    def turn(self, said: Any) -> Turn:
        return self._model.turn(said, self._inputs)


class Bench:
    """All ways on one model and one picture."""

    def __init__(
        self,
        adapter: Qwen25VL,
        scale: Scale,
        device: str,
        size: tuple[int, int],
        max_tokens: int,
        *,
        offload: bool = False,
    ) -> None:
        """size: (height, width) of the picture. offload: ours keeps keys and values on the host."""
        self.adapter = Numbered(adapter.model, adapter.tokenizer, adapter.image_processor)
        self.scale, self.device, self.size, self.max_tokens = scale, device, size, max_tokens
        preset = Preset(
            HiDeConfig((scale.layer,), SIGMA, THRESHOLD, max_entity_tokens=scale.entity_tokens),
            RunSettings(max_tokens=max_tokens, offload_kv=offload),
            AnswerSettings(max_new_tokens=scale.answer_tokens),
        )
        self.hide = Planted(self.adapter, preset)
        self.plain_answer = Plain(self.adapter, preset.with_settings(NoSettings()))
        self.image = Image.fromarray(picture(size).numpy())
        self.image_tokens = sum(self._processed([self.image]).tokens)

    # -- the ways -----------------------------------------------------------------------------------------------------

    def plain(self) -> Run:
        """(a) One stock `generate` on the picture."""
        marks = Marks(self.device)
        marks("read and resize")
        shown = self._processed([self.image])
        marks("plain answer")
        reply = generate(self.adapter, QUESTION, shown, max_new_tokens=self.scale.answer_tokens)
        return Run(marks.seconds(), reply.tokens)

    def ask(self) -> Run:
        """(c) Ours."""
        marks = Marks(self.device)
        answer = self.hide.ask(self.image, QUESTION, progress=marks)
        return Run(marks.seconds(), sum(answer.tokens.values()), (_shown(answer),))

    def ask_both(self) -> Run:
        """(c) with the plain answer before it, on the same session."""
        marks = Marks(self.device)

        def progress(step: str) -> None:
            marks("plain answer" if step == "plain: answer" else step.removeprefix("hide: "))

        plain, answer = ask_all([self.plain_answer, self.hide], self.image, QUESTION, progress=progress)
        tokens = plain.tokens["answer"] + sum(answer.tokens.values())
        return Run(marks.seconds(), tokens, (_shown(answer, plain),))

    def questions(self) -> Run:
        """(c) for several questions on one session."""
        marks = Marks(self.device)
        marks("prefix")
        with self.hide.open(self.image) as session:
            tokens, shown = session.length, []
            for i in range(QUESTIONS):
                answer = self.hide.ask(session, f"{QUESTION} {i}", progress=marks)
                tokens += sum(answer.tokens.values())
                shown.append(_shown(answer))
        return Run(marks.seconds(), tokens, tuple(shown))

    def published(self, path: Path) -> Run:
        """(b) Three passes over the whole picture, and what is between them on the host.

        The rows are captured by our kernel, which is faster than the released loop over heads. path: the picture's
        file, which the released code opens to cut the collage.
        """
        # It wants scikit-image.
        from benchmarks import published_steps

        adapter, most = self.adapter, self.scale.answer_tokens
        marks = Marks(self.device)
        marks("read and resize")
        shown = self._processed([self.image])
        marks("plain answer")
        plain = generate(adapter, QUESTION, shown, max_new_tokens=most)
        marks("entities")
        request = entity_request(Question.parse(QUESTION), self.hide.settings.entity_prompt)
        entities = generate(adapter, request, max_new_tokens=self.scale.entity_tokens)
        marks("read and resize")
        shown = self._processed([self.image])
        marks("attention rows")
        prompt = search_prompt(Prompts(adapter, shown), ENTITIES.text)
        turn = prompt.turn
        (maps,) = search_with_logits(adapter, turn, prompt.rows, shown, self.scale.layer)
        maps = maps + planted(len(maps), prompt.prior_rows, tuple(maps.shape[1:]), maps.device)
        (start, stop), length = turn.images[0].span, turn.input_ids.shape[1]
        rows = np.pad(maps.flatten(1).cpu().numpy(), ((0, 0), (start, length - stop)))
        marks("boxes and collage")
        found = published_steps.from_img_and_att_get_cropbox(
            {"input_ids": turn.input_ids, "image_grid_thw": torch.tensor([shown.items[0].layout])},
            [[[dict(zip(prompt.rows, rows, strict=True))]]],
            collections.defaultdict(str), [str(path)], [start], [stop], [SIGMA], [THRESHOLD],
        )[str(SIGMA)][str(THRESHOLD)]  # fmt: skip
        (uri,), boxes = found[3], found[4][0]
        made = on_white(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))))
        marks("read and resize")
        shown = self._processed([self.image, made])
        marks("answer")
        answer = generate(adapter, QUESTION, shown, max_new_tokens=most)
        size = np.tile(self.image.size, 2)
        pixels = [np.rint(np.array(box) * size).astype(int).tolist() for box in boxes]
        tokens = plain.tokens + entities.tokens + turn.input_ids.shape[1] + answer.tokens
        return Run(marks.seconds(), tokens, (Shown(sorted(pixels), to_tensor(made), plain.text, answer.text),))

    def _processed(self, images: Sequence[Image.Image]) -> ImageInputs:
        """What the vision encoder eats, as it is usually made: by Pillow and Hugging Face's processor, on the host."""
        processor, items = self.adapter.image_processor, []
        merge = processor.merge_size
        cell = processor.patch_size * merge
        fewest = self.hide.preset.run.min_tokens
        bounds = {"shortest_edge": fewest * cell**2, "longest_edge": self.max_tokens * cell**2}
        for image in images:
            rows, columns = token_grid(image.height, image.width, LOADER_CELL, LOADER_MIN_TOKENS, self.max_tokens)
            resized = image.resize((columns * LOADER_CELL, rows * LOADER_CELL), Image.Resampling.BICUBIC)
            made = processor(images=[resized], size=bounds, return_tensors="pt")
            layout = tuple(made["image_grid_thw"][0].tolist())
            grid = (layout[1] // merge, layout[2] // merge)
            items.append(ImageInput(made["pixel_values"], layout, grid, grid[0] * grid[1]))
        return ImageInputs(tuple(items))

    # -- what they must show ------------------------------------------------------------------------------------------

    def wrong(self, run: Run) -> list[str]:
        """What a run shows that it must not; judged by the rows that ours was given last."""
        wrong = []
        want = self._reference() if run.shown else None
        for shown in run.shown:
            wrong += self._misplaced(shown.boxes)
            if want is None or not torch.equal(shown.collage, want):
                wrong.append("the collage is not that of the references on the CPU")
        return wrong

    def _misplaced(self, boxes: list[list[int]]) -> list[str]:
        _, rows, columns = self.hide.rows.rows[0].shape
        places = planted_boxes((rows, columns), self.size)
        wrong = [
            f"no box has the planted {inner} and lies in {outer}: {boxes}"
            for inner, outer in places
            if not any(_inside(inner, box) and _inside(box, outer) for box in boxes)
        ]
        return wrong if len(boxes) == len(places) else [*wrong, f"{len(boxes)} boxes, want {len(places)}: {boxes}"]

    def _reference(self) -> Tensor:
        """The collage of the rows that ours was given, by the references of all operators."""
        rows = [image_rows.cpu() for image_rows in self.hide.rows.rows]
        (maps,), _, valid = token_maps(rows, prior_rows=self.hide.rows.prior_rows, sigma=SIGMA, backend="scipy")
        found = regions(maps, THRESHOLD, valid=valid, backend="scipy")
        used = torch.arange(found.boxes.shape[1]) < found.counts[:, None]
        boxes = boxes_to_pixels(found.boxes[used], grid=(maps.shape[1], maps.shape[2]), size=self.size)
        made = collage(to_tensor(self.image), boxes, fill=self.hide.settings.fill, backend="numpy").image
        assert made is not None
        return made


def _inside(box: list[int], other: list[int]) -> bool:
    return box[0] >= other[0] and box[1] >= other[1] and box[2] <= other[2] and box[3] <= other[3]


def _shown(answer: Answer, plain: Answer | None = None) -> Shown:
    (made,) = answer.shown
    pixels = torch.zeros(0, 0, 3, dtype=torch.uint8) if made is None else to_tensor(made)
    return Shown(sorted(answer.boxes[0].tolist()), pixels, plain.text if plain else None, answer.text)


def ways(bench: Bench, path: Path) -> dict[str, Callable[[], Run]]:
    """All, by name; ours first, whose rows the others are judged by."""
    return {
        ASK: bench.ask,
        BOTH: bench.ask_both,
        SEVERAL: bench.questions,
        "plain answer (a)": bench.plain,
        PUBLISHED_FLOW: functools.partial(bench.published, path),
    }


def check(bench: Bench) -> Iterator[Failure]:
    """What is wrong with a way, or differs between ours and the published flow; replies are compared in float32."""
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in ways(bench, _saved(bench.image, folder)).items():
            try:
                runs[name] = way()
                for text in bench.wrong(runs[name]):
                    yield Failure("one question", name, text, (name,))
            except Exception as error:
                yield Failure("one question", name, named(error), (name,))
    shown = {name: run.shown for name, run in runs.items() if run.shown}
    for what, field, one, other in (
        ("plain answer", "plain_answer", BOTH, PUBLISHED_FLOW),
        ("answer", "answer", BOTH, PUBLISHED_FLOW),
        ("answer", "answer", ASK, BOTH),
    ):
        if one in shown and other in shown:
            got, want = (getattr(shown[name][0], field) for name in (one, other))
            if not got or got != want:
                yield Failure(what, one, f"{got!r}, and {want!r} by {other}", (one,))
    if not all(each.answer for each in shown.get(SEVERAL, ())):
        yield Failure("answers", SEVERAL, "a question on the session has none", (SEVERAL,))


def table(bench: Bench, runs: int, seconds: float = math.inf, withheld: Collection[str] = ()) -> list[dict[str, Any]]:
    """Every way whose check has passed, as `timed`."""
    with tempfile.TemporaryDirectory() as folder:
        every = ways(bench, _saved(bench.image, folder))
        left_out = [{**_about(bench), "what": name, "skipped": WITHHELD} for name in every if name in withheld]
        served = {name: way for name, way in every.items() if name not in withheld}
        return timed(bench, served, runs, seconds) + left_out


def timed(bench: Bench, callable_ways: dict[str, Callable[[], Run]], runs: int, seconds: float) -> list[dict[str, Any]]:
    """Each way once for its memory, where what it shows is checked, then `runs` times in turn, or once and as often as
    fits into the time."""
    end = time.monotonic() + seconds
    found: dict[str, dict[str, Any]] = {}
    peaks: dict[str, int] = {}
    samples: dict[str, list[Run]] = {}
    for name, way in callable_ways.items():
        if (found or samples) and time.monotonic() > end:
            found[name] = {**_about(bench), "what": name, "skipped": NO_TIME}
            continue
        verdict = "failed"
        try:
            with profile(bench.adapter.model) as recording:
                first = way()
            wrong = bench.wrong(first)
        except Exception as error:
            wrong = [named(error)]
            # A way of others that does not fit, or wants a package that is not there, is a result.
            verdict = "failed" if name.endswith("(c)") else "skipped"
        if wrong:
            found[name] = {**_about(bench), "what": name, verdict: "; ".join(wrong)}
        else:
            peaks[name], samples[name] = recording.report.peak, []
    for run in range(runs):
        if run and time.monotonic() > end:
            break
        for name, own in samples.items():
            own.append(callable_ways[name]())
    for name, own in samples.items():
        stages = {stage: statistics.median(one.stages[stage] for one in own) for stage in own[0].stages}
        seconds = statistics.median(sum(one.stages.values()) for one in own)
        row = Row(name, **_about(bench), seconds=seconds, stages=stages, tokens=own[0].tokens, peak=peaks[name])
        found[name] = row._asdict()
    return [found[name] for name in callable_ways]


def _about(bench: Bench) -> dict[str, Any]:
    height, width = bench.size
    return {"model": bench.scale.name, "picture": f"{width}x{height}", "image_tokens": bench.image_tokens}


def _saved(image: Image.Image, folder: str) -> Path:
    """The picture as a file that takes next to no time to read."""
    path = Path(folder, "picture.bmp")
    image.save(path)
    return path


def failures(device: str) -> Iterator[Failure]:
    """What is wrong on a device, in float32, at a size that is quick."""
    adapter = model(SMALL, device, torch.float32)
    with without_tf32():
        yield from check(Bench(adapter, SMALL, device, SIZES["2K"], GATE_TOKENS))


def gpu_table(seconds: float, device: str = "cuda", withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The 7B with pictures of 16,384 tokens and fewer, as far as they fit into the time."""
    end = time.monotonic() + seconds
    adapter = seven_b(device)

    def of_picture(name: str) -> list[dict[str, Any]]:
        bench = Bench(adapter, SEVEN_B, device, SIZES[name], LARGE_TOKENS)
        # Half of what is left, so that the smaller ones have theirs.
        return table(bench, RUNS, (end - time.monotonic()) / 2, withheld)

    yield from in_turn({name: functools.partial(of_picture, name) for name in PICTURES}, end - time.monotonic())


def whole_table(device: str, runs: int = 3) -> list[dict[str, Any]]:
    """The mid-size model and a picture of 2,048 tokens at most."""
    return table(Bench(model(MIDDLE, device), MIDDLE, device, SIZES["2K"], MIDDLE_TOKENS), runs)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of ours over a plain answer's, and of the published flow over ours."""
    alone, both, questions, plain, published = (row["seconds"] for row in rows)
    return {
        "ask over plain": alone / plain,
        "plain and ask over plain": both / plain,
        "each question on a session over plain": questions / QUESTIONS / plain,
        "published over plain and ask": published / both,
    }


def within_limit(rows: list[dict[str, Any]]) -> bool:
    """Whether all ways ran and the ratios on a CPU are what they must be."""
    if not all("seconds" in row for row in rows):
        return False
    alone, both, questions, published = ratios(rows).values()
    return alone <= WITHOUT_PLAIN and both <= WITH_PLAIN and questions <= OF_FOUR and published >= PUBLISHED


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    if "model" not in row:
        return f"{row['what']}: {row.get('failed') or row['skipped']}"
    what = f"{row['model']:<15}{row['picture']:<11}{row['what']:<38}"
    if "seconds" not in row:
        return f"{what}{row.get('failed') or row['skipped']}"
    stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["stages"].items())
    return f"{what}{row['seconds']:8.3f} s  {row['tokens']:>6} tokens  peak {row['peak'] / 1e9:.2f} GB  ({stages})"


if __name__ == "__main__":
    sys.exit(alone(sys.modules[__name__], 120))
