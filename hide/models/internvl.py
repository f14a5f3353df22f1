"""InternVL (the `-hf` checkpoints): images stretched to a grid of square tiles, and a thumbnail beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from hide.images import to_image
from hide.models.base import Adapter, run_alone
from hide.models.devices import device_of
from hide.models.inputs import Features, ImageInput, ImageInputs
from hide_kernels import ImageTokens
from hide_kernels.integrations.image_spans import image_spans

# Tiles that go through the vision encoder at once.
TILES_AT_ONCE = 16


class InternVL(Adapter):
    """An InternVL model with its tokenizer and image processor."""

    family = "internvl"
    model_class = "InternVLForConditionalGeneration"
    # transformers 5 calls the class without torchvision "...Pil"; version 4 has only the plain name.
    processors = ("GotOcr2ImageProcessorPil", "GotOcr2ImageProcessor")
    image_text, image_end = "<IMG_CONTEXT>", "</img>"
    image_start = "<img>"
    checkpoints = tuple(f"OpenGVLab/InternVL3-{size}-hf" for size in ("1B", "2B", "8B", "14B", "38B", "78B"))
    joins_images = True

    def box_extent(self, image: ImageInput) -> tuple[int, int]:
        """Thousandths."""
        return 1000, 1000

    def preprocess(self, images: Sequence[Image.Image | Tensor], *, min_tokens: int, max_tokens: int) -> ImageInputs:
        """Stretch each image to whole tiles with Pillow's bicubic filter and cut it, as the published code does.

        A tile is `image_seq_length` tokens (256); the thumbnail counts, so 33,024 tokens are 128 tiles beside it. The
        alpha channel is dropped after resizing: what is wholly transparent becomes black.

        Raises `ValueError` where not even one tile fits into `max_tokens`.
        """
        side, of_tile = self.model.config.vision_config.image_size[0], self.model.config.image_seq_length
        if max_tokens < of_tile:
            raise ValueError(f"max_tokens: got {max_tokens}, want at least {of_tile}, the tokens of one tile")
        most = max(1, max_tokens // of_tile - 1)
        # More than one tile brings a thumbnail along.
        least = 1 if min_tokens <= of_tile else min(most, max(2, math.ceil(min_tokens / of_tile) - 1))
        cells = math.isqrt(of_tile)
        items = []
        for image in map(to_image, images):
            rows, columns = tile_grid(image.height, image.width, side, least, most)
            tiles = _tiles(image, rows, columns, side)
            pixels = self.image_processor(images=tiles, crop_to_patches=False, do_resize=False, return_tensors="pt")
            grid = (rows * cells, columns * cells)
            items.append(ImageInput(pixels["pixel_values"], (rows, columns), grid, len(tiles) * of_tile))
        return ImageInputs(tuple(items))

    def placeholders(self, count: int) -> str:
        """See `Adapter`."""
        return f"{self.image_start}{self.image_text * count}{self.image_end}"

    @run_alone
    def encode(self, images: ImageInputs) -> Features:
        """See `Adapter`; tiles know nothing of one another, so that a few at a time give the same."""
        tower = self.model.model
        found = []
        for item in images.items:
            for tiles in item.pixels.split(TILES_AT_ONCE):
                features = tower.get_image_features(tiles.to(device_of(tower.vision_tower), self.dtype))
                # Transformers 4 returns a tensor, 5 an output object that holds it.
                found.append(getattr(features, "pooler_output", features).flatten(0, 1))
        return Features(torch.cat(found))

    def image_tokens(self, ids: Tensor, images: ImageInputs) -> tuple[ImageTokens, ...]:
        """See `Adapter`."""
        grids = [(rows, columns) for rows, columns in (item.layout for item in images.items)]
        return tuple(image_spans(self.model, ids, tile_grids=grids)[0])


def tile_grid(height: int, width: int, side: int, least: int, most: int) -> tuple[int, int]:
    """(rows, columns) of `least` to `most` tiles whose shape is nearest to the image's.

    Of shapes that are as near, the one of more tiles, if the image has more than half as many pixels as they have.
    """
    best, nearest = (1, 1), math.inf
    pairs = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    for columns, rows in sorted(pairs, key=math.prod):
        distance = abs(width / height - columns / rows)
        large = height * width > 0.5 * side**2 * columns * rows
        if columns * rows >= least and (distance < nearest or (distance == nearest and large)):
            best, nearest = (rows, columns), distance
    return best


def _tiles(image: Image.Image, rows: int, columns: int, side: int) -> list[Image.Image]:
    """RGB tiles of an image in reading order, and behind more than one the whole image as another."""
    whole = image if image.mode in ("RGB", "RGBA") else image.convert("RGB")
    stretched = whole.resize((side * columns, side * rows), Image.Resampling.BICUBIC).convert("RGB")
    corners = [(side * column, side * row) for row in range(rows) for column in range(columns)]
    tiles = [stretched.crop((left, top, left + side, top + side)) for left, top in corners]
    if len(tiles) > 1:
        tiles.append(whole.resize((side, side), Image.Resampling.BICUBIC).convert("RGB"))
    return tiles
