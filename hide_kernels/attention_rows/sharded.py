"""`attention_rows` of ranks that each hold a part of the heads or of the keys, joined by all-reduces.

Heads: sums over heads are summed over ranks. Keys: each rank's lse over its own keys becomes the lse over all of them,
log sum_i exp lse_i, before its rows are computed with it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import api
from .request import RowRequest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def sharded_rows(
    name: str,
    query: Tensor,
    key: Tensor,
    request: RowRequest,
    lse: Tensor | None,
    return_lse: bool,
    out: Tensor | None,
    accumulate: bool,
    workspace: Tensor | None,
    group: ProcessGroup,
    shard: str,
) -> tuple[Tensor, Tensor | None]:
    """Rows and lse (or `None`) of a validated request that every rank of `group` makes of what it holds."""
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group: got {type(group).__name__}, want a torch.distributed.ProcessGroup")
    if shard == "keys":
        if request.softmax and lse is None:
            no_columns = dataclasses.replace(request, spans=[[]] * len(request.spans), shape=(*request.shape[:-1], 0))
            _, own = api.run(name, query, key, no_columns, None, True, None, False, workspace)
            assert own is not None
            lse = _join(own, group)
        rows, _ = api.run(name, query, key, request, lse, False, out, accumulate, workspace)
        return rows, lse if return_lse else None
    if isinstance(request.head_reduction, str) and request.head_reduction != "mean":
        return api.run(name, query, key, request, lse, return_lse, out, accumulate, workspace)
    # Collectives take contiguous memory, and what is added to must not be summed over ranks itself.
    direct = out is not None and out.is_contiguous() and not accumulate
    rows, lse = api.run(name, query, key, request, lse, return_lse, out if direct else None, False, workspace)
    dist.all_reduce(rows, group=group)
    if isinstance(request.head_reduction, str):
        rows /= dist.get_world_size(group)
    if out is None or direct:
        return rows, lse
    return (out.add_(rows) if accumulate else out.copy_(rows)), lse


def _join(lse: Tensor, group: ProcessGroup) -> Tensor:
    """log sum_i exp lse_i over the ranks; -inf where every rank has -inf."""
    import torch.distributed as dist

    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    top = torch.where(top == -torch.inf, 0.0, top)
    mass = torch.exp(lse - top)
    dist.all_reduce(mass, group=group)
    return top + torch.log(mass)
