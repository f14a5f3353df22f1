"""Any picture that a user may hold -> a Pillow image in RGB or RGBA."""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import IO
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from hide_kernels.pinned import pinned

ImageLike = str | PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray | Tensor

# A path loses one of two slashes; one letter before the colon is a drive.
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What integers of more than 8 bits may hold; cameras and scanners fill 10, 12 or 14 of 16.
_BITS = (8, 10, 12, 14, 16, 24, 31, 32)


class PictureWarning(UserWarning):
    """Says what was left out of a picture or guessed about it; results and commands have it as a note."""


_notes: ContextVar[list[str] | None] = ContextVar("picture_notes", default=None)


@contextmanager
def picture_notes() -> Iterator[list[str]]:
    """Inside, what would be a `PictureWarning` of this thread is added to the list, for the notes of a result."""
    found: list[str] = []
    before = _notes.set(found)
    try:
        yield found
    finally:
        _notes.reset(before)


def load_image(image: ImageLike) -> Image.Image:
    """Read or convert a picture.

    Args:
        image: a path; a data URI; the bytes of a file, or a file opened for reading them; a Pillow image; a NumPy array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a torch tensor of one of these shapes or (1, H, W), (3, H, W),
            (4, H, W). Arrays hold uint8, booleans, other integers or floats. URLs are not read.

    Returns:
        RGBA where the picture has transparency, RGB otherwise, turned upright if its EXIF data says how it was held
        (published HiDe does not turn it). The first frame of an animation. Grey of more than 8 bits loses the colour
        that a PNG may mark as transparent.

        Metadata never keeps out pixels that decode: EXIF data, texts and colour profiles that are broken or too large
        are left out, with a `PictureWarning`.

        Values that are not of 8 bits are scaled by the first rule that holds all of them, with a warning wherever that
        is a guess. Integers from 0 on: as numbers of 8, 10, 12, 14, 16, 24, 31 or 32 bits, whichever is the first to
        hold the largest. Floats: as 0..1 (up to 0.25 below and 1 above is cut off), as -1..1 (half a unit more is), as
        0..255, as integers. All others: from the smallest to the largest. NaN is black. Of colour of 16 bits in a file
        the upper 8 are read, with a warning where no value needs the highest.

    Raises:
        FileNotFoundError, ValueError, TypeError: naming the picture and what is wrong with it.
    """
    if isinstance(image, (str, PathLike)):
        name = str(image)
        if name.lstrip()[:5].lower() == "data:":
            return from_base64(name)
        if _URL.match(name):
            raise ValueError(f"image: got the URL {_short(name)}, and URLs are not read; download it and pass the file")
        return _open(Path(image), _short(name) or "the empty text")
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _open(bytes(image), "the bytes")
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
    if hasattr(image, "read"):
        with _named("the file object"):
            data = image.read()
            if not isinstance(data, bytes):
                raise TypeError(f"it reads {type(data).__name__}; open it with mode 'rb'")
        return _open(data, "the file object")
    raise TypeError(
        f"image: got {type(image).__name__}, want a path, a data URI, bytes, a file opened for reading bytes, a Pillow "
        "image, a NumPy array or a torch tensor"
    )


def from_base64(text: str | bytes) -> Image.Image:
    """The picture of a data URI, or of base64 alone, as `load_image` reads it; raises as `base64_bytes` too."""
    return _open(base64_bytes(text), _base64_name(text))


def base64_bytes(text: str | bytes) -> bytes:
    """The file in a data URI or in base64 alone.

    Args:
        text: `data:image/png;base64,...`, of whatever type it says, also with percent-encoding; or base64. Blanks and
            line breaks are skipped, the letters `-` and `_` of URLs taken, and missing padding is added.

    Raises:
        TypeError, ValueError: for what is no base64.
    """
    name = _base64_name(text)
    if isinstance(text, bytes):
        text = text.decode("ascii", errors="replace")
    if not isinstance(text, str):
        raise TypeError(f"image: got {type(text).__name__}, want text in base64 or a data URI")
    body, encoded, is_uri = text.strip(), True, name == "the data URI"
    with _named(name):
        if is_uri:
            header, comma, body = body.partition(",")
            if not comma:
                raise ValueError(f"it has no comma before its data, it starts with {_short(text)!r}")
            encoded = header.lower().rstrip().endswith(";base64")
        data = unquote_to_bytes(body) if is_uri else body.encode()
        if encoded:
            data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
            try:
                data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
            except binascii.Error as error:
                raise ValueError(f"it is not base64 ({error}), it starts with {_short(text)!r}") from None
    return data


def _base64_name(text: object) -> str:
    start = text.lstrip()[:5].lower() if isinstance(text, (str, bytes)) else ""
    return "the data URI" if start in ("data:", b"data:") else "the base64 text"


def _open(source: Path | bytes, name: str) -> Image.Image:
    with _named(name), warnings.catch_warnings():
        if isinstance(source, Path) and not source.is_file():
            raise FileNotFoundError(f"image: {name} is not a file")
        if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
            raise ValueError("it is empty")
        # Pillow warns at half the size that it refuses; a picture that it accepts is not news.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                return _to_rgb(opened)
        except Image.DecompressionBombError:
            raise
        except Exception as error:
            bare = _without_metadata(source if isinstance(source, bytes) else source.read_bytes())
            if bare is None:
                raise
            try:
                with Image.open(io.BytesIO(bare)) as opened:
                    picture = _to_rgb(opened)
            except Exception:
                raise error from None
            why = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
            _warn(f"the metadata of {name} is left out{why}")
            return picture


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG or JPEG with its pixels and EXIF data and nothing else; `None` for what is neither."""
    kept = []
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        place = 8
        # What is transparent takes so many bytes, by the kind of colour.
        fewest = {b"\0": 2, b"\2": 6}.get(data[25:26], 1)
        while place + 12 <= len(data):
            (length,) = struct.unpack(">I", data[place : place + 4])
            name = data[place + 4 : place + 8]
            if name in (b"IHDR", b"PLTE", b"eXIf", b"IDAT", b"IEND") or (name == b"tRNS" and length >= fewest):
                kept.append(data[place : place + 12 + length])
            place += 12 + length
        return data[:8] + b"".join(kept)
    if data[:2] == b"\xff\xd8":
        place = 2
        # Segments up to the first scan; of those of applications JFIF, EXIF and Adobe's say how to read the pixels.
        while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] not in (b"\xda", b""):
            length = int.from_bytes(data[place + 2 : place + 4], "big")
            kind, segment = data[place + 1], data[place : place + 2 + length]
            whole = kind in (0xE0, 0xEE) and length >= 14  # Adobe's has 14 bytes, JFIF's 16
            if not (0xE0 <= kind <= 0xEF or kind == 0xFE) or whole or segment[4:10] == b"Exif\0\0":
                kept.append(segment)
            place += 2 + length
        return data[:2] + b"".join(kept) + data[place:]
    return None


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
        why: object = getattr(error, "strerror", None) or error or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # Pillow says where its object is in memory
            why = "cannot identify its format"
        raise ValueError(f"image: {what} cannot be read as a picture: {why}") from error


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def _warn(text: str) -> None:
    notes = _notes.get()
    if notes is None:
        warnings.warn(f"image: {text}", PictureWarning, stacklevel=2)
    else:
        notes.append(f"image: {text}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels, want at least one")
    deep_colour = image.mode in ("LA", "RGB", "RGBA") and any(
        ";16" in str(tile[3]) for tile in getattr(image, "tile", ())
    )
    image.load()
    if deep_colour:
        _note_dark(image)
    turned = _TURNED.get(_orientation(image))
    profile = image.info.get("icc_profile") if image.mode.startswith("RGB") else None
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
        # Pillow calls what it reads of a 16-bit PNG or TIFF 32 bits in some versions.
        deep = np.asarray(image, dtype=np.float64 if image.mode == "F" else np.int64)
        image = Image.fromarray(_eight_bits(deep, usual_bits=16)).convert("RGB")
    elif image.mode == "La":
        # Pillow knows the way to RGBA from here on only.
        image = image.convert("LA")
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if turned is not None:
        image = image.transpose(turned)
    # The picture must not be turned a second time by who reads this.
    image.info = {"icc_profile": profile} if profile else {}
    return image


def _note_dark(image: Image.Image) -> None:
    """Of colour of 16 bits Pillow reads the upper 8. Says so where these are not used, as with 12 bits in 16."""
    highest = np.asarray(image)[..., : 1 if image.mode == "LA" else 3].max()
    if highest < 128:
        _warn(f"colour of 16 bits is read by its upper 8, of which the largest is {highest} of 255")


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8, as EXIF numbers it; 1 where it does not say."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        if found in range(1, 9):
            return int(found)
        _warn(f"an EXIF orientation of {found!r} is left out")
    except Exception as error:
        _warn(f"EXIF data that cannot be read are left out: {error}")
    return 1


def _eight_bits(values: np.ndarray, usual_bits: int) -> np.ndarray:
    """Integers or floats as uint8, by the rules of `load_image`. usual_bits: what integers hold, if nothing is odd."""
    real = np.isfinite(values)
    if not real.any():
        raise ValueError("it has no finite value")
    low, high = values[real].min(), values[real].max()
    whole = np.issubdtype(values.dtype, np.integer)
    bits = next((bits for bits in _BITS if high < 2**bits), None)
    black, white, guess = float(low), float(high), True
    if not whole and low >= -0.25 and high <= 2:
        black, white, guess = 0.0, 1.0, not -1e-3 <= low <= high <= 1.001
    elif not whole and low >= -1.5 and high <= 2:
        black, white = -1.0, 1.0
    elif low >= 0 and bits:
        black, white, guess = 0.0, 2.0**bits - 1, bits != (usual_bits if whole else 8) and high > 0
    if guess or not real.all():
        _warn(
            f"values of {low:g} to {high:g} are read as {black:g} (black) to {white:g} (white)"
            + ("" if real.all() else ", those that are no numbers as black or white")
        )
    scaled = (values.astype(np.float64) - black) * (255 / (white - black or 1.0))
    return np.nan_to_num(scaled, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"image: got an array of shape {array.shape}, want (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.integer) and not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"image: got an array of {array.dtype}, want uint8 in 0..255, other integers or floats")
    if array.dtype != np.uint8:
        with _named("the array"):
            array = _eight_bits(array, usual_bits=array.dtype.itemsize * 8)
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
    device = torch.device(device)
    return pixels if device.type == "cpu" else pinned(pixels, device).to(device, non_blocking=True)


def to_image(image: Tensor | Image.Image) -> Image.Image:
    """A Pillow image of (H, W, 3 or 4) uint8; one that is one already as it is."""
    return Image.fromarray(image.cpu().numpy()) if isinstance(image, Tensor) else image


def within_aspect(pixels: Tensor, most: int, fill: tuple[int, int, int] | None = (255, 255, 255)) -> Tensor:
    """(H, W, 3 or 4) uint8 pixels of an image so thin that no model takes it, with a margin of `fill` to the right or
    below; `None`: transparent, or black. most: how many times as long as wide it may be."""
    height, width, channels = pixels.shape
    least = -(-max(height, width) // most)
    if min(height, width) >= least:
        return pixels
    colour = (0, 0, 0, 0) if fill is None else (*fill, 255)
    canvas = torch.tensor(colour[:channels], dtype=torch.uint8).repeat(max(height, least), max(width, least), 1)
    canvas = canvas.to(pixels.device)
    canvas[:height, :width] = pixels
    return canvas
