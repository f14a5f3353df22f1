"""The four Triton kernels of `token_maps`; `triton_launch` plans and launches them.

Names: t row (the first `prior` are the prior), e = t - prior the token of a later row, slot one of the images that a
`scan_rows` takes, image its number among all. `scan_rows` alone knows where rows lie and of what type they are: it
packs them. The others take every image at once and find theirs in the table `sizes` [images, 2] that it writes. All
integers are run-time values that Triton may not specialise on, so nothing recompiles for another picture.

Everything is float64, as in the reference, whose maps these are but for the order of sums: in float32 about one cell in
a million would fall on the other side of a threshold, and maps that the smoothing flattens would be rounding. The
weights of the Gaussian are not normalised, because min-max undoes any factor.

Cards with a float64 unit in 64 sum the products of the smoothing, most of the work, as pairs of float32 (PAIRS). Their
sums keep 47 bits, and the sizes of what is compared afterwards are float64 there too.

Along an axis of n cells the mirrored map has the period 2 n, so weights whose taps meet at the same cell of a period
are added up once, in a table, and no more than 2 n taps are left of any radius.
"""

# mypy: disable-error-code="no-untyped-def, operator, arg-type, assignment"

import triton
import triton.language as tl

# Beyond it a row does not count as finite.
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _of_slot(values, slot):
    """The entry of a tuple for a slot that is known at run time."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(slot == i, values[i], chosen)
    return chosen


@triton.jit
def _locate(block, sizes, images, OF_LINES: tl.constexpr, LINES: tl.constexpr, CELLS: tl.constexpr):
    """Image of a block of lines (or cells), its size, its first block of lines and of cells, first cell and weight."""
    image = 0
    lines = 0
    blocks = 0
    cells = 0
    weights = 0
    height = tl.load(sizes)
    width = tl.load(sizes + 1)
    for following in range(1, images):
        next_lines = lines + tl.cdiv(height, LINES)
        next_blocks = blocks + tl.cdiv(height * width, CELLS)
        stop = next_blocks
        if OF_LINES:
            stop = next_lines
        if block >= stop:
            image = following
            lines = next_lines
            blocks = next_blocks
            cells += height * width
            weights += height + width + 2
            height = tl.load(sizes + 2 * following)
            width = tl.load(sizes + 2 * following + 1)
    return image, height, width, lines, blocks, cells, weights


@triton.jit
def _taken_by(peaks, t, rows, images):
    """The image where row t has its largest peak, the first of equals, and that peak: -inf if it is finite nowhere."""
    best = t * 0
    top = tl.load(peaks + t)
    for image in range(1, images):
        peak = tl.load(peaks + image * rows + t)
        best = tl.where(peak > top, image, best)
        top = tl.maximum(top, peak)
    return best, top


@triton.jit
def _mirrored(at, length):
    """The cell of [0, length) that an index in [-length, 2 * length) shows: the mirror repeats the edge."""
    at = tl.where(at < 0, -1 - at, at)
    return tl.where(at >= length, 2 * length - 1 - at, at)


@triton.jit
def _add_product(total, lost, x, y):
    """`total + x * y` in float32 and `lost` with what that loses (Ogita, Rump and Oishi 2005, Dot2).

    Not to be compiled with contraction: the two sums must round the product that `fma` takes apart.
    """
    product = x * y
    result = total + product
    back = result - total
    return result, lost + ((total - (result - back)) + (product - back)) + tl.fma(x, y, -product)


@triton.jit
def _ranges(
    lows, highs, block, blocks, t, keep, rows, flat, PARTS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Lowest value of smoothed rows t, and 1 over what it is from there to the highest: 0 if a row is constant."""
    low = tl.full([PARTS, TOKENS], float("inf"), tl.float64)
    high = tl.full([PARTS, TOKENS], float("-inf"), tl.float64)
    for first in tl.range(0, blocks, PARTS, num_stages=1):
        part = first + tl.arange(0, PARTS)
        at = ((block + part) * rows)[:, None] + t[None, :]
        inside = (part < blocks)[:, None] & keep[None, :]
        low = tl.minimum(low, tl.load(lows + at, mask=inside, other=float("inf")))
        high = tl.maximum(high, tl.load(highs + at, mask=inside, other=float("-inf")))
    lowest = tl.where(keep, tl.min(low, 0), 0.0)
    highest = tl.where(keep, tl.max(high, 0), 0.0)
    span = highest - lowest
    varied = span > flat * tl.maximum(tl.abs(lowest), tl.abs(highest))
    return lowest, tl.where(varied, 1.0 / tl.where(varied, span, 1.0), 0.0)


@triton.jit
def _normalised(smooth, t, cell, cells, low, inverse, keep):
    """Cells of rows t after min-max by their `_ranges`; zeros where a row is constant or not kept."""
    inside = (keep & (inverse > 0))[:, None] & (cell < cells)[None, :]
    value = tl.load(smooth + (t * cells)[:, None] + cell[None, :], mask=inside, other=0.0)
    return tl.where(inside, (value - low[:, None]) * inverse[:, None], 0.0)


# Of a slot: the map, its strides over rows, lines and columns, and its size.
_OF_SLOTS = [f"{name}{slot}" for name in ("step_t", "step_y", "step_x", "height", "width") for slot in range(8)]


@triton.jit(
    do_not_specialize=[*_OF_SLOTS, "rows", "first_image", "first_cell", "first_weight", "all_weights", "radius"],
    do_not_specialize_on_alignment=[*(f"map{slot}" for slot in range(8)), "packed", "weights", "sizes", "peaks"],
)
def scan_rows(
    map0, map1, map2, map3, map4, map5, map6, map7,
    step_t0, step_t1, step_t2, step_t3, step_t4, step_t5, step_t6, step_t7,
    step_y0, step_y1, step_y2, step_y3, step_y4, step_y5, step_y6, step_y7,
    step_x0, step_x1, step_x2, step_x3, step_x4, step_x5, step_x6, step_x7,
    height0, height1, height2, height3, height4, height5, height6, height7,
    width0, width1, width2, width3, width4, width5, width6, width7,
    packed, weights, sizes, peaks,
    falloff: tl.float64, rows: tl.int32, first_image: tl.int32, first_cell: tl.int32,
    first_weight: tl.int32, all_weights: tl.int32, radius: tl.int32,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Packs the rows of up to eight images and finds their peaks; makes the table of weights of each axis.

    Grid (images * (rows + 2),). Writes `packed` (per image [rows, height, width]), `peaks` [all images, rows], -inf
    where a row is not finite, `sizes`, and per image in `weights` height + 1 and width + 1 entries: entry d is the sum
    of exp(falloff * k^2) over k = d modulo 2 * length, |k| <= radius. PAIRS: `packed` is float32, and what float32
    loses of a weight stands `all_weights` further on.
    """
    heights = (height0, height1, height2, height3, height4, height5, height6, height7)
    widths = (width0, width1, width2, width3, width4, width5, width6, width7)
    slot = tl.program_id(0) // (rows + 2)
    t = tl.program_id(0) % (rows + 2)
    for before in tl.static_range(7):
        if before < slot:
            first_cell += heights[before] * widths[before]
            first_weight += heights[before] + widths[before] + 2
    height = _of_slot(heights, slot)
    width = _of_slot(widths, slot)
    image = first_image + slot
    if t < rows:
        maps = (map0, map1, map2, map3, map4, map5, map6, map7)
        step_t = _of_slot((step_t0, step_t1, step_t2, step_t3, step_t4, step_t5, step_t6, step_t7), slot).to(tl.int64)
        step_y = _of_slot((step_y0, step_y1, step_y2, step_y3, step_y4, step_y5, step_y6, step_y7), slot).to(tl.int64)
        step_x = _of_slot((step_x0, step_x1, step_x2, step_x3, step_x4, step_x5, step_x6, step_x7), slot).to(tl.int64)
        row = _of_slot(maps, slot) + t * step_t
        cells = height * width
        packed += first_cell * rows + t * cells
        top = tl.full([BLOCK], float("-inf"), tl.float64)
        finite = tl.full([BLOCK], 1, tl.int32)
        for first in tl.range(0, cells, BLOCK, num_stages=1):
            # Past the end the last cell is taken again.
            cell = tl.minimum(first + tl.arange(0, BLOCK), cells - 1)
            value = tl.load(row + (cell // width) * step_y + (cell % width) * step_x).to(tl.float64)
            tl.store(packed + cell, value)
            finite = finite & (tl.abs(value) <= _FLOAT32_MAX).to(tl.int32)
            top = tl.maximum(top, value)
        tl.store(peaks + image * rows + t, tl.where(tl.min(finite, 0) == 1, tl.max(top, 0), float("-inf")))
    else:
        axis = t - rows
        length = tl.where(axis == 0, height, width)
        tl.store(sizes + 2 * image + axis, length)
        weights += first_weight + axis * (height + 1)
        periods = (radius + length) // (2 * length)
        for first in tl.range(0, length + 1, BLOCK, num_stages=1):
            d = first + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float64)
            for period in tl.range(-periods, periods + 1, num_stages=1):
                k = tl.abs(d + 2 * length * period)
                distance = k.to(tl.float64)
                total += tl.where(k <= radius, tl.exp(distance * distance * falloff), 0.0)
            tl.store(weights + d, total, mask=d <= length)
            if PAIRS:
                rest = total - total.to(tl.float32).to(tl.float64)
                tl.store(weights + all_weights + d, rest, mask=d <= length)


# Of the kernels that take every image.
_INTEGERS = ["rows", "images", "prior"]
_TENSORS = ["packed", "weights", "sizes", "peaks", "half", "smooth", "lows", "highs", "tops", "out", "index", "valid"]


@triton.jit(
    do_not_specialize=[*_INTEGERS, "radius", "most_columns", "all_weights"], do_not_specialize_on_alignment=_TENSORS
)
def smooth_rows(
    packed, weights, sizes, peaks, half, smooth, lows, highs,
    rows: tl.int32, images: tl.int32, prior: tl.int32, radius: tl.int32, most_columns: tl.int32, all_weights: tl.int32,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Both passes of the Gaussian over LINES lines of a map: rows of the prior everywhere, others where they are taken.

    Grid (blocks of lines * rows,). Writes `smooth`, as `packed`, by way of `half`, and of its block the lowest and
    highest value to `lows` and `highs` [blocks, rows]. Rows that are not finite, and those that another image has
    taken, leave all of that unwritten.

    Either pass takes lines as a whole and mirrors their numbers: what neighbouring threads read lies side by side. For
    the second pass, along the columns, `half` is transposed: [programs, most_columns, LINES]. PAIRS: sums of products
    are pairs of float32, the second part of `half` [programs, 2, most_columns, LINES] what the first loses.
    """
    block = tl.program_id(0) // rows
    t = tl.program_id(0) % rows
    image, height, width, first_block, _, first_cell, first_weight = _locate(block, sizes, images, True, LINES, 1)
    taken, _ = _taken_by(peaks, t, rows, images)
    if ((t < prior) | (taken == image)) & (tl.load(peaks + image * rows + t) > float("-inf")):
        offset = first_cell * rows + t * height * width
        packed += offset
        smooth += offset
        rest = most_columns * LINES
        half += tl.program_id(0).to(tl.int64) * rest * (2 if PAIRS else 1)
        weights += first_weight
        # Past an edge the last line is made again, and not stored.
        line = (block - first_block) * LINES + tl.arange(0, LINES)
        y = tl.minimum(line, height - 1)
        of_block = tl.arange(0, LINES)[None, :]
        for first in tl.range(0, width, COLUMNS, num_stages=1):
            column = first + tl.arange(0, COLUMNS)
            inside = (column < width)[None, :] & (y >= 0)[:, None]
            total = tl.zeros([LINES, COLUMNS], tl.float32 if PAIRS else tl.float64)
            lost = total
            for tap in tl.range(-tl.minimum(radius, height - 1), tl.minimum(radius, height) + 1, num_stages=1):
                source = _mirrored(y + tap, height) * width
                value = tl.load(packed + source[:, None] + column[None, :], mask=inside, other=0.0)
                weight = tl.load(weights + tl.abs(tap))
                if PAIRS:
                    total, lost = _add_product(total, lost, value, weight)
                    lost += value * tl.load(weights + all_weights + tl.abs(tap))
                else:
                    total += value * weight
            to = half + (column * LINES)[:, None] + of_block
            if PAIRS:
                first_part = total + lost
                tl.store(to + rest, tl.trans(lost - (first_part - total)), mask=(column < width)[:, None])
                total = first_part
            tl.store(to, tl.trans(total), mask=(column < width)[:, None])

        # What this program has written, other threads of it read.
        tl.debug_barrier()
        weights += height + 1
        low = tl.full([COLUMNS, LINES], float("inf"), tl.float64)
        high = tl.full([COLUMNS, LINES], float("-inf"), tl.float64)
        for first in tl.range(0, width, COLUMNS, num_stages=1):
            column = first + tl.arange(0, COLUMNS)
            x = tl.minimum(column, width - 1)
            total = tl.zeros([COLUMNS, LINES], tl.float32 if PAIRS else tl.float64)
            lost = total
            for tap in tl.range(-tl.minimum(radius, width - 1), tl.minimum(radius, width) + 1, num_stages=1):
                source = half + (_mirrored(x + tap, width) * LINES)[:, None] + of_block
                value = tl.load(source)
                weight = tl.load(weights + tl.abs(tap))
                if PAIRS:
                    total, lost = _add_product(total, lost, value, weight)
                    lost += value * tl.load(weights + all_weights + tl.abs(tap)) + tl.load(source + rest) * weight
                else:
                    total += value * weight
            if PAIRS:
                total = total.to(tl.float64) + lost.to(tl.float64)
            inside = (line < height)[:, None] & (column < width)[None, :]
            tl.store(smooth + (y * width)[:, None] + column[None, :], tl.trans(total), mask=inside)
            low = tl.minimum(low, total)
            high = tl.maximum(high, total)
        tl.store(lows + block * rows + t, tl.min(tl.min(low, 1), 0))
        tl.store(highs + block * rows + t, tl.max(tl.max(high, 1), 0))


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_TENSORS)
def subtract_prior(
    sizes, peaks, smooth, lows, highs, tops,
    flat: tl.float64, rows: tl.int32, images: tl.int32, prior: tl.int32,
    LINES: tl.constexpr, CELLS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Normalised maps of all tokens less the mean normalised map of the prior, clipped at 0, over CELLS cells.

    Grid (blocks of cells,). Takes the place of the token's row in `smooth`; its largest value in the block goes to
    `tops` [blocks, tokens].
    """
    block = tl.program_id(0)
    image, height, width, first_lines, first_block, first_cell, _ = _locate(block, sizes, images, False, LINES, CELLS)
    cells = height * width
    smooth += first_cell * rows
    parts = tl.cdiv(height, LINES)
    cell = (block - first_block) * CELLS + tl.arange(0, CELLS)

    noise = tl.zeros([CELLS], tl.float64)
    for first in tl.range(0, prior, TOKENS, num_stages=1):
        t = first + tl.arange(0, TOKENS)
        keep = tl.load(peaks + image * rows + t, mask=t < prior, other=float("-inf")) > float("-inf")
        low, inverse = _ranges(lows, highs, first_lines, parts, t, keep, rows, flat, PARTS, TOKENS)
        noise += tl.sum(_normalised(smooth, t, cell, cells, low, inverse, keep), 0)
    noise = noise * (1.0 / tl.maximum(prior, 1).to(tl.float64))

    for first in tl.range(prior, rows, TOKENS, num_stages=1):
        t = first + tl.arange(0, TOKENS)
        taken, peak = _taken_by(peaks, tl.minimum(t, rows - 1), rows, images)
        keep = (t < rows) & (taken == image) & (peak > float("-inf"))
        low, inverse = _ranges(lows, highs, first_lines, parts, t, keep, rows, flat, PARTS, TOKENS)
        inside = keep[:, None] & (cell < cells)[None, :]
        value = _normalised(smooth, t, cell, cells, low, inverse, keep) - noise[None, :]
        value = tl.where(inside, tl.maximum(value, 0.0), 0.0)
        tl.store(smooth + (t * cells)[:, None] + cell[None, :], value, mask=inside)
        tl.store(tops + block * (rows - prior) + t - prior, tl.max(value, 1), mask=keep)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_TENSORS)
def normalise_maps(
    sizes, peaks, smooth, tops, out, index, valid,
    flat: tl.float64, rows: tl.int32, images: tl.int32, prior: tl.int32,
    CELLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """CELLS cells of one token's map over its largest value, or zeros; once per token, its image and validity.

    Grid (blocks of cells * tokens,). Writes `out` (per image [tokens, height, width]), `index` and `valid` [tokens].
    """
    tokens = rows - prior
    block = tl.program_id(0) // tokens
    e = tl.program_id(0) % tokens
    image, height, width, _, first_block, first_cell, _ = _locate(block, sizes, images, False, 1, CELLS)
    cells = height * width
    taken, peak = _taken_by(peaks, prior + e, rows, images)
    blocks = tl.where((taken == image) & (peak > float("-inf")), tl.cdiv(cells, CELLS), 0)
    top = tl.zeros([PARTS], tl.float64)
    for first in tl.range(0, blocks, PARTS, num_stages=1):
        part = first + tl.arange(0, PARTS)
        top = tl.maximum(top, tl.load(tops + (first_block + part) * tokens + e, mask=part < blocks, other=0.0))
    highest = tl.max(top, 0)
    kept = highest > flat

    cell = (block - first_block) * CELLS + tl.arange(0, CELLS)
    row = smooth + first_cell * rows + (prior + e) * cells
    value = tl.load(row + cell, mask=cell < tl.where(kept, cells, 0), other=0.0) * (1.0 / tl.where(kept, highest, 1.0))
    tl.store(out + first_cell * tokens + e * cells + cell, value.to(tl.float32), mask=cell < cells)
    if (taken == image) & (block == first_block):
        tl.store(index + e, taken.to(tl.int64))
        tl.store(valid + e, kept)
