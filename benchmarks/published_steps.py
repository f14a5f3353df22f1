"""HiDe's steps from rows to collages as the released code takes them: one row, region, pair and crop at a time.

Names, arguments and results are those of the released code, its defects left out, so that `hide.drop_in` can be held
against this module and installed in it. With `DEBUG` a folder, the three debugging PNGs are written too.
"""

from __future__ import annotations

import base64
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import measure

DEBUG: Path | None = None
Array = NDArray[Any]


def _normalised(row: Array, sigma: float) -> Array:
    smooth = ndimage.gaussian_filter(row, sigma, axes=(1, 2)) if sigma > 0 else row
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def process(
    dicts: Any, start_k: int, end_k: int, attention: Any, inputs: Any, img_start: Any, img_end: Any, sig: float
) -> dict[int, dict[int, Array]]:
    found: dict[int, dict[int, Array]] = {}
    prior: list[list[Array]] = [[] for _ in img_start]
    for k in range(start_k, end_k - 4):
        rows = []
        for image, (start, stop) in enumerate(zip(img_start, img_end, strict=True)):
            _, height, width = (int(n) for n in inputs["image_grid_thw"][image])
            layers = [layer[0][0][k][start:stop] for layer in attention]
            rows.append(np.mean(layers, axis=0).reshape(1, height // 2, width // 2).astype(np.float64))
        if k < start_k + 8:
            for image, row in enumerate(rows):
                prior[image].append(_normalised(row, sig))
            continue
        image = int(np.argmax([row.max() for row in rows]))
        own = np.maximum(_normalised(rows[image], sig) - np.mean(prior[image], axis=0), 0)
        if own.max() > 0:
            found.setdefault(image, {})[k] = (own - own.min()) / (own.max() - own.min())
    return found


def find_top_n_attended_regions(norm_att: Array, n: int, threshold: float = 0.5) -> tuple[list[list[int]], int]:
    scored = []
    labels = measure.label(norm_att >= threshold, connectivity=2)
    for region in measure.regionprops(labels):
        y0, x0, y1, x1 = region.bbox
        scored.append((norm_att[labels == region.label].sum(), [x0, y0, x1, y1]))
    scored.sort(key=lambda item: -item[0])
    return [box for _, box in scored], len(scored)


def merge_overlapping_bboxes(bboxes: list[list[int]]) -> list[list[int]]:
    left = [list(box) for box in bboxes]
    changed = True
    while changed:
        changed = False
        for i in range(len(left)):
            for j in range(i + 1, len(left)):
                a, b = left[i], left[j]
                if not (a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]):
                    left[i] = [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
                    del left[j]
                    changed = True
                    break
            if changed:
                break
    return left


def decompose_bbox_by_alpha(image_bgra: Array, bbox: list[int], alpha_threshold: int = 10) -> list[list[int]]:
    x0, y0, x1, y1 = bbox
    filled = ndimage.binary_fill_holes(image_bgra[y0:y1, x0:x1, 3] > alpha_threshold)
    parts, _ = ndimage.label(filled, np.ones((3, 3)))
    return [
        [x0 + columns.start, y0 + rows.start, x0 + columns.stop, y0 + rows.stop]
        for rows, columns in ndimage.find_objects(parts)
    ]


def _places(intervals: list[tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Where each edge lands when stretches that no interval covers have no length, and the length of all."""
    edges = sorted({edge for interval in intervals for edge in interval})
    places, at = {edges[0]: 0}, 0
    for left, right in pairwise(edges):
        if any(start < right and left < stop for start, stop in intervals):
            at += right - left
        places[right] = at
    return places, at


def compact_and_center_with_relative_pos(
    imgidx: int, img_nums: int, image: str, normalized_bboxes: list[Any], n: int = 1
) -> tuple[list[str] | None, list[list[float]]]:
    data = base64.b64decode(image.partition("base64,")[2]) if image.startswith("data:") else Path(image).read_bytes()
    source = Image.open(io.BytesIO(data)).convert("RGBA")
    pixels, (width, height) = np.array(source), source.size
    boxes = [
        [int(x0 * width), int(y0 * height), int(x1 * width), int(y1 * height)] for x0, y0, x1, y1 in normalized_bboxes
    ]
    merged = merge_overlapping_bboxes([box for box in boxes if box[0] < box[2] and box[1] < box[3]])
    shown = [part for box in merged for part in decompose_bbox_by_alpha(pixels, box)]
    if not shown:
        return None, []
    x, columns = _places([(box[0], box[2]) for box in shown])
    y, rows = _places([(box[1], box[3]) for box in shown])
    canvas = np.zeros((rows, columns, 4), np.uint8)
    for x0, y0, x1, y1 in shown:
        canvas[y[y0] : y[y1], x[x0] : x[x1]] = pixels[y0:y1, x0:x1]
    made = Image.fromarray(canvas)
    if DEBUG is not None:
        masked, centred = Image.new("RGBA", source.size), Image.new("RGBA", source.size)
        for box in shown:
            masked.paste(source.crop(tuple(box)), tuple(box[:2]))
        centred.paste(made, ((width - columns) // 2, (height - rows) // 2))
        for name, debug in (("masked", masked), ("centred", centred), ("compact", made)):
            debug.save(DEBUG / f"{name}_{img_nums}_{imgidx}.png")
    buffer = io.BytesIO()
    made.save(buffer, "PNG")
    uri = "data:image;base64," + base64.b64encode(buffer.getvalue()).decode()
    return [uri], [[x0 / width, y0 / height, x1 / width, y1 / height] for x0, y0, x1, y1 in shown]


def from_img_and_att_get_cropbox(
    inputs: Any, attention: Any, dicts: Any, img_url: Any, img_start: Any, img_end: Any, sig: Any, thre: Any
) -> dict[str, dict[str, list[Any]]]:
    layers = [layer for layer in attention if layer is not None]
    start_k, end_k = img_end[-1] + 1, len(inputs["input_ids"][0])
    results: dict[str, dict[str, list[Any]]] = {}
    for sigma in sig:
        for threshold in thre:
            boxes: dict[int, dict[int, list[Any]]] = {}
            for image, maps in process(dicts, start_k, end_k, layers, inputs, img_start, img_end, sigma).items():
                for k, own in maps.items():
                    _, rows, columns = own.shape
                    cells, _ = find_top_n_attended_regions(own[0], 100, threshold)
                    normalised = [(x0 / columns, y0 / rows, x1 / columns, y1 / rows) for x0, y0, x1, y1 in cells]
                    boxes.setdefault(k, {})[image] = normalised
            boxes = dict(sorted(boxes.items()))
            words, text = {}, ""
            for k in range(start_k, end_k):
                text += dicts[int(inputs["input_ids"][0][k])]
                if k in boxes:
                    words[k], text = text, ""
            pooled: dict[int, list[Any]] = {}
            for of_token in boxes.values():
                for image, own in of_token.items():
                    pooled.setdefault(image, []).extend(own)
            collages: list[str] = []
            for image, own in pooled.items():
                made, final = compact_and_center_with_relative_pos(image, len(img_url), img_url[image], own)
                if made:
                    collages += made
                    pooled[image] = final
            crops: dict[int, Any] = {k: {} for k in boxes}
            results.setdefault(str(sigma), {})[str(threshold)] = [boxes, crops, words, collages, pooled]
    return results
