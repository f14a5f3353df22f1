"""Attention rows out of an unmodified Hugging Face model, beside whatever attention implementation it runs.

While a capture is open, the chosen layers' attention modules see a copy of their config that names our function in
transformers' `AttentionInterface`. The function computes the rows from the post-RoPE query and key that it is given
and then calls the implementation that the model was set to. Nothing is patched in place, other layers and the vision
tower are not touched, masks are built as before, and the hidden states are the same bits.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hide_kernels.attention_rows import AttentionRows, attention_rows
from hide_kernels.attention_rows.request import KeySpans

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Neither "flash" nor "sdpa" may stand in the names: transformers reads meaning into both.
IMPLEMENTATION = "hide_rows"
CONTINUING = "hide_continuing"


@contextmanager
def capture_attention_rows(
    model: PreTrainedModel,
    *,
    layers: Sequence[int],
    rows: Sequence[int] | Literal["generated"] | None = None,
    key_spans: KeySpans | None = None,
    causal: bool = True,
    head_reduction: Literal["mean", "none", "kv_group"] | Tensor | Sequence[float] = "mean",
    return_lse: bool = False,
    process_group: ProcessGroup | None = None,
) -> Iterator[CapturedRows]:
    """Record softmax attention rows of chosen layers while the model runs.

    Works with eager, SDPA and FlashAttention, with any cache, in one forward or in several that continue a sequence
    (a chunked prefill): rows are addressed by their position in the sequence, and those of later forwards are
    appended. A forward that starts a sequence anew replaces what was captured before::

        with capture_attention_rows(model, layers=[14], rows=range(900, 920), key_spans=[(15, 889)]) as captured:
            model(**inputs)
        captured[14].rows  # (B, 20, 874), float32

        with capture_attention_rows(model, layers=[14], rows="generated", key_spans=[(15, 889)]) as captured:
            model.generate(**inputs, max_new_tokens=50)
        captured[14].rows  # (B, 50, 874): row i is that of the query from which token i was predicted

    Args:
        model: a Hugging Face model whose decoder layers use transformers' attention interface.
        layers: zero-based decoder layers; negative ones count from the last.
        rows: strictly increasing positions in the (padded) sequence; `None`: every query of every forward;
            "generated": the last query of the prompt and then each new token's, inside `generate`, greedy or sampled
            (not with beams, an assistant or a compiled decode). Batches must be padded on the left, as `generate`
            wants. With `prefill_chunk_size`, transformers 4.57 decodes the last prompt token: one more row at first.
        key_spans, head_reduction, return_lse: as in `hide_kernels.attention_rows`.
        process_group: the ranks of a model under tensor parallelism (`tp_plan="auto"`), each of which runs the same
            block; sums over heads are then over the heads of all of them.
        causal: True gives the model's own attention, equal to `output_attentions=True`; False lets every row see
            every key of its forward (published HiDe, arXiv 2510.00054). Padding is left out in both.

    Yields:
        `{layer: AttentionRows}`, filled by the forwards that run inside the block. Memory is that of the rows. With
        "generated" and no `key_spans`, earlier rows are padded with zeros for the keys that came later.

    Raises:
        ValueError: for layers that the model does not have, a mask that is not causal, sliding or padding, attention
            sinks, and, on leaving the block, for rows that no forward computed.
    """
    modules = decoder_attention(model)
    if rows is not None and not (isinstance(rows, str) and rows == "generated"):
        try:
            rows = [operator.index(row) for row in rows]
        except TypeError:
            raise TypeError(f'rows: got {rows!r}, want None, "generated" or strictly increasing ints') from None
        if not rows or rows[0] < 0 or any(a >= b for a, b in pairwise(rows)):
            raise ValueError(f'rows: got {rows}, want None, "generated" or strictly increasing positions >= 0')
    for layer in layers:
        if not -len(modules) <= layer < len(modules):
            raise ValueError(f"layers: got {layer}, want 0 to {len(modules) - 1} ({type(model).__name__})")
    captures = [
        _Capture(layer, rows, key_spans, causal, head_reduction, return_lse, process_group)
        for layer in dict.fromkeys(layer % len(modules) for layer in layers)
    ]
    if not captures:
        raise ValueError("layers: got none, want at least one decoder layer")
    with ExitStack() as routes:
        for capture in captures:
            routes.enter_context(_routed(modules[capture.layer], capture))
        yield CapturedRows(captures)
    for capture in captures:
        capture.check_complete()


@contextmanager
def capture_module_rows(
    module: nn.Module, *, rows: Sequence[int], key_spans: KeySpans | None = None, causal: bool = True
) -> Iterator[CapturedRows]:
    """`capture_attention_rows` of one attention module, while it runs by itself or inside a model; head mean.

    Args:
        module: with a `config` whose attention implementation it runs through transformers' attention interface.
        rows, key_spans, causal: as in `capture_attention_rows`.

    Yields:
        `{layer: AttentionRows}` of the module's `layer_idx` (0 where it has none).

    Raises:
        ValueError: as `capture_attention_rows`.
    """
    capture = _Capture(getattr(module, "layer_idx", None) or 0, list(rows), key_spans, causal, "mean", False, None)
    with _routed(module, capture):
        yield CapturedRows([capture])
    capture.check_complete()


@contextmanager
def _routed(module: nn.Module, capture: _Capture) -> Iterator[None]:
    """Inside, the module sees a config that sends its attention through the capture."""
    config: Any = module.config
    capture.base_config = config
    routed = copy.copy(config)
    routed._attn_implementation_internal = IMPLEMENTATION
    routed.hide_capture = capture
    try:
        module.config = routed
        yield
    finally:
        module.config = config


def decoder_attention(model: PreTrainedModel) -> dict[int, nn.Module]:
    """`{layer: attention module}` of the language model's decoder layers, vision towers left out.

    Raises `ValueError` for models without such modules or with gaps in their numbering.
    """
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and getattr(module, "is_causal", False) and hasattr(module, "config"):
            if layer in found:
                raise ValueError(f"model: {type(model).__name__} has two causal attentions of layer {layer} ({name})")
            found[layer] = module
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(
            f"model: {type(model).__name__} has causal attention modules for layers {sorted(found)}, want 0, 1, ...: "
            "its decoder does not use transformers' attention interface"
        )
    return found


class CapturedRows(Mapping[int, AttentionRows]):
    """`{layer: AttentionRows}` of the layers that have rows by now; those of several forwards are joined on access."""

    def __init__(self, captures: Sequence[_Capture]) -> None:
        self._captures = {capture.layer: capture for capture in captures}

    def __getitem__(self, layer: int) -> AttentionRows:
        capture = self._captures[layer]
        if not capture.pieces:
            raise KeyError(layer)
        capture.pieces = [_joined(capture.pieces)]
        return capture.pieces[0]

    def __iter__(self) -> Iterator[int]:
        return (layer for layer, capture in self._captures.items() if capture.pieces)

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


@dataclass(eq=False)
class _Capture:
    """What is asked of one layer, and the answer."""

    layer: int
    rows: list[int] | Literal["generated"] | None
    key_spans: KeySpans | None
    causal: bool
    head_reduction: Any
    return_lse: bool
    process_group: ProcessGroup | None
    pieces: list[AttentionRows] = field(default_factory=list)
    base_config: Any = None
    positions: list[int] = field(default_factory=list)
    tokens: int = 0
    keys: int = 0

    @property
    def implementation(self) -> str:
        """What the layer runs without this capture: "sdpa", "eager", "flash_attention_2", or an outer capture."""
        return self.base_config._attn_implementation or "eager"

    @property
    def innermost(self) -> str:
        """What the layer runs under all captures."""
        outer: _Capture | None = getattr(self.base_config, "hide_capture", None)
        return outer.innermost if outer is not None else self.implementation

    @property
    def flash(self) -> bool:
        """Whether that is a FlashAttention."""
        return "flash" in self.innermost

    def record(self, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        for name in ("s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k"):
            if kwargs.get(name) is not None:
                raise ValueError(f"layer {self.layer}: {name} changes its softmax; rows cannot be captured")
        restarts = kwargs.get("position_ids") if self.flash and mask is None else None
        if restarts is not None and restarts.dim() == 2 and bool((restarts.diff(dim=-1) < 1).any()):
            raise ValueError(f"layer {self.layer}: positions restart: several sequences in one row; unpack them")
        visible = None if mask is None else _visible(mask, key.shape[2])
        if visible is None and 1 < query.shape[2] < key.shape[2] and not (self.flash or self.innermost == CONTINUING):
            # A prefill into an empty preallocated cache: the keys beyond the queries are not there yet.
            key = key[:, :, : query.shape[2]]
        first = _first_position(visible, query.shape[2], key.shape[2])
        if first < self.tokens:
            self._go_back(first)
        sliding = kwargs.get("sliding_window")
        if sliding is not None and (first != self.tokens if self.tokens else first >= max(1, sliding - 1)):
            raise ValueError(
                f"layer {self.layer}: its sliding-window cache may have dropped keys, so their places are unknown; "
                "capture a layer with full attention, or use a cache that keeps all keys"
            )
        self.tokens = first + query.shape[2]
        wanted: Sequence[int] = range(first, first + query.shape[2])
        if self.rows == "generated":
            self._drop_prompt(query.shape[2])
            wanted = wanted[-1:]
        elif self.rows is not None:
            wanted = self.rows
        here = [row - first for row in wanted if 0 <= row - first < query.shape[2]]
        if not here:
            return
        window = sliding if self.causal else None
        limits = _limits(
            visible, here, first, window, self.causal, query.shape[0], key.shape[2], query.device, self.layer
        )
        self.keys = max(self.keys, key.shape[2])
        to_come = _last_key(self.key_spans) - key.shape[2]
        if to_come > 0:
            # A span that lies in a later part of the prompt: keys that nobody sees yet.
            limits.setdefault("kv_lens", torch.full((query.shape[0],), key.shape[2], device=query.device))
            key = nn.functional.pad(key, (0, 0, 0, to_come))
        new = attention_rows(
            query[:, :, here[0] : here[-1] + 1] if len(here) == here[-1] - here[0] + 1 else query[:, :, here],
            key,
            key_spans=self.key_spans,
            causal=self.causal,
            window=window,
            scale=kwargs.get("scaling"),
            softcap=kwargs.get("softcap"),
            head_reduction=self.head_reduction,
            return_lse=self.return_lse,
            process_group=self.process_group,
            **limits,
        )
        self.pieces.append(new)
        self.positions += [first + row for row in here]

    def _go_back(self, first: int) -> None:
        """A forward begins before the end of what was seen: the rows from there on are of another continuation."""
        kept = [place for place, position in enumerate(self.positions) if position < first]
        if len(kept) < len(self.positions):
            whole = _joined(self.pieces)
            lse = whole.lse
            self.pieces = [AttentionRows(whole.rows[..., kept, :], None if lse is None else lse[..., kept])]
            self.positions = [self.positions[place] for place in kept]
        if not kept:
            self.pieces.clear()
            self.keys = 0

    def _drop_prompt(self, queries: int) -> None:
        """Of a prompt that comes in several forwards, only the last one's last query predicts a token."""
        if queries > 1 and len(self.positions) > 1:
            raise ValueError(f"layer {self.layer}: {queries} queries in a decode step; capture without an assistant")
        if queries > 1:
            self.positions.clear()
            self.pieces.clear()

    def check_complete(self) -> None:
        missing = sorted(set(self.rows if isinstance(self.rows, list) else ()) - set(self.positions))
        if missing or not self.positions:
            what = f"rows {missing[:8]}{'...' if len(missing) > 8 else ''}" if missing else "any row"
            raise ValueError(f"layer {self.layer}: no forward inside the block computed {what}")
        if _last_key(self.key_spans) > self.keys:
            raise ValueError(f"key_spans: got {self.key_spans}, but the sequence had {self.keys} keys")


def _last_key(key_spans: Any) -> int:
    """One past the last key of all spans of all samples; the largest integer in there."""
    if isinstance(key_spans, (list, tuple)):
        return max(map(_last_key, key_spans), default=0)
    return int(key_spans) if hasattr(key_spans, "__index__") else 0


def _visible(mask: Tensor, length: int) -> Tensor:
    """(B, Q, K) or, for a padding mask, (B, 1, K) bool of the keys that each query sees."""
    if mask.dim() == 2:
        return mask[:, None, -length:].bool()
    mask = mask[:, 0, :, :length]
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((hidden | (mask == 0)).all()):
        raise ValueError("attention_mask: an additive mask with values other than 0 and -inf changes the softmax")
    return ~hidden


def _first_position(visible: Tensor | None, queries: int, keys: int) -> int:
    """Sequence position of the first query: keys - queries, or less where a preallocated cache is not full."""
    if visible is None or visible.shape[1] == 1 != queries:
        return keys - queries
    # The last key that a query sees is its own, unless the query is padding: then one at the other end tells.
    return int(torch.maximum(_last(visible[:, 0]), _last(visible[:, -1]) + 1 - queries).max())


def _last(visible: Tensor) -> Tensor:
    """Index of the last True along the last axis; -1 where there is none."""
    index = visible.shape[-1] - 1 - visible.flip(-1).int().argmax(-1)
    return torch.where(visible.any(-1), index, -1)


def _limits(
    visible: Tensor | None,
    here: list[int],
    first: int,
    window: int | None,
    causal: bool,
    batch: int,
    keys: int,
    device: torch.device,
    layer: int,
) -> dict[str, Any]:
    """The mask as `attention_rows` takes it: positions, starts and lengths. An equal mask or a `ValueError`."""
    positions = torch.tensor([first + row for row in here], device=device)
    if visible is None:
        return {"q_positions": positions}
    seen = visible.any(1).expand(batch, keys)
    starts = seen.int().argmax(-1)
    lens = _last(seen) + 1
    n = torch.arange(keys, device=device)
    expected = ((n >= starts[:, None]) & (n < lens[:, None]))[:, None]
    actual = seen[:, None]
    if causal and visible.shape[1] > 1:
        expected = expected & (n <= positions[:, None])
        if window is not None:
            expected = expected & (n > positions[:, None] - window)
        actual = visible[:, here].expand(batch, len(here), keys)
        # What a padding query sees is the implementation's affair: nobody reads its row.
        expected, actual = (x & (positions[:, None] >= starts[:, None, None]) for x in (expected, actual))
    if not torch.equal(expected.expand_as(actual), actual):
        raise ValueError(f"layer {layer}: its attention mask is not causal, sliding or padding; rows would be wrong")
    return {"q_positions": positions, "kv_starts": starts, "kv_lens": lens}


@contextmanager
def continuing(decoder: Any) -> Iterator[None]:
    """Inside, a decoder that runs SDPA goes on behind a cache without a mask, and without repeated keys and values.

    For several queries behind a cache transformers makes a mask of queries times keys, and with one it repeats keys
    and values for every head of a group: for 4,096 queries behind 12,288 tokens of a 7B model 64 MB and 0.23 GB. Here
    the end of the queries is taken for the end of the keys, as FlashAttention takes it. Padding still gets a mask. A
    decoder that runs something else is left as it is.
    """
    config = decoder.config
    if config._attn_implementation != "sdpa" or slides(config):
        yield
        return
    config._attn_implementation_internal = CONTINUING
    try:
        yield
    finally:
        config._attn_implementation_internal = "sdpa"


def slides(config: Any) -> bool:
    """Whether some decoder layers of a text config see a window of keys alone."""
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return "sliding_attention" in layers
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _continuing_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered as `hide_continuing`."""
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None or queries in (1, keys):
        found: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    bias: Any
    if query.is_cuda:
        # No tensor of that size is made where FlashAttention can run.
        bias = causal_lower_right(queries, keys)
    else:
        bias = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def _continuing_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    if kwargs.get("attention_mask") is None:
        return None
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    return mask


class _ModuleView:
    """An attention module with its own config again, for implementations that read `module.config`."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The function registered as `hide_rows`: record, then run the model's own implementation."""
    capture: _Capture | None = getattr(module.config, "hide_capture", None)
    if capture is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    capture.record(query, key, attention_mask, kwargs)
    if capture.implementation == "eager":
        base = getattr(sys.modules[_model_class(module).__module__], "eager_attention_forward", None)
        if base is None:
            raise ValueError(f"layer {capture.layer}: no eager attention function found; load the model with sdpa")
    else:
        base = ALL_ATTENTION_FUNCTIONS[capture.implementation]
    return base(_ModuleView(module, capture.base_config), query, key, value, attention_mask, **kwargs)


def _model_class(module: Any) -> type:
    return _model_class(module._module) if isinstance(module, _ModuleView) else type(module)


AttentionInterface.register(IMPLEMENTATION, _attention)
# Without a mask function of the same name transformers passes no mask at all, and padding is silently attended to.
AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
AttentionInterface.register(CONTINUING, _continuing_attention)
AttentionMaskInterface.register(CONTINUING, _continuing_mask)
