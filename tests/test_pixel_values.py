"""Pictures to pixel_values against Pillow and Hugging Face's image processor, bit for bit; files to pictures."""

import io
import sys
import threading
import time
import types
from contextlib import contextmanager
from importlib.machinery import ModuleSpec

import numpy as np
import PIL
import pytest
import torch
import transformers
from PIL import Image, ImageDraw, ImageOps
from test_collage import noise

from hide.images import decode
from hide.models.qwen2_5_vl import token_grid
from hide_kernels import native, pixel_values, resize
from hide_kernels.pixel_values import compiled, taps

needs_extension = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
backends = pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_extension), "pillow"])

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
NORMALISE = {"mean": MEAN, "std": STD}


def writing(height, width):
    """Hard edges: black letters and red lines on white."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for y in range(0, height, 13):
        draw.text((y % 7, y), "The quick brown fox jumps over the lazy dog 0123456789", fill="black")
        draw.line((0, y, width, height - y), fill=(255, 0, 0))
    return torch.from_numpy(np.array(image))


def by_pillow(image, size):
    return torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)))


SIZES = [
    # Both smaller, both larger, one each way.
    ((97, 131), (41, 60)), ((41, 60), (97, 131)), ((97, 131), (41, 150)), ((97, 131), (150, 41)),
    # One dimension unchanged, none changed.
    ((97, 131), (97, 40)), ((97, 131), (40, 131)), ((97, 131), (97, 131)),
    # By one pixel, and where Pillow 13 changes the order.
    ((97, 131), (96, 132)), ((97, 131), (91, 128)), ((97, 131), (90, 128)), ((97, 131), (98, 130)),
    # 1 to 200 and back; one pixel.
    ((3, 600), (2, 3)), ((600, 3), (3, 2)), ((3, 2), (600, 3)), ((2, 3), (3, 600)), ((1, 1), (28, 57)), ((61, 45), (1, 1)),
    ((200, 1), (1, 200)),
]  # fmt: skip


@needs_extension
@pytest.mark.parametrize("before, after", SIZES)
def test_resized_pixels_are_pillows(before, after):
    for image in (noise(*before, 3), writing(*before), (noise(*before, 3) > 127).byte() * 255):
        got = resize(image, after, backend="cpp")
        assert torch.equal(got, by_pillow(image, after))
        assert got.data_ptr() != image.data_ptr()


@needs_extension
def test_a_large_picture_of_odd_size_is_pillows():
    image = noise(1411, 1447, 3)
    for size in ((1400, 1456), (300, 1999), (1411, 77)):
        assert torch.equal(resize(image, size, backend="cpp"), by_pillow(image, size))


def test_the_order_of_the_axes_is_the_installed_pillows_and_until_12_never_the_rows_first(monkeypatch):
    sizes = [
        ((60, 60), (30, 90)),
        ((60, 60), (59, 61)),
        ((100, 100), (79, 90)),
        ((100, 100), (80, 90)),
        ((60, 60), (30, 45)),
    ]
    monkeypatch.setattr(PIL, "__version__", "13.0.0")
    assert [taps.rows_first(*pair) for pair in sizes] == [True, True, True, False, False]
    monkeypatch.setattr(PIL, "__version__", "12.3.0")
    assert not any(taps.rows_first(*pair) for pair in sizes)


def test_weights_are_whole_numbers_that_add_up_to_one():
    for sources, targets in ((7, 7), (5, 200), (200, 5), (1000, 1), (1, 1000), (1446, 1456)):
        first, count, *weights = taps.taps(sources, targets)
        assert (first >= 0).all() and (first + count <= sources).all() and (count > 0).all()
        assert np.abs(np.sum(weights, axis=0) - (1 << 22)).max() <= len(weights)


@backends
def test_transparency_is_white_and_any_strides_are_read(backend):
    image = noise(50, 61, 4)
    image[:9, :, 3], image[9:20, :, 3] = 0, 255
    picture = Image.fromarray(image.numpy())
    canvas = Image.new("RGB", picture.size, (255, 255, 255))
    canvas.paste(picture, mask=picture.getchannel("A"))
    over_white = torch.from_numpy(np.array(canvas))
    planar = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = noise(100, 124, 5)[::2, 1:123:2, 1:].copy_(image)
    for size in ((28, 56), (28, 61), (56, 61), (84, 61), (50, 28), (50, 61), (20, 80)):
        want = by_pillow(over_white, size)
        for source in (image, planar, wide, over_white.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
            assert torch.equal(resize(source, size, backend=backend), want)
    for size in ((28, 56), (56, 28), (56, 56)):
        values = [pixel_values(x, [size], **NORMALISE, backend=backend) for x in (over_white, image, planar, wide)]
        assert all(torch.equal(values[0], other) for other in values)


def processor(**settings):
    made = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    return made(**settings)


def processed(image, min_tokens, max_tokens, **settings):
    """`pixel_values` of Hugging Face's processor, and the size that it resizes to."""
    cell = settings.get("patch_size", 14) * settings.get("merge_size", 2)
    size = {"shortest_edge": min_tokens * cell**2, "longest_edge": max_tokens * cell**2}
    batch = processor(**settings)(images=[Image.fromarray(image.numpy())], size=size, return_tensors="pt")
    _, rows, columns = batch["image_grid_thw"][0].tolist()
    patch = settings.get("patch_size", 14)
    return batch["pixel_values"], (rows * patch, columns * patch)


@backends
@pytest.mark.parametrize("height, width", [(333, 517), (517, 200), (57, 2001), (84, 112), (1100, 301)])
def test_pixel_values_are_hugging_faces(backend, height, width):
    image = writing(height, width)
    want, size = processed(image, 4, 100)
    assert torch.equal(pixel_values(image, [size], **NORMALISE, backend=backend), want)


@backends
@pytest.mark.parametrize("height, width, min_tokens", [(60, 90, 25), (200, 33, 40), (29, 31, 7), (120, 119, 2)])
def test_a_picture_resized_by_the_loader_and_by_the_processor_is_the_same(backend, height, width, min_tokens):
    image = noise(height, width, 3)
    rows, columns = token_grid(height, width, 28, 4, 100)
    loaded = by_pillow(image, (rows * 28, columns * 28))
    want, size = processed(loaded, min_tokens, 100)
    assert (size == loaded.shape[:2]) == (min_tokens == 2)
    got = pixel_values(image, [(rows * 28, columns * 28), size], **NORMALISE, backend=backend)
    assert torch.equal(got, want)


@backends
def test_other_patches_and_other_normalisation_are_hugging_faces(backend):
    image = noise(130, 211, 3)
    settings = {"patch_size": 6, "merge_size": 3, "temporal_patch_size": 1}
    settings |= {"image_mean": [0.5, 0.1, -2.0], "image_std": [0.5, 3.0, 1.0]}
    want, size = processed(image, 4, 60, **settings)
    got = pixel_values(
        image, [size], mean=(0.5, 0.1, -2.0), std=(0.5, 3.0, 1), patch=6, merge=3, temporal=1, backend=backend
    )
    assert torch.equal(got, want)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_the_rounded_float32_ones(backend, dtype):
    image = noise(64, 91, 3)
    want = pixel_values(image, [(56, 84)], **NORMALISE)
    got = pixel_values(image, [(56, 84)], **NORMALISE, dtype=dtype, backend=backend)
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))


@needs_extension
def test_a_resize_takes_a_launch_for_each_axis_and_the_last_writes_the_patches(monkeypatch):
    launches = []
    real = native.launch
    monkeypatch.setattr(native, "launch", lambda kernel, *rest: (launches.append(kernel), real(kernel, *rest)))
    image = noise(97, 131, 3)
    for sizes, number in (([(84, 112)], 2), ([(84, 112), (112, 140)], 4), ([(112, 112), (112, 112)], 2)):
        launches.clear()
        pixel_values(image, sizes, **NORMALISE, backend="cpp")
        assert launches == ["resize"] * (number - 1) + ["resize_to_patches_32"]
    launches.clear()
    pixel_values(noise(56, 84, 3), [(56, 84)], **NORMALISE, backend="cpp")
    assert launches == ["resize_to_patches_32"]


def test_a_device_reads_a_picture_of_any_layout_without_a_pass_for_it(monkeypatch):
    monkeypatch.setattr(PIL, "__version__", "13.0.0")
    axes = [one.axis for one in compiled.plan((100, 50), [(56, 56)], any_layout=True)]
    assert axes == [taps.ROWS, taps.COLUMNS]
    axes = [one.axis for one in compiled.plan((100, 50), [(56, 56)], any_layout=False)]
    assert axes == [taps.COLUMNS, taps.ROWS, taps.COLUMNS]


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"image": np.zeros((9, 9, 3))}, TypeError, "image: got ndarray"),
        ({"image": torch.zeros(9, 9, 3)}, TypeError, "image: got dtype torch.float32, want uint8"),
        ({"image": torch.zeros(3, 9, 9, dtype=torch.uint8)}, ValueError, r"image: got shape \(3, 9, 9\)"),
        ({"image": torch.zeros(1, 1 << 21, 3, dtype=torch.uint8)}, ValueError, "image: .*want at most 1048576 pixels"),
        ({"sizes": (28, 28)}, TypeError, r"sizes\[0\]: got 28, want \(height, width\) as ints"),
        ({"sizes": 28}, TypeError, "sizes: got int, want one or two"),
        ({"sizes": []}, ValueError, "sizes: got 0, want one or two"),
        ({"sizes": [(28, 28)] * 3}, ValueError, "sizes: got 3, want one or two"),
        ({"sizes": [(0, 28)]}, ValueError, r"sizes\[0\]: got \(0, 28\)"),
        ({"sizes": [(28, 28), (28, 42)]}, ValueError, r"got \(28, 42\) last, want multiples of patch \* merge = 28"),
        ({"sizes": [(28, 28 << 20)]}, ValueError, r"sizes\[0\]: got \(28, 29360128\), want at most 1048576"),
        ({"mean": [0.5, 0.5]}, TypeError, r"mean: got \[0.5, 0.5\], want three floats"),
        ({"mean": [0.5, 0.5, float("nan")]}, ValueError, "mean: .*want finite numbers"),
        ({"std": [1, 0, 1]}, ValueError, "std: .*want no zero"),
        ({"patch": 14.0}, TypeError, "patch: got float, want an int"),
        ({"temporal": 0}, ValueError, "temporal: got 0, want 1 to 256"),
        ({"dtype": torch.float64}, TypeError, "dtype: got torch.float64"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot serve this call of pixel_values: image is on cpu"),
    ],
)
def test_a_wrong_argument_is_named(change, error, text):
    arguments = {"image": noise(9, 9, 3), "sizes": [(28, 28)], **NORMALISE, **change}
    with pytest.raises(error, match=text):
        pixel_values(**arguments)


def test_a_wrong_size_of_a_resize_is_named():
    with pytest.raises(ValueError, match=r"size: got \(0, 5\)"):
        resize(noise(9, 9, 3), (0, 5))


# Files


def stored(image, kind="JPEG", orientation=None, **options):
    buffer = io.BytesIO()
    exif = image.getexif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def photo(mode="RGB"):
    return Image.fromarray(writing(37, 90).numpy()).convert(mode)


class Codec(types.ModuleType):
    """Stands for nvidia.nvimgcodec: decodes with Pillow, one level brighter, and remembers how it was asked."""

    def __init__(self):
        super().__init__("nvidia.nvimgcodec")
        self.__spec__ = ModuleSpec("nvidia.nvimgcodec", None)
        self.made, self.asked, self.serves = [], [], True

    def DecodeParams(self, **settings):
        return settings

    def Decoder(self, **settings):
        self.made.append(settings)
        return self

    def decode(self, data, params, cuda_stream):
        self.asked.append((params, cuda_stream))
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        return torch.from_numpy(np.array(image) // 2) if self.serves else None


@pytest.fixture
def codec(monkeypatch):
    fake = Codec()
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=77 + index))
    module = sys.modules["hide.images.decode"]
    module._nvimgcodec_decoder.cache_clear()
    # What Pillow decodes stays on the host: there may be no device.
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *a, **k: tensor)
    yield fake
    module._nvimgcodec_decoder.cache_clear()


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_is_turned_upright_and_read_as_pillow_reads_it(kind, orientation, tmp_path):
    data = stored(photo(), kind, orientation)
    want = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        np.testing.assert_array_equal(decode(source).numpy(), want)


@pytest.mark.parametrize("mode, channels", [("L", 3), ("P", 3), ("1", 3), ("RGBA", 4), ("LA", 4)])
def test_any_8_bit_picture_becomes_rgb_and_keeps_its_transparency(mode, channels):
    got = decode(stored(photo(mode), "PNG"))
    np.testing.assert_array_equal(got.numpy(), np.array(photo(mode).convert("RGBA" if channels == 4 else "RGB")))


def test_a_jpeg_for_a_device_is_decoded_there_upright_with_interpolated_chroma(codec):
    for orientation in (1, 6):
        data = stored(photo(), orientation=orientation)
        want = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) // 2
        for decoder in (None, "nvimgcodec"):
            np.testing.assert_array_equal(decode(data, device="cuda:1", decoder=decoder).numpy(), want)
    assert codec.made == [{"device_id": 1, "options": ":fancy_upsampling=1"}]
    assert codec.asked == [({"apply_exif_orientation": True}, 78)] * 4


@pytest.mark.parametrize(
    "data, device, reason",
    [
        (stored(photo()), "cpu", "device is cpu, want a CUDA device"),
        (stored(photo(), "PNG"), "cuda:0", "the file is PNG, want a JPEG"),
        (stored(photo("CMYK")), "cuda:0", "the JPEG is CMYK, want grey or RGB"),
    ],
)
def test_what_nvimgcodec_is_not_for_goes_to_pillow_unless_it_was_asked_for(codec, data, device, reason):
    want = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data, device=device).numpy(), want)
    with pytest.raises(ValueError, match=f"decoder 'nvimgcodec' cannot serve this call: {reason}"):
        decode(data, device=device, decoder="nvimgcodec")
    assert not codec.asked


def test_a_file_that_nvimgcodec_gives_up_on_goes_to_pillow_unless_it_was_asked_for(codec):
    codec.serves = False
    data = stored(photo())
    np.testing.assert_array_equal(decode(data, device="cuda:0").numpy(), np.array(Image.open(io.BytesIO(data))))
    with pytest.raises(ValueError, match="it does not decode this file"):
        decode(data, device="cuda:0", decoder="nvimgcodec")


def test_pillow_is_used_where_it_was_asked_for_and_where_nvimgcodec_is_missing(codec, monkeypatch):
    data = stored(photo())
    want = np.array(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data, device="cuda:0", decoder="pillow").numpy(), want)
    monkeypatch.setattr(sys.modules["hide.images.decode"], "_installed", lambda: False)
    np.testing.assert_array_equal(decode(data, device="cuda:0").numpy(), want)
    with pytest.raises(ValueError, match=r"nvidia\.nvimgcodec is not installed"):
        decode(data, device="cuda:0", decoder="nvimgcodec")
    assert not codec.asked


def test_one_thread_decodes_at_a_time(codec):
    inside, most, real = [], [], codec.decode

    def slow(*arguments, **settings):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.003)
        result = real(*arguments, **settings)
        inside.pop()
        return result

    codec.decode = slow
    data = stored(photo())
    threads = [threading.Thread(target=decode, args=(data,), kwargs={"device": "cuda:0"}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a file"):
        decode(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="source: the bytes cannot be read as a picture"):
        decode(b"no picture")
    with pytest.raises(ValueError, match="source: the bytes cannot be read as a picture: .*truncated"):
        decode(stored(photo())[:700])
    with pytest.raises(ValueError, match="source: got mode I;16, want at most 8 bits per channel"):
        decode(stored(Image.fromarray(np.zeros((4, 5), np.uint16)), "PNG"))
    with pytest.raises(TypeError, match="source: got ndarray, want a path or bytes"):
        decode(np.zeros(4))
    with pytest.raises(ValueError, match="decoder: got 'gimp', want None or one of"):
        decode(b"", decoder="gimp")


def test_what_a_device_says_is_not_said_of_the_file(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("the device is full")

    data = stored(photo("RGB"), "PNG")
    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
        decode(data, device="cuda:0")


def test_tables_are_pinned_once_for_each_device_and_under_it(monkeypatch):
    """Under the current device PyTorch would make a context there, for tensors that lie on another."""
    entered, under = [], []

    @contextmanager
    def device(chosen):
        entered.append(chosen)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (under.append(entered[-1]), tensor)[1])
    passes = compiled.plan((300, 517), [(140, 224)], any_layout=True)
    compiled._packed.cache_clear()
    for index in (1, 0, 1, 1):
        compiled._packed(passes, (), (), torch.float32, torch.device("cuda", index))
    compiled._packed(passes, (), (), torch.float32, None)
    compiled._packed.cache_clear()
    assert under == [torch.device("cuda", 1), torch.device("cuda", 0)]
