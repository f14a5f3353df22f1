"""The two Triton kernels of `attention_received`; `triton_launch` plans and launches them behind those of the lse.

Names and layouts are those of `attention_rows.triton_kernels`. `receive` holds a block of keys of one head while the
queries pass by, and reduces their weights in registers; `join_heads` joins chunks of queries and reduces heads. Every
sum has one order: no atomics.
"""

# mypy: disable-error-code="no-untyped-def, operator, arg-type, assignment"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..attention_rows.triton_kernels import (
    _dot_pair,
    _dot_sliced,
    _keys_at,
    _load_pair,
    _packed,
    _page_of,
    _rows_at,
    _tanh,
    _visible_keys,
)

# Queries whose masks are looked at at once.
_SCAN = tl.constexpr(1024)

_RECEIVE_INTEGERS = [
    "first_sample", "first_column", "kv_heads", "group", "rows", "length", "chunk_rows", "total", "columns",
    "page_shift", "last_page", "stride_qb", "stride_qh", "stride_qr", "stride_kb", "stride_kh", "stride_kn",
    "stride_tb", "stride_lb", "stride_lh", "stride_lr", "stride_pb", "stride_pr", "ahead", "window", "start0", "stop0",
    "start1", "stop1", "start2", "stop2", "start3", "stop3",
]  # fmt: skip
_JOIN_INTEGERS = ["terms", "total", "columns", "chunks", "stride_ob", "stride_oh"]


@triton.jit(
    do_not_specialize=_RECEIVE_INTEGERS,
    do_not_specialize_on_alignment=[
        "lse", "positions", "starts", "lens", "cu_q", "cu_k", "pages", "partial", "counts",
    ],
)  # fmt: skip
def receive(
    query, key, lse, positions, starts, lens, cu_q, cu_k, pages, partial, counts,
    log2_scale: tl.float32, inner_scale: tl.float32, lse_scale: tl.float32,
    first_sample: tl.int32, first_column: tl.int32,
    kv_heads: tl.int32, group: tl.int32, rows: tl.int32, length: tl.int32, chunk_rows: tl.int32, total: tl.int32,
    columns: tl.int32, page_shift: tl.int32, last_page: tl.int32,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qr: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64, stride_tb: tl.int64,
    stride_lb: tl.int64, stride_lh: tl.int64, stride_lr: tl.int64, stride_pb: tl.int64, stride_pr: tl.int64,
    ahead: tl.int64, window: tl.int64,
    start0: tl.int32, stop0: tl.int32, start1: tl.int32, stop1: tl.int32,
    start2: tl.int32, stop2: tl.int32, start3: tl.int32, stop3: tl.int32,
    DEPTH: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, MAXIMUM: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """What a block of keys of up to four spans receives from a chunk of queries, of one head.

    Grid (blocks of all spans, chunks, samples * Hq). Writes `partial` [chunks, B * Hq, columns] and, where it is given,
    `counts`, laid like it: how many queries of a finite lse see each key.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    block_n = tl.program_id(0)
    start = start0
    stop = stop0
    column = first_column
    if block_n >= tl.cdiv(stop - start, BLOCK_N):
        block_n -= tl.cdiv(stop - start, BLOCK_N)
        column += stop - start
        start = start1
        stop = stop1
        if block_n >= tl.cdiv(stop - start, BLOCK_N):
            block_n -= tl.cdiv(stop - start, BLOCK_N)
            column += stop - start
            start = start2
            stop = stop2
            if block_n >= tl.cdiv(stop - start, BLOCK_N):
                block_n -= tl.cdiv(stop - start, BLOCK_N)
                column += stop - start
                start = start3
                stop = stop3
    start += block_n * BLOCK_N
    column += block_n * BLOCK_N
    stop = tl.minimum(stop, start + BLOCK_N)

    heads = kv_heads * group
    b = first_sample + tl.program_id(2) // heads
    h = tl.program_id(2) % heads
    k_head = key + (h // group).to(tl.int64) * (stride_kh * ALIGN)
    if pages is not None:
        pages += b.to(tl.int64) * stride_tb
    elif cu_k is not None:
        k_first, length = _packed(cu_k, b, length)
        k_head += k_first * (stride_kn * ALIGN)
    else:
        k_head += b.to(tl.int64) * (stride_kb * ALIGN)
    q_head = query + b.to(tl.int64) * (stride_qb * ALIGN) + h.to(tl.int64) * (stride_qh * ALIGN)
    lse_head = lse + b.to(tl.int64) * stride_lb + h * stride_lh
    if cu_q is not None:
        q_first, rows = _packed(cu_q, b, rows)
        q_head += q_first * (stride_qr * ALIGN)
        lse_head += q_first * stride_lr
        if positions is not None:
            positions += q_first * stride_pr

    # Keys that are not there are zeros, and nothing of theirs is kept.
    n = start + tl.arange(0, BLOCK_N)
    real = n < tl.minimum(stop, length)
    key_of = tl.maximum(tl.minimum(n, tl.minimum(stop, length) - 1), 0)
    page = _page_of(pages, key_of, page_shift, last_page)
    k_rows = _keys_at(k_head, pages, page, key_of, page_shift, stride_kb * ALIGN, stride_kn * ALIGN, WIDE)
    if SLICE == 0:
        k, k_high = _load_pair(k_rows, real, DEPTH, D1, D2)

    # Tiles of queries that see the whole block need no mask and are pipelined; the others, at either end, are masked.
    r_first = tl.program_id(1) * chunk_rows
    r_stop = tl.maximum(tl.minimum(r_first + chunk_rows, rows), r_first)
    if MASKED:
        some_first = r_stop
        some_stop = r_first
        all_first = r_stop
        all_stop = r_first
        number = 0
        for scanned in tl.range(r_first, r_stop, _SCAN, num_stages=1):
            r = scanned + tl.arange(0, _SCAN)
            first, last = _visible_keys(
                positions, starts, lens, b, tl.minimum(r, r_stop - 1), length, stride_pb, stride_pr, ahead, window,
                False,
            )  # fmt: skip
            some = (r < r_stop) & (first < stop) & (last > start) & (first < last)
            every = (r < r_stop) & (first <= start) & (last >= stop)
            some_first = tl.minimum(some_first, tl.min(tl.where(some, r, r_stop), 0))
            some_stop = tl.maximum(some_stop, tl.max(tl.where(some, r + 1, r_first), 0))
            all_first = tl.minimum(all_first, tl.min(tl.where(every, r, r_stop), 0))
            all_stop = tl.maximum(all_stop, tl.max(tl.where(every, r + 1, r_first), 0))
            number += tl.sum(every.to(tl.int32), 0)
        if number < all_stop - all_first:  # others between them
            all_stop = all_first
        some_first = r_first + tl.maximum(some_first - r_first, 0) // BLOCK_R * BLOCK_R
        all_first = r_first + tl.cdiv(all_first - r_first, BLOCK_R) * BLOCK_R
        all_stop = tl.maximum(all_first, r_first + (all_stop - r_first) // BLOCK_R * BLOCK_R)
    else:
        some_first = r_first
        some_stop = r_stop
        all_first = r_first
        all_stop = r_first + (r_stop - r_first) // BLOCK_R * BLOCK_R

    received = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.int32)
    for block in tl.range(all_first, all_stop, BLOCK_R, num_stages=STAGES):
        r = block + tl.arange(0, BLOCK_R)
        q_rows = _rows_at(q_head, r, stride_qr * ALIGN, WIDE)
        if SLICE == 0:
            q, q_high = _load_pair(q_rows, None, DEPTH, D1, D2)
            s = _dot_pair(k, k_high, q, q_high, D2)
        else:
            s = _dot_sliced(k_rows, q_rows, real, BLOCK_N, BLOCK_R, DEPTH, SLICE)
        if SOFTCAP:
            s = _tanh(s * inner_scale)
        normaliser = tl.load(lse_head + r * stride_lr)
        # A query that sees nothing: +inf, so that exp2 gives 0.
        normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser) * lse_scale
        p = tl.exp2(s * log2_scale - normaliser[None, :])
        if MAXIMUM:
            received = tl.maximum(received, tl.max(p, 1))
        else:
            received += tl.sum(p, 1)
        if counts is not None:
            count += tl.sum((normaliser < float("inf")).to(tl.int32), 0)
    whole = all_stop - all_first
    for masked in tl.range(some_first, some_stop - whole, BLOCK_R, num_stages=STAGES):
        block = masked
        if masked >= all_first:
            block = masked + whole
        r = block + tl.arange(0, BLOCK_R)
        inside = r < r_stop
        read = tl.minimum(r, r_stop - 1)
        q_rows = _rows_at(q_head, read, stride_qr * ALIGN, WIDE)
        if SLICE == 0:
            q, q_high = _load_pair(q_rows, None, DEPTH, D1, D2)
            s = _dot_pair(k, k_high, q, q_high, D2)
        else:
            s = _dot_sliced(k_rows, q_rows, real, BLOCK_N, BLOCK_R, DEPTH, SLICE)
        if SOFTCAP:
            s = _tanh(s * inner_scale)
        normaliser = tl.load(lse_head + read * stride_lr, mask=inside, other=float("inf"))
        normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser) * lse_scale
        p = tl.exp2(s * log2_scale - normaliser[None, :])
        if MASKED:  # a select and no product: hidden keys may hold NaN
            first, last = _visible_keys(
                positions, starts, lens, b, read, length, stride_pb, stride_pr, ahead, window, False
            )
            seen = (n[:, None] >= first[None, :]) & (n[:, None] < last[None, :])
            p = tl.where(seen, p, 0.0)
            if counts is not None:
                count += tl.sum((seen & (normaliser < float("inf"))[None, :]).to(tl.int32), 1)
        elif counts is not None:
            count += tl.sum((normaliser < float("inf")).to(tl.int32), 0)
        if MAXIMUM:
            received = tl.maximum(received, tl.max(p, 1))
        else:
            received += tl.sum(p, 1)

    row = tl.program_id(1) * total + first_sample * heads + tl.program_id(2)
    cells = row.to(tl.int64) * columns + column + tl.arange(0, BLOCK_N)
    tl.store(partial + cells, tl.where(real, received, 0.0), mask=n < stop)
    if counts is not None:
        tl.store(counts + cells, tl.where(real, count, 0).to(tl.float32), mask=n < stop)


@triton.jit(
    do_not_specialize=_JOIN_INTEGERS,
    do_not_specialize_on_alignment=["partial", "counts", "weights", "out"],
)
def join_heads(
    partial, counts, weights, out, out_scale: tl.float32,
    terms: tl.int32, total: tl.int32, columns: tl.int32, chunks: tl.int32,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_oc: tl.int64,
    BLOCK: tl.constexpr, MAXIMUM: tl.constexpr, ACCUMULATE: tl.constexpr, UNIT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """`out` from `partial` [chunks, B * Hq, columns]: chunks joined, means taken, `terms` heads summed, in this order.

    Grid (blocks of columns, output heads, B).
    """
    if DEPENDENT:
        gdc_wait()
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    result = tl.zeros([BLOCK], tl.float32)
    for j in tl.range(0, terms, num_stages=1):
        h = tl.program_id(1) * terms + j  # of this sample
        row = tl.program_id(2) * (terms * tl.num_programs(1)) + h
        received = tl.zeros([BLOCK], tl.float32)
        count = tl.zeros([BLOCK], tl.float32)
        for chunk in tl.range(0, chunks, num_stages=1):
            cells = (chunk * total + row).to(tl.int64) * columns + c
            part = tl.load(partial + cells, mask=inside, other=0.0)
            received = tl.maximum(received, part) if MAXIMUM else received + part
            if counts is not None:
                count += tl.load(counts + cells, mask=inside, other=0.0)
        if counts is not None:
            received /= tl.maximum(count, 1.0)
        if weights is not None:
            received *= tl.load(weights + h)
        result += received
    result *= out_scale
    cells = out + tl.program_id(2).to(tl.int64) * stride_ob + tl.program_id(1).to(tl.int64) * stride_oh
    if UNIT:
        cells += c
    else:
        cells += c * stride_oc
    if ACCUMULATE:
        result += tl.load(cells, mask=inside, other=0.0)
    tl.store(cells, result, mask=inside)
