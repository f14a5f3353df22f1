"""Pictures of what HiDe saw: heat map, boxes, collage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from hide.pipeline import HiDeResult

LONGEST_SIDE = 1600


def save_pictures(result: HiDeResult, directory: str | Path) -> list[Path]:
    """Write PNGs of a result into `directory` (made if missing) and return their paths.

    `overview.png` shows everything side by side. For image i: `image_i_heat.png`, the picture under the strongest map
    of each cell; `image_i_boxes.png`, the picture with the boxes that the collage shows; `image_i_collage.png`, the
    collage at full size.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for index, collage in enumerate(result.collages):
        pictures = {"heat": _heat(result, index), "boxes": _boxes(result, index)}
        if collage is not None:
            pictures["collage"] = collage
        for name, picture in pictures.items():
            written.append(directory / f"image_{index}_{name}.png")
            picture.save(written[-1])
    written.append(directory / "overview.png")
    _overview(result, written[-1])
    return written


def _shrunk(picture: Image.Image) -> Image.Image:
    from hide.images import on_colour

    small = on_colour(picture)
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return small


def _heat(result: HiDeResult, index: int) -> Image.Image:
    """The picture in grey under a heat map, opaque where a map is high."""
    from matplotlib import colormaps

    base = np.asarray(_shrunk(result.images[index]).convert("L").convert("RGB"), dtype=np.float32) / 255
    maps = result.maps.maps[index]
    if not len(maps):
        return Image.fromarray((base * 255).astype(np.uint8))
    strongest = Image.fromarray(maps.amax(0).cpu().numpy()).resize(
        (base.shape[1], base.shape[0]), Image.Resampling.BILINEAR
    )
    heat = np.asarray(strongest, dtype=np.float32)[..., None]
    colours = colormaps["inferno"](heat[..., 0])[..., :3]
    weight = np.clip(0.15 + 0.75 * heat, 0, 0.9)
    return Image.fromarray(((base * (1 - weight) + colours * weight) * 255).round().astype(np.uint8))


def _boxes(result: HiDeResult, index: int) -> Image.Image:
    """The picture, dimmed outside the boxes, each box outlined."""
    small = _shrunk(result.images[index])
    scale = small.width / result.images[index].width
    shown = Image.blend(small, Image.new("RGB", small.size), 0.55)
    corners = [[round(edge * scale) for edge in box] for box in result.boxes[index].tolist()]
    for x0, y0, x1, y1 in corners:
        shown.paste(small.crop((x0, y0, x1, y1)), (x0, y0))
    draw = ImageDraw.Draw(shown)
    for x0, y0, x1, y1 in corners:
        draw.rectangle((x0 - 2, y0 - 2, x1 + 1, y1 + 1), outline=(255, 64, 160), width=3)
    return shown


def _overview(result: HiDeResult, path: Path) -> None:
    from matplotlib.figure import Figure

    rows = len(result.images)
    figure = Figure(figsize=(16, 4.6 * rows + 1.2), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False)
    for index, axes in enumerate(grid):
        labels = ", ".join(result.maps.labels[index]) or "no token"
        boxes = len(result.boxes[index])
        collage = result.collages[index]
        panels = [
            (_heat(result, index), f"attention of: {labels}"),
            (_boxes(result, index), f"{boxes} box{'' if boxes == 1 else 'es'}"),
            (collage, "no region, no collage" if collage is None else f"collage, {collage.width} x {collage.height}"),
        ]
        for axis, (picture, title) in zip(axes, panels, strict=True):
            axis.set_title(title, fontsize=10, wrap=True)
            axis.set_axis_off()
            if picture is not None:
                axis.imshow(picture)
    plain = "" if result.plain_answer is None else f"\nplain answer: {_short(result.plain_answer)}"
    figure.suptitle(f"{_short(result.question.stem)}{plain}\nHiDe's answer: {_short(result.answer)}", fontsize=12)
    figure.savefig(path, dpi=100)


def _short(text: str, length: int = 110) -> str:
    text = " ".join(text.replace("$", r"\$").split())
    return text if len(text) <= length else text[: length - 1] + "…"
