"""What passes between images, a model's vision encoder and its prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


class ImageInput(NamedTuple):
    """One preprocessed image.

    pixels: as the family's vision encoder takes them; empty where only prompts and positions matter. layout: what the
    family must know of it besides: patches, tiles, or the size before resizing. grid: (rows, columns) of its map.
    tokens: how many stand for it in a prompt.
    """

    pixels: Tensor
    layout: tuple[int, ...]
    grid: tuple[int, int]
    tokens: int


@dataclass(frozen=True)
class ImageInputs:
    """Preprocessed images, in the order of the prompt.

    joined: all of them stand in the prompt as one image, their tokens one after another.
    """

    items: tuple[ImageInput, ...]
    joined: bool = False

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each image's map."""
        return tuple(item.grid for item in self.items)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each image."""
        return tuple(item.tokens for item in self.items)

    @property
    def places(self) -> tuple[int, ...]:
        """Tokens of each image that the prompt has a place for."""
        return (sum(self.tokens),) if self.joined else self.tokens

    def __add__(self, other: ImageInputs) -> ImageInputs:
        return replace(self, items=self.items + other.items)

    def without_pixels(self) -> ImageInputs:
        """What prompts and positions need; the pixels of many tokens are larger than their keys and values."""
        return replace(self, items=tuple(item._replace(pixels=item.pixels.new_empty(0)) for item in self.items))


class Features(NamedTuple):
    """What the vision encoder makes of images, in the order of the image tokens.

    embeddings: (tokens, hidden). deepstack: one more such tensor for each early decoder layer that adds them.
    """

    embeddings: Tensor
    deepstack: tuple[Tensor, ...] = ()

    def part(self, first: int, last: int) -> Features:
        """Those of the image tokens from `first` to `last`, half-open."""
        return Features(self.embeddings[first:last], tuple(layer[first:last] for layer in self.deepstack))
