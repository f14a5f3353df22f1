"""Every form of a picture that a user may hand over; for files of every kind, see test_bad_input."""

import numpy as np
import pytest
import torch
from PIL import Image

from hide.images import load_image, on_colour, to_tensor

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 31, 3), dtype=np.uint8)


def same(image, pixels, mode="RGB"):
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_paths_images_arrays_and_tensors_give_the_same_pixels(tmp_path):
    picture = Image.fromarray(PIXELS)
    picture.save(tmp_path / "a.png")
    for form in [
        str(tmp_path / "a.png"), tmp_path / "a.png", picture, PIXELS, torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1), PIXELS / 255, torch.from_numpy(PIXELS).permute(2, 0, 1) / 255,
    ]:  # fmt: skip
        same(load_image(form), PIXELS)
    assert torch.equal(to_tensor(picture), torch.from_numpy(PIXELS))


def test_grey_and_masks_become_rgb():
    for form in [PIXELS[..., 0], PIXELS[..., :1], Image.fromarray(PIXELS[..., 0])]:
        same(load_image(form), PIXELS[..., :1].repeat(3, 2))
    same(load_image(PIXELS[..., 0] > 100), ((PIXELS[..., :1] > 100) * np.uint8(255)).repeat(3, 2))


def test_transparency_is_kept_and_laid_over_white_on_demand():
    rgba = np.dstack([PIXELS, RNG.integers(0, 256, PIXELS.shape[:2], dtype=np.uint8)])
    picture = load_image(rgba)
    same(picture, rgba, "RGBA")
    weight = rgba[..., 3:] / 255
    expected = PIXELS * weight + 255 * (1 - weight)
    assert np.abs(np.asarray(on_colour(picture)) - expected).max() <= 1
    palette = Image.fromarray(PIXELS).quantize(7)
    palette.info["transparency"] = 0
    assert load_image(palette).mode == "RGBA"
    assert load_image(Image.new("LA", (3, 2), (9, 0))).getpixel((0, 0)) == (9, 9, 9, 0)


def test_sixteen_bit_grey_keeps_its_range():
    grey = (RNG.random((8, 9)) * 65535).astype(np.uint16)
    picture = np.asarray(load_image(Image.fromarray(grey)))[..., 0]
    assert np.abs(picture - grey / 257).max() <= 0.5


@pytest.mark.parametrize(
    "form, error, text",
    [
        (None, TypeError, "got NoneType"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "shape"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, "shape"),
        (np.zeros((4,), np.uint8), ValueError, "shape"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "int64"),
        (np.full((4, 4, 3), 255.0), ValueError, "0..1"),
        (np.full((4, 4, 3), np.nan), ValueError, "0..1"),
        (Image.new("RGB", (0, 4)), ValueError, "0 x 4"),
    ],
)
def test_wrong_arrays_are_named(form, error, text):
    with pytest.raises(error, match=text):
        load_image(form)
