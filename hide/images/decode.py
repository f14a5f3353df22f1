"""Files to pictures: Pillow, or nvImageCodec where a JPEG is wanted on a CUDA device."""

from __future__ import annotations

import functools
import importlib
import io
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

DECODERS = ("pillow", "nvimgcodec")
# What Pillow calls a JPEG; MPO is one with further pictures behind the first.
JPEG_FORMATS = ("JPEG", "MPO")
# Chroma interpolated as libjpeg-turbo, and so Pillow, does it; nvImageCodec's default repeats it.
OPTIONS = ":fancy_upsampling=1"

_one_at_a_time = threading.Lock()


def decode(source: str | Path | bytes, *, device: torch.device | str = "cpu", decoder: str | None = None) -> Tensor:
    """Read a picture, turned upright if its EXIF data says how it was held.

    Pillow decodes on the CPU. nvImageCodec (`nvidia.nvimgcodec`, which comes with cuCIM) decodes JPEGs on a CUDA
    device; two decoders of JPEG may differ by a few levels, and these do. Neither applies a colour profile.

    Args:
        source: a path, or the file's bytes.
        device: where the picture goes.
        decoder: "pillow" or "nvimgcodec" is used or refused; `None` picks nvImageCodec where it can serve the call and
            decodes the file, and Pillow otherwise.

    Returns:
        (H, W, 3) uint8 on `device`, or (H, W, 4) with alpha for a file with transparency. The first frame of an
        animation.

    Raises:
        TypeError, ValueError, FileNotFoundError: naming the argument, what came and what was wanted.
    """
    if not isinstance(source, (str, Path, bytes)):
        raise TypeError(f"source: got {type(source).__name__}, want a path or bytes")
    if decoder is not None and decoder not in DECODERS:
        raise ValueError(f"decoder: got {decoder!r}, want None or one of {list(DECODERS)}")
    target = torch.device(device)
    data = source if isinstance(source, bytes) else _read(Path(source))
    name = "the bytes" if isinstance(source, bytes) else str(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns at half the size that it refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
        if decoder != "pillow":
            reason = _refused(picture, target)
            decoded = None if reason else _by_nvimgcodec(data, target)
            if decoded is not None:
                return decoded
            if decoder is not None:
                reason = reason or "it does not decode this file"
                raise ValueError(f"decoder 'nvimgcodec' cannot serve this call: {reason}")
        pixels = _by_pillow(picture)
    except ValueError:
        raise
    # Pillow's decoders raise what they come across: OSError, SyntaxError, RuntimeError, struct.error.
    except Exception as error:
        raise ValueError(f"source: {name} cannot be read as a picture: {error}") from error
    # What the device says of it is not about the file.
    return torch.from_numpy(pixels).to(target)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"source: {path} is not a file")
    return path.read_bytes()


def _by_pillow(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"source: got mode {picture.mode}, want at most 8 bits per channel")
    upright = ImageOps.exif_transpose(picture)
    return np.array(upright.convert("RGBA" if upright.has_transparency_data else "RGB"))


def _refused(picture: Image.Image, device: torch.device) -> str | None:
    """Why nvImageCodec cannot decode a picture onto a device, or `None`."""
    if device.type != "cuda":
        return f"device is {device}, want a CUDA device"
    if picture.format not in JPEG_FORMATS:
        return f"the file is {picture.format}, want a JPEG"
    # It gives other colours than Pillow for CMYK.
    if picture.mode not in ("L", "RGB"):
        return f"the JPEG is {picture.mode}, want grey or RGB"
    return None if _installed() else "nvidia.nvimgcodec is not installed"


def _installed() -> bool:
    try:
        return find_spec("nvidia.nvimgcodec") is not None
    except ModuleNotFoundError:
        return False


def _by_nvimgcodec(data: bytes, device: torch.device) -> Tensor | None:
    """(H, W, 3) on the device, or `None` where the file is not decoded."""
    codec = importlib.import_module("nvidia.nvimgcodec")
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    # By default grey becomes RGB; the orientation is asked for by name all the same.
    params = codec.DecodeParams(apply_exif_orientation=True)
    # nvJPEG's states serve one thread at a time.
    with _one_at_a_time:
        image = _nvimgcodec_decoder(index).decode(data, params=params, cuda_stream=stream)
    return None if image is None else torch.from_dlpack(image)


@functools.cache
def _nvimgcodec_decoder(index: int) -> Any:
    return importlib.import_module("nvidia.nvimgcodec").Decoder(device_id=index, options=OPTIONS)
