"""The model families that are known: one adapter each, chosen by the checkpoint's `model_type`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hide.models.base import Adapter
    from hide.models.loading import load

__all__ = ["FAMILIES", "adapter_class", "load"]

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


def __getattr__(name: str) -> Any:
    # It imports transformers, for which the list of families should not wait.
    if name != "load":
        raise AttributeError(f"module 'hide.models' has no attribute {name!r}")
    return import_module("hide.models.loading").load
