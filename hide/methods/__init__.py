"""The methods: HiDe and its relatives, and those of other packages.

A package registers its own by an entry point of the group `hide.methods`, in its pyproject.toml::

    [project.entry-points."hide.methods"]
    my-method = "my_package.my_module:MyMethod"
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hide.methods.base import Method

__all__ = ["BUILT_IN", "GROUP", "TRAINED", "method_class", "method_names", "method_of"]

GROUP = "hide.methods"
BUILT_IN = {
    "plain": "hide.methods.plain:Plain",
    "hide": "hide.methods.hide.method:HiDe",
    "vicrop": "hide.methods.vicrop:ViCrop",
    "zoom-refine": "hide.methods.zoom_refine.method:ZoomRefine",
    "q-zoom": "hide.methods.q_zoom.method:QZoom",
    "tiles": "hide.methods.ablations:Tiles",
    "masked": "hide.methods.ablations:Masked",
    "crop": "hide.methods.ablations:OneCrop",
    "no-prior": "hide.methods.ablations:WithoutPrior",
    "true-boxes": "hide.methods.ablations:TrueBoxes",
    "zoom-refine-random": "hide.methods.ablations:RandomBox",
}
"""Name -> where its class is, which is loaded when it is needed."""
TRAINED = {"q-zoom": "enable_twig"}
"""Those that want trained parts, and the field of config.json by which a checkpoint says that it has them: of other
checkpoints they are asked by name alone."""


def method_names() -> tuple[str, ...]:
    """All that can be asked for: ours, then those of other packages that are installed."""
    return tuple(dict.fromkeys([*BUILT_IN, *_registered()]))


def method_of(way: str) -> str:
    """The method's name in that of a way of answering, which settings may follow: "hide" of "hide@auto[gate=3]"."""
    return re.split(r"[@\[]", way, maxsplit=1)[0]


def method_class(name: str) -> type[Method[Any]]:
    """The class of a method.

    Raises `ValueError` for an unknown name, and for an entry point that cannot be loaded or is no method with that name
    and a summary.
    """
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        found: type[Method[Any]] = getattr(import_module(module), attribute)
        return found
    point = _registered().get(name)
    if point is None:
        raise ValueError(f"method: got {name!r}, want one of {', '.join(method_names())}")
    from hide.methods.base import Method

    try:
        loaded = point.load()
    except Exception as error:  # whatever another package does when it is imported
        raise ValueError(f"method: {name} ({point.value}) cannot be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Method)) or getattr(loaded, "name", None) != name:
        raise ValueError(f"method: {name} ({point.value}) is no subclass of hide.methods.base.Method with that name")
    if not isinstance(getattr(loaded, "summary", None), str):
        raise ValueError(f"method: {name} ({point.value}) has no summary, one line about it")
    return loaded


@cache
def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
