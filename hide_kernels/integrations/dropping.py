"""A prompt that grows shorter on its way through a Hugging Face decoder: tokens are dropped behind a layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def drop_tokens(model: PreTrainedModel, *, behind: int, keep: Callable[[], Sequence[int] | Tensor]) -> Iterator[None]:
    """Let the decoder's later layers go on with a part of the prompt's tokens, at the positions that they have.

    Hidden states, rotary embeddings and masks of the others are left out, and so are their keys and values, in the
    prompt's forward and in the decode behind it; earlier layers keep all. With `capture_attention(on_layer=)`, which
    sees the weights before that, it is pruning by attention: FastV (arXiv 2403.06764) in `examples/fastv.py`. Nested
    blocks drop more, behind later layers. Only forwards of the thread that opened the block are changed.

    Args:
        model: a Hugging Face decoder, or a model with one, whose layers are given `position_embeddings`; prompts in one
            forward, in a cache that is not preallocated.
        behind: the last zero-based layer that runs on all tokens; negative ones count from the last.
        keep: called once for every forward of more than one token, between the two layers; increasing positions in
            what is left of the prompt, of all samples. The last one is to be kept where a token is predicted from it.

    Raises:
        ValueError: for a layer that the model does not have or that none comes behind, for one before which the model
            adds features of an image to all of its tokens (Qwen3-VL's first layers), and in a forward for layers
            that are not given position embeddings.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise ValueError(f"model: got {type(model).__name__}, want a decoder with layers")
    depth = len(layers)
    last = behind % depth
    if not -depth <= behind < depth or last == depth - 1:
        raise ValueError(f"behind: got {behind}, want 0 to {depth - 2}, layers that others come behind")
    added = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if last < added - 1:
        raise ValueError(
            f"behind: got {behind}, want {added - 1} or more: until there features are added to all tokens"
        )
    shortened = _Shortened(keep)
    with ExitStack() as hooks:
        for layer in layers[last + 1 :]:
            first = layer is layers[last + 1]
            hook = shortened.first_layer if first else shortened.later_layer
            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


class _Shortened:
    """What layers are given in place of what all tokens have: hooks before their forwards."""

    def __init__(self, keep: Callable[[], Sequence[int] | Tensor]) -> None:
        self._keep = keep
        self._thread = threading.get_ident()
        # Of the prompt, and of how many tokens.
        self._kept = torch.empty(0, dtype=torch.long)
        self._tokens = 0

    def first_layer(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """The hidden states of all tokens come in, and those of a part go on."""
        if self._thread != threading.get_ident():
            return None
        if _length(kwargs) > 1:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._tokens = hidden.shape[1]
            self._kept = torch.as_tensor(self._keep(), dtype=torch.long, device=hidden.device)
            hidden = hidden[:, self._kept]
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
        return self.later_layer(layer, args, kwargs)

    def later_layer(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """What was made once for all layers."""
        if self._thread != threading.get_ident():
            return None
        mask, kept, changed = kwargs.get("attention_mask"), self._kept, dict(kwargs)
        prompt = _length(kwargs) > 1
        if mask is not None:
            keys = kept if prompt else torch.cat([kept, torch.arange(self._tokens, mask.shape[-1]).to(kept)])
            mask = mask[..., keys]
            changed["attention_mask"] = mask[..., kept, :] if prompt and mask.dim() == 4 else mask
        if prompt:
            changed["position_embeddings"] = tuple(x[..., kept, :] for x in kwargs["position_embeddings"])
            if kwargs.get("position_ids") is not None:
                changed["position_ids"] = kwargs["position_ids"][..., kept]
        return args, changed


def _length(kwargs: dict[str, Any]) -> int:
    """Of the tokens of a forward."""
    if kwargs.get("position_embeddings") is None:
        raise ValueError("drop_tokens: the model gives its layers no position_embeddings, want one that does")
    return int(kwargs["position_embeddings"][0].shape[-2])
