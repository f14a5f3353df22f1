"""regions against scikit-image's labels and region properties, and its own rules on order, ties and overflow."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage import measure

from hide_kernels import geometry, native
from hide_kernels.regions import Regions, regions
from hide_kernels.regions.cupy import label_and_reduce

Array = NDArray[np.float32]


def listed(found: Regions, i: int) -> list[tuple[list[int], float]]:
    return list(zip(found.boxes[i].tolist(), found.scores[i].tolist(), strict=True))[: int(found.counts[i])]


def expected(array: Array, threshold: float) -> list[tuple[list[int], float]]:
    """Boxes and scores from scikit-image; its labels count up in raster order, so a stable sort settles ties."""
    labels = measure.label(array >= np.float32(threshold), connectivity=2)
    out = []
    for region in measure.regionprops(labels):
        y0, x0, y1, x1 = region.bbox
        out.append(([x0, y0, x1, y1], float(np.float32(array[labels == region.label].sum(dtype=np.float64)))))
    return sorted(out, key=lambda item: -item[1])


def with_cupys_code(maps: torch.Tensor, threshold: float, valid: Any = None, max_regions: int = 256) -> Regions:
    """The backend "cupy" with NumPy and SciPy in place of CuPy."""
    limit = float(torch.tensor(threshold, dtype=maps.dtype))
    used = None if valid is None else valid.numpy()
    with np.errstate(over="ignore", under="ignore"):
        arrays = label_and_reduce(np, ndimage, maps.detach().numpy(), limit, used, max_regions)
    boxes, scores, counts, overflow, sizes = map(torch.from_numpy, arrays)
    return Regions(boxes, scores, counts, overflow.bool(), sizes)


@contextmanager
def no_map_fits() -> Iterator[None]:
    """Every map takes the way of those that are too large for one block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "shared_limit", lambda device: 0)
        yield


def in_steps(maps: torch.Tensor, threshold: float, **arguments: Any) -> Regions:
    with no_map_fits():
        return regions(maps, threshold, backend="cpp", **arguments)


def in_one_block(maps: torch.Tensor, threshold: float, **arguments: Any) -> Regions:
    return regions(maps, threshold, backend="cpp", **arguments)


COMPILED = [in_one_block, in_steps] if native.missing("cpu") is None else []
IMPLEMENTATIONS: list[Callable[..., Regions]] = [with_cupys_code, *COMPILED]


def same_everywhere(maps: torch.Tensor, threshold: float, **arguments: Any) -> Regions:
    """What the reference finds, once every other implementation has found the same, bit for bit."""
    want = regions(maps, threshold, backend="scipy", **arguments)
    for implementation in IMPLEMENTATIONS:
        got = implementation(maps, threshold, **arguments)
        for name, one, other in zip(want._fields, got, want, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), (implementation.__name__, name)
    return want


def assert_equal_to_scikit_image(maps: Array, threshold: float) -> None:
    found = same_everywhere(torch.from_numpy(maps), threshold, max_regions=400)
    for i, array in enumerate(maps):
        assert listed(found, i) == expected(array, threshold)


def test_the_compiled_kernels_are_among_those_compared() -> None:
    if native.missing("cpu"):
        pytest.skip(str(native.missing("cpu")))
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        launch = native.launch
        patch.setattr(native, "launch", lambda name, *rest: (launched.append(name), launch(name, *rest)))
        in_one_block(torch.ones(2, 5, 7), 0.5)
        in_steps(torch.ones(2, 5, 7, dtype=torch.float64), 0.5)
    assert launched == ["regions_block_float32", *["regions_step_float64"] * 6, "regions_finish"]


def test_every_3_by_3_mask_agrees_with_scikit_image_in_one_batch() -> None:
    masks = np.array(list(itertools.product([0, 1], repeat=9)), np.float32).reshape(-1, 3, 3)
    assert_equal_to_scikit_image(masks, 1.0)


def test_every_4_by_4_mask_agrees_with_scikit_image() -> None:
    masks = np.array(list(itertools.product([0, 1], repeat=16)), bool).reshape(256, 256, 4, 4)
    # Values that no two regions of a mask share, so that order is settled by score.
    values = np.random.default_rng(0).permutation(np.arange(16, 32)).reshape(4, 4) / np.float32(32)
    found = same_everywhere(torch.from_numpy(masks.reshape(-1, 4, 4) * values), 0.5, max_regions=4)
    # All masks side by side, with a gap, are one picture to scikit-image.
    picture = np.pad(masks, ((0, 0), (0, 0), (0, 1), (0, 1))).transpose(0, 2, 1, 3).reshape(256 * 5, 256 * 5)
    labels = measure.label(picture, connectivity=2)
    tiled = np.tile(np.pad(values, (0, 1)), (256, 256))
    scores = np.bincount(labels.ravel(), weights=tiled.ravel())[1:]
    sizes = np.bincount(labels.ravel())[1:]
    corners = np.array([[y.start, x.start, y.stop, x.stop] for y, x in ndimage.find_objects(labels)])
    row, column = corners[:, 0] // 5, corners[:, 1] // 5
    boxes = corners[:, [1, 0, 3, 2]] - 5 * np.stack([column, row, column, row], axis=1)
    used = torch.arange(4) < found.counts[:, None]
    got = (used.nonzero()[:, :1], found.boxes[used], found.scores[used][:, None], found.sizes[used][:, None])
    tables = [
        np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1)
        for parts in (got, ((256 * row + column)[:, None], boxes, scores[:, None], sizes[:, None]))
    ]
    assert np.array_equal(*(table[np.lexsort(table.T)] for table in tables))
    assert ((found.scores[:, 1:] <= found.scores[:, :-1]) | ~used[:, 1:]).all()


def comb(height: int, width: int, spine: int) -> Array:
    """Teeth that only the spine, a row, joins: labels have to travel all the way."""
    array = np.zeros((height, width), np.float32)
    array[:, ::2] = array[spine] = 1
    return array


PATTERNS = {
    "comb from above": comb(31, 45, 0),
    "comb from below": comb(31, 45, -1),
    "double comb": np.maximum(comb(40, 33, 19), comb(33, 40, 20).T),
    "rings": np.minimum.reduce([*np.indices((35, 35)), 34 - np.indices((35, 35))[0], 34 - np.indices((35, 35))[1]]) % 2,
    "diagonals": np.indices((23, 37)).sum(axis=0) % 3 == 0,
    "falling diagonals": np.diff(np.indices((23, 37)), axis=0)[0] % 3 == 0,
    "points": (np.indices((37, 41)) % 2 == 0).all(axis=0),
    "zigzag": np.abs(np.indices((9, 64))[1] % 16 - 8) == np.indices((9, 64))[0],
    "one row": np.arange(77)[None] % 5 > 0,
    "one column": np.arange(77)[:, None] % 5 > 0,
    "one cell": np.ones((1, 1)),
    "border": np.pad(np.zeros((15, 30)), 1, constant_values=1),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_that_are_hard_to_label_agree_with_scikit_image(name: str) -> None:
    array = PATTERNS[name].astype(np.float32)
    turned = [array, array[::-1], array[:, ::-1], array[::-1, ::-1], 1 - array]
    assert_equal_to_scikit_image(np.stack(turned).copy(), 0.5)


@pytest.mark.parametrize("shape", [(12, 17), (1, 40), (40, 1), (7, 7)])
def test_random_maps_of_every_density_agree_with_scikit_image(shape: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).random((19, *shape), np.float32)
    for density in (0.02, 0.1, 0.3, 0.4, 0.5, 0.7, 0.9):
        assert_equal_to_scikit_image(maps, 1 - density)


def spiral(size: int) -> Array:
    """A one-cell wide path that winds inward with a one-cell gap."""
    array = np.zeros((size, size), np.float32)
    row, column, step = 0, 0, (0, 1)
    array[0, 0] = 1
    for turn in range(size):
        length = size - 1 if turn < 3 else size - 1 - 2 * ((turn - 1) // 2)
        for _ in range(length):
            row, column = row + step[0], column + step[1]
            array[row, column] = 1
        step = (step[1], -step[0])
    return array


def test_a_spiral_and_a_checkerboard_are_one_region_each() -> None:
    path = spiral(15)
    assert 100 < path.sum() < 130
    board = (np.indices((15, 15)).sum(axis=0) % 2 == 0).astype(np.float32)
    found = same_everywhere(torch.from_numpy(np.stack([path, board])), 0.5)
    assert found.counts.tolist() == [1, 1]
    assert found.boxes[:, 0].tolist() == [[0, 0, 15, 15]] * 2
    assert found.scores[:, 0].tolist() == [path.sum(), 113.0]


def test_cells_that_touch_only_at_a_corner_are_one_region() -> None:
    for maps in (torch.eye(4), torch.eye(4).flip(0)):
        assert regions(maps[None], 1.0).counts.tolist() == [1]


def test_regions_never_join_across_maps() -> None:
    maps = torch.zeros(3, 2, 2)
    maps[0, 0, 0] = maps[1, 0, 0] = maps[2, 1, 1] = 1
    found = same_everywhere(maps, 0.5)
    assert found.counts.tolist() == [1, 1, 1]
    assert found.boxes[:, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 2, 2]]


def test_empty_and_full_maps() -> None:
    found = same_everywhere(torch.stack([torch.zeros(4, 6), torch.full((4, 6), 0.5)]), 0.5)
    assert found.counts.tolist() == [0, 1]
    assert not found.boxes[0].any() and not found.scores[0].any()
    assert found.boxes[1, 0].tolist() == [0, 0, 6, 4]
    assert found.scores[1, 0] == 12
    assert not found.boxes[1, 1:].any() and not found.scores[1, 1:].any()


def test_no_maps_give_no_regions() -> None:
    found = same_everywhere(torch.zeros(0, 4, 6), 0.5, max_regions=3)
    assert found.boxes.shape == (0, 3, 4)
    assert found.counts.tolist() == found.overflow.tolist() == []


@pytest.mark.parametrize("threshold", [0.7, np.float64(0.7)], ids=["float", "numpy scalar"])
def test_the_threshold_is_inclusive_in_the_dtype_of_the_maps(threshold: float) -> None:
    at, below = np.float32(0.7), np.nextafter(np.float32(0.7), np.float32(0))
    assert float(at) < 0.7
    maps = torch.tensor([[[at, below]]])
    assert regions(maps, threshold).boxes[0, 0].tolist() == [0, 0, 1, 1]
    assert regions(maps.double(), threshold).counts.tolist() == [0]
    assert regions(torch.tensor([[[0.7]]], dtype=torch.float64), threshold).counts.tolist() == [1]


def test_larger_scores_come_first_and_equal_ones_by_their_first_cell() -> None:
    # The second region of row 0 is the last cell of the first row but starts before the ones below.
    array = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0, 0.6],
            [1.0, 0.0, 0.6, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.9],
            [0.6, 0.0, 0.6, 0.0, 0.0],
        ]
    )
    found = same_everywhere(array[None], 0.5)
    assert [box[:2] for box, _ in listed(found, 0)] == [[0, 1], [4, 2], [4, 0], [2, 1], [0, 3], [2, 3]]


def test_regions_whose_scores_round_to_the_same_number_are_a_tie() -> None:
    tiny = 2.0**-40
    array = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 0.0, tiny, 0.0, 0.0]])
    found = same_everywhere(array[None], tiny)
    assert [box[:2] for box, _ in listed(found, 0)] == [[0, 0], [2, 0], [4, 0]]


def test_scores_are_summed_in_double_precision() -> None:
    array = np.full((300, 300), 0.1, np.float32)
    array[0, 0] = 1e6
    assert regions(torch.from_numpy(array)[None], 0.1).scores[0, 0] == np.float32(math.fsum(array.ravel().tolist()))


def test_a_score_depends_on_the_cells_of_its_region_alone() -> None:
    # Sums in float32, or in float64 in another order, would differ.
    random = np.random.default_rng(1)
    cells = torch.from_numpy(np.exp(random.uniform(-20, 20, (1, 9, 31))).astype(np.float32))
    alone = same_everywhere(cells, 0.0).scores[0, 0]
    for shuffled in (cells.flip(1), cells.flip(2), cells.transpose(1, 2)):
        assert same_everywhere(shuffled, 0.0).scores[0, 0] == alone
    crowd = torch.full((3, 40, 70), -1.0)
    crowd[1, 5:14, 30:61] = cells[0]
    crowd[1, 20:, :20] = crowd[2] = 1e30
    assert alone in same_everywhere(crowd, 0.0).scores[1, :2].tolist()
    assert abs(float(alone) / math.fsum(cells.ravel().tolist()) - 1) < 2**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_any_magnitude_and_sign_are_the_same_everywhere(dtype: torch.dtype) -> None:
    tiny, huge = torch.finfo(dtype).smallest_normal / 2**20, torch.finfo(dtype).max
    gap = -math.inf
    row = [tiny, tiny, gap, huge, gap, huge, huge, gap, -0.25, gap, 0.5, -0.25, gap, 0.0, -0.0, gap, math.inf, 1, gap]
    maps = torch.tensor([[[*row, -huge, -huge, gap, 1.0, tiny, huge]]], dtype=dtype)
    found = same_everywhere(maps, float(-huge))
    assert found.counts.tolist() == [9]
    by_left = dict(zip(found.boxes[0, :9, 0].tolist(), found.scores[0, :9].tolist(), strict=True))
    as_float = torch.tensor([2 * tiny, huge], dtype=dtype).float().tolist()
    assert by_left == {
        0: as_float[0], 3: as_float[1], 5: math.inf, 8: -0.25, 10: 0.25, 13: 0.0, 16: math.inf, 19: -math.inf, 22: as_float[1],
    }  # fmt: skip
    # Equal scores come by first cell, infinite ones too.
    assert found.boxes[0, :2, 0].tolist() == ([5, 16] if dtype == torch.float32 else [3, 5])


@pytest.mark.parametrize("units, score", [(0.5, 1.0), (0.75, 1 + 2**-23)])
def test_cells_are_rounded_to_the_unit_of_their_region_half_to_even(units: float, score: float) -> None:
    # 2**14 cells below 2**1: the unit is 2**-47. 1 + 2**-24 lies between two float32, so one unit more tips it.
    maps = torch.zeros(1, 128, 128, dtype=torch.float64)
    maps[0, 3, :3] = torch.tensor([1.0, 2.0**-24, units * 2.0**-47], dtype=torch.float64)
    assert same_everywhere(maps, 0.0).scores[0, 0] == score


def test_sizes_count_cells() -> None:
    array = torch.zeros(1, 6, 9)
    array[0, 1:4, 1:4], array[0, 2, 2], array[0, 5, 5:8] = 1, 0, 1
    assert same_everywhere(array, 1.0).sizes[0, :3].tolist() == [8, 3, 0]


def test_maps_too_large_for_one_block_are_labelled_all_the_same() -> None:
    side = 501
    assert geometry.regions_block(torch.device("cpu"), 1, side, side) is None
    maps = torch.rand(2, side, side, generator=torch.Generator().manual_seed(0))
    maps[1] = torch.from_numpy(spiral(side))
    found = same_everywhere(maps, 0.7)
    assert found.overflow.tolist() == [True, False] and found.counts[1] == 1


def test_overflow_keeps_the_largest_regions_and_the_true_count() -> None:
    array = torch.zeros(2, 9, 9)
    array[0, ::2, ::2] = torch.arange(1, 26).reshape(5, 5) / 25
    array[1, :3, ::2] = 1
    found = same_everywhere(array, 0.01, max_regions=5)
    assert found.counts.tolist() == [25, 5]
    assert found.overflow.tolist() == [True, False]
    assert found.boxes[0].tolist() == [[x, 8, x + 1, 9] for x in (8, 6, 4, 2, 0)]
    assert torch.equal(found.boxes[0], regions(array, 0.01, max_regions=40).boxes[0, :5])


def test_maps_on_the_cpu_are_served_whatever_torch_s_default_device() -> None:
    maps = torch.rand(2, 7, 9)
    want = regions(maps, 0.5)
    with torch.device("meta"):
        found = regions(maps, 0.5)
    assert torch.equal(found.boxes, want.boxes) and torch.equal(found.scores, want.scores)


def test_maps_that_are_not_valid_have_no_regions() -> None:
    maps = torch.ones(3, 2, 2)
    found = same_everywhere(maps, 0.5, valid=torch.tensor([True, False, True]))
    assert found.counts.tolist() == [1, 0, 1]
    assert not found.boxes[1].any()


def test_nan_cells_reach_no_threshold() -> None:
    nan = float("nan")
    found = same_everywhere(torch.tensor([[[nan, nan], [nan, nan]], [[1.0, nan], [nan, nan]]]), -1.0)
    assert found.counts.tolist() == [0, 1]
    assert listed(found, 1) == [([0, 0, 1, 1], 1.0)]


def test_what_is_beyond_the_dtype_is_infinite() -> None:
    maps = torch.tensor([[[1e300, 0.0, 1e299]]], dtype=torch.float64)
    with np.errstate(all="raise"):
        assert regions(maps, 0.5).scores[0, :2].tolist() == [math.inf, math.inf]
        assert regions(maps, 0.5).boxes[0, :2].tolist() == [[0, 0, 1, 1], [2, 0, 3, 1]]
        assert regions(maps.float().nan_to_num(), 1e300).counts.tolist() == [0]


def test_strided_maps_give_the_regions_of_the_same_values() -> None:
    maps = torch.rand(6, 9, 14, generator=torch.Generator().manual_seed(0))
    strided = torch.zeros(9, 28, 6)[:, ::2].copy_(maps.permute(1, 2, 0)).permute(2, 0, 1).requires_grad_()
    assert not strided.is_contiguous()
    valid = torch.tensor([True, False] * 6)[::2]
    for got, want in zip(same_everywhere(strided, 0.6, valid=valid), regions(maps, 0.6), strict=True):
        assert torch.equal(got, want)


MAPS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"maps": [[1.0]]}, TypeError, "maps: got list"),
        ({"maps": MAPS.half()}, TypeError, "maps: got dtype torch.float16"),
        ({"maps": MAPS[0]}, ValueError, r"maps: got shape \(3, 4\)"),
        ({"maps": MAPS[:, :, :0]}, ValueError, r"maps: got shape \(2, 3, 0\)"),
        ({"threshold": "0.5"}, TypeError, "threshold: got str"),
        ({"threshold": float("nan")}, ValueError, "threshold: got nan"),
        ({"valid": torch.ones(2)}, TypeError, "valid: got torch.float32"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, ValueError, r"valid: got \(3,\)"),
        ({"max_regions": 0}, ValueError, "max_regions: got 0"),
        ({"max_regions": 2.0}, TypeError, "max_regions: got float"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'.*scipy"),
        ({"backend": "cuda"}, ValueError, "'cuda' cannot serve this call of regions: maps is on cpu"),
        ({"backend": "cupy"}, ValueError, "'cupy' cannot serve this call of regions: maps is on cpu"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        regions(**{"maps": MAPS, "threshold": 0.5, **arguments})
