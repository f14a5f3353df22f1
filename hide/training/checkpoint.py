"""A checkpoint in the released layout: the model's own files, and the branches among its weights (docs/q_zoom.md)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hide.methods.q_zoom.branches import Branches
from hide.models.checkpoint import CONFIG, GENERATION, INDEX, PROCESSOR, TOKENIZER, TRAINED, WEIGHTS, find_file
from hide.training.loop import put, put_tensors

_FIRST, _HEAD, _MATRIX = "layers.0.input_layernorm.weight", "lm_head.weight", "layers.0.self_attn.q_proj.weight"


def save_checkpoint(
    folder: Path, base: str | Path, branches: Branches, tuned: Mapping[str, Tensor] | None = None
) -> None:
    """Write a folder that `hide.models.load` and `hide.methods.q_zoom` read.

    Written beside what is there and put in its place when it is whole.

    Args:
        base: the checkpoint of the model. Branches that it has are left out; the new ones get the prefix that its text
            model's weights have, and its dtype.
        tuned: weights of its text model that have changed, by their names in there, and `lm_head.weight`, where that is
            a weight of its own.

    Raises `ValueError` as `check_place`.
    """
    check_place(folder, base)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name in {*CONFIG, *GENERATION, *PROCESSOR, *TOKENIZER}:
        if (file := find_file(base, name)) is not None:
            shutil.copyfile(file, new / name)
    index = find_file(base, INDEX)
    shards = {WEIGHTS[0]} if index is None else set(_json(index)["weight_map"].values())
    places: dict[str, str] = {}
    for shard in sorted(shards):
        with _opened(base, shard) as opened:
            places |= {name: shard for name in opened.keys() if not TRAINED.search(name)}  # noqa: SIM118 (no dict)
    first = next(name for name in sorted(places) if name.endswith(_FIRST) and "visual" not in name)
    prefix = first.removesuffix(_FIRST)
    # Checkpoints of before transformers 5 may have the head, too, below the text model's name.
    head = next((name for name in places if name.endswith(_HEAD)), _HEAD)
    changed = {head if name == _HEAD else prefix + name: value for name, value in (tuned or {}).items()}
    if "embed_tokens.weight" in (tuned or {}) and head in places:
        # Tied, and written down twice: transformers ties what is the same alone.
        changed[head] = changed[f"{prefix}embed_tokens.weight"].clone()
    if unknown := sorted(changed.keys() - places.keys()):
        raise ValueError(f"model: {base} has no weight {unknown[0]}, which was tuned")
    with _opened(base, places[prefix + _MATRIX]) as opened:
        dtype = opened.get_tensor(prefix + _MATRIX).dtype
    last = max(shards)
    for shard in sorted(shards):
        file = find_file(base, shard)
        assert file is not None
        tensors = {name: tensor for name, tensor in load_file(file).items() if places.get(name) == shard}
        tensors |= {name: changed[name].to("cpu", tensors[name].dtype) for name in tensors.keys() & changed.keys()}
        if shard == last:
            tensors |= {f"{prefix}{name}": value.to("cpu", dtype) for name, value in weights(branches).items()}
            places |= dict.fromkeys(tensors, shard)
        put_tensors(new / shard, {name: one.contiguous() for name, one in tensors.items()}, {"format": "pt"})
        (new / shard).chmod(0o644)  # it is written for its owner alone
    if index is not None:
        size = {"metadata": {"total_size": sum((new / shard).stat().st_size for shard in shards)}}
        put(new / INDEX, json.dumps({**size, "weight_map": dict(sorted(places.items()))}, indent=2).encode())
    config = {**_json(new / CONFIG[0]), **fields(branches)}
    put(new / CONFIG[0], (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def weights(branches: Branches) -> dict[str, Tensor]:
    """All weights of branches, by their names in a text model; those too that nothing reads, as released."""
    return {
        f"{part}.{name}": value.detach()
        for part, module in branches.modules().items()
        for name, value in module.state_dict().items()
        if "inv_freq" not in name
    }


def fields(branches: Branches) -> dict[str, Any]:
    """What config.json says of them at its top level."""
    return {
        "enable_twig": True,
        "twig_K": branches.layer,
        "twig_T": len(branches.regions),
        "roi_source": "qk",
        "roi_loss": "bce",
        "roi_super_type": "v1",
        "roi_multi_head": True,
        "roi_post_training": False,
        "reuse_src_pos": branches.reuse_src_pos,
        "enable_high_res": branches.gate is not None,
    }


def check_place(folder: Path, base: str | Path | None) -> None:
    """`ValueError` where a checkpoint must not take a folder's place: it is the base, or none of this module's."""
    if not folder.exists():
        return
    if base is not None and Path(base).exists() and folder.samefile(base):
        raise ValueError(f"out: {folder} is the model that is trained, and would be replaced; use another folder")
    if not (folder / CONFIG[0]).is_file() or "enable_twig" not in _json(folder / CONFIG[0]):
        raise ValueError(f"out: {folder} is no checkpoint of Q-Zoom's, and would be replaced; use another folder")


def _opened(base: str | Path, shard: str) -> Any:
    file = find_file(base, shard)
    if file is None:
        raise FileNotFoundError(f"model: {base} has no {shard}")
    return safe_open(file, framework="pt")


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
