"""Weight-only int8 and int4 by torchao: which layers are quantised, in which format, and what that needs.

A layer's weight becomes a tensor that only its own product can read; activations keep their dtype. On a GPU int4 takes
the layout of PyTorch's own kernel, so that nothing but torchao is needed.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import torch
import transformers
from torch import nn

Weights = Literal["int8", "int4"]
"""Formats of quantised weights: a scale for each output channel, or scale and zero point for `INT4_GROUP` channels."""
WEIGHTS: tuple[str, ...] = get_args(Weights)
# Input channels that share a scale and a zero point.
INT4_GROUP = 64
# Output channels that the CPU's int4 kernel takes together; the GPU's takes 8.
INT4_ROWS = 16
INSTALL = "pip install 'hide-kernels[quant]'"


def quantised_layers(model: Any, weights: str) -> dict[str, nn.Linear]:
    """The layers of a model, on any device, that `weights` means, by name.

    Every `nn.Linear` but the output head; with int4 only those whose input channels are whole groups of `INT4_GROUP`
    and whose output channels are a multiple of 16, which the kernels of both devices take.
    """
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear
        and layer is not head
        and (weights == "int8" or not (layer.in_features % INT4_GROUP or layer.out_features % INT4_ROWS))
    }


def loading(model_class: Any, config: Any, weights: str, device: torch.device) -> Any:
    """The `quantization_config` with which `from_pretrained` quantises each layer as soon as it is read.

    Args:
        model_class: of transformers; config: of the checkpoint.
        weights, device: as `check` has allowed them.

    Raises `ValueError` for a checkpoint that is quantised already.
    """
    already = getattr(config, "quantization_config", None)
    if already is not None:
        method = already.get("quant_method") if isinstance(already, dict) else already.quant_method
        raise ValueError(
            f"weights: got {weights!r}, but the checkpoint is quantised already ({getattr(method, 'value', method)}); "
            "leave weights out, or take the checkpoint that is not quantised"
        )
    with torch.device("meta"):
        model = model_class._from_config(config)
    chosen = quantised_layers(model, weights)
    kept = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name not in chosen]
    return transformers.TorchAoConfig(_format(weights, device), modules_to_not_convert=kept)


def quantise(model: Any, weights: str, device: torch.device) -> None:
    """Move a model to a device, its layers one by one and quantised there, so that the full weights never are."""
    from torchao.quantization import quantize_

    for layer in quantised_layers(model, weights).values():
        quantize_(layer.to(device), _format(weights, device))
    model.to(device)


def check(weights: str, dtype: torch.dtype, device: torch.device) -> None:
    """`ValueError` for a format that there is not, or that is not served here, with what to do about it."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights: got {weights!r}, want one of {', '.join(WEIGHTS)}, or none")
    missing = [name for name in ("torchao", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"weights: {weights} needs {' and '.join(missing)}, not installed here; {INSTALL}")
    if dtype is torch.float16:
        # int8 is multiplied first and scaled then: sums of products with codes up to 127 leave float16's range.
        raise ValueError(f"dtype: got float16, which {weights} weights do not take; want bfloat16, or float32")
    if weights == "int4":
        if device.type not in ("cuda", "cpu"):
            raise ValueError(f"device: there is no int4 kernel for {device.type}; want cuda or cpu, or int8 weights")
        if device.type == "cuda" and dtype is not torch.bfloat16:
            raise ValueError(f"dtype: got {str(dtype)[6:]}, but on a GPU int4 weights take bfloat16 alone")
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"device: int4 needs compute capability 8.0 (Ampere), {name} has less; want int8 weights")
    _format(weights, device)


def _format(weights: str, device: torch.device) -> Any:
    """torchao's configuration; it leaves the compiler's settings, which are everybody's, as they are."""
    try:
        if weights == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return Int8WeightOnlyConfig(set_inductor_config=False)
        if device.type == "cpu":
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            return PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP, set_inductor_config=False)
        from torchao.quantization import Int4WeightOnlyConfig

        # torchao's other layouts for CUDA want the package mslk.
        return Int4WeightOnlyConfig(
            group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    except ImportError as error:
        raise ValueError(f"weights: this torchao has no {weights} for {device.type} ({error}); {INSTALL}") from None
