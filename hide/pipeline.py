"""HiDe (arXiv 2510.00054) in its four steps, each a method that can be called alone, and `ask`, which takes all."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hide.config import PRESETS, HiDeConfig
from hide.entities import MAX_LENGTH, Entities, Extractor, entities_by_rules, entity_request, parse_entities
from hide.images import ImageLike, load_image, picture_notes, to_image, to_tensor
from hide.models import load
from hide.models.base import Adapter, Features, Pictures, Reply, SearchPrompt
from hide.models.quantised import Weights
from hide.models.qwen2_5_vl import MAX_ASPECT
from hide.questions import Question
from hide.session import ImageSession, Prefix, encode
from hide.tags import CLOSE_TAG, OPEN_TAG
from hide_kernels import collage, regions, token_maps
from hide_kernels.collage import Collage, boxes_to_pixels, collages_of_maps
from hide_kernels.host_read import host_read
from hide_kernels.pixel_values import decode
from hide_kernels.token_maps import TokenMaps

# Positions that are left for a question and its reply where pictures and collages would fill them all.
QUESTION_ROOM = 1024
# Questions whose entities are remembered.
MEMO = 4096

# How far a map's cell may be from the published one's, by the dtype of the model: after min-max, bfloat16 rows were
# measured to differ by up to 2.8e-2 from float32 ones; float16 has three more bits.
MAP_ERROR = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 3.5e-3, torch.bfloat16: 2.8e-2}


Shown = ImageLike | Sequence[ImageLike] | ImageSession
"""Pictures, or a session of `HiDe.open` that has seen them already."""


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
    """Purified maps, one per token that has one.

    maps: per image (M_i, h, w) float32 in 0..1. labels: per image the M_i tokens they belong to. order: the images
    that have a map, by the token that came to them first; collages are shown in this order.
    """

    maps: tuple[Tensor, ...]
    labels: tuple[tuple[str, ...], ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class HiDeResult:
    """What `HiDe.ask` found.

    entities: what was looked for. plain_answer: the reply to the images alone, `None` where it was not asked for.
    answer: the reply to the images and the collages. letter, plain_letter: the option that each reply names, if any.
    images: the loaded pictures. maps: as `HiDe.maps`. boxes: per image (K, 4) int64 pixels x0, y0, x1, y1 half-open.
    collages: per image a picture, or `None` where there is no region. notes: fallbacks that were taken, and doubts.
    seconds: wall time of each step. tokens: those that each step sent through the model, prompt and reply; the images'
    are the step "prefix", and all others go on behind it.
    image_tokens: per image, then per collage in the order they were shown.
    """

    question: Question
    entities: Entities
    plain_answer: str | None
    answer: str
    images: tuple[Image.Image, ...]
    maps: EntityMaps
    boxes: tuple[Tensor, ...]
    collages: tuple[Image.Image | None, ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    tokens: dict[str, int]
    image_tokens: tuple[int, ...]

    @property
    def letter(self) -> str | None:
        """The option that `answer` names."""
        return self.question.letter(self.answer)

    @property
    def plain_letter(self) -> str | None:
        """The option that `plain_answer` names."""
        return None if self.plain_answer is None else self.question.letter(self.plain_answer)

    def to_dict(self) -> dict[str, Any]:
        """Everything but pixels and maps, for JSON."""
        return {
            "question": self.question.text,
            "entities": list(self.entities.items),
            "plain_answer": self.plain_answer,
            "answer": self.answer,
            "plain_letter": self.plain_letter,
            "letter": self.letter,
            "images": [list(image.size) for image in self.images],
            "tokens_with_maps": [list(labels) for labels in self.maps.labels],
            "boxes": [boxes.tolist() for boxes in self.boxes],
            "collages": [None if picture is None else list(picture.size) for picture in self.collages],
            "image_tokens": list(self.image_tokens),
            "notes": list(self.notes),
            "seconds": {step: round(seconds, 4) for step, seconds in self.seconds.items()},
            "tokens": dict(self.tokens),
        }


@dataclass
class _Clock:
    device: torch.device
    progress: Callable[[str], None] | None
    tokens: dict[str, int] = field(default_factory=dict)
    _marks: list[tuple[str, Any, Any]] = field(default_factory=list)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time a step, and mark it for profilers; a GPU's own events tell when it was done, so that nobody waits."""
        if self.progress is not None:
            self.progress(step)
        on_gpu = self.device.type == "cuda"
        marked = torch.cuda.nvtx.range(f"hide: {step}") if on_gpu else nullcontext()
        start = self._mark()
        with torch.profiler.record_function(f"hide: {step}"), marked:
            yield
        self._marks.append((step, start, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self) -> dict[str, float]:
        """Of each step; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for step, start, end in self._marks:
            spent = end - start if isinstance(start, float) else 1e-3 * start.elapsed_time(end)
            found[step] = found.get(step, 0.0) + spent
        return found


class _Loaded(NamedTuple):
    """Pictures as they were read, their pixels where the model is, the encoder's input, and notes about the reading."""

    images: tuple[Image.Image, ...]
    sources: tuple[Tensor, ...]
    pictures: Pictures
    notes: tuple[str, ...]


class HiDe:
    """Answers questions about high-resolution pictures by looking closer at what the question speaks of, from any
    number of threads::

    hide = HiDe.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct")
    result = hide.ask("street.jpg", "What is the color of the umbrella?")
    print(result.answer, result.boxes)
    """

    def __init__(
        self, model: Adapter, config: HiDeConfig, *, extractor: Extractor | None = None, notes: Sequence[str] = ()
    ) -> None:
        """Use a loaded model.

        Args:
            model: an adapter of `hide.models`.
            config: see `hide.config`; `preset_for(model)` gives the one for the model.
            extractor: replaces `config.entities_from`: question with options -> comma-separated entities, or empty.
            notes: repeated in every result, e.g. where the config comes from; before them those of the model.

        Raises:
            ValueError: for layers that the model does not have, or a `collage_in_span` that its family cannot.
        """
        for layer in config.layers or ():
            if not -model.num_layers <= layer < model.num_layers:
                raise ValueError(f"layers: got {layer}, want 0 to {model.num_layers - 1}, zero-based")
        if config.collage_in_span and not model.joins_pictures:
            raise ValueError(
                f"collage_in_span: got True, but {model.family} shows every picture as an image of its own"
            )
        self.model = model
        self.config = config
        self.extractor = extractor
        self._notes = (*model.notes, *notes)
        self._instruction: tuple[str | None, Prefix] | None = None
        # Under the question and all that its entities depend on.
        self._known: dict[tuple[Any, ...], Entities] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        preset: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        weights: Weights | None = None,
        extractor: Extractor | None = None,
        **changes: Any,
    ) -> HiDe:
        """Load a checkpoint (folder or hub name) with the preset for it.

        Args:
            preset: a name in `hide.PRESETS`; `None`: the one that the checkpoint names as `"hide_preset"` in its
                config.json, else its family's.
            device, dtype, attn_implementation, weights: as `hide.models.load`.
            extractor: as in the constructor.
            changes: fields of `HiDeConfig` that replace the preset's.
        """
        model = load(path, device=device, dtype=dtype, attn_implementation=attn_implementation, weights=weights)
        config, notes = preset_for(model, preset)
        return cls(model, dataclasses.replace(config, **changes), extractor=extractor, notes=notes)

    # -- the steps ------------------------------------------------------------------------------------------------

    def open(self, images: ImageLike | Sequence[ImageLike]) -> ImageSession:
        """Encode and prefill pictures once, for many questions; every step takes the session in place of the images.

        Close it, or use it in a `with` block, to free its keys and values.
        """
        loaded = self._loaded(images)
        pictures, features = encode(self.model, loaded.pictures)
        # Pixels are let go of before the prefill.
        loaded = loaded._replace(pictures=pictures)
        return self._session(loaded, features)

    def entities(self, question: str | Question) -> Entities:
        """Step 1: what to look for. Where nothing is found, the question's own words, with a note."""
        return self.entities_of([question])[0]

    def entities_of(self, questions: Sequence[str | Question]) -> list[Entities]:
        """Step 1 for many questions, decoded side by side where the model is asked for them."""
        return self._entities([_question(question) for question in questions])[0]

    def attention_rows(self, images: Shown, entities: Entities | str) -> EntityRows:
        """Step 2a: the attention of each token of the search prompt over each image."""
        with self._opened(images) as session:
            return self._attention_rows(session, entities)[0]

    def attention_rows_by_layer(self, images: Shown, entities: Entities | str) -> tuple[EntityRows, ...]:
        """Step 2a for every layer by itself, from one forward: what a layer is chosen by."""
        with self._opened(images) as session:
            prompt = self._search_prompt(session.pictures, entities)
            rows = session.search_rows(prompt, layers=None, causal=self.config.causal, keep_layers=True)
        return tuple(self._entity_rows(of_layer, prompt) for of_layer in zip(*rows, strict=True))

    def maps(self, rows: EntityRows) -> EntityMaps:
        """Step 2b: Token-wise Attention Decoupling, rows -> one purified map per token that has one."""
        found = token_maps(rows.rows, prior_rows=rows.prior_rows, sigma=self.config.sigma)
        image_index, valid = host_read([found.image_index, found.valid])
        return _entity_maps(found, image_index, valid, rows.labels)

    def boxes(self, maps: EntityMaps, images: ImageLike | Sequence[ImageLike]) -> tuple[Tensor, ...]:
        """Step 3a: per image (K, 4) int64 pixel boxes of all regions of all its maps, not merged yet."""
        pictures = _images(images)
        if len(pictures) != len(maps.maps):
            raise ValueError(f"images: got {len(pictures)}, want {len(maps.maps)}, as many as maps has")
        return self._boxes(maps, pictures)

    def collage(
        self, images: ImageLike | Sequence[ImageLike], boxes: Sequence[Tensor]
    ) -> tuple[tuple[Image.Image | None, ...], tuple[Tensor, ...]]:
        """Step 3b: Layout-Preserving Decoupling.

        Returns:
            Per image the collage (RGB, gaps of `config.fill`; RGBA where that is `None`) or `None` where no box has an
            area, and per image the merged boxes that it shows.
        """
        pictures = _images(images)
        if len(pictures) != len(boxes):
            raise ValueError(f"boxes: got {len(boxes)} tensors, want {len(pictures)}, one per image")
        return self._collage(pictures, boxes)

    def answer(
        self,
        images: Shown,
        question: str | Question,
        collages: Sequence[Image.Image | None] = (),
        *,
        max_new_tokens: int | None = None,
    ) -> Reply:
        """Step 4: the model's reply to all images, then all collages, then the question; without collages, plain.

        `ask` gives the collages in the order of `EntityMaps.order`, as the published code does. max_new_tokens: bound
        on the reply, at least 1; `None`: the config's.
        """
        most = self._most_new_tokens(max_new_tokens)
        with self._opened(images) as session:
            return self._answer(session, _question(question), self._collage_pictures(collages, session), most=most)

    def ask(
        self,
        image: Shown,
        question: str | Question,
        *,
        options: Sequence[str] | None = None,
        plain: bool = True,
        max_new_tokens: int | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> HiDeResult:
        """All steps.

        Args:
            image: one picture or several, or a session of `open`, so that many questions share one prefill.
            question: free, or with lettered options on lines of their own.
            options: the options, when they do not stand in the question.
            plain: also give the reply without the collage.
            max_new_tokens: bound on each answer, at least 1, not on the entities; `None`: the config's.
            progress: called with the name of each step when it begins.
        """
        clock = _Clock(self.model.model.device, progress)
        question = _question(question, options)
        most = self._most_new_tokens(max_new_tokens)
        if isinstance(image, ImageSession):
            return self._ask(self._own(image), question, plain, most, clock)
        with clock("read and resize"):
            loaded = self._loaded(image)
        with clock("prefix"):
            pictures, features = encode(self.model, loaded.pictures)
            loaded = loaded._replace(pictures=pictures)
            session = self._session(loaded, features)
            clock.tokens["prefix"] = session.length
        del features
        with session:
            return self._ask(session, question, plain, most, clock)

    def _ask(self, session: ImageSession, question: Question, plain: bool, most: int, clock: _Clock) -> HiDeResult:
        images = session.images
        plain_answer = None
        if plain:
            with clock("plain answer"):
                plain_answer, clock.tokens["plain answer"] = self._answer(session, question, most=most)
        with clock("entities"):
            (entities,), clock.tokens["entities"] = self._entities([question])
        notes = [*self._notes, *session.notes, *entities.notes]
        with clock("attention rows"):
            rows, clock.tokens["attention rows"] = self._attention_rows(session, entities)
        with clock("maps"):
            found = token_maps(rows.rows, prior_rows=rows.prior_rows, sigma=self.config.sigma)
        with clock("boxes and collage"):
            maps, collages, doubts = self._look_closer(session, rows, found)
        notes += doubts
        shown = [collages[index].image for index in maps.order if collages[index].image is not None]
        image_tokens = session.pictures.tokens
        if shown:
            with clock("answer"):
                more = self._collage_pictures(shown, session)
                answer, clock.tokens["answer"] = self._answer(session, question, more, most=most)
            image_tokens += more.tokens if more is not None else ()
        else:
            notes.append("collage: no region was found, so the answer is the plain one")
            if plain_answer is None:
                with clock("answer"):
                    plain_answer, clock.tokens["answer"] = self._answer(session, question, most=most)
            answer = plain_answer
        return HiDeResult(
            question=question,
            entities=entities,
            plain_answer=plain_answer,
            answer=answer,
            images=images,
            maps=maps,
            boxes=tuple(one.boxes for one in collages),
            collages=tuple(None if one.image is None else to_image(one.image) for one in collages),
            notes=tuple(notes),
            seconds=clock.seconds(),
            tokens=clock.tokens,
            image_tokens=image_tokens,
        )

    # -- pieces ---------------------------------------------------------------------------------------------------

    def _loaded(self, images: ImageLike | Sequence[ImageLike]) -> _Loaded:
        device = self.model.model.device
        read, sources = [], []
        with picture_notes() as notes:
            for image in _listed(images):
                source = self._decoded(image, device)
                read.append(load_image(image) if source is None else to_image(source))
                sources.append(to_tensor(read[-1], device) if source is None else source)
        return _Loaded(tuple(read), tuple(sources), self._preprocess(sources), tuple(notes))

    def _decoded(self, image: ImageLike, device: torch.device) -> Tensor | None:
        """The pixels of a file that is decoded on the device; `None` where the config or the file wants Pillow."""
        if self.config.decoder == "pillow" or not isinstance(image, (str, Path)):
            return None
        try:
            return decode(image, device=device, decoder=self.config.decoder)
        except (ValueError, OSError):
            return None

    def _preprocess(self, images: Sequence[Image.Image | Tensor], max_tokens: int | None = None) -> Pictures:
        most = self.config.max_tokens if max_tokens is None else max_tokens
        pictures = self.model.preprocess(images, min_tokens=self.config.min_tokens, max_tokens=most)
        return dataclasses.replace(pictures, joined=self.config.collage_in_span)

    def _session(self, loaded: _Loaded, features: Features) -> ImageSession:
        return ImageSession(
            self.model,
            loaded.pictures,
            features=features,
            images=loaded.images,
            sources=loaded.sources,
            notes=loaded.notes,
            prefill_chunk=self.config.prefill_chunk,
            offload=self.config.offload_kv,
        )

    @contextmanager
    def _opened(self, images: Shown) -> Iterator[ImageSession]:
        """The session that was given, or one for the block."""
        if isinstance(images, ImageSession):
            yield self._own(images)
            return
        with self.open(images) as session:
            yield session

    def _own(self, session: ImageSession) -> ImageSession:
        if session.model is not self.model:
            raise ValueError("image: got a session of another model; open one here")
        return session

    def _collage_pictures(
        self, collages: Sequence[Image.Image | Tensor | None], session: ImageSession
    ) -> Pictures | None:
        """What the encoder eats of the collages, in no more tokens than the model has positions for."""
        given = [
            picture if isinstance(picture, Tensor) else to_tensor(picture)
            for picture in collages
            if picture is not None
        ]
        if not given:
            return None
        free = (self.model.max_positions - session.length - QUESTION_ROOM) // len(given)
        most = max(self.config.min_tokens, min(self.config.max_tokens, free))
        return self._preprocess([_in_aspect(pixels, self.config.fill) for pixels in given], most)

    def _look_closer(
        self, session: ImageSession, rows: EntityRows, found: TokenMaps
    ) -> tuple[EntityMaps, list[Collage], list[str]]:
        """Collages of the maps' regions, and doubts; on a GPU the host reads once, between plan and pixels."""
        threshold, error = self.config.threshold, MAP_ERROR[self.model.dtype]
        taken = [(found.image_index == index) & found.valid for index in range(len(found.maps))]
        near = [
            (((of - threshold).abs() <= error).sum((1, 2)) * own).sum()
            for of, own in zip(found.maps, taken, strict=True)
        ]
        finite = [torch.isfinite(of_image).all() for of_image in rows.rows]
        collages, (image_index, valid, cells, whole) = collages_of_maps(
            session.sources,
            found.maps,
            threshold,
            valid=taken,
            fill=self.config.fill,
            alpha_threshold=self.config.alpha_threshold,
            read_too=[found.image_index, found.valid, torch.stack(near), torch.stack(finite)],
        )
        notes = []
        if not bool(whole.all()):
            notes.append("attention: some rows hold NaN or inf and were left out; a larger dtype may mend it")
        if doubtful := int(cells.sum()):
            notes.append(
                f"maps: {doubtful} cells lie within {error:g} of the threshold, the error of {self.model.dtype}"
            )
        return _entity_maps(found, image_index, valid, rows.labels), collages, notes

    def _answer(self, session: ImageSession, question: Question, more: Pictures | None = None, *, most: int) -> Reply:
        text = question.asked(self.config.letter_request)
        return session.ask(text, more, max_new_tokens=most)

    def _most_new_tokens(self, asked: int | None) -> int:
        """The bound of one call, or the config's."""
        if asked is None:
            return self.config.max_new_tokens
        if not isinstance(asked, int) or isinstance(asked, bool):
            raise TypeError(f"max_new_tokens: got {asked!r}, want an int, or None for the config's")
        if asked < 1:
            raise ValueError(f"max_new_tokens: got {asked}, want at least 1")
        return asked

    def _entities(self, questions: Sequence[Question]) -> tuple[list[Entities], int]:
        """The entities, and how many tokens went through the model for them."""
        settings = self.config
        made_by = (self.extractor, settings.entities_from, settings.entity_prompt, settings.max_entity_tokens)
        with self.model.lock:
            seen = {one.text: self._known.get((one.text, made_by)) for one in questions}
        known = {text: entities for text, entities in seen.items() if entities is not None}
        new = {question.text: question for question in questions if question.text not in known}
        tokens = 0
        if self.extractor is not None:
            for text in new:
                reply = self.extractor(text)
                if not isinstance(reply, str):
                    raise TypeError(f"extractor: it returned {type(reply).__name__}, want a string")
                known[text] = parse_entities(f"{OPEN_TAG}{reply}{CLOSE_TAG}")
        elif self.config.entities_from == "rules":
            known |= {text: entities_by_rules(question) for text, question in new.items()}
        elif new:
            requests = [entity_request(question, self.config.entity_prompt) for question in new.values()]
            said = self._entity_replies(requests)
            tokens = sum(one.tokens for one in said)
            for text, request, one in zip(new, requests, said, strict=True):
                known[text] = parse_entities(one.text, request)
        with self.model.lock:
            self._known |= {(text, made_by): known[text] for text in new}
            while len(self._known) > MEMO:
                self._known.pop(next(iter(self._known)))
        found = []
        for question in questions:
            own = known[question.text]
            if not own.items:
                words = " ".join(question.stem.split())[:MAX_LENGTH]
                note = "entities: none were found; the question's own words took their place"
                own = Entities((words,), (*own.notes, note))
            found.append(own)
        return found, tokens

    def _entity_replies(self, requests: Sequence[str]) -> list[Reply]:
        """The model's replies; the words that all requests begin with were sent through it once."""
        most = self.config.max_entity_tokens
        prefix = self._entity_prefix()
        prompts = [self.model.input_ids(request) for request in requests]
        if not all(torch.equal(ids[:, : prefix.length], prefix.ids) for ids in prompts):
            return [self.model.generate(request, max_new_tokens=most) for request in requests]
        if len(prompts) > 1 and self.model.greedy_by_steps:
            replies = prefix.replies(prompts, max_new_tokens=most)
        else:
            replies = [prefix.reply(ids, max_new_tokens=most) for ids in prompts]
        return [
            Reply(self.model.decode(reply), ids.shape[1] - prefix.length + len(reply))
            for ids, reply in zip(prompts, replies, strict=True)
        ]

    def _entity_prefix(self) -> Prefix:
        asked = self.config.entity_prompt
        with self.model.lock:
            if self._instruction is None or self._instruction[0] != asked:
                ids = [
                    self.model.input_ids(entity_request(Question.parse(text), asked))[0]
                    for text in ("What?", "9 things are there.")
                ]
                shorter = min(map(len, ids))
                differs = (ids[0][:shorter] != ids[1][:shorter]).nonzero()
                # The last common token may melt into other questions.
                common = max(1, int(differs[0]) - 1) if len(differs) else shorter - 1
                prefix = Prefix(self.model, ids[0][None, :common], prefill_chunk=self.config.prefill_chunk)
                self._instruction = (asked, prefix)
            return self._instruction[1]

    def _attention_rows(self, session: ImageSession, entities: Entities | str) -> tuple[EntityRows, int]:
        """The rows, and how many tokens went through the model for them."""
        prompt = self._search_prompt(session.pictures, entities)
        rows = session.search_rows(prompt, layers=self.config.layers, causal=self.config.causal)
        return self._entity_rows(rows, prompt), prompt.input_ids.shape[1] - session.length

    def _entity_rows(self, rows: Sequence[Tensor], prompt: SearchPrompt) -> EntityRows:
        if self.config.include_punctuation:
            return EntityRows(tuple(rows), prompt.prior_rows, prompt.labels)
        worded = [place for place, label in enumerate(prompt.labels) if re.search(r"\w", label)]
        kept = [*range(prompt.prior_rows), *(prompt.prior_rows + place for place in worded)]
        labels = tuple(prompt.labels[place] for place in worded)
        return EntityRows(tuple(of_image[kept] for of_image in rows), prompt.prior_rows, labels)

    def _search_prompt(self, pictures: Pictures, entities: Entities | str) -> SearchPrompt:
        text = entities if isinstance(entities, str) else entities.text
        return self.model.search_prompt(
            text, pictures, prompt=self.config.search_prompt, include_end_token=self.config.include_end_token
        )

    def _boxes(self, maps: EntityMaps, pictures: Sequence[Image.Image]) -> tuple[Tensor, ...]:
        return tuple(
            self._boxes_of(of_image, picture.size) for of_image, picture in zip(maps.maps, pictures, strict=True)
        )

    def _collage(
        self, pictures: Sequence[Image.Image], boxes: Sequence[Tensor]
    ) -> tuple[tuple[Image.Image | None, ...], tuple[Tensor, ...]]:
        made = [
            collage(to_tensor(picture), own, fill=self.config.fill, alpha_threshold=self.config.alpha_threshold)
            for picture, own in zip(pictures, boxes, strict=True)
        ]
        shown = tuple(None if one.image is None else Image.fromarray(one.image.numpy()) for one in made)
        return shown, tuple(one.boxes for one in made)

    def _boxes_of(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        _, rows, columns = maps.shape
        if not len(maps):
            return torch.zeros(0, 4, dtype=torch.int64)
        found = regions(maps, self.config.threshold)
        if bool(found.overflow.any()):
            found = regions(maps, self.config.threshold, max_regions=int(found.counts.max()))
        used = torch.arange(found.boxes.shape[1], device=maps.device) < found.counts[:, None]
        return boxes_to_pixels(found.boxes[used].cpu(), grid=(rows, columns), size=(size[1], size[0]))


def preset_for(model: Adapter, preset: str | None = None) -> tuple[HiDeConfig, tuple[str, ...]]:
    """The config for a model, and notes about where it comes from.

    `preset` is a name in `PRESETS`; `None` takes the one that the checkpoint's config.json names as `"hide_preset"`.
    Without it, the first of the model's family, and for depths that it was not published for, the layers at the same
    relative depth, with a note. Raises `ValueError` for an unknown name.
    """
    own = getattr(model.model.config, "hide_preset", None)
    source, asked = ("preset", preset) if preset is not None else ("config.json: hide_preset", own)
    if asked is not None:
        if not isinstance(asked, str) or asked not in PRESETS:
            raise ValueError(f"{source}: got {asked!r}, want one of {', '.join(PRESETS)}")
        return PRESETS[asked], ()
    name = model.presets[0]
    published = PRESETS[name]
    if model.num_layers == model.preset_depth:
        return published, ()
    note = f"preset: nothing was published for {model.num_layers} layers; {name}'s values are taken"
    if published.layers is None:
        return published, (note,)
    layers = tuple(layer * model.num_layers // model.preset_depth for layer in published.layers)
    note += f", and layer {', '.join(map(str, layers))} at the same relative depth"
    return dataclasses.replace(published, layers=layers), (note,)


def _question(question: str | Question, options: Sequence[str] | None = None) -> Question:
    return (
        question
        if isinstance(question, Question) and options is None
        else Question.parse(question.text if isinstance(question, Question) else question, options)
    )


def _listed(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("image: got an empty list, want at least one picture")
        return images
    return [images]  # type: ignore[list-item]


def _images(images: ImageLike | Sequence[ImageLike]) -> tuple[Image.Image, ...]:
    return tuple(load_image(image) for image in _listed(images))


def _entity_maps(found: TokenMaps, image_index: Tensor, valid: Tensor, labels: Sequence[str]) -> EntityMaps:
    """The maps of the tokens that have one; `image_index` and `valid` as the host has read them."""
    maps, own_labels = [], []
    for index, of_image in enumerate(found.maps):
        own = ((image_index == index) & valid).nonzero()[:, 0]
        maps.append(of_image[_on_device(own, of_image.device)])
        own_labels.append(tuple(labels[place] for place in own.tolist()))
    order = dict.fromkeys(image_index[valid].tolist())
    return EntityMaps(tuple(maps), tuple(own_labels), tuple(order))


def _on_device(index: Tensor, device: torch.device) -> Tensor:
    """A small tensor where it is needed; the host does not wait for the copy."""
    return index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)


def _in_aspect(pixels: Tensor, fill: tuple[int, int, int] | None) -> Tensor:
    """A collage so thin that the model refuses it gets a margin like its gaps."""
    height, width, channels = pixels.shape
    least = -(-max(height, width) // MAX_ASPECT)
    if min(height, width) >= least:
        return pixels
    colour = (0, 0, 0, 0) if fill is None else (*fill, 255)
    canvas = torch.tensor(colour[:channels], dtype=torch.uint8).repeat(max(height, least), max(width, least), 1)
    canvas = canvas.to(pixels.device)
    canvas[:height, :width] = pixels
    return canvas
