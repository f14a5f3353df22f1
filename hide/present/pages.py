"""Pages of results, each one HTML file that needs no other file, no script and no network; and pictures beside them."""

from __future__ import annotations

import base64
import dataclasses
import io
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hide.present import draw
from hide.questions import LETTERS
from hide.texts import version
from hide_kernels.collage import plan_layout

if TYPE_CHECKING:
    from hide.config import HiDeConfig
    from hide.pipeline import HiDeResult

MAX_LISTED = 24


@dataclass(frozen=True)
class Evidence:
    """What was found in one picture.

    image: as it was given. tokens: its image tokens, `None` where nobody counted. maps: (T, rows, columns) float32, one
    for each of `labels`; cells from `threshold` on are of a region. boxes: (K, 4) pixels, merged. shown: what the model
    got beside the picture, made of the boxes, with `shown_tokens` image tokens.
    """

    image: Image.Image
    tokens: int | None
    boxes: Tensor
    maps: NDArray[np.float32]
    labels: Sequence[str]
    threshold: float | None
    shown: Image.Image | None
    shown_tokens: int | None


def evidence(result: HiDeResult, threshold: float | None) -> list[Evidence]:
    """What a result says of each of its pictures."""
    collages = [index for index in result.maps.order if result.collages[index] is not None]
    counts = dict(enumerate(result.image_tokens))
    return [
        Evidence(
            image=image,
            tokens=counts.get(index),
            boxes=result.boxes[index],
            maps=result.maps.maps[index].float().cpu().numpy(),
            labels=result.maps.labels[index],
            threshold=threshold,
            shown=result.collages[index],
            # Tokens of the collages follow those of the pictures.
            shown_tokens=counts.get(len(result.images) + collages.index(index)) if index in collages else None,
        )
        for index, image in enumerate(result.images)
    ]


def save_pictures(result: HiDeResult, directory: str | Path, threshold: float | None = None) -> list[Path]:
    """Write PNGs of a result into `directory` (made if missing) and return their paths.

    `overview.png` shows everything side by side. For image i: `image_i_heat.png`, the picture under the strongest map
    of each cell; `image_i_tokens.png`, the same for each token by itself; `image_i_boxes.png`, the picture with
    numbered boxes and, along its edges, the columns and rows that the collage keeps; `image_i_layout.png`, the collage
    with the same numbers; `image_i_collage.png`, the collage as the model gets it. What there is none of is left out.

    Args:
        threshold: cells of a map are outlined from this value on; `None`: no outlines.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written, overview = [], []
    for index, seen in enumerate(evidence(result, threshold)):
        pictures = _drawn(seen)
        overview.append(_overview_row(seen, pictures))
        for name, picture in pictures.items():
            written.append(directory / f"image_{index}_{name}.png")
            picture.save(written[-1], compress_level=3)
    plain = "" if result.plain_answer is None else f"\nplain answer: {draw.short(result.plain_answer)}"
    heading = f"{draw.short(result.question.stem)}{plain}\nHiDe's answer: {draw.short(result.answer)}"
    written.append(directory / "overview.png")
    draw.overview_figure(overview, heading).save(written[-1])
    return written


def _drawn(seen: Evidence) -> dict[str, Image.Image]:
    small = draw.small_picture(seen.image)
    pictures = {
        "heat": draw.heat_picture(small, draw.strongest(seen.maps), seen.threshold),
        "boxes": draw.boxed_picture(small, seen.image.size, seen.boxes),
    }
    if len(seen.maps):
        pictures["tokens"] = draw.maps_figure(small, seen.maps, seen.labels, seen.threshold)
    if seen.shown is not None:
        pictures |= {"layout": draw.layout_picture(seen.shown, seen.boxes), "collage": seen.shown}
    return pictures


def _overview_row(seen: Evidence, pictures: dict[str, Image.Image]) -> list[tuple[Image.Image | None, str]]:
    shown = "no region, no collage" if seen.shown is None else f"collage, {seen.shown.width} x {seen.shown.height}"
    return [
        (pictures["heat"], f"attention of: {draw.short(', '.join(seen.labels), 160) or 'no token'}"),
        (pictures["boxes"], count(len(seen.boxes), "box", "es")),
        (pictures.get("layout"), shown),
    ]


def save_report(result: HiDeResult, directory: str | Path, config: HiDeConfig, *, model: str = "") -> Path:
    """Write `report.html` into `directory` (made if missing) and return its path; arguments as `report_html`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    path.write_text(report_html(result, config, model=model), encoding="utf-8", errors="replace")
    return path


def report_html(result: HiDeResult, config: HiDeConfig, *, model: str = "") -> str:
    """A result as one HTML page.

    Args:
        config: the settings that `result` was made with.
        model: what to call the model.
    """
    settings = {"model": model} if model else {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        settings[field.name] = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    settings["versions"] = ", ".join(
        [f"Python {platform.python_version()}", *map(_version, ("hide-kernels", "torch", "transformers"))]
    )
    return render(
        "report.html",
        title=f"HiDe: {draw.short(result.question.stem, 80)}",
        question=result.question,
        letters=LETTERS,
        model=model,
        plain=result.plain_answer,
        plain_letter=result.plain_letter,
        answer=result.answer,
        letter=result.letter,
        entities=result.entities.items,
        notes=result.notes,
        images=[_image(seen) for seen in evidence(result, config.threshold)],
        seconds=result.seconds,
        settings=settings,
    )


def _version(distribution: str) -> str:
    return f"{distribution} {version(distribution) or '(not installed)'}"


def _image(seen: Evidence) -> dict[str, Any]:
    """What the report's template fills in for one picture."""
    small = draw.small_picture(seen.image)
    panel = draw.panel_picture(small)
    found = {
        "seen": seen,
        "wide": draw.is_wide(small),
        "picture": embedded(small),
        "stretched": draw.stretched(seen.image.size, small.size),
    }
    if len(seen.maps):
        found["heat"] = embedded(draw.heat_picture(small, draw.strongest(seen.maps), seen.threshold))
        found["tokens"] = [
            {"label": label, "peak": _place(heat), "picture": embedded(draw.heat_picture(panel, heat, seen.threshold))}
            for heat, label in zip(seen.maps[: draw.MAX_PANELS], seen.labels, strict=False)
        ]
        found["bar"] = embedded(draw.colour_bar(), "PNG")
    if seen.shown is not None:
        layout = plan_layout(seen.boxes)
        drawn = draw.layout_picture(seen.shown, seen.boxes)
        size = drawn.width - 2 * draw.MARGIN, drawn.height - 2 * draw.MARGIN
        columns, rows = draw.runs_of(layout.columns), draw.runs_of(layout.rows)
        listed = zip(seen.boxes.tolist()[:MAX_LISTED], layout.positions.tolist(), strict=False)
        found |= {
            "boxes": embedded(draw.boxed_picture(small, seen.image.size, seen.boxes)),
            "listed": [(draw.box_colour(number), box, place) for number, (box, place) in enumerate(listed)],
            "kept": [("columns", columns, seen.image.width), ("rows", rows, seen.image.height)],
            "area": seen.shown.width * seen.shown.height / (seen.image.width * seen.image.height),
            "layout": embedded(drawn),
            "zoom": max(size) / max(seen.shown.size),
            "layout_stretched": draw.stretched(seen.shown.size, size),
        }
    return found


def _place(heat: NDArray[np.float32]) -> str:
    """In words, for those who do not see the panel: where a map has its peak."""
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    down = ("at the top", "in the middle", "at the bottom")[int(3 * (row + 0.5) / heat.shape[0])]
    across = ("left", "centre", "right")[int(3 * (column + 0.5) / heat.shape[1])]
    return f"{down}, {across}"


class Embedded(NamedTuple):
    """A picture as the templates take it; source: a data URI."""

    source: str
    width: int
    height: int


def embedded(picture: Image.Image, kind: str = "JPEG") -> Embedded:
    """A picture to be put into a page."""
    file = io.BytesIO()
    # Subsampled colours would smear the outlines.
    picture.save(file, kind, **({"quality": 82, "subsampling": 0, "optimize": True} if kind == "JPEG" else {}))
    data = base64.b64encode(file.getvalue()).decode()
    return Embedded(f"data:image/{kind.lower()};base64,{data}", picture.width, picture.height)


def render(template: str, **values: Any) -> Markup:
    """A template of this package, filled in; what is text in `values` stays text."""
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    templates = Environment(
        loader=PackageLoader("hide.present"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"count": count, "percent": percent}
    templates.globals |= {"MAX_LISTED": MAX_LISTED, "MAX_PANELS": draw.MAX_PANELS}
    return templates


def percent(part: float) -> str:
    """Of a small part too."""
    return f"{part:.1%}" if part >= 0.001 else "less than 0.1%"


def count(number: int, what: str, plural: str = "s") -> str:
    """1 box, 2 boxes."""
    return f"{number} {what}{'' if number == 1 else plural}"
