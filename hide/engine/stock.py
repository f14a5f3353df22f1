"""The unshared way: each prompt with its images through the model's own forward and `generate`.

What tests and baselines compare a session with.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from hide.engine.decoder import Decoded, greedy_reply, only_layers
from hide.engine.prefix import Reply, layer_indices
from hide.engine.usage import count
from hide.models.base import Adapter
from hide.models.inputs import ImageInputs
from hide.models.prompts import Turn
from hide_kernels import rows_to_maps
from hide_kernels.integrations.transformers import capture_attention


def forward_inputs(model: Adapter, input_ids: Tensor, images: ImageInputs | None) -> dict[str, Tensor]:
    """A prompt of (1, L) ids as arguments of the model's own forward, on its device."""
    device = model.input_device
    inputs = {"input_ids": input_ids.to(device), "attention_mask": torch.ones_like(input_ids, device=device)}
    if images is not None:
        inputs |= model.image_inputs(images)
    if "mm_token_type_ids" in inspect.signature(model.model.forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.image_token).int()
    return inputs


def attention(
    model: Adapter,
    turn: Turn,
    images: ImageInputs,
    *,
    layers: Sequence[int] | None,
    causal: bool = True,
    queries: range | None = None,
    keep_layers: bool = False,
) -> list[Tensor]:
    """As `hide.session.ImageSession.attention`, from one forward over the whole prompt."""
    chosen = layer_indices(model, layers)
    with (
        capture_attention(
            model.model,
            layers=chosen,
            queries=turn.rows if queries is None else queries,
            key_spans=[image.span for image in turn.images],
            causal=causal,
        ) as captured,
        model.alone(),
        only_layers(model.language_model, range(max(chosen) + 1)),
    ):
        model.model.model(**forward_inputs(model, turn.input_ids, images), use_cache=False)
    rows = torch.stack([result.weights[0] for result in captured.values()])
    return rows_to_maps(rows if keep_layers else rows.mean(0), turn.images)


def generate(model: Adapter, text: str, images: ImageInputs | None = None, *, max_new_tokens: int) -> Reply:
    """Greedy reply to one user turn."""
    ids = model.input_ids(text, images)
    new, margin = _decoded(model, ids, images, max_new_tokens)
    tokens = ids.shape[1] + len(new)
    count(tokens)
    return Reply(model.decode(new), tokens, tuple(new), margin=margin)


def generate_ids(
    model: Adapter, input_ids: Tensor, images: ImageInputs | None = None, *, max_new_tokens: int
) -> list[int]:
    """The tokens of the greedy reply to (1, L) ids."""
    return _decoded(model, input_ids, images, max_new_tokens).tokens


def _decoded(model: Adapter, input_ids: Tensor, images: ImageInputs | None, max_new_tokens: int) -> Decoded:
    with model.alone():
        return greedy_reply(model, forward_inputs(model, input_ids, images), max_new_tokens)
