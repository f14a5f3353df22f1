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
) -> tuple[Tensor, Tensor]:
    """All heads' softmax rows with the whole score matrix, computed in the dtype of `query`.

    Pass float64 for an oracle, or the dtype under test for the error that a plain expression of that dtype makes.

    Args:
        query: (B, Hq, R, D). key: (B, Hkv, N, D).
        visible: bool, broadcastable to (B, Hq, R, N); `None`: every key.

    Returns:
        Probabilities (B, Hq, R, N) and lse (B, Hq, R). Rows that see nothing are zeros with lse -inf.
    """
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = torch.where(visible, scores, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    seen = (lse > -torch.inf)[..., None]
    rows = torch.where(seen, torch.exp(scores - torch.where(seen, lse[..., None], 0.0)), 0.0)
    return rows, lse


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
