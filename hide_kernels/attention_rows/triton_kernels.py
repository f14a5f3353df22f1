"""The three Triton kernels of `attention_rows`; `triton_launch` plans and launches them.

Names: b sample, g key/value head, j member of its group of query heads (h = g * group + j), r chosen row, n key,
m packed (head, row) index of a tile. Scores are in log2 units, `t = log2(e) * s`, so that an exponential is one exp2.

`partial_lse` makes log-sum-exp per chunk of keys, `combine_lse` joins the chunks, `reduce_rows` recomputes the scores,
normalises, sums over heads in registers and writes each column once. What a row sees is one interval of keys,
whatever mask it comes from. Everything that changes from picture to picture (lengths, spans, strides) is a run-time
integer that Triton may not specialise on, so nothing recompiles for it. DEPENDENT: a card that starts a kernel before
the one in front has ended (programmatic dependent launch); every program waits for that one before it reads anything,
so that what comes after a call comes after all of its kernels. Strides come in units of `ALIGN` elements: the
compiler then knows that rows are 16-byte aligned without knowing the stride, and reads them in 16-byte pieces.

Where the keys and queries of a sample lie is one of a few layouts, and a pointer that is `None` says which: `cu_q` and
`cu_k` [B + 1] bound the samples of packed tensors, `pages` [B, pages] holds the pages of each sample's keys. What is
packed or paged has no stride over samples; `rows` and `length` are then the most of any sample.
"""

# mypy: disable-error-code="no-untyped-def, operator, arg-type, assignment"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Adding this to a position reaches past every key.
_UNBOUNDED = tl.constexpr(1 << 40)


@triton.jit
def _rows_at(base, index, stride, WIDE: tl.constexpr):
    """Pointers `base + index * stride`; 32-bit arithmetic where the launcher knows that it cannot overflow."""
    if WIDE:
        return base + index.to(tl.int64) * stride
    return base + index * stride.to(tl.int32)


@triton.jit
def _packed(bounds, b, at_most):
    """First index of sample b in a packed tensor, and its length."""
    first = tl.load(bounds + b).to(tl.int64)
    return first, tl.minimum(tl.load(bounds + b + 1) - first, at_most).to(tl.int32)


@triton.jit
def _page_of(pages, n, page_shift, last_page):
    """The pages that keys n lie in, some page where the table has none; n itself where there are no pages."""
    page = n
    if pages is not None:
        page = tl.minimum(tl.maximum(tl.load(pages + (n >> page_shift)).to(tl.int64), 0), last_page)
    return page


@triton.jit
def _keys_at(head, pages, page, n, page_shift, stride_page, stride, WIDE: tl.constexpr):
    """Pointers to keys n of a head, whose pages are known."""
    if pages is not None:
        return head + page * stride_page + (n & ((1 << page_shift) - 1)) * stride
    return _rows_at(head, n, stride, WIDE)


@triton.jit
def _load(rows, keep, FIRST: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of `rows`: zero past DEPTH, and where `keep` is given and False."""
    column = FIRST + tl.arange(0, WIDTH)
    pointers = rows[:, None] + column[None, :]
    if FIRST + WIDTH > DEPTH:
        inside = (column < DEPTH)[None, :]
        if keep is not None:
            inside = inside & keep[:, None]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif keep is not None:
        tile = tl.load(pointers, mask=keep[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _load_pair(rows, keep, DEPTH: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """A tile as two whose widths are powers of two (80 = 64 + 16): nothing is padded."""
    low = _load(rows, keep, 0, D1, DEPTH)
    high = low
    if D2 > 0:
        high = _load(rows, keep, D1, D2, DEPTH)
    return low, high


@triton.jit
def _dot_pair(a, a_high, b, b_high, D2: tl.constexpr):
    """a [M, D] . b [N, D]^T of 16-bit tiles, accumulated in float32."""
    product = tl.dot(a, tl.trans(b))
    if D2 > 0:
        product = tl.dot(a_high, tl.trans(b_high), acc=product)
    return product


@triton.jit
def _load_slice(k_rows, q_rows, real, first, SLICE: tl.constexpr, DEPTH: tl.constexpr):
    """Columns [first, first + SLICE) of keys and queries."""
    column = first + tl.arange(0, SLICE)
    if DEPTH % SLICE == 0:
        k = tl.load(k_rows[:, None] + column[None, :])
        q = tl.load(q_rows[:, None] + column[None, :], mask=real[:, None], other=0.0)
    else:
        inside = (column < DEPTH)[None, :]
        k = tl.load(k_rows[:, None] + column[None, :], mask=inside, other=0.0)
        q = tl.load(q_rows[:, None] + column[None, :], mask=inside & real[:, None], other=0.0)
    return k, q


@triton.jit
def _dot_sliced(a_rows, b_rows, keep, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, SLICE: tl.constexpr):
    """As `_dot_pair`, D in slices that are loaded here, in IEEE arithmetic for float32."""
    product = tl.zeros([M, N], tl.float32)
    for first in tl.range(0, DEPTH, SLICE, num_stages=1):
        column = first + tl.arange(0, SLICE)
        inside = (column < DEPTH)[None, :]
        a = tl.load(a_rows[:, None] + column[None, :], mask=inside & keep[:, None], other=0.0)
        b = tl.load(b_rows[:, None] + column[None, :], mask=inside, other=0.0)
        product = tl.dot(a, tl.trans(b), acc=product, input_precision="ieee")
    return product


@triton.jit
def _tanh(x):
    """Within 2e-7 of tanh, relatively, down to zero: an odd polynomial near zero, exponentials elsewhere."""
    square = x * x
    near = 0.13333245 + square * (-0.05395211 + square * (0.02173251 + square * (-0.00826235 + square * 0.0022267)))
    near = x + x * square * (-0.33333332 + square * near)
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def _visible_keys(
    positions, starts, lens, b, r, length, stride_pb, stride_pr, ahead, window, AGAIN: tl.constexpr
):  # fmt: skip
    """First and one past the last key that rows r see: int32 in [0, length], the last below the first for none.

    AGAIN: read anew, where the compiler would rather keep an earlier answer in registers.
    """
    first = tl.zeros_like(r)
    stop = tl.zeros_like(r) + length
    if starts is not None:
        start = tl.load(starts + b, volatile=AGAIN)
        first += tl.minimum(tl.maximum(start, 0), length).to(tl.int32)
    if lens is not None:
        stop = tl.minimum(stop, tl.minimum(tl.maximum(tl.load(lens + b, volatile=AGAIN), 0), length).to(tl.int32))
    if positions is not None:
        position = positions + b.to(tl.int64) * stride_pb + r.to(tl.int64) * stride_pr
        position = tl.load(position, volatile=AGAIN).to(tl.int64)
        position = tl.minimum(tl.maximum(position, -_UNBOUNDED), _UNBOUNDED)
        from_window = tl.minimum(tl.maximum(position - window + 1, 0), length)
        to_position = tl.minimum(tl.maximum(position + ahead + 1, 0), length)
        first = tl.maximum(first, from_window.to(tl.int32))
        stop = tl.minimum(stop, to_position.to(tl.int32))
    return first, stop


# Integers of a call, and pointers that are not read in wide pieces: no variant of a kernel for their values.
_LSE_INTEGERS = [
    "kv_heads", "group", "rows", "length", "total", "chunk_keys", "page_shift", "last_page", "stride_qb",
    "stride_qh", "stride_qr", "stride_kb", "stride_kh", "stride_kn", "stride_tb", "stride_pb", "stride_pr", "ahead",
    "window",
]  # fmt: skip
_ROWS_INTEGERS = [
    "first_sample", "first_row", "first_column", "kv_heads", "group", "rows", "length", "page_shift", "last_page",
    "stride_qb", "stride_qh", "stride_qr", "stride_kb", "stride_kh", "stride_kn", "stride_tb", "stride_lb", "stride_lh",
    "stride_lr", "stride_pb", "stride_pr", "stride_ob", "stride_oh", "stride_or", "ahead", "window", "start0", "stop0",
    "start1", "stop1", "start2", "stop2", "start3", "stop3",
]  # fmt: skip


@triton.jit(
    do_not_specialize=_LSE_INTEGERS,
    do_not_specialize_on_alignment=["partial", "positions", "starts", "lens", "cu_q", "cu_k", "pages"],
)
def partial_lse(
    query, key, partial, positions, starts, lens, cu_q, cu_k, pages,
    log2_scale: tl.float32, inner_scale: tl.float32,
    kv_heads: tl.int32, group: tl.int32, rows: tl.int32, length: tl.int32, total: tl.int32, chunk_keys: tl.int32,
    page_shift: tl.int32, last_page: tl.int32, stride_qb: tl.int64, stride_qh: tl.int64, stride_qr: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64, stride_tb: tl.int64,
    stride_pb: tl.int64, stride_pr: tl.int64, ahead: tl.int64, window: tl.int64,
    DEPTH: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, NEGATE: tl.constexpr, MASKED: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """log2-sum-exp2 of one chunk of keys, for BLOCK_M of the group * rows queries of one key/value head.

    Grid (chunks, tiles of group * rows, B * Hkv). Writes `partial` [chunks, B * Hq * R], or [chunks, Hq * total_q]
    if packed; -inf for a row that sees nothing in the chunk.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    b = tl.program_id(2) // kv_heads
    g = tl.program_id(2) % kv_heads
    if cu_q is not None:
        q_first, rows = _packed(cu_q, b, rows)
        if tl.program_id(1) * BLOCK_M >= group * rows:
            return
        query += q_first * (stride_qr * ALIGN)
        if positions is not None:
            positions += q_first * stride_pr
    packed = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(packed, group * rows - 1)  # past the end the last row is repeated and not stored
    j = m // rows
    r = m % rows
    q_rows = query + b.to(tl.int64) * (stride_qb * ALIGN) + g.to(tl.int64) * group * (stride_qh * ALIGN)
    q_rows = _rows_at(_rows_at(q_rows, j, stride_qh * ALIGN, WIDE), r, stride_qr * ALIGN, WIDE)
    k_head = key + g.to(tl.int64) * (stride_kh * ALIGN)
    if pages is not None:
        pages += b.to(tl.int64) * stride_tb
    elif cu_k is not None:
        k_first, length = _packed(cu_k, b, length)
        k_head += k_first * (stride_kn * ALIGN)
    else:
        k_head += b.to(tl.int64) * (stride_kb * ALIGN)
    every = packed >= 0
    if SLICE == 0:
        q, q_high = _load_pair(q_rows, None, DEPTH, D1, D2)
        if NEGATE:
            q = -q
            q_high = -q_high

    # Blocks that every row sees whole need no mask and are pipelined; the others, at either end, are masked.
    first, stop = _visible_keys(positions, starts, lens, b, r, length, stride_pb, stride_pr, ahead, window, False)
    chunk = tl.program_id(0) * chunk_keys
    chunk_stop = tl.minimum(chunk + chunk_keys, length)
    if MASKED:
        some_first = chunk + tl.maximum(tl.min(first, 0) - chunk, 0) // BLOCK_N * BLOCK_N
        some_stop = tl.minimum(tl.max(stop, 0), chunk_stop)
        all_first = chunk + tl.cdiv(tl.maximum(tl.max(first, 0) - chunk, 0), BLOCK_N) * BLOCK_N
        all_stop = chunk + tl.maximum(tl.minimum(tl.min(stop, 0), chunk_stop) - chunk, 0) // BLOCK_N * BLOCK_N
        all_stop = tl.maximum(all_first, all_stop)
    else:  # not the same by way of reductions, whose barriers would come before the first keys are asked for
        some_first = chunk
        some_stop = chunk_stop
        all_first = chunk
        all_stop = chunk + tl.maximum(chunk_stop - chunk, 0) // BLOCK_N * BLOCK_N

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for block in tl.range(all_first, all_stop, BLOCK_N, num_stages=STAGES):
        n = block + tl.arange(0, BLOCK_N)
        page = _page_of(pages, n, page_shift, last_page)
        k_rows = _keys_at(k_head, pages, page, n, page_shift, stride_kb * ALIGN, stride_kn * ALIGN, WIDE)
        if SLICE == 0:
            k, k_high = _load_pair(k_rows, None, DEPTH, D1, D2)
            s = _dot_pair(q, q_high, k, k_high, D2)
        else:
            s = _dot_sliced(q_rows, k_rows, every, BLOCK_M, BLOCK_N, DEPTH, SLICE)
            if NEGATE:
                s = -s
        if SOFTCAP:
            s = _tanh(s * inner_scale)
        higher = tl.maximum(top, tl.max(s, 1) * log2_scale)
        mass = mass * tl.exp2(top - higher) + tl.sum(tl.exp2(s * log2_scale - higher[:, None]), 1)
        top = higher
    whole = all_stop - all_first
    for masked in tl.range(some_first, some_stop - whole, BLOCK_N, num_stages=STAGES):
        block = masked
        if masked >= all_first:
            block = masked + whole
        n = block + tl.arange(0, BLOCK_N)
        # Past the end the last key is read again; its score is replaced like that of every hidden key.
        read = tl.minimum(n, length - 1)
        page = _page_of(pages, read, page_shift, last_page)
        k_rows = _keys_at(k_head, pages, page, read, page_shift, stride_kb * ALIGN, stride_kn * ALIGN, WIDE)
        if SLICE == 0:
            k, k_high = _load_pair(k_rows, None, DEPTH, D1, D2)
            s = _dot_pair(q, q_high, k, k_high, D2)
        else:
            s = _dot_sliced(q_rows, k_rows, every, BLOCK_M, BLOCK_N, DEPTH, SLICE)
            if NEGATE:
                s = -s
        if SOFTCAP:
            s = _tanh(s * inner_scale)
        seen = (n[None, :] >= first[:, None]) & (n[None, :] < tl.minimum(stop, chunk_stop)[:, None])
        t = tl.where(seen, s * log2_scale, float("-inf"))
        higher = tl.maximum(top, tl.max(t, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf would be NaN
        mass = mass * tl.exp2(top - finite) + tl.sum(tl.exp2(t - finite[:, None]), 1)
        top = higher
    result = tl.where(mass > 0, top + tl.log2(mass), float("-inf"))
    row = tl.program_id(2) * (group * rows) + packed
    if cu_q is not None:
        row = (g * group + j) * (total // (kv_heads * group)) + q_first.to(tl.int32) + r
    tl.store(partial + tl.program_id(0).to(tl.int64) * total + row, result, mask=packed < group * rows)


@triton.jit(do_not_specialize=["total", "chunks"], do_not_specialize_on_alignment=["partial", "lse"])
def combine_lse(
    partial, lse, total: tl.int32, chunks: tl.int32, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """`lse` [total] from `partial` [chunks, total], CHUNKS at a time, always in the same order.

    Grid (blocks of `total`,).
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, chunks, CHUNKS, num_stages=1):
        c = first + tl.arange(0, CHUNKS)
        inside = (c < chunks)[:, None] & (i < total)[None, :]
        part = tl.load(partial + c.to(tl.int64)[:, None] * total + i[None, :], mask=inside, other=float("-inf"))
        higher = tl.maximum(top, tl.max(part, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp2(top - finite) + tl.sum(tl.exp2(part - finite[None, :]), 0)
        top = higher
    tl.store(lse + i, tl.where(mass > 0, top + tl.log2(mass), float("-inf")), mask=i < total)


@triton.jit
def _sum_heads(total, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[HEADS * ROWS, COLUMNS] summed over heads by halves: each is one trip through shared memory, a `tl.sum` many."""
    for level in tl.static_range(HEADS.bit_length() - 1):
        halves = tl.reshape(total, [2, HEADS // 2 ** (level + 1) * ROWS, COLUMNS])
        low, high = tl.split(tl.permute(halves, (1, 2, 0)))
        total = low + high
    return total


@triton.jit(
    do_not_specialize=_ROWS_INTEGERS,
    do_not_specialize_on_alignment=[
        "lse", "weights", "positions", "starts", "lens", "cu_q", "cu_k", "pages", "out",
    ],
)  # fmt: skip
def reduce_rows(
    query, key, lse, weights, positions, starts, lens, cu_q, cu_k, pages, out,
    log2_scale: tl.float32, inner_scale: tl.float32, lse_scale: tl.float32, out_scale: tl.float32,
    first_sample: tl.int32, first_row: tl.int32, first_column: tl.int32,
    kv_heads: tl.int32, group: tl.int32, rows: tl.int32, length: tl.int32, page_shift: tl.int32,
    last_page: tl.int32,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qr: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64, stride_tb: tl.int64,
    stride_lb: tl.int64, stride_lh: tl.int64, stride_lr: tl.int64, stride_pb: tl.int64, stride_pr: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_or: tl.int64, stride_oc: tl.int64,
    ahead: tl.int64, window: tl.int64,
    start0: tl.int32, stop0: tl.int32, start1: tl.int32, stop1: tl.int32,
    start2: tl.int32, stop2: tl.int32, start3: tl.int32, stop3: tl.int32,
    DEPTH: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_R: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, PAIR: tl.constexpr, FOLD: tl.constexpr,
    STAGES: tl.constexpr, REDUCE: tl.constexpr, SUM_ROWS: tl.constexpr, MEAN_ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr, WEIGHTED: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    ACCUMULATE: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Columns of up to four spans: one block of keys, one block of rows, all heads that are summed.

    Grid (blocks of all spans, blocks of rows, samples * output heads). REDUCE is "all", "group" or "none". A tile holds
    HEADS heads x BLOCK_R rows. Tiles, and the slices of D within each, are one loop, so that copies run ahead of the
    products through all of it. UNIT: columns of `out` are adjacent.
    """
    if DEPENDENT:
        gdc_wait()
    # Which span this block lies in, and its first key and column.
    block = tl.program_id(0)
    start = start0
    stop = stop0
    column = first_column
    if block >= tl.cdiv(stop - start, BLOCK_N):
        block -= tl.cdiv(stop - start, BLOCK_N)
        column += stop - start
        start = start1
        stop = stop1
        if block >= tl.cdiv(stop - start, BLOCK_N):
            block -= tl.cdiv(stop - start, BLOCK_N)
            column += stop - start
            start = start2
            stop = stop2
            if block >= tl.cdiv(stop - start, BLOCK_N):
                block -= tl.cdiv(stop - start, BLOCK_N)
                column += stop - start
                start = start3
                stop = stop3
    start += block * BLOCK_N
    column += block * BLOCK_N

    if REDUCE == "all":
        b = first_sample + tl.program_id(2)
        out_head = 0
        g_first = 0
        g_stop = kv_heads
        j_first = 0
    elif REDUCE == "group":
        b = first_sample + tl.program_id(2) // kv_heads
        out_head = tl.program_id(2) % kv_heads
        g_first = out_head
        g_stop = g_first + 1
        j_first = 0
    else:
        b = first_sample + tl.program_id(2) // (kv_heads * group)
        out_head = tl.program_id(2) % (kv_heads * group)
        g_first = out_head // group
        g_stop = g_first + 1
        j_first = out_head % group

    n = start + tl.arange(0, BLOCK_N)
    key_of = tl.minimum(n, stop - 1)  # past the span its last key is read again and not stored
    k_sample = key
    if pages is not None:
        pages += b.to(tl.int64) * stride_tb
    elif cu_k is not None:
        k_first, length = _packed(cu_k, b, length)
        k_sample += k_first * (stride_kn * ALIGN)
    else:
        k_sample += b.to(tl.int64) * (stride_kb * ALIGN)
    q_sample = query + b.to(tl.int64) * (stride_qb * ALIGN)
    lse_sample = lse
    if SOFTMAX:
        lse_sample += b.to(tl.int64) * stride_lb
    if cu_q is not None:
        q_first, rows = _packed(cu_q, b, rows)
        if first_row + tl.program_id(1) * BLOCK_R >= rows:
            return
        q_sample += q_first * (stride_qr * ALIGN)
        if SOFTMAX:
            lse_sample += q_first * stride_lr
        if positions is not None:
            positions += q_first * stride_pr
        if not SUM_ROWS:
            out += q_first * stride_or

    row = first_row + tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < rows
    if MASKED:
        first, last = _visible_keys(
            positions,
            starts,
            lens,
            b,
            tl.minimum(row, rows - 1),
            length,
            stride_pb,
            stride_pr,
            ahead,
            window,
            False,
        )
        if (start >= tl.max(last, 0)) | (start + BLOCK_N <= tl.min(first, 0)):
            g_stop = g_first  # no row sees a key of this block
    if cu_k is not None:
        key_of = tl.minimum(key_of, length - 1)
    page = _page_of(pages, key_of, page_shift, last_page)

    # Bit 3 of m is a head bit if PAIR is 2. In an mma accumulator one thread owns m and m + 8, so that summing this
    # pair of heads costs no shuffle and halves the accumulator over heads. So does FOLD with the tile's upper bits,
    # where they count the turns of the warps.
    TILE_M: tl.constexpr = HEADS * BLOCK_R
    SLICES: tl.constexpr = 1 if SLICE == 0 else (DEPTH + SLICE - 1) // SLICE
    m = tl.arange(0, TILE_M)
    j_tile = j_first + m // (BLOCK_R * PAIR) * PAIR + m // 8 % PAIR
    r = first_row + tl.program_id(1) * BLOCK_R + m // (8 * PAIR) % (BLOCK_R // 8) * 8 + m % 8
    r = tl.minimum(r, rows - 1)
    steps = tl.cdiv(group, HEADS)
    if REDUCE == "none":
        steps = 1
    total = tl.zeros([TILE_M // (PAIR * FOLD), BLOCK_N], tl.float32)
    s = tl.zeros([TILE_M, BLOCK_N], tl.float32)
    for i in tl.range(g_first * steps * SLICES, g_stop * steps * SLICES, num_stages=STAGES):
        g = i // SLICES // steps
        j = j_tile + i // SLICES % steps * HEADS
        h = g * group + j
        real = j < group
        k_head = k_sample + g * (stride_kh * ALIGN)
        k_rows = _keys_at(k_head, pages, page, key_of, page_shift, stride_kb * ALIGN, stride_kn * ALIGN, WIDE)
        q_rows = _rows_at(_rows_at(q_sample, h, stride_qh * ALIGN, WIDE), r, stride_qr * ALIGN, WIDE)
        if SLICE == 0:
            k, k_high = _load_pair(k_rows, None, DEPTH, D1, D2)
            q, q_high = _load_pair(q_rows, real, DEPTH, D1, D2)
            s = _dot_pair(q, q_high, k, k_high, D2)
        else:
            k, q = _load_slice(k_rows, q_rows, real, i % SLICES * SLICE, SLICE, DEPTH)
            s = tl.dot(q, tl.trans(k), acc=s, input_precision="ieee")
        if SLICES == 1 or i % SLICES == SLICES - 1:
            p = s
            if SOFTCAP:
                p = _tanh(p * inner_scale)
            if SOFTMAX:
                # A head that does not exist, and a row that sees nothing: +inf, so that exp2 gives 0.
                normaliser = tl.load(lse_sample + h * stride_lh + r * stride_lr, mask=real, other=float("inf"))
                normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser) * lse_scale
                p = tl.exp2(p * log2_scale - normaliser[:, None])
            if WEIGHTED:
                p = p * tl.load(weights + h, mask=real, other=0.0)[:, None]
            if PAIR == 2:
                p = tl.reshape(tl.sum(tl.reshape(p, [TILE_M // 16, 2, 8, BLOCK_N]), 1), [TILE_M // 2, BLOCK_N])
            if FOLD > 1:
                p = tl.sum(tl.reshape(p, [FOLD, TILE_M // (PAIR * FOLD), BLOCK_N]), 0)
            total += p
            s = tl.zeros([TILE_M, BLOCK_N], tl.float32)
    total = _sum_heads(total, HEADS // (PAIR * FOLD), BLOCK_R, BLOCK_N)

    result = total * out_scale
    if MASKED:  # a select and no product: hidden columns may hold NaN
        first, last = _visible_keys(
            positions,
            starts,
            lens,
            b,
            tl.minimum(row, rows - 1),
            length,
            stride_pb,
            stride_pr,
            ahead,
            window,
            True,
        )
        seen = (n[None, :] >= first[:, None]) & (n[None, :] < last[:, None])
        result = tl.where(seen, result, 0.0)
    columns = out + b.to(tl.int64) * stride_ob + out_head * stride_oh
    if UNIT:  # said, for what the compiler finds out about a stride of 1 depends on its version
        columns += column + tl.arange(0, BLOCK_N)
    else:
        columns += (column + tl.arange(0, BLOCK_N)) * stride_oc
    if SUM_ROWS:
        result = tl.sum(tl.where(in_rows[:, None], result, 0.0), 0)
        if MEAN_ROWS:
            result /= rows.to(tl.float32)
        if ACCUMULATE:
            result += tl.load(columns, mask=n < stop, other=0.0)
        tl.store(columns, result, mask=n < stop)
    else:
        cells = columns[None, :] + row.to(tl.int64)[:, None] * stride_or
        inside = in_rows[:, None] & (n < stop)[None, :]
        if ACCUMULATE:
            result += tl.load(cells, mask=inside, other=0.0)
        tl.store(cells, result, mask=inside)
