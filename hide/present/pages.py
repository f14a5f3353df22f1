"""Pages of results, each one HTML file that needs no other file, no script and no network; and pictures beside them."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping, Sequence
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

from hide.images import load_image
from hide.methods.base import Evidence
from hide.present import draw
from hide.questions import LETTERS
from hide.texts import listed, version
from hide_kernels.collage import plan_layout

if TYPE_CHECKING:
    from hide.methods.attend import TokenAttention
    from hide.methods.base import Answer
    from hide.present.table import ResultTable

MAX_LISTED = 24


@dataclass(frozen=True)
class Seen:
    """What an answer says of one image.

    image: as it was given. tokens: its image tokens. maps: (T, rows, columns) float32 as parts of a peak, one for each
    of `labels`; cells from `threshold` on are of a region. boxes: (K, 4) pixels, merged. shown: what the model got
    beside the image, with `shown_tokens` image tokens. laid_out: whether that is the layout-preserving collage of the
    boxes.
    """

    image: Image.Image
    tokens: int
    boxes: Tensor
    maps: NDArray[np.float32]
    labels: Sequence[str]
    threshold: float | None
    shown: Image.Image | None
    shown_tokens: int | None
    laid_out: bool


def seen_in(answer: Answer) -> list[Seen]:
    """What an answer says of each of its images."""
    found = answer.evidence or (Evidence(),) * len(answer.images)
    return [
        Seen(
            image=image,
            tokens=tokens,
            boxes=one.boxes,
            maps=_on_scale(one),
            labels=one.labels,
            threshold=one.threshold,
            shown=None if one.shown is None else load_image(one.shown),
            shown_tokens=one.shown_tokens,
            laid_out=one.shown is not None and _laid_out(one.shown, one.boxes),
        )
        for image, tokens, one in zip(answer.images, answer.image_tokens, found, strict=True)
    ]


def _on_scale(found: Evidence) -> NDArray[np.float32]:
    """Maps with a threshold are parts of a peak already; others become so. What is no number is 0."""
    maps: NDArray[np.float32] = found.maps.detach().float().cpu().numpy()
    maps = np.where(np.isfinite(maps), maps, np.float32(0))
    if found.threshold is not None or not len(maps):
        return maps
    peaks = maps.max(axis=(1, 2), keepdims=True)
    return (maps / np.where(peaks > 0, peaks, 1)).astype(np.float32)


def _laid_out(shown: Image.Image, boxes: Tensor) -> bool:
    if not len(boxes):
        return False
    layout = plan_layout(boxes)
    width, height = (sum(stop - start for start, stop in runs.tolist()) for runs in (layout.columns, layout.rows))
    return shown.size == (width, height)


def save_pictures(answer: Answer, directory: str | Path, *, plain: Answer | None = None) -> list[Path]:
    """Write PNGs of an answer into `directory` (made if missing) and return their paths.

    `overview.png` shows everything side by side. For image i: `image_i_heat.png`, the image under the strongest map of
    each cell; `image_i_tokens.png`, the same for each map by itself; `image_i_boxes.png`, the image with numbered boxes
    and, along its edges, the columns and rows that a collage of them keeps; `image_i_layout.png`, the collage with the
    same numbers; `image_i_shown.png`, what the model was shown of it. What there is none of is left out.

    plain: the plain answer to the same question, to be named beside it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written, overview = [], []
    for index, seen in enumerate(seen_in(answer)):
        pictures = _drawn(seen)
        overview.append(_overview_row(seen, pictures))
        for name, picture in pictures.items():
            written.append(directory / f"image_{index}_{name}.png")
            picture.save(written[-1], compress_level=3)
    beside = "" if plain is None else f"\nplain answer: {draw.short(plain.text)}"
    heading = f"{draw.short(answer.question.stem)}{beside}\n{answer.method} answer: {draw.short(answer.text)}"
    written.append(directory / "overview.png")
    draw.overview_figure(overview, heading).save(written[-1])
    return written


def save_attention(found: TokenAttention, directory: str | Path) -> list[Path]:
    """Write `attention.png`, a panel per token on one scale, and `attention.npz` with `maps`, `tokens`, `prompt_tokens`
    and `layers`, into `directory` (made if missing); returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / "attention.png", directory / "attention.npz"]
    draw.attention_figure(found.image, found.maps.numpy(), found.tokens, found.prompt_tokens).save(paths[0])
    np.savez_compressed(
        paths[1],
        maps=found.maps.numpy(),
        tokens=np.array(found.tokens),
        prompt_tokens=found.prompt_tokens,
        layers=np.array(found.layers),
    )
    return paths


def _drawn(seen: Seen) -> dict[str, Image.Image]:
    small = draw.small_picture(seen.image)
    pictures = {
        "heat": draw.heat_picture(small, draw.strongest(seen.maps), seen.threshold),
        "boxes": draw.boxed_picture(small, seen.image.size, seen.boxes),
    }
    if len(seen.maps):
        pictures["tokens"] = draw.maps_figure(small, seen.maps, seen.labels, seen.threshold)
    if seen.shown is not None:
        pictures["shown"] = seen.shown
        if seen.laid_out:
            pictures["layout"] = draw.layout_picture(seen.shown, seen.boxes)
    return pictures


def _overview_row(seen: Seen, pictures: dict[str, Image.Image]) -> list[tuple[Image.Image | None, str]]:
    shown = "nothing else was shown" if seen.shown is None else f"shown: {seen.shown.width} x {seen.shown.height}"
    labels = draw.short(", ".join(seen.labels), 160)
    return [
        (pictures["heat"], f"map: {labels}" if labels else "no map"),
        (pictures["boxes"], count(len(seen.boxes), "box", "es")),
        (pictures.get("layout", pictures.get("shown")), shown),
    ]


def save_report(
    answer: Answer,
    directory: str | Path,
    *,
    plain: Answer | None = None,
    settings: Mapping[str, Any] | None = None,
    model: str = "",
) -> Path:
    """Write `report.html` into `directory` (made if missing) and return its path; arguments as `report_html`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    page = report_html(answer, plain=plain, settings=settings, model=model)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def report_html(
    answer: Answer, *, plain: Answer | None = None, settings: Mapping[str, Any] | None = None, model: str = ""
) -> str:
    """An answer as one HTML page.

    Args:
        plain: the plain answer to the same question, to stand beside it.
        settings: name -> value (`Preset.to_dict`), shown last.
        model: what to call the model.
    """
    facts = {"model": model} if model else {}
    for name, value in (settings or {}).items():
        facts[name] = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    facts["versions"] = ", ".join(
        [f"Python {platform.python_version()}", *map(_version, ("hide-kernels", "torch", "transformers"))]
    )
    steps = dict(answer.steps)
    if plain is not None and "answer" in plain.steps:
        steps = {"plain answer": plain.steps["answer"], **steps}
    return render(
        "report.html",
        title=f"{answer.method}: {draw.short(answer.question.stem, 80)}",
        question=answer.question,
        letters=LETTERS,
        model=model,
        answer=answer,
        plain=plain,
        details={name.replace("_", " "): listed(value) for name, value in answer.details.items()},
        images=[_image(seen) for seen in seen_in(answer)],
        steps=steps,
        settings=facts,
    )


def _version(distribution: str) -> str:
    return f"{distribution} {version(distribution) or '(not installed)'}"


def _image(seen: Seen) -> dict[str, Any]:
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
    if len(seen.boxes):
        found["boxes"] = embedded(draw.boxed_picture(small, seen.image.size, seen.boxes))
        found["colours"] = [draw.box_colour(number) for number in range(min(len(seen.boxes), MAX_LISTED))]
    if seen.shown is not None and not seen.laid_out:
        found["shown"] = embedded(draw.small_picture(seen.shown))
    if seen.shown is not None and seen.laid_out:
        layout = plan_layout(seen.boxes)
        drawn = draw.layout_picture(seen.shown, seen.boxes)
        size = drawn.width - 2 * draw.MARGIN, drawn.height - 2 * draw.MARGIN
        columns, rows = draw.runs_of(layout.columns), draw.runs_of(layout.rows)
        listed = zip(seen.boxes.tolist()[:MAX_LISTED], layout.positions.tolist(), strict=False)
        found |= {
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


class Section(NamedTuple):
    """A part of a page of results: under a heading, a sentence or two, tables, and pictures with what to say of each to
    those who do not see it, and captions. wide: pictures one below the other."""

    heading: str
    about: str = ""
    tables: Sequence[ResultTable] = ()
    pictures: Sequence[tuple[Embedded, str, str]] = ()
    wide: bool = False


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
