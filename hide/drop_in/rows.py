"""Attention rows as published code hands them on, or as ours does, to the rows over each picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hide_kernels import AttentionRows
from hide_kernels.integrations.recorder import CapturedAttention

Rows = AttentionRows | CapturedAttention
Attention = Sequence[Any] | Rows | Mapping[int, Rows]
"""Rows of the text behind the pictures, heads averaged, in one of three forms.

A list over layers, `None` for layers without rows: `attention[layer][0][0][position]` is a NumPy row over all keys, or
`None` where it was not computed. This is what published code returns, and `patch_attention`.
An `AttentionRows` or `CapturedAttention`: rows (1, T, C), row r being that of position `start_k + r`; C are all keys,
or the pictures' keys one after another.
What `capture_attention` yields: such rows for several layers.
"""


def rows_over(
    attention: Attention, positions: Sequence[int], start_k: int, spans: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Per half-open span of keys (len(positions), length) float32, the mean over the layers that have rows."""
    if isinstance(attention, Rows):
        per_layer = [_columns(attention[0], positions, start_k, spans)]
    elif isinstance(attention, Mapping):
        per_layer = [_columns(of_layer[0], positions, start_k, spans) for of_layer in attention.values()]
    elif isinstance(attention, Sequence) and not isinstance(attention, str):
        computed = [(layer, rows) for layer, rows in enumerate(attention) if rows is not None]
        per_layer = [_stacked(rows, positions, layer, spans) for layer, rows in computed]
    else:
        raise TypeError(f"attention: got {type(attention).__name__}, want a list over layers, or captured rows")
    if not per_layer:
        raise ValueError("attention: got no layer with rows, want at least one")
    return [torch.stack(layers).mean(dim=0) for layers in zip(*per_layer, strict=True)]


def _columns(rows: Tensor, positions: Sequence[int], start_k: int, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
    if rows.dim() != 3 or rows.shape[0] != 1:
        raise ValueError(f"attention: got rows of shape {tuple(rows.shape)}, want (1, T, C), heads averaged")
    wanted = [position - start_k for position in positions]
    if wanted and rows.shape[1] <= wanted[-1]:
        raise ValueError(
            f"attention: got {rows.shape[1]} rows, want those of {wanted[-1] + 1} positions from start_k on"
        )
    lengths = [stop - start for start, stop in spans]
    chosen = rows[0, wanted].float()
    if rows.shape[2] == sum(lengths):
        return list(chosen.split(lengths, dim=1))
    if rows.shape[2] < max(stop for _, stop in spans):
        raise ValueError(f"attention: got {rows.shape[2]} keys, want all keys or the pictures' {sum(lengths)}")
    return [chosen[:, start:stop] for start, stop in spans]


def _stacked(nested: Any, positions: Sequence[int], layer: int, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
    try:
        rows = [nested[0][0][position] for position in positions]
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"attention[{layer}]: want [batch][0][position] up to {positions[-1]}: {error}") from None
    for position, row in zip(positions, rows, strict=True):
        if row is None or len(row) < spans[-1][1]:
            what = "no row" if row is None else f"a row of {len(row)} keys"
            raise ValueError(f"attention[{layer}]: got {what} at position {position}, want one over all keys")
    return [
        torch.from_numpy(np.array([row[start:stop] for row in rows], np.float32).reshape(len(rows), stop - start))
        for start, stop in spans
    ]
