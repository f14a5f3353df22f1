"""Models from configurations alone: the packaged ones need no network, and no weights are ever read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hide.models import FAMILIES, adapter_class
from hide.models.base import Adapter
from hide.models.quantised import INT4_GROUP, quantised_layers
from hide.models.quantised import WEIGHTS as QUANTISED
from hide.profiling.flops import add_flops, attention_flops
from hide.texts import one_line

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WEIGHTS = ("bf16", *QUANTISED)
# Input channels that CUDA's int4 kernel takes together.
INT4_COLUMNS = 1024
FLASH = "flash_attention_2"


def configurations() -> dict[str, Path]:
    """The packaged configurations, by the checkpoints' names."""
    folder = Path(str(resources.files("hide"))) / "models" / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read_config(model: str | Path) -> Any:
    """The configuration of a packaged name, a folder with config.json, or a JSON file.

    Raises `ValueError` where there is none, or its family has no adapter.
    """
    known = configurations()
    path = Path(model)
    path = known.get(str(model).rpartition("/")[2], path / "config.json" if path.is_dir() else path)
    if not path.is_file():
        raise ValueError(
            f"model: {model} is no packaged configuration, JSON file or folder with config.json; packaged are "
            f"{', '.join(known)}"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers checks the fields by a library with errors of its own
        raise ValueError(f"model: {path} is no configuration that transformers reads: {one_line(error)}") from None
    # Asked of the class: transformers 4.57 looks attributes of the instance up in its text_config first.
    family = type(config).model_type
    if family not in FAMILIES:
        raise ValueError(f"model: {model} is of type {family!r}; there are flows for {', '.join(FAMILIES)}")
    return config


def build(config: Any, dtype: torch.dtype, weights: str | None = None) -> Adapter:
    """A model with its adapter, on torch's default device; it has no tokenizer.

    Args:
        config: as `read_config` gives it.
        dtype: of the weights that are not quantised, and of activations.
        weights: `None` for random values. Else storages without values, for predictions: "bf16" for none quantised,
            "int8" and "int4" as `storages`.
    """
    adapter = adapter_class(type(config).model_type)
    make = getattr(transformers, adapter.model_class)._from_config
    if weights is None:
        model: Any = make(config, dtype=dtype)
    else:
        device = torch.get_default_device()
        # Weights before they are quantised or shared are never on the device.
        with torch.device("meta"):
            model = make(config, dtype=dtype)
            if weights != "bf16":
                storages(model, weights)
        materialise(model, device)
    processor = next(found for name in adapter.processors if (found := getattr(transformers, name, None)))
    # Prompts are made of ids here, so that no tokenizer is needed.
    return adapter(model, SimpleNamespace(chat_template=""), processor())  # type: ignore[arg-type]


def materialise(model: nn.Module, device: torch.device) -> None:
    """Storages without values for what is on the meta device; what is shared stays so."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[parameter] = nn.Parameter(empty, requires_grad=False)
                setattr(module, name, made[parameter])
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(buffer, torch.empty_like(buffer, device=device))


def parameter_count(config: Any) -> int:
    """Parameters of a configuration's model, shared ones once; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config, torch.bfloat16).model.parameters())


@contextmanager
def fused_attention(adapter: Adapter) -> Iterator[None]:
    """Inside, the model runs FlashAttention that allocates what it does, and computes nothing: for predictions.

    Output and log-sum-exp, no mask, windows of the vision encoder in one call. FlashAttention itself has no fake
    tensors, and scaled_dot_product_attention takes each window by itself.
    """
    config = adapter.model.config
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    before = [part._attn_implementation_internal for part in parts]
    try:
        for part in parts:
            # The setter wants the package to be installed.
            part._attn_implementation_internal = FLASH
        with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {FLASH: _flash_storages}):
            yield
    finally:
        for part, name in zip(parts, before, strict=True):
            part._attn_implementation_internal = name


def _flash_storages(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **more: Any) -> Any:
    batch, heads, rows, _channels = query.shape
    ends = more.get("cu_seq_lens_q")
    if ends is None:
        add_flops(attention_flops(batch * heads, rows, key.shape[2], query, value))
    else:
        for first, last in pairwise(ends.tolist()):
            add_flops(attention_flops(batch * heads, last - first, last - first, query, value))
    output = query.new_empty(batch, rows, heads, value.shape[-1])
    log_sum_exp = query.new_empty(batch, heads, rows, dtype=torch.float32)
    del log_sum_exp
    return output, None


@contextmanager
def eager_decoder(adapter: Adapter) -> Iterator[None]:
    """Inside, the decoder's layers make attention matrices; the vision encoder goes on as it is."""
    text = adapter.language_model.config
    before = text._attn_implementation_internal
    text._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        text._attn_implementation_internal = before


# -- weight-only quantisation ---------------------------------------------------------------------------------------


def storages(model: Any, weights: str) -> None:
    """Replace the layers that `quantised_layers` names by storages of quantised ones and what they allocate on a GPU.

    As torchao's formats run without compilation. "int8": a weight is turned into the activations' dtype for the
    product, which is then scaled. "int4": a kernel reads packed weights, scales and zero points, so that nothing is
    dequantised in memory.
    """
    kind = {"int8": Int8Linear, "int4": Int4Linear}[weights]
    for name, layer in quantised_layers(model, weights).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, kind(layer))


class Int8Linear(nn.Module):
    """Storages of an int8 weight, and a scale and a zero point for each output channel."""

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        rows, columns = layer.weight.shape
        self.in_features, self.out_features, self.bias = columns, rows, layer.bias
        self.register_buffer("codes", torch.zeros(rows, columns, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(rows))
        # Kept, though all are zero.
        self.register_buffer("zeros", torch.zeros(rows, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.codes.to(x.dtype)) * self.scales.to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)


class Int4Linear(nn.Module):
    """Storages of two weights a byte, and a scale and a zero point for each group of input channels.

    Input channels are filled up to a multiple of 1,024, of weights and activations. Its forward allocates what the
    kernel takes and the result, and computes nothing.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        rows, columns = layer.weight.shape
        self.in_features, self.out_features, self.bias = columns, rows, layer.bias
        self.columns = -(-columns // INT4_COLUMNS) * INT4_COLUMNS
        self.register_buffer("codes", torch.zeros(rows, self.columns // 2, dtype=torch.uint8))
        self.register_buffer("scales_and_zeros", layer.weight.new_ones(self.columns // INT4_GROUP, rows, 2))

    def forward(self, x: Tensor) -> Tensor:
        filled = x.new_empty(*x.shape[:-1], self.columns)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        del filled
        add_flops(2 * y.numel() * self.in_features)
        return y if self.bias is None else y.add_(self.bias)
