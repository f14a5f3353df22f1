"""Qwen2.5-VL: windowed vision encoder, 28 pixels a token, three-dimensional rotary positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hide.images import on_colour
from hide.models.base import Adapter, Features, Picture, Pictures
from hide_kernels import ImageTokens
from hide_kernels.integrations.image_spans import image_spans

# The loader that the published code uses resizes to at least this many tokens before the processor does it again.
LOADER_MIN_TOKENS = 4
MAX_ASPECT = 200


class Qwen25VL(Adapter):
    """A Qwen2.5-VL model with its tokenizer and image processor."""

    family = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    # transformers 5 calls the class without torchvision "...Pil"; version 4 has only the plain name.
    processors = ("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor")
    image_text, image_end = "<|image_pad|>", "<|vision_end|>"
    published_prior = (151653, 8)
    cell = 28

    def preprocess(self, images: Sequence[Image.Image], *, min_tokens: int, max_tokens: int) -> Pictures:
        """Resize and cut into patches, as the published code does: Pillow bicubic to multiples of 28 pixels, and where
        that gives fewer than `min_tokens` tokens once more to at least as many; transparency becomes white.

        Raises `ValueError` for images more than 200 times as long as wide.
        """
        resized = []
        for image in images:
            height, width = token_grid(image.height, image.width, self.cell, LOADER_MIN_TOKENS, max_tokens)
            resized.append(on_colour(image).resize((width * self.cell, height * self.cell), Image.Resampling.BICUBIC))
        size = {"shortest_edge": min_tokens * self.cell**2, "longest_edge": max_tokens * self.cell**2}
        batch = self.image_processor(images=resized, size=size, return_tensors="pt")
        merge = self.image_processor.merge_size
        layouts = [tuple(layout) for layout in batch["image_grid_thw"].tolist()]
        pixels = batch["pixel_values"].split([math.prod(layout) for layout in layouts])
        return Pictures(
            tuple(
                Picture(own, layout, (rows // merge, columns // merge), rows * columns // merge**2)
                for own, layout in zip(pixels, layouts, strict=True)
                for _, rows, columns in [layout]
            )
        )

    @torch.no_grad()
    def encode(self, pictures: Pictures) -> Features:
        """See `Adapter`."""
        device = self.model.model.visual.device
        found = []
        for picture in pictures.items:
            features = self.model.model.get_image_features(
                picture.pixels.to(device, self.dtype), _patches([picture]).to(device)
            )
            # Transformers 4 returns one tensor per picture, 5 an output object that holds them.
            found += list(getattr(features, "pooler_output", features))
        return Features(torch.cat(found))

    def positions(self, ids: Tensor, pictures: Pictures | None) -> tuple[Tensor, Tensor]:
        """(4, 1, L): the place in the text, then mRoPE's three."""
        arguments: dict[str, Any] = {}
        if pictures is not None:
            arguments["image_grid_thw"] = _patches(pictures.items)
        if self._takes_token_types:
            arguments["mm_token_type_ids"] = (ids == self.image_token).int()
        places, delta = self.model.model.get_rope_index(ids, **arguments)
        return torch.cat([torch.arange(ids.shape[1])[None, None], places]), delta

    def image_tokens(self, ids: Tensor, pictures: Pictures) -> tuple[ImageTokens, ...]:
        """See `Adapter`."""
        return tuple(image_spans(self.model, ids, image_grid_thw=_patches(pictures.items))[0])

    def image_inputs(self, pictures: Pictures) -> dict[str, Tensor]:
        """See `Adapter`."""
        return {**super().image_inputs(pictures), "image_grid_thw": _patches(pictures.items).to(self.model.device)}


def _patches(pictures: Sequence[Picture]) -> Tensor:
    """(images, 3) frames, rows and columns of patches, as the model wants them."""
    return torch.tensor([picture.layout for picture in pictures])


def token_grid(height: int, width: int, cell: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """(rows, columns) of cells that an image is resized to: nearest multiples, shrunk or grown into the token budget.

    Raises `ValueError` for images more than 200 times as long as wide.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"image: got {width} x {height} pixels, want at most {MAX_ASPECT} times as long as wide")
    rows, columns = max(1, round(height / cell)), max(1, round(width / cell))
    if rows * columns > max_tokens:
        shrink = math.sqrt(height * width / (max_tokens * cell**2))
        rows, columns = max(1, math.floor(height / shrink / cell)), max(1, math.floor(width / shrink / cell))
        rows, columns = min(rows, max_tokens // columns or 1), min(columns, max_tokens // rows or 1)
    elif rows * columns < min_tokens:
        grow = math.sqrt(min_tokens * cell**2 / (height * width))
        rows, columns = math.ceil(height * grow / cell), math.ceil(width * grow / cell)
    # Rounding may carry a picture beyond what the processor accepts.
    return min(rows, MAX_ASPECT * columns), min(columns, MAX_ASPECT * rows)
