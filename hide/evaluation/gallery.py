"""An evaluation as one HTML page: tables, and the questions that went wrong with what was looked at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hide.evaluation.data import BadRecord, Sample, distinct
from hide.evaluation.scoring import Scorer, score_methods, sound, verdict
from hide.images import load_image, to_image, to_tensor
from hide.methods import method_class, method_names, method_of
from hide.present.draw import CostPoint, boxed_picture, frontier_figure, panel_picture, small_picture
from hide.present.pages import Embedded, Section, count, embedded, render
from hide.questions import LETTERS
from hide.texts import listed
from hide_kernels.collage import collage

MOST = 24


def looked_at(records: Sequence[dict[str, Any]]) -> str:
    """The way that the page is about: the first that was asked of another method than the plain one."""
    asked = dict.fromkeys(way for record in records for way in record["replies"])
    return next((way for way in asked if method_of(way) != "plain"), "plain")


def failures(records: Sequence[dict[str, Any]], scorer: Scorer, most: int = MOST) -> list[dict[str, Any]]:
    """Records that the method got wrong, the telling ones first: right when asked plainly, then unreadable, errors, the
    others."""
    method = looked_at(records)

    def rank(record: dict[str, Any]) -> int:
        if record["error"]:
            return 2
        if method != "plain" and verdict(record, "plain", scorer):
            return 0
        return 1 if verdict(record, method, scorer) is None else 3

    wrong = [record for record in sound(records) if record["error"] or verdict(record, method, scorer) is not True]
    return sorted(wrong, key=rank)[:most]


def save_gallery(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    records: Sequence[dict[str, Any]],
    samples: Iterable[Sample | BadRecord],
    scorer: Scorer,
    settings: dict[str, Any],
) -> Path:
    """Write the page and return its path.

    Args:
        sections: shown first.
        records: of the questions.
        samples: the same data set again; the pictures of the questions shown are read from it.
        settings: name -> value, shown last.
    """
    method = looked_at(records)
    shown = {record["id"]: record for record in failures(records, scorer)}
    drawn: dict[str, dict[str, Any]] = {}
    for sample in distinct(samples) if shown else ():
        if isinstance(sample, Sample) and sample.id in shown and sample.id not in drawn:
            drawn[sample.id] = _failure(shown[sample.id], sample, scorer, method)
            if len(drawn) == len(shown):
                break
    page = render(
        "gallery.html",
        title=title,
        method=method,
        methods=_summaries(records),
        sections=sections,
        wrong=sum(bool(record["error"]) or verdict(record, method, scorer) is not True for record in sound(records)),
        shown=len(shown),
        failures=[drawn[name] for name in shown if name in drawn],
        letters=LETTERS,
        settings=settings,
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def frontier(records: Sequence[dict[str, Any]], scorer: Scorer) -> Section | None:
    """Accuracy with its intervals over tokens and over seconds, a line through the ways of each method; `None` where
    every question failed."""
    scores = {way: score for way, score in score_methods(records, scorer).items() if score.tokens > 0}
    if not scores:
        return None
    pictures = []
    for cost, about in (("tokens", "tokens of a question"), ("seconds", "seconds of a question")):
        series: dict[str, list[CostPoint]] = {}
        for way, score in scores.items():
            own = score.share
            point = CostPoint(max(getattr(score, cost), 1e-4), own.value, own.low, own.high)
            series.setdefault(method_of(way), []).append(point)
        drawn = embedded(frontier_figure(series, about), "PNG")
        pictures.append((drawn, f"Right answers over {cost}; the table has the figures", ""))
    about = "Right answers with 95 % intervals. A line joins one method on several views or with several settings."
    return Section("Accuracy over cost", about, pictures=pictures)


def _summaries(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of the methods that were asked; of one that is not installed here, none."""
    asked = dict.fromkeys(method_of(way) for record in records for way in record["replies"])
    return {name: method_class(name).summary if name in method_names() else "" for name in asked}


MARKS = {True: "right", False: "wrong", None: "no answer read"}


def _failure(record: dict[str, Any], sample: Sample, scorer: Scorer, about: str) -> dict[str, Any]:
    """One question for the page: its record, what is thought of each reply and how many boxes are behind it, what the
    method says of it, and pictures, or why there are none."""
    marks = {way: MARKS[verdict(record, way, scorer)] for way in record["replies"]}
    looks = {way: count(sum(map(len, boxes)), "box", "es") for way, boxes in record.get("boxes", {}).items()}
    failure: dict[str, Any] = {"record": record, "marks": marks, "looks": dict.fromkeys(marks, "") | looks}
    failure |= {"details": {}, "pictures": [], "others": [], "unreadable": None}
    if record["error"]:
        return failure
    details = record["details"].get(about, {})
    failure["details"] = {name: listed(value) for name, value in details.items()}
    try:
        shown = sample.image()
        loaded = [load_image(picture) for picture in (shown if isinstance(shown, tuple) else (shown,))]
    except (OSError, ValueError) as error:
        return failure | {"unreadable": str(error)}
    return failure | {
        "pictures": _pictures(loaded, record, sample, about),
        "others": _others(loaded, record, sample, about),
    }


_Drawn = tuple[Embedded, str, str]
"""A picture, what to say of it to those who do not see it, and its caption."""


def _pictures(loaded: list[Image.Image], record: dict[str, Any], sample: Sample, about: str) -> list[_Drawn]:
    pictures = []
    found = record["boxes"].get(about) or [[] for _ in loaded]
    for index, (picture, own) in enumerate(zip(loaded, found, strict=False)):
        small, boxes = small_picture(picture), _boxes(own)
        pictures.append(_boxed(small, picture.size, boxes, f"The boxes of {about}"))
        crop = collage(to_tensor(picture), boxes, fill=(255, 255, 255)).image if len(boxes) else None
        if crop is not None:
            pictures.append((embedded(small_picture(to_image(crop))), "Collage of the boxes", "What is in them"))
        if sample.boxes and not index:
            truth = boxed_picture(small, picture.size, torch.tensor(sample.boxes))
            pictures.append((embedded(truth), "Picture with the true boxes", "True boxes"))
    return pictures


def _others(loaded: list[Image.Image], record: dict[str, Any], sample: Sample, about: str) -> list[_Drawn]:
    """What the other ways looked at, small; those with the same boxes together, and none with the true ones."""
    pictures = []
    nothing_new = ("[]", json.dumps(sample.boxes))
    for index, picture in enumerate(loaded):
        by_boxes: dict[str, list[str]] = {}
        for way, boxes in record["boxes"].items():
            by_boxes.setdefault(json.dumps(boxes[index]), []).append(way)
        panel = panel_picture(small_picture(picture))
        for boxes, ways in by_boxes.items():
            if about not in ways and boxes not in nothing_new:
                pictures.append(_boxed(panel, picture.size, _boxes(json.loads(boxes)), ", ".join(ways)))
    return pictures


def _boxes(found: list[list[int]]) -> torch.Tensor:
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 4)


def _boxed(small: Image.Image, size: tuple[int, int], boxes: torch.Tensor, caption: str) -> _Drawn:
    return embedded(boxed_picture(small, size, boxes)), f"Picture with {count(len(boxes), 'box', 'es')}", caption
