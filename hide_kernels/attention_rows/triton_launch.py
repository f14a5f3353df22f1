"""`attention_rows` on Triton: plans the launches of a call from shapes and strides alone, then runs them.

Without lse: `partial_lse` and, where the keys were split, `combine_lse`; then `reduce_rows`, once per four key spans
and per run of samples that share them. Nothing here waits for the device or depends on what a tensor holds, so a call
may be captured in a CUDA graph: spans are kernel arguments, masks stay in the tensors they came in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import Launch, on_device
from . import triton_kernels as kernels
from .request import AttentionRows, RowOutput, RowRequest
from .triton_configs import LseConfig, RowsConfig, Tiles, chunk_length, lse_config, rows_config

LOG2_E = 1 / math.log(2)
ROWS_AT_ONCE = 512  # bounds the partial results of the first pass
SPANS_AT_ONCE = 4
UNBOUNDED = 1 << 41
# From this many elements on, offsets inside a sample are 64-bit. Tests lower it.
WIDE_FROM = 1 << 31


@dataclasses.dataclass(frozen=True)
class Card:
    """What planning asks of a device: compute capability, multiprocessors, and whether it has dependent launches."""

    capability: tuple[int, int]
    processors: int
    dependent_launch: bool = False

    @classmethod
    def of(cls, capability: tuple[int, int], processors: int) -> Card:
        """A real card."""
        return cls(capability, processors, dependent_launch=capability >= (9, 0))


# What Triton's interpreter, on the CPU, is planned for.
INTERPRETED = Card((9, 0), 132)


def attention_rows_triton(query: Tensor, key: Tensor, request: RowRequest, output: RowOutput) -> AttentionRows:
    """The results of a validated request."""
    lse, out = output.lse, output.out
    if out is None:
        out = query.new_empty(request.shape, dtype=torch.float32)
    if not output.accumulate:
        _clear_unwritten(out, request)
    if lse is None and output.return_lse:
        lse = query.new_empty(request.lse_shape, dtype=torch.float32)
    with on_device(query):
        for some_query, some, chunk in _row_chunks(query, request):
            launches, log2_lse = plan(
                some_query,
                key,
                some,
                None if output.lse is None else output.lse[..., chunk],
                out if request.row_reduction or request.cu_seqlens_q is not None else out[..., chunk, :],
                output.accumulate or (request.row_reduction is not None and (chunk.start or 0) > 0),
                card_of(query.device),
                need_rows=out.numel() > 0,
                need_lse=output.return_lse,
                workspace=output.workspace,
            )
            for launch in launches:
                launch.run()
            if output.return_lse and output.lse is None:
                assert lse is not None and log2_lse is not None
                torch.mul(log2_lse, math.log(2), out=lse[..., chunk])
    return AttentionRows(out, lse if output.return_lse else None)


def workspace_elements(query: Tensor, key: Tensor, request: RowRequest) -> int:
    """Most float32 elements that a call without lse takes beside its results."""
    most = 0
    for some_query, some, _ in _row_chunks(query, request) if request.softmax else ():
        # A copy has other strides than what it is made of; on "meta" it takes no memory.
        q, k = (Layout.of(readable(x if x.stride(-1) == 1 else x.to("meta"))) for x in (some_query, key))
        shared, _ = shared_arguments(q, k, some)
        chunks = _split(q, shared, some, card_of(query.device), None)[3]
        most = max(most, math.prod(some.lse_shape) * (1 if chunks == 1 else 1 + chunks))
    return most


def _row_chunks(query: Tensor, request: RowRequest) -> Iterator[tuple[Tensor, RowRequest, slice]]:
    """Rows that go together, with their slice of the last dimension of lse: all of them if packed."""
    if request.cu_seqlens_q is not None:
        yield query, request, slice(None)
        return
    for first in range(0, request.rows, ROWS_AT_ONCE):
        chunk = slice(first, min(first + ROWS_AT_ONCE, request.rows))
        yield query[:, :, chunk], _take_rows(request, chunk), chunk


class Layout(NamedTuple):
    """What planning asks of a tensor: where its elements lie, not what they are."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0)

    def stride(self, dimension: int) -> int:
        return self.strides[dimension]


# Kernel, grid, arguments that are no tensors, and what Triton compiled for it.
Template = tuple[str, tuple[int, int, int], dict[str, Any], list[Any]]


class Planned(NamedTuple):
    """The launches of a chunk of rows, but for its tensors."""

    launches: tuple[Template, ...]
    lse: int  # elements of the log-sum-exp, 0 where the first pass does not run
    chunks: int


def plan(
    query: Tensor,
    key: Tensor,
    request: RowRequest,
    lse: Tensor | None,
    out: Tensor,
    accumulate: bool,
    card: Card,
    *,
    need_rows: bool = True,
    need_lse: bool = False,
    lse_tiles: LseConfig | None = None,
    rows_tiles: RowsConfig | None = None,
    workspace: Tensor | None = None,
) -> tuple[list[Launch], Tensor | None]:
    """The launches of one chunk of rows, and the lse in log2 units that they compute, if they do.

    Works on any device, also "meta": what is launched depends on shapes, strides and alignment only, and is planned
    once for them. `lse_tiles` and `rows_tiles` replace the table's choice.
    """
    query, key, request = readable(query), readable(key), contiguous(request)
    planned = _planned(
        Layout.of(query),
        Layout.of(key),
        tuple(map(tuple, request.spans)),
        _settings_of(request),
        tuple([Layout.of(x) if isinstance(x, Tensor) else x for x in _tensors_of(request)]),
        None if lse is None else Layout.of(lse),
        Layout.of(out),
        (accumulate, need_rows, need_lse, lse_tiles, rows_tiles),
        (card, query.device, WIDE_FROM),
    )
    log2_lse = partial = None
    if planned.lse:
        elements = planned.lse * (1 if planned.chunks == 1 else 1 + planned.chunks)
        if workspace is None:
            workspace = query.new_empty(elements, dtype=torch.float32)
        elif workspace.shape[0] < elements:
            raise ValueError(f"workspace: got shape {tuple(workspace.shape)}, want ({elements},) or more")
        log2_lse = workspace[: planned.lse].view(request.lse_shape)
        partial = log2_lse if planned.chunks == 1 else workspace[planned.lse : elements]
        if request.cu_seqlens_q is not None and need_lse:
            partial.fill_(-math.inf)  # rows that belong to no sample
        lse = log2_lse
    masked_by_position = request.causal or request.window is not None
    tensors = {
        "query": query,
        "key": key,
        "positions": request.q_positions if masked_by_position else None,
        "starts": request.kv_starts,
        "lens": request.kv_lens,
        "cu_q": request.cu_seqlens_q,
        "cu_k": request.cu_seqlens_k,
        "pages": request.block_table,
        "lse": lse if request.softmax else None,
        "partial": partial,
        "weights": request.head_reduction if isinstance(request.head_reduction, Tensor) else None,
        "out": out,
    }
    launches = []
    for name, grid, arguments, compiled in planned.launches:
        of_launch = {argument: tensors[argument] for argument in _TENSORS[name]}
        launches.append(Launch(getattr(kernels, name), grid, {**arguments, **of_launch}, compiled))
    return launches, log2_lse


# Fields of a request but for spans: those that are tensors, or may be, and others.
_TENSOR_FIELDS = (
    "q_positions", "kv_starts", "kv_lens", "cu_seqlens_q", "cu_seqlens_k", "block_table", "head_reduction",
)  # fmt: skip
_SETTINGS = tuple(f.name for f in dataclasses.fields(RowRequest) if f.name not in (*_TENSOR_FIELDS, "spans"))
_tensors_of, _settings_of = attrgetter(*_TENSOR_FIELDS), attrgetter(*_SETTINGS)
# The tensors among each kernel's arguments.
_INPUTS = ("query", "key", "positions", "starts", "lens", "cu_q", "cu_k", "pages")
_TENSORS = {
    "partial_lse": (*_INPUTS, "partial"),
    "combine_lse": ("partial", "lse"),
    "reduce_rows": (*_INPUTS, "lse", "weights", "out"),
}


@lru_cache(maxsize=512)
def _planned(
    query: Layout,
    key: Layout,
    spans: tuple[tuple[tuple[int, int], ...], ...],
    settings: tuple[Any, ...],
    tensors: tuple[Any, ...],
    lse: Layout | None,
    out: Layout,
    how: tuple[bool, bool, bool, LseConfig | None, RowsConfig | None],
    where: tuple[Card, torch.device, int],
) -> Planned:
    """`plan` for such tensors. What Triton compiles is kept with it, so all that this depends on is an argument."""
    card = where[0]
    accumulate, need_rows, need_lse, lse_tiles, rows_tiles = how
    fields = dict(zip((*_SETTINGS, *_TENSOR_FIELDS), (*settings, *tensors), strict=True))
    request = RowRequest(spans=[list(of_sample) for of_sample in spans], **fields)
    heads, depth, kv_heads, rows = query.shape[1], query.shape[-1], request.kv_heads, _most_rows(query, request)
    group = heads // kv_heads
    shared, masked = shared_arguments(query, key, request)
    in_slices = sliced(query, shared)
    launches: list[Template] = []
    elements, chunks, lse_scale = 0, 0, LOG2_E
    lse_strides: tuple[int, ...] = (0, 0, 0) if lse is None else (0, *lse.strides)[-3:]
    if request.softmax and lse is None and (need_rows or need_lse):
        elements, lse_scale = math.prod(request.lse_shape), 1.0
        lse_strides = (0, *_contiguous_strides(request.lse_shape))[-3:]
        launches, chunks = _lse_launches(query, shared, request, masked, card, lse_tiles)
    if not need_rows:
        return Planned(tuple(launches), elements, chunks)
    reduce, out_heads = {"none": ("none", heads), "kv_group": ("group", kv_heads)}.get(request.reduces, ("all", 1))
    summed = 1 if reduce == "none" else group
    rows_tiles = rows_tiles or rows_config(card.capability, depth, rows, summed, in_slices, request.dense)
    row_blocks = -(-rows // rows_tiles.block_r)
    out_strides = _out_strides(out, request)
    rows_arguments = {
        **shared,
        "log2_scale": score_scale(request) * LOG2_E,
        "lse_scale": lse_scale,
        "out_scale": _out_scale(request, heads, group),
        **dict(zip(("stride_lb", "stride_lh", "stride_lr"), lse_strides, strict=True)),
        **dict(zip(("stride_ob", "stride_oh", "stride_or", "stride_oc"), out_strides, strict=True)),
        "SLICE": rows_tiles.slice,
        "BLOCK_R": rows_tiles.block_r,
        "HEADS": rows_tiles.heads,
        "BLOCK_N": rows_tiles.block_n,
        "PAIR": rows_tiles.pair,
        "FOLD": rows_tiles.fold,
        "REDUCE": reduce,
        "SUM_ROWS": request.row_reduction is not None,
        "MEAN_ROWS": request.row_reduction == "mean" and request.cu_seqlens_q is not None,
        "SOFTMAX": request.softmax,
        "WEIGHTED": request.reduces == "weights",
        "MASKED": masked,
        "UNIT": out_strides[3] == 1,
        **kernel_options(rows_tiles),
        **dependent_options(card),
    }
    for first, samples, column, together in span_launches(request.spans):
        blocks, named = span_arguments(together, rows_tiles.block_n)
        # Rows that are summed must meet in one program: one launch per block of them, each adding to the last.
        for block in range(row_blocks if request.row_reduction else 1):
            grid = (blocks, 1 if request.row_reduction else row_blocks, samples * out_heads)
            own = {
                "first_sample": first,
                "first_row": block * rows_tiles.block_r,
                "first_column": column,
                "ACCUMULATE": accumulate or block > 0,
            }
            launches.append(("reduce_rows", grid, {**rows_arguments, **named, **own}, []))
    return Planned(tuple(launches), elements, chunks)


def _split(
    query: Layout, shared: dict[str, Any], request: RowRequest, card: Card, tiles: LseConfig | None
) -> tuple[LseConfig, int, int, int]:
    """Of the first pass: tiles, tiles of queries, keys per chunk and chunks."""
    queries = query.shape[1] // request.kv_heads * _most_rows(query, request)
    tiles = tiles or lse_config(card.capability, queries, sliced(query, shared), request.dense)
    row_tiles, length = -(-queries // tiles.block_m), request.length
    shared_by = row_tiles * request.kv_heads
    per_chunk = chunk_length(length, tiles.block_n, shared_by, tiles.resident, card.processors) if length else 1
    return tiles, row_tiles, per_chunk, max(1, -(-length // per_chunk))


def _lse_launches(
    query: Layout,
    shared: dict[str, Any],
    request: RowRequest,
    masked: bool,
    card: Card,
    tiles: LseConfig | None,
) -> tuple[list[Template], int]:
    """The first pass, and into how many chunks it splits the keys."""
    tiles, row_tiles, per_chunk, chunks = _split(query, shared, request, card, tiles)
    total = math.prod(request.lse_shape)
    first = {
        **shared,
        "total": total,
        "chunk_keys": per_chunk,
        "log2_scale": abs(score_scale(request)) * LOG2_E,
        "NEGATE": score_scale(request) < 0,
        "SLICE": tiles.slice,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "MASKED": masked,
        "DEPENDENT": card.dependent_launch,
        **kernel_options(tiles),
    }
    second = {
        "total": total,
        "chunks": chunks,
        "BLOCK": 32,
        "CHUNKS": 32,
        "num_warps": 4,
        "enable_fp_fusion": False,
        **dependent_options(card),
    }
    grid = (chunks, row_tiles, len(request.spans) * request.kv_heads)
    launches: list[Template] = [("partial_lse", grid, first, [])]
    if chunks > 1:
        launches.append(("combine_lse", (-(-total // 32), 1, 1), second, []))
    return launches, chunks


def readable(tensor: Tensor) -> Tensor:
    """A tensor with a unit last stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(request: RowRequest) -> RowRequest:
    """Small integers and weights, which kernels read without strides, made contiguous where they are not."""
    copied: dict[str, Any] = {}
    for name, value in zip(_TENSOR_FIELDS[1:], _tensors_of(request)[1:], strict=True):
        if isinstance(value, Tensor) and not value.is_contiguous() and (name != "block_table" or value.stride(1) != 1):
            copied[name] = value.contiguous()
    return dataclasses.replace(request, **copied) if copied else request


def layouts_of(request: RowRequest) -> RowRequest:
    """The request with layouts for its tensors, as planning takes it."""
    found: dict[str, Any] = {
        name: Layout.of(x)
        for name, x in zip(_TENSOR_FIELDS, _tensors_of(request), strict=True)
        if isinstance(x, Tensor)
    }
    return dataclasses.replace(request, **found)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def sliced(query: Layout, shared: dict[str, Any]) -> bool:
    """Whether D goes in slices."""
    return query.dtype == torch.float32 or shared["ALIGN"] == 1


def shared_arguments(query: Layout, key: Layout, request: RowRequest) -> tuple[dict[str, Any], bool]:
    """What both passes take beside tensors, and whether some key may be hidden. Tensors of the request are layouts."""
    strides: dict[str, int] = {}
    aligned = query.aligned and key.aligned
    wide = False
    # The dimensions over samples (or pages), heads, and rows or keys.
    dense, packed = (0, 1, 2), (None, 1, 0)
    q_dims: tuple[int | None, int, int] = dense if request.cu_seqlens_q is None else packed
    k_dims: tuple[int | None, int, int] = dense if request.cu_seqlens_k is None else packed
    if request.block_table is not None:
        k_dims = (0, 2, 1)
    most_rows, most_keys = _most_rows(query, request), request.length
    if request.block_table is not None:
        most_keys = key.shape[1]  # pages lie 64 bits apart in any case
    for tensor, letter, dims, most in ((query, "q", q_dims, most_rows), (key, "k", k_dims, most_keys)):
        # A dimension of size one may have any stride.
        steps = [0 if d is None or tensor.shape[d] <= 1 else tensor.stride(d) for d in dims]
        aligned = aligned and all(step % 8 == 0 for step in steps)
        last = (tensor.shape[dims[1]] - 1) * steps[1] + (most - 1) * steps[2]
        wide = wide or last + tensor.shape[-1] >= WIDE_FROM
        names = ("b", "h", "n" if letter == "k" else "r")
        strides |= {f"stride_{letter}{name}": step for name, step in zip(names, steps, strict=True)}
    align = 8 if aligned else 1
    depth = query.shape[-1]
    low = 1 << (depth.bit_length() - 1)
    high = 0 if low == depth else max(16, 1 << (depth - low - 1).bit_length())
    positions = request.q_positions if request.causal or request.window is not None else None
    cu_q, pages = request.cu_seqlens_q, request.block_table
    arguments = {
        "inner_scale": 0.0 if request.softcap is None else request.scale / request.softcap,
        "kv_heads": request.kv_heads,
        "group": query.shape[1] // request.kv_heads,
        "rows": most_rows,
        "length": request.length,
        "page_shift": 0 if pages is None else key.shape[1].bit_length() - 1,
        "last_page": 0 if pages is None else key.shape[0] - 1,
        "stride_tb": 0 if pages is None else pages.stride(0),
        **{name: stride // align for name, stride in strides.items()},
        "stride_pb": 0 if positions is None or cu_q is not None else positions.stride(0),
        "stride_pr": 0 if positions is None else positions.stride(-1),
        "ahead": 0 if request.causal else UNBOUNDED,
        "window": UNBOUNDED if request.window is None else min(request.window, UNBOUNDED),
        "DEPTH": depth,
        "D1": low,
        "D2": high,
        "SOFTCAP": request.softcap is not None,
        "ALIGN": align,
        "WIDE": wide,
    }
    masks = (positions, request.kv_starts, request.kv_lens, request.cu_seqlens_k)
    return arguments, any(mask is not None for mask in masks)


def score_scale(request: RowRequest) -> float:
    """What multiplies the dot products, or with a softcap their tanh."""
    return request.scale if request.softcap is None else request.softcap


def _out_scale(request: RowRequest, heads: int, group: int) -> float:
    reduction = request.head_reduction
    scale = 1 / {"mean": heads, "kv_group": group}.get(reduction, 1) if isinstance(reduction, str) else 1.0
    if request.row_reduction == "mean" and request.cu_seqlens_q is None:
        scale /= request.rows
    return scale if request.softmax else scale * score_scale(request)


def _out_strides(out: Layout, request: RowRequest) -> tuple[int, int, int, int]:
    """Strides over samples, heads, rows and columns; 0 for what the result has not."""
    strides = list(out.strides)
    if request.reduces in ("mean", "weights"):
        strides.insert(1, 0)
    if request.row_reduction:
        strides.insert(2, 0)
    elif request.cu_seqlens_q is not None:  # rows come first, and no sample
        strides = [0, strides[1], strides[0], strides[2]]
    return strides[0], strides[1], strides[2], strides[3]


def kernel_options(tiles: Tiles) -> dict[str, Any]:
    # A fused `s * scale - lse` would not round its product, from which the lse was made: at scores of ten thousand the
    # probability of a row's only key would be off by 3e-4.
    return {
        "STAGES": tiles.stages,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": False,
        **({} if tiles.registers is None else {"maxnreg": tiles.registers}),
    }


def dependent_options(card: Card) -> dict[str, Any]:
    """Options of a launch that may start before the one in front has ended (CUDA C++ programming guide)."""
    return {"DEPENDENT": card.dependent_launch, **({"launch_pdl": True} if card.dependent_launch else {})}


def span_launches(spans: Sequence[list[tuple[int, int]]]) -> Iterator[tuple[int, int, int, list[tuple[int, int]]]]:
    """(first sample, number of samples, first column, at most four non-empty spans) of each launch."""
    first = 0
    for of_sample, same in groupby(spans):
        samples = len(list(same))
        full = [(start, stop) for start, stop in of_sample if start < stop]
        column = 0
        for i in range(0, len(full), SPANS_AT_ONCE):
            together = full[i : i + SPANS_AT_ONCE]
            yield first, samples, column, together
            column += sum(stop - start for start, stop in together)
        first += samples


def span_arguments(together: list[tuple[int, int]], block: int) -> tuple[int, dict[str, int]]:
    """Of the spans of a launch: how many blocks of keys they make, and the arguments that say where they lie."""
    bounds = [*(bound for span in together for bound in span), *[0] * (2 * (SPANS_AT_ONCE - len(together)))]
    named = {f"{name}{i}": bounds[2 * i + end] for i in range(4) for end, name in enumerate(("start", "stop"))}
    return sum(-(-(stop - start) // block) for start, stop in together), named


def _clear_unwritten(out: Tensor, request: RowRequest) -> None:
    """Zeros where no launch writes: columns that a sample lacks, sums over no rows."""
    if request.rows == 0 or request.cu_seqlens_q is not None:  # packed rows may belong to no sample
        out.zero_()
        return
    for sample, spans in enumerate(request.spans):
        columns = sum(stop - start for start, stop in spans)
        if columns < out.shape[-1]:
            out[sample, ..., columns:].zero_()


def _take_rows(request: RowRequest, chunk: slice) -> RowRequest:
    """Of what lies along the rows, those of one chunk; `rows` stays what a mean over rows divides by."""
    positions = None if request.q_positions is None else request.q_positions[:, chunk]
    lse_shape = (*request.lse_shape[:2], chunk.stop - chunk.start)
    return dataclasses.replace(request, q_positions=positions, lse_shape=lse_shape)


def _most_rows(query: Layout, request: RowRequest) -> int:
    """Rows of this chunk, or of the longest sample."""
    return query.shape[2] if request.cu_seqlens_q is None else request.rows


def card_of(device: torch.device) -> Card:
    return INTERPRETED if device.type == "cpu" else _cuda_card(device.index)


@cache
def _cuda_card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card.of((properties.major, properties.minor), properties.multi_processor_count)
