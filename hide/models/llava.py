"""LLaVA-1.5: one square of 336 pixels, 24 x 24 tokens, whatever the image's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from hide.images import on_colour, to_image
from hide.models.base import Adapter, run_alone
from hide.models.devices import device_of
from hide.models.inputs import Features, ImageInput, ImageInputs
from hide_kernels import ImageTokens
from hide_kernels.integrations.image_spans import image_spans


class Llava(Adapter):
    """A LLaVA-1.5 model with its tokenizer and image processor."""

    family = "llava"
    model_class = "LlavaForConditionalGeneration"
    # transformers 5 calls the class without torchvision "...Pil"; version 4 has only the plain name.
    processors = ("CLIPImageProcessorPil", "CLIPImageProcessor")
    image_text = "<image>"
    checkpoints = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf")

    def preprocess(self, images: Sequence[Image.Image | Tensor], *, min_tokens: int, max_tokens: int) -> ImageInputs:
        """Fit each image into the square, on the processor's mean colour, as LLaVA itself does; transparency is white.

        The checkpoints' own processor would cut off what is not square, and no box could ever lie there. The shorter
        side is rounded to whole cells, so that the image's cells, and nothing else, are its map.

        Raises `ValueError` where `max_tokens` is less than what every image has (576); `min_tokens` changes nothing.
        """
        config = self.model.config
        side, cell = config.vision_config.image_size, config.vision_config.patch_size
        cells = side // cell
        tokens = cells**2 + (config.vision_feature_select_strategy == "full")
        if max_tokens < tokens:
            raise ValueError(f"max_tokens: got {max_tokens}, want at least {tokens}, the tokens of every image")
        colour = tuple(int(255 * mean) for mean in self.image_processor.image_mean)
        items = []
        for image in map(to_image, images):
            longest = max(image.size)
            rows, columns = (max(1, round(cells * length / longest)) for length in (image.height, image.width))
            left, top = (cells - columns) // 2 * cell, (cells - rows) // 2 * cell
            fitted = on_colour(image).resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
            square = Image.new("RGB", (side, side), colour)
            square.paste(fitted, (left, top))
            batch = self.image_processor(images=[square], do_resize=False, do_center_crop=False, return_tensors="pt")
            items.append(ImageInput(batch["pixel_values"], (cells, cells), (rows, columns), tokens))
        return ImageInputs(tuple(items))

    @run_alone
    def encode(self, images: ImageInputs) -> Features:
        """See `Adapter`."""
        tower = self.model.model
        found = []
        for item in images.items:
            features = tower.get_image_features(item.pixels.to(device_of(tower.vision_tower), self.dtype))
            # Transformers 4 returns a list, 5 an output object that holds it.
            found += list(getattr(features, "pooler_output", features))
        return Features(torch.cat(found))

    def image_tokens(self, ids: Tensor, images: ImageInputs) -> tuple[ImageTokens, ...]:
        """See `Adapter`."""
        found = []
        for square, item in zip(image_spans(self.model, ids)[0], images.items, strict=True):
            (cells, _), (rows, columns) = item.layout, item.grid
            top, left = (cells - rows) // 2, (cells - columns) // 2
            found.append(square._replace(cells=square.cells[top : top + rows, left : left + columns]))
        return tuple(found)

    def _render(self, turns: Sequence[tuple[str, ImageInputs | None]]) -> list[str]:
        """See `Adapter`; the tokenizer would put the token that begins a text there, not the chat template."""
        (first, *others), begin = super()._render(turns), self.tokenizer.bos_token or ""
        return [first if first.startswith(begin) else begin + first, *others]
