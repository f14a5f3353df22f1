"""The public operator: validation, dispatch, documentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hide_kernels import backends
from hide_kernels.collage.boxes import boxes_to_pixels, merge, opaque
from hide_kernels.collage.checks import check_boxes, check_kind, check_level
from hide_kernels.collage.layout import Layout, plan_layout

if TYPE_CHECKING:
    from hide_kernels.collage.compiled import Plan

# Backends on the kernels of csrc: one plan, on the device or on the host.
COMPILED = ("cuda", "cpp")


class Collage(NamedTuple):
    """A compact image and what it was made from; without boxes there is no image and no layout.

    image: (h, w, 3 or 4) uint8, or `None`.
    boxes: (K, 4) int64, the source pixels that it shows, x0, y0, x1, y1 half-open; `layout.positions` in the collage.
    layout: the plan, or `None`.
    """

    image: Tensor | None
    boxes: Tensor
    layout: Layout | None


def collage(
    image: Tensor,
    boxes: Tensor,
    *,
    fill: tuple[int, int, int] | None = None,
    alpha: Literal["blend", "drop"] = "blend",
    alpha_threshold: int | None = 10,
    backend: str | None = None,
) -> Collage:
    """Cut boxes out of an image and push them together: Layout-Preserving Decoupling of HiDe (arXiv 2510.00054).

    In this order: boxes that touch merge, boxes over transparency are cut down to their opaque parts (4 channels only),
    rows and columns that no box covers are deleted, and the pixels of the boxes are copied. Only the boxes are read.

    Args:
        image: (H, W, 3) RGB or (H, W, 4) RGBA, uint8, any strides: channels first is `image.permute(1, 2, 0)`.
        boxes: (K, 4) int32 or int64, half-open x0, y0, x1, y1 in pixels, inside the image.
        fill: `None` gives RGBA with transparent black gaps and the pixels as they are (alpha 255 for an RGB source).
            (r, g, b) gives RGB with gaps of that colour: white is what Qwen sees, black what InternVL sees.
        alpha: what becomes of an RGBA source where `fill` is a colour. "blend" lays the pixels over it, exactly as
            Pillow's `paste` with the alpha as mask (Qwen); "drop" takes r, g, b as they are, exactly as Pillow's
            `convert("RGB")` (InternVL, with a black fill).
        alpha_threshold: 0 to 255; alpha above it is opaque when boxes are cut down. `None`: they are not.
        backend: `None` picks (`hide_kernels.explain("collage")` says which); a name is used or refused.

    Returns:
        `Collage(image, boxes, layout)`; image on the device of `image`, boxes on the device of `boxes`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    size = check_image(image)
    check_kind("boxes", boxes)
    check_look(fill, alpha, alpha_threshold)
    name = backends.resolve(
        "collage", backend, image=image, boxes=boxes, fill=fill, alpha=alpha, alpha_threshold=alpha_threshold
    )
    look = Look(fill, alpha == "blend", alpha_threshold)
    if name in COMPILED:
        from hide_kernels.collage.compiled import DONE, plan_compiled

        plan = plan_compiled(boxes.to(image.device)[None], None, grid=None, size=size)
        if plan.status == DONE:
            return planned_collage(image, plan, look, name, boxes.device)
    pixels = check_boxes("boxes", boxes, size)
    return boxed_collage(image, _shown(image, merge(pixels), alpha_threshold), look, name, boxes.device)


def final_boxes(image: Tensor, cells: Tensor, *, grid: tuple[int, int], alpha_threshold: int = 10) -> Tensor:
    """Boxes that a collage of pooled regions shows, in the order of operations of published HiDe (2510.00054).

    Cells to normalised coordinates to pixels, merge, cut down to opaque parts: `collage(image, pixels).boxes` for
    `pixels = boxes_to_pixels(cells, ...)`, without the collage. Do not pass the result to `collage`: it would merge the
    opaque parts again.

    Args:
        image: (H, W, 3) or (H, W, 4) uint8, the source.
        cells: (K, 4) int32 or int64, half-open x0, y0, x1, y1 in grid cells, of all tokens of this image together.
        grid: (rows, columns) of cells.
        alpha_threshold: 0 to 255; alpha above it is opaque.

    Returns:
        (F, 4) int64 half-open x0, y0, x1, y1 in pixels, on the device of `cells`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    size = check_image(image)
    check_level("alpha_threshold", alpha_threshold)
    pixels = boxes_to_pixels(cells, grid=grid, size=size)
    return torch.from_numpy(_shown(image, merge(pixels.cpu().numpy()), alpha_threshold)).to(cells.device)


class Look(NamedTuple):
    """What a collage shows of the pixels, from arguments that were checked."""

    fill: tuple[int, int, int] | None
    blend: bool
    alpha_threshold: int | None


def planned_collage(image: Tensor, plan: Plan, look: Look, backend: str, boxes_device: torch.device) -> Collage:
    """Collage from a plan made where the image is; boxes over transparency are cut down, and laid out, on the host."""
    if image.shape[2] == 4:
        shown = _shown(image, plan.boxes.long().numpy(), look.alpha_threshold)
        if not np.array_equal(shown, plan.boxes.numpy()):
            return boxed_collage(image, shown, look, backend, boxes_device)
    kept = plan.boxes.to(boxes_device, torch.int64)
    if plan.layout is None:
        return Collage(None, kept, None)
    return Collage(_gather(image, *plan.on_device, plan.layout.size, look, backend), kept, plan.layout)


def boxed_collage(
    image: Tensor, shown: NDArray[np.int64], look: Look, backend: str, boxes_device: torch.device
) -> Collage:
    """Collage of the boxes as they are, laid out on the host."""
    kept = torch.from_numpy(shown)
    if not len(shown):
        return Collage(None, kept.to(boxes_device), None)
    layout = plan_layout(kept)
    canvas = _gather(image, kept, layout.positions, layout.size, look, backend)
    return Collage(canvas, kept.to(boxes_device), layout)


def _gather(image: Tensor, boxes: Tensor, positions: Tensor, size: tuple[int, int], look: Look, backend: str) -> Tensor:
    from hide_kernels.collage.reference import gather_reference

    if backend in COMPILED:
        from hide_kernels.collage.compiled import gather_compiled

        boxes, positions = (tensor.to(image.device, torch.int32) for tensor in (boxes, positions))
        canvas = gather_compiled(image, boxes, positions, size, look.fill, look.blend)
        if canvas is not None:
            return canvas
    pixels, source, target = (tensor.cpu().numpy() for tensor in (image, boxes, positions))
    return torch.from_numpy(gather_reference(pixels, source, target, size, look.fill, look.blend)).to(image.device)


def _shown(image: Tensor, merged: NDArray[np.int64], alpha_threshold: int | None) -> NDArray[np.int64]:
    if alpha_threshold is None or image.shape[2] == 3:
        return merged
    return opaque(image[..., 3], merged, alpha_threshold)


def check_image(image: Tensor) -> tuple[int, int]:
    """(height, width) of an (H, W, 3 or 4) uint8 image; anything else is a `TypeError` or `ValueError`."""
    if not isinstance(image, Tensor):
        raise TypeError(f"image: got {type(image).__name__}, want a torch.Tensor")
    if image.dtype != torch.uint8:
        raise TypeError(f"image: got dtype {image.dtype}, want uint8")
    if image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape[:2]:
        raise ValueError(f"image: got shape {tuple(image.shape)}, want (H, W, 3) or (H, W, 4)")
    return image.shape[0], image.shape[1]


def check_look(fill: tuple[int, int, int] | None, alpha: str, alpha_threshold: int | None) -> None:
    """Refuses a fill, alpha mode or alpha threshold that `collage` does not document."""
    if fill is not None:
        _check_fill(fill)
    if alpha not in ("blend", "drop"):
        raise ValueError(f"alpha: got {alpha!r}, want 'blend' or 'drop'")
    if alpha == "drop" and fill is None:
        raise ValueError("alpha: got 'drop' with fill=None, which keeps alpha; want a fill colour")
    if alpha_threshold is not None:
        check_level("alpha_threshold", alpha_threshold)


def _check_fill(fill: tuple[int, int, int]) -> None:
    if not isinstance(fill, (tuple, list)) or len(fill) != 3 or not all(isinstance(value, int) for value in fill):
        raise TypeError(f"fill: got {fill!r}, want None or (r, g, b) as ints")
    if not all(0 <= value <= 255 for value in fill):
        raise ValueError(f"fill: got {tuple(fill)}, want values from 0 to 255")
