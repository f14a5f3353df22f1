"""`attention_received` as it is defined, in plain PyTorch: the whole matrix, in the dtype of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from ..attention_rows.reference import attention_rows_reference, columns_of_spans, visible_keys
from ..attention_rows.request import KeySpans, reduced_heads


def attention_received_reference(
    query: Tensor,
    key: Tensor,
    *,
    key_spans: KeySpans | None = None,
    reduction: Literal["sum", "mean", "max"] = "sum",
    head_reduction: Literal["mean", "none", "kv_group"] | Tensor | Sequence[float] = "mean",
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """What each key receives, and lse, of dense inputs, as `attention_received` documents its arguments.

    float64 inputs give an oracle. Nothing is checked. arguments: masks, scale, softcap, and `grouped` as in
    `scaled_scores`.
    """
    weights, lse = attention_rows_reference(query, key, head_reduction="none", **arguments)
    # Of no queries there is no maximum.
    received = weights.amax(2) if reduction == "max" and weights.shape[2] else weights.sum(2)
    if reduction == "mean":
        positions, causal, window = (arguments.get(name) for name in ("q_positions", "causal", "window"))
        limits = arguments.get("kv_starts"), arguments.get("kv_lens")
        visible = visible_keys(query, key, positions, bool(causal), window, *limits)
        received = received / visible.sum(1).clamp(min=1)[:, None]
    return columns_of_spans(reduced_heads(received, head_reduction, key.shape[1]), key_spans), lse
