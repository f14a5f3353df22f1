"""The released functions and ours under their names, from attention rows to a collage as a data URI.

`python -m benchmarks.drop_in` measures on one CPU core: `benchmarks.published_steps`, then the same module with
`hide.drop_in` installed; 48 rows and 8 of the prior on a grid of 95 x 170, an 8K picture as a JPEG file, without and
with the released code's debugging PNGs. Nothing is timed before both gave the same boxes and the same pixels.
"""

from __future__ import annotations

import base64
import functools
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import published_steps
from benchmarks.regions_to_collage import GRID, SIZES, THRESHOLD, line, measure, picture
from benchmarks.rows_to_pixel_values import PRIOR, SIGMA, attention
from hide import drop_in
from hide.drop_in.qwen import TAIL
from hide_kernels import resize


def arguments(folder: Path) -> dict[str, Any]:
    """What `from_img_and_att_get_cropbox` is given: a picture of blurred noise in a file, and rows of its objects."""
    size = SIZES["8K"]
    path = folder / "picture.jpg"
    Image.fromarray(resize(picture((size[0] // 8, size[1] // 8)), size).numpy()).save(path, quality=90)
    rows = attention().flatten(1).numpy()
    start, stop = 4, 4 + rows.shape[1]
    places: list[Any] = [None] * (stop + 1)
    places += [np.pad(row, (start, 1 + len(rows) + TAIL)) for row in rows] + [None] * TAIL
    return {
        "inputs": {
            "input_ids": torch.zeros(1, len(places), dtype=torch.int64),
            "image_grid_thw": torch.tensor([[1, 2 * GRID[0], 2 * GRID[1]]]),
        },
        "attention": [None, [[places]], None],
        "dicts": {0: "token"},
        "img_url": [str(path)],
        "img_start": [start],
        "img_end": [stop],
        "sig": [SIGMA],
        "thre": [THRESHOLD],
    }


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether two results show the same boxes, texts and pixels."""
    pixels = [[np.asarray(Image.open(_file(uri))) for uri in found[3]] for found in (one, other)]
    boxes = [{image: sorted(map(tuple, own)) for image, own in found[4].items()} for found in (one, other)]
    equal = all(np.array_equal(a, b) for a, b in zip(*pixels, strict=True))
    return equal and boxes[0] == boxes[1] and one[2] == other[2]


def _file(uri: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))


def table() -> list[dict[str, Any]]:
    """Rows of `regions_to_collage.line`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = arguments(folder)

        def run(debug: Path | None) -> list[Any]:
            published_steps.DEBUG = debug
            found: list[Any] = published_steps.from_img_and_att_get_cropbox(**given)[str(SIGMA)][str(THRESHOLD)]
            return found

        cpu = torch.device("cpu")
        want = run(None)
        with drop_in.installed(published_steps):
            if not same(run(None), want):
                raise AssertionError("drop-in: other boxes or pixels than from the published steps")
            ours = measure("", "", "drop-in", functools.partial(run, None), 0, cpu)
        shown = Image.open(_file(want[3][0]))
        shape = f"{PRIOR + len(want[0])} rows, 8K to {shown.width}x{shown.height}"
        rows = [ours]
        path = given["img_url"][0]
        rows.append(measure("", "", "  of which the JPEG", lambda: Image.open(path).load(), 0, cpu))
        for what, debug in (("no files", None), ("with PNGs", folder)):
            rows.append(measure("", "", f"published steps, {what}", functools.partial(run, debug), 0, cpu))
        return [row._replace(what="rows to URI", shape=shape)._asdict() for row in rows]


def main() -> int:
    torch.set_num_threads(1)
    for row in table():
        print(line(row).replace("  0.00 MB", ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
