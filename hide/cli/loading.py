"""What commands that run a model are told of it: said once, as options and as what they load."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

if TYPE_CHECKING:
    from hide.methods.base import Method
    from hide.models.base import Adapter
    from hide.models.quantised import Weights

EMBEDDED = "the embedded model: it knows drawn scenes only (star, ring, moon, ... in eight colors)"


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="A checkpoint: folder or hub name; see `hide models`. Without it, the embedded model."
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option("--device", help="cuda, cuda:1, cpu; default: CUDA where there is one.")
    ] = None
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto"
    weights: Annotated[
        str | None, typer.Option("--weights", help="int8 or int4: quantise the weights while loading; extra \\[quant].")
    ] = None

    def load(self) -> Adapter:
        """The model."""
        from hide.models import load
        from hide.tiny import CHECKPOINT

        known = cast("Weights | None", self.weights)
        path = CHECKPOINT if self.model is None else self.model
        return load(path, device=self.device, dtype=self.dtype, weights=known)

    @property
    def shown(self) -> str:
        """What to call the model."""
        return f"{self.model or EMBEDDED}{f', {self.weights} weights' if self.weights else ''}"

    def facts(self) -> dict[str, str | None]:
        """What a result file says of the model; `None`: as in files that do not say it."""
        dtype = None if self.dtype == "auto" else self.dtype
        return {"model": self.model or "embedded", "dtype": dtype, "weights": self.weights}


@dataclass(frozen=True)
class LoadOptions(ModelOptions):
    """A model, and settings of methods that run on it."""

    preset: Annotated[
        str | None, typer.Option("--preset", help="Name of a preset; default: the one for the model.")
    ] = None
    layer: Annotated[
        list[int] | None, typer.Option("--layer", help="Zero-based decoder layer; repeat it to average.")
    ] = None
    sigma: Annotated[float | None, typer.Option("--sigma", help="Smoothing of the maps, in grid cells.")] = None
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="A region's cells reach this part of the peak.")
    ] = None
    view: Annotated[
        str | None,
        typer.Option(
            "--view", help="Look at the image in at most so many tokens, or auto; crops keep their resolution."
        ),
    ] = None
    offload_kv: Annotated[
        bool, typer.Option("--offload-kv", help="Keep keys and values in host memory: fits more, takes longer.")
    ] = False
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE for any setting of the method, the run or the answer; repeat it."),
    ] = None

    def changes(self) -> dict[str, Any]:
        """Settings that the options change."""
        given: dict[str, Any] = {"layers": tuple(self.layer) if self.layer else None, "sigma": self.sigma}
        given |= {"threshold": self.threshold, "offload_kv": self.offload_kv or None}
        given |= {"view_tokens": None if self.view is None else view_tokens(self.view)}
        return assigned(self.setting or (), {name: value for name, value in given.items() if value is not None})

    def methods(self, names: Sequence[str], model: Adapter | None = None) -> list[Method[Any]]:
        """Methods on one model, which is loaded unless it is given; names may be those of `way_of`, with settings.

        A change of the options that is none of a method's is for the others; `ValueError` for one that is none of any,
        and for a name's own that is none of its method.
        """
        from hide.methods import method_class
        from hide.presets import MODELS

        asked = [way_of(name) for name in names]
        classes = [method_class(name) for name, _ in asked]
        owner = next((kind for kind in classes if self.preset in kind.presets), None)
        model = self.load() if model is None else model
        changes, unused = self.changes(), set(self.changes())
        made: list[Method[Any]] = []
        for kind, (name, own) in zip(classes, asked, strict=True):
            if owner is not None and self.preset is not None and self.preset not in {*kind.presets, *MODELS}:
                # One that other methods here know: this one has its own settings, and is run and asked in their way.
                shared = owner.presets[self.preset]
                preset, notes = kind.preset_for(model)
                preset = dataclasses.replace(preset, run=shared.run, answer=shared.answer)
            else:
                preset, notes = kind.preset_for(model, self.preset)
            mine = {name: value for name, value in changes.items() if name in preset.to_dict()}
            unused -= mine.keys()
            if strange := own.keys() - preset.to_dict().keys():
                raise ValueError(
                    f"methods: {name} has no {', '.join(sorted(strange))}; it has {', '.join(preset.to_dict())}"
                )
            made.append(kind(model, preset.changed(**{**mine, **own}), notes=notes))
        if unused:
            known = dict.fromkeys(name for method in made for name in method.preset.to_dict())
            raise ValueError(
                f"set: {', '.join(names)} has no {', '.join(sorted(unused))}; there are {', '.join(known)}"
            )
        return made


def assigned(texts: Sequence[str], given: dict[str, Any] | None = None) -> dict[str, Any]:
    """`given`, and what each `--set NAME=VALUE` adds; values are those of Python, or texts.

    Raises `ValueError` for another form, and for a name that comes twice.
    """
    changes = dict(given or {})
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"set: got {text!r}, want NAME=VALUE, such as threshold=0.5")
        name, value = name.strip(), value.strip()
        if name in changes:
            raise ValueError(f"set: got {name} twice, by --set and by --set or an option of its own; want it once")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return changes


def view_tokens(text: str) -> Any:
    """What `--view` says: a number of tokens, or "auto"; else `ValueError`."""
    if text != "auto" and not text.isdecimal():
        raise ValueError(f"view: got {text!r}, want a number of tokens, or auto")
    return text if text == "auto" else int(text)


def view_or_whole(text: str) -> Any:
    """As `view_tokens`; `None`, the whole image, for "whole"."""
    return None if text == "whole" else view_tokens(text)


_WAY = re.compile(r"([^@\[\]]+)(?:@([^@\[\]]+))?(?:\[(.*)\])?")


def way_of(text: str) -> tuple[str, dict[str, Any]]:
    """A method's name and settings of its own, out of NAME, NAME@VIEW, NAME[SETTING=VALUE,...] or both.

    "hide@auto[gate=3]" is HiDe on a view that is chosen by the image's size, with a gate. Raises `ValueError` for any
    other form, and for a setting that comes twice.
    """
    match = _WAY.fullmatch(text)
    if match is None:
        raise ValueError(f"methods: got {text!r}, want NAME, NAME@VIEW, NAME[SETTING=VALUE,...] or NAME@VIEW[...]")
    name, view, settings = match.groups()
    given = {} if view is None else {"view_tokens": view_or_whole(view)}
    return name, assigned(re.split(r",(?=\s*\w+\s*=)", settings) if settings else (), given)


def way_names(text: str, model: str | Path, left_out: Callable[[str], None]) -> list[str]:
    """The ways of answering that `--methods` names; all: every method that is installed and runs on the model, plain
    and HiDe also on a view.

    left_out: called with each method of another package that cannot be loaded, where all are wanted.
    """
    from hide.methods import TRAINED, method_class, method_names, method_of
    from hide.models.checkpoint import CONFIG, find_file

    known = method_names()
    # Commas between brackets are not between ways.
    asked = [name.strip() for name in re.split(r",(?![^\[]*\])", text)]
    if unknown := [name for name in asked if name != "all" and method_of(name) not in known]:
        raise ValueError(f"methods: got {', '.join(map(repr, unknown))}, want any of {', '.join(known)}; or all")
    every: list[str] = []
    if "all" in asked:
        file = find_file(model, CONFIG[0])
        has = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
        for name in known:
            if name in TRAINED and not has.get(TRAINED[name]):
                continue
            try:
                method_class(name)
            except ValueError as error:
                left_out(str(error))
                continue
            every += [name, f"{name}@auto"] if name in ("plain", "hide") else [name]
    return list(dict.fromkeys(one for name in asked for one in (every if name == "all" else [name])))


def options_of(kind: type[ModelOptions]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose parameter `load` becomes the options of `kind`, in their place."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(kind, include_extras=True)
        names = [one.name for one in dataclasses.fields(kind)]

        @functools.wraps(command)
        def flat(**given: Any) -> None:
            load = kind(**{name: given.pop(name) for name in names})
            command(load=load, **given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name != "load":
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            for one in dataclasses.fields(kind):
                default = inspect.Parameter.empty if one.default is dataclasses.MISSING else one.default
                parameters.append(
                    inspect.Parameter(
                        one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[one.name]
                    )
                )
        flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return flat

    return decorate
