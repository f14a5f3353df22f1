"""HiDe and its relatives on unmodified Hugging Face models: find what a question is about, and look closer."""

from typing import TYPE_CHECKING, Any

from hide import upstream  # noqa: F401 (before anything that speaks at import)

if TYPE_CHECKING:
    from hide.config import PRESETS, HiDeConfig
    from hide.pipeline import HiDe, HiDeResult

__all__ = ["PRESETS", "HiDe", "HiDeConfig", "HiDeResult"]

_HOME = {"HiDe": "hide.pipeline", "HiDeResult": "hide.pipeline", "HiDeConfig": "hide.config", "PRESETS": "hide.config"}


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; `hide --help` and the operators should not wait for it.
    if name not in _HOME:
        raise AttributeError(f"module 'hide' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
