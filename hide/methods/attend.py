"""Attention maps per token, with no method in between: what each word of a prompt and of its reply looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from hide.engine import stock
from hide.images import ImageLike, load_image
from hide.models.base import Adapter
from hide_kernels import rows_to_maps
from hide_kernels.integrations.transformers import capture_attention


@dataclass(frozen=True)
class TokenAttention:
    """Attention over the image, the model's own (causal), averaged over heads and layers.

    image: the picture. tokens: text of each token, those of the prompt first. prompt_tokens: how many those are. maps:
    (T, h, w) float32 on the CPU; each sums to the share of its attention that goes to the image. A map of the reply is
    that of the query from which its token was predicted. layers: zero-based. reply: the whole reply.
    """

    image: Image.Image
    tokens: tuple[str, ...]
    prompt_tokens: int
    maps: Tensor
    layers: tuple[int, ...]
    reply: str


def attend(
    model: Adapter,
    image: ImageLike,
    text: str,
    *,
    layers: Sequence[int],
    new_tokens: int = 8,
    min_tokens: int = 4,
    max_tokens: int = 16384,
) -> TokenAttention:
    """Ask `model` about a picture and keep what each token of the text and of the greedy reply attends to.

    One `generate` with the model's own attention implementation; no attention matrix is made.

    Args:
        layers: zero-based decoder layers to average over.
        new_tokens: at most so many tokens of reply, at least 1.
        min_tokens, max_tokens: image tokens that the picture is resized to lie between.

    Raises:
        ValueError: for an empty text, no layer or one that the model does not have, or `new_tokens` below 1.
    """
    if not text.strip():
        raise ValueError("text: got nothing, want words to look for in the picture")
    if new_tokens < 1:
        raise ValueError(f"new_tokens: got {new_tokens}, want at least 1")
    picture = load_image(image)
    inputs = model.preprocess([picture], min_tokens=min_tokens, max_tokens=max_tokens)
    turn = model.turn(text, inputs)
    spans = [found.span for found in turn.images]
    with (
        capture_attention(model.model, layers=layers, queries=turn.rows, key_spans=spans) as asked,
        capture_attention(model.model, layers=layers, queries="generated", key_spans=spans) as replied,
    ):
        reply = stock.generate_ids(model, turn.input_ids, inputs, max_new_tokens=new_tokens)
    rows = torch.stack([torch.cat([asked[layer].weights[0], replied[layer].weights[0]]) for layer in asked]).mean(0)
    ids = [*turn.input_ids[0, turn.rows.start : turn.rows.stop].tolist(), *reply]
    return TokenAttention(
        image=picture,
        tokens=tuple(model.tokenizer.decode([token]) for token in ids),
        prompt_tokens=len(turn.rows),
        maps=rows_to_maps(rows.cpu(), turn.images)[0],
        layers=tuple(sorted(asked)),
        reply=model.decode(reply),
    )
