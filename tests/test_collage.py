"""Boxes and collages against naive definitions, Pillow, and what published HiDe was seen to do; see also test_properties."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hide_kernels import geometry, native
from hide_kernels.collage import (
    Collage,
    Layout,
    boxes_to_pixels,
    collage,
    collage_of_maps,
    compiled,
    final_boxes,
    merge_boxes,
    opaque_boxes,
    plan_layout,
    source_boxes,
)
from hide_kernels.regions import regions

Box = tuple[int, int, int, int]
Mask = NDArray[np.bool_]

WHITE = (255, 255, 255)
BLACK = (0, 0, 0)


def tensor(boxes: list[Box] | list[list[int]]) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)


def noise(height: int, width: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8))


# boxes_to_pixels


def test_edges_are_normalised_before_they_are_scaled_and_cut() -> None:
    # 1 / 49 * 49 is 0.999..., so the edges fall on pixels 0 and 1 where exact arithmetic says 1 and 2.
    got = boxes_to_pixels(torch.tensor([[1, 0, 2, 1]], dtype=torch.int32), grid=(1, 49), size=(7, 49))
    assert got.dtype == torch.int64
    assert got.tolist() == [[0, 0, 1, 7]]


@pytest.mark.parametrize("rows, columns, height, width", [(31, 22, 188, 136), (95, 170, 4320, 7680), (7, 49, 5, 48)])
def test_every_edge_equals_python_arithmetic(rows: int, columns: int, height: int, width: int) -> None:
    cells = [[min(i, columns), min(i, rows), columns, rows] for i in range(max(rows, columns) + 1)]
    want = [[int(x / columns * width), int(y / rows * height), width, height] for x, y, _, _ in cells]
    assert boxes_to_pixels(tensor(cells), grid=(rows, columns), size=(height, width)).tolist() == want


# merge_boxes


def test_touching_boxes_merge_and_strictly_separate_ones_do_not() -> None:
    got = merge_boxes(tensor([[10, 10, 20, 20], [21, 0, 30, 5], [0, 0, 10, 10]]))
    assert got.tolist() == [[0, 0, 20, 20], [21, 0, 30, 5]]


@pytest.mark.parametrize(
    "second, merged", [((5, 0, 9, 5), True), ((6, 0, 9, 5), False), ((5, 5, 9, 9), True), ((5, 6, 9, 9), False)]
)
def test_a_shared_edge_or_corner_merges_and_one_pixel_between_does_not(second: Box, merged: bool) -> None:
    assert len(merge_boxes(tensor([(0, 0, 5, 5), second]))) == (1 if merged else 2)


def test_a_box_of_no_area_is_dropped_before_it_can_join_others() -> None:
    assert merge_boxes(tensor([[0, 0, 4, 4], [4, 2, 9, 2], [9, 0, 12, 4]])).tolist() == [[0, 0, 4, 4], [9, 0, 12, 4]]


def test_a_union_that_newly_touches_a_third_box_takes_it_in() -> None:
    # The third box lies in the corner that only the union of the first two reaches.
    assert merge_boxes(tensor([[0, 0, 10, 2], [9, 0, 10, 10], [0, 8, 2, 10]])).tolist() == [[0, 0, 10, 10]]


def test_thousands_of_boxes_merge_without_a_square_matrix() -> None:
    random = np.random.default_rng(0)
    corner = random.permutation(np.stack(np.meshgrid(np.arange(200), np.arange(100)), axis=-1).reshape(-1, 2)) * 3
    scattered = np.concatenate([corner, corner + 2], axis=1)
    tracemalloc.start()
    got = merge_boxes(torch.from_numpy(np.concatenate([scattered, [[0, 0, 90, 90]]])))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The large box takes 31 x 31 small ones: those that start at 90 touch it and push it to 92.
    assert len(got) == len(scattered) - 31 * 31 + 1
    assert got[0].tolist() == [0, 0, 92, 92]
    assert peak < 60e6


# source_boxes


def test_a_box_of_the_collage_is_the_source_pixels_that_it_shows() -> None:
    random = np.random.default_rng(3)
    corners = random.integers(0, 40, (6, 2))
    boxes = merge_boxes(torch.from_numpy(np.concatenate([corners, corners + random.integers(1, 9, (6, 2))], axis=1)))
    layout = plan_layout(boxes)
    assert torch.equal(source_boxes(layout.positions, layout), boxes)
    rows, columns = (
        np.concatenate([np.arange(*run) for run in runs.tolist()]) for runs in (layout.rows, layout.columns)
    )
    assert len(layout.rows) > 1 and len(layout.columns) > 1 and layout.size == (len(rows), len(columns))
    for _ in range(30):
        x0, x1 = np.sort(random.integers(0, len(columns) + 1, 2))
        y0, y1 = np.sort(random.integers(0, len(rows) + 1, 2))
        painted, want = np.zeros((2, 60, 60), np.int64)
        want[np.ix_(rows[y0:y1], columns[x0:x1])] = 1
        for left, top, right, bottom in source_boxes(tensor([(x0, y0, x1, y1)]), layout).tolist():
            painted[top:bottom, left:right] += 1
        assert np.array_equal(painted, want)
    assert source_boxes(torch.zeros(0, 4, dtype=torch.int64), layout).shape == (0, 4)
    with pytest.raises(ValueError, match="boxes"):
        source_boxes(tensor([(0, 0, len(columns) + 1, 1)]), layout)


# opaque_boxes


def flood(start: list[tuple[int, int]], inside: Mask, steps: list[tuple[int, int]]) -> set[tuple[int, int]]:
    seen, queue = set(start), list(start)
    while queue:
        y, x = queue.pop()
        for dy, dx in steps:
            at = (y + dy, x + dx)
            if at not in seen and 0 <= at[0] < inside.shape[0] and 0 <= at[1] < inside.shape[1] and inside[at]:
                seen.add(at)
                queue.append(at)
    return seen


EDGES = [(0, 1), (0, -1), (1, 0), (-1, 0)]
CORNERS = [(1, 1), (1, -1), (-1, 1), (-1, -1)]


def outer_parts(solid: Mask) -> set[Box]:
    """Rectangles of the components that border on the outside, found by flooding."""
    framed = np.pad(solid, 1)
    outside = flood([(0, 0)], ~framed, EDGES)
    left, parts = {(int(y), int(x)) for y, x in np.argwhere(framed)}, set()
    while left:
        part = flood([min(left)], framed, EDGES + CORNERS)
        left -= part
        if any((y + dy, x + dx) in outside for y, x in part for dy, dx in EDGES):
            ys, xs = zip(*part, strict=True)
            parts.add((min(xs) - 1, min(ys) - 1, max(xs), max(ys)))
    return parts


def rectangles(solid: Mask) -> list[Box]:
    height, width = solid.shape
    alpha = torch.from_numpy(np.where(solid, 11, 10).astype(np.uint8))
    return [(b[0], b[1], b[2], b[3]) for b in opaque_boxes(alpha, tensor([(0, 0, width, height)])).tolist()]


def test_opaque_parts_equal_a_flood_from_outside_on_every_3_by_4_mask() -> None:
    for bits in range(2**12):
        solid = np.array([bits >> i & 1 for i in range(12)], bool).reshape(3, 4)
        got = rectangles(solid)
        assert len(got) == len(set(got))
        assert set(got) == outer_parts(solid)


@pytest.mark.parametrize("density", [0.2, 0.35, 0.5, 0.6, 0.7, 0.85])
def test_opaque_parts_equal_a_flood_from_outside_on_random_masks(density: float) -> None:
    random = np.random.default_rng(int(100 * density))
    for _ in range(40):
        solid = random.random((random.integers(1, 16), random.integers(1, 16))) < density
        assert sorted(rectangles(solid)) == sorted(outer_parts(solid))


def ring(size: int) -> Mask:
    return np.pad(np.zeros((size - 2, size - 2), bool), 1, constant_values=True)


def test_a_part_in_the_hole_of_another_is_dropped_however_deep() -> None:
    nested = ring(9)
    nested[2:7, 2:7] = ring(5)
    nested[4, 4] = True
    assert rectangles(nested) == [(0, 0, 9, 9)]
    nested[0, 4] = False
    assert rectangles(nested) == [(0, 0, 9, 9), (2, 2, 7, 7)]


def test_a_gap_over_a_corner_does_not_open_a_hole() -> None:
    solid = ring(5)
    solid[0, 0] = False
    solid[2, 2] = True
    assert rectangles(solid) == [(0, 0, 5, 5)]


def test_parts_come_box_by_box_in_raster_order_and_in_image_coordinates() -> None:
    alpha = torch.zeros(20, 30, dtype=torch.uint8)
    alpha[2:4, 10:12] = alpha[6:9, 3:5] = alpha[15:20, 25:30] = 255
    got = opaque_boxes(alpha, tensor([[24, 14, 30, 20], [0, 0, 15, 12], [16, 0, 20, 5]]))
    assert got.tolist() == [[25, 15, 30, 20], [10, 2, 12, 4], [3, 6, 5, 9]]


@pytest.mark.parametrize("threshold", [0, 10, 254])
def test_opaque_means_above_the_threshold(threshold: int) -> None:
    alpha = torch.tensor([[threshold, threshold + 1]], dtype=torch.uint8)
    assert opaque_boxes(alpha, tensor([[0, 0, 2, 1]]), threshold).tolist() == [[1, 0, 2, 1]]


def test_boxes_of_an_opaque_image_stay_as_they_are() -> None:
    boxes = tensor([[5, 5, 9, 9], [0, 0, 6, 6], [5, 5, 9, 9]])
    assert torch.equal(opaque_boxes(torch.full((10, 10), 255, dtype=torch.uint8), boxes), boxes)


# collage


def test_the_published_example_of_1600_by_1000_gives_a_collage_of_560_by_450() -> None:
    cells = tensor([[2, 2, 4, 6], [4, 6, 5, 8], [12, 1, 14, 3], [16, 16, 18, 18]])
    boxes = boxes_to_pixels(cells, grid=(20, 20), size=(1000, 1600))
    assert boxes.tolist()[0] == [160, 100, 320, 300]
    got = collage(noise(1000, 1600, 3), boxes)
    assert got.boxes.tolist() == [[960, 50, 1120, 150], [160, 100, 400, 400], [1280, 800, 1440, 900]]
    assert got.image is not None
    assert got.image.shape == (450, 560, 4)


def alpha_image() -> torch.Tensor:
    """Every alpha with every grey, channels apart, in an opaque frame that keeps one box one part."""
    image = torch.full((258, 258, 4), 255, dtype=torch.uint8)
    ramp = torch.arange(256, dtype=torch.uint8)
    image[1:-1, 1:-1, 0] = ramp[None]
    image[1:-1, 1:-1, 1] = 255 - ramp[None]
    image[1:-1, 1:-1, 2] = ramp[None] ^ 90
    image[1:-1, 1:-1, 3] = ramp[:, None]
    return image


@pytest.mark.parametrize("fill", [WHITE, BLACK, (13, 200, 77)])
def test_blending_equals_pillow_pasting_with_the_alpha_as_mask(fill: tuple[int, int, int]) -> None:
    image, boxes = torch.cat([alpha_image()] * 2), tensor([[0, 0, 258, 258], [2, 300, 40, 310]])
    transparent = collage(image, boxes).image
    got = collage(image, boxes, fill=fill).image
    assert transparent is not None and got is not None
    pasted = Image.new("RGB", (258, got.shape[0]), fill)
    source = Image.fromarray(transparent.numpy())
    pasted.paste(source, mask=source.getchannel("A"))
    np.testing.assert_array_equal(got.numpy(), np.asarray(pasted))


def test_dropping_alpha_equals_pillow_converting_to_rgb() -> None:
    image, boxes = torch.cat([alpha_image()] * 2), tensor([[0, 0, 258, 258], [2, 300, 40, 310]])
    transparent = collage(image, boxes).image
    got = collage(image, boxes, fill=BLACK, alpha="drop").image
    assert transparent is not None and got is not None
    np.testing.assert_array_equal(got.numpy(), np.asarray(Image.fromarray(transparent.numpy()).convert("RGB")))


@pytest.mark.parametrize("alpha", ["blend", "drop"])
@pytest.mark.parametrize("fill", [WHITE, (1, 2, 3)])
def test_gaps_have_the_fill_colour_and_rgb_pixels_are_copied(fill: tuple[int, int, int], alpha: Any) -> None:
    image = noise(20, 20, 3)
    got = collage(image, tensor([[0, 0, 4, 5], [8, 9, 10, 12]]), fill=fill, alpha=alpha).image
    assert got is not None
    want = torch.tensor(fill, dtype=torch.uint8).repeat(8, 6, 1)
    want[:5, :4], want[5:, 4:] = image[:5, :4], image[9:12, 8:10]
    assert torch.equal(got, want)


def test_transparent_boxes_are_cut_down_to_their_opaque_parts_after_merging() -> None:
    image = noise(20, 20, 4)
    image[..., 3] = 0
    image[2:5, 3:6, 3] = image[10:12, 12:16, 3] = 255
    # The two boxes touch: one box with two opaque parts.
    got = collage(image, tensor([[0, 0, 10, 10], [10, 10, 20, 20]]))
    assert got.boxes.tolist() == [[3, 2, 6, 5], [12, 10, 16, 12]]
    assert got.image is not None
    assert got.image.shape == (5, 7, 4)
    assert len(collage(image, got.boxes, alpha_threshold=255).boxes) == 0
    uncut = collage(image, tensor([[0, 0, 10, 10], [10, 10, 20, 20]]), alpha_threshold=None)
    assert uncut.image is not None
    assert uncut.boxes.tolist() == [[0, 0, 20, 20]] and torch.equal(uncut.image, image)


def test_opaque_parts_whose_rectangles_overlap_stay_separate_boxes() -> None:
    image = noise(12, 12, 4)
    image[..., 3] = 0
    image[:, 0, 3] = image[11, :, 3] = 255
    image[3:6, 5:9, 3] = 255
    got = collage(image, tensor([[0, 0, 12, 12]]))
    assert got.boxes.tolist() == [[0, 0, 12, 12], [5, 3, 9, 6]]
    assert got.image is not None
    assert torch.equal(got.image, image)


@pytest.mark.parametrize("boxes", [[], [[3, 3, 3, 8], [1, 5, 9, 5]], [[2, 2, 9, 9]]], ids=["none", "no area", "clear"])
def test_without_anything_to_show_there_is_no_image_and_no_layout(boxes: list[list[int]]) -> None:
    got = collage(torch.zeros(10, 10, 4, dtype=torch.uint8), tensor(boxes), fill=WHITE)
    assert got.image is None
    assert got.layout is None
    assert got.boxes.shape == (0, 4)


def test_final_boxes_are_those_that_the_collage_shows() -> None:
    image = noise(45, 64, 4)
    image[..., 3] = 255
    image[:, 20:25, 3] = 0
    cells = tensor([[0, 0, 3, 4], [2, 3, 7, 5], [8, 0, 10, 2], [4, 7, 9, 9]])
    merged = [[0, 0, 44, 25], [51, 0, 64, 10], [25, 35, 57, 45]]
    parts = [[0, 0, 20, 25], [25, 0, 44, 25], *merged[1:]]
    for source, want in ((image[..., :3], merged), (image, parts)):
        got = final_boxes(source, cells, grid=(9, 10))
        assert got.tolist() == want
        assert torch.equal(got, collage(source, boxes_to_pixels(cells, grid=(9, 10), size=(45, 64))).boxes)


def test_strided_images_give_the_collage_of_the_same_values() -> None:
    image = noise(30, 40, 4)
    strided = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    boxes = torch.tensor([[1, 2, 9, 11], [20, 20, 33, 30]], dtype=torch.int32)
    for fill in (None, WHITE):
        got, want = collage(strided, boxes, fill=fill).image, collage(image, boxes, fill=fill).image
        assert got is not None and want is not None
        assert torch.equal(got, want)


@pytest.mark.parametrize("channels", [3, 4])
def test_memory_follows_the_boxes_and_not_the_source(channels: int) -> None:
    image = torch.full((3000, 4000, channels), 255, dtype=torch.uint8)
    boxes = tensor([[10, 10, 60, 60], [3900, 2900, 3950, 2950]])
    collage(image, boxes)
    tracemalloc.start()
    collage(image, boxes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_the_source_and_the_boxes_are_left_alone() -> None:
    image, boxes = noise(12, 12, 4), tensor([[4, 4, 9, 9], [0, 0, 4, 4], [10, 1, 12, 3]])
    before = image.clone(), boxes.clone()
    got = collage(image, boxes)
    assert got.image is not None
    got.image.zero_()
    got.boxes.zero_()
    assert torch.equal(image, before[0])
    assert torch.equal(boxes, before[1])


# The compiled kernels

needs_extension = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))


def assert_same_collage(one: Collage, other: Collage) -> None:
    assert torch.equal(one.boxes, other.boxes)
    assert (one.layout is None) == (other.layout is None)
    if one.layout is not None and other.layout is not None:
        assert_same_layout(one.layout, other.layout)
    assert (one.image is None) == (other.image is None)
    if one.image is not None and other.image is not None:
        assert one.image.dtype == other.image.dtype and torch.equal(one.image, other.image)


def assert_same_layout(one: Layout, other: Layout) -> None:
    assert one.size == other.size
    for part in ("columns", "rows", "positions"):
        first, second = getattr(one, part), getattr(other, part)
        assert first.dtype == second.dtype and torch.equal(first, second), part


def scattered(count: int, extent: int, largest: int, seed: int) -> torch.Tensor:
    """Boxes inside a square, some of no area."""
    random = np.random.default_rng(seed)
    corners = random.integers(0, extent, (count, 2))
    boxes = np.concatenate([corners, corners + random.integers(0, largest + 1, (count, 2))], axis=1)
    return torch.from_numpy(np.minimum(boxes, extent))


@needs_extension
@pytest.mark.parametrize("count, extent, largest", [(0, 9, 3), (1, 9, 3), (8, 30, 9), (40, 300, 40), (600, 9000, 300)])
def test_the_compiled_plan_is_the_references_whatever_the_order_of_boxes(count: int, extent: int, largest: int) -> None:
    for seed in range(12):
        boxes = scattered(count, extent, largest, seed)
        want = merge_boxes(boxes)
        for given in (boxes, boxes.flip(0), boxes.int(), boxes.t().contiguous().t()):
            plan = compiled.plan_compiled(given[None], None, grid=None, size=(extent, extent))
            assert plan.status == compiled.DONE and torch.equal(plan.boxes.long(), want)
            if len(want):
                assert plan.layout is not None
                assert_same_layout(plan.layout, plan_layout(want))
            else:
                assert plan.layout is None


@needs_extension
def test_boxes_of_all_maps_are_pooled_and_scaled_as_the_reference_does() -> None:
    random = torch.Generator().manual_seed(0)
    for rows, columns, size in ((95, 170, (4320, 7680)), (7, 49, (7, 49)), (31, 22, (20, 13))):
        maps = torch.rand(9, rows, columns, generator=random)
        found = regions(maps, 0.95, max_regions=60)
        used = torch.arange(60) < found.counts[:, None]
        want = merge_boxes(boxes_to_pixels(found.boxes[used], grid=(rows, columns), size=size))
        plan = compiled.plan_compiled(found.boxes, found.counts, grid=(rows, columns), size=size)
        assert plan.most == found.counts.max()
        assert plan.status == (compiled.DONE if len(want) and used.sum() <= 1024 else plan.status)
        if plan.status == compiled.DONE:
            assert torch.equal(plan.boxes.long(), want)


@needs_extension
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("fill", [None, WHITE, (1, 200, 3)])
@pytest.mark.parametrize("order", ["rows first", "channels first", "flipped", "every second"])
def test_every_source_gives_the_references_collage(
    order: str, fill: tuple[int, int, int] | None, channels: int
) -> None:
    image = noise(90, 121, channels)
    if channels == 4:
        image[..., 3] |= 16
        image[20:60, 40:70, 3] = 3
    if order == "channels first":
        image = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif order == "flipped":
        image = image.permute(1, 0, 2)
    elif order == "every second":
        image = image[::2, 1::2]
    for seed in range(6):
        boxes = scattered(7, min(image.shape[:2]), 30, seed)
        for alpha in ("blend", "drop") if fill else ("blend",):
            look = {"fill": fill, "alpha": alpha}
            got, want = (collage(image, boxes, backend=name, **look) for name in ("cpp", "numpy"))  # type: ignore[arg-type]
            assert_same_collage(got, want)


@needs_extension
def test_more_boxes_than_one_block_takes_go_the_hosts_way() -> None:
    side = 3 * 40
    corners = torch.cartesian_prod(torch.arange(40), torch.arange(40)) * 3
    boxes = torch.cat([corners, corners + 1], 1)
    image = noise(side, side, 3)
    for count in (geometry.CAPACITY, geometry.CAPACITY + 1):
        status = compiled.plan_compiled(boxes[None, :count], None, grid=None, size=(side, side)).status
        assert status == (compiled.DONE if count == geometry.CAPACITY else compiled.TOO_MANY)
        got, want = (collage(image, boxes[:count], fill=BLACK, backend=name) for name in ("cpp", "numpy"))
        assert len(want.boxes) == count
        assert_same_collage(got, want)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("threshold", [0.6, 0.97, 0.9999])
def test_a_collage_of_maps_is_that_of_their_boxes(channels: int, threshold: float) -> None:
    maps = torch.rand(5, 31, 44, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([True, True, False, True, True])
    image = noise(310, 300, channels)
    found = regions(maps, threshold, valid=valid, max_regions=400)
    assert not found.overflow.any()
    cells = found.boxes[torch.arange(400) < found.counts[:, None]]
    want = collage(image, boxes_to_pixels(cells, grid=(31, 44), size=(310, 300)), fill=WHITE, backend="numpy")
    for slots in (3, 400):
        got = collage_of_maps(image, maps, threshold, valid=valid, max_regions=slots, fill=WHITE)
        assert_same_collage(got, want)


def test_a_collage_of_no_maps_or_of_maps_without_regions_is_none() -> None:
    for maps in (torch.zeros(0, 3, 4), torch.zeros(2, 3, 4)):
        got = collage_of_maps(noise(9, 12, 3), maps, 0.5)
        assert got.image is None and got.layout is None and got.boxes.shape == (0, 4)


@needs_extension
def test_a_source_of_100_megapixels_costs_its_boxes_only() -> None:
    row = torch.arange(10_000, dtype=torch.int64)
    # Every row shows the same memory, so the picture is large and its memory is not.
    image = torch.stack([row % 251, row // 251, row % 7], 1).to(torch.uint8)[None].expand(10_000, -1, -1)
    got = collage(image, tensor([[0, 0, 3, 5], [9_990, 9_900, 10_000, 10_000]]), fill=WHITE, backend="cpp")
    assert got.image is not None and got.image.shape == (105, 13, 3)
    assert torch.equal(got.image[5:, 3:], image[9_900:, 9_990:])


IMAGE = torch.zeros(8, 9, 3, dtype=torch.uint8)
ALPHA = IMAGE[..., 0]
INSIDE = tensor([[0, 0, 4, 4]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: merge_boxes([[0, 0, 1, 1]]), TypeError, "boxes: got list"),  # type: ignore[arg-type]
        (lambda: merge_boxes(INSIDE.float()), TypeError, "boxes: got dtype torch.float32"),
        (lambda: merge_boxes(INSIDE[0]), ValueError, r"boxes: got shape \(4,\)"),
        (lambda: merge_boxes(tensor([[0, 0, 1, 1], [3, 0, 2, 1]])), ValueError, r"boxes\[1\]: got \[3, 0, 2, 1\]"),
        (lambda: boxes_to_pixels(INSIDE, grid=(4, 3), size=(8, 9)), ValueError, r"boxes\[0\].*x1 <= 3"),
        (
            lambda: boxes_to_pixels(INSIDE - 1, grid=(4, 4), size=(8, 9)),
            ValueError,
            r"boxes\[0\]: got \[-1, -1, 3, 3\]",
        ),
        (
            lambda: merge_boxes(tensor([[-(2**31), 0, 2**31 - 1, 1], [0, 0, 1, 2**31]])),
            ValueError,
            r"boxes\[1\].*32 bits",
        ),
        (lambda: plan_layout(tensor([[-(2**31) - 1, 0, 1, 1]])), ValueError, r"boxes\[0\].*32 bits"),
        (lambda: boxes_to_pixels(INSIDE, grid=(4, 4), size=(8, 2**31)), ValueError, "size: got .* below 2147483648"),
        (lambda: boxes_to_pixels(INSIDE, grid=(4, 0), size=(8, 9)), ValueError, r"grid: got \(4, 0\)"),
        (lambda: boxes_to_pixels(INSIDE, grid=(4, 4), size=(8.0, 9)), TypeError, "size: got"),  # type: ignore[arg-type]
        (lambda: opaque_boxes(None, INSIDE), TypeError, "alpha: got NoneType"),  # type: ignore[arg-type]
        (lambda: opaque_boxes(ALPHA.int(), INSIDE), TypeError, "alpha: got dtype torch.int32"),
        (lambda: opaque_boxes(IMAGE, INSIDE), ValueError, r"alpha: got shape \(8, 9, 3\)"),
        (lambda: opaque_boxes(ALPHA, INSIDE + 5), ValueError, r"boxes\[0\]: got \[5, 5, 9, 9\].*y1 <= 8"),
        (lambda: opaque_boxes(ALPHA, INSIDE, 256), ValueError, "^threshold: got 256"),
        (lambda: plan_layout(INSIDE[:0]), ValueError, "boxes: got none"),
        (
            lambda: plan_layout(tensor([[0, 0, 4, 4], [1, 1, 5, 1]])),
            ValueError,
            r"boxes\[1\]: got \[1, 1, 5, 1\] without",
        ),
        (lambda: collage(IMAGE.float(), INSIDE), TypeError, "image: got dtype torch.float32"),
        (lambda: collage(IMAGE.numpy(), INSIDE), TypeError, "image: got ndarray"),  # type: ignore[arg-type]
        (lambda: collage(ALPHA, INSIDE), ValueError, r"image: got shape \(8, 9\)"),
        (lambda: collage(IMAGE, INSIDE + 5), ValueError, r"boxes\[0\]: got \[5, 5, 9, 9\]"),
        (lambda: collage(IMAGE, INSIDE, fill=(0, 0, 256)), ValueError, r"fill: got \(0, 0, 256\)"),
        (lambda: collage(IMAGE, INSIDE, fill="white"), TypeError, "fill: got 'white'"),  # type: ignore[arg-type]
        (lambda: collage(IMAGE, INSIDE, alpha="keep"), ValueError, "alpha: got 'keep'"),  # type: ignore[arg-type]
        (lambda: collage(IMAGE, INSIDE, alpha="drop"), ValueError, "alpha: got 'drop' with fill=None"),
        (lambda: collage(IMAGE, INSIDE, alpha_threshold=1.0), TypeError, "alpha_threshold: got float"),  # type: ignore[arg-type]
        (lambda: collage(IMAGE, INSIDE, backend="fast"), ValueError, "backend: got 'fast'.*numpy"),
        (lambda: collage(IMAGE, INSIDE, backend="cuda"), ValueError, "'cuda' cannot serve .*: image is on cpu"),
        (lambda: collage_of_maps(ALPHA, torch.ones(1, 2, 2), 0.5), ValueError, r"image: got shape \(8, 9\)"),
        (lambda: collage_of_maps(IMAGE, ALPHA, 0.5), TypeError, "maps: got dtype torch.uint8"),
        (lambda: collage_of_maps(IMAGE, torch.ones(1, 2, 2), 0.5, fill=(0, 0, 256)), ValueError, "fill: got"),
        (lambda: final_boxes(IMAGE, INSIDE, grid=(3, 4)), ValueError, r"boxes\[0\].*y1 <= 3"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
