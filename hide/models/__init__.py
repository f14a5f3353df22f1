"""The model families that HiDe knows: one adapter each, chosen by the checkpoint's `model_type`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hide.models.base import Adapter
    from hide.models.quantised import Weights

FAMILIES = {
    "qwen2_5_vl": "hide.models.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "hide.models.qwen3_vl:Qwen3VL",
    "internvl": "hide.models.internvl:InternVL",
    "llava": "hide.models.llava:Llava",
    "llava_onevision": "hide.models.llava_onevision:LlavaOnevision",
}
"""`model_type` of a checkpoint's config -> where its adapter is, which is loaded when it is needed."""


def adapter_class(model_type: str) -> type[Adapter]:
    """The adapter of a family in `FAMILIES`."""
    module, name = FAMILIES[model_type].split(":")
    return getattr(import_module(module), name)


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
    from hide.models.checkpoint import read_config

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
    adapter = adapter_class(model_type)
    return adapter.from_pretrained(
        path, device=device, dtype=dtype, attn_implementation=attn_implementation, weights=weights
    )
