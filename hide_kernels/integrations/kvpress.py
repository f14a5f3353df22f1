"""Presses for kvpress, with our scores: SnapKV's, observed attention's and H2O's, under any attention implementation.

Each takes its scores from the queries of the hidden states and the keys in the cache: no attention matrix, no keys
repeated for their heads, and no eager attention, which kvpress's own `ObservedAttentionPress` needs. As kvpress does,
they take every token for a real one: batches without padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hide_kernels.integrations.h2o import checked_counts, kept_keys  # isort: skip  (transformers first: it is needed too)

try:
    import kvpress
    from kvpress.presses.base_press import is_prefilling
    from kvpress.utils import extract_keys_and_values, get_prerope_query_states
except ModuleNotFoundError as error:
    if error.name != "kvpress":
        raise
    raise ImportError(f"{__name__} needs kvpress: pip install kvpress") from None

from transformers import QuantizedCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hide_kernels.recipes import observed_scores, window_scores


def _queries(module: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any], last: int | None = None) -> Tensor:
    """(B, Hq, R, D), after RoPE and q-norm, of the `last` tokens of a forward, or of all."""
    hidden_states = hidden_states[:, -(last or 0) :]
    cos, sin = (x[:, -(last or 0) :] for x in kwargs["position_embeddings"])
    query = get_prerope_query_states(module, hidden_states)
    rotated: Tensor = apply_rotary_pos_emb(query, query, cos, sin)[0]
    return rotated


@dataclass
class SnapKVPress(kvpress.SnapKVPress):
    """kvpress's SnapKV (arXiv 2404.14469) with `recipes.window_scores`: the same tokens are kept."""

    def score(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """(B, Hkv, N), of the window's own tokens inf."""
        query = _queries(module, hidden_states, kwargs, self.window_size)
        scores = window_scores(query, keys, kernel_size=self.kernel_size)
        return nn.functional.pad(scores, (0, self.window_size), value=torch.inf)


@dataclass
class ObservedAttentionPress(kvpress.ObservedAttentionPress):
    """kvpress's observed attention, the mean over the queries that see a key, with `recipes.observed_scores`.

    The same tokens are kept, without `attn_implementation="eager"`.
    """

    def score(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """(B, Hkv, N)."""
        return observed_scores(_queries(module, hidden_states, kwargs), keys, reduction="mean")


@dataclass
class H2OPress(kvpress.PrefillDecodingPress):
    """H2O (arXiv 2306.14048) over the prompt and every token after it, as `h2o_cache` documents it.

    In kvpress's pipeline, which keeps a press that is a `PrefillDecodingPress` open while it decodes; the two presses
    that one is made of are not used. One sequence or batch at a time; a prompt's forward begins a new one. In a loop of
    your own pass `position_ids`: what is dropped shortens the cache.

    heavy_hitters, recent: how many keys of each kind a head keeps.

    Raises:
        TypeError, ValueError: for counts that are none, and from the model for a quantised cache.
    """

    heavy_hitters: int = 0
    recent: int = 0
    # Of each layer, (B, Hkv, kept).
    _scores: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.heavy_hitters, self.recent = checked_counts(self.heavy_hitters, self.recent)

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Score and drop after each attention, whose output it returns as it is."""
        hidden_states, cache, layer = kwargs["hidden_states"], kwargs["past_key_values"], module.layer_idx
        if isinstance(cache, QuantizedCache):
            raise TypeError("cache: got a QuantizedCache, want keys as they are: H2O drops some in every step")
        keys, values = extract_keys_and_values(cache, layer)
        scores = observed_scores(_queries(module, hidden_states, kwargs), keys)
        if not is_prefilling(kwargs["cache_position"], hidden_states.shape[1]):
            before = self._scores[layer]
            scores[..., : before.shape[-1]] += before
        kept = kept_keys(scores, self.heavy_hitters, self.recent)
        if kept is not None:
            scores = scores.gather(2, kept)
            keys, values = (x.gather(2, kept[..., None].expand(*kept.shape, x.shape[3])) for x in (keys, values))
            cache.layers[layer].keys, cache.layers[layer].values = keys, values
        self._scores[layer] = scores
        return output
