"""Calls that cover the contracts of `attention_rows` and `attention_received`, for tests on any device and before
any benchmark.

Sizes are no powers of two, tensors are strided, keys that no row may see hold NaN, and memory is poisoned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hide_kernels.attention_received import AttentionReceived, attention_received
from hide_kernels.attention_rows import AttentionRows, attention_rows
from hide_kernels.testing.rows import (
    error_budget,
    poisoned_empty,
    textbook_attention_received,
    textbook_attention_rows,
)


@dataclass(frozen=True)
class Case:
    """One call: sizes and arguments. Tensors among the arguments are on the CPU and are moved to the query's device."""

    name: str
    batch: int = 2
    heads: int = 6
    kv_heads: int = 2
    rows: int = 5
    depth: int = 64
    length: int = 139
    gain: float = 2.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Query, key and arguments. The key lies in a wider (B, N, H, D) cache between NaN."""
        generator = torch.Generator().manual_seed(len(self.name))
        query = torch.randn(self.batch, self.heads, self.rows, self.depth, generator=generator) * self.gain
        key = torch.randn(self.batch, self.kv_heads, self.length, self.depth, generator=generator)
        hidden = torch.ones(self.batch, self.length, dtype=torch.bool)
        for sample in range(self.batch):
            first, last = self._seen(sample)
            hidden[sample, first:last] = False
        cache = torch.full((self.batch, self.length + 11, self.kv_heads, self.depth + 16), torch.nan)
        view = cache[:, 3 : 3 + self.length, :, 8 : 8 + self.depth].transpose(1, 2)
        view.copy_(key.masked_fill(hidden[:, None, :, None], torch.nan))
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.arguments.items()
        }
        placed = cache.to(device, dtype)[:, 3 : 3 + self.length, :, 8 : 8 + self.depth].transpose(1, 2)
        strided = query.transpose(1, 2).contiguous().transpose(1, 2).to(device, dtype)
        return strided, placed, moved

    def _seen(self, sample: int) -> tuple[int, int]:
        """An interval outside which no row of the sample sees a key."""
        first, last = 0, self.length
        if "kv_starts" in self.arguments:
            first = max(first, int(self.arguments["kv_starts"][sample]))
        if "kv_lens" in self.arguments:
            last = min(last, int(self.arguments["kv_lens"][sample]))
        if self.arguments.get("causal"):
            positions = self.arguments["q_positions"].expand(self.batch, self.rows)[sample]
            last = min(last, max(0, int(positions.max()) + 1))
        return first, max(first, last)


@dataclass(frozen=True)
class ServingCase(Case):
    """A call as serving engines lay it: `rows_of` of each sample packed, and `keys_of` each packed or paged.

    `rows_of` empty: `batch` dense samples of `rows`. `block_size` 0: packed keys. `heads_first`: pages hold (Hkv,
    block_size, D), FlashInfer's HND. Pages lie in any order between others that hold NaN, as does what fills the last
    page of a sample; the table's entries past the last page, and of pages before `kv_starts`, are -1. The last two
    query rows belong to no sample.
    """

    rows_of: tuple[int, ...] = (5, 0, 1, 17)
    keys_of: tuple[int, ...] = (139, 30, 1, 77)
    block_size: int = 0
    heads_first: bool = False

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(len(self.name))
        arguments: dict[str, Any] = {"max_seqlen_k": max(self.keys_of) + 3, **self.arguments}
        if self.rows_of:
            bounds = [0, *itertools.accumulate(self.rows_of)]
            query = torch.randn(bounds[-1] + 2, self.heads, self.depth, generator=generator) * self.gain
            arguments |= {"cu_seqlens_q": torch.tensor(bounds).int(), "max_seqlen_q": max(self.rows_of) + 1}
        else:
            shape = len(self.keys_of), self.rows, self.heads, self.depth
            query = torch.randn(shape, generator=generator).transpose(1, 2) * self.gain
        keys = [torch.randn(n, self.kv_heads, self.depth, generator=generator) for n in self.keys_of]
        if self.block_size:
            key, arguments["block_table"] = self._paged(keys, generator)
            arguments.setdefault("kv_lens", torch.tensor(self.keys_of).int())
            reach = arguments["block_table"].shape[1] * self.block_size
            arguments["max_seqlen_k"] = min(arguments["max_seqlen_k"], reach)
        else:
            key = torch.cat([*keys, torch.full((5, self.kv_heads, self.depth), torch.nan)])
            arguments["cu_seqlens_k"] = torch.tensor([0, *itertools.accumulate(self.keys_of)]).int()
        key = key.to(device, dtype)
        if self.heads_first:
            key = key.transpose(1, 2).contiguous().transpose(1, 2)
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        return query.to(device, dtype), key, moved

    def _paged(self, keys: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        counts = [-(-len(of_sample) // self.block_size) for of_sample in keys]
        order = torch.randperm(sum(counts) + 3, generator=generator).int()
        cache = torch.full((len(order), self.block_size, self.kv_heads, self.depth), torch.nan)
        table = torch.full((len(keys), max(counts) + 1), -1, dtype=torch.int32)
        starts = self.arguments.get("kv_starts", torch.zeros(len(keys)))
        used = 0
        for b, of_sample in enumerate(keys):
            for i, page in enumerate(of_sample.split(self.block_size)):
                if (i + 1) * self.block_size > starts[b]:
                    table[b, i] = order[used]
                    cache[order[used], : len(page)] = page
                used += 1
        return cache, table


def _positions(rows: int, length: int, seed: int = 0) -> Tensor:
    """(2, rows): some before every key, some past the last."""
    return torch.randint(-3, length + 5, (2, rows), generator=torch.Generator().manual_seed(seed))


CASES = [
    Case("plain"),
    Case("group of 7, 32 rows", batch=1, heads=14, rows=32),
    Case("heads = kv heads", heads=3, kv_heads=3, rows=9),
    Case("one kv head, group of 11", heads=11, kv_heads=1, rows=3),
    Case("one row", rows=1, batch=3),
    Case("70 rows", rows=70, batch=1, heads=4, length=77),
    Case("head size 32", depth=32),
    Case("head size 40", depth=40),
    Case("head size 72", depth=72),
    Case("head size 80", depth=80),
    Case("head size 96", depth=96),
    Case("head size 128", depth=128, length=301),
    Case("head size 256", depth=256, rows=3),
    Case("one key", length=1),
    Case("spans", arguments={"key_spans": [(3, 70), (71, 72), (5, 5), (120, 139), (0, 9), (2, 130)]}),
    Case("spans per sample", arguments={"key_spans": [[(3, 70), (60, 135)], [(0, 12)]]}),
    Case("one sample without spans", arguments={"key_spans": [[], [(10, 100)]]}),
    Case("causal", arguments={"q_positions": _positions(5, 139), "causal": True}),
    Case("causal, one row of positions", arguments={"q_positions": torch.tensor([0, 5, 7, 130, 138]), "causal": True}),
    Case("causal, int32", arguments={"q_positions": _positions(5, 139).int(), "causal": True}),
    Case("window", arguments={"q_positions": _positions(5, 139), "window": 40}),
    Case("causal window", arguments={"q_positions": _positions(5, 139, 1), "causal": True, "window": 100}),
    Case("left padding", arguments={"kv_starts": torch.tensor([7, 130])}),
    Case("right padding", arguments={"kv_lens": torch.tensor([100, 139], dtype=torch.int32)}),
    Case("no key for one sample", arguments={"kv_lens": torch.tensor([0, 130])}),
    Case(
        "every mask",
        arguments={
            "q_positions": _positions(5, 139, 2), "causal": True, "window": 90, "kv_starts": torch.tensor([-4, 9]),
            "kv_lens": torch.tensor([500, 120]), "key_spans": [(2, 139)],
        },
    ),
    Case("heads apart", arguments={"head_reduction": "none"}),
    Case("heads apart, rows summed", arguments={"head_reduction": "none", "row_reduction": "sum"}),
    Case("kv groups", arguments={"head_reduction": "kv_group"}),
    Case("kv groups, rows averaged", arguments={"head_reduction": "kv_group", "row_reduction": "mean"}),
    Case("weights", arguments={"head_reduction": [0.5, 0.0, -1.0, 2.0, 0.0, 0.25]}),
    Case("rows averaged", rows=70, batch=1, length=90, arguments={"row_reduction": "mean"}),
    Case(
        "rows summed, masked, weighted",
        arguments={
            "row_reduction": "sum", "head_reduction": [1.0, 2, 3, 4, 5, 6], "q_positions": _positions(5, 139),
            "causal": True,
        },
    ),
    Case("raw scores", arguments={"softmax": False, "kv_lens": torch.tensor([100, 139])}),
    Case("raw scores, softcap", arguments={"softmax": False, "softcap": 1.5}),
    Case("raw scores, weights", arguments={"softmax": False, "head_reduction": [1.0, -1, 0.5, 0, 0, 2]}),
    Case("scale", arguments={"scale": 0.3}),
    Case("negative scale", arguments={"scale": -0.25}),
    Case("no scale", arguments={"scale": 0.0}),
    Case("softcap", arguments={"softcap": 2.5, "scale": 0.5}),
    Case("negative scale, softcap", arguments={"softcap": 2.5, "scale": -0.5}),
    Case("scores of ten thousand", gain=2000.0),
]  # fmt: skip

_ROWS = (5, 0, 1, 17)
_AT_THE_END = torch.cat(
    [torch.arange(n - r, n) for r, n in zip(_ROWS, (139, 30, 1, 77), strict=True)] + [torch.zeros(2)]
)
_CAUSAL = {"q_positions": _AT_THE_END.int(), "causal": True}
SERVING_CASES = [
    ServingCase("packed"),
    ServingCase("packed, causal", arguments=_CAUSAL),
    ServingCase("packed, causal window, spans per sample, kv groups", arguments={
        **_CAUSAL, "window": 50, "head_reduction": "kv_group",
        "key_spans": [[(3, 70), (100, 140)], [(0, 12)], [], [(0, 1), (60, 79)]],
    }),
    ServingCase("packed, heads apart", arguments={"head_reduction": "none", "kv_lens": torch.tensor([100, 99, 1, 0])}),
    ServingCase("packed, causal, rows averaged", arguments={**_CAUSAL, "row_reduction": "mean"}),
    ServingCase("packed, rows summed, heads apart", rows_of=(34, 3, 0, 1), arguments={
        "row_reduction": "sum", "head_reduction": "none",
    }),
    ServingCase("packed, raw, weights", arguments={"softmax": False, "head_reduction": [1.0, -1, 0.5, 0, 0, 2]}),
    ServingCase("packed keys", rows_of=()),
    ServingCase("paged", block_size=16),
    ServingCase("paged, heads first, causal", block_size=32, heads_first=True, arguments=_CAUSAL),
    ServingCase("paged, pages of 128", block_size=128, depth=80, arguments={"key_spans": [(3, 70), (100, 140)]}),
    ServingCase("paged, pages of 256, heads apart", block_size=256, arguments={"head_reduction": "none"}),
    ServingCase("paged, pages of one key", block_size=1, keys_of=(39, 3, 1, 77)),
    ServingCase("paged, causal window, freed pages", block_size=16, arguments={
        **_CAUSAL, "window": 20, "kv_starts": torch.tensor([100, 0, 0, 32]), "softcap": 3.0,
    }),
    ServingCase("paged, dense query", block_size=16, rows_of=(), keys_of=(139, 0, 48), rows=3),
    ServingCase("paged, one row each", block_size=64, rows_of=(1, 1, 1), keys_of=(130, 64, 65), heads=14),
]  # fmt: skip


_MEAN, _MAX = {"reduction": "mean"}, {"reduction": "max"}
_SQUARE: dict[str, Any] = {"rows": 139, "batch": 1, "heads": 4}
_DIAGONAL = {"q_positions": torch.arange(139), "causal": True}
RECEIVED_CASES = [
    Case("plain", **_SQUARE),
    Case("plain, mean", **_SQUARE, arguments=_MEAN),
    Case("plain, max", **_SQUARE, arguments=_MAX),
    Case("few queries", rows=3, batch=3),
    Case("more queries than keys, max", rows=301, batch=1, length=33, arguments=_MAX),
    Case("group of 7", heads=14, rows=70, batch=1),
    Case("one kv head, group of 11, max", heads=11, kv_heads=1, rows=40, batch=1, arguments=_MAX),
    *(Case(f"head size {depth}", depth=depth, rows=70, batch=1, heads=2) for depth in (32, 40, 72, 80, 96, 128, 256)),
    Case("one key", length=1, rows=20),
    Case("causal", **_SQUARE, arguments=_DIAGONAL),
    Case("causal, mean", **_SQUARE, arguments={**_DIAGONAL, **_MEAN}),
    Case("causal, max", **_SQUARE, arguments={**_DIAGONAL, **_MAX}),
    Case("causal, several blocks, mean", rows=301, length=301, batch=1, heads=2, kv_heads=1, arguments={
        "q_positions": torch.arange(301), "causal": True, **_MEAN,
    }),
    Case("causal, queries in no order, mean", rows=70, heads=2, arguments={
        "q_positions": _positions(70, 139), "causal": True, **_MEAN,
    }),
    Case("causal, behind keys of a cache", rows=40, batch=1, arguments={
        "q_positions": torch.arange(99, 139).int(), "causal": True,
    }),
    Case("window", rows=70, heads=2, arguments={"q_positions": _positions(70, 139), "window": 40}),
    Case("causal window, mean", **_SQUARE, arguments={**_DIAGONAL, "window": 50, **_MEAN}),
    Case("left padding, causal, mean", rows=139, heads=2, arguments={
        **_DIAGONAL, "kv_starts": torch.tensor([7, 130]), **_MEAN,
    }),
    Case("right padding, max", rows=20, arguments={"kv_lens": torch.tensor([100, 139], dtype=torch.int32), **_MAX}),
    Case("no key for one sample, mean", rows=20, arguments={"kv_lens": torch.tensor([0, 130]), **_MEAN}),
    Case("every mask", rows=70, heads=2, arguments={
        "q_positions": _positions(70, 139, 2), "causal": True, "window": 90, "kv_starts": torch.tensor([-4, 9]),
        "kv_lens": torch.tensor([500, 120]), "key_spans": [(2, 139)], **_MEAN,
    }),
    Case("spans", rows=70, batch=1, arguments={
        "key_spans": [(3, 70), (71, 72), (5, 5), (120, 139), (0, 9), (2, 130)],
    }),
    Case("spans per sample, max", rows=20, arguments={"key_spans": [[(3, 70), (60, 135)], [(0, 12)]], **_MAX}),
    Case("one sample without spans", rows=20, arguments={"key_spans": [[], [(10, 100)]]}),
    Case("heads apart, mean", rows=70, batch=1, arguments={"head_reduction": "none", **_MEAN}),
    Case("kv groups, max", rows=70, batch=1, arguments={"head_reduction": "kv_group", **_MAX}),
    Case("weights", rows=70, batch=1, arguments={"head_reduction": [0.5, 0.0, -1.0, 2.0, 0.0, 0.25]}),
    Case("negative scale", rows=70, batch=1, heads=2, arguments={"scale": -0.25}),
    Case("no scale", rows=20, arguments={"scale": 0.0}),
    Case("softcap, causal", **_SQUARE, arguments={"softcap": 2.5, "scale": 0.5, **_DIAGONAL}),
    Case("negative scale, softcap, max", rows=20, arguments={"softcap": 2.5, "scale": -0.5, **_MAX}),
    Case("scores of ten thousand", gain=2000.0, rows=20),
]  # fmt: skip
RECEIVED_SERVING_CASES = [
    ServingCase("packed"),
    ServingCase("packed, causal, mean", arguments={**_CAUSAL, **_MEAN}),
    ServingCase("packed, causal window, spans per sample, kv groups, max", arguments={
        **_CAUSAL, "window": 50, "head_reduction": "kv_group", **_MAX,
        "key_spans": [[(3, 70), (100, 140)], [(0, 12)], [], [(0, 1), (60, 79)]],
    }),
    ServingCase("packed windows of an encoder, mean", rows_of=(64, 64, 48, 36), keys_of=(64, 64, 48, 36), heads=3,
                kv_heads=3, depth=72, arguments=_MEAN),
    ServingCase("packed, heads apart", arguments={"head_reduction": "none", "kv_lens": torch.tensor([100, 99, 1, 0])}),
    ServingCase("packed keys, max", rows_of=(), arguments=_MAX),
    ServingCase("paged, mean", block_size=16, arguments=_MEAN),
    ServingCase("paged, heads first, causal", block_size=32, heads_first=True, arguments=_CAUSAL),
    ServingCase("paged, pages of 128", block_size=128, depth=80, arguments={"key_spans": [(3, 70), (100, 140)]}),
    ServingCase("paged, causal window, freed pages, mean", block_size=16, arguments={
        **_CAUSAL, "window": 20, "kv_starts": torch.tensor([100, 0, 0, 32]), "softcap": 3.0, **_MEAN,
    }),
    ServingCase("paged, dense query, max", block_size=16, rows_of=(), keys_of=(139, 0, 48), rows=3, arguments=_MAX),
]  # fmt: skip


def error_of(
    case: Case,
    dtype: torch.dtype,
    device: str | torch.device,
    *,
    backend: str | None,
    call: Callable[..., AttentionRows] = attention_rows,
) -> tuple[float, float]:
    """Largest error of a call against float64, as a multiple of its budget, for rows and lse; 1 and less passes.

    The budget is that of the plain expression, computed in float32, in the order of sums that errs most: over few
    elements one order's error is a matter of luck, and libraries of matrix products differ by several times. A wrong
    -inf, or a NaN, is an infinite error.
    """
    return _error_of(textbook_attention_rows, call, case, dtype, device, backend)


def received_error_of(
    case: Case,
    dtype: torch.dtype,
    device: str | torch.device,
    *,
    backend: str | None,
    call: Callable[..., AttentionReceived] = attention_received,
) -> tuple[float, float]:
    """As `error_of`, of what keys receive."""
    return _error_of(textbook_attention_received, call, case, dtype, device, backend)


def _error_of(
    textbook: Callable[..., tuple[Tensor, Tensor]],
    call: Callable[..., tuple[Tensor, Tensor | None]],
    case: Case,
    dtype: torch.dtype,
    device: str | torch.device,
    backend: str | None,
) -> tuple[float, float]:
    query, key, arguments = case.inputs(dtype, device)
    softmax = arguments.get("softmax", True)
    want = textbook(query.double(), key.double(), **arguments)

    forward = query.float(), key.float()
    backward = forward[0].flip(-1), forward[1].flip(-1)
    orders = ((forward, False), (forward, True), (backward, False))
    plain = [textbook(*of_order, grouped=grouped, **arguments) for of_order, grouped in orders]
    with poisoned_empty():
        got, lse = call(query, key, return_lse=softmax, backend=backend, **arguments)
    error = _relative(got, want[0], [one[0] for one in plain], dtype)
    return (error, _relative(lse, want[1], [one[1] for one in plain], dtype)) if lse is not None else (error, 0.0)


def _relative(got: Tensor, want: Tensor, plain: Sequence[Tensor], dtype: torch.dtype) -> float:
    if got.shape != want.shape or got.dtype != torch.float32 or not torch.equal(got.isinf(), want.isinf()):
        return torch.inf
    finite = want.isfinite()
    if not finite.any():
        return 0.0
    error = (got.double() - want)[finite].abs().max().item()
    budget = max(error_budget(one[finite], want[finite], dtype) for one in plain)
    return error / budget if error == error and budget else (0.0 if error == 0 else torch.inf)
