"""What is asked of a layer's attention, and what came back: rows by their place in a sequence. Knows no framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hide_kernels.attention_rows import AttentionRows, attention_rows
from hide_kernels.attention_rows.request import KeySpans
from hide_kernels.integrations.masks import mask_limits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CapturedAttention(NamedTuple):
    """Rows of the attention-probability matrix of one layer.

    weights: as `attention_rows` documents its `rows`, (B, queries, keys) for a mean over heads. lse: (B, Hq, queries),
    natural log, or `None` where it was not asked for.
    """

    weights: Tensor
    lse: Tensor | None


@dataclass(eq=False)
class RowRecorder:
    """Rows of one layer, of one forward or of several that continue a sequence.

    queries: strictly increasing positions in the sequence; `None`: every query; "generated": the last query of each
    forward. The other fields are as in `attention_rows`.
    """

    layer: int
    queries: list[int] | Literal["generated"] | None
    key_spans: KeySpans | None = None
    causal: bool = True
    head_reduction: Any = "mean"
    return_lse: bool = False
    process_group: ProcessGroup | None = None
    pieces: list[AttentionRows] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: int = 0
    keys: int = 0

    def record(
        self,
        query: Tensor,
        key: Tensor,
        *,
        first: int,
        visible: Tensor | None = None,
        key_spans: KeySpans | None = None,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        lse: Tensor | None = None,
    ) -> None:
        """Add the rows that are wanted of one forward.

        Args:
            query: (B, Hq, Q, D), the queries of the forward, of which the first stands at position `first`.
            key: (B, Hkv, K, D), all keys up to the forward's last.
            visible: (B, Q, K), or (B, 1, K) for padding alone, bool; `None`: as `causal` says.
            key_spans: instead of the recorder's, where samples have become several sequences.
            window, scale, softcap: as in `attention_rows`.
            lse: (B, Hq, Q), natural log, of the same scores under the model's own mask; any value for a query that sees
                no key. Then the keys are read once instead of twice.

        Raises:
            ValueError: a mask that is neither causal, sliding nor padding.
        """
        spans: Any = self.key_spans if key_spans is None else key_spans
        queries = query.shape[2]
        self.tokens = first + queries
        wanted: Sequence[int] = range(first, first + queries)
        if self.queries == "generated":
            wanted = wanted[-1:]
        elif self.queries is not None:
            wanted = self.queries
        here = [position - first for position in wanted if 0 <= position - first < queries]
        if not here:
            return
        window = window if self.causal else None
        limits = mask_limits(
            visible, here, first, window, self.causal, query.shape[0], key.shape[2], query.device, self.layer
        )
        self.keys = max(self.keys, key.shape[2])
        to_come = _last_key(spans) - key.shape[2]
        if to_come > 0:
            # A span that lies in a later part of the prompt: keys that nobody sees yet.
            limits.setdefault("kv_lens", torch.full((query.shape[0],), key.shape[2], device=query.device))
            key = nn.functional.pad(key, (0, 0, 0, to_come))
        whole = len(here) == here[-1] - here[0] + 1
        chosen: Any = slice(here[0], here[-1] + 1) if whole else here
        # Of hidden keys, and for a query that sees none, it says nothing.
        known = lse is not None and self.causal and not self.return_lse and self.process_group is None
        new = attention_rows(
            query[:, :, chosen],
            key,
            lse=lse[:, :, chosen].float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
            if known and lse is not None
            else None,
            key_spans=spans,
            causal=self.causal,
            window=window,
            scale=scale,
            softcap=softcap,
            head_reduction=self.head_reduction,
            return_lse=self.return_lse,
            process_group=self.process_group,
            **limits,
        )
        self.pieces.append(new)
        self.positions += [first + place for place in here]

    def keep_before(self, first: int) -> None:
        """A forward begins before the end of what was seen: the rows from there on are of another continuation."""
        self.keep([place for place, position in enumerate(self.positions) if position < first])

    def keep(self, places: Sequence[int]) -> None:
        """Of the rows, those at these places."""
        if not places:
            self.forget()
        elif len(places) < len(self.positions):
            whole = _joined(self.pieces)
            kept = list(places)
            lse = None if whole.lse is None else whole.lse[..., kept]
            self.pieces = [AttentionRows(whole.rows[..., kept, :], lse)]
            self.positions = [self.positions[place] for place in kept]

    def forget(self) -> None:
        """As if nothing had been recorded."""
        self.pieces.clear()
        self.positions.clear()
        self.keys = self.tokens = 0

    def check_complete(self, hint: str = "") -> None:
        """`ValueError` for queries that no forward computed, and spans beyond the keys; hint: what may be wrong."""
        missing = sorted(set(self.queries if isinstance(self.queries, list) else ()) - set(self.positions))
        if missing or not self.positions:
            what = f"queries {missing[:8]}{'...' if len(missing) > 8 else ''}" if missing else "any query"
            raise ValueError(f"layer {self.layer}: no forward inside the block computed {what}{hint}")
        if _last_key(self.key_spans) > self.keys:
            raise ValueError(f"key_spans: got {self.key_spans}, but the sequence had {self.keys} keys")


class CapturedLayers(Mapping[int, CapturedAttention]):
    """`{layer: CapturedAttention}` of the layers that have rows by now; several forwards are joined on access."""

    def __init__(self, recorders: Sequence[RowRecorder]) -> None:
        self._recorders = {recorder.layer: recorder for recorder in recorders}

    def __getitem__(self, layer: int) -> CapturedAttention:
        recorder = self._recorders[layer]
        if not recorder.pieces:
            raise KeyError(layer)
        recorder.pieces = [_joined(recorder.pieces)]
        return CapturedAttention(*recorder.pieces[0])

    def __iter__(self) -> Iterator[int]:
        return (layer for layer, recorder in self._recorders.items() if recorder.pieces)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _joined(pieces: Sequence[AttentionRows]) -> AttentionRows:
    """The rows of several forwards one after another; for keys that came later they hold zeros."""
    if len(pieces) == 1:
        return pieces[0]
    widest = max(piece.rows.shape[-1] for piece in pieces)
    rows = [nn.functional.pad(piece.rows, (0, widest - piece.rows.shape[-1])) for piece in pieces]
    lses = [piece.lse for piece in pieces if piece.lse is not None]
    return AttentionRows(torch.cat(rows, -2), torch.cat(lses, -1) if lses else None)


def _last_key(key_spans: Any) -> int:
    """One past the last key of all spans of all samples; the largest integer in there."""
    if isinstance(key_spans, (list, tuple)):
        return max(map(_last_key, key_spans), default=0)
    return int(key_spans) if hasattr(key_spans, "__index__") else 0
