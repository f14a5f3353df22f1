"""Drawing: pictures under their maps, numbered boxes, where a collage comes from, and figures of panels.

Everything here takes pictures, maps, labels, boxes and a threshold, wherever they are from. Boxes are (K, 4) half-open
pixels x0, y0, x1, y1, merged as a collage has them; maps are (T, rows, columns) float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from hide.images import on_colour
from hide_kernels.collage import plan_layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
# Of a figure; Matplotlib draws no more than 2**16 pixels of it.
MAX_INCHES = 300

# Plasma is perceptually uniform and colourful from end to end, so that it stands out from a grey picture.
COLOUR_MAP = "plasma"
BOX_COLOURS = ((255, 84, 168), (60, 200, 255), (255, 214, 10), (110, 225, 100), (255, 150, 40), (196, 150, 255))
RUN_COLOURS = ((20, 92, 160), (110, 182, 235))
DELETED = (222, 226, 230)
EDGE, STRIP, MARGIN, OUTLINE, CLEARANCE = 5, 9, 39, 2, 5


def _fit(size: Size, limit: Size, at_least: int = 0) -> Size:
    """`size` shrunk into `limit`; enlarged, up to 8 times, where its longest side is below `at_least`."""
    scale = min(limit[0] / size[0], limit[1] / size[1], max(1.0, min(8.0, at_least / max(size))))
    return max(MIN_SIDE, round(size[0] * scale)), max(MIN_SIDE, round(size[1] * scale))


def small_picture(picture: Image.Image) -> Image.Image:
    """RGB at the size of a page, which the others draw on; large pictures are touched only here."""
    return on_colour(picture).resize(_fit(picture.size, PICTURE), Image.Resampling.LANCZOS, reducing_gap=2.0)


def stretched(size: Size, shown: Size) -> str:
    """What to say of a picture that `_fit` made thicker."""
    ratio = (shown[0] * size[1]) / (shown[1] * size[0])
    return "" if 0.9 < ratio < 1.1 else ", thicker than it is"


def is_wide(small: Image.Image) -> bool:
    """Whether it gets a line of its own."""
    return small.width > 4 * small.height


def panel_picture(small: Image.Image) -> Image.Image:
    """A small picture as one of many in a grid."""
    return small if is_wide(small) else small.resize(_fit(small.size, PANEL), Image.Resampling.LANCZOS)


def strongest(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """The highest value of each cell; one cell with nothing where there is no map."""
    return maps.max(axis=0) if len(maps) else np.zeros((1, 1), np.float32)


def coloured(values: NDArray[np.floating], grey: NDArray[np.floating] | float) -> NDArray[np.uint8]:
    """Values of a map over grey (both 0..1) as RGB: the one scale of all panels. Low values let the picture through."""
    from matplotlib import colormaps

    values = np.clip(values, 0, 1)
    weight = (0.82 * np.minimum(values / 0.4, 1))[..., None]
    # Less contrast in the picture leaves brightness to the map.
    base = (0.22 + 0.6 * np.asarray(grey, np.float32))[..., None]
    blend = base * (1 - weight) + colormaps[COLOUR_MAP](values)[..., :3] * weight
    return (blend * 255).round().astype(np.uint8)


def colour_bar() -> Image.Image:
    """The scale of `coloured` from left to right."""
    return Image.fromarray(coloured(np.linspace(0, 1, 340, dtype=np.float32), 0.5)[None].repeat(8, axis=0))


def heat_picture(small: Image.Image, heat: NDArray[np.float32], threshold: float | None = None) -> Image.Image:
    """The picture in grey under a map of 0..1; the cells from the threshold on are outlined along their edges."""
    grey = np.asarray(small.convert("L"), np.float32) / 255
    smooth = Image.fromarray(heat).resize(small.size, Image.Resampling.BILINEAR)
    shown = Image.fromarray(coloured(np.asarray(smooth), grey))
    if threshold is None:
        return shown
    high = Image.fromarray((heat >= threshold).astype(np.float32)).resize(small.size, Image.Resampling.BOX)
    mask = Image.fromarray((np.asarray(high) > 0).astype(np.uint8) * 255)
    line = 2 if small.width >= 6 * heat.shape[1] else 1
    shown.paste((0, 0, 0), mask=_ring(mask, line + 1))
    shown.paste((255, 255, 255), mask=_ring(mask, line))
    return shown


def _ring(mask: Image.Image, width: int) -> Image.Image:
    # As MaxFilter(2 * width + 1) has it, in a tenth of the time: a mean of 0 and 255 is 0 where all are.
    wider = np.asarray(mask.filter(ImageFilter.BoxBlur(width))) > 0
    return Image.fromarray(wider * np.uint8(255) - np.asarray(mask))


def boxed_picture(small: Image.Image, size: Size, boxes: Tensor) -> Image.Image:
    """A picture of `size` with numbered boxes: deleted parts dark, parts that become gaps of the collage pale."""
    if not len(boxes):
        return small
    layout = plan_layout(boxes)
    across, down = small.width / size[0], small.height / size[1]
    kept = np.zeros(small.width, bool), np.zeros(small.height, bool)
    for line, runs, scale in ((kept[0], layout.columns, across), (kept[1], layout.rows, down)):
        for start, stop in _scaled(runs_of(runs), scale):
            line[start:stop] = True
    pixels = np.asarray(small, np.float32)
    shown = np.where((kept[1][:, None] & kept[0])[..., None], pixels * 0.3 + 178, pixels * 0.42)
    for box in boxes.tolist():
        (x0, x1), (y0, y1) = *_scaled([(box[0], box[2])], across), *_scaled([(box[1], box[3])], down)
        shown[y0:y1, x0:x1] = pixels[y0:y1, x0:x1]
    picture = Image.fromarray(shown.astype(np.uint8))
    return _framed(picture, size, boxes.tolist(), runs_of(layout.columns), runs_of(layout.rows), outside=True)


def layout_picture(collage: Image.Image, boxes: Tensor) -> Image.Image:
    """The collage with each box's number where it landed, and the kept columns and rows end to end."""
    layout = plan_layout(boxes)
    shown = collage.convert("RGB").resize(_fit(collage.size, PICTURE, COLLAGE_SIDE), Image.Resampling.LANCZOS)
    columns, rows = _end_to_end(runs_of(layout.columns)), _end_to_end(runs_of(layout.rows))
    return _framed(shown, collage.size, layout.positions.tolist(), columns, rows, outside=False)


def runs_of(intervals: Tensor) -> Runs:
    """The kept columns or rows of a `Layout`, as (start, stop)."""
    return [(start, stop) for start, stop in intervals.tolist()]


def _end_to_end(runs: Runs) -> Runs:
    ends = np.cumsum([stop - start for start, stop in runs]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _scaled(runs: Iterable[tuple[int, int]], scale: float) -> Runs:
    """Intervals in pixels of what is drawn, none of them empty."""
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
            draw.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), outline=box_colour(number), width=OUTLINE)
        else:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=box_colour(number), width=OUTLINE)
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


def box_colour(number: int) -> tuple[int, int, int]:
    """RGB of a box and its number; counts from 0."""
    return BOX_COLOURS[number % len(BOX_COLOURS)]


def _tag(number: int) -> Image.Image:
    """The label of box `number`, which counts from 0; people count from 1."""
    font = ImageFont.load_default(16)
    tag = Image.new("RGB", (int(font.getlength(str(number + 1))) + 9, 19), box_colour(number))
    ImageDraw.Draw(tag).text((tag.width / 2, 9.5), str(number + 1), (0, 0, 0), font, anchor="mm")
    return tag


def maps_figure(
    small: Image.Image, maps: NDArray[np.float32], labels: Sequence[str], threshold: float | None = None
) -> Image.Image:
    """The picture under each map of a method by itself, on a scale from 0 to 1, outlined from a threshold on."""
    panel, count = panel_picture(small), min(len(maps), MAX_PANELS)
    pictures = [heat_picture(panel, heat, threshold) for heat in maps[:count]]
    shown = f"the first {count} of {len(maps)} tokens; " if count < len(maps) else ""
    outlined = "" if threshold is None else f"; outlined from {threshold:g} on"
    titles = [short(label, 40) or "(blank)" for label in labels[:count]]
    scale = "part of the map's own peak" if maps.max((1, 2)).min() > 0.999 else "the map's values"
    return _panels(pictures, titles, f"{shown}{scale}{outlined}", mark=threshold)


def attention_figure(
    picture: Image.Image, maps: NDArray[np.float32], tokens: Sequence[str], prompt_tokens: int
) -> Image.Image:
    """The picture, and under the attention of each token, with its share on the picture; those of the reply in red.

    maps: what each token of prompt and reply gives to each cell. All panels share one scale.
    """
    panel = panel_picture(small_picture(picture))
    # Attention sinks, a few cells with most of the mass, would leave everything else dark.
    top = max(float(np.quantile(maps, 0.998)), 1e-12)
    pictures, titles, colours = [panel], ["the picture"], ["black"]
    for index, (heat, token) in enumerate(zip(maps, tokens, strict=True)):
        replied = index >= prompt_tokens
        pictures.append(heat_picture(panel, heat / top))
        titles.append(f"{'reply: ' if replied else ''}{short(token, 40) or repr(token)}   {heat.sum():.1%}")
        colours.append("tab:red" if replied else "black")
    return _panels(pictures, titles, "attention of a cell", top=top, colours=colours)


def _panels(
    pictures: Sequence[Image.Image],
    titles: Sequence[str],
    scale: str,
    *,
    top: float = 1.0,
    mark: float | None = None,
    colours: Sequence[str] | None = None,
) -> Image.Image:
    """Pictures of one size in a grid, and the scale of `coloured` under them, which ends at `top`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    panel, count = pictures[0], len(pictures)
    columns = 1 if is_wide(panel) else min(count, 4)
    rows = -(-count // columns)
    width = min(3.6 if columns > 1 else 8.0, 5 * panel.width / panel.height)
    height = width * panel.height / panel.width
    size = max(6.0, columns * width), min(rows * (height + 0.4) + 1, MAX_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for axis, picture, title, colour in zip(grid.flat, pictures, titles, colours or ["black"] * count, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=11, color=colour, parse_math=False)
    mappable = ScalarMappable(cmap=ListedColormap(coloured(np.linspace(0, 1, 256, dtype=np.float32), 0.5) / 255))
    mappable.set_clim(0, top)
    bar = figure.colorbar(mappable, ax=grid, orientation="horizontal", aspect=50, shrink=0.6)
    bar.set_label(scale, parse_math=False)
    if mark is not None:
        bar.ax.axvline(mark, color="black", linewidth=2)
    return _rendered(figure)


class CostPoint(NamedTuple):
    """A share of right answers, with the ends of its interval, at a cost."""

    cost: float
    share: float
    low: float
    high: float


_MARKERS = "osD^vxP*<>ph"


def tenth_below(lows: Iterable[float]) -> float:
    """Where an axis of shares begins that holds intervals with these lower ends; 0 where there are none."""
    return int(10 * min(lows, default=0.0)) / 10


def frontier_panel(axes: Axes, series: Mapping[str, Sequence[CostPoint]], cost: str, lowest: float = 0.0) -> None:
    """Right answers over a cost, on a logarithmic scale: a line for each series, through its points in their order.

    series: by name; one without points keeps its colour for other panels. cost: what it is called. lowest: share at
    which the axis begins.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for number, (name, own) in enumerate(series.items()):
        if not own:
            continue
        ends = [[one.share - one.low for one in own], [one.high - one.share for one in own]]
        axes.errorbar(
            [one.cost for one in own], [one.share for one in own], yerr=ends, label=name, capsize=2, linewidth=1,
            marker=_MARKERS[number % len(_MARKERS)], color=f"C{number}",
        )  # fmt: skip
    axes.set(xscale="log", xlabel=cost, ylim=(lowest, 1.02))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def frontier_figure(series: Mapping[str, Sequence[CostPoint]], cost: str) -> Image.Image:
    """One `frontier_panel`, to be read on a phone too; lines in the order of cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    lowest = tenth_below(point.low for own in series.values() for point in own)
    frontier_panel(axes, {name: sorted(own) for name, own in series.items()}, cost, lowest)
    axes.set_ylabel("right answers")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return _rendered(figure)


def overview_figure(rows: Sequence[Sequence[tuple[Image.Image | None, str]]], heading: str) -> Image.Image:
    """Pictures with titles side by side, a row for each picture asked about; `None` leaves a place empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.6 * len(rows) + 1.2), layout="constrained")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes, panels in zip(grid, rows, strict=True):
        for axis, (picture, title) in zip(axes, panels, strict=True):
            axis.set_title(title, fontsize=10, wrap=True, parse_math=False)
            axis.set_axis_off()
            if picture is not None:
                axis.imshow(picture)
    figure.suptitle(heading, fontsize=12, parse_math=False)
    return _rendered(figure)


def _rendered(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Matplotlib's own font has no Chinese, for one; the HTML page, which uses the reader's fonts, has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def short(text: str, length: int = 110) -> str:
    """In one line, cut where it is longer."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
