"""regions against scikit-image's labels and region properties, and its own rules on order, ties and overflow."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage import measure

from hide_kernels.regions import Regions, regions

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


def assert_equal_to_scikit_image(maps: Array, threshold: float) -> None:
    found = regions(torch.from_numpy(maps), threshold)
    for i, array in enumerate(maps):
        assert listed(found, i) == expected(array, threshold)


def test_every_3_by_3_mask_agrees_with_scikit_image_in_one_batch() -> None:
    masks = np.array(list(itertools.product([0, 1], repeat=9)), np.float32).reshape(-1, 3, 3)
    assert_equal_to_scikit_image(masks, 1.0)


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
    found = regions(torch.from_numpy(np.stack([path, board])), 0.5)
    assert found.counts.tolist() == [1, 1]
    assert found.boxes[:, 0].tolist() == [[0, 0, 15, 15]] * 2
    assert found.scores[:, 0].tolist() == [path.sum(), 113.0]


def test_cells_that_touch_only_at_a_corner_are_one_region() -> None:
    for maps in (torch.eye(4), torch.eye(4).flip(0)):
        assert regions(maps[None], 1.0).counts.tolist() == [1]


def test_regions_never_join_across_maps() -> None:
    maps = torch.zeros(3, 2, 2)
    maps[0, 0, 0] = maps[1, 0, 0] = maps[2, 1, 1] = 1
    found = regions(maps, 0.5)
    assert found.counts.tolist() == [1, 1, 1]
    assert found.boxes[:, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 2, 2]]


def test_empty_and_full_maps() -> None:
    found = regions(torch.stack([torch.zeros(4, 6), torch.full((4, 6), 0.5)]), 0.5)
    assert found.counts.tolist() == [0, 1]
    assert not found.boxes[0].any() and not found.scores[0].any()
    assert found.boxes[1, 0].tolist() == [0, 0, 6, 4]
    assert found.scores[1, 0] == 12
    assert not found.boxes[1, 1:].any() and not found.scores[1, 1:].any()


def test_no_maps_give_no_regions() -> None:
    found = regions(torch.zeros(0, 4, 6), 0.5, max_regions=3)
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
    found = regions(array[None], 0.5)
    assert [box[:2] for box, _ in listed(found, 0)] == [[0, 1], [4, 2], [4, 0], [2, 1], [0, 3], [2, 3]]


def test_regions_whose_scores_round_to_the_same_number_are_a_tie() -> None:
    tiny = 2.0**-40
    array = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 0.0, tiny, 0.0, 0.0]])
    found = regions(array[None], tiny)
    assert [box[:2] for box, _ in listed(found, 0)] == [[0, 0], [2, 0], [4, 0]]


def test_scores_are_summed_in_double_precision() -> None:
    array = np.full((300, 300), 0.1, np.float32)
    array[0, 0] = 1e6
    assert regions(torch.from_numpy(array)[None], 0.1).scores[0, 0] == np.float32(math.fsum(array.ravel().tolist()))


def test_overflow_keeps_the_largest_regions_and_the_true_count() -> None:
    array = torch.zeros(2, 9, 9)
    array[0, ::2, ::2] = torch.arange(1, 26).reshape(5, 5) / 25
    array[1, :3, ::2] = 1
    found = regions(array, 0.01, max_regions=5)
    assert found.counts.tolist() == [25, 5]
    assert found.overflow.tolist() == [True, False]
    assert found.boxes[0].tolist() == [[x, 8, x + 1, 9] for x in (8, 6, 4, 2, 0)]
    assert torch.equal(found.boxes[0], regions(array, 0.01, max_regions=40).boxes[0, :5])


def test_maps_that_are_not_valid_have_no_regions() -> None:
    maps = torch.ones(3, 2, 2)
    found = regions(maps, 0.5, valid=torch.tensor([True, False, True]))
    assert found.counts.tolist() == [1, 0, 1]
    assert not found.boxes[1].any()


def test_nan_cells_reach_no_threshold() -> None:
    nan = float("nan")
    found = regions(torch.tensor([[[nan, nan], [nan, nan]], [[1.0, nan], [nan, nan]]]), -1.0)
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
    for got, want in zip(regions(strided, 0.6), regions(maps, 0.6), strict=True):
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
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        regions(**{"maps": MAPS, "threshold": 0.5, **arguments})
