"""Qwen2.5-VL: windowed vision encoder, 28 pixels a token, three-dimensional rotary positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hide.images import to_tensor
from hide.models.base import Adapter, run_alone
from hide.models.devices import device_of
from hide.models.inputs import Features, ImageInput, ImageInputs
from hide.models.vision_slices import in_slices
from hide_kernels import ImageTokens, pixel_values
from hide_kernels.integrations.image_spans import image_spans

# The loader that the published code uses, for every Qwen, resizes to multiples of so many pixels and to at least so
# many tokens of that size, before the processor does it again.
LOADER_CELL = 28
LOADER_MIN_TOKENS = 4
MAX_ASPECT = 200


class Qwen25VL(Adapter):
    """A Qwen2.5-VL model with its tokenizer and image processor."""

    family = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    # transformers 5 calls the class without torchvision "...Pil"; version 4 has only the plain name.
    processors = ("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor")
    image_text, image_end = "<|image_pad|>", "<|vision_end|>"
    checkpoints = (
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen/Qwen2.5-VL-32B-Instruct",
        "Qwen/Qwen2.5-VL-72B-Instruct",
    )
    tested = f"{Adapter.tested}; the embedded model"

    def box_extent(self, image: ImageInput) -> tuple[int, int]:
        """Pixels of the image as it was resized."""
        rows, columns = image.grid
        cell = self.image_processor.patch_size * self.image_processor.merge_size
        return columns * cell, rows * cell

    def preprocess(self, images: Sequence[Image.Image | Tensor], *, min_tokens: int, max_tokens: int) -> ImageInputs:
        """Resize and cut into patches, as the published code does: Pillow bicubic to multiples of 28 pixels, and once
        more where the model's cells are of another size or fewer than `min_tokens`; transparency becomes white.

        Raises `ValueError` for images more than 200 times as long as wide.
        """
        processor = self.image_processor
        merge = processor.merge_size
        cell = processor.patch_size * merge
        found = []
        for image in images:
            pixels = image if isinstance(image, Tensor) else to_tensor(image)
            rows, columns = token_grid(pixels.shape[0], pixels.shape[1], LOADER_CELL, LOADER_MIN_TOKENS, max_tokens)
            loaded = (rows * LOADER_CELL, columns * LOADER_CELL)
            rows, columns = token_grid(*loaded, cell, min_tokens, max_tokens)
            values = pixel_values(
                pixels,
                [loaded, (rows * cell, columns * cell)],
                mean=processor.image_mean,
                std=processor.image_std,
                patch=processor.patch_size,
                merge=merge,
                temporal=processor.temporal_patch_size,
                dtype=self.dtype if self.dtype.itemsize == 2 else torch.float32,
            )
            found.append(ImageInput(values, (1, rows * merge, columns * merge), (rows, columns), rows * columns))
        return ImageInputs(tuple(found))

    @run_alone
    def encode(self, images: ImageInputs) -> Features:
        """See `Adapter`."""
        device = device_of(self.model.model.visual)
        found = []
        for item in images.items:
            pixels = item.pixels.to(device, self.dtype)
            with in_slices(self.model.model.visual):
                encoded = self.model.model.get_image_features(pixels, _patches([item]).to(device))
            found.append(self._features(encoded))
        deepstack = zip(*(features.deepstack for features in found), strict=True)
        return Features(torch.cat([features.embeddings for features in found]), tuple(map(torch.cat, deepstack)))

    def _features(self, encoded: Any) -> Features:
        """One image's features from what `get_image_features` returns."""
        # Transformers 4 returns one tensor per image, 5 an output object that holds them.
        (embeddings,) = getattr(encoded, "pooler_output", encoded)
        return Features(embeddings)

    def positions(self, ids: Tensor, images: ImageInputs | None) -> tuple[Tensor, Tensor]:
        """(4, 1, L): the place in the text, then mRoPE's three."""
        arguments: dict[str, Any] = {}
        if images is not None:
            arguments["image_grid_thw"] = _patches(images.items)
        if self._takes_token_types:
            arguments["mm_token_type_ids"] = (ids == self.image_token).int()
        places, delta = self.model.model.get_rope_index(ids, **arguments)
        return torch.cat([torch.arange(ids.shape[1])[None, None], places]), delta

    def image_tokens(self, ids: Tensor, images: ImageInputs) -> tuple[ImageTokens, ...]:
        """See `Adapter`."""
        return tuple(image_spans(self.model, ids, image_grid_thw=_patches(images.items))[0])

    def image_inputs(self, images: ImageInputs) -> dict[str, Tensor]:
        """See `Adapter`."""
        return {**super().image_inputs(images), "image_grid_thw": _patches(images.items).to(self.input_device)}


def _patches(images: Sequence[ImageInput]) -> Tensor:
    """(images, 3) frames, rows and columns of patches, as the model wants them."""
    return torch.tensor([item.layout for item in images])


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
    # Rounding may carry a image beyond what the processor accepts.
    return min(rows, MAX_ASPECT * columns), min(columns, MAX_ASPECT * rows)
