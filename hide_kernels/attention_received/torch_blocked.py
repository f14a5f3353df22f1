"""`attention_received` in plain PyTorch, in a buffer of a few rows: the path that runs on any device.

The weights of some queries over all keys that they see are made in the buffer, reduced over these queries and added to
what each key has received, before the next queries take their place: one matrix product, where an lse of its own would
take two. Arithmetic is float32 for 16- and 32-bit inputs and float64 for float64. One sample at a time, and blocks that
do not depend on the batch: a sample has the same bits in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_rows.request import RowOutput, RowRequest, reduced_heads
from ..attention_rows.torch_blocked import dense_samples, of_sample, visible_interval, without_autocast
from .request import AttentionReceived, Reduction

# Weights held at once, in elements: 2 MB in float32, what a core keeps near.
BLOCK_ELEMENTS = 1 << 19
# Fewest queries of a matrix product, however many keys there are.
QUERIES_AT_LEAST = 32


@torch.no_grad()
def attention_received_torch(
    query: Tensor, key: Tensor, request: RowRequest, reduction: Reduction, output: RowOutput
) -> AttentionReceived:
    """The results of a validated request."""
    out, dtype = output.out, request.out_dtype(query)
    if out is None:
        out = torch.zeros(request.shape, dtype=dtype, device=query.device)
    elif not output.accumulate:
        out.zero_()
    lse = output.lse
    if lse is None and output.return_lse:
        lse = torch.full(request.lse_shape, -torch.inf, dtype=dtype, device=query.device)
    computed = None if lse is output.lse else lse
    packed = request.cu_seqlens_q is not None
    with without_autocast(query.device):
        for sample, (place, some, keys, alone) in enumerate(dense_samples(query, key, request)):
            if 0 in (some.shape[2], keys.shape[2]):
                continue
            own = (of_sample(x, place, packed) for x in (output.lse, computed))
            received = _received(some[0], keys[0], alone, reduction, dtype, *(None if x is None else x[0] for x in own))
            received = reduced_heads(received[None], request.head_reduction, request.kv_heads)[0]
            column = 0
            for start, stop in alone.spans[0]:
                out[sample, ..., column : column + stop - start].add_(received[..., start:stop])
                column += stop - start
    return AttentionReceived(out, lse if output.return_lse else None)


def _received(
    query: Tensor,
    key: Tensor,
    request: RowRequest,
    reduction: Reduction,
    dtype: torch.dtype,
    lse: Tensor | None,
    computed: Tensor | None,
) -> Tensor:
    """What each key of a sample receives from every head, (Hq, N), of query (Hq, R, D) and key (Hkv, N, D).

    lse: (Hq, R), given; else it is written into `computed`, if that is.
    """
    heads, rows, _ = query.shape
    kv_heads, length, _ = key.shape
    group = heads // kv_heads
    first, stop = (x.clamp(0, length).expand(rows) for x in visible_interval(request, 0, slice(0, rows), key.device))
    known = None if lse is None else lse.masked_fill(lse == -torch.inf, torch.inf)
    lowest, highest = 0, length
    if known is not None:  # only what is asked for is computed
        bounds = [bound for span in request.spans[0] if span[0] < span[1] for bound in span]
        lowest, highest = (min(bounds), max(bounds)) if bounds else (0, 0)

    rows_at_once = min(rows, max(QUERIES_AT_LEAST, BLOCK_ELEMENTS // (group * length)))
    kv_at_once = max(1, min(kv_heads, BLOCK_ELEMENTS // (group * length * rows_at_once)))
    # Memory is taken once: fresh pages for every block would cost more than the arithmetic on it.
    buffer = torch.empty(kv_at_once * group * rows_at_once * length, dtype=dtype, device=key.device)
    total = torch.zeros(heads, length, dtype=dtype, device=key.device)
    blocks = []
    for begin in range(0, rows, rows_at_once):
        some = slice(begin, min(begin + rows_at_once, rows))
        reach = torch.stack([first[some].amin(), first[some].amax(), stop[some].amin(), stop[some].amax()]).tolist()
        blocks.append((some, *reach))
    for begin in range(0, kv_heads, kv_at_once):
        some_kv = slice(begin, min(begin + kv_at_once, kv_heads))
        some_heads = slice(some_kv.start * group, some_kv.stop * group)
        keys = key[some_kv].to(dtype).transpose(1, 2)
        for some_rows, some_first, all_first, all_stop, some_stop in blocks:
            low, high = max(lowest, some_first), min(highest, some_stop)
            if low >= high:
                continue
            part = query[some_heads, some_rows].to(dtype).reshape(some_kv.stop - some_kv.start, -1, query.shape[2])
            weights = buffer[: part.shape[0] * part.shape[1] * (high - low)].view(*part.shape[:2], high - low)
            weights.baddbmm_(part, keys[..., low:high], beta=0, alpha=request.scale)
            if request.softcap is not None:
                weights.div_(request.softcap).tanh_().mul_(request.softcap)
            weights = weights.view(some_heads.stop - some_heads.start, -1, high - low)
            # Hidden keys lie at either end of what the block's queries see.
            ends = [(low, min(high, all_first)), (max(low, min(high, all_first), all_stop), high)]
            for begin_end, stop_end in ends:
                if begin_end < stop_end:
                    n = torch.arange(begin_end, stop_end, device=key.device)
                    hidden = (n < first[some_rows, None]) | (n >= stop[some_rows, None])
                    weights[..., begin_end - low : stop_end - low].masked_fill_(hidden, -torch.inf)
            if known is not None:
                weights.sub_(known[some_heads, some_rows, None]).exp_()
            else:
                top = None if computed is None else weights.amax(-1)
                torch.softmax(weights, -1, out=weights)  # row by row, so in place
                blind = first[some_rows] >= stop[some_rows]  # queries that see nothing
                if bool(blind.any()):
                    weights.masked_fill_(blind[:, None], 0.0)
                if computed is not None and top is not None:
                    # The largest probability is exp(top - lse).
                    found = top - weights.amax(-1).log()
                    computed[some_heads, some_rows] = found.masked_fill(blind, -torch.inf)
            if reduction == "max":
                torch.maximum(total[some_heads, low:high], weights.amax(1), out=total[some_heads, low:high])
            else:
                total[some_heads, low:high] += weights.sum(1)
    if reduction == "mean":
        total /= _queries_that_see(first, stop, heads, length, known).clamp_(min=1)
    return total


def _queries_that_see(first: Tensor, stop: Tensor, heads: int, length: int, known: Tensor | None) -> Tensor:
    """(Hq, N): how many queries, of those with a finite lse, see each key."""
    seeing = torch.ones(heads, len(first), device=first.device) if known is None else known.isfinite().float()
    change = torch.zeros(heads, length + 1, dtype=seeing.dtype, device=first.device)
    # Where a query's interval ends before it begins lie keys that no query sees: what is counted there divides nothing.
    change.index_add_(1, first, seeing).index_add_(1, stop, seeing, alpha=-1)
    return change.cumsum(1)[:, :length]
