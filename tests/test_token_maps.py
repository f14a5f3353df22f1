"""token_maps against a slow definition of its own, and against what published HiDe was seen to do."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage import filters

from hide_kernels import backends, explain
from hide_kernels.regions import regions
from hide_kernels.testing.map_cases import MAP_CASES, MAP_ERROR, MapCase, map_error
from hide_kernels.token_maps import TokenMaps, token_maps
from hide_kernels.token_maps.api import FLAT
from hide_kernels.token_maps.cupy import by_filters, by_ndimage, masked_maps

Array = NDArray[np.float64]

# Rows that are not finite are no surprise: NumPy has nothing to warn of.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def random_rows(*shapes: tuple[int, int], tokens: int = 7, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(tokens, *shape, generator=generator) for shape in shapes]


def gaussian_matrix(length: int, sigma: float) -> Array:
    """Smoothing along one axis as a matrix, from the definition: mirror with the edge repeated, four deviations."""
    if sigma == 0:
        return np.eye(length)
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    matrix = np.zeros((length, length))
    for at in range(length):
        for offset, weight in zip(range(-radius, radius + 1), weights / weights.sum(), strict=True):
            mirrored = (at + offset) % (2 * length)
            matrix[at, min(mirrored, 2 * length - 1 - mirrored)] += weight
    return matrix


def normalised(row: torch.Tensor, sigma: float) -> Array:
    height, width = row.shape
    smooth = gaussian_matrix(height, sigma) @ row.double().numpy() @ gaussian_matrix(width, sigma).T
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def slow_map(rows: torch.Tensor, token: int, prior_rows: int, sigma: float) -> Array:
    noise = np.mean([normalised(rows[p], sigma) for p in range(prior_rows)], axis=0) if prior_rows else 0.0
    purified = np.clip(normalised(rows[prior_rows + token], sigma) - noise, 0, None)
    return (purified - purified.min()) / (purified.max() - purified.min())


@pytest.mark.parametrize("sigma", [0, 0.5, 1, 3.0, 20])
@pytest.mark.parametrize("prior_rows", [0, 1, 3])
def test_maps_equal_the_definition_evaluated_token_by_token(sigma: float, prior_rows: int) -> None:
    rows = random_rows((5, 9), (11, 3), (1, 7))
    got = token_maps(rows, prior_rows=prior_rows, sigma=sigma)
    assert got.valid.all()
    for token in range(7 - prior_rows):
        peaks = [image[prior_rows + token].max() for image in rows]
        taken = int(np.argmax(peaks))
        assert got.image_index[token] == taken
        for i, image in enumerate(rows):
            want = slow_map(image, token, prior_rows, sigma) if i == taken else np.zeros(image.shape[1:])
            np.testing.assert_allclose(got.maps[i][token].numpy(), want, rtol=0, atol=2e-7)


def test_smoothing_equals_a_three_dimensional_filter_over_a_singleton_axis() -> None:
    (rows,) = random_rows((6, 8), tokens=1)
    smooth = ndimage.gaussian_filter(rows.double().numpy(), 2)
    want = (smooth[0] - smooth.min()) / (smooth.max() - smooth.min())
    np.testing.assert_allclose(token_maps([rows], prior_rows=0, sigma=2).maps[0][0].numpy(), want, rtol=0, atol=1e-7)


def test_the_prior_is_the_mean_of_normalised_maps_and_is_not_normalised_again() -> None:
    rows = torch.tensor([[[0.0, 2.0, 4.0, 4.0]], [[10.0, 10.0, 14.0, 11.0]], [[1.0, 5.0, 4.0, 1.0]]])
    # Normalised: (0, .5, 1, 1), (0, 0, 1, .25), (0, 1, .75, 0); the mean prior is (0, .25, 1, .625).
    got = token_maps([rows], prior_rows=2, sigma=0)
    assert got.maps[0].tolist() == [[[0.0, 1.0, 0.0, 0.0]]]
    half = torch.tensor([[[0.0, 2.0, 4.0, 4.0]], [[0.0, 4.0, 1.0, 3.0]]])
    # (0, 1, .25, .75) minus (0, .5, 1, 1).
    assert token_maps([half], prior_rows=1, sigma=0).maps[0].tolist() == [[[0.0, 1.0, 0.0, 0.0]]]
    three = torch.tensor([[[0.0, 0.0, 1.0, 0.0]], [[0.0, 0.5, 1.0, 1.0]]])
    assert token_maps([three], prior_rows=1, sigma=0).maps[0].tolist() == [[[0.0, 0.5, 0.0, 1.0]]]


def behaviour_rows(seed: int) -> torch.Tensor:
    """8 prompt, 3 entity and 5 template rows on a 12 x 16 grid: noise, a sink at (1, 1), from row 8 on a moving block."""
    random = np.random.default_rng(seed)
    rows = random.uniform(0, 0.2, (16, 12, 16))
    rows[:, 1, 1] += 3
    for token in range(8, 16):
        rows[token, 3:5, token - 3 : token] += 1
    rows *= 0.4 / rows.sum(axis=(1, 2), keepdims=True)
    return torch.from_numpy(rows.astype(np.float32))


@pytest.mark.parametrize("sigma", [0, 1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_planted_blocks_are_found_and_the_shared_sink_is_not(sigma: float, seed: int) -> None:
    got = token_maps([behaviour_rows(seed)[:-4]], prior_rows=8, sigma=sigma)
    assert got.valid.tolist() == [True] * 4
    found = regions(got.maps[0], 0.7, valid=got.valid)
    for token in range(4):
        x0, y0, x1, y1 = found.boxes[token, 0].tolist()
        left, top, right, bottom = planted = (token + 5, 3, token + 8, 5)
        assert found.counts[token] == 1
        assert got.maps[0][token, 1, 1] < 0.7
        if sigma < 3:
            assert (x0, y0, x1, y1) == planted
        else:
            assert x0 <= left and y0 <= top and x1 >= right and y1 >= bottom
            assert 5 <= x1 - x0 <= 7 and 5 <= y1 - y0 <= 7


def test_the_largest_raw_peak_takes_the_row_even_if_another_image_is_brighter_once_smoothed() -> None:
    spike, broad = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9)
    spike[0, 4, 4] = 1.0
    broad[0, 2:7, 2:7] = 0.9
    got = token_maps([broad, spike], prior_rows=0, sigma=2)
    assert got.image_index.tolist() == [1]
    assert not got.maps[0].any()
    assert got.maps[1].max() == 1


def test_equal_peaks_go_to_the_first_image() -> None:
    rows = random_rows((4, 4), (4, 4), (4, 4), tokens=2)
    for image, peak in zip(rows, (1.0, 2.0, 2.0), strict=True):
        image[:, 1, 2] = peak
    assert token_maps(rows, prior_rows=1, sigma=0).image_index.tolist() == [1]


def test_every_valid_map_reaches_from_zero_to_exactly_one() -> None:
    rows = random_rows((13, 17), (6, 5), tokens=40)
    got = token_maps(rows, prior_rows=8, sigma=1.5)
    for token, image in enumerate(got.image_index.tolist()):
        assert got.maps[image][token].min() == 0
        assert got.maps[image][token].max() == 1


@pytest.mark.parametrize("sigma", [0, 3])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e30])
def test_a_constant_row_is_zeros_and_not_valid(sigma: float, value: float) -> None:
    (rows,) = random_rows((5, 6), tokens=4)
    rows[2] = value
    got = token_maps([rows], prior_rows=1, sigma=sigma)
    assert got.valid.tolist() == [True, False, True]
    assert not got.maps[0][1].any()


@pytest.mark.parametrize("contrast, valid", [(2e-6, True), (0.5e-6, False)])
def test_a_contrast_below_a_millionth_counts_as_constant(contrast: float, valid: bool) -> None:
    rows = torch.ones(1, 5, 6, dtype=torch.float64)
    rows[0, 2, 3] += contrast
    got = token_maps([rows], prior_rows=0, sigma=0)
    assert got.valid.tolist() == [valid]
    assert got.maps[0].max() == valid


def test_a_row_beyond_float32_is_not_finite() -> None:
    rows = torch.tensor([[[-1.7e308, 0.0, 1.7e308]], [[0.0, 1.0, 3e38]]], dtype=torch.float64)
    got = token_maps([rows], prior_rows=0, sigma=0)
    assert got.valid.tolist() == [False, True]
    assert not got.maps[0][0].any()


def test_a_map_of_one_cell_is_constant() -> None:
    got = token_maps([torch.tensor([[[0.3]], [[0.9]]])], prior_rows=1, sigma=1)
    assert got.valid.tolist() == [False]
    assert got.maps[0].tolist() == [[[0.0]]]


def test_a_row_that_the_prior_cancels_is_not_valid() -> None:
    (rows,) = random_rows((7, 9), tokens=1)
    got = token_maps([rows.repeat(9, 1, 1)], prior_rows=8, sigma=2)
    assert got.valid.tolist() == [False]
    assert not got.maps[0].any()


@pytest.mark.parametrize("sigma", [0, 1])
@pytest.mark.parametrize("value", [0.25, float("nan"), float("inf"), float("-inf")])
def test_a_constant_or_non_finite_prior_row_counts_as_zeros_in_the_mean(sigma: float, value: float) -> None:
    (rows,) = random_rows((5, 6), tokens=3)
    if np.isfinite(value):
        rows[1] = value
    else:
        rows[1, 2, 3] = value
    purified = np.clip(normalised(rows[2], sigma) - normalised(rows[0], sigma) / 2, 0, None)
    got = token_maps([rows], prior_rows=2, sigma=sigma)
    assert got.valid.tolist() == [True]
    np.testing.assert_allclose(got.maps[0][0].numpy(), purified / purified.max(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_in_one_image_goes_to_a_finite_one(value: float) -> None:
    bright, dim = random_rows((4, 5), (3, 3), tokens=2)
    bright += 5
    dim -= 5
    bright[1, 0, 0] = value
    got = token_maps([bright, dim], prior_rows=1, sigma=1)
    assert got.image_index.tolist() == [1]
    assert got.valid.tolist() == [True]
    assert not got.maps[0].any()


def test_a_row_that_is_finite_nowhere_is_zeros_and_disturbs_no_other_row() -> None:
    rows = random_rows((4, 5), (3, 3), tokens=5)
    clean = token_maps(rows, prior_rows=1, sigma=1)
    for image in rows:
        image[2, 1, 1] = float("nan")
    got = token_maps(rows, prior_rows=1, sigma=1)
    assert got.valid.tolist() == [True, False, True, True]
    for maps, expected in zip(got.maps, clean.maps, strict=True):
        assert not maps[1].any()
        assert torch.equal(maps[[0, 2, 3]], expected[[0, 2, 3]])


def test_no_row_after_the_prior_gives_no_map() -> None:
    got = token_maps(random_rows((4, 5), tokens=3), prior_rows=3, sigma=1)
    assert got.maps[0].shape == (0, 4, 5)
    assert got.image_index.tolist() == got.valid.tolist() == []


def test_a_map_does_not_depend_on_the_other_tokens() -> None:
    rows = random_rows((6, 7), (5, 5), tokens=9)
    together = token_maps(rows, prior_rows=3, sigma=1)
    for token in range(6):
        alone = token_maps([image[[0, 1, 2, 3 + token]] for image in rows], prior_rows=3, sigma=1)
        for a, b in zip(together.maps, alone.maps, strict=True):
            assert torch.equal(a[token], b[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_float_dtype_and_any_strides_give_the_map_of_the_same_values(dtype: torch.dtype) -> None:
    (rows,) = random_rows((6, 7), tokens=4)
    rows = rows.to(dtype)
    want = token_maps([rows.float()], prior_rows=1, sigma=1)
    strided = rows.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    got = token_maps([strided], prior_rows=1, sigma=1)
    assert got.maps[0].dtype == torch.float32
    assert torch.equal(got.maps[0], want.maps[0])


@pytest.mark.parametrize("smoothing", [(by_ndimage, ndimage), (by_filters, filters)], ids=["cupy", "cucim"])
@pytest.mark.parametrize("case", MAP_CASES, ids=lambda case: case.name)
def test_the_code_for_cupy_and_cucim_gives_the_maps_of_the_reference_with_numpy_in_their_place(
    case: MapCase, smoothing: tuple[Any, Any]
) -> None:
    def call(rows: list[torch.Tensor], *, prior_rows: int, sigma: float, backend: None) -> TokenMaps:
        smoothed, library = smoothing
        images = [image.double().numpy() for image in rows]
        maps, image_index, valid = masked_maps(np, images, prior_rows, FLAT, smoothed(library, sigma))
        return TokenMaps(tuple(map(torch.from_numpy, maps)), torch.from_numpy(image_index), torch.from_numpy(valid))

    for dtype in (torch.float32, torch.float16):
        assert map_error(case, dtype, call=call) <= MAP_ERROR


class OnTheDevice:
    """As much of rows on a GPU as choosing a backend looks at."""

    device = torch.device("cuda:0")
    dtype = torch.float32

    def numel(self) -> int:
        return 60


@pytest.mark.parametrize(
    "installed, chosen",
    [({"cupy", "cucim", "scipy"}, "cupy"), ({"cucim", "scipy"}, "scipy"), ({"scipy"}, "scipy")],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and Triton takes the call")
def test_without_triton_a_gpu_is_served_by_cupy_where_it_is_installed_and_else_by_the_host(
    installed: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: name in installed)
    explanation = explain("token_maps", rows=[OnTheDevice()])
    assert explanation.chosen == chosen
    assert [backend.name for backend, _ in explanation.candidates] == ["triton", "cupy", "cucim", "scipy"]


ROWS = torch.zeros(3, 4, 5)


@pytest.mark.parametrize(
    "rows, changes, error, message",
    [
        (ROWS, {}, TypeError, "rows: got Tensor"),
        ([], {}, ValueError, "rows: got no image"),
        ([[1.0]], {}, TypeError, r"rows\[0\]: got list"),
        ([ROWS, ROWS[0]], {}, ValueError, r"rows\[1\]: got shape \(4, 5\)"),
        ([ROWS[:, :0]], {}, ValueError, r"rows\[0\]: got shape \(3, 0, 5\)"),
        ([ROWS.long()], {}, TypeError, r"rows\[0\]: got dtype torch.int64"),
        ([ROWS, ROWS.double()], {}, ValueError, r"rows\[1\]: got dtype torch.float64"),
        ([ROWS, ROWS.to("meta")], {}, ValueError, r"rows\[1\]: got device meta"),
        ([ROWS, ROWS[:2]], {}, ValueError, r"rows\[1\]: got T = 2, want 3"),
        ([ROWS], {"prior_rows": 4}, ValueError, "prior_rows: got 4, want 0 to 3"),
        ([ROWS], {"prior_rows": -1}, ValueError, "prior_rows: got -1"),
        ([ROWS], {"prior_rows": 1.0}, TypeError, "prior_rows: got float"),
        ([ROWS], {"sigma": -1}, ValueError, "sigma: got -1"),
        ([ROWS], {"sigma": float("nan")}, ValueError, "sigma: got nan"),
        ([ROWS], {"sigma": 1001}, ValueError, "sigma: got 1001, want 0 to 1000"),
        ([ROWS], {"sigma": "3"}, TypeError, "sigma: got str"),
        ([ROWS], {"backend": "fast"}, ValueError, "backend: got 'fast'.*scipy"),
        (
            [ROWS],
            {"backend": "triton"},
            ValueError,
            "'triton' cannot serve this call of token_maps: rows is on the CPU",
        ),
        ([ROWS], {"backend": "cupy"}, ValueError, "'cupy' cannot serve this call of token_maps: rows is on cpu"),
        ([ROWS], {"backend": "cucim"}, ValueError, "'cucim' cannot serve this call of token_maps: rows is on cpu"),
    ],
)
def test_a_wrong_argument_is_named(rows: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        token_maps(rows, **{"prior_rows": 1, "sigma": 1.0, **changes})
