"""What a method is: a way of answering questions about images that is written in a session's verbs.

A new one is a subclass of `Method` with a name and `answer`. It then has `hide ask --method`, `hide eval --methods`,
the report and the profile: times and tokens of its steps come from `Steps`, pictures from its `Evidence`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor

from hide.engine.prefix import layer_indices
from hide.engine.usage import counted
from hide.images import ImageLike
from hide.models import load
from hide.models.base import Adapter
from hide.models.quantised import Weights
from hide.presets import MODELS, AnswerSettings, NoSettings, Preset, RunSettings, S, presets_of
from hide.questions import Question
from hide.session import VERBS, ImageSession, Reply, Session, open_session
from hide_kernels.collage.checks import check_boxes, check_kind
from hide_kernels.memory import profile, stage

__all__ = [
    "MODELS",
    "Answer",
    "AnswerSettings",
    "Evidence",
    "ImagesOrSession",
    "Method",
    "NoSettings",
    "Preset",
    "Step",
    "Steps",
    "as_question",
    "ask_all",
    "presets_of",
]

ImagesOrSession = ImageLike | Sequence[ImageLike] | Session
"""Images, or a session of `Method.open` that has seen them already."""


# -- what a method says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What a method found in one image.

    boxes: (K, 4) int64 pixels x0, y0, x1, y1 half-open, inside the image. maps: (M, h, w) float32, where it looked;
    cells that are NaN or infinite are drawn as 0. labels: what each map is of, M texts. threshold: from which value on
    a map's cells count, if there is one; maps with one are drawn as they are, from 0 to 1, others as parts of their
    peaks. shown: the picture that the model was shown of it, if any. shown_tokens: how
    many tokens that has.

    Raises `TypeError` or `ValueError` for anything else.
    """

    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4, dtype=torch.int64))
    maps: Tensor = field(default_factory=lambda: torch.zeros(0, 1, 1))
    labels: tuple[str, ...] = ()
    threshold: float | None = None
    shown: Image.Image | None = None
    shown_tokens: int | None = None

    def __post_init__(self) -> None:
        check_kind("boxes", self.boxes)
        if not isinstance(self.maps, Tensor) or self.maps.is_complex():
            raise TypeError(f"maps: got {type(self.maps).__name__}, want a float32 tensor")
        if self.maps.ndim != 3 or 0 in self.maps.shape[1:]:
            raise ValueError(f"maps: got shape {tuple(self.maps.shape)}, want (M, h, w)")
        if isinstance(self.labels, str) or not all(isinstance(label, str) for label in self.labels):
            raise TypeError(f"labels: got {self.labels!r}, want a text for each map")
        if len(self.labels) != len(self.maps):
            raise ValueError(f"labels: got {len(self.labels)}, want {len(self.maps)}, one for each map")
        if self.threshold is not None and not (isinstance(self.threshold, (int, float)) and isfinite(self.threshold)):
            raise TypeError(f"threshold: got {self.threshold!r}, want a number, or None for none")
        if self.shown is not None and not isinstance(self.shown, Image.Image):
            raise TypeError(f"shown: got {type(self.shown).__name__}, want a Pillow image (`hide.images.to_image`)")
        if self.shown is not None and 0 in self.shown.size:
            raise ValueError(f"shown: got {self.shown.width} x {self.shown.height} pixels, want some")


class Step(NamedTuple):
    """Wall time of a step, the tokens that went through the language model in it (`hide.engine.usage`), and the most
    bytes of the model's device that were allocated in it, weights included, where that was measured (`ask_all`)."""

    seconds: float
    tokens: int
    peak: int | None = None


@dataclass(frozen=True)
class Answer:
    """What a method answers, and why.

    text: the model's reply. evidence: per image what was found in it; empty where the method does not look. notes:
    fallbacks that were taken, and doubts. details: facts of the method, of what JSON holds, under names that are none
    of `to_dict`'s own. `Method.ask` adds the rest: method, question, images as they were loaded, how many tokens stand
    for each, and the steps with their costs.
    """

    text: str
    evidence: tuple[Evidence, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    question: Question = field(default_factory=lambda: Question(""))
    images: tuple[Image.Image, ...] = ()
    image_tokens: tuple[int, ...] = ()
    steps: Mapping[str, Step] = field(default_factory=dict)

    @property
    def letter(self) -> str | None:
        """The option that `text` names, if any."""
        return self.question.letter(self.text)

    @property
    def boxes(self) -> tuple[Tensor, ...]:
        """Of each image."""
        return tuple(found.boxes for found in self.evidence)

    @property
    def shown(self) -> tuple[Image.Image | None, ...]:
        """Of each image the picture that the model was shown of it."""
        return tuple(found.shown for found in self.evidence)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each step."""
        return {name: step.seconds for name, step in self.steps.items()}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each step."""
        return {name: step.tokens for name, step in self.steps.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything but pixels and maps, for JSON."""
        return {
            "method": self.method,
            "question": self.question.text,
            "answer": self.text,
            "letter": self.letter,
            "images": [list(image.size) for image in self.images],
            "image_tokens": list(self.image_tokens),
            "labels": [list(found.labels) for found in self.evidence],
            "boxes": [found.boxes.tolist() for found in self.evidence],
            "shown": [None if found.shown is None else list(found.shown.size) for found in self.evidence],
            "shown_tokens": [found.shown_tokens for found in self.evidence],
            **self.details,
            "notes": list(self.notes),
            "seconds": {name: round(step.seconds, 4) for name, step in self.steps.items()},
            "tokens": self.tokens,
            "peak_bytes": {name: step.peak for name, step in self.steps.items() if step.peak is not None},
        }


class Steps:
    """The steps of one answer: `with steps("attention"): ...` times a part, counts its tokens and marks it for
    profilers of time and memory. A name that comes again adds to what it has. None lies inside another, whose costs
    would hold its own."""

    def __init__(self, device: torch.device | str = "cpu", progress: Callable[[str], None] | None = None) -> None:
        """device: the model's. progress: called with the name of each step when it begins."""
        self._device = torch.device(device)
        self._progress = progress
        self._marks: list[tuple[str, Any, Any, int]] = []
        self._running: str | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One step; a GPU's own events tell when it was done, so that nobody waits.

        Raises `TypeError` for a name that is no text, `ValueError` inside another step.
        """
        if not isinstance(name, str):
            raise TypeError(f"step: got {name!r}, want a text")
        if self._running is not None:
            raise ValueError(f"step: {name!r} begins inside {self._running!r}; end that one first")
        self._running = name
        try:
            yield from self._step(name)
        finally:
            self._running = None

    def _step(self, name: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(name)
        on_gpu = self._device.type == "cuda"
        marked = torch.cuda.nvtx.range(f"hide: {name}") if on_gpu else nullcontext()
        start = self._mark()
        with torch.profiler.record_function(f"hide: {name}"), marked, stage(name), counted() as usage:
            yield
        self._marks.append((name, start, self._mark(), usage.tokens))

    def finished(self) -> dict[str, Step]:
        """Each step's costs; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: dict[str, Step] = {}
        for name, start, end, tokens in self._marks:
            spent = end - start if isinstance(start, float) else 1e-3 * start.elapsed_time(end)
            found = added(found, {name: Step(spent, tokens)})
        return found

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def added(steps: Mapping[str, Step], more: Mapping[str, Step]) -> dict[str, Step]:
    """Both, and the costs of those with one name together."""
    found = dict(steps)
    for name, step in more.items():
        seconds, tokens, peak = found.get(name, Step(0.0, 0))
        peaks = [one for one in (peak, step.peak) if one is not None]
        found[name] = Step(seconds + step.seconds, tokens + step.tokens, max(peaks, default=None))
    return found


# -- methods ----------------------------------------------------------------------------------------------------------


class Method(ABC, Generic[S]):
    """A way of answering questions about images, with a model, from any number of threads.

    A subclass has `name`, `summary` (one line), `needs` (those of `hide.session.VERBS` that it calls), `Settings` (its
    own dataclass, if it has settings), `presets` (name -> values that are known to work) and `answer`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"ask"})
    Settings: ClassVar[type[Any]] = NoSettings
    presets: ClassVar[Mapping[str, Preset[Any]]] = {}

    def __init__(self, model: Adapter, preset: Preset[S] | None = None, *, notes: Sequence[str] = ()) -> None:
        """Use a loaded model.

        Args:
            model: of `hide.models.load`.
            preset: settings; `None`: those of `preset_for`.
            notes: repeated in every answer, behind those of the model.

        Raises `ValueError` for settings that do not suit the model.
        """
        if preset is None:
            preset, about = self.preset_for(model)
            notes = (*about, *notes)
        if unknown := set(self.needs) - set(VERBS):
            raise ValueError(f"{type(self).__name__}.needs: got {', '.join(sorted(unknown))}, want any of {VERBS}")
        if not isinstance(preset, Preset):
            raise TypeError(f"preset: got {type(preset).__name__}, want a Preset, such as `preset_for` gives")
        if self.Settings is not NoSettings and not isinstance(preset.settings, self.Settings):
            raise TypeError(
                f"preset: got settings {type(preset.settings).__name__}, want {self.Settings.__name__}; "
                "`Preset.with_settings` puts others beside the same run and answer"
            )
        self.model = model
        self.preset = preset
        self.notes = tuple(notes)
        self.check()

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
        **changes: Any,
    ) -> Self:
        """Load a checkpoint (folder or hub name) with the preset for it.

        Args:
            preset: as `preset_for`.
            device, dtype, attn_implementation, weights: as `hide.models.load`.
            changes: fields of the method's settings, `RunSettings` or `AnswerSettings` that replace the preset's.
        """
        model = load(path, device=device, dtype=dtype, attn_implementation=attn_implementation, weights=weights)
        chosen, notes = cls.preset_for(model, preset)
        return cls(model, chosen.changed(**changes), notes=notes)

    @classmethod
    def preset_for(cls, model: Adapter, name: str | None = None) -> tuple[Preset[S], tuple[str, ...]]:
        """The preset for a model, and notes about where it comes from.

        name: of one in `presets` or `MODELS`; `None`: the one that the checkpoint names as `"hide_preset"` in its
            config.json, else the first of the model's family, for other depths as `at_depth` has it, with a note.

        Raises `ValueError` for an unknown name, and for a family that has none where none is named.
        """
        own = getattr(model.model.config, "hide_preset", None)
        source, asked = ("preset", name) if name is not None else ("config.json: hide_preset", own)
        known = {**cls.presets, **{key: preset for key, preset in MODELS.items() if key not in cls.presets}}
        if asked is not None:
            if not isinstance(asked, str) or asked not in known:
                raise ValueError(f"{source}: got {asked!r}, want one of {', '.join(known)}")
            return cls._own(known[asked], asked), ()
        chosen = next((key for key, preset in known.items() if preset.family == model.family), None)
        if chosen is None:
            raise ValueError(f"preset: there is none for {model.family}; name one of {', '.join(known)}")
        preset = cls._own(known[chosen], chosen)
        if preset.depth in (0, model.num_layers):
            return preset, ()
        settings, changes = cls.at_depth(preset.settings, preset.depth, model.num_layers)
        note = f"preset: nothing was published for {model.num_layers} layers; {chosen}'s values are taken"
        return dataclasses.replace(preset, settings=settings), (f"{note}{f', and {changes}' if changes else ''}",)

    @classmethod
    def at_depth(cls, settings: S, published: int, layers: int) -> tuple[S, str]:
        """Settings for a model of `layers` decoder layers from those for one of `published`, and what was changed: a
        setting `layers` becomes those at the same relative depth."""
        known = getattr(settings, "layers", None)
        if known is None:
            return settings, ""
        chosen = tuple(layer * layers // published for layer in known)
        about = f"layer {', '.join(map(str, chosen))} at the same relative depth"
        return dataclasses.replace(settings, layers=chosen), about  # type: ignore[type-var]

    @classmethod
    def _own(cls, preset: Preset[Any], name: str) -> Preset[Any]:
        """A preset by its name; of a model for which the method has none, with the defaults of its settings."""
        if name in cls.presets:
            return preset
        return dataclasses.replace(preset.with_settings(cls.Settings()), depth=0)

    def check(self) -> None:
        """Refuse settings that do not suit the model, with `ValueError`: of the run, and `layers` that it has not."""
        self.preset.run.check(self.model)
        if (layers := getattr(self.settings, "layers", None)) is not None:
            layer_indices(self.model, layers)

    def changed(self, **changes: Any) -> Self:
        """The same method with other settings, on the same model."""
        other = copy.copy(self)
        other.preset = self.preset.changed(**changes)
        other.check()
        return other

    @property
    def settings(self) -> S:
        """The method's own part of the preset."""
        return self.preset.settings

    @property
    def taps(self) -> tuple[int, ...]:
        """Decoder layers whose inputs a session keeps for `hidden`."""
        return ()

    def with_boxes(self, boxes: Sequence[Sequence[int]]) -> Self | None:
        """For evaluations: the method for a question whose right boxes in the first image are known, where it wants
        them; `None` where it cannot do without and there are none."""
        return self

    def open(
        self, images: ImageLike | Sequence[ImageLike], *, taps: Sequence[int] | None = None, steps: Steps | None = None
    ) -> ImageSession:
        """Encode and prefill images once, for many questions; every method with the same model takes the session in
        place of the images. Close it, or use it in a `with` block, to free its keys and values.

        taps: decoder layers whose inputs it keeps; `None`: those of this method. steps: times the opening.
        """
        kept = self.taps if taps is None else taps
        return open_session(self.model, images, self.preset.run, taps=kept, step=steps or nullcontext)

    def ask(
        self,
        image: ImagesOrSession,
        question: str | Question,
        *,
        options: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question.

        Args:
            image: one image or several, or a session of `open`, so that many questions and methods share one prefill.
            question: free, or with lettered options on lines of their own.
            options: the options, when they do not stand in the question.
            max_new_tokens: bound on the answer, at least 1; `None`: the preset's.
            progress: called with the name of each step when it begins.

        Raises `ValueError` for a question that is none, and for a session that lacks a verb or is of another model.
        """
        question = as_question(question, options)
        method = self if max_new_tokens is None else self.changed(max_new_tokens=max_new_tokens)
        steps = Steps(self.model.model.device, progress)
        if isinstance(image, Session):
            return method._answered(image, question, steps)
        with self.open(image, steps=steps) as session:
            return method._answered(session, question, steps)

    @abstractmethod
    def answer(self, session: Session, question: Question, steps: Steps) -> Answer:
        """Answer a question about a session's images, each part of the work inside a step.

        Only what the method knows goes into the `Answer`: text, evidence, notes and details.
        """

    def reply(self, session: Session, question: Question, images: Sequence[Image.Image | Tensor] = ()) -> Reply:
        """The model's reply to the session's images, further ones, and the question as the answer settings put it."""
        text = question.asked(self.preset.answer.letter_request)
        return session.ask(text, images, max_new_tokens=self.preset.answer.max_new_tokens)

    def _answered(self, session: Session, question: Question, steps: Steps) -> Answer:
        self.check_session(session)
        answer = self.answer(session, question, steps)
        self._check_answer(answer, session)
        return dataclasses.replace(
            answer,
            evidence=tuple(answer.evidence),
            notes=(*self.model.notes, *self.notes, *session.notes, *answer.notes),
            method=self.name,
            question=question,
            images=session.images,
            image_tokens=session.image_tokens,
            steps=steps.finished(),
        )

    def _check_answer(self, answer: Answer, session: Session) -> None:
        """Refuses, by the method's name, what could be neither shown nor written down."""
        if not isinstance(answer, Answer) or not isinstance(answer.text, str):
            got = type(answer.text if isinstance(answer, Answer) else answer).__name__
            raise TypeError(f"{self.name}: its answer is {got}, want an Answer with a text")
        for what, kind in (("evidence", Evidence), ("notes", str)):
            listed = getattr(answer, what)
            if not isinstance(listed, (list, tuple)) or not all(isinstance(one, kind) for one in listed):
                raise TypeError(f"{self.name}: {what}: got {type(listed).__name__}, want a tuple of {kind.__name__}")
        if answer.evidence and len(answer.evidence) != len(session.images):
            raise ValueError(
                f"{self.name}: evidence: got {len(answer.evidence)}, want {len(session.images)}, one per image, or none"
            )
        for index, (found, image) in enumerate(zip(answer.evidence, session.images, strict=False)):
            name = f"{self.name}: evidence[{index}].boxes"
            boxes = check_boxes(name, found.boxes, (image.height, image.width))
            if (boxes[:, :2] == boxes[:, 2:]).any():
                raise ValueError(f"{name}: got {boxes.tolist()}, want an area in each")
        if not isinstance(answer.details, Mapping):
            raise TypeError(f"{self.name}: details: got {type(answer.details).__name__}, want a mapping")
        for name, value in answer.details.items():
            if not isinstance(name, str) or name in _OWN_NAMES:
                raise ValueError(f"{self.name}: details: got {name!r}, want a name that a result does not have itself")
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{self.name}: details: {name}: {error}; want what JSON holds") from None

    def check_session(self, session: Session) -> None:
        """`ValueError` for a session that the method cannot be asked about: it names what is lacking."""
        if not isinstance(getattr(self, "name", None), str):
            raise TypeError(f"{type(self).__name__}: it has no name; give the class one")
        lacking = [verb for verb in VERBS if verb in self.needs and verb not in session.verbs]
        if lacking:
            raise ValueError(
                f"{self.name}: it needs {' and '.join(lacking)}, which {type(session).__name__} does not offer"
            )
        if isinstance(session, ImageSession):
            if session.model is not self.model:
                raise ValueError("image: got a session of another model; open one here")
            if missing := set(self.taps) - set(session.taps):
                raise ValueError(
                    f"{self.name}: it needs the states of layer {', '.join(map(str, sorted(missing)))}, which the "
                    "session did not keep; open it with this method's `open`"
                )


def ask_all(
    methods: Sequence[Method[Any]],
    images: ImageLike | Sequence[ImageLike],
    question: str | Question,
    *,
    options: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    progress: Callable[[str], None] | None = None,
    memory: bool = False,
) -> list[Answer]:
    """Several methods with one model on one session; the steps of opening it are among those of each answer.

    The session is run as the first method but the plain one has it; another whose own `RunSettings` differ says so in a
    note. progress: called with "method: step" where there
    are several. memory: also measure each step's, which on a CPU takes time (`hide_kernels.memory.profile`). Otherwise
    as `Method.ask`.
    """
    if not methods:
        raise ValueError("methods: got none, want at least one")
    main = next((method for method in methods if method.name != "plain"), methods[0])
    taps = sorted({tap for method in methods for tap in method.taps})
    steps = Steps(main.model.model.device, progress)
    question = as_question(question, options)
    answers: list[Answer] = []
    with (
        profile(main.model.model) if memory else nullcontext() as recording,
        main.open(images, taps=taps, steps=steps) as session,
    ):
        for method in methods:
            label = f"{method.name}: " if len(methods) > 1 else ""
            said = None if progress is None else (lambda name, label=label, tell=progress: tell(label + name))
            # Methods may have steps of the same name.
            with stage(method.name):
                answer = method.ask(session, question, max_new_tokens=max_new_tokens, progress=said)
            note = () if method.name == "plain" else _run_as(main.preset.run, method.preset.run)
            answers.append(dataclasses.replace(answer, notes=(*answer.notes, *note)))
    opened = steps.finished()
    peaks = {} if recording is None else {one.name: one.peak for one in recording.report.stages}
    return [
        dataclasses.replace(
            answer,
            steps={
                name: step._replace(peak=peaks.get(name if name in opened else f"{answer.method}/{name}"))
                for name, step in added(opened, answer.steps).items()
            },
        )
        for answer in answers
    ]


def _run_as(run: RunSettings, own: RunSettings) -> tuple[str, ...]:
    """A note of the settings of a shared session that are not a method's own, if there are any."""
    differ = [f"{name} {value}, not {vars(own)[name]}" for name, value in vars(run).items() if value != vars(own)[name]]
    return (f"run: on a session with {'; '.join(differ)}",) if differ else ()


_OWN_NAMES = {*Answer("").to_dict(), "model", "weights", "plain_answer", "plain_letter"}
"""Names of a result that no detail may take; the last four are of `hide ask`."""


def as_question(question: str | Question, options: Sequence[str] | None = None) -> Question:
    """A question taken apart; see `Question.parse`."""
    if isinstance(question, Question) and options is None:
        return question
    return Question.parse(question.text if isinstance(question, Question) else question, options)
