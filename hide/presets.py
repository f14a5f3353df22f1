"""Settings of a run and of answers, and presets: what is known of a model's budgets whatever the method.

Nothing here needs transformers, whose import takes seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hide.questions import LETTER_REQUEST, TAGGED_LETTER_REQUEST

if TYPE_CHECKING:
    from hide.models.base import Adapter

WHITE = (255, 255, 255)
# Of a token of most families: what sizes in pixels are turned into tokens by, where a rule needs no more than about.
TOKEN_PIXELS = 28 * 28


def check_count(name: str, value: int) -> None:
    """`TypeError` for what is no int, `ValueError` for one below 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, want an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, want at least 1")


@dataclass(frozen=True)
class RunSettings:
    """How a session is run, whatever is asked of it.

    min_tokens, max_tokens: image tokens that an image is resized to lie between.
    view_tokens: at most so many for the session's own images; `None`: `max_tokens`. What is cut out of them comes from
        their full resolution all the same, and has the whole budget. "auto": as `auto_view` says, for each image by its
        size; what is cut out then has no more tokens than the view.
    auto_view: factor and exponent: an image that would have N tokens is looked at in factor * N ** exponent.
    join_images: whether images behind the session's join them as one image of the prompt, instead of following as
        images of their own; only where the family can (InternVL).
    prefill_chunk: tokens that go through the decoder at once: less memory beside a large image, the same result.
    offload_kv: keys and values of the images lie in host memory, and two layers' at a time on the GPU: less memory, the
        same result, and every step brings them all over the bus (docs/sessions.md).
    decoder: "nvimgcodec" decodes JPEG files on the GPU where it is installed, a few levels off Pillow's.
    """

    min_tokens: int = 256
    max_tokens: int = 16384
    view_tokens: int | Literal["auto"] | None = None
    auto_view: tuple[float, float] = (23.0, 0.5)
    join_images: bool = False
    prefill_chunk: int = 2048
    offload_kv: bool = False
    decoder: Literal["pillow", "nvimgcodec"] = "pillow"

    def __post_init__(self) -> None:
        for name in ("min_tokens", "max_tokens", "prefill_chunk"):
            check_count(name, getattr(self, name))
        if isinstance(self.view_tokens, str) and self.view_tokens != "auto":
            raise ValueError(f"view_tokens: got {self.view_tokens!r}, want a number of tokens, 'auto', or None")
        if self.view_tokens is not None and not isinstance(self.view_tokens, str):
            check_count("view_tokens", self.view_tokens)
        if len(self.auto_view) != 2 or not all(number > 0 for number in self.auto_view):
            raise ValueError(f"auto_view: got {self.auto_view}, want a factor and an exponent above 0")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens, max_tokens: got {self.min_tokens}, {self.max_tokens}, want 1 <= min <= max")
        if self.decoder not in ("pillow", "nvimgcodec"):
            raise ValueError(f"decoder: got {self.decoder!r}, want 'pillow' or 'nvimgcodec'")

    def view(self, width: int, height: int) -> int:
        """How many tokens a session's own image of so many pixels has at most."""
        if self.view_tokens is None:
            return self.max_tokens
        if self.view_tokens != "auto":
            return min(self.view_tokens, self.max_tokens)
        factor, exponent = self.auto_view
        whole = min(width * height / TOKEN_PIXELS, self.max_tokens)
        return min(max(round(factor * whole**exponent), self.min_tokens), self.max_tokens)

    def check(self, model: Adapter) -> None:
        """`ValueError` for what the model's family cannot."""
        if self.join_images and not model.joins_images:
            raise ValueError(f"join_images: got True, but {model.family} shows every image as an image of its own")


@dataclass(frozen=True)
class AnswerSettings:
    """How questions are put.

    letter_request: what a question with lettered options ends with; its reply may stand between tags (`hide.tags`).
    max_new_tokens: bound on a generated answer.
    """

    letter_request: str = LETTER_REQUEST
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)


@dataclass(frozen=True)
class NoSettings:
    """Of a method that has none."""


S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Preset(Generic[S]):
    """A method's settings in their three parts: its own, those of the run, those of the answer.

    family, depth: the `model_type` and the number of decoder layers of the model that they are for; 0: any number.
    """

    settings: S
    run: RunSettings = field(default_factory=RunSettings)
    answer: AnswerSettings = field(default_factory=AnswerSettings)
    family: str = ""
    depth: int = 0

    def changed(self, **changes: Any) -> Preset[S]:
        """With other values of some fields, whichever part they belong to.

        A list or range becomes a tuple and an int a float where the field is one. Raises `TypeError` for a field of no
        part and for a value of another type, `ValueError` for one that the field does not take.
        """
        parts = {}
        for name in ("settings", "run", "answer"):
            part = getattr(self, name)
            try:
                hints = get_type_hints(type(part))
            except NameError:  # of another package, with a name that it imports for type checkers alone
                hints = {}
            own = {one.name for one in dataclasses.fields(part)} & changes.keys()
            taken = {one: of_kind(one, changes.pop(one), hints.get(one), getattr(part, one)) for one in own}
            parts[name] = dataclasses.replace(part, **taken)
        if changes:
            raise TypeError(f"settings: there is no {', '.join(changes)}; there are {', '.join(self.to_dict())}")
        return dataclasses.replace(self, **parts)

    def with_settings(self, settings: T) -> Preset[T]:
        """For another method: its settings, with the same other parts."""
        return Preset(settings, self.run, self.answer, self.family, self.depth)

    def to_dict(self) -> dict[str, Any]:
        """All fields of the three parts."""
        return {name: value for part in (self.settings, self.run, self.answer) for name, value in vars(part).items()}


_KINDS = (bool, int, float, str, tuple, type(None))


def of_kind(name: str, value: Any, hint: Any, now: Any) -> Any:
    """`value`, if it is of a field's type; now: the value that it replaces, as an example."""
    if isinstance(value, (list, range)) and not _fits(value, hint):
        value = tuple(value)
    parts = value if isinstance(value, tuple) else (value,)
    if not _fits(value, hint) and all(type(part) in (int, float) for part in parts):
        # A whole number stands for itself as a float.
        floats = tuple(map(float, parts)) if isinstance(value, tuple) else float(value)
        value = floats if _fits(floats, hint) else value
    if not _fits(value, hint):
        kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise TypeError(f"{name}: got {value!r}, want {kind}, such as {now!r}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as that is made of `_KINDS`: what another allows, its class must check."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple and isinstance(value, tuple):
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if isinstance(value, bool) and hint in (int, float):
        return False
    kind = origin or hint
    return isinstance(value, kind) if kind in _KINDS else True


_TAGGED = AnswerSettings(letter_request=TAGGED_LETTER_REQUEST)
# InternVL3-8B: 33,024 tokens are 128 tiles and a thumbnail, more than half of the positions that the model has; with
# two images, 62 tiles each always fit. Which a family takes by itself: its first.
MODELS: dict[str, Preset[NoSettings]] = {
    "qwen2.5-vl-7b": Preset(NoSettings(), family="qwen2_5_vl", depth=28),
    "qwen3-vl-8b": Preset(NoSettings(), answer=_TAGGED, family="qwen3_vl", depth=36),
    "qwen3-vl-8b-layer-18": Preset(NoSettings(), answer=_TAGGED, family="qwen3_vl", depth=36),
    "internvl3-8b": Preset(NoSettings(), RunSettings(max_tokens=33024, join_images=True), family="internvl", depth=28),
    "internvl3-8b-two-images": Preset(NoSettings(), RunSettings(max_tokens=16128), family="internvl", depth=28),
    "llava-1.5-7b": Preset(NoSettings(), family="llava", depth=32),
    "llava-onevision-7b": Preset(NoSettings(), family="llava_onevision", depth=28),
    "tiny": Preset(NoSettings(), RunSettings(min_tokens=36), AnswerSettings(max_new_tokens=64)),
}
"""What published code uses for a model whatever the method: budgets and the form of questions."""


def presets_of(settings: Mapping[str, S]) -> dict[str, Preset[S]]:
    """A method's presets: its own settings for models of `MODELS`, with the other two parts from there."""
    return {name: MODELS[name].with_settings(own) for name, own in settings.items()}
