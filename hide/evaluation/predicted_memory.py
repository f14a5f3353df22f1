"""What ways of answering take of memory at their peak, predicted for the pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hide.methods.base import Method
from hide.presets import RunSettings
from hide.profiling.runs import Settings, predict_flow
from hide.profiling.workload import Workload

# The flow of `hide.profiling` that does what a method does; the others have none.
_FLOWS = {
    "plain": "plain",
    "q-zoom": "q-zoom",
    **dict.fromkeys(("hide", "no-prior", "tiles", "masked", "crop"), "ours"),
}


class Held(NamedTuple):
    """What a prediction takes of a way of answering, without its model. config: of the model, of transformers."""

    flow: str
    config: Any
    settings: Settings
    run: RunSettings


def held(method: Method[Any], weights: str | None = None) -> Held | None:
    """`None` for a method that has no flow; weights: "int8" or "int4", where they are quantised."""
    if method.name not in _FLOWS:
        return None
    settings = Settings(str(method.model.dtype).removeprefix("torch."), weights or "bf16")
    return Held(_FLOWS[method.name], method.model.model.config, settings, method.preset.run)


def predicted_memory(ways: Mapping[str, Held | None], records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Bytes at the peak of each way, for the largest image and the most that was shown beside one.

    Left out are ways without a flow, those that were not asked, those of which the model is none that can be predicted,
    and all of them where a question has several images.
    """
    sound = [record for record in records if not record["error"]]
    sizes = [size for record in sound for size in record["images"]]
    if len(sizes) != len(sound) or not sizes:
        return {}
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    found: dict[str, int] = {}
    # Ways may differ in settings that take no memory.
    known: dict[tuple[int, str, Workload, Settings], int | None] = {}
    for name, way in ways.items():
        shown = [record["shown"][name] for record in sound if name in record.get("shown", ())]
        if way is None or not shown:
            continue
        work = Workload(
            (height, width),
            way.run.view(width, height),
            collage=max(1, *shown),
            chunk=way.run.prefill_chunk,
            offload=way.run.offload_kv,
        )
        key = id(way.config), way.flow, work, way.settings
        if key not in known:
            known[key] = _peak(way, work)
        if (peak := known[key]) is not None:
            found[name] = peak
    return found


def _peak(way: Held, work: Workload) -> int | None:
    try:
        return predict_flow(way.config, way.flow, work, way.settings, owners=False).report.peak
    except ValueError:  # more tokens than the model takes, or one that the profiler does not know
        return None
