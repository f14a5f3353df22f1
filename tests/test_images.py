"""Every form of a picture that a user may hand over; for files of every kind, see test_bad_input."""

import base64
import io
import struct
import textwrap
import warnings
import zlib
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from hide.images import from_base64, load_image, on_colour, to_tensor

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
        (np.zeros((4, 4, 3), np.complex64), TypeError, "complex64"),
        (np.full((4, 4, 3), "a"), TypeError, "<U1"),
        (np.full((4, 4, 3), np.nan), ValueError, "no finite value"),
        (Image.new("RGB", (0, 4)), ValueError, "0 x 4"),
    ],
)
def test_wrong_arrays_are_named(form, error, text):
    with pytest.raises(error, match=text):
        load_image(form)


RAMP = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
DEEP = {
    "mode I of 8 bits": (lambda: Image.fromarray(RAMP).convert("I"), "0 (black) to 255"),
    "10 of 16 bits": (lambda: Image.fromarray((RAMP * (1023 / 255)).round().astype(np.uint16)), "to 1023"),
    "12 of 16 bits": (lambda: Image.fromarray((RAMP * (4095 / 255)).round().astype(np.uint16)), "to 4095"),
    "16 bits": (lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), None),
    "31 bits": (lambda: Image.fromarray((RAMP.astype(np.int64) * 8_421_504).astype(np.int32)), "to 2.14748e+09"),
    "floats to 1": (lambda: Image.fromarray(RAMP.astype(np.float32) / 255), None),
    "floats to 255": (lambda: Image.fromarray(RAMP.astype(np.float32)), None),
    "floats to 65535": (lambda: Image.fromarray(RAMP.astype(np.float32) * 257), "to 65535"),
    "floats of both signs": (lambda: Image.fromarray(RAMP.astype(np.float32) / 127.5 - 1), "-1 (black) to 1"),
    "standardised floats": (lambda: (RAMP - 120.0) / 60, "-2 (black) to 2.25"),
    "Hounsfield units": (lambda: RAMP.astype(np.int16) * 16 - 1024, "-1024 (black) to 3056"),
    "uint16 RGB": (lambda: np.dstack([RAMP.astype(np.uint16) * 257] * 3), None),
    "uint16 RGB of 12 bits": (lambda: np.dstack([(RAMP * (4095 / 255)).round().astype(np.uint16)] * 3), "to 4095"),
    "uint32": (lambda: RAMP.astype(np.uint32) * 16_843_009, None),
    "int64 of 8 bits": (lambda: RAMP.astype(np.int64), "to 255"),
    "tensor of 16 bits": (lambda: torch.from_numpy(RAMP.astype(np.uint16) * 257), None),
    "tensor of both signs": (lambda: (torch.from_numpy(RAMP) / 127.5 - 1).expand(3, 3, 256).half(), "-1 (black) to 1"),
    "floats that overshoot": (lambda: np.clip(RAMP / 255, 0, 1) * np.where(RAMP == 255, 1.1, 1), "0 (black) to 1 (white)"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_values_of_more_than_8_bits_are_scaled_to_the_ramp_that_they_are_and_guesses_are_said(name):
    make, rule = DEEP[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = np.asarray(load_image(make()))[..., 0]
    assert np.abs(seen.astype(int) - RAMP).max() <= 1
    assert len(said) == (rule is not None) and (rule is None or rule in str(said[0].message))


def encoded(kind="PNG", image=None, **options):
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, kind, **options)
    return buffer.getvalue()


def test_bytes_open_files_data_uris_and_base64_give_the_same_pixels(tmp_path):
    data = encoded()
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    for form in [data, bytearray(data), memoryview(data), io.BytesIO(data)]:
        same(load_image(form), PIXELS)
    with (tmp_path / "a.png").open("rb") as file:
        same(load_image(file), PIXELS)
    for body in [
        text,
        textwrap.fill(text, 76),
        text.replace("+", "-").replace("/", "_"),
        text.rstrip("="),
        quote(text),
    ]:
        for start in (
            "data:image/png;base64,",
            "data:image/jpeg;base64,",
            "DATA:;charset=utf-8;base64,",
            " data:;base64,\n",
        ):
            same(from_base64(start + body), PIXELS)
        same(load_image("data:image/png;base64," + body), PIXELS)
    same(load_image("data:image/png," + quote(data)), PIXELS)
    for form in [text, text.encode(), textwrap.fill(text, 76), f"{text[:50]}\r\n{text[50:]}\n"]:
        same(from_base64(form), PIXELS)


@pytest.mark.parametrize(
    "form, error, text",
    [
        ("https://example.org/a.png", ValueError, "the URL https://example.org/a.png, and URLs are not read; download"),
        ("file:///a.png", ValueError, "URLs are not read"),
        ("s3://bucket/a.png", ValueError, "URLs are not read"),
        ("data:image/png;base64", ValueError, "the data URI .* no comma"),
        ("data:image/png;base64,%%%", ValueError, "the data URI .* is not base64"),
        ("data:image/png;base64,AAAA", ValueError, "the data URI .* identify"),
        (b"", ValueError, "the bytes .* identify"),
        (io.StringIO("text"), ValueError, "the file object .* mode 'rb'"),
        (3, TypeError, "got int, want a path, a data URI"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(form, error, text):
    with pytest.raises(error, match=f"^image: .*{text}"):
        load_image(form)


def exif(orientation, resolution=None):
    entries = struct.pack("<HHI4s", 0x112, 3, 1, struct.pack("<HH", orientation, 0))
    if resolution is None:
        return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entries + b"\0\0\0\0"
    entries += struct.pack("<HHII", 0x11A, 10, 1, 8 + 2 + 24 + 4)
    return b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + b"\0\0\0\0" + struct.pack("<iI", *resolution)


def big_text(compressed):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("workflow", "x" * 3_000_000, zip=compressed)
    return text


def with_chunk(name, content, broken_checksum=False):
    """A PNG with a chunk behind its header."""
    data = encoded()
    checksum = zlib.crc32(name + content) ^ broken_checksum
    return data[:33] + struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum) + data[33:]


def late(data):
    """A PNG whose text stands behind its pixels."""
    start = data.index(b"iTXt") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    return data[:start] + data[end:-12] + data[start:end] + data[-12:]


def with_segment(marker, content):
    """A JPEG with a segment at its beginning."""
    data = encoded("JPEG")
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + data[2:]


GARBAGE = b"Exif\0\0garbagegarbage"
TURNED = np.rot90(PIXELS, -1)
METADATA = {
    "PNG, EXIF that is none": (lambda: encoded(exif=GARBAGE), PIXELS, "EXIF"),
    "WebP, EXIF that is none": (lambda: encoded("WEBP", lossless=True, exif=GARBAGE), PIXELS, "EXIF"),
    "JPEG, EXIF that is none": (lambda: encoded("JPEG", exif=GARBAGE), None, ""),
    "PNG, EXIF cut short": (lambda: encoded(exif=exif(6)[:20]), PIXELS, ""),
    "PNG turned, a resolution of -1/0": (lambda: encoded(exif=exif(6, (-1, 0))), TURNED, ""),
    "JPEG turned, a resolution of -1/0": (lambda: encoded("JPEG", exif=exif(6, (-1, 0))), None, ""),
    "PNG, orientation 0": (lambda: encoded(exif=exif(0)), PIXELS, "orientation of 0"),
    "PNG, orientation 9": (lambda: encoded(exif=exif(9)), PIXELS, "orientation of 9"),
    "PNG, 3 MB of compressed text": (lambda: encoded(pnginfo=big_text(True)), PIXELS, "metadata of the bytes"),
    "PNG, such text at its end": (lambda: late(encoded(pnginfo=big_text(True))), PIXELS, "metadata of the bytes"),
    "PNG turned, such text": (lambda: encoded(pnginfo=big_text(True), exif=exif(6)), TURNED, "metadata of the bytes"),
    "PNG, colour profile of 2 MB": (lambda: encoded(icc_profile=b"\0" * 2_000_000), PIXELS, "metadata of the bytes"),
    "PNG, colour profile that is none": (lambda: with_chunk(b"iCCP", b"x\0\0no zlib"), PIXELS, ""),
    "PNG, text with a wrong checksum": (lambda: with_chunk(b"tEXt", b"a\0b", True), PIXELS, "metadata of the bytes"),
    "PNG, physical size cut short": (lambda: with_chunk(b"pHYs", b"\0"), PIXELS, ""),
    "PNG, animation control cut short": (lambda: with_chunk(b"acTL", b"\0"), PIXELS, ""),
    "JPEG, colour profile that is none": (lambda: with_segment(0xE2, b"ICC_PROFILE\0"), None, ""),
    "JPEG, further pictures that are not there": (lambda: with_segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"), None, ""),
    "JPEG, Photoshop data cut short": (lambda: with_segment(0xED, b"Photoshop 3.0\x008BIM\x04"), None, ""),
    "JPEG, an empty segment": (lambda: with_segment(0xE1, b""), None, ""),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO|Invalid APNG|Corrupt EXIF|Truncated File Read")
@pytest.mark.parametrize("name", METADATA)
def test_pixels_that_decode_are_read_whatever_the_metadata_and_what_is_left_out_is_said(name):
    make, shown, said = METADATA[name]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        image = load_image(make())
    if shown is not None:
        np.testing.assert_array_equal(np.asarray(image), shown)
    assert image.size == ((20, 31) if "turned" in name else (31, 20))
    ours = [str(one.message) for one in heard if str(one.message).startswith("image: ")]
    assert any(said in text for text in ours) if said else True
    # Read again it is not turned again.
    assert load_image(image).tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pixels_that_are_cut_stay_an_error_beside_broken_metadata(kind):
    data = encoded(kind, exif=GARBAGE)
    with pytest.raises(ValueError, match="truncated"):
        load_image(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "PA", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa"])
def test_every_mode_of_pillow_is_read(mode):
    picture = Image.fromarray(np.full((2, 3, 4), 255, np.uint8))
    via = {"La": "LA", "LAB": "RGB", "PA": "P", "HSV": "RGB"}.get(mode)
    held = (
        Image.new(mode, (3, 2)) if mode in ("LAB", "PA") else (picture.convert(via) if via else picture).convert(mode)
    )
    assert load_image(held).mode in ("RGB", "RGBA") and load_image(held).size == (3, 2)
