"""The Triton kernels of token_maps, interpreted on the CPU, against the reference."""

import re

import numpy as np
import pytest
import test_golden
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from hide_kernels import explain, token_maps
from hide_kernels.launch import Launch
from hide_kernels.testing.interpreter import interpreted
from hide_kernels.testing.map_cases import MAP_CASES, MAP_ERROR, MapCase, map_error
from hide_kernels.token_maps import triton_launch

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with interpreted():
        yield


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran."""
    names = []
    real = Launch.run

    def record(launch):
        names.append(re.sub(r".* (\w+)\(.*", r"\1", launch.kernel.fn.__name__))
        real(launch)

    monkeypatch.setattr(Launch, "run", record)
    return names


@pytest.mark.parametrize("case", MAP_CASES, ids=lambda case: case.name)
def test_every_kind_of_call_gives_the_maps_of_the_reference(case, launched):
    assert map_error(case, torch.float32, backend="triton") <= MAP_ERROR
    scans = -(-len(case.grids) // 8) if case.rows > case.prior_rows else 0
    assert launched == ["scan_rows"] * scans + ["smooth_rows", "subtract_prior", "normalise_maps"] * (scans > 0)


@pytest.fixture
def pairs(monkeypatch):
    """A card that sums products as pairs of float32."""
    monkeypatch.setattr(triton_launch, "INTERPRETED", (8, 9))


@pytest.mark.parametrize("case", MAP_CASES, ids=lambda case: case.name)
def test_pairs_of_float32_give_the_maps_of_the_reference(case, pairs):
    assert map_error(case, torch.float32, backend="triton") <= MAP_ERROR


@pytest.mark.parametrize("path", test_golden.CASES[10::5], ids=lambda path: path.stem)
def test_pairs_of_float32_give_the_published_regions_of_every_token(path, pairs, launched):
    test_golden.test_the_regions_of_every_token_agree(dict(np.load(path)))
    assert launched


def test_pairs_of_float32_keep_more_than_forty_bits_of_the_smoothed_rows():
    """Against the same kernels in float64, whose own rounding is far below."""
    rows = [torch.rand(3, 37, 53, generator=torch.Generator().manual_seed(0))]
    index, valid = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    smooth = []
    for capability in ((9, 0), (8, 9)):
        launches = triton_launch.plan(rows, 1, 3.0, 1e-6, torch.zeros(2 * 37 * 53), index, valid, capability)
        for launch in launches[:2]:
            launch.run()
        smooth.append(launches[1].arguments["smooth"])
    error = ((smooth[1] - smooth[0]).abs() / smooth[0]).max().item()
    assert 0 < error < 2**-40


def test_rows_of_float64_are_never_summed_as_pairs(pairs):
    test_values_of_float64_are_not_rounded()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name", ["several tiles of lines, columns and cells", "rows that are not finite", "equal peaks"]
)
def test_other_types_give_the_maps_of_the_reference(name, dtype):
    (case,) = [case for case in MAP_CASES if case.name == name]
    assert map_error(case, dtype, backend="triton") <= MAP_ERROR


def test_values_of_float64_are_not_rounded():
    rows = torch.ones(3, 5, 6, dtype=torch.float64)
    rows[0, 2, 3] += 2e-6
    rows[1, 2, 3] += 0.5e-6
    rows[2, 2, 3] = 1e39
    assert token_maps([rows], prior_rows=0, sigma=0, backend="triton").valid.tolist() == [True, False, False]


def test_partial_results_of_more_blocks_than_are_read_at_once_are_all_seen(monkeypatch):
    for name, value in (("PARTS", 2), ("CELLS", 16), ("LINES", 2), ("COLUMNS", 4), ("SCAN", 16)):
        monkeypatch.setattr(triton_launch, name, value)
    assert (
        map_error(MapCase("small tiles", grids=((5, 7), (2, 3)), rows=3), torch.float32, backend="triton") <= MAP_ERROR
    )


@pytest.mark.parametrize("path", test_golden.CASES[10::5], ids=lambda path: path.stem)
def test_the_published_regions_of_every_token_come_out(path, launched):
    test_golden.test_the_regions_of_every_token_agree(dict(np.load(path)))
    assert launched


def test_an_address_outside_the_tensors_is_noticed():
    rows = MapCase("outside").inputs(torch.float32)
    index, valid = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    launches = triton_launch.plan(rows, 1, 1.0, 1e-6, torch.zeros(100), index, valid)
    with pytest.raises(IndexError, match="normalise_maps: addresses lie outside"):
        for launch in launches:
            launch.run()


def test_other_kernels_run_unchecked_beside_them():
    @triton.jit
    def double(pointer, count: tl.constexpr):
        at = pointer + tl.arange(0, count)
        tl.store(at, tl.load(at) * 2)

    values = torch.arange(4.0)
    map_error(MAP_CASES[-1], torch.float32, backend="triton")
    double[(1,)](values, 4)
    assert values.tolist() == [0, 2, 4, 6]


def test_what_the_kernels_cannot_serve_is_refused_by_name_and_goes_to_the_reference():
    rows = torch.zeros(1, 1, 1).expand(2, 1 << 16, 1 << 15)
    with pytest.raises(ValueError, match="too many for 32-bit"):
        token_maps([rows], prior_rows=1, sigma=1.0, backend="triton")
    assert explain("token_maps", rows=[rows]).chosen == "scipy"
