"""The textbook expression of `attention_rows`, in any dtype, and the error that an implementation may have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def eager_attention_rows(
    query: Tensor,
    key: Tensor,
    visible: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    grouped: bool = False,
) -> tuple[Tensor, Tensor]:
    """All heads' softmax rows with the whole score matrix, computed in the dtype of `query`.

    Pass float64 for an oracle, or the dtype under test for the error that a plain expression of that dtype makes.

    Args:
        query: (B, Hq, R, D). key: (B, Hkv, N, D).
        visible: bool, broadcastable to (B, Hq, R, N); `None`: every key.
        grouped: multiply the heads of a group with their key at once instead of repeating it. The same sums, but a
            library of matrix products may add them up in another order, and err by several times more or less.

    Returns:
        Probabilities (B, Hq, R, N) and lse (B, Hq, R). Rows that see nothing are zeros with lse -inf.
    """
    groups = query.shape[1] // key.shape[1]
    scores = _products(query, key, groups, grouped)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = torch.where(visible, scores, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    seen = (lse > -torch.inf)[..., None]
    rows = torch.where(seen, torch.exp(scores - torch.where(seen, lse[..., None], 0.0)), 0.0)
    return rows, lse


def _products(query: Tensor, key: Tensor, groups: int, grouped: bool) -> Tensor:
    if not grouped:
        return query @ key.repeat_interleave(groups, dim=1).transpose(2, 3)
    together = query.unflatten(1, (-1, groups)).flatten(2, 3) @ key.transpose(2, 3)
    return together.view(*query.shape[:3], key.shape[2])


def textbook_attention_rows(
    query: Tensor, key: Tensor, *, grouped: bool = False, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """`attention_rows(query, key, **arguments)` by whole matrices, in the dtype of `query`: rows and lse.

    `grouped` is as `eager_attention_rows` documents it.

    Takes the arguments that say what is computed, not those that say how (`out`, `lse`, `backend`). Packed and paged
    inputs are taken apart on the host, key by key, and each sample is a dense call.
    """
    if any(arguments.get(name) is not None for name in ("cu_seqlens_q", "cu_seqlens_k", "block_table")):
        return _textbook_by_sample(query, key, grouped=grouped, **arguments)
    batch, heads, rows, _ = query.shape
    kv_heads, length = key.shape[1:3]
    unused = {"return_lse", "lse", "backend"}
    known = {"key_spans", "q_positions", "causal", "window", "kv_starts", "kv_lens", "scale", "softcap", "softmax"}
    assert set(arguments) <= known | unused | {"head_reduction", "row_reduction"}, arguments
    visible = _visible(batch, rows, length, arguments).to(query.device)
    # Keys that no row of a sample sees may hold anything.
    key = key.masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    settings = {name: arguments.get(name) for name in ("scale", "softcap")}
    if arguments.get("softmax", True):
        result, lse = eager_attention_rows(query, key, visible[:, None], grouped=grouped, **settings)
    else:
        result = _products(query, key, heads // kv_heads, grouped)
        result = result * (query.shape[-1] ** -0.5 if settings["scale"] is None else settings["scale"])
        if settings["softcap"] is not None:
            result = settings["softcap"] * torch.tanh(result / settings["softcap"])
        result, lse = result.masked_fill(~visible[:, None], 0.0), result.new_empty(0)
    reduction = arguments.get("head_reduction", "mean")
    if isinstance(reduction, str):
        if reduction != "none":
            result = result.mean(1) if reduction == "mean" else result.unflatten(1, (kv_heads, -1)).mean(2)
    else:
        result = (result * torch.as_tensor(reduction).to(result)[:, None, None]).sum(1)
    result = _columns(result, arguments.get("key_spans"))
    if arguments.get("row_reduction"):
        result = getattr(result, arguments["row_reduction"])(-2)
    return result, lse


def _textbook_by_sample(
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
        alone: dict[str, Any] = {"kv_lens": torch.tensor([min(len(keys), len(keys) if lens is None else int(lens[b]))])}
        if starts is not None:
            alone["kv_starts"] = starts[b : b + 1]
        keys = torch.cat([keys, keys.new_zeros(most - len(keys), *keys.shape[1:])])
        rows = query[b] if q_ends is None else query[q_ends[b] : q_ends[b + 1]][:max_seqlen_q].transpose(0, 1)
        if positions is not None:
            of_sample = positions.expand(batch, -1)[b] if q_ends is None else positions[q_ends[b] : q_ends[b + 1]]
            alone["q_positions"] = of_sample[None, :max_seqlen_q]
        own_spans = [spans[b]] if nested else spans
        keys = keys.transpose(0, 1)[None]
        results.append(textbook_attention_rows(rows[None], keys, key_spans=own_spans, **alone, **arguments))
    width = max([0, *(rows.shape[-1] for rows, _ in results)])
    padded = [torch.nn.functional.pad(rows[0], (0, width - rows.shape[-1])) for rows, _ in results]
    if q_ends is None or arguments.get("row_reduction"):
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


def _visible(batch: int, rows: int, length: int, arguments: dict[str, Any]) -> Tensor:
    """The mask (B, R, N) that the arguments describe, on the CPU."""
    keys = torch.arange(length)
    visible = torch.ones(batch, rows, length, dtype=torch.bool)
    positions, window = arguments.get("q_positions"), arguments.get("window")
    if positions is not None and arguments.get("causal"):
        visible = visible & (keys <= positions.cpu().expand(batch, rows)[..., None])
    if positions is not None and window is not None:
        visible = visible & (keys > positions.cpu().expand(batch, rows)[..., None] - window)
    if arguments.get("kv_starts") is not None:
        visible = visible & (keys >= arguments["kv_starts"].cpu()[:, None, None])
    if arguments.get("kv_lens") is not None:
        visible = visible & (keys < arguments["kv_lens"].cpu()[:, None, None])
    return visible


def _columns(rows: Tensor, key_spans: Any) -> Tensor:
    """The columns of the spans one after another; samples with fewer are padded with zeros."""
    if key_spans is None:
        return rows
    nested = any(len(span) == 0 or not isinstance(span[0], int) for span in key_spans)
    of_sample = key_spans if nested else [key_spans] * len(rows)
    picked = [
        torch.cat([row[..., :0], *(row[..., start:stop] for start, stop in spans)], -1)
        for row, spans in zip(rows, of_sample, strict=True)
    ]
    width = max(row.shape[-1] for row in picked)
    return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[-1])) for row in picked])


def error_budget(plain: Tensor, oracle: Tensor) -> float:
    """Largest absolute error allowed against a float64 `oracle`.

    Twice the sum of what the plain expression in the dtype under test errs by, and the rounding of the oracle to the
    output's float32.
    """
    error = (plain.double() - oracle).abs().max().item() if oracle.numel() else 0.0
    rounding = (oracle.float().double() - oracle).abs().max().item() if oracle.numel() else 0.0
    return 2 * (error + rounding)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, every `torch.empty*` and `new_empty*` returns NaN, so that memory read before it is written shows."""
    owners: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    owners += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    with ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield
