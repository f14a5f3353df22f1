"""Decoder layers that stand beside a model's own and read what enters one of them, such as trained branches.

They run in the decoder's own forward, so that masks, rotary positions and attention implementation are the model's.
Queries and keys of a layer are also made by themselves here, for scores of a few tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hide.engine.chunked_sdpa import continuing
from hide.engine.decoder import only_layers
from hide.engine.kv_cache import PreallocatedCache, cache_keyword
from hide.engine.memory_advice import advised
from hide.models.base import Adapter


def new_layers(model: Adapter, count: int, first: int = 0) -> nn.ModuleList:
    """Layers of the decoder's class and configuration, on torch's default device, with untrained values.

    first: how many stand beside the decoder already. Caches and captures know layers by number: these go on behind the
    decoder's own.
    """
    decoder = model.language_model
    # The configuration knows kinds of layers by the decoder's own numbers.
    made: list[Any] = [type(decoder.layers[0])(decoder.config, 0) for _ in range(count)]
    for index, layer in enumerate(made):
        layer.self_attn.layer_idx = model.num_layers + first + index
    return nn.ModuleList(made).eval()


def number_of(layer: Any) -> int:
    """A layer's place in its cache."""
    number: int = layer.self_attn.layer_idx
    return number


def through(
    model: Adapter, layers: nn.ModuleList, hidden: Tensor, positions: Tensor, cache: PreallocatedCache | None = None
) -> Tensor:
    """Send states through layers of `new_layers`; there is no norm behind them.

    Gradients are the caller's business: inference stands inside `Adapter.alone`.

    Args:
        hidden: (1, n, hidden).
        positions: (P, 1, n) or (1, n), as the decoder takes them.
        cache: keys and values of these layers, of the tokens before; the new ones are added. `None`: there are none.

    Returns:
        (1, n, hidden).
    """
    decoder = model.language_model
    held: dict[str, Any] = {} if cache is None else {cache_keyword(type(decoder).forward): cache}
    with (
        only_layers(decoder, layers),
        nullcontext() if cache is None else cache.from_layer(number_of(layers[0])),
        continuing(decoder),
    ):
        found: Tensor = decoder(
            inputs_embeds=hidden,
            position_ids=positions.to(hidden.device),
            use_cache=cache is not None,
            **held,
        ).last_hidden_state
    return found


class Beside:
    """Layers beside the decoder, behind a prefix whose tokens have gone through them once.

    states: (1, P, hidden) what they made of the prefix; `None` with `last_row_only`. Not for several threads at once.
    """

    def __init__(
        self,
        model: Adapter,
        layers: nn.ModuleList,
        hidden: Tensor,
        positions: Tensor,
        *,
        chunk: int = 2048,
        last_row_only: bool = False,
    ) -> None:
        """Run the prefix. Raises `MemoryError` with sizes and advice, as `run`.

        Args:
            hidden: (1, P, hidden), what its tokens bring, as `Prefix.hidden` gives it. positions: theirs.
            chunk: tokens that go through the layers at once.
            last_row_only: what comes out is wanted of later rows alone, so that of the last layer the prefix has keys
                and values, and no queries, attention or feed-forward.
        """
        self._model, self._layers = model, layers
        self._length = hidden.shape[1]
        self._cache = PreallocatedCache(number_of(layers[-1]) + 1, self._length + 256)
        found = []
        self._said = f"{len(layers)} layers beside the decoder, of {self._length} tokens,"
        with model.alone(), advised(self._said):
            for start in range(0, self._length, chunk):
                own, places = hidden[:, start : start + chunk], positions[..., start : start + chunk]
                if not last_row_only:
                    found.append(through(model, layers, own, places, self._cache))
                    continue
                if len(layers) > 1:
                    own = through(model, layers[:-1], own, places, self._cache)
                last: Any = layers[-1]
                normed = last.input_layernorm(own)
                keys = key_heads(last, normed, rotation(model, own, places))
                self._cache.update(keys, value_heads(last, normed), number_of(last))
        self.states = torch.cat(found, 1) if found else None

    @property
    def nbytes(self) -> int:
        """Of keys, values and states."""
        return self._cache.nbytes + (0 if self.states is None else self.states.nbytes)

    def run(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Rows behind the prefix, (1, n, hidden), as they leave the layers; they leave nothing behind."""
        with self._model.alone(), advised(self._said):
            try:
                return through(self._model, self._layers, hidden, positions, self._cache)
            finally:
                self._cache.rewind(self._length)


# -- queries and keys by themselves -----------------------------------------------------------------------------------

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, (1, 1, n, D)."""


def rotation(model: Adapter, like: Tensor, positions: Tensor) -> Rotation:
    """The rotary embedding of positions, as the decoder takes them, in the dtype and on the device of `like`."""
    decoder = model.language_model
    places = positions[-3:] if positions.dim() == 3 else positions
    pair = decoder.rotary_emb(like, places.to(like.device))
    if pair[0].dim() == 4:
        # Before transformers 5 Qwen2.5-VL's attention chose, for each section of channels, one of the three axes.
        sections = decoder.config.rope_scaling["mrope_section"] * 2
        pair = tuple(
            torch.cat([axes[number % 3] for number, axes in enumerate(one.split(sections, -1))], -1) for one in pair
        )
    cosines, sines = pair
    return cosines[:, None], sines[:, None]


def query_heads(layer: Any, normed: Tensor, turned: Rotation | None) -> Tensor:
    """(1, H, n, D) queries of states behind the layer's `input_layernorm`; turned: `None` for none."""
    return _heads(layer.self_attn, "q", normed, turned)


def key_heads(layer: Any, normed: Tensor, turned: Rotation | None) -> Tensor:
    """(1, Hkv, n, D) keys, otherwise as `query_heads`."""
    return _heads(layer.self_attn, "k", normed, turned)


def value_heads(layer: Any, normed: Tensor) -> Tensor:
    """(1, Hkv, n, D) values."""
    return _heads(layer.self_attn, "v", normed, None)


def _heads(attention: Any, kind: str, normed: Tensor, turned: Rotation | None) -> Tensor:
    heads = getattr(attention, f"{kind}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{kind}_norm", None)
    heads = (heads if norm is None else norm(heads)).transpose(1, 2)
    if turned is None:
        return heads
    cosines, sines = turned
    first, second = heads.chunk(2, -1)
    return heads * cosines + torch.cat([-second, first], -1) * sines
