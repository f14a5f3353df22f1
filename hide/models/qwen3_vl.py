"""Qwen3-VL: as Qwen2.5-VL, with 32 pixels a token and vision features that early decoder layers add once more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hide.models.base import Adapter
from hide.models.inputs import Features, ImageInput
from hide.models.qwen2_5_vl import Qwen25VL


class Qwen3VL(Qwen25VL):
    """A Qwen3-VL model with its tokenizer and image processor.

    Images go through the same loader as Qwen2.5-VL's, to multiples of 28 pixels, and then to multiples of 32, as the
    published code does: 16,384 tokens of 28 pixels are 12,544 of 32.
    """

    family = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
    checkpoints = (
        "Qwen/Qwen3-VL-2B-Instruct",
        "Qwen/Qwen3-VL-4B-Instruct",
        "Qwen/Qwen3-VL-8B-Instruct",
        "Qwen/Qwen3-VL-32B-Instruct",
    )
    tested = Adapter.tested

    def box_extent(self, image: ImageInput) -> tuple[int, int]:
        """Thousandths."""
        return 1000, 1000

    def _features(self, encoded: Any) -> Features:
        # Transformers 4 returns a pair, 5 an output object.
        pair = encoded if isinstance(encoded, tuple) else (encoded.pooler_output, encoded.deepstack_features)
        (embeddings,), layers = pair
        # One tensor per layer, until 5.23 made one per image of each.
        return Features(embeddings, tuple(one if isinstance(one, Tensor) else torch.cat(one) for one in layers))
