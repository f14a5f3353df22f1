"""SDPA for several queries behind a cache, without a mask of queries times keys and without repeated keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hide_kernels.integrations.transformers import LOWER_RIGHT

# "sdpa" may not stand in the name: transformers reads meaning into it.
CONTINUING = "hide_continuing"
LOWER_RIGHT.add(CONTINUING)


@contextmanager
def continuing(decoder: Any) -> Iterator[None]:
    """Inside, a decoder that runs SDPA goes on behind a cache without a mask, and without repeated keys and values.

    For several queries behind a cache transformers makes a mask of queries times keys, and with one it repeats keys
    and values for every head of a group: for 4,096 queries behind 12,288 tokens of a 7B model 64 MB and 0.23 GB. Here
    the end of the queries is taken for the end of the keys, as FlashAttention takes it. Padding still gets a mask. A
    decoder that runs something else is left as it is.
    """
    config = decoder.config
    if config._attn_implementation != "sdpa" or slides(config):
        yield
        return
    config._attn_implementation_internal = CONTINUING
    try:
        yield
    finally:
        config._attn_implementation_internal = "sdpa"


def slides(config: Any) -> bool:
    """Whether some decoder layers of a text config see a window of keys alone."""
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return "sliding_attention" in layers
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _continuing_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered as `hide_continuing`."""
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None or queries in (1, keys):
        found: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    bias: Any
    if query.is_cuda:
        # No tensor of that size is made where FlashAttention can run.
        bias = causal_lower_right(queries, keys)
    else:
        bias = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _continuing_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    if kwargs.get("attention_mask") is None:
        return None
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    return mask


AttentionInterface.register(CONTINUING, _continuing_attention)
AttentionMaskInterface.register(CONTINUING, _continuing_mask)
