"""What the released code for Qwen2.5-VL and Qwen3-VL calls: from attention rows to boxes to the collage."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hide.drop_in.rows import Attention, rows_over
from hide_kernels import regions, token_maps
from hide_kernels.collage import merge_boxes, opaque_boxes, plan_layout
from hide_kernels.collage.boxes import merge
from hide_kernels.token_maps import TokenMaps

# Rows before the entities, the noise prior, and rows behind them that have no map: template tokens of Qwen's prompt.
PRIOR = 8
TAIL = 4
# Patches on a side of a token; the released code halves the patch grid whatever the model merges.
MERGE = 2

Box = tuple[float, float, float, float]


def process(
    dicts: Mapping[int, str],
    start_k: int,
    end_k: int,
    attention: Attention,
    inputs: Mapping[str, Any],
    img_start: Sequence[int],
    img_end: Sequence[int],
    sig: float,
) -> dict[int, dict[int, NDArray[np.float32]]]:
    """Token-wise Attention Decoupling: a purified map for each token behind the fixed words of the search prompt.

    Args:
        dicts: text of each token id; not used.
        start_k: position behind the last picture; the eight rows from there are the noise prior.
        end_k: length of the prompt; the last four positions before it have no map.
        attention: see `hide.drop_in.rows.Attention`; rows of positions start_k to end_k - 5.
        inputs: the processor's, with `image_grid_thw`.
        img_start, img_end: per picture its half-open range of positions.
        sig: smoothing in grid cells.

    Returns:
        `{picture: {position: map}}`, (1, rows, columns) float32 with peak 1, pictures in the order of first use and
        positions ascending. Tokens without a map, constant and non-finite rows among them, are not in it.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    found: dict[int, dict[int, NDArray[np.float32]]] = {}
    made = _maps(start_k, end_k, attention, inputs, img_start, img_end, sig)
    maps = [of_image.cpu().numpy() for of_image in made.maps]
    for token, image in taken(made):
        found.setdefault(image, {})[start_k + PRIOR + token] = maps[image][token, None]
    return found


def find_top_n_attended_regions(norm_att: NDArray[Any], n: int, threshold: float = 0.5) -> tuple[list[list[int]], int]:
    """Boxes of the 8-connected parts of `norm_att >= threshold`.

    Args:
        norm_att: (rows, columns) or (1, rows, columns).
        n: not used: all regions are returned, as by the released code.
        threshold: inclusive.

    Returns:
        Boxes [x0, y0, x1, y1] in cells, half-open, the largest sum of the map first; and how many there are.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    array = np.asarray(norm_att)
    if array.ndim not in (2, 3) or array.shape[:-2] not in ((), (1,)):
        raise ValueError(f"norm_att: got shape {array.shape}, want (rows, columns) or (1, rows, columns)")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    maps = torch.from_numpy(np.ascontiguousarray(array)).reshape(1, *array.shape[-2:])
    (boxes,) = _regions(maps, threshold)
    return boxes, len(boxes)


def merge_overlapping_bboxes(bboxes: Sequence[Sequence[float]]) -> list[list[float]]:
    """Boxes that overlap or touch become their common bounding box, until all are strictly apart.

    Args:
        bboxes: of x0, y0, x1, y1, integers or floats; left as they are.

    Returns:
        Boxes [x0, y0, x1, y1] of the same numbers in reading order, without those of no area.

    Raises:
        ValueError: for anything but boxes with x0 <= x1 and y0 <= y1.
    """
    merged: list[list[float]] = merge(_boxes("bboxes", bboxes)).tolist()
    return merged


def decompose_bbox_by_alpha(
    image_bgra: NDArray[np.uint8], bbox: Sequence[int], alpha_threshold: int = 10
) -> list[list[int]]:
    """Bounding boxes of the parts of a box that are not transparent, in raster order of their first pixels.

    Args:
        image_bgra: (H, W, 4) uint8, the alpha channel last.
        bbox: half-open x0, y0, x1, y1 in pixels.
        alpha_threshold: alpha above it is opaque.

    Returns:
        Boxes [x0, y0, x1, y1] in pixels; a part in a hole of another part belongs to that one.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    array = np.asarray(image_bgra)
    if array.ndim != 3 or array.shape[2] != 4 or array.dtype != np.uint8:
        raise ValueError(f"image_bgra: got {array.dtype} of shape {array.shape}, want uint8 (H, W, 4)")
    alpha = torch.from_numpy(np.ascontiguousarray(array[..., 3]))
    parts: list[list[int]] = opaque_boxes(alpha, torch.tensor([list(bbox)]), alpha_threshold).tolist()
    return parts


def compact_and_center_with_relative_pos(
    imgidx: int,
    img_nums: int,
    image: str | Path | Image.Image,
    normalized_bboxes: Sequence[Sequence[float]],
    n: int = 1,
    *,
    save_to: str | Path | None = None,
) -> tuple[list[str] | Image.Image | None, list[list[float]]]:
    """Layout-Preserving Decoupling: the boxes cut out of the picture and pushed together, as one picture.

    Args:
        imgidx, img_nums: which of how many pictures this is; only named in the file of `save_to`.
        image: a path, a data URI, or a Pillow image (the released code for InternVL). It is not turned upright.
        normalized_bboxes: x0, y0, x1, y1 as parts of the picture, 0 to 1.
        n: how many boxes must overlap; only 1, the released code's own value, is supported.
        save_to: folder in which the collage is also written, as `collage_{img_nums}_{imgidx}.png`; `None`: no file.

    Returns:
        `([data URI of the collage as PNG], boxes)`, for a Pillow image `(collage, boxes)`: RGBA with transparent gaps,
        and the merged boxes [x0, y0, x1, y1] that it shows, normalised. `(None, [])` where no box has an area.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    if n != 1:
        raise ValueError(f"n: got {n}, want 1, the released code's own value")
    shown, boxes = _compact(_opened(image), normalized_bboxes)
    if shown is None:
        return None, []
    if save_to is not None:
        shown.save(Path(save_to, f"collage_{img_nums}_{imgidx}.png"))
    return (shown if isinstance(image, Image.Image) else [_data_uri(shown)]), boxes


def from_img_and_att_get_cropbox(
    inputs: Mapping[str, Any],
    attention: Attention,
    dicts: Mapping[int, str],
    img_url: Sequence[str | Path | Image.Image],
    img_start: Sequence[int],
    img_end: Sequence[int],
    sig: Iterable[float],
    thre: Iterable[float],
) -> dict[str, dict[str, list[Any]]]:
    """All steps from attention rows to collages, for each smoothing and threshold.

    Args:
        inputs: the processor's, with `input_ids` and `image_grid_thw`.
        attention: see `hide.drop_in.rows.Attention`; rows of the positions behind the last picture.
        dicts: text of each token id.
        img_url: the pictures, as `compact_and_center_with_relative_pos` takes them.
        img_start, img_end: per picture its half-open range of positions.
        sig, thre: smoothings in grid cells, thresholds.

    Returns:
        `found[str(sigma)][str(threshold)]`, a list of five:
        boxes `{position: {picture: [(x0, y0, x1, y1), ...]}}` of each token that has a map, normalised;
        `{position: {}}` (the released code makes no single crops either);
        `{position: text}`, the text of the prompt up to there, from behind the token before it in the list;
        the collages, in the order in which the tokens use the pictures, as PNG data URIs (of Pillow images: images);
        `{picture: boxes}`, merged and normalised, in the same order; those of the tokens where there is no collage.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    if len(img_url) != len(img_start):
        raise ValueError(f"img_url: got {len(img_url)} pictures, want {len(img_start)}, as many as img_start has")
    for name, values in (("sig", sig), ("thre", thre)):
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(f"{name}: got {values!r}, want a list of numbers")
    thresholds = list(thre)
    ids = torch.as_tensor(inputs["input_ids"])[0].tolist()
    start_k = img_end[-1] + 1 if len(img_end) else 0
    opened: dict[int, Image.Image] = {}
    results: dict[str, dict[str, list[Any]]] = {}
    for sigma in sig:
        made = _maps(start_k, len(ids), attention, inputs, img_start, img_end, sigma)
        for threshold in thresholds:
            merged = _merged_boxes(made, threshold, start_k + PRIOR)
            bounding: dict[int, list[Any]] = {}
            for of_token in merged.values():
                for image, boxes in of_token.items():
                    bounding.setdefault(image, []).extend(boxes)
            collages: list[str | Image.Image] = []
            for image, boxes in bounding.items():
                if image not in opened:
                    opened[image] = _opened(img_url[image])
                shown, final = _compact(opened[image], boxes)
                if shown is not None:
                    collages.append(shown if isinstance(img_url[image], Image.Image) else _data_uri(shown))
                    bounding[image] = final
            words = _words(list(merged), ids, start_k, dicts)
            results.setdefault(str(sigma), {})[str(threshold)] = [
                merged,
                {position: {} for position in merged},
                words,
                collages,
                bounding,
            ]
    return results


def taken(made: TokenMaps) -> Iterator[tuple[int, int]]:
    """(token, picture) of each token that has a map."""
    pictures = zip(made.valid.tolist(), made.image_index.tolist(), strict=True)
    return ((token, image) for token, (valid, image) in enumerate(pictures) if valid)


def _maps(
    start_k: int,
    end_k: int,
    attention: Attention,
    inputs: Mapping[str, Any],
    img_start: Sequence[int],
    img_end: Sequence[int],
    sigma: float,
) -> TokenMaps:
    """Maps of the tokens from start_k + PRIOR on."""
    patches = torch.as_tensor(inputs["image_grid_thw"])[:, 1:] // MERGE
    if not 0 < len(img_start) == len(img_end) == len(patches):
        got = f"{len(img_start)}, {len(img_end)} and {len(patches)}"
        raise ValueError(f"img_start, img_end, image_grid_thw: got {got}, want as many, at least one")
    spans, grids = list(zip(img_start, img_end, strict=True)), patches.tolist()
    for image, ((start, stop), (rows, columns)) in enumerate(zip(spans, grids, strict=True)):
        if stop - start != rows * columns:
            raise ValueError(f"img_end[{image}]: got {stop - start} tokens, want {rows * columns} by image_grid_thw")
    positions = range(start_k, max(start_k, end_k - TAIL))
    rows_of = rows_over(attention, positions, start_k, spans)
    laid_out = [rows.unflatten(1, tuple(grid)) for rows, grid in zip(rows_of, grids, strict=True)]
    return token_maps(laid_out, prior_rows=min(PRIOR, len(positions)), sigma=sigma)


def _merged_boxes(made: TokenMaps, threshold: float, first: int) -> dict[int, dict[int, list[Box]]]:
    """`{position: {picture: boxes}}`, normalised, the largest score first; `first` is the position of token 0."""
    of_images = [
        _regions(maps, threshold, (made.image_index == image) & made.valid) for image, maps in enumerate(made.maps)
    ]
    merged = {}
    for token, image in taken(made):
        rows, columns = made.maps[image].shape[1:]
        merged[first + token] = {
            image: [(x0 / columns, y0 / rows, x1 / columns, y1 / rows) for x0, y0, x1, y1 in of_images[image][token]]
        }
    return merged


def _regions(maps: Tensor, threshold: float, valid: Tensor | None = None) -> list[list[list[int]]]:
    """Of each map all its boxes in cells, however many."""
    found = regions(maps, threshold, valid=valid)
    counts = found.counts.tolist()
    if max(counts, default=0) > found.boxes.shape[1]:
        found = regions(maps, threshold, valid=valid, max_regions=max(counts))
    return [boxes[:count] for boxes, count in zip(found.boxes.tolist(), counts, strict=True)]


def _compact(
    source: Image.Image, normalised: Sequence[Sequence[float]]
) -> tuple[Image.Image | None, list[list[float]]]:
    """The collage, RGBA, and the boxes that it shows, normalised; `None` and none where no box has an area."""
    boxes = _boxes("normalized_bboxes", normalised)
    if len(boxes) and not (boxes.min() >= 0 and boxes.max() <= 1):
        raise ValueError(f"normalized_bboxes: got values from {boxes.min()} to {boxes.max()}, want 0 to 1")
    size = np.array([*source.size, *source.size], np.float64)
    shown = merge_boxes(torch.from_numpy((boxes * size).astype(np.int64)))
    if source.mode == "RGBA":
        shown = opaque_boxes(torch.from_numpy(np.array(source.getchannel("A"))), shown)
    if not len(shown):
        return None, []
    layout = plan_layout(shown)
    # Cut and pasted by Pillow, which holds the picture: a tensor of all of it would take longer than the rest.
    canvas = Image.new("RGBA", layout.size[::-1])
    for box, position in zip(shown.tolist(), layout.positions.tolist(), strict=True):
        canvas.paste(source.crop(box).convert("RGBA"), position)
    final: list[list[float]] = (shown.numpy() / size).tolist()
    return canvas, final


def _boxes(name: str, boxes: Sequence[Sequence[float]]) -> NDArray[Any]:
    """(K, 4), integers where all of them are."""
    array = np.asarray(boxes) if len(boxes) else np.empty((0, 4), np.int64)
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: got {array.dtype} of shape {array.shape}, want K boxes of x0, y0, x1, y1")
    if not (array[:, :2] <= array[:, 2:]).all():
        at = int((~(array[:, :2] <= array[:, 2:]).all(axis=1)).argmax())
        raise ValueError(f"{name}[{at}]: got {array[at].tolist()}, want x0 <= x1 and y0 <= y1")
    return array


def _opened(image: str | Path | Image.Image) -> Image.Image:
    """RGB or RGBA, as the released code's own loader sees the picture: EXIF orientation is not applied."""
    if isinstance(image, str) and image.startswith("data:"):
        opened: Image.Image = Image.open(io.BytesIO(base64.b64decode(image.partition("base64,")[2])))
    elif isinstance(image, (str, Path)):
        opened = Image.open(str(image).removeprefix("file://"))
    elif isinstance(image, Image.Image):
        opened = image
    else:
        raise TypeError(f"image: got {type(image).__name__}, want a path, a data URI or a Pillow image")
    wanted = "RGBA" if opened.has_transparency_data else "RGB"
    return opened if opened.mode == wanted else opened.convert(wanted)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    # The file is read back once and thrown away: the least compression is the fastest way there and back.
    image.save(buffer, "PNG", compress_level=1)
    return "data:image;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _words(positions: Sequence[int], ids: Sequence[int], start_k: int, dicts: Mapping[int, str]) -> dict[int, str]:
    """The prompt's text cut behind each of the positions."""
    starts = [start_k, *(position + 1 for position in positions)]
    return {
        position: "".join(dicts.get(token, "") for token in ids[start : position + 1])
        for start, position in zip(starts, positions, strict=False)
    }
