"""The operators in a row against the numbers of the published code: tests/data/golden/README.md says what they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hide_kernels.collage import boxes_to_pixels, collage, final_boxes
from hide_kernels.regions import regions
from hide_kernels.token_maps import TokenMaps, token_maps

CASES = sorted((Path(__file__).parent / "data" / "golden").glob("case_*.npz"))
PRIOR = 8
TAIL = 4


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    with np.load(request.param) as archive:
        return dict(archive)


def maps_of(case: Mapping[str, Any]) -> TokenMaps:
    attention = torch.from_numpy(case["attention"]).mean(dim=0)[:-TAIL]
    spans = zip(case["image_starts"], case["image_ends"], case["grids"].tolist(), strict=True)
    rows = [attention[:, start:end].unflatten(1, grid) for start, end, grid in spans]
    return token_maps(rows, prior_rows=PRIOR, sigma=case["sigma"].item())


def cells_of(case: Mapping[str, Any], maps: TokenMaps, image: int) -> list[list[list[int]]]:
    """Boxes in cells of each token after the prior."""
    valid = maps.valid & (maps.image_index == image)
    found = regions(maps.maps[image], case["threshold"].item(), valid=valid)
    assert not found.overflow.any()
    return [boxes[:count].tolist() for boxes, count in zip(found.boxes, found.counts.tolist(), strict=True)]


def test_there_are_sixteen_cases() -> None:
    assert len(CASES) == 16


def test_the_same_tokens_have_maps_and_the_maps_agree(case: Mapping[str, Any]) -> None:
    got = maps_of(case)
    first = int(case["text_start"]) + PRIOR
    keys = {(int(got.image_index[t]), first + t) for t in torch.nonzero(got.valid).flatten().tolist()}
    assert keys == set(map(tuple, case["map_keys"].tolist()))
    for n, (image, token) in enumerate(case["map_keys"].tolist()):
        np.testing.assert_allclose(got.maps[image][token - first].numpy(), case[f"map_{n}"], rtol=0, atol=2e-5)


def test_the_regions_of_every_token_agree(case: Mapping[str, Any]) -> None:
    maps = maps_of(case)
    first = int(case["text_start"]) + PRIOR
    got = set()
    for image, (rows, columns) in enumerate(case["grids"].tolist()):
        for token, boxes in enumerate(cells_of(case, maps, image)):
            for x0, y0, x1, y1 in boxes:
                got.add((image, first + token, x0 / columns, y0 / rows, x1 / columns, y1 / rows))
    assert got == set(map(tuple, case["token_boxes"].tolist()))


def test_final_boxes_and_collages_agree_to_the_pixel(case: Mapping[str, Any]) -> None:
    maps = maps_of(case)
    used = list(dict.fromkeys(case["final_boxes"][:, 0].astype(int).tolist()))
    assert len(used) == case["n_compact"]
    for image, grid in enumerate(case["grids"].tolist()):
        source = torch.from_numpy(case[f"image_{image}"])
        height, width = source.shape[:2]
        pooled = [box for boxes in cells_of(case, maps, image) for box in boxes]
        cells = torch.tensor(pooled, dtype=torch.int32).reshape(-1, 4)
        got = collage(source, boxes_to_pixels(cells, grid=tuple(grid), size=(height, width)))
        assert torch.equal(got.boxes, final_boxes(source, cells, grid=tuple(grid)))
        normalised = {(x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in got.boxes.tolist()}
        assert normalised == {tuple(row[1:]) for row in case["final_boxes"].tolist() if row[0] == image}
        if image in used:
            assert got.image is not None
            np.testing.assert_array_equal(got.image.numpy(), case[f"compact_{used.index(image)}"])
        else:
            assert got.image is None
            assert got.layout is None
