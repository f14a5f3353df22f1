"""LLaVA-OneVision: the whole image as one tile, then tiles of it, padding cut off, a line break behind each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hide.images import on_colour, to_image
from hide.models.base import Adapter, run_alone
from hide.models.devices import device_of
from hide.models.inputs import Features, ImageInput, ImageInputs
from hide_kernels import ImageTokens
from hide_kernels.integrations.image_spans import image_spans, onevision_grid


class LlavaOnevision(Adapter):
    """A LLaVA-OneVision model with its tokenizer and image processor."""

    family = "llava_onevision"
    model_class = "LlavaOnevisionForConditionalGeneration"
    # transformers 5 calls the class without torchvision "...Pil"; version 4 has only the plain name.
    processors = ("LlavaOnevisionImageProcessorPil", "LlavaOnevisionImageProcessor")
    image_text = "<image>"
    checkpoints = tuple(f"llava-hf/llava-onevision-qwen2-{size}-ov-hf" for size in ("0.5b", "7b", "72b"))

    def preprocess(self, images: Sequence[Image.Image | Tensor], *, min_tokens: int, max_tokens: int) -> ImageInputs:
        """Cut each image into tiles with the checkpoint's processor, as it does with one image; transparency is white.

        The processor cuts several images of one prompt into no tiles; here each has its own, which the model takes as
        well. Images of more than `max_tokens` tokens are shrunk until the model makes fewer tiles of them. What is left
        of a tile's padding is at most half a cell on a side, so that a map spans its image to within that.

        Raises `ValueError` where not even one tile fits into `max_tokens`; `min_tokens` changes nothing.
        """
        config = self.model.config
        items = []
        for image in images:
            fitted = on_colour(to_image(image))
            while (tokens := _tokens(config, fitted)) > max_tokens:
                if max(fitted.size) <= config.vision_config.image_size:
                    raise ValueError(f"max_tokens: got {max_tokens}, want at least {tokens}, those of one tile")
                fitted = fitted.resize([max(1, side * 3 // 4) for side in fitted.size], Image.Resampling.BICUBIC)
            batch = self.image_processor(images=[fitted], return_tensors="pt")
            grid = onevision_grid(config, fitted.height, fitted.width)
            items.append(ImageInput(batch["pixel_values"][0], (fitted.height, fitted.width), grid, tokens))
        return ImageInputs(tuple(items))

    @run_alone
    def encode(self, images: ImageInputs) -> Features:
        """See `Adapter`."""
        tower = self.model.model
        found = []
        for item in images.items:
            pixels = item.pixels.to(device_of(tower.vision_tower), self.dtype)
            features = tower.get_image_features(pixels, image_sizes=_sizes([item]))
            # Transformers 4 returns a list, 5 an output object that holds it.
            found += list(getattr(features, "pooler_output", features))
        return Features(torch.cat(found))

    def image_tokens(self, ids: Tensor, images: ImageInputs) -> tuple[ImageTokens, ...]:
        """See `Adapter`."""
        return tuple(image_spans(self.model, ids, image_sizes=_sizes(images.items))[0])

    def image_inputs(self, images: ImageInputs) -> dict[str, Tensor]:
        """See `Adapter`."""
        return {**super().image_inputs(images), "image_sizes": _sizes(images.items)}


def _tokens(config: Any, image: Image.Image) -> int:
    """Those of the whole image, and of its rows with a line break behind each."""
    rows, columns = onevision_grid(config, image.height, image.width)
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + rows * (columns + 1)


def _sizes(images: Sequence[ImageInput]) -> Tensor:
    """(images, 2) heights and widths, as the model wants them."""
    return torch.tensor([item.layout for item in images])
