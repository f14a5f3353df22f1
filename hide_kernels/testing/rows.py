"""The definitions of `attention_rows` and `attention_received` for every layout, and the error that an implementation
may have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from hide_kernels.attention_received.reference import attention_received_reference
from hide_kernels.attention_rows.reference import attention_rows_reference, scaled_scores, softmax_rows


def eager_attention_rows(
    query: Tensor, key: Tensor, visible: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """All heads' softmax rows (B, Hq, R, N) and lse (B, Hq, R), in the dtype of `query`, under any mask.

    visible: bool, broadcastable to the rows; `None`: every key. settings: as `scaled_scores` takes them.
    """
    return softmax_rows(scaled_scores(query, key, **settings), visible)


def textbook_attention_rows(query: Tensor, key: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """`attention_rows_reference`, also of packed and paged inputs: taken apart key by key, each sample a dense call.

    Of the arguments of `attention_rows` those that say how (`lse`, `return_lse`, `backend`) change nothing.
    """
    return _textbook(attention_rows_reference, query, key, **arguments)


def textbook_attention_received(query: Tensor, key: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """`attention_received_reference`, in the same way."""
    return _textbook(attention_received_reference, query, key, **arguments)


def _textbook(
    reference: Callable[..., tuple[Tensor, Tensor]], query: Tensor, key: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor]:
    arguments = {name: x for name, x in arguments.items() if name not in ("return_lse", "lse", "backend")}
    if any(arguments.get(name) is not None for name in ("cu_seqlens_q", "cu_seqlens_k", "block_table")):
        return _textbook_by_sample(reference, query, key, **arguments)
    return reference(query, key, **arguments)


def _textbook_by_sample(
    reference: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    starts, lens = arguments.pop("kv_starts", None), arguments.pop("kv_lens", None)
    positions, spans = arguments.pop("q_positions", None), arguments.pop("key_spans", None)
    size = key.shape[1]
    q_ends = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
    batch = len(query) if q_ends is None else len(q_ends) - 1
    most = max_seqlen_k or (key.shape[2] if block_table is None else block_table.shape[1] * size)
    nested = spans is not None and any(len(span) == 0 or not isinstance(span[0], int) for span in spans)
    results = []
    for b in range(batch):
        # Past its own keys a sample has hidden ones, so that columns are the same for all.
        if block_table is not None:
            length = most if lens is None else min(most, max(0, int(lens[b])))
            n = range(length)
            own = [key[int(block_table[b, i // size]), i % size] for i in n if starts is None or i >= int(starts[b])]
            keys = torch.stack([torch.zeros_like(key[0, 0])] * (length - len(own)) + own) if length else key[:0, 0]
        elif cu_seqlens_k is not None:
            keys = key[int(cu_seqlens_k[b]) : int(cu_seqlens_k[b + 1])][:most]
        else:
            keys = key[b].transpose(0, 1)
        seen = min(len(keys), len(keys) if lens is None else int(lens[b]))
        alone: dict[str, Any] = {"kv_lens": torch.tensor([seen], device=query.device)}
        if starts is not None:
            alone["kv_starts"] = starts[b : b + 1]
        keys = torch.cat([keys, keys.new_zeros(most - len(keys), *keys.shape[1:])])
        rows = query[b] if q_ends is None else query[q_ends[b] : q_ends[b + 1]][:max_seqlen_q].transpose(0, 1)
        if positions is not None:
            of_sample = positions.expand(batch, -1)[b] if q_ends is None else positions[q_ends[b] : q_ends[b + 1]]
            alone["q_positions"] = of_sample[None, :max_seqlen_q]
        own_spans = [spans[b]] if nested else spans
        keys = keys.transpose(0, 1)[None]
        results.append(reference(rows[None], keys, key_spans=own_spans, **alone, **arguments))
    width = max([0, *(rows.shape[-1] for rows, _ in results)])
    padded = [torch.nn.functional.pad(rows[0], (0, width - rows.shape[-1])) for rows, _ in results]
    if q_ends is None or arguments.get("row_reduction") or reference is attention_received_reference:
        stacked = torch.stack([torch.where(rows.isnan(), 0.0, rows) for rows in padded])  # a mean over no rows is 0
    else:
        stacked = query.new_zeros(len(query), *padded[0].shape[:-2], width)
        for b, rows in enumerate(padded):
            stacked[q_ends[b] : q_ends[b] + rows.shape[-2]] = rows.movedim(-2, 0)
    if not arguments.get("softmax", True):
        return stacked, query.new_empty(0)
    lses = [lse[0] for _, lse in results]
    if q_ends is None:
        return stacked, torch.stack(lses)
    packed_lse = query.new_full((query.shape[1], len(query)), -torch.inf)
    for b, lse in enumerate(lses):
        packed_lse[:, q_ends[b] : q_ends[b] + lse.shape[-1]] = lse
    return stacked, packed_lse


def error_budget(plain: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """Largest absolute error allowed against a float64 `oracle` where inputs are of `dtype`.

    plain: the plain expression of the inputs as they are, computed in float32 (of float64 inputs in float64).

    Of 32 and 64 bits: twice the sum of the plain expression's error and of the rounding of the oracle to the output's
    float32, and two units in the last place of the peak, which a GPU's exp2 may be wrong by and the plain expression's
    is not. Of 16 bits: four times the plain expression's error and 8 units in the last place of the peak, because a
    16-bit expression's own error would let a result pass that is wrong by a hundredth.
    """
    if not oracle.numel():
        return 0.0
    error = (plain.double() - oracle).abs().max().item()
    unit = float(np.spacing(np.float32(oracle.abs().max().item())))
    if dtype.itemsize == 2:
        return 4 * error + 8 * unit
    return 2 * (error + (oracle.float().double() - oracle).abs().max().item() + unit)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, every `torch.empty*` and `new_empty*` returns NaN, or integers that are no index, so that memory read
    before it is written shows."""
    owners: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    owners += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]

    def poison(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    with ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield
