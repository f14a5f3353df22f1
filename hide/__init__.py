"""HiDe and its relatives on unmodified Hugging Face models: find what a question is about, and look closer."""

from typing import TYPE_CHECKING, Any

from hide import upstream  # noqa: F401 (before anything that speaks at import)

if TYPE_CHECKING:
    from hide.methods.base import Answer, Evidence, Method
    from hide.methods.hide.config import PRESETS, HiDeConfig
    from hide.methods.hide.method import HiDe
    from hide.methods.plain import Plain
    from hide.presets import Preset
    from hide.session import open_session

__all__ = ["PRESETS", "Answer", "Evidence", "HiDe", "HiDeConfig", "Method", "Plain", "Preset", "open_session"]

_HOME = {
    **dict.fromkeys(("Answer", "Evidence", "Method"), "hide.methods.base"),
    "HiDe": "hide.methods.hide.method",
    **dict.fromkeys(("HiDeConfig", "PRESETS"), "hide.methods.hide.config"),
    "Plain": "hide.methods.plain",
    "Preset": "hide.presets",
    "open_session": "hide.session",
}


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; `hide --help` and the operators should not wait for it.
    if name not in _HOME:
        raise AttributeError(f"module 'hide' has no attribute {name!r}")
    from importlib import import_module

    from hide.extra import lacking

    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if (reason := lacking(error)) is None:
            raise
        raise ImportError(reason) from None
