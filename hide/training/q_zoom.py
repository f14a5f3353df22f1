"""Q-Zoom's stages (arXiv 2604.06912), each of which reads what those before it have left in the folder.

`labels`: what the region branch learns from, by the model's own attention. `region`: the region branch. `tuning`: the
model itself, on questions that it answers rightly without a crop and wrongly with one. `gate`: the gate, on questions
whose answers depend on the budget. What is made of questions lies in JSON lines, a line on the disk before the next
question is asked; what is learned in a folder for each stage.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from hide.evaluation.data import BadRecord, Sample, read_data, scene_questions
from hide.evaluation.runner import evaluate
from hide.evaluation.scoring import strict, verdict
from hide.evaluation.store import ResultFile, blank_record
from hide.methods.q_zoom.branches import Branches, attach, new_branches
from hide.methods.q_zoom.method import QZoom
from hide.models.base import Adapter
from hide.models.inputs import Features, ImageInputs
from hide.session import open_session
from hide.training.checkpoint import check_place, save_checkpoint
from hide.training.heads import published
from hide.training.labels import from_text, label
from hide.training.loop import ALONE, Processes, check_alike, fit, held, trained
from hide.training.objectives import (
    NOTHING,
    Loss,
    Seen,
    answer_loss,
    encoded,
    gate_loss,
    region_loss,
    see,
    together,
)
from hide.training.routing import Route, routes, shown
from hide.training.settings import Settings

STAGES = ("labels", "region", "tuning", "gate")
Progress = Callable[[str, int, int | None], None]
"""Called with what is going on, how much of it is done, and of how much, where that is known."""
Note = Callable[[str], None]
"""Called with what was left out, and why."""

# Of the first scene; those of evaluations begin below, the embedded model's own training at 2**40.
_SEED = 10_000_000
# Questions about scenes, where nobody says how many.
SCENES = 6000
# Bytes of encoded images that are kept for the next epoch.
KEPT = 2**30
# As the published code has it in training, whatever the task.
_REGION_THRESHOLD = 0.1


class Pool:
    """Questions of a data set, in its order and by their ids; `bad`: its records that are none.

    data: as `read_data`; "scenes:TOKENS" draws scenes of training's own seeds, up to six questions each. limit: at most
    so many; `None`: all, of scenes `SCENES`.

    Raises `ValueError` for data that cannot be read or have no question.
    """

    def __init__(self, data: str, limit: int | None = None) -> None:
        self.data, self._limit = data, SCENES if limit is None else limit
        kind, _, tokens = data.partition(":")
        self._known: dict[str, Sample] | None = None
        self.bad: list[BadRecord] = []
        if kind == "scenes" and tokens.isdecimal() and int(tokens) >= 10:
            middle = int(tokens)
            self._tokens = round(0.9 * middle), round(1.1 * middle)
        else:
            if kind == "scenes":
                raise ValueError(f"data: got {data!r}, want scenes:TOKENS, or FORMAT:PATH")
            found = list(read_data(data, limit or sys.maxsize))
            self.bad = [one for one in found if isinstance(one, BadRecord)]
            self._known = {one.id: one for one in found if not isinstance(one, BadRecord)}
            if not self._known:
                raise ValueError(f"data: {data} has no question" + "".join(f"; {one}" for one in self.bad[:1]))

    def __iter__(self) -> Iterator[Sample]:
        if self._known is not None:
            return iter(self._known.values())
        every = (one for seed in count(_SEED) for one in self._drawn(seed))
        return islice(every, self._limit)

    def __len__(self) -> int:
        return self._limit if self._known is None else len(self._known)

    def of(self, ids: Iterable[str]) -> list[str]:
        """Which of these are ids of its questions, sorted as texts; of scenes the first."""
        if self._known is not None:
            return sorted(id for id in ids if id in self._known)
        return sorted(sorted(ids, key=_seed_and_place)[: self._limit])

    def __getitem__(self, id: str) -> Sample:
        if self._known is not None:
            return self._known[id]
        seed, place = _seed_and_place(id)
        return self._drawn(seed)[place]

    @lru_cache(maxsize=4)  # noqa: B019 (pools live as long as their process)
    def _drawn(self, seed: int) -> list[Sample]:
        return scene_questions(seed, self._tokens, "scene")


def _seed_and_place(id: str) -> tuple[int, int]:
    _, seed, place = id.split("-")
    return int(seed), int(place)


class Training:
    """A model, its new branches, the questions and the folder."""

    def __init__(
        self,
        model: Adapter,
        pool: Pool,
        out: Path,
        settings: Settings,
        *,
        processes: Processes = ALONE,
        progress: Progress = lambda what, done, total: None,
        note: Note = lambda text: None,
    ) -> None:
        """Freeze the model and put branches beside it, in float32: copies of its layers from K on.

        Raises `ValueError` for settings that the model does not take, and for a folder where the checkpoint would take
        the place of something else.
        """
        self.model, self.pool, self.out, self.settings = model, pool, out, settings
        self.processes, self.progress, self.note = processes, progress, note
        self._asked: dict[str, tuple[str, str]] = {}
        check_place(out / "checkpoint", model.source)
        if pool.bad:
            note(f"data: {len(pool.bad)} records are no questions and left out; the first: {pool.bad[0]}")
        self._encoded: dict[tuple[str, int], tuple[ImageInputs, Features]] = {}
        depth, layers = settings.depth, model.num_layers
        layer = min(2 * layers // 3, layers - depth) if settings.layer is None else settings.layer
        self.branches = copied_branches(model, layer, depth)
        self._own = {"model": str(model.source), "layer": layer, "depth": depth}
        attach(model, self.branches)
        model.model.requires_grad_(False)
        # A task's thresholds are none of training's business.
        preset, _ = QZoom.preset_for(model)
        self.method = QZoom(
            model,
            preset.changed(
                region_threshold=_REGION_THRESHOLD,
                gate_threshold=0.0,
                reuse_src_pos=settings.reuse_src_pos,
                branches=None,
                max_new_tokens=settings.max_new_tokens,
            ),
        )

    # -- stages --------------------------------------------------------------------------------------------------------

    def labels(self) -> None:
        """Labels of maps, of every question."""
        heads = self.settings.heads or published(self.model)
        heads.check(self.model)

        def ask(image: Image.Image, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
            with open_session(self.model, image, self.settings.run(self.settings.label_tokens)) as session:
                for sample in samples:
                    text = self.method.prompt(sample.question)
                    most, rules = self.settings.max_new_tokens, self.settings.labels
                    yield label(session, text, sample.question, heads, rules, most)

        self._ask(
            "labels",
            ask,
            heads=heads.to_dict(),
            tokens=self.settings.label_tokens,
            rules=dataclasses.asdict(self.settings.labels),
        )

    def region(self) -> None:
        """The region branch."""
        usable = [one for one in self._records("labels") if set(one["labels"]) != {"."}]

        def loss(records: Sequence[dict[str, Any]], epoch: int) -> Loss:
            seen = self._see([one["id"] for one in records], self._budget(_picture_of(records[0]), epoch))
            labels = [from_text(one["labels"], one["grid"]) for one in records]
            return region_loss(self.model, self.branches, seen, labels)

        self._fit("region", self._region_parameters(), usable, loss, budgets=self.settings.budgets)

    def tuning(self) -> None:
        """The model's decoder layers and output head, on questions that a crop spoils."""
        if self._trained("region", self._region_parameters()) is None:
            raise ValueError(f"tuning: {self.out} has no trained region branch; run the stage region first")

        def ask(image: Image.Image, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
            run = self.settings.run(self._budget(samples[0].picture or samples[0].id))
            method = self.method.changed(min_tokens=run.min_tokens, max_tokens=run.max_tokens)
            with method.open(image) as session:
                for sample in samples:
                    plain = session.ask(method.prompt(sample.question), max_new_tokens=self.settings.max_new_tokens)
                    zoomed = method.ask(session, sample.question)
                    replies = {"plain": plain.text, method.name: zoomed.text}
                    yield {"replies": replies, "zoomed": zoomed.details["zoomed"]}

        # What was mined with the model as it was is not mined again with a tuned one.
        self._ask("mined", ask, budgets=self.settings.budgets, reuse_src_pos=self.settings.reuse_src_pos)
        spoiled = [
            one
            for one in self._records("mined")
            if one["zoomed"]
            and verdict(one, "plain", strict) is True
            and verdict(one, self.method.name, strict) is not True
        ]

        def loss(records: Sequence[dict[str, Any]], epoch: int) -> Loss:
            run = self.settings.run(self._budget(_picture_of(records[0])))
            samples = [self.pool[one["id"]] for one in records]
            return together(answer_loss(self.method, _picture(one), one.question, one.answer, run) for one in samples)

        decoder, head, dtype = self.model.language_model, self.model.model.get_output_embeddings(), self.model.dtype
        decoder.layers.float()
        head.float()
        try:
            self._fit("tuning", self._model_parameters(), spoiled, loss, reuse_src_pos=self.settings.reuse_src_pos)
        finally:
            decoder.layers.to(dtype)
            head.to(dtype)

    def gate(self) -> None:
        """The gate, of the tuned model where there is one."""
        tuned = self._tuned() is not None

        def ask(image: Image.Image, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
            found: list[dict[str, str]] = [{} for _ in samples]
            for budget in self.settings.routes:
                with open_session(self.model, image, self.settings.run(budget)) as session:
                    for sample, replies in zip(samples, found, strict=True):
                        prompt = self.method.prompt(sample.question)
                        reply = session.ask(prompt, max_new_tokens=self.settings.max_new_tokens)
                        replies[str(budget)] = reply.text
            yield from ({"replies": replies} for replies in found)

        self._ask("routes", ask, budgets=self.settings.routes, tuned=tuned)
        chosen = routes(self._records("routes"), self.settings.routes, self.settings.most_routes, self.settings.seed)

        def one_loss(item: Route, epoch: int) -> Loss:
            rng = random.Random(f"{self.settings.seed} {epoch} {item.id}")
            choice = shown(item, self.settings.routes, rng)
            if choice is None:
                return NOTHING
            budget, wanted = choice
            (seen,) = self._see([item.id], budget)
            return gate_loss(self.model, self.branches, seen, wanted)

        def loss(items: Sequence[Route], epoch: int) -> Loss:
            return together(one_loss(item, epoch) for item in items)

        self._fit("gate", self._gate_parameters(), chosen, loss, budgets=self.settings.routes, tuned=tuned)

    def save(self) -> Path | None:
        """Write the checkpoint of what is trained by now: the region branch, and gate and model where they are; `None`
        without a region branch. A gate of the model before it was tuned is left out."""
        if self._trained("region", self._region_parameters()) is None:
            return None
        tuned, facts = self._tuned(), self._trained("gate", self._gate_parameters())
        branches = dataclasses.replace(self.branches, reuse_src_pos=bool(tuned and tuned["reuse_src_pos"]))
        if facts is None or facts["tuned"] != bool(tuned):
            branches = dataclasses.replace(branches, gate=None, head=None)
        if self.processes.rank == 0:
            assert self.model.source is not None, "it was loaded from somewhere"
            changed = {name: one.detach() for name, one in self._model_parameters().items()} if tuned else {}
            save_checkpoint(self.out / "checkpoint", self.model.source, branches, changed)
        return self.out / "checkpoint"

    # -- what the stages share -----------------------------------------------------------------------------------------

    def _ask(self, stem: str, ask: Ask, **facts: Any) -> None:
        """Record every question of the pool that has no record yet; each process its part of the pictures."""
        rank, processes = self.processes.rank, self.processes.count
        name = f"{stem}-{rank}.jsonl" if rank else f"{stem}.jsonl"
        settings = {"stage": stem, "model": str(self.model.source), "data": self.pool.data, **facts}
        others = {one["id"] for one in self._read(stem, settings, but=name)}
        total = len(self.pool) if processes == 1 else None
        done = 0

        def tell(record: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            self.progress(stem, done, total)

        every = (one for one in self.pool if one.id not in others)
        mine = (one for one in every if _slot(one.picture or one.id) % processes == rank)
        with ResultFile(self.out / name, settings) as results:
            evaluate(partial(recorded, ask), mine, results, progress=tell)
        self.processes.wait()

    def _records(self, stem: str) -> list[dict[str, Any]]:
        """What was recorded of the pool's questions, by all processes, in an order that is theirs alone; what failed is
        left out, with a note."""
        made = {"stage": stem, "model": str(self.model.source), "data": self.pool.data}
        found = {one["id"]: one for one in self._read(stem, made)}
        own = [found[id] for id in self.pool.of(found)]
        if not own:
            raise ValueError(f"{stem}: there are none in {self.out}; run the stage that makes them first")
        if failed := [one for one in own if one["error"]]:
            first = f"the first, {failed[0]['id']}: {failed[0]['error']}"
            self.note(f"{stem}: {len(failed)} of {len(own)} questions failed and are left out; {first}")
        return [one for one in own if not one["error"]]

    def _read(self, stem: str, made: Mapping[str, Any], but: str = "") -> Iterator[dict[str, Any]]:
        """Records in a stage's files; `ValueError` for a file that says that it was made otherwise."""
        wanted = json.loads(json.dumps(made))
        for path in sorted(self.out.glob(f"{stem}*.jsonl")):
            if path.name == but:
                continue
            lines = []
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # what a killed run left half-written
                    lines.append(json.loads(line))
            if len(lines) > 1:
                if "settings" not in lines[0]:
                    raise ValueError(f"{stem}: {path} does not begin with what it was made with; use another folder")
                # The released data say neither model nor questions.
                there = {**wanted, **lines[0]["settings"]}
                check_alike(stem, path, {name: there[name] for name in wanted}, wanted)
            yield from lines[1:]

    def _fit(
        self,
        stage: str,
        parameters: dict[str, nn.Parameter],
        items: Sequence[Any],
        loss: Callable[[Sequence[Any], int], Loss],
        **facts: Any,
    ) -> None:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            with held(self.out / stage, self.processes):
                fit(
                    self.out / stage,
                    parameters,
                    items,
                    loss,
                    getattr(self.settings, stage),
                    # Questions about one picture share its encoding, where they are shown it in one budget.
                    group=lambda item: item.id if isinstance(item, Route) else _picture_of(item),
                    seed=self.settings.seed,
                    processes=self.processes,
                    facts={**self._own, "data": self.pool.data, "learned": _digest(items), **facts},
                    progress=lambda step, steps: self.progress(stage, step, steps),
                )
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)

    def _see(self, ids: Sequence[str], budget: int) -> list[Seen]:
        """Questions about one image in so many tokens. What was seen before is neither read nor drawn again."""
        for id in ids:
            if id not in self._asked:
                sample = self.pool[id]
                self._asked[id] = sample.picture or id, self.method.prompt(sample.question)
        key = self._asked[ids[0]][0], budget
        if key not in self._encoded:
            kept = (one for _, features in self._encoded.values() for one in (features.embeddings, *features.deepstack))
            if sum(one.nbytes for one in kept) > KEPT:
                # The newest goes: what stays is there again in every epoch.
                self._encoded.popitem()
            self._encoded[key] = encoded(self.model, _picture(self.pool[ids[0]]), self.settings.run(budget))
        return see(self.model, *self._encoded[key], [self._asked[id][1] for id in ids], self.branches.layer)

    def _budget(self, picture: str, epoch: int = 0) -> int:
        budgets = self.settings.budgets
        return budgets[(_slot(picture) + epoch) % len(budgets)]

    def _trained(self, stage: str, parameters: dict[str, nn.Parameter]) -> dict[str, Any] | None:
        """See `trained`; `ValueError` for a stage of another model or of other layers."""
        return trained(self.out / stage, parameters, self._own)

    def _tuned(self) -> dict[str, Any] | None:
        """What the model was tuned with, if it was; then it is tuned from here on."""
        return self._trained("tuning", self._model_parameters())

    def _region_parameters(self) -> dict[str, nn.Parameter]:
        """Those that the map depends on: of the last layer its norm, queries and keys."""
        last = f"{len(self.branches.regions) - 1}."
        used = ("input_layernorm", "q_proj", "k_proj", "q_norm", "k_norm")
        found = {
            f"twig_layers.{name}": one
            for name, one in self.branches.regions.named_parameters()
            if not name.startswith(last) or any(part in name for part in used)
        }
        if self.branches.norm is not None:
            found |= {f"twig_norm.{name}": one for name, one in self.branches.norm.named_parameters()}
        return found

    def _gate_parameters(self) -> dict[str, nn.Parameter]:
        assert self.branches.gate is not None and self.branches.head is not None
        layers = {f"high_res_layers.{name}": one for name, one in self.branches.gate.named_parameters()}
        return layers | {f"high_res_head.{name}": one for name, one in self.branches.head.named_parameters()}

    def _model_parameters(self) -> dict[str, nn.Parameter]:
        """Decoder layers and output head, by their names in the text model."""
        decoder, head = self.model.language_model, self.model.model.get_output_embeddings()
        found = {f"layers.{name}": one for name, one in decoder.layers.named_parameters()}
        tied = head.weight is decoder.get_input_embeddings().weight
        return found | {"embed_tokens.weight" if tied else "lm_head.weight": head.weight}


Ask = Callable[[Image.Image, Sequence[Sample]], Iterable[dict[str, Any]]]
"""(an image, questions about it) -> what is recorded of each."""


def recorded(ask: Ask, samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
    """A record for each question, those about one image together; what fails costs that image's questions."""
    for _, group in groupby(samples, key=lambda one: one.picture or one.id):
        own = list(group)
        try:
            found = list(ask(_picture(own[0]), own))
        except Exception as error:  # whatever one image does, the others are asked
            yield from (blank_record(sample, f"{type(error).__name__}: {error}") for sample in own)
        else:
            yield from ({**blank_record(one, ""), "error": None, **more} for one, more in zip(own, found, strict=True))


def copied_branches(model: Adapter, layer: int, depth: int) -> Branches:
    """Branches in float32, where the model's layer K is: copies of its layers from K on, and a gate that is undecided.

    Raises `ValueError` for layers that the model has not, or has quantised.
    """
    if getattr(model.model.config, "quantization_config", None) is not None:
        raise ValueError("model: its weights are quantised, but branches are copies of layers that are not")
    if layer < 1 or depth < 2 or layer + depth > model.num_layers:
        raise ValueError(
            f"layer, depth: got {layer} and {depth}, and the model has {model.num_layers} layers to copy; want at least"
            " 1 and 2"
        )
    branches = new_branches(model, layer, depth, gate_depth=depth)
    decoder: Any = model.language_model
    for copies in (branches.regions, branches.gate):
        assert copies is not None
        for own, one in zip(decoder.layers[layer : layer + depth], copies, strict=True):
            one.load_state_dict(own.state_dict())
    assert branches.head is not None
    nn.init.zeros_(branches.head.weight)
    nn.init.zeros_(branches.head.bias)
    device = next(decoder.layers[layer].parameters()).device
    for module in branches.modules().values():
        module.to(device, torch.float32)
    return branches


def _picture(sample: Sample) -> Image.Image:
    picture = sample.image()
    if isinstance(picture, tuple):
        raise ValueError(f"image: got {len(picture)} pictures, want one: the branches know one image")
    return picture


def _digest(items: Sequence[Any]) -> str:
    """Tells what is learned from something else of the same length."""
    return blake2b(json.dumps(items).encode(), digest_size=8).hexdigest()


def _picture_of(record: dict[str, Any]) -> str:
    """What questions about one picture have in common."""
    picture: str = record["picture"] or record["id"]
    return picture


def _slot(picture: str) -> int:
    """A number that a picture has in every run."""
    return int.from_bytes(blake2b(picture.encode(), digest_size=8).digest())
