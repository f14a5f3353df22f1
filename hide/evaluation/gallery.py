"""An evaluation as one HTML page: tables, and the questions that went wrong with what was looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from hide.evaluation.data import BadRecord, Sample, distinct
from hide.evaluation.scoring import Scorer, sound, verdict
from hide.evaluation.tables import ResultTable
from hide.evaluation.views import METHODS, preserved
from hide.images import load_image
from hide.questions import LETTERS
from hide.report import boxed_picture, figure_html, fill_page, small_picture

MOST = 24


def failures(records: Sequence[dict[str, Any]], scorer: Scorer, most: int = MOST) -> list[dict[str, Any]]:
    """Records that HiDe got wrong, the telling ones first: right without HiDe, then unreadable, errors, the others."""

    def rank(record: dict[str, Any]) -> int:
        if record["error"]:
            return 2
        if verdict(record, "plain", scorer):
            return 0
        return 1 if verdict(record, "hide", scorer) is None else 3

    wrong = [record for record in sound(records) if record["error"] or verdict(record, "hide", scorer) is not True]
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
    shown = failures(records, scorer)
    wanted = {record["id"]: "" for record in shown}
    for sample in distinct(samples) if wanted else ():
        if isinstance(sample, Sample) and wanted.get(sample.id) == "":
            wanted[sample.id] = _failure(next(r for r in shown if r["id"] == sample.id), sample, scorer)
            if all(wanted.values()):
                break
    wrong = sum(bool(record["error"]) or verdict(record, "hide", scorer) is not True for record in sound(records))
    methods = [method for method in METHODS if any(method in record["replies"] for record in records)]
    path = Path(path)
    page = fill_page(
        "evaluation/gallery_template.html",
        title=escape(title),
        legend="<ul>" + "".join(f"<li><b>{m}</b>: {escape(METHODS[m])}</li>" for m in methods) + "</ul>",
        tables="\n".join(table.html() for table in tables),
        which=escape(
            f"{len(shown)} of the {wrong} questions that HiDe answered wrong or that failed: first those that the "
            "plain question gets right, then replies that could not be read, errors, and the others."
        ),
        failures="\n".join(wanted.values()),
        settings="<table><tbody>"
        + "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in settings.items())
        + "</tbody></table>",
    )
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def _failure(record: dict[str, Any], sample: Sample, scorer: Scorer) -> str:
    """One question: pictures, replies, and what was right."""
    parts = [f"<h3>{escape(record['id'])}: {escape(record['question'])}</h3>"]
    if record["options"]:
        listed = zip(LETTERS, record["options"], strict=False)
        parts.append(f"<p>{escape('   '.join(f'({letter}) {option}' for letter, option in listed))}</p>")
    parts.append(f"<p>Right: <b>{escape(record['answer'])}</b>. {escape(record['split'])}.</p>")
    if record["error"]:
        return "\n".join([*parts, f'<ul class="notes"><li>{escape(record["error"])}</li></ul>'])
    marks = {True: "right", False: "wrong", None: "no answer read"}
    replies = "".join(
        f"<tr><td>{escape(method)}</td><td>{escape(reply) or '(empty)'}</td>"
        f"<td>{marks[verdict(record, method, scorer)]}</td></tr>"
        for method, reply in record["replies"].items()
    )
    parts.append(f"<table><tbody>{replies}</tbody></table>")
    parts.append(f"<p>Looked for: {escape(', '.join(record['entities']))}.</p>")
    try:
        shown = sample.image()
        loaded = [load_image(picture) for picture in (shown if isinstance(shown, tuple) else (shown,))]
    except (OSError, ValueError) as error:
        return "\n".join([*parts, f"<p>The picture can no longer be read: {escape(str(error))}</p>"])
    pictures = []
    for index, (picture, found) in enumerate(zip(loaded, record["boxes"], strict=False)):
        small, boxes = small_picture(picture), torch.tensor(found).reshape(-1, 4)
        about = f"Picture with {len(boxes)} boxes"
        pictures.append(figure_html(boxed_picture(small, picture.size, boxes), about, "HiDe's boxes"))
        if len(boxes):
            pictures.append(
                figure_html(small_picture(preserved(picture, boxes)), "Collage of the boxes", "The collage")
            )
        if sample.boxes and not index:
            truth = torch.tensor(sample.boxes)
            pictures.append(
                figure_html(boxed_picture(small, picture.size, truth), "Picture with the true boxes", "True boxes")
            )
    parts.append(f'<div class="pair">{"".join(pictures)}</div>')
    return "\n".join(parts)
