"""image_spans, rows_to_maps and maps_to_pixels: each cell of a map is the token that shows that place."""

import numpy as np
import pytest
import torch
from PIL import Image
from random_models import FAMILIES, IMAGE, internvl, llava, llm, prompt, qwen2_5_vl, qwen3_vl

from hide.models.qwen2_5_vl import Qwen25VL
from hide.tiny.model import build
from hide_kernels.image_tokens import ImageTokens, maps_to_pixels, rows_to_maps
from hide_kernels.integrations.image_spans import image_spans


def ids(*runs):
    """One row of ids: text, then each run of that many image tokens between text."""
    row = [20, 21]
    for run in runs:
        row += [IMAGE] * run + [22, 23]
    return torch.tensor([row])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "internvl"])
def test_the_span_holds_exactly_the_placeholders(family):
    inputs = prompt(family)
    ((image,),) = image_spans(
        FAMILIES[family](), inputs["input_ids"],
        image_grid_thw=inputs.get("image_grid_thw"), image_sizes=inputs.get("image_sizes"),
    )  # fmt: skip
    positions = torch.nonzero(inputs["input_ids"][0] == IMAGE).flatten().tolist()
    assert list(range(*image.span)) == positions
    assert image.grid == {"llava": (4, 4), "llava_onevision": (4, 8)}.get(family, (3, 4))


@pytest.mark.parametrize("model", [qwen2_5_vl, qwen3_vl])
def test_several_images_of_several_samples_keep_their_order(model):
    padded = torch.cat([ids(6, 8), torch.nn.functional.pad(ids(12), (ids(6, 8).shape[1] - ids(12).shape[1], 0))])
    grids = torch.tensor([[1, 4, 6], [1, 8, 4], [1, 2, 24]])
    samples = image_spans(model().config, padded, image_grid_thw=grids)
    assert [[image.grid for image in sample] for sample in samples] == [[(2, 3), (4, 2)], [(1, 12)]]
    for sample, row in zip(samples, padded, strict=True):
        covered = [position for image in sample for position in range(*image.span)]
        assert covered == torch.nonzero(row == IMAGE).flatten().tolist()


def test_neighbouring_images_without_text_between_them_are_told_apart():
    row = torch.tensor([20, *[IMAGE] * 14, 21])
    samples = image_spans(qwen2_5_vl(), row, image_grid_thw=torch.tensor([[1, 4, 6], [1, 4, 8]]))
    assert [image.span for image in samples[0]] == [(1, 7), (7, 15)]


def test_internvl_tiles_are_stitched_and_the_thumbnail_is_left_out():
    """2 x 3 tiles of 2 x 2 tokens; a token's value is where its cell belongs."""
    model = internvl()
    ((image,),) = image_spans(model, ids(7 * 4), tile_grids=[(2, 3)])
    assert image.stop - image.start == 28
    row = torch.full((28,), -1.0)
    for tile in range(6):
        for token in range(4):
            y, x = tile // 3 * 2 + token // 2, tile % 3 * 2 + token % 2
            row[tile * 4 + token] = y * 6 + x
    (stitched,) = rows_to_maps(row, [image])
    assert torch.equal(stitched, torch.arange(24.0).view(4, 6))
    ((single,),) = image_spans(model, ids(4))
    assert single.grid == (2, 2)


def test_llava_skips_the_class_token_where_it_is_kept():
    config = llava().config
    config.vision_feature_select_strategy = "full"
    ((image,),) = image_spans(config, ids(17))
    (grid,) = rows_to_maps(torch.arange(17.0), [image])
    assert torch.equal(grid, torch.arange(1.0, 17).view(4, 4))


def test_rows_of_several_images_become_views_in_reading_order():
    images = [ImageTokens(3, 9, torch.arange(6).view(2, 3)), ImageTokens(20, 24, torch.arange(4).view(2, 2))]
    rows = torch.arange(20.0).view(2, 10)
    first, second = rows_to_maps(rows, images)
    assert torch.equal(first[1], torch.tensor([[10.0, 11, 12], [13, 14, 15]]))
    assert torch.equal(second[0], torch.tensor([[6.0, 7], [8, 9]]))
    assert first.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


def test_an_adapters_spans_are_those_of_the_picture_it_made():
    adapter = Qwen25VL(*build())
    rng = np.random.default_rng(0)
    pictures = adapter.preprocess(
        [Image.fromarray(rng.integers(0, 256, (90, 150, 3), np.uint8))], min_tokens=4, max_tokens=99
    )
    tokens = adapter.input_ids("What?", pictures)
    ((image,),) = image_spans(adapter.model, tokens, image_grid_thw=adapter.image_inputs(pictures)["image_grid_thw"])
    assert image.grid == pictures.grids[0]
    assert (tokens[0, image.start : image.stop] == adapter.model.config.image_token_id).all()


def test_maps_are_enlarged_between_cell_centres():
    pixels = maps_to_pixels(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), (4, 4))
    along = torch.tensor([0, 0.25, 0.75, 1])
    assert torch.allclose(pixels[0], along[None] + 2 * along[:, None])
    assert maps_to_pixels(torch.ones(2, 3, 5, 7, dtype=torch.bfloat16), (11, 6)).unique().tolist() == [1]


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: image_spans(llm(), ids(4)), ValueError, "'llama', want one of"),
        (lambda: image_spans(None, ids(4)), ValueError, "NoneType"),
        (lambda: image_spans(qwen2_5_vl(), ids(4)), ValueError, "image_grid_thw: got None"),
        (lambda: image_spans(qwen2_5_vl(), ids(5), image_grid_thw=torch.tensor([[1, 4, 6]])), ValueError, "should have 6"),
        (lambda: image_spans(qwen2_5_vl(), ids(6, 6), image_grid_thw=torch.tensor([[1, 4, 6]])), ValueError, "more images"),
        (lambda: image_spans(qwen2_5_vl(), ids(6), image_grid_thw=torch.tensor([[1, 4, 6]] * 2)), ValueError, "1 images were"),
        (lambda: image_spans(qwen2_5_vl(), ids(), image_grid_thw=torch.tensor([[1, 4, 6]])), ValueError, "0 images were"),
        (lambda: image_spans(qwen2_5_vl(), ids(6), image_grid_thw=torch.tensor([[2, 4, 6]])), ValueError, "videos"),
        (lambda: image_spans(internvl(), ids(8)), ValueError, "tile_grids: got None"),
        (lambda: image_spans(internvl(), ids(12), tile_grids=[(1, 1), (1, 1)]), ValueError, "tile_grids: got 2"),
        (lambda: image_spans(llava(), ids(4).float()), TypeError, "input_ids"),
        (lambda: rows_to_maps(torch.zeros(2, 5), [ImageTokens(0, 4, torch.arange(4).view(2, 2))]), ValueError, "want 4"),
        (lambda: maps_to_pixels(torch.zeros(2, 2, dtype=torch.int32), (4, 4)), TypeError, "floats"),
        (lambda: maps_to_pixels(torch.zeros(0, 2), (4, 4)), ValueError, "cell"),
        (lambda: maps_to_pixels(torch.zeros(2, 2), (0, 4)), ValueError, "size"),
    ],
)  # fmt: skip
def test_wrong_requests_are_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_maps_do_not_depend_on_torch_s_default_device():
    row, image = torch.rand(2, 12), ImageTokens(3, 15, torch.arange(12).view(3, 4))
    with torch.device("meta"):
        (found,) = rows_to_maps(row, [image])
    assert torch.equal(found, row.view(2, 3, 4))
