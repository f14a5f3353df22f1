"""A validated call of `attention_rows`, as the implementations take it: what is computed, and where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

KeySpans = Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]]
Spans = list[list[tuple[int, int]]]
HeadReduction = Literal["mean", "none", "kv_group"] | Tensor


class AttentionRows(NamedTuple):
    """`rows` as `attention_rows` documents; `lse` (B, Hq, R), natural log, or `None` when it was not asked for."""

    rows: Tensor
    lse: Tensor | None


@dataclass(frozen=True)
class RowOutput:
    """How the results of a request are made: the arguments of the same names of `attention_rows`, validated."""

    lse: Tensor | None = None
    return_lse: bool = False
    out: Tensor | None = None
    accumulate: bool = False
    workspace: Tensor | None = None


@dataclass(frozen=True)
class RowRequest:
    """What `attention_rows` documents, with defaults filled in and lengths expanded.

    `rows` and `length` are R and N, or the most rows and keys of a sample where these are packed or paged. `spans` has
    one list of (start, stop) per sample, `q_positions` is (B, R) or (total_q,), `head_reduction` a word or (Hq,)
    weights of the output's dtype, `shape` and `lse_shape` the shapes of the results.
    """

    rows: int
    length: int
    kv_heads: int
    spans: Spans
    q_positions: Tensor | None
    causal: bool
    window: int | None
    kv_starts: Tensor | None
    kv_lens: Tensor | None
    scale: float
    softcap: float | None
    softmax: bool
    head_reduction: HeadReduction
    row_reduction: Literal["mean", "sum"] | None
    shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        *,
        columns: int | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        **fields: Any,
    ) -> RowRequest:
        """A request for these tensors, with sizes and shapes filled in; `columns`: `None` for the most of a sample."""
        packed, table = fields.get("cu_seqlens_q") is not None, fields.get("block_table")
        batch, heads = len(fields["spans"]), query.shape[1]
        kv_heads = key.shape[1] if table is None else key.shape[2]
        rows = query.shape[2] if max_seqlen_q is None else max_seqlen_q
        length = max_seqlen_k
        if length is None:
            length = key.shape[2] if table is None else table.shape[1] * key.shape[1]
        reduction = fields["head_reduction"]
        kept = {"none": (heads,), "kv_group": (kv_heads,)}.get(reduction, ()) if isinstance(reduction, str) else ()
        if columns is None:
            columns = max([0, *(sum(stop - start for start, stop in spans) for spans in fields["spans"])])
        if fields["row_reduction"]:
            shape = (batch, *kept, columns)
        else:
            shape = (query.shape[0], *kept, columns) if packed else (batch, *kept, rows, columns)
        lse_shape = (heads, query.shape[0]) if packed else (batch, heads, rows)
        return cls(rows=rows, length=length, kv_heads=kv_heads, shape=shape, lse_shape=lse_shape, **fields)

    @property
    def reduces(self) -> str:
        """ "mean", "none", "kv_group" or "weights". Tensors are not to be printed, which waits for their device."""
        return self.head_reduction if isinstance(self.head_reduction, str) else "weights"

    @property
    def dense(self) -> bool:
        """Whether neither tensor is packed or paged."""
        return self.cu_seqlens_q is None and self.cu_seqlens_k is None and self.block_table is None

    @property
    def layout(self) -> dict[str, Any]:
        """Arguments that the backends look at beside query and key."""
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "block_table": self.block_table,
            "max_seqlen_q": None if self.cu_seqlens_q is None else self.rows,
            "max_seqlen_k": None if self.cu_seqlens_k is None else self.length,
        }

    def out_dtype(self, query: Tensor) -> torch.dtype:
        """Of rows and lse: float64 for float64 inputs, float32 for all others."""
        return torch.float64 if query.dtype == torch.float64 else torch.float32

    def flat(self) -> dict[str, Any]:
        """The request in the types of `torch.library`, under the names and in the order of the operator's schema.

        Spans are flat, start and stop in turn, with the number of spans of each sample. Weights stand beside the word
        `head_reduction`, which they replace.
        """
        weighted = isinstance(self.head_reduction, Tensor)
        paged_or_packed = self.cu_seqlens_k is not None or self.block_table is not None
        return {
            "weights": self.head_reduction if weighted else None,
            "q_positions": self.q_positions,
            "kv_starts": self.kv_starts,
            "kv_lens": self.kv_lens,
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
            "block_table": self.block_table,
            "spans": [bound for sample in self.spans for span in sample for bound in span],
            "spans_per_sample": [len(sample) for sample in self.spans],
            "columns": self.shape[-1],
            "max_seqlen_q": None if self.cu_seqlens_q is None else self.rows,
            "max_seqlen_k": self.length if paged_or_packed else None,
            "head_reduction": self.reduces,
            "row_reduction": self.row_reduction,
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
            "softmax": self.softmax,
        }

    @classmethod
    def of_flat(cls, query: Tensor, key: Tensor, flat: dict[str, Any]) -> RowRequest:
        """The request that `flat` was made of."""
        fields = dict(flat)
        weights, bounds = fields.pop("weights"), fields.pop("spans")
        pairs = iter(zip(bounds[::2], bounds[1::2], strict=True))
        fields["spans"] = [[next(pairs) for _ in range(count)] for count in fields.pop("spans_per_sample")]
        if weights is not None:
            fields["head_reduction"] = weights
        return cls.of(query, key, **fields)

    def head_weights(self, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What each head counts in the sum that it goes into: (Hq,)."""
        if isinstance(self.head_reduction, Tensor):
            return self.head_reduction
        terms = {"mean": heads, "kv_group": heads // self.kv_heads, "none": 1}[self.head_reduction]
        return torch.full((heads,), 1 / terms, dtype=dtype, device=device)


def reduced_heads(per_head: Tensor, reduction: HeadReduction | Sequence[float], kv_heads: int) -> Tensor:
    """What every head has, (B, Hq, ...), as `head_reduction` says: (B, ...), (B, Hq, ...) or (B, Hkv, ...)."""
    if not isinstance(reduction, str):
        weights = torch.as_tensor(reduction).to(per_head)
        return (per_head * weights.view(-1, *[1] * (per_head.dim() - 2))).sum(1)
    if reduction == "mean":
        return per_head.mean(1)
    return per_head if reduction == "none" else per_head.unflatten(1, (kv_heads, -1)).mean(2)
