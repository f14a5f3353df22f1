"""Forwards through a model's decoder behind a cache: all of its layers, or some and later the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from hide.engine.chunked_sdpa import continuing
from hide.engine.kv_cache import PreallocatedCache, cache_keyword
from hide.models.base import Adapter
from hide.models.inputs import Features


class Decoded(NamedTuple):
    """A greedy reply.

    tokens: with the one that ended it. margin: how far the score of the first lies above the second best, in nats.
    """

    tokens: list[int]
    margin: float


def extend(
    model: Adapter,
    cache: PreallocatedCache,
    ids: Tensor,
    positions: Tensor,
    features: Features | None = None,
    *,
    attention_mask: Tensor | None = None,
    layers: range | None = None,
    hidden: Tensor | None = None,
    taps: Sequence[int] = (),
) -> tuple[Tensor, dict[int, Tensor]]:
    """Send tokens through the decoder behind those in `cache`, which keeps theirs too.

    Args:
        ids: (B, n) int64; features: of the image tokens among them. positions: (P, B, n) or (B, n).
        attention_mask: (B, length with the new tokens), 0 for padding; `None`: there is none.
        layers: which of them, without a step; `None`: all.
        hidden: (B, n, hidden), what enters the first of `layers` where that is not layer 0.
        taps: layers whose inputs are returned.

    Returns:
        (B, n, hidden): after the final norm where the last layer is among `layers`, else what enters the next layer;
        and per tap (B, n, hidden), what enters that layer. The tap `num_layers` is what enters the final norm.
    """
    decoder = model.language_model
    layers = range(model.num_layers) if layers is None else layers
    with model.alone():
        arguments = _entering(model, ids, features, layers, hidden)
        with (
            only_layers(decoder, layers),
            cache.from_layer(layers.start),
            continuing(decoder),
            _tapped(decoder, taps) as found,
        ):
            last = decoder(
                position_ids=positions.to(model.input_device),
                attention_mask=None if attention_mask is None else attention_mask.to(model.input_device),
                use_cache=True,
                **{cache_keyword(type(decoder).forward): cache},
                **arguments,
            ).last_hidden_state
    return last, found


def forward(
    model: Adapter, ids: Tensor, positions: Tensor, features: Features | None = None, *, layers: range | None = None
) -> Tensor:
    """As `extend`, of (1, n) ids that nothing comes before, and without a cache.

    Gradients are the caller's business: without them stand inside `Adapter.alone`.
    """
    decoder = model.language_model
    layers = range(model.num_layers) if layers is None else layers
    arguments = _entering(model, ids, features, layers, None)
    with only_layers(decoder, layers), continuing(decoder):
        last: Tensor = decoder(
            position_ids=positions.to(model.input_device), use_cache=False, **arguments
        ).last_hidden_state
    return last


def _entering(
    model: Adapter, ids: Tensor, features: Features | None, layers: range, hidden: Tensor | None
) -> dict[str, Any]:
    """What enters the first of `layers`, as arguments of the decoder; see `extend`."""
    device = model.input_device
    ids = ids.to(device)
    if layers.start == 0:
        hidden = model.language_model.get_input_embeddings()(ids)
        if features is not None and len(features.embeddings):
            image = (ids == model.image_token)[..., None]
            hidden = hidden.masked_scatter(image, features.embeddings.to(device, hidden.dtype))
    elif hidden is None:
        raise ValueError(f"hidden: got None, want what enters layer {layers.start}")
    arguments: dict[str, Any] = {"inputs_embeds": hidden}
    if features is not None and len(features.embeddings):
        # Added behind layer 0, 1, ...: those that are not behind the layers asked for.
        added = [layer.to(device, hidden.dtype) for layer in features.deepstack[layers.start : layers.stop]]
        if added:
            arguments |= {"visual_pos_masks": ids == model.image_token, "deepstack_visual_embeds": added}
    return arguments


def continue_ids(
    model: Adapter, ids: Tensor, cache: PreallocatedCache, delta: Tensor | None, *, max_new_tokens: int
) -> Decoded:
    """The greedy reply to (1, L) ids whose cache holds all but the last, by the model's own `generate`.

    delta: as `Adapter.positions` gives it.
    """
    inputs = {"input_ids": ids.to(model.input_device)}
    held = {cache_keyword(type(model.language_model).forward): cache}
    with model.alone():
        if delta is None:
            return greedy_reply(model, inputs, max_new_tokens, **held)
        base = model.model.model
        before = base.rope_deltas
        # A value of another prompt would be taken for this one's.
        base.rope_deltas = delta.to(inputs["input_ids"].device)
        try:
            return greedy_reply(model, inputs, max_new_tokens, **held)
        finally:
            base.rope_deltas = before


def greedy_reply(model: Adapter, inputs: dict[str, Tensor], max_new_tokens: int, **more: Any) -> Decoded:
    """What `generate` adds to its inputs. The checkpoint's repetition penalty and end tokens stay in force."""
    first = _FirstMargin()
    # As arguments, not as a generation_config: transformers 4.57 puts the checkpoint's values back where a config's
    # equal the library's defaults, and do_sample=False is one.
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    reply = model.model.generate(
        **inputs,
        **more,
        use_cache=True,
        cache_implementation=None,
        return_dict_in_generate=False,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        logits_processor=LogitsProcessorList([first]),
    )
    return Decoded(reply[0, inputs["input_ids"].shape[1] :].tolist(), float(first.margins[0]))


def margins(scores: Tensor) -> Tensor:
    """(B,) how far the best of (B, V) scores lies above the second: the difference of their log-probabilities."""
    best, second = scores.float().topk(2).values.unbind(-1)
    return best - second


class _FirstMargin(LogitsProcessor):
    """Looks at the scores of the first new token, which `generate` hands on behind all processors of its own."""

    def __init__(self) -> None:
        self.margins: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.margins:
            self.margins.append(margins(scores)[0])
        return scores


@contextmanager
def only_layers(decoder: Any, layers: range | nn.ModuleList) -> Iterator[None]:
    """Inside, the decoder runs these layers alone, and its final norm only behind its last one; modules stand in the
    place of its own."""
    # In front of the module's own, which stay where they are: other threads may be looking through the modules.
    own = vars(decoder)
    if isinstance(layers, nn.ModuleList) or layers.stop < len(decoder.layers):
        own["norm"] = lambda hidden: hidden
    if isinstance(layers, nn.ModuleList):
        own["layers"] = layers
    elif len(layers) < len(decoder.layers):
        own["layers"] = decoder.layers[layers.start : layers.stop]
    try:
        yield
    finally:
        own.pop("layers", None)
        own.pop("norm", None)


@contextmanager
def _tapped(decoder: Any, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, what enters these layers in the forward is kept."""
    found: dict[int, Tensor] = {}
    # Layers by their index in the whole decoder: a tap outside of those that run is not reached.
    whole = [*decoder._modules["layers"], decoder._modules["norm"]]

    def keep(tap: int) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found[tap] = arguments[0] if arguments else keywords["hidden_states"]

        return hook

    hooks = [whole[tap].register_forward_pre_hook(keep(tap), with_kwargs=True) for tap in taps]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
