"""The whole way from maps to a collage, which on a GPU takes one read by the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hide_kernels import backends
from hide_kernels.collage.api import COMPILED, Collage, Look, check_image, check_look, collage, planned_collage
from hide_kernels.collage.boxes import boxes_to_pixels
from hide_kernels.host_read import host_read
from hide_kernels.regions import Regions, regions


def collage_of_maps(
    image: Tensor,
    maps: Tensor,
    threshold: float,
    *,
    valid: Tensor | None = None,
    max_regions: int = 256,
    fill: tuple[int, int, int] | None = None,
    alpha: Literal["blend", "drop"] = "blend",
    alpha_threshold: int | None = 10,
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
    ((found,), _) = collages_of_maps(
        [image],
        [maps],
        threshold,
        valid=None if valid is None else [valid],
        max_regions=max_regions,
        fill=fill,
        alpha=alpha,
        alpha_threshold=alpha_threshold,
    )
    return found._replace(boxes=found.boxes.to(maps.device))


def collages_of_maps(
    images: Sequence[Tensor],
    maps: Sequence[Tensor],
    threshold: float,
    *,
    valid: Sequence[Tensor] | None = None,
    max_regions: int = 256,
    fill: tuple[int, int, int] | None = None,
    alpha: Literal["blend", "drop"] = "blend",
    alpha_threshold: int | None = 10,
    read_too: Sequence[Tensor] = (),
) -> tuple[list[Collage], list[Tensor]]:
    """As `collage_of_maps` for several images, and with them on one GPU still one read by the host.

    Args:
        images, maps, valid: one each per image.
        read_too: tensors on the device of the maps that the host reads along, whatever they are.

    Returns:
        Per image its collage, boxes on the CPU; and `read_too` on the CPU.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    for name, given in (("maps", maps), ("valid", valid)):
        if given is not None and len(given) != len(images):
            raise ValueError(f"{name}: got {len(given)}, want {len(images)}, one per image")
    sizes = [check_image(image) for image in images]
    check_look(fill, alpha, alpha_threshold)
    look = Look(fill, alpha == "blend", alpha_threshold)
    flags = [None] * len(images) if valid is None else list(valid)
    found = [
        regions(own, threshold, valid=flag, max_regions=max_regions) for own, flag in zip(maps, flags, strict=True)
    ]
    grids = [(own.shape[1], own.shape[2]) for own in maps]
    chosen = [backends.resolve("collage", None, image=image) for image in images]
    together = bool(images) and all(
        backend in COMPILED and image.device == own.device == maps[0].device
        for backend, image, own in zip(chosen, images, maps, strict=True)
    )
    if not together:
        made = [
            _collage_by_parts(image, own, own_regions, threshold, flag, grid, look, alpha)
            for image, own, own_regions, flag, grid in zip(images, maps, found, flags, grids, strict=True)
        ]
        return made, host_read(read_too)

    from hide_kernels.collage.compiled import DONE, launch_plan, plan_compiled, read_plan

    packed = [
        launch_plan(own_regions.boxes, own_regions.counts, grid=grid, size=size)
        for own_regions, grid, size in zip(found, grids, sizes, strict=True)
    ]
    read = host_read([*packed, *read_too])
    made = []
    for i, image in enumerate(images):
        plan = read_plan(packed[i], read[i])
        if plan.most > max_regions:
            found[i] = regions(maps[i], threshold, valid=flags[i], max_regions=plan.most)
            plan = plan_compiled(found[i].boxes, found[i].counts, grid=grids[i], size=sizes[i])
        if plan.status == DONE:
            made.append(planned_collage(image, plan, look, chosen[i], torch.device("cpu")))
        else:
            made.append(_collage_by_parts(image, maps[i], found[i], threshold, flags[i], grids[i], look, alpha))
    return made, read[len(images) :]


def _collage_by_parts(
    image: Tensor,
    maps: Tensor,
    found: Regions,
    threshold: float,
    valid: Tensor | None,
    grid: tuple[int, int],
    look: Look,
    alpha: Literal["blend", "drop"],
) -> Collage:
    """One operator after the other, with the host between them."""
    most = int(found.counts.max()) if len(maps) else 0
    if most > found.boxes.shape[1]:
        found = regions(maps, threshold, valid=valid, max_regions=most)
    used = torch.arange(found.boxes.shape[1], device=maps.device) < found.counts[:, None]
    boxes = boxes_to_pixels(found.boxes[used], grid=grid, size=(image.shape[0], image.shape[1])).cpu()
    return collage(image, boxes, fill=look.fill, alpha=alpha, alpha_threshold=look.alpha_threshold)
