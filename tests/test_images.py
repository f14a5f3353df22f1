"""Every kind of picture that a user may hand over."""

import io

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


def test_exif_turns_the_picture_upright(tmp_path):
    picture = Image.fromarray(PIXELS)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    same(load_image(tmp_path / "a.png"), np.rot90(PIXELS, -1))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0))[:3] == (255, 0, 0)


def test_cmyk_and_one_pixel_are_read():
    assert load_image(Image.new("CMYK", (1, 1))).getpixel((0, 0)) == (255, 255, 255)


def test_what_is_no_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png is not a file"):
        load_image(tmp_path / "missing.png")
    buffer = io.BytesIO()
    Image.fromarray(PIXELS.repeat(9, 0).repeat(9, 1)).save(buffer, "PNG")
    files = {"empty.png": b"", "text.jpg": b"hello", "cut.png": buffer.getvalue()[: len(buffer.getvalue()) // 2]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a picture"):
            load_image(tmp_path / name)


def test_a_decompression_bomb_is_refused_with_the_limit_and_the_option(tmp_path, monkeypatch):
    Image.new("L", (200, 200)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match=r"big.png .*20000 pixels.*MAX_IMAGE_PIXELS"):
        load_image(tmp_path / "big.png")


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
