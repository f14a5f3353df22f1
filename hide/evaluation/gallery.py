"""An evaluation as one HTML page: tables, and the questions that went wrong with what was looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hide.evaluation.data import BadRecord, Sample, distinct
from hide.evaluation.scoring import Scorer, sound, verdict
from hide.images import load_image, to_image, to_tensor
from hide.methods import method_class, method_names
from hide.present.draw import boxed_picture, small_picture
from hide.present.pages import Embedded, embedded, render
from hide.present.table import ResultTable
from hide.questions import LETTERS
from hide.texts import listed
from hide_kernels.collage import collage

MOST = 24


def looked_at(records: Sequence[dict[str, Any]]) -> str:
    """The method that the page is about: the first that was asked besides the plain one."""
    asked = dict.fromkeys(method for record in records for method in record["replies"])
    return next((method for method in asked if method != "plain"), "plain")


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
    tables: Sequence[ResultTable],
    records: Sequence[dict[str, Any]],
    samples: Iterable[Sample | BadRecord],
    scorer: Scorer,
    settings: dict[str, Any],
) -> Path:
    """Write the page and return its path.

    Args:
        tables: shown first.
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
        tables=tables,
        wrong=sum(bool(record["error"]) or verdict(record, method, scorer) is not True for record in sound(records)),
        shown=len(shown),
        failures=[drawn[name] for name in shown if name in drawn],
        letters=LETTERS,
        settings=settings,
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def _summaries(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of the methods that were asked; of one that is not installed here, none."""
    asked = dict.fromkeys(method for record in records for method in record["replies"])
    return {name: method_class(name).summary if name in method_names() else "" for name in asked}


MARKS = {True: "right", False: "wrong", None: "no answer read"}


def _failure(record: dict[str, Any], sample: Sample, scorer: Scorer, about: str) -> dict[str, Any]:
    """One question for the page: its record, what is thought of each reply, what the method says of it, and pictures,
    or why there are none."""
    marks = {method: MARKS[verdict(record, method, scorer)] for method in record["replies"]}
    failure: dict[str, Any] = {"record": record, "marks": marks, "details": {}, "pictures": [], "unreadable": None}
    if record["error"]:
        return failure
    details = record["details"].get(about, {})
    failure["details"] = {name: listed(value) for name, value in details.items()}
    try:
        shown = sample.image()
        loaded = [load_image(picture) for picture in (shown if isinstance(shown, tuple) else (shown,))]
    except (OSError, ValueError) as error:
        return failure | {"unreadable": str(error)}
    return failure | {"pictures": _pictures(loaded, record, sample, about)}


def _pictures(
    loaded: list[Image.Image], record: dict[str, Any], sample: Sample, about: str
) -> list[tuple[Embedded, str, str]]:
    """(picture, what to say of it to those who do not see it, caption)."""
    pictures = []
    found = record["boxes"].get(about) or [[] for _ in loaded]
    for index, (picture, own) in enumerate(zip(loaded, found, strict=False)):
        small, boxes = small_picture(picture), torch.tensor(own, dtype=torch.int64).reshape(-1, 4)
        boxed = boxed_picture(small, picture.size, boxes)
        pictures.append((embedded(boxed), f"Picture with {len(boxes)} boxes", f"The boxes of {about}"))
        crop = collage(to_tensor(picture), boxes, fill=(255, 255, 255)).image if len(boxes) else None
        if crop is not None:
            pictures.append((embedded(small_picture(to_image(crop))), "Collage of the boxes", "What is in them"))
        if sample.boxes and not index:
            truth = boxed_picture(small, picture.size, torch.tensor(sample.boxes))
            pictures.append((embedded(truth), "Picture with the true boxes", "True boxes"))
    return pictures
