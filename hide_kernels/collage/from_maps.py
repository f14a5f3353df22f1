"""The whole way from maps to a collage, which on a GPU takes one read by the host."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hide_kernels import backends
from hide_kernels.collage.api import COMPILED, Collage, Look, check_image, check_look, collage, planned_collage
from hide_kernels.collage.boxes import boxes_to_pixels
from hide_kernels.regions import regions


def collage_of_maps(
    image: Tensor,
    maps: Tensor,
    threshold: float,
    *,
    valid: Tensor | None = None,
    max_regions: int = 256,
    fill: tuple[int, int, int] | None = None,
    alpha: Literal["blend", "drop"] = "blend",
    alpha_threshold: int = 10,
) -> Collage:
    """Collage of the regions of all maps together: `regions`, `boxes_to_pixels`, `collage`, with the same result.

    No region is lost: where a map has more than `max_regions`, they are found again with as many slots as it needs.
    With image and maps on one GPU, regions, boxes, layout and pixels are computed there, and the host reads once, the
    plan, before the pixels are copied. More than 1,024 boxes, and boxes over transparency, take the host's path.

    Args:
        image: (H, W, 3) RGB or (H, W, 4) RGBA, uint8, any strides.
        maps: (M, h, w) float32 or float64, whose grid of cells covers the image.
        threshold, valid, max_regions: as `regions` documents.
        fill, alpha, alpha_threshold: as `collage` documents.

    Returns:
        `Collage(image, boxes, layout)`; image on the device of `image`, boxes on the device of `maps`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    size = check_image(image)
    check_look(fill, alpha, alpha_threshold)
    found = regions(maps, threshold, valid=valid, max_regions=max_regions)
    grid = (maps.shape[1], maps.shape[2])
    backend = backends.resolve("collage", None, image=image)
    if maps.device == image.device and backend in COMPILED:
        from hide_kernels.collage.compiled import DONE, plan_compiled

        plan = plan_compiled(found.boxes, found.counts, grid=grid, size=size)
        if plan.most > max_regions:
            found = regions(maps, threshold, valid=valid, max_regions=plan.most)
            plan = plan_compiled(found.boxes, found.counts, grid=grid, size=size)
        if plan.status == DONE:
            return planned_collage(image, plan, Look(fill, alpha == "blend", alpha_threshold), backend, maps.device)
    elif len(maps) and int(found.counts.max()) > max_regions:
        found = regions(maps, threshold, valid=valid, max_regions=int(found.counts.max()))
    used = torch.arange(found.boxes.shape[1], device=maps.device) < found.counts[:, None]
    boxes = boxes_to_pixels(found.boxes[used], grid=grid, size=size)
    return collage(image, boxes, fill=fill, alpha=alpha, alpha_threshold=alpha_threshold)
