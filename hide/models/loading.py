"""Loads a checkpoint: its parts one by one, each with an error that names the file, onto the device that is asked for.

`AutoProcessor` would need torchvision, which has no CPU build.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from transformers import AutoTokenizer
from transformers.utils import cached_file, is_flash_attn_2_available

from hide.models import FAMILIES, adapter_class
from hide.models.base import Adapter
from hide.models.checkpoint import PROCESSOR, TEMPLATE, TOKENIZER, read_config, read_weights, reading
from hide.models.devices import named_device
from hide.models.quantised import Weights, check, loading

A = TypeVar("A", bound=Adapter)


def load(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    weights: Weights | None = None,
) -> Adapter:
    """Load a checkpoint folder or hub name with the adapter of its family.

    Args:
        path: a folder with config.json and safetensors, or the name of a repository on the hub.
        device: "cuda", "cuda:1", "cpu", ...; `None`: CUDA where there is one.
        dtype: "float32", "bfloat16", "float16"; "auto": the checkpoint's on a GPU, float32 on a CPU.
        attn_implementation: "sdpa", "eager", "flash_attention_2"; `None`: FlashAttention on a GPU that has it, else
            sdpa.
        weights: "int8" or "int4": quantise the linear layers but the output head while they are loaded, by torchao
            (extra `quant`); `None`: as the checkpoint has them. Then "auto" is bfloat16 on a GPU.

    Raises:
        FileNotFoundError, OSError: there is no such checkpoint, or a file of it is missing.
        ValueError: a family that HiDe does not know, a device or dtype that does not exist here, weights that are
            not served there or quantised already, a file that is damaged, and weights that the checkpoint lacks or has
            in other shapes. What it has too much is in the adapter's `notes`.
    """
    if not str(path).strip():
        raise ValueError("model: got no name, want a Hugging Face checkpoint folder or a hub name")
    folder = Path(path)
    try:
        there = folder.exists()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise OSError(f"model: {error}") from None
    if not there and (folder.is_absolute() or str(path).startswith((".", "~"))):
        raise FileNotFoundError(
            f"model: there is no folder {path}; want a Hugging Face checkpoint folder or a hub name"
        )
    if there and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model: {path} has no config.json; want a Hugging Face checkpoint folder")
    # Asked of the class: transformers 4.57 looks attributes of the instance up in its text_config first.
    model_type = type(read_config(path)).model_type
    if model_type not in FAMILIES:
        raise ValueError(
            f"model: {path} is of type {model_type!r}; HiDe knows {', '.join(FAMILIES)} (see hide models). "
            "Attention rows of any model: hide_kernels.integrations.transformers.capture_attention"
        )
    return load_family(
        adapter_class(model_type),
        path,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        weights=weights,
    )


def load_family(
    family: type[A],
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    weights: Weights | None = None,
) -> A:
    """As `load`, with the adapter of `family`; safetensors only, no remote code."""
    target = named_device(device)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: got {dtype!r}, want auto, float32, bfloat16 or float16")
    if dtype == "auto" and (weights is not None or target.type == "cpu"):
        dtype = "float32" if target.type == "cpu" else "bfloat16"
    config = read_config(path)
    quantised = {}
    if weights is not None:
        check(weights, getattr(torch, dtype), target)
        # Each layer goes to its device by itself and is quantised there: the full weights are never in one place.
        quantised = {
            "quantization_config": loading(getattr(transformers, family.model_class), config, weights, target),
            "device_map": {"": target},
        }
    # What is small is read first: it may be damaged, and weights take their time.
    with reading(path, "tokenizer", TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _legacy_chat_template(path)
    with reading(path, "image processor", PROCESSOR):
        image_processor = family.processor_class().from_pretrained(path)
    if attn_implementation is None:
        flash = target.type == "cuda" and dtype != "float32" and is_flash_attn_2_available()
        attn_implementation = "flash_attention_2" if flash else "sdpa"
    model, left_out = read_weights(
        getattr(transformers, family.model_class),
        path,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attn_implementation,
        **quantised,
    )
    with reading(path, "chat template", TEMPLATE):
        adapter = family(model.to(target), tokenizer, image_processor)
        adapter.check_template()
    with reading(path, "tokenizer", TOKENIZER):
        adapter.check_tokenizer()
    with reading(path, "image processor", PROCESSOR):
        adapter.check_image_processor()
    adapter.source, adapter.left_out = path, left_out
    return adapter


def _legacy_chat_template(path: str | Path) -> str | None:
    """The template of checkpoints that keep it in a file of the processor's, or `None`."""
    for name in ("chat_template.jinja", "chat_template.json"):
        file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            text = Path(file).read_text(encoding="utf-8")
            return json.loads(text)["chat_template"] if name.endswith(".json") else text
    return None
