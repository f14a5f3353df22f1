"""Any picture that a user may hold -> a Pillow image in RGB or RGBA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


def load_image(image: ImageLike) -> Image.Image:
    """Read or convert a picture.

    Args:
        image: a path; a Pillow image; a NumPy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a torch tensor of
            one of these shapes or (1, H, W), (3, H, W), (4, H, W). Arrays are uint8 in 0..255 or float in 0..1.

    Returns:
        RGBA where the picture has transparency, RGB otherwise, turned upright if its EXIF data says how it was held
        (published HiDe does not turn it). The first frame of an animation. 16-bit grey is scaled to 8 bits, without the
        colour that a PNG may mark as transparent. Floats are taken as 0..1 if they lie there and as 0..255 otherwise.

    Raises:
        FileNotFoundError, ValueError, TypeError: naming the picture and what is wrong with it.
    """
    if isinstance(image, (str, Path)):
        return _open(Path(image))
    if isinstance(image, Image.Image):
        with _named("the Pillow image"):
            return _to_rgb(image)
    if isinstance(image, Tensor):
        with _named("the tensor"):
            array = image.detach().cpu()
            if array.dim() == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
                array = array.permute(1, 2, 0)
            values = (array.float() if array.is_floating_point() else array).numpy()
        return _from_array(values)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise TypeError(f"image: got {type(image).__name__}, want a path, a Pillow image, a NumPy array or a torch tensor")


def _open(path: Path) -> Image.Image:
    with _named(str(path)), warnings.catch_warnings():
        if not path.is_file():
            raise FileNotFoundError(f"image: {path} is not a file")
        # Pillow warns at half the size that it refuses; a picture that it accepts is not news.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as opened:
            return _to_rgb(opened)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Inside, whatever goes wrong becomes a `ValueError` that names the picture; a missing file stays one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"image: {what} is larger than the limit against decompression bombs ({error}); "
            "raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    # Decoders raise what they come across: OSError, SyntaxError, RuntimeError, NotImplementedError, struct.error.
    except Exception as error:
        raise ValueError(f"image: {what} cannot be read as a picture: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels, want at least one")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        if image.mode != "F":
            values = values / 257
        elif values.min() >= 0 and values.max() <= 1:
            values = values * 255
        return Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        # Pillow knows the way to RGBA from here on only.
        image = image.convert("LA")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"image: got an array of shape {array.shape}, want (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError("image: got floats that are not all in 0..1; scale them, or pass uint8 in 0..255")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        raise TypeError(f"image: got an array of {array.dtype}, want uint8 in 0..255 or float in 0..1")
    if array.shape[2] == 1:
        array = array.repeat(3, axis=2)
    return Image.fromarray(np.ascontiguousarray(array))


def on_colour(image: Image.Image, fill: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """RGB: a transparent picture laid over a colour (white is what Qwen's own loader does); others as they are."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, fill)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def to_tensor(image: Image.Image, device: torch.device | str = "cpu") -> Tensor:
    """(H, W, 3 or 4) uint8; a GPU copies it from pinned memory while the host goes on."""
    pixels = torch.from_numpy(np.array(image))
    return pixels if torch.device(device).type == "cpu" else pixels.pin_memory().to(device, non_blocking=True)


def to_image(image: Tensor | Image.Image) -> Image.Image:
    """A Pillow image of (H, W, 3 or 4) uint8; one that is one already as it is."""
    return Image.fromarray(image.cpu().numpy()) if isinstance(image, Tensor) else image
