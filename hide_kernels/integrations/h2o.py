"""H2O's cache (arXiv 2306.14048) for unmodified Hugging Face models, beside whatever attention implementation they run.

A cache does not see the queries, which say what its keys are worth. So each layer of this one goes with a recorder on
the decoder layer of the same number: after every attention the recorder finds what each key received from its queries
(`attention_received`: no attention matrix), and the cache layer adds that to its scores and keeps the best keys.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hide_kernels.integrations.transformers import Capture, decoder_attention, routed  # isort: skip  (first: it says what lacks)

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hide_kernels.integrations.masks import visible_keys


def kept_keys(scores: Tensor, heavy_hitters: int, recent: int) -> Tensor | None:
    """Which keys H2O keeps: the `recent` last ones, and of those before them the `heavy_hitters` with the best scores.

    Args:
        scores: (B, Hkv, N), what each key has received so far.

    Returns:
        (B, Hkv, heavy_hitters + recent) int64, ascending; `None` where all are kept.
    """
    before = scores.shape[-1] - recent
    if before <= heavy_hitters:
        return None
    best = scores[..., :before].topk(heavy_hitters, -1).indices.sort(-1).values
    last = torch.arange(before, scores.shape[-1], device=scores.device).expand(*scores.shape[:2], recent)
    return torch.cat([best, last], -1)


def checked_counts(heavy_hitters: int, recent: int) -> tuple[int, int]:
    """Both as ints; `TypeError` or `ValueError` for what is no number of keys, and where nothing would be kept."""
    for name, count in (("heavy_hitters", heavy_hitters), ("recent", recent)):
        if not hasattr(count, "__index__"):
            raise TypeError(f"{name}: got {count!r}, want a number of keys")
        if count < 0:
            raise ValueError(f"{name}: got {count}, want 0 or more")
    if not heavy_hitters and not recent:
        raise ValueError("heavy_hitters, recent: got 0 and 0, want at least one key")
    return operator.index(heavy_hitters), operator.index(recent)


class H2OLayer(DynamicLayer):
    """The keys and values that one decoder layer has kept.

    keys, values: (B, Hkv, kept, D). positions: (B, Hkv, kept) int64, where each stands in the (padded) sequence,
    ascending. scores: (B, Hkv, kept), float32, the attention that each has received since it came, summed over queries
    and meaned over the heads of its group, or 0 without heavy hitters; -inf for padding. `None` before the first
    forward. seen: tokens so far.
    """

    is_croppable = False

    def __init__(self, heavy_hitters: int, recent: int) -> None:
        super().__init__()
        self.heavy_hitters, self.recent = heavy_hitters, recent
        self.open = True
        self.reset()

    def reset(self) -> None:
        """As if no token had been seen."""
        self.keys = self.values = None
        self.scores: Tensor | None = None
        self.positions: Tensor | None = None
        self.seen = 0
        # Tokens have come whose attention has not.
        self.waiting = False
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; all that are kept and these, until `settle`."""
        if not self.open or self.waiting:
            why = "its block is closed" if not self.open else "its last attention was not seen"
            raise ValueError(f"cache: {why}; run the model inside the h2o_cache block, in the thread that opened it")
        self.waiting = True
        self.seen += key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def settle(self, received: Tensor, padding: Tensor | None) -> None:
        """Score and choose after an attention.

        Args:
            received: (B, Hkv, kept + new), what each key received in it.
            padding: (B, kept + new) bool, keys that are none; `None`: there are none.
        """
        self.waiting = False
        old = 0 if self.scores is None else self.scores.shape[-1]
        new = received.shape[-1] - old
        positions = torch.arange(self.seen - new, self.seen, device=received.device).expand(*received.shape[:2], new)
        if self.scores is not None and self.positions is not None:
            received = received + torch.nn.functional.pad(self.scores, (0, new))
            positions = torch.cat([self.positions, positions], -1)
        if padding is not None:
            received = received.masked_fill(padding[:, None], -torch.inf)
        self.scores, self.positions = received, positions
        self.shrink()

    def shrink(self) -> None:
        """Keep no more than `heavy_hitters` and `recent` say, as after every attention; both may be set at any time."""
        kept = None if self.scores is None else kept_keys(self.scores, self.heavy_hitters, self.recent)
        if kept is not None:
            self._each(lambda x: x.gather(2, kept if x.dim() == 3 else kept[..., None].expand(*kept.shape, x.shape[3])))

    def get_seq_length(self, *args: Any) -> int:
        """Tokens that have been seen: the next one's position."""
        return self.seen

    def get_mask_sizes(self, new: int | Tensor) -> tuple[int, int]:
        """Keys in the next forward, and how many before them there would be if all had been kept.

        new: its number of tokens; older versions of transformers pass their positions.
        """
        held = 0 if self.scores is None else self.scores.shape[-1]
        return held + (new if isinstance(new, int) else new.shape[0]), self.seen - held

    def crop(self, *args: Any) -> None:
        """`ValueError`: what was dropped for tokens that are taken back would be wanted again."""
        raise ValueError("cache: H2O's cache cannot go back; generate without an assistant or prompt look-up")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As beams were reordered."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sample so many times."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These samples alone."""
        self._each(lambda x: x[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change all that is held, of (B, Hkv, kept) and (B, Hkv, kept, D)."""
        for name in ("scores", "positions", "keys", "values"):
            if self.scores is not None:
                setattr(self, name, change(getattr(self, name)))


class H2OCache(DynamicCache):
    """The cache that `h2o_cache` opens; `layers[i]` is an `H2OLayer`."""

    def __init__(self, layers: list[H2OLayer]) -> None:
        super().__init__()
        self.layers: list[Any] = layers
        # All are there: transformers must not append any.
        self.layer_class_to_replicate = None


@contextmanager
def h2o_cache(model: PreTrainedModel, *, heavy_hitters: int, recent: int) -> Iterator[H2OCache]:
    """A cache that keeps the heavy hitters and the last tokens (H2O, arXiv 2306.14048), for forwards and `generate`.

    After each forward, a prompt's, a part's of it or a new token's, every key/value head keeps the `recent` last keys
    and, of those before them, the `heavy_hitters` that have received most attention from all queries so far. A score
    is the softmax attention of the model, with the keys that were there, summed over queries, meaned over the heads of
    the group. Tokens keep their positions. Works with eager, SDPA and FlashAttention, which see a layer's whole prompt
    once; at no time there is an attention matrix::

        with h2o_cache(model, heavy_hitters=256, recent=256) as cache:
            model.generate(**inputs, cache=cache, max_new_tokens=500)  # past_key_values=cache before transformers 5.24
        cache.layers[0].positions  # (B, Hkv, 512): which tokens it holds

    Without heavy hitters it is a sliding window. Several tokens in one forward see each other's keys before any is
    dropped. Batches may be padded on the left: padding goes first.

    Args:
        model: a Hugging Face model whose decoder layers use transformers' attention interface and all see all keys.
        heavy_hitters, recent: how many keys of each kind a head keeps, 0 or more, not both 0.

    Yields:
        An empty `H2OCache`, of one sequence or batch at a time (`reset()`), for the thread that opened the block; other
        forwards inside the block run as they would without it.

    Raises:
        TypeError, ValueError: for counts that are none, models with sliding-window layers, layers without softmax rows
            or with attention that cannot be captured (`capture_attention`); from the model for a cache outside of its
            block, padding that is not on the left, and ways of generating that go back.
    """
    heavy_hitters, recent = checked_counts(heavy_hitters, recent)
    modules = decoder_attention(model)
    usual = DynamicCache(config=model.config).layers
    for number, layer in enumerate(usual):
        if type(layer) is not DynamicLayer:
            raise ValueError(f"model: layer {number} has a {type(layer).__name__}; want layers that see all keys")
        if number not in modules:
            raise ValueError(f"model: layer {number} has no attention that can be captured")
    layers = [H2OLayer(heavy_hitters, recent) for _ in range(max(modules) + 1)]
    try:
        with ExitStack() as routes:
            for number, module in modules.items():
                routes.enter_context(routed(module, _Received(number, [], of=layers[number])))
            yield H2OCache(layers)
    finally:
        for layer in layers:
            layer.open = False


@dataclass(eq=False)
class _Received(Capture):
    """Tells a cache layer what its keys received in each attention; of: that layer."""

    head_reduction: Any = "kv_group"
    received: Any = "sum"
    of: Any = None

    def record_call(
        self, query: Tensor, key: Tensor, mask: Tensor | None, lse: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        if not self.of.waiting:
            return  # of a forward with another cache
        padding = None if mask is None else ~visible_keys(mask, key.shape[2]).any(1)
        if padding is not None and bool((padding[:, 1:] & ~padding[:, :-1]).any()):
            raise ValueError("attention_mask: padding behind tokens; H2O's cache wants batches padded on the left")
        if self.of.heavy_hitters:
            # Each forward by itself: the scores of what was dropped meanwhile are the cache layer's affair.
            self.forget()
            super().record_call(query, key, mask, lse, kwargs)
        received = self.received_by_now()
        if received is None:
            received = torch.zeros(key.shape[:3], device=key.device)
        self.of.settle(received, padding)
        self.forget()
