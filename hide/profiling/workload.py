"""What a flow is run on: pictures of zeros, as a family preprocesses them, and prompts made of ids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from hide.models.base import Adapter
from hide.models.inputs import ImageInput, ImageInputs
from hide.models.prompts import Turn
from hide.models.qwen2_5_vl import Qwen25VL, token_grid

# Beyond it, values of positions and windows are too many for a prediction to keep.
MAX_TOKENS = 131_072
# Before the picture: the system's turn and what opens the user's; Qwen's own has 15 tokens.
HEAD_TOKENS = 15
# Any id of the vocabulary's words.
WORD = 100
# Pixels along one side of a token in most families.
CELL = 28


class TooManyTokensError(ValueError):
    """A workload that the model, or a prediction, does not take."""


@dataclass(frozen=True)
class Workload:
    """Sizes of a question about one picture.

    image: tokens of a square picture, or (height, width) in pixels. view: what is looked at of it, at most so many
    tokens; `None`: all. collage: at most so many tokens, and no more than what is looked at. text: tokens of the text
    behind the pictures, all of which are rows of the search prompt. chunk: tokens that go through the decoder at once
    in a session. layer: whose rows are wanted; `None`: the middle one. offload: a session keeps keys and values on the
    host.
    """

    image: int | tuple[int, int]
    view: int | None = None
    collage: int = 1024
    text: int = 30
    chunk: int = 2048
    layer: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        sides = self.image if isinstance(self.image, tuple) else (self.image,)
        if min(sides) < 1:
            raise ValueError(f"image: got {self.image}, want at least 1 token, or pixels")
        for name in ("view", "collage", "text", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, want at least 1 token")

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the picture."""
        if isinstance(self.image, tuple):
            return self.image
        side = math.isqrt(self.image) * CELL
        return side, side


@dataclass(frozen=True)
class Scene:
    """A workload's tensors. search, answer: (1, L) ids. prefix: how many of both are the same, picture included."""

    image: ImageInputs
    collage: ImageInputs
    search: Turn
    answer: Tensor
    prefix: int


def scene(adapter: Adapter, work: Workload) -> Scene:
    """Pictures and prompts of a workload, on the model's device.

    Raises `TooManyTokensError` for more than the model, or a prediction, can take.
    """
    image = picture_of(adapter, work.image, work.view)
    tokens = image.tokens
    collage = _square(adapter, min(work.collage, tokens))
    most = min(MAX_TOKENS, adapter.model.config.get_text_config().max_position_embeddings)
    total = HEAD_TOKENS + tokens + collage.tokens + work.text + 2
    if total > most:
        raise TooManyTokensError(
            f"image: its {tokens:,} tokens, {collage.tokens:,} of the collage and the text are {total:,}; the model "
            f"takes {most:,}; choose a smaller --tokens or --image"
        )
    device = adapter.model.device
    # A word stands between the pictures, as the tokens of their ends and beginnings do.
    head = [WORD] * HEAD_TOKENS + [adapter.image_token] * tokens + [WORD]
    search = torch.tensor([head + [WORD] * work.text], device=device)
    answer = torch.tensor([[*head, *[adapter.image_token] * collage.tokens, *[WORD] * (work.text + 1)]], device=device)
    images = ImageInputs((image,))
    rows = range(len(head), search.shape[1])
    prompt = Turn(
        search, adapter.image_tokens(search, images), len(head), ("",) * work.text, rows, ((0, 1),) * work.text, False
    )
    return Scene(images, ImageInputs((collage,)), prompt, answer, len(head))


def picture_of(adapter: Adapter, image: int | tuple[int, int], view: int | None = None) -> ImageInput:
    """The picture of a workload, in at most `view` tokens: the largest square one of so many tokens at most, or one of
    that many pixels."""
    most = 2 * MAX_TOKENS if view is None else view
    if isinstance(image, tuple):
        return blank(adapter, *image, max_tokens=most)
    return _square(adapter, image, most)


def _square(adapter: Adapter, tokens: int, most: int = 2 * MAX_TOKENS) -> ImageInput:
    """The largest square picture of at most so many tokens, shrunk to `most`, or the smallest one of a family whose
    tiles have more."""
    side = math.isqrt(tokens) * (_cell(adapter) or CELL)
    try:
        return blank(adapter, side, side, max_tokens=min(tokens, most))
    except ValueError:
        return blank(adapter, CELL, CELL, max_tokens=2 * MAX_TOKENS)


def blank(adapter: Adapter, height: int, width: int, *, max_tokens: int) -> ImageInput:
    """What `adapter.preprocess` makes of a black picture of that size; without its work where the family is Qwen's.

    Raises `ValueError` for pictures that the family refuses.
    """
    cell = _cell(adapter)
    if cell is None:
        picture = Image.new("RGB", (width, height))
        return adapter.preprocess([picture], min_tokens=1, max_tokens=max_tokens).items[0]
    vision = adapter.model.config.vision_config
    rows, columns = token_grid(height, width, cell, 1, max_tokens)
    merge = vision.spatial_merge_size
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    dtype = adapter.dtype if adapter.dtype.itemsize == 2 else torch.float32
    pixels = torch.zeros(rows * columns * merge**2, channels, dtype=dtype, device=adapter.model.device)
    return ImageInput(pixels, (1, rows * merge, columns * merge), (rows, columns), rows * columns)


def _cell(adapter: Adapter) -> int | None:
    """Pixels along a token, where the family takes pictures of any size in one piece."""
    if not isinstance(adapter, Qwen25VL):
        return None
    vision = adapter.model.config.vision_config
    return vision.patch_size * vision.spatial_merge_size
