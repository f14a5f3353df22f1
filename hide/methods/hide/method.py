"""HiDe (arXiv 2510.00054) in its steps, each of which can be called alone; `answer` is those steps and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hide.images import to_image, within_aspect
from hide.methods.base import Answer, Evidence, Method, Preset, Steps, as_question
from hide.methods.hide.config import PRESETS, HiDeConfig
from hide.methods.hide.entities import Entities, Extractor
from hide.methods.hide.extract import EntityExtractor
from hide.methods.hide.search_prompt import SearchPrompt, search_prompt
from hide.methods.hide.signals import Signals, collage_part, looks_again, peak_over_mean, settles
from hide.models.base import Adapter
from hide.questions import Question
from hide.session import Session
from hide_kernels import regions, token_maps
from hide_kernels.collage import Collage, boxes_to_pixels, collages_of_maps, source_boxes
from hide_kernels.host_read import host_read
from hide_kernels.pinned import pinned
from hide_kernels.token_maps import TokenMaps

# How far a map's cell may be from the published one's, by the dtype of the model: after min-max, bfloat16 rows were
# measured to differ by up to 2.8e-2 from float32 ones; float16 has three more bits.
MAP_ERROR = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 3.5e-3, torch.bfloat16: 2.8e-2}


@dataclass(frozen=True)
class EntityRows:
    """Attention rows of the search prompt.

    rows: per image (T, h, w) float32, the prior first. prior_rows: how many those are. labels: the T - prior_rows
    tokens after them.
    """

    rows: tuple[Tensor, ...]
    prior_rows: int
    labels: tuple[str, ...]


@dataclass(frozen=True)
class EntityMaps:
    """Purified maps, where the model is.

    tokens: of each row behind the prior. labels: their tokens. finite: (images,) bool, whether all of an image's rows
    are. peaks: (T,) of each of these rows, as `Signals` has them.
    """

    tokens: TokenMaps
    labels: tuple[str, ...]
    finite: Tensor
    peaks: Tensor

    @cached_property
    def by_image(self) -> tuple[tuple[Tensor, ...], tuple[tuple[str, ...], ...]]:
        """Per image the (M_i, h, w) maps of the tokens that have one there, and those tokens; the host waits for it."""
        return self._by_image(*host_read([self.tokens.image_index, self.tokens.valid]))

    def _by_image(self, image_index: Tensor, valid: Tensor) -> tuple[tuple[Tensor, ...], tuple[tuple[str, ...], ...]]:
        maps, labels = [], []
        for index, of_image in enumerate(self.tokens.maps):
            own = ((image_index == index) & valid).nonzero()[:, 0]
            maps.append(of_image[_on_device(own, of_image.device)])
            labels.append(tuple(self.labels[place] for place in own.tolist()))
        return tuple(maps), tuple(labels)


@dataclass(frozen=True)
class Zoom:
    """What is shown beside the whole image.

    collages: per image, with its merged boxes; without a picture where there is no region. maps, labels: as
    `EntityMaps.by_image`. order: the images that have a map, by the token that came to them first; collages are shown
    in this order, as the published code does. notes: doubts. peaks, without_map: as `Signals` has them.
    """

    collages: tuple[Collage, ...]
    maps: tuple[Tensor, ...]
    labels: tuple[tuple[str, ...], ...]
    order: tuple[int, ...]
    notes: tuple[str, ...]
    peaks: tuple[float, ...]
    without_map: int


class HiDe(Method[HiDeConfig]):
    """Answers questions about high-resolution images by looking closer at what the question speaks of::

    hide = HiDe.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct")
    answer = hide.ask("street.jpg", "What is the color of the umbrella?")
    print(answer.text, answer.boxes)
    """

    name: ClassVar[str] = "hide"
    summary: ClassVar[str] = "the image, and a layout-preserving collage of what the question mentions"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "crop", "ask"})
    Settings: ClassVar[type[Any]] = HiDeConfig
    presets = PRESETS

    def __init__(
        self,
        model: Adapter,
        preset: Preset[HiDeConfig] | None = None,
        *,
        extractor: Extractor | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """As `Method`; extractor: in place of `entities_from`, question with options -> comma-separated entities."""
        super().__init__(model, preset, notes=notes)
        self._extract = EntityExtractor(model, extractor, prefill_chunk=self.preset.run.prefill_chunk)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, extractor: Extractor | None = None, **options: Any) -> Self:
        """As `Method.from_pretrained`; extractor: as in the constructor."""
        made = super().from_pretrained(path, **options)
        return made if extractor is None else cls(made.model, made.preset, extractor=extractor, notes=made.notes)

    # -- the steps ------------------------------------------------------------------------------------------------

    def answer(self, session: Session, question: Question, steps: Steps) -> Answer:
        """See `Method`."""
        signals = Signals()
        if self.settings.gate is not None:
            with steps("gate"):
                plain = self.reply(session, question)
            signals = replace(signals, plain_margin=plain.margin)
            if settles(signals, self.settings):
                note = f"gate: the plain answer's margin is at least {self.settings.gate:g}, so nothing was searched"
                return Answer(plain.text, notes=(note,), details={"signals": signals.to_dict()})
        with steps("entities"):
            entities = self.entities(question)
        with steps("attention rows"):
            rows = self.attention_rows(session, entities)
        with steps("maps"):
            maps = self.maps(rows)
        with steps("boxes and collage"):
            zoom = self.zoom(session, maps)
        notes = [*entities.notes, *zoom.notes]
        signals = replace(
            signals,
            peaks=zoom.peaks,
            without_map=zoom.without_map,
            collage=collage_part(zoom.collages, session.image_tokens),
            second_look=False,
        )
        if looks_again(signals, self.settings, self.preset.run):
            with steps("second look"):
                zoom = self.second_look(session, entities, zoom)
            signals = replace(signals, second_look=True)
        pictures = self.pictures(session, zoom)
        shown = [index for index in zoom.order if pictures[index] is not None]
        if not shown:
            notes.append("collage: no region was found, so the answer is the plain one")
        with steps("answer"):
            given = (pictures[index] for index in shown)
            fitting = [within_aspect(one, session.max_aspect, self.settings.fill) for one in given if one is not None]
            reply = self.reply(session, question, fitting)
        shown_tokens = dict(zip(shown, reply.image_tokens, strict=True))
        evidence = tuple(
            Evidence(
                boxes=zoom.collages[index].boxes,
                maps=zoom.maps[index],
                labels=zoom.labels[index],
                threshold=self.settings.threshold,
                shown=None if picture is None else to_image(picture),
                shown_tokens=shown_tokens.get(index),
            )
            for index, picture in enumerate(pictures)
        )
        signals = replace(signals, margin=reply.margin)
        details = {"entities": list(entities.items), "signals": signals.to_dict()}
        return Answer(reply.text, evidence, tuple(notes), details)

    def entities(self, question: str | Question) -> Entities:
        """Step 1: what to look for. Where nothing is found, the question's own words, with a note."""
        return self.entities_of([question])[0]

    def entities_of(self, questions: Sequence[str | Question]) -> list[Entities]:
        """Step 1 for many questions, decoded as one batch where the model is asked for them."""
        return self._extract([as_question(question) for question in questions], self.settings)

    def attention_rows(self, session: Session, entities: Entities | str) -> EntityRows:
        """Step 2a: the attention of each token of the search prompt over each image."""
        prompt = self.search_prompt(session, entities)
        rows = session.attention(
            prompt.turn, layers=self.settings.layers, causal=self.settings.causal, queries=prompt.rows
        )
        return self._entity_rows(rows, prompt)

    def attention_rows_by_layer(self, session: Session, entities: Entities | str) -> tuple[EntityRows, ...]:
        """Step 2a for every layer by itself, from one forward: what a layer is chosen by."""
        prompt = self.search_prompt(session, entities)
        rows = session.attention(
            prompt.turn, layers=None, causal=self.settings.causal, queries=prompt.rows, keep_layers=True
        )
        return tuple(self._entity_rows(of_layer, prompt) for of_layer in zip(*rows, strict=True))

    def maps(self, rows: EntityRows) -> EntityMaps:
        """Step 2b: Token-wise Attention Decoupling, rows -> one purified map per token that has one."""
        found = token_maps(rows.rows, prior_rows=rows.prior_rows, sigma=self.settings.sigma)
        finite = torch.stack([torch.isfinite(of_image).all() for of_image in rows.rows])
        peaks = peak_over_mean([of_image[rows.prior_rows :] for of_image in rows.rows])
        return EntityMaps(found, rows.labels, finite, peaks)

    def zoom(self, session: Session, maps: EntityMaps) -> Zoom:
        """Step 3, Layout-Preserving Decoupling: the maps' regions as boxes and collages of the images.

        On a GPU the host reads once, between plan and pixels.
        """
        settings, error = self.settings, MAP_ERROR[self.model.dtype]
        found = maps.tokens
        taken = [(found.image_index == index) & found.valid for index in range(len(found.maps))]
        near = [
            (((of_image - settings.threshold).abs() <= error).sum((1, 2)) * own).sum()
            for of_image, own in zip(found.maps, taken, strict=True)
        ]
        collages, (image_index, valid, cells, finite, peaks) = collages_of_maps(
            session.pixels,
            found.maps,
            settings.threshold,
            valid=taken,
            fill=settings.fill,
            alpha_threshold=settings.alpha_threshold,
            read_too=[found.image_index, found.valid, torch.stack(near), maps.finite, maps.peaks],
        )
        notes = []
        if not bool(finite.all()):
            notes.append("attention: some rows hold NaN or inf and were left out; a larger dtype may mend it")
        if doubtful := int(cells.sum()):
            notes.append(
                f"maps: {doubtful} cells lie within {error:g} of the threshold, the error of {self.model.dtype}"
            )
        order = tuple(dict.fromkeys(image_index[valid].tolist()))
        without_map = int((~valid).sum())
        by_image = maps._by_image(image_index, valid)
        return Zoom(tuple(collages), *by_image, order, tuple(notes), tuple(peaks.tolist()), without_map)

    def second_look(self, session: Session, entities: Entities | str, zoom: Zoom) -> Zoom:
        """Steps 2 and 3 once more, inside the collages at their own resolution, as further images of the session.

        Boxes and collages become those of the regions found there; where there are none, they stay as they are.
        """
        settings = self.settings
        shown = [(index, zoom.collages[index]) for index in zoom.order if zoom.collages[index].image is not None]
        pictures = [
            within_aspect(one.image, session.max_aspect, settings.fill) for _, one in shown if one.image is not None
        ]
        prompt = self.search_prompt(session, entities, pictures)
        rows = session.attention(prompt.turn, layers=settings.layers, causal=settings.causal, queries=prompt.rows)[
            len(session.images) :
        ]
        maps, _ = self.maps(self._entity_rows(rows, prompt)).by_image
        boxes = [torch.zeros(0, 4, dtype=torch.int64) for _ in session.images]
        for (index, collage), picture, found in zip(shown, pictures, maps, strict=True):
            height, width = picture.shape[:2]
            if collage.layout is not None:
                on_canvas = region_boxes(found, settings.threshold, (width, height))
                # Behind the canvas may be a margin.
                rows_and_columns = torch.tensor(collage.layout.size).flip(0).repeat(2)
                boxes[index] = source_boxes(on_canvas.minimum(rows_and_columns), collage.layout)
        if not any(map(len, boxes)):
            return zoom
        collages = session.crop(boxes, fill=settings.fill, alpha_threshold=settings.alpha_threshold)
        return replace(zoom, collages=tuple(collages))

    def pictures(self, session: Session, zoom: Zoom) -> list[Tensor | None]:
        """What is shown of each image, (H, W, 3 or 4) uint8; `None` where no region was found: the collages."""
        return [collage.image for collage in zoom.collages]

    def search_prompt(self, session: Session, entities: Entities | str, images: Sequence[Tensor] = ()) -> SearchPrompt:
        """The prompt of step 2a; images: behind those of the session."""
        text = entities if isinstance(entities, str) else entities.text
        return search_prompt(
            session,
            text,
            images,
            family=self.model.family,
            prompt=self.settings.search_prompt,
            include_end_token=self.settings.include_end_token,
        )

    def _entity_rows(self, rows: Sequence[Tensor], prompt: SearchPrompt) -> EntityRows:
        if self.settings.include_punctuation:
            return EntityRows(tuple(rows), prompt.prior_rows, prompt.labels)
        worded = [place for place, label in enumerate(prompt.labels) if re.search(r"\w", label)]
        kept = [*range(prompt.prior_rows), *(prompt.prior_rows + place for place in worded)]
        labels = tuple(prompt.labels[place] for place in worded)
        return EntityRows(tuple(of_image[kept] for of_image in rows), prompt.prior_rows, labels)


def region_boxes(maps: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """(K, 4) int64 pixel boxes of all regions of (M, h, w) maps in an image of `size` (width, height), not merged yet:
    step 3 without its collage."""
    _, rows, columns = maps.shape
    if not len(maps):
        return torch.zeros(0, 4, dtype=torch.int64)
    found = regions(maps, threshold)
    if bool(found.overflow.any()):
        found = regions(maps, threshold, max_regions=int(found.counts.max()))
    used = torch.arange(found.boxes.shape[1], device=maps.device) < found.counts[:, None]
    return boxes_to_pixels(found.boxes[used].cpu(), grid=(rows, columns), size=(size[1], size[0]))


def _on_device(index: Tensor, device: torch.device) -> Tensor:
    """A small tensor where it is needed; the host does not wait for the copy."""
    return index if device.type == "cpu" else pinned(index, device).to(device, non_blocking=True)
