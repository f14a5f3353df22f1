"""Puts functions in the place of others, and the others back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any

from hide.drop_in import internvl, qwen

# By name, those that the released code has under it.
FUNCTIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "process": (qwen.process,),
    "process_notsave": (internvl.process_notsave,),
    "find_top_n_attended_regions": (qwen.find_top_n_attended_regions, internvl.find_top_n_attended_regions),
    "merge_overlapping_bboxes": (qwen.merge_overlapping_bboxes,),
    "decompose_bbox_by_alpha": (qwen.decompose_bbox_by_alpha,),
    "compact_and_center_with_relative_pos": (qwen.compact_and_center_with_relative_pos,),
    "from_img_and_att_get_cropbox": (qwen.from_img_and_att_get_cropbox,),
}


class Replaced:
    """What was replaced; `restore`, or leaving a `with` block, puts the originals back.

    replaced: "module.name" of each. left: "module.name" of each function that takes other arguments than ours, and
    these arguments; it runs as before.
    """

    def __init__(self) -> None:
        self.replaced: list[str] = []
        self.left: dict[str, str] = {}
        self._originals: list[tuple[Any, str, Any, bool]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or class."""
        self._originals.append((owner, name, getattr(owner, name), name in vars(owner)))
        self.replaced.append(f"{owner.__name__}.{name}")
        setattr(owner, name, value)

    def restore(self) -> None:
        """Put the originals back; the second time nothing happens."""
        while self._originals:
            owner, name, value, own = self._originals.pop()
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)

    def __enter__(self) -> Replaced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"Replaced({', '.join(self.replaced)}; left: {', '.join(self.left) or 'none'})"


def install(*modules: ModuleType) -> Replaced:
    """Replace the released functions in modules that hold code of published HiDe, whether defined or imported there.

    A function is replaced where it takes the arguments of ours, by their names; one that was changed to take others is
    left, and named in the result. Functions find the names that they call in their own module, so pass every module
    that calls them::

        drop_in.install(Get_box)

    Returns:
        `Replaced`, whose `restore()` undoes it.

    Raises:
        TypeError: for anything but modules.
        ValueError: for a module with none of the names, or whose functions all take other arguments.
    """
    if not modules:
        raise TypeError("modules: got none, want the modules that call the released functions")
    for module in modules:
        if not isinstance(module, ModuleType):
            raise TypeError(f"modules: got {type(module).__name__}, want modules")
    done = Replaced()
    try:
        for module in modules:
            _install(module, done)
    except ValueError:
        done.restore()
        raise
    return done


@contextmanager
def installed(*modules: ModuleType) -> Iterator[Replaced]:
    """`install` for the length of a `with` block."""
    with install(*modules) as done:
        yield done


def _install(module: ModuleType, done: Replaced) -> None:
    names = [name for name in FUNCTIONS if callable(getattr(module, name, None))]
    if not names:
        raise ValueError(f"modules: {module.__name__} has none of {', '.join(FUNCTIONS)}")
    left = {}
    for name in names:
        original = getattr(module, name)
        if original in FUNCTIONS[name]:
            continue
        wanted = _arguments(original)
        ours = next((own for own in FUNCTIONS[name] if _arguments(own) == wanted), None)
        if ours is None:
            left[f"{module.__name__}.{name}"] = ", ".join(wanted)
        else:
            done.put(module, name, ours)
    if len(left) == len(names):
        taken = "; ".join(f"{name}({arguments})" for name, arguments in left.items())
        raise ValueError(f"modules: all functions of {module.__name__} take other arguments than ours: {taken}")
    done.left |= left


def _arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what can be given by position, and of what collects the rest; our keywords are additions."""
    parameters: Iterable[inspect.Parameter] = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.KEYWORD_ONLY)
