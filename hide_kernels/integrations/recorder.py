"""What is asked of a layer's attention, and what came back: rows by their place in a sequence. Knows no framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hide_kernels.attention_received import attention_received
from hide_kernels.attention_received.request import Reduction
from hide_kernels.attention_rows import AttentionRows, attention_rows
from hide_kernels.attention_rows.reference import columns_of_spans
from hide_kernels.attention_rows.request import KeySpans, reduced_heads
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
class _Received:
    """What keys have received by now: a sum, with the number of queries that it is of, or the maxima of each head."""

    total: Tensor
    count: Tensor
    kv_heads: int

    def add(self, new: _Received, maxima: bool) -> _Received:
        """Of the queries of a later forward, which may have more keys."""
        more = new.total.shape[-1] - self.total.shape[-1]
        total, count = (nn.functional.pad(x, (0, max(0, more))) for x in (self.total, self.count))
        joined = torch.maximum(total, new.total) if maxima else total + new.total
        return _Received(joined, count + new.count, self.kv_heads)


@dataclass(eq=False)
class RowRecorder:
    """Rows of one layer, of one forward or of several that continue a sequence.

    queries: strictly increasing positions in the sequence; `None`: every query; "generated": the last query of each
    forward. received: how to reduce what keys receive from all queries, whatever `queries` says; `None`: it is not
    recorded. The other fields are as in `attention_rows`.
    """

    layer: int
    queries: list[int] | Literal["generated"] | None
    key_spans: KeySpans | None = None
    causal: bool = True
    head_reduction: Any = "mean"
    return_lse: bool = False
    process_group: ProcessGroup | None = None
    received: Reduction | None = None
    pieces: list[AttentionRows] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: int = 0
    keys: int = 0
    _received: _Received | None = None

    def __post_init__(self) -> None:
        if self.received not in (None, "sum", "mean", "max"):
            raise ValueError(f"received: got {self.received!r}, want None, 'sum', 'mean' or 'max'")

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
    ) -> bool:
        """Add what is wanted of one forward; whether that is anything.

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
        if not here and self.received is None:
            return False
        self.keys = max(self.keys, key.shape[2])
        forward = _Forward(query, key, first, visible, spans, window if self.causal else None, self.causal, self.layer)
        settings = {"key_spans": spans, "causal": self.causal, "window": forward.window, "scale": scale}
        settings |= {"softcap": softcap, "key": forward.padded_key()}
        # Of hidden keys, and for a query that sees none, it says nothing.
        known = lse if self.causal and self.process_group is None else None
        if known is not None:
            known = known.float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        if here:
            whole = len(here) == here[-1] - here[0] + 1
            chosen: Any = slice(here[0], here[-1] + 1) if whole else here
            new = attention_rows(
                query[:, :, chosen],
                lse=None if known is None or self.return_lse else known[:, :, chosen],
                head_reduction=self.head_reduction,
                return_lse=self.return_lse,
                process_group=self.process_group,
                **forward.limits(here),
                **settings,
            )
            self.pieces.append(new)
            self.positions += [first + place for place in here]
        if self.received is not None:
            if first == 0:
                self._received = None
            one = self._of_forward(forward, known, settings)
            self._received = one if self._received is None else self._received.add(one, self.received == "max")
        return True

    @torch.no_grad()
    def record_packed(
        self, query: Tensor, key: Tensor, cu_seqlens: Tensor, *, scale: float | None = None, order: Tensor | None = None
    ) -> None:
        """Set what keys receive from the queries of their own sequence, each of which sees all of its keys.

        Args:
            query: (total, Hq, D), sequences one after another. key: (total, Hkv, D). cu_seqlens: (sequences + 1,), from
                0 to total.
            scale: as in `attention_rows`.
            order: (total,), which key of the result each of these is; `None`: as they lie.
        """
        lengths = cu_seqlens.diff()
        longest = int(lengths.max())
        maxima = self.received == "max"
        found = attention_received(
            query,
            key,
            reduction="max" if maxima else "sum",
            head_reduction="none" if maxima else self.head_reduction,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            scale=scale,
        ).received
        there = torch.arange(longest, device=key.device) < lengths[:, None]
        total = found.movedim(0, -2)[..., there]
        count = lengths.repeat_interleave(lengths)
        if order is not None:
            places = order.to(key.device).argsort()
            total, count = total[..., places], count[places]
        self._received = _Received(total[None], count[None], key.shape[1])

    @torch.no_grad()
    def _of_forward(self, forward: _Forward, lse: Tensor | None, settings: dict[str, Any]) -> _Received:
        """What keys receive from the queries of one forward; those of padding give nothing."""
        limits = forward.limits(list(range(forward.query.shape[2])))
        positions = limits["q_positions"]
        starts, stops = (limits.get(name) for name in ("kv_starts", "kv_lens"))
        query, batch, length = forward.query, forward.query.shape[0], settings["key"].shape[2]
        if forward.visible is not None:
            assert starts is not None and stops is not None
            padding = (positions < starts[:, None]) | (positions >= stops[:, None])
            if self.causal:
                limits["q_positions"] = torch.where(padding, -1, positions)
            else:
                nothing = {**settings, "key_spans": []}
                found = attention_rows(query, return_lse=True, **nothing, **limits).lse
                assert found is not None
                lse = found.masked_fill(padding[:, None], torch.inf)
        received = attention_received(
            query,
            # Maxima of several forwards are joined before heads are.
            reduction="max" if self.received == "max" else "sum",
            head_reduction="none" if self.received == "max" else self.head_reduction,
            lse=lse,
            **limits,
            **settings,
        ).received
        # How many of these queries, which stand one after another, see each key.
        n = torch.arange(length, device=query.device).expand(batch, length)
        low, high = positions[0], positions[-1] + 1
        seen = torch.ones_like(n, dtype=torch.bool)
        if forward.visible is not None and starts is not None and stops is not None:
            low, high = low.maximum(starts)[:, None], high.minimum(stops)[:, None]
            seen = n >= starts[:, None]
        if stops is not None:
            seen = seen & (n < stops[:, None])
        if self.causal:
            low = n.maximum(low)
            high = high if forward.window is None else (n + forward.window).minimum(high)
        count = torch.where(seen, (high - low).clamp(min=0), 0)
        return _Received(received, columns_of_spans(count, settings["key_spans"]), forward.key.shape[1])

    def received_by_now(self) -> Tensor | None:
        """As `attention_received` returns it, of all queries so far; `None` where it is not recorded."""
        if self._received is None:
            return None
        total, count = self._received.total, self._received.count
        if self.received == "max":
            return reduced_heads(total, self.head_reduction, self._received.kv_heads)
        if self.received == "mean":
            return total / count.clamp(min=1).view(len(count), *[1] * (total.dim() - 2), -1)
        return total

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
        self._received = None

    def check_complete(self, hint: str = "") -> None:
        """`ValueError` for queries that no forward computed, and spans beyond the keys; hint: what may be wrong."""
        missing = sorted(set(self.queries if isinstance(self.queries, list) else ()) - set(self.positions))
        if missing or not (self.pieces or self._received):
            what = f"queries {missing[:8]}{'...' if len(missing) > 8 else ''}" if missing else "any query"
            raise ValueError(f"layer {self.layer}: no forward inside the block computed {what}{hint}")
        if _last_key(self.key_spans) > self.keys:
            raise ValueError(f"key_spans: got {self.key_spans}, but the sequence had {self.keys} keys")


@dataclass(frozen=True)
class _Forward:
    """The arguments of `RowRecorder.record` that say which key a query sees."""

    query: Tensor
    key: Tensor
    first: int
    visible: Tensor | None
    spans: KeySpans | None
    window: int | None
    causal: bool
    layer: int

    def limits(self, here: list[int]) -> dict[str, Any]:
        """The mask of these queries, as `attention_rows` takes it. Raises as `mask_limits`."""
        batch, keys = self.query.shape[0], self.key.shape[2]
        limits = mask_limits(
            self.visible, here, self.first, self.window, self.causal, batch, keys, self.key.device, self.layer
        )
        if _last_key(self.spans) > keys:
            limits.setdefault("kv_lens", torch.full((batch,), keys, device=self.key.device))
        return limits

    def padded_key(self) -> Tensor:
        """With keys that nobody sees yet, where a span lies in a later part of the prompt."""
        to_come = _last_key(self.spans) - self.key.shape[2]
        return nn.functional.pad(self.key, (0, 0, 0, to_come)) if to_come > 0 else self.key


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

    @property
    def received(self) -> dict[int, Tensor]:
        """`{layer: what each key received}` from all queries by now, as `attention_received` documents it."""
        found = {layer: recorder.received_by_now() for layer, recorder in self._recorders.items()}
        return {layer: received for layer, received in found.items() if received is not None}

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
