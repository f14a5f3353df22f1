"""What HiDe saw, for people: PNGs, and one HTML page that holds them with the answers, times and settings."""

from __future__ import annotations

import base64
import dataclasses
import io
import platform
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from hide.images import on_colour
from hide.questions import LETTERS
from hide_kernels.collage import Layout, plan_layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hide.methods.hide.config import HiDeConfig
    from hide.pipeline import HiDeResult

Size = tuple[int, int]
Runs = Sequence[tuple[int, int]]
Box = tuple[int, int, int, int]

# Pixels within which a picture, and one panel of a grid, is drawn; what is thinner than MIN_SIDE is stretched to it.
PICTURE: Size = (1100, 760)
PANEL: Size = (540, 400)
MIN_SIDE = 24
# Small collages are enlarged up to this.
COLLAGE_SIDE = 560
MAX_PANELS = 24
MAX_LISTED = 24

# Plasma is perceptually uniform and colourful from end to end, so that it stands out from a grey picture.
COLOUR_MAP = "plasma"
BOX_COLOURS = ((255, 84, 168), (60, 200, 255), (255, 214, 10), (110, 225, 100), (255, 150, 40), (196, 150, 255))
RUN_COLOURS = ((20, 92, 160), (110, 182, 235))
DELETED = (222, 226, 230)
EDGE, STRIP, MARGIN, OUTLINE, CLEARANCE = 5, 9, 39, 2, 5


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
    written = []
    overview = []
    for index, collage in enumerate(result.collages):
        small = small_picture(result.images[index])
        maps = _maps(result, index)
        pictures = {
            "heat": _heat(small, _strongest(maps), threshold),
            "boxes": boxed_picture(small, result.images[index].size, result.boxes[index]),
        }
        if len(maps):
            pictures["tokens"] = _tokens_figure(small, maps, result.maps.labels[index], threshold)
        if collage is not None:
            pictures["layout"] = _layout(collage, result.boxes[index])
        overview.append(pictures)
        for name, picture in (pictures | ({} if collage is None else {"collage": collage})).items():
            written.append(directory / f"image_{index}_{name}.png")
            picture.save(written[-1], compress_level=3)
    written.append(directory / "overview.png")
    _overview_figure(result, overview).save(written[-1])
    return written


def save_report(result: HiDeResult, directory: str | Path, config: HiDeConfig, *, model: str = "") -> Path:
    """Write `report.html` into `directory` (made if missing) and return its path; arguments as `report_html`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    path.write_text(report_html(result, config, model=model), encoding="utf-8", errors="replace")
    return path


def report_html(result: HiDeResult, config: HiDeConfig, *, model: str = "") -> str:
    """A result as one HTML page that needs no other file, no script and no network.

    Args:
        config: the settings that `result` was made with.
        model: what to call the model.
    """
    question = result.question
    long = ' class="long"' if len(question.stem) > 240 else ""
    return fill_page(
        "report_template.html",
        title=escape(f"HiDe: {_short(question.stem, 80)}"),
        question=f"<h1{long}>{escape(question.stem)}</h1>",
        options=_options_html(result),
        model=f'<p class="soft">Model: {escape(model)}</p>' if model else "",
        answers=_answers_html(result),
        entities=_list_html(result.entities.items, "chips"),
        notes=_list_html(result.notes, "notes"),
        images="\n".join(_image_html(result, index, config.threshold) for index in range(len(result.images))),
        times=_times_html(result.seconds),
        settings=_settings_html(config, model),
    )


def fill_page(template: str, **parts: str) -> str:
    """A page of this package with its parts, all of them HTML, in place."""
    files = resources.files("hide")
    page = Template(files.joinpath(template).read_text(encoding="utf-8"))
    return page.substitute(parts, style=files.joinpath("report.css").read_text(encoding="utf-8"))


# -- pictures -----------------------------------------------------------------------------------------------------


def _fit(size: Size, limit: Size, at_least: int = 0) -> Size:
    """`size` shrunk into `limit`; enlarged, up to 8 times, where its longest side is below `at_least`."""
    scale = min(limit[0] / size[0], limit[1] / size[1], max(1.0, min(8.0, at_least / max(size))))
    return max(MIN_SIDE, round(size[0] * scale)), max(MIN_SIDE, round(size[1] * scale))


def small_picture(picture: Image.Image) -> Image.Image:
    """RGB at the size of the report; the large pictures are touched only here."""
    return on_colour(picture).resize(_fit(picture.size, PICTURE), Image.Resampling.LANCZOS, reducing_gap=2.0)


def _stretched(size: Size, shown: Size) -> str:
    """What to say of a picture that `_fit` made thicker."""
    ratio = (shown[0] * size[1]) / (shown[1] * size[0])
    return "" if 0.9 < ratio < 1.1 else ", thicker than it is"


def _wide(small: Image.Image) -> bool:
    return small.width > 4 * small.height


def _panel(small: Image.Image) -> Image.Image:
    return small if _wide(small) else small.resize(_fit(small.size, PANEL), Image.Resampling.LANCZOS)


def _maps(result: HiDeResult, index: int) -> NDArray[np.float32]:
    return result.maps.maps[index].float().cpu().numpy()


def _strongest(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    return maps.max(axis=0) if len(maps) else np.zeros((1, 1), np.float32)


def _coloured(values: NDArray[np.floating], grey: NDArray[np.floating] | float) -> NDArray[np.uint8]:
    """Values of a map over grey (both 0..1) as RGB: the one scale of all panels. Low values let the picture through."""
    from matplotlib import colormaps

    values = np.clip(values, 0, 1)
    weight = (0.82 * np.minimum(values / 0.4, 1))[..., None]
    # Less contrast in the picture leaves brightness to the map.
    base = (0.22 + 0.6 * np.asarray(grey, np.float32))[..., None]
    blend = base * (1 - weight) + colormaps[COLOUR_MAP](values)[..., :3] * weight
    return (blend * 255).round().astype(np.uint8)


def _heat(small: Image.Image, heat: NDArray[np.float32], threshold: float | None) -> Image.Image:
    """The picture in grey under a map; the cells from the threshold on are outlined along their edges."""
    grey = np.asarray(small.convert("L"), np.float32) / 255
    smooth = Image.fromarray(heat).resize(small.size, Image.Resampling.BILINEAR)
    shown = Image.fromarray(_coloured(np.asarray(smooth), grey))
    if threshold is None:
        return shown
    high = Image.fromarray((heat >= threshold).astype(np.float32)).resize(small.size, Image.Resampling.BOX)
    mask = Image.fromarray((np.asarray(high) > 0).astype(np.uint8) * 255)
    line = 2 if small.width >= 6 * heat.shape[1] else 1
    shown.paste((0, 0, 0), mask=_ring(mask, line + 1))
    shown.paste((255, 255, 255), mask=_ring(mask, line))
    return shown


def _ring(mask: Image.Image, width: int) -> Image.Image:
    wider = np.asarray(mask.filter(ImageFilter.MaxFilter(2 * width + 1)))
    return Image.fromarray(wider - np.asarray(mask))


def boxed_picture(small: Image.Image, size: Size, boxes: Tensor) -> Image.Image:
    """The picture with numbered boxes: deleted parts dark, parts that become gaps of the collage pale."""
    if not len(boxes):
        return small
    layout = plan_layout(boxes)
    across, down = small.width / size[0], small.height / size[1]
    kept = np.zeros(small.width, bool), np.zeros(small.height, bool)
    for line, runs, scale in ((kept[0], layout.columns, across), (kept[1], layout.rows, down)):
        for start, stop in _scaled(_runs(runs), scale):
            line[start:stop] = True
    pixels = np.asarray(small, np.float32)
    shown = np.where((kept[1][:, None] & kept[0])[..., None], pixels * 0.3 + 178, pixels * 0.42)
    for box in boxes.tolist():
        (x0, x1), (y0, y1) = *_scaled([(box[0], box[2])], across), *_scaled([(box[1], box[3])], down)
        shown[y0:y1, x0:x1] = pixels[y0:y1, x0:x1]
    picture = Image.fromarray(shown.astype(np.uint8))
    return _framed(picture, size, boxes.tolist(), _runs(layout.columns), _runs(layout.rows), outside=True)


def _layout(collage: Image.Image, boxes: Tensor) -> Image.Image:
    """The collage with each box's number where it landed, and the kept columns and rows end to end."""
    layout = plan_layout(boxes)
    shown = collage.convert("RGB").resize(_fit(collage.size, PICTURE, COLLAGE_SIDE), Image.Resampling.LANCZOS)
    columns, rows = _end_to_end(_runs(layout.columns)), _end_to_end(_runs(layout.rows))
    return _framed(shown, collage.size, layout.positions.tolist(), columns, rows, outside=False)


def _runs(intervals: Tensor) -> Runs:
    return [(start, stop) for start, stop in intervals.tolist()]


def _end_to_end(runs: Runs) -> Runs:
    ends = np.cumsum([stop - start for start, stop in runs]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _scaled(runs: Iterable[tuple[int, int]], scale: float) -> Runs:
    """Intervals in pixels of the report, none of them empty."""
    return [(round(start * scale), max(round(stop * scale), round(start * scale) + 1)) for start, stop in runs]


def _framed(
    shown: Image.Image, size: Size, boxes: Sequence[Sequence[int]], columns: Runs, rows: Runs, *, outside: bool
) -> Image.Image:
    """A picture of `size`, already drawn as `shown`, with numbered boxes and strips for its kept columns and rows.

    Outlines lie around the boxes (`outside`), which hides nothing of small ones, or just within them, where boxes may
    be neighbours.
    """
    across, down = shown.width / size[0], shown.height / size[1]
    canvas = Image.new("RGB", (shown.width + 2 * MARGIN, shown.height + 2 * MARGIN), (255, 255, 255))
    canvas.paste(shown, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((MARGIN - 1, MARGIN - 1, MARGIN + shown.width, MARGIN + shown.height), outline=DELETED)
    near, far = EDGE, EDGE + STRIP - 1
    draw.rectangle((MARGIN, near, MARGIN + shown.width - 1, far), fill=DELETED)
    draw.rectangle((near, MARGIN, far, MARGIN + shown.height - 1), fill=DELETED)
    for number, (start, stop) in enumerate(_scaled(columns, across)):
        draw.rectangle((MARGIN + start, near, MARGIN + stop - 1, far), fill=RUN_COLOURS[number % 2])
    for number, (start, stop) in enumerate(_scaled(rows, down)):
        draw.rectangle((near, MARGIN + start, far, MARGIN + stop - 1), fill=RUN_COLOURS[number % 2])
    grow = OUTLINE + 1 if outside else 0
    drawn: list[Box] = []
    for box in boxes:
        (x0, x1), (y0, y1) = *_scaled([(box[0], box[2])], across), *_scaled([(box[1], box[3])], down)
        drawn.append((MARGIN + x0 - grow, MARGIN + y0 - grow, MARGIN + x1 + grow, MARGIN + y1 + grow))
    for number, (x0, y0, x1, y1) in enumerate(drawn):
        if outside:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=(0, 0, 0))
            draw.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), outline=_box_colour(number), width=OUTLINE)
        else:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_box_colour(number), width=OUTLINE)
    taken = np.array(drawn, np.int64).reshape(-1, 4)
    for number, box in enumerate(drawn):
        tag = _tag(number)
        place = _free_place(tag.size, box, np.delete(taken, number, axis=0), canvas.size)
        canvas.paste(tag, place)
        taken = np.concatenate([taken, [[*place, place[0] + tag.width, place[1] + tag.height]]])
    return canvas


def _free_place(tag: Size, box: Box, taken: NDArray[np.int64], canvas: Size) -> tuple[int, int]:
    """Where a tag stands at its box alone and hides nothing: around it; where all is taken, in its corner."""
    x0, y0, x1, y1 = box
    width, height = tag
    across, above = x1 - width, y0 - height
    around = ((x0, above), (across, above), (x0, y1), (across, y1), (x1, y0), (x0 - width, y0))
    places = [
        (x, y) for x, y in around if min(x, y) >= EDGE + STRIP and x + width <= canvas[0] and y + height <= canvas[1]
    ]
    for gap in (CLEARANCE, 0):
        left, top, right, bottom = (taken + np.array([-gap, -gap, gap, gap])).T
        for x, y in places:
            if ((right <= x) | (left >= x + width) | (bottom <= y) | (top >= y + height)).all():
                return x, y
    return x0, y0


def _box_colour(number: int) -> tuple[int, int, int]:
    return BOX_COLOURS[number % len(BOX_COLOURS)]


def _tag(number: int) -> Image.Image:
    """The label of box `number`, which counts from 0; people count from 1."""
    font = ImageFont.load_default(16)
    tag = Image.new("RGB", (int(font.getlength(str(number + 1))) + 9, 19), _box_colour(number))
    ImageDraw.Draw(tag).text((tag.width / 2, 9.5), str(number + 1), (0, 0, 0), font, anchor="mm")
    return tag


def _tokens_figure(
    small: Image.Image, maps: NDArray[np.float32], labels: Sequence[str], threshold: float | None
) -> Image.Image:
    """A panel for each token and the scale that they share."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    count = min(len(maps), MAX_PANELS)
    columns = 1 if _wide(small) else min(count, 4)
    rows = -(-count // columns)
    panel = _panel(small)
    width = min(3.6 if columns > 1 else 8.0, 5 * panel.width / panel.height)
    height = width * panel.height / panel.width
    figure = Figure(figsize=(max(6.0, columns * width), rows * (height + 0.4) + 1), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for axis, heat, label in zip(grid.flat, maps[:count], labels, strict=False):
        axis.imshow(_heat(panel, heat, threshold))
        axis.set_title(_short(label, 40) or "(blank)", fontsize=11, parse_math=False)
    scale = ScalarMappable(cmap=ListedColormap(_coloured(np.linspace(0, 1, 256, dtype=np.float32), 0.5) / 255))
    scale.set_clim(0, 1)
    bar = figure.colorbar(scale, ax=grid, orientation="horizontal", aspect=50, shrink=0.6)
    shown = f"the first {count} of {len(maps)} tokens; " if count < len(maps) else ""
    outlined = "" if threshold is None else f"; outlined from {threshold:g} on"
    bar.set_label(f"{shown}part of the token's peak{outlined}", parse_math=False)
    if threshold is not None:
        bar.ax.axvline(threshold, color="black", linewidth=2)
    return _rendered(figure)


def _overview_figure(result: HiDeResult, pictures: Sequence[dict[str, Image.Image]]) -> Image.Image:
    from matplotlib.figure import Figure

    rows = len(result.images)
    figure = Figure(figsize=(16, 4.6 * rows + 1.2), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False)
    for index, axes in enumerate(grid):
        labels = _short(", ".join(result.maps.labels[index]), 160) or "no token"
        collage = result.collages[index]
        panels = [
            (pictures[index]["heat"], f"attention of: {labels}"),
            (pictures[index]["boxes"], _count(len(result.boxes[index]), "box", "es")),
            (
                pictures[index].get("layout"),
                "no region, no collage" if collage is None else f"collage, {collage.width} x {collage.height}",
            ),
        ]
        for axis, (picture, title) in zip(axes, panels, strict=True):
            axis.set_title(title, fontsize=10, wrap=True, parse_math=False)
            axis.set_axis_off()
            if picture is not None:
                axis.imshow(picture)
    plain = "" if result.plain_answer is None else f"\nplain answer: {_short(result.plain_answer)}"
    text = f"{_short(result.question.stem)}{plain}\nHiDe's answer: {_short(result.answer)}"
    figure.suptitle(text, fontsize=12, parse_math=False)
    return _rendered(figure)


def _rendered(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Matplotlib's own font has no Chinese, for one; the HTML page, which uses the reader's fonts, has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


# -- the page -----------------------------------------------------------------------------------------------------


def _options_html(result: HiDeResult) -> str:
    lines = []
    for letter, option in zip(LETTERS, result.question.options, strict=False):
        picks = [name for name, chosen in (("plain", result.plain_letter), ("HiDe", result.letter)) if chosen == letter]
        marks = "".join(f'<span class="pick">{name} answer</span>' for name in picks)
        lines.append(f"<li>({letter}) {escape(option)}{marks}</li>")
    return f'<ul class="options">{"".join(lines)}</ul>' if lines else ""


def _answers_html(result: HiDeResult) -> str:
    cards = []
    seen = "from picture and collage" if any(result.collages) else "the plain one, for want of a collage"
    for title, style, reply, letter in (
        ("Plain answer: from the picture alone", "plain", result.plain_answer, result.plain_letter),
        (f"HiDe's answer: {seen}", "hide", result.answer, result.letter),
    ):
        if reply is None:
            body = '<p class="reply soft">Not asked for.</p>'
        else:
            body = f'<p class="reply">{escape(reply)}</p>' if reply.strip() else '<p class="reply soft">Empty.</p>'
            if result.question.options:
                body += f'<p class="soft">{f"Option {letter}" if letter else "Names no option"}.</p>'
        cards.append(f'<div class="answer {style}"><h3>{title}</h3>{body}</div>')
    return "\n".join(cards)


def _image_html(result: HiDeResult, index: int, threshold: float) -> str:
    picture = result.images[index]
    small, maps, labels = small_picture(picture), _maps(result, index), result.maps.labels[index]
    name = "The picture" if len(result.images) == 1 else f"Picture {index + 1} of {len(result.images)}"
    tokens = f", {result.image_tokens[index]} image tokens" if index < len(result.image_tokens) else ""
    cells = f", maps of {maps.shape[2]} x {maps.shape[1]} cells" if len(maps) else ""
    wide = " wide" if _wide(small) else ""
    on_white = ", on white" if picture.mode == "RGBA" else ""
    left = figure_html(
        small, f"{name}, as it was given", f"As it was given{on_white}{_stretched(picture.size, small.size)}"
    )
    parts = [f"<h2>{name}</h2>", f"<p>{picture.width} x {picture.height} pixels{tokens}{cells}.</p>"]
    if not len(maps):
        parts.append(f'<div class="pair{wide}">{left}</div><p>No token has a map here, so there is no region.</p>')
        return "\n".join(parts)
    right = figure_html(
        _heat(small, _strongest(maps), threshold),
        f"{name} in grey under the strongest map of each cell; tokens: {', '.join(labels)}",
        f"Attention of {_count(len(maps), 'token')}{', in each cell that of the strongest' if len(maps) > 1 else ''}",
    )
    parts.append(f'<div class="pair{wide}">{left}{right}</div>')
    parts.append(_tokens_html(small, maps, labels, threshold, wide))
    collage = result.collages[index]
    if collage is None:
        parts.append("<h3>Boxes</h3><p>No region: there is no box to cut out and no collage.</p>")
    else:
        shown = [one for one in result.maps.order if result.collages[one] is not None]
        place = len(result.images) + shown.index(index) if index in shown else len(result.image_tokens)
        tokens = f", {result.image_tokens[place]} image tokens" if place < len(result.image_tokens) else ""
        parts.append(_boxes_html(small, picture.size, result.boxes[index], collage, tokens))
    return "\n".join(parts)


def _tokens_html(
    small: Image.Image, maps: NDArray[np.float32], labels: Sequence[str], threshold: float, wide: str
) -> str:
    panel = _panel(small)
    panels = [
        figure_html(
            _heat(panel, heat, threshold),
            f"Attention of token {label!r}: strongest {_place(heat)}",
            f"<code>{escape(label.strip()) or '(blank)'}</code>",
            above=True,
        )
        for heat, label in zip(maps[:MAX_PANELS], labels, strict=False)
    ]
    which = f" The first {MAX_PANELS} of {len(maps)} tokens are shown." if len(maps) > MAX_PANELS else ""
    bar = Image.fromarray(_coloured(np.linspace(0, 1, 340, dtype=np.float32), 0.5)[None].repeat(8, axis=0))
    return f"""<h3>Attention of each token</h3>
<p>All panels share one scale: 1 is the peak of the token's own map. Outlined are the cells from the threshold
{threshold:g} on; each outlined area is a region.{which}</p>
<div class="scale"><span>0</span>{_img(bar, "Colour scale of the maps, from 0 to 1", "PNG")}<span>1</span>
<div class="ends"><span style="left: {100 * threshold:g}%">{threshold:g}, the threshold</span></div></div>
<div class="tokens{wide}">
{"".join(panels)}
</div>"""


def _place(heat: NDArray[np.float32]) -> str:
    """In words, for those who do not see the panel: where a map has its peak."""
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    down = ("at the top", "in the middle", "at the bottom")[int(3 * (row + 0.5) / heat.shape[0])]
    across = ("left", "centre", "right")[int(3 * (column + 0.5) / heat.shape[1])]
    return f"{down}, {across}"


def _boxes_html(small: Image.Image, size: Size, boxes: Tensor, collage: Image.Image, tokens: str) -> str:
    layout = plan_layout(boxes)
    count = _count(len(boxes), "box", "es")
    boxes_alt = f"The picture with {count}, numbered, and strips along its edges that mark the columns and rows kept"
    layout_alt = f"The collage, {collage.width} x {collage.height} pixels, with the same numbers where the boxes landed"
    drawn = _layout(collage, boxes)
    shown = drawn.width - 2 * MARGIN, drawn.height - 2 * MARGIN
    zoom = f"Drawn at {max(shown) / max(collage.size):.0%}{_stretched(collage.size, shown)}"
    return f"""<h3>{count}</h3>
<p>Clear parts are copied into the collage. Dark parts are deleted. Pale parts lie in a kept column and a kept row, but
in no box: they become white gaps. The blue strips at the edges mark the kept columns (top) and rows (left).</p>
{figure_html(boxed_picture(small, size, boxes), boxes_alt, style="frame")}
{_boxes_table(boxes, layout)}
<h3>Collage</h3>
<p>{_kept("columns", _runs(layout.columns), size[0])} {_kept("rows", _runs(layout.rows), size[1])} What is left moves
together, so left stays left and above stays above. The collage is {collage.width} x {collage.height} pixels{tokens}:
{_percent(collage.width * collage.height / (size[0] * size[1]))} of the picture's area.</p>
{figure_html(drawn, layout_alt, f"{zoom}. The strips are those above, end to end.", style="frame")}"""


def _kept(what: str, runs: Runs, of: int) -> str:
    kept = sum(stop - start for start, stop in runs)
    return f"{kept} of {of} {what} are kept, in {_count(len(runs), 'run')}."


def _boxes_table(boxes: Tensor, layout: Layout) -> str:
    lines = []
    for number, (box, place) in enumerate(zip(boxes.tolist(), layout.positions.tolist(), strict=True)):
        if number == MAX_LISTED:
            break
        red, green, blue = _box_colour(number)
        lines.append(
            f'<tr><td><span class="key" style="background: rgb({red} {green} {blue})">{number + 1}</span></td>'
            f'<td class="number">{box[2] - box[0]} x {box[3] - box[1]}</td>'
            f'<td class="number">{box[0]}, {box[1]}</td><td class="number">{place[0]}, {place[1]}</td></tr>'
        )
    rest = f"<p>The first {MAX_LISTED} of {len(boxes)} are listed.</p>" if len(boxes) > MAX_LISTED else ""
    return (
        '<table><thead><tr><th>Box</th><th class="number">pixels</th><th class="number">left, top in the picture</th>'
        f'<th class="number">left, top in the collage</th></tr></thead><tbody>{"".join(lines)}</tbody></table>{rest}'
    )


def _times_html(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    longest = max(seconds.values(), default=0)
    lines = [
        f'<tr><td>{escape(step)}</td><td class="number">{spent:.3f}</td>'
        f'<td class="number">{spent / (total or 1):.0%}</td>'
        f'<td class="share"><span class="bar" style="width: {100 * spent / (longest or 1):.1f}%"></span></td></tr>'
        for step, spent in seconds.items()
    ]
    return (
        '<table class="times"><thead><tr><th>Step</th><th class="number">seconds</th><th class="number">share</th>'
        f'<th></th></tr></thead><tbody>{"".join(lines)}<tr class="total"><td>total</td>'
        f'<td class="number">{total:.3f}</td><td></td><td></td></tr></tbody></table>'
    )


def _settings_html(config: HiDeConfig, model: str) -> str:
    settings = {"model": model} if model else {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        settings[field.name] = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    settings["versions"] = ", ".join(
        [f"Python {platform.python_version()}", *map(_version, ("hide-kernels", "torch", "transformers"))]
    )
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in settings.items())
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} (not installed)"


def _list_html(items: Iterable[str], style: str) -> str:
    items = list(items)
    if not items:
        return '<p class="soft">None.</p>'
    return f'<ul class="{style}">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def figure_html(picture: Image.Image, alt: str, caption: str = "", *, style: str = "", above: bool = False) -> str:
    """`caption` is HTML, `alt` is text."""
    image = _img(picture, alt)
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    attribute = f' class="{style}"' if style else ""
    return f"<figure{attribute}>{text + image if above else image + text}</figure>"


def _img(picture: Image.Image, alt: str, kind: str = "JPEG") -> str:
    file = io.BytesIO()
    # Subsampled colours would smear the outlines.
    picture.save(file, kind, **({"quality": 82, "subsampling": 0, "optimize": True} if kind == "JPEG" else {}))
    data = base64.b64encode(file.getvalue()).decode()
    source = f"data:image/{kind.lower()};base64,{data}"
    return f'<img src="{source}" width="{picture.width}" height="{picture.height}" alt="{escape(alt)}">'


def _percent(part: float) -> str:
    return f"{part:.1%}" if part >= 0.001 else "less than 0.1%"


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"


def _short(text: str, length: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
