"""An attention class whose forward also returns the rows of chosen tokens, as in published HiDe's model files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hide.drop_in.install import Replaced
from hide_kernels.integrations.recorder import CapturedLayers
from hide_kernels.integrations.transformers import capture_module

NestedRows = list[list[list[NDArray[np.float32] | None]]]


def patch_attention(
    attention_class: type[nn.Module],
    *,
    layers: Sequence[int] | None = None,
    forward: Callable[..., Any] | None = None,
) -> Replaced:
    """Give an attention class a forward that returns rows: softmax over all keys, not causal, mean over heads.

    The patched forward takes one keyword more, `target_indices`, which a model that passes unknown keywords on to its
    attention (those of transformers do) takes as well. With it the second value returned is a nested list
    `[batch][0][position]`: a float32 NumPy row over all keys for each position asked for, `None` for all others. The
    first value, hidden states and cache are those of the class's own forward, with the model's own implementation; and
    without `target_indices` nothing changes. transformers 5 leaves layers without rows out of `attentions`::

        with drop_in.patch_attention(Qwen2_5_VLAttention, layers=[14]):
            attention = model(**inputs, target_indices=range(start_k, end_k), output_attentions=True).attentions

    Args:
        attention_class: its forward calls transformers' attention interface, and its instances have `config`.
        layers: zero-based layers (`layer_idx`) whose rows are computed, the second value of others is `None`; `None`:
            all.
        forward: what runs in place of the class's own forward. For a fork whose forward computes rows itself: that of
            the class in transformers which it was made from.

    Returns:
        `Replaced`; its `restore()`, or leaving a `with` block, puts the forward back.

    Raises:
        TypeError: for something that is not a module class.
        ValueError: in the forward, for positions that it has no query for, and as `capture_attention`.
    """
    if not (isinstance(attention_class, type) and issubclass(attention_class, nn.Module)):
        raise TypeError(f"attention_class: got {attention_class!r}, want a class of attention modules")
    base: Callable[..., Any] = attention_class.forward if forward is None else forward
    wanted = None if layers is None else set(layers)

    @wraps(base)
    def with_rows(self: Any, *args: Any, target_indices: Iterable[int] | None = None, **kwargs: Any) -> Any:
        if target_indices is None:
            return base(self, *args, **kwargs)
        if wanted is not None and getattr(self, "layer_idx", None) not in wanted:
            output = base(self, *args, **kwargs)
            return output[0], None, *output[2:]
        if "output_attentions" in kwargs:
            # It is ours to give; the model's own would be the whole matrix, or a complaint.
            kwargs["output_attentions"] = False
        positions = sorted({int(position) for position in target_indices})
        with capture_module(self, queries=positions, causal=False) as captured:
            output = base(self, *args, **kwargs)
        return output[0], _nested(captured, positions), *output[2:]

    done = Replaced()
    done.put(attention_class, "forward", with_rows)
    return done


def _nested(captured: CapturedLayers, positions: Sequence[int]) -> NestedRows:
    (found,) = captured.values()
    batch = []
    for rows in found.weights.float().cpu().numpy():
        places: list[NDArray[np.float32] | None] = [None] * rows.shape[1]
        for position, row in zip(positions, rows, strict=True):
            places[position] = row
        batch.append([places])
    return batch
