"""`attention_rows` of ranks that each hold a part of the heads or of the keys, joined by all-reduces.

Heads: sums over heads are summed over ranks. Keys: each rank's lse over its own keys becomes the lse over all of them,
log sum_i exp lse_i, before its rows are computed with it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .dispatch import run
from .request import AttentionRows, RowOutput, RowRequest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def sharded_rows(
    name: str, query: Tensor, key: Tensor, request: RowRequest, output: RowOutput, group: ProcessGroup, shard: str
) -> AttentionRows:
    """The results of a validated request that every rank of `group` makes of what it holds."""
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group: got {type(group).__name__}, want a torch.distributed.ProcessGroup")
    if shard == "keys":
        lse = output.lse
        if request.softmax and lse is None:
            no_columns = dataclasses.replace(request, spans=[[]] * len(request.spans), shape=(*request.shape[:-1], 0))
            _, own = run(name, query, key, no_columns, RowOutput(return_lse=True, workspace=output.workspace))
            assert own is not None
            lse = _join(own, group)
        return run(name, query, key, request, dataclasses.replace(output, lse=lse))
    if isinstance(request.head_reduction, str) and request.head_reduction != "mean":
        return run(name, query, key, request, output)
    # Collectives take contiguous memory, and what is added to must not be summed over ranks itself.
    out = output.out
    direct = out is not None and out.is_contiguous() and not output.accumulate
    here = dataclasses.replace(output, out=out if direct else None, accumulate=False)
    rows, lse = run(name, query, key, request, here)
    dist.all_reduce(rows, group=group)
    if isinstance(request.head_reduction, str):
        rows /= dist.get_world_size(group)
    if out is not None and not direct:
        rows = out.add_(rows) if output.accumulate else out.copy_(rows)
    return AttentionRows(rows, lse)


def _join(lse: Tensor, group: ProcessGroup) -> Tensor:
    """log sum_i exp lse_i over the ranks; -inf where every rank has -inf."""
    import torch.distributed as dist

    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    top = torch.where(top == -torch.inf, 0.0, top)
    mass = torch.exp(lse - top)
    dist.all_reduce(mass, group=group)
    return top + torch.log(mass)
