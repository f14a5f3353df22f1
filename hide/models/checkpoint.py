"""Checkpoints as they lie on disk: every part is read whole, or one line names the file and what is wrong with it.

transformers gives weights that a checkpoint lacks random values, and takes its own defaults where
generation_config.json cannot be read; both would be answers that look like the model's.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.utils import cached_file

from hide.texts import one_line

CONFIG = ("config.json",)
GENERATION = ("generation_config.json",)
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
TEMPLATE = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    *TEMPLATE,
)
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX)
# What methods train beside a model, and read themselves (`hide.methods.q_zoom.branches`).
TRAINED = re.compile(r"(?:^|\.)((?:twig_layers|twig_norm|twig_head|high_res_layers|high_res_head)\..+)$")
# Settings of generation_config.json that a greedy reply cannot follow, with the values that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "constraints": (None, []),
    "dola_layers": (None,),
    "force_words_ids": (None, []),
    "guidance_scale": (None, 1.0),
    "stop_strings": (None, []),
    "token_healing": (None, False),
}
# Names that an error lists before it only counts.
NAMED = 4


@contextmanager
def reading(path: str | Path, part: str, names: Sequence[str]) -> Iterator[None]:
    """Inside, whatever goes wrong is one line about the file of `names` that is damaged, or about `part`.

    Raises `OSError` for files that are not there or cannot be opened, `ValueError` for what they hold.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        damage = _damage(path, names)
        if damage is None:
            there = [name for name in names if find_file(path, name) is not None]
            lacks = "" if names[0] in there else f" (there is no {names[0]})"
            damage = f"{Path(path, *there[:1])}: the {part} cannot be used{lacks}: {one_line(error)}"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"model: {damage}") from error


def read_config(path: str | Path) -> Any:
    """The checkpoint's configuration; generation_config.json, which transformers skips where broken, is read too.

    Raises as `reading`.
    """
    with reading(path, "configuration", CONFIG):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    damage = _damage(path, GENERATION)
    if damage is not None:
        raise ValueError(f"model: {damage}")
    if find_file(path, GENERATION[0]) is not None:
        with reading(path, "generation settings", GENERATION):
            check_settings(GenerationConfig.from_pretrained(path))
    return config


def check_settings(settings: GenerationConfig) -> None:
    """`ValueError` for what would fail in the first reply: `UNSERVED` settings, and values of another kind."""
    for name, off in UNSERVED.items():
        if (value := getattr(settings, name, None)) not in off:
            raise ValueError(f"{name}: got {value!r}, which replies here do not follow; take it out")
    ends = settings.eos_token_id
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends] * (ends is not None))):
        raise ValueError(f"eos_token_id: got {ends!r}, want a token's id or a list of them")
    penalty = settings.repetition_penalty
    if penalty is not None and not (isinstance(penalty, (int, float)) and penalty > 0):
        raise ValueError(f"repetition_penalty: got {penalty!r}, want a number above 0")


def read_weights(model_class: Any, path: str | Path, **arguments: Any) -> tuple[Any, tuple[str, ...]]:
    """`from_pretrained` of safetensors with these arguments, and the names of weights that nobody has a place for.

    Raises `ValueError` for weights that the checkpoint lacks or has in other shapes, else as `reading`.
    """
    with reading(path, "weights", WEIGHTS), _unreported():
        model, report = model_class.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Refused below, by name.
            ignore_mismatched_sizes=True,
            **arguments,
        )
    return model, _checked(path, report)


@contextmanager
def _unreported() -> Iterator[None]:
    """Inside, transformers logs no table of weights that it lacks or has no place for: `_checked` says it, and some of
    them find a place afterwards."""
    logger = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in ("LOAD REPORT", "Some weights of"))

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _checked(path: str | Path, report: Mapping[str, Any]) -> tuple[str, ...]:
    """What is left over in transformers' report of what it loaded; tied weights are not missing in it."""
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"model: {path} lacks {listed(missing)}; random ones would take their place")
    if wrong := sorted(report["mismatched_keys"]):
        # transformers 4.57 gives names alone, 5 the shapes too.
        name, *shapes = (wrong[0],) if isinstance(wrong[0], str) else wrong[0]
        reason = " of shape {}, and config.json wants {}".format(*map(tuple, shapes)) if shapes else " of another shape"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"model: {path} has {name}{reason}{more}; weights and config.json are not of one model")
    if failed := report["error_msgs"]:
        raise ValueError(f"model: {path}: {one_line(failed[0])}")
    return tuple(sorted(name for name in report["unexpected_keys"] if not TRAINED.search(name)))


def listed(names: Sequence[str]) -> str:
    """How many weights, and the names of the first."""
    shown = ", ".join(names[:NAMED])
    return f"{len(names)} weight{'s' * (len(names) > 1)} ({shown}{', ...' if len(names) > NAMED else ''})"


def find_file(path: str | Path, name: str) -> Path | None:
    """A file of a checkpoint's folder, or of what the cache holds of a hub name; `None` where there is none."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.exists() else None
    try:
        found = cached_file(str(path), name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # not in the cache, or no repository's name
        return None
    return None if found is None else Path(found)


def _damage(path: str | Path, names: Sequence[str]) -> str | None:
    """What is wrong with the first of these files that is damaged."""
    for name in names:
        file = find_file(path, name)
        if file is not None and (reason := _reason(file)) is not None:
            return f"{file} {reason}"
        if name == INDEX and file is not None:
            shards = sorted(set(json.loads(file.read_text(encoding="utf-8")).get("weight_map", {}).values()))
            for shard in shards:
                if find_file(path, shard) is None:
                    return f"{file.parent / shard} is not there; {INDEX} names it"
            if (damage := _damage(path, shards)) is not None:
                return damage
    return None


def _reason(file: Path) -> str | None:
    """Why a file cannot be what its name says; `None` for one that can."""
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
        if not start:
            return "is empty"
        if start.startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer and not the file that it stands for; fetch that with `git lfs pull`"
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt"):
                return None
        if file.suffix in (".json", ".jinja", ".txt"):
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".json" and not isinstance(found := json.loads(text), dict):
                return f"holds {str(found)[:20]!r}, want a JSON object"
    except json.JSONDecodeError as error:
        return f"is not JSON ({error})"
    except Exception as error:  # safetensors' own error is none of Python's kinds
        return f"is damaged or cut off ({one_line(error)})"
    return None
