"""Attention rows out of an unmodified Hugging Face model, beside whatever attention implementation it runs.

While a capture is open, the chosen layers' attention modules see a copy of their config that names our function in
transformers' `AttentionInterface`. The function computes the rows from the post-RoPE query and key that it is given
and then calls the implementation that the model was set to. Nothing is patched in place, other layers and the vision
tower are not touched, masks are built as before, and the hidden states are the same bits.

All captures of a layer share one such copy, and each records what the thread that opened it runs: captures and forwards
of several threads may overlap in any order.
"""

from __future__ import annotations

import copy
import operator
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
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
# Held while a layer's captures change, and never while a model runs.
_routes = threading.Lock()


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
    appended. A forward that starts a sequence anew replaces what was captured before. Only forwards of the thread that
    opened the block are recorded; those of other threads run as if there were no block::

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
            "generated": the last query of the prompt and then each new token's, inside the model's `generate`: as many
            rows as it returns new tokens, those behind a sample's end included, greedy or sampled, with any cache or
            none; decoding is not compiled meanwhile. Batches must be padded on the left, as `generate` wants. With
            `num_return_sequences` the spans of a prompt are those of all its sequences.
        key_spans, head_reduction, return_lse: as in `hide_kernels.attention_rows`.
        process_group: the ranks of a model under tensor parallelism (`tp_plan="auto"`), each of which runs the same
            block; sums over heads are then over the heads of all of them.
        causal: True gives the model's own attention, equal to `output_attentions=True`; False lets every row see
            every key of its forward (published HiDe, arXiv 2510.00054). Padding is left out in both.

    Yields:
        `{layer: AttentionRows}`, filled by the forwards that run inside the block. Memory is that of the rows. With
        "generated" and no `key_spans`, earlier rows are padded with zeros for the keys that came later.

    Raises:
        ValueError: for layers that the model does not have or that have no softmax rows (the others of a hybrid decoder
            can be captured), a mask that is not causal, sliding or padding, attention sinks, from `generate` for a way
            of generating whose rows belong to no sequence (beams, an assistant, guidance, ...), and, on leaving the
            block, for rows that no forward of this thread computed.
    """
    modules = decoder_attention(model)
    depth = _depth(model, modules)
    if rows is not None and not (isinstance(rows, str) and rows == "generated"):
        try:
            rows = [operator.index(row) for row in rows]
        except TypeError:
            raise TypeError(f'rows: got {rows!r}, want None, "generated" or strictly increasing ints') from None
        if not rows or rows[0] < 0 or any(a >= b for a, b in pairwise(rows)):
            raise ValueError(f'rows: got {rows}, want None, "generated" or strictly increasing positions >= 0')
    for layer in layers:
        if not -depth <= layer < depth:
            raise ValueError(f"layers: got {layer}, want 0 to {depth - 1} ({type(model).__name__})")
        if layer % depth not in modules:
            able = ", ".join(map(str, modules))
            raise ValueError(f"layers: {_why_not(model, layer % depth)}; layers that can be captured: {able}")
    if rows == "generated" and not hasattr(model, "generate"):
        raise ValueError(f'rows: got "generated", want the model whose generate runs; {type(model).__name__} has none')
    captures = [
        _Capture(layer, rows, key_spans, causal, head_reduction, return_lse, process_group)
        for layer in dict.fromkeys(layer % depth for layer in layers)
    ]
    if not captures:
        raise ValueError("layers: got none, want at least one decoder layer")
    with ExitStack() as routes:
        for capture in captures:
            routes.enter_context(_routed(modules[capture.layer], capture))
        routes.enter_context(_generating(model, captures))
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
    """Inside, the module sees a config that sends its attention through the capture, beside those that are open."""

    def ran(*_: Any) -> None:
        if capture.here and not capture.called:
            raise ValueError(
                f"layer {capture.layer}: its {type(module).__name__} computes attention by itself, not through "
                "transformers' attention interface; its rows cannot be captured"
            )
        if capture.here:
            capture.called = False

    with _routes:
        seen: Any = module.config
        routed = seen if _captures(seen) else copy.copy(seen)
        if routed is not seen:
            routed._attn_implementation_internal = IMPLEMENTATION
            routed.hide_base = seen
        # A new tuple each time: who reads it in another thread has the old one or the new one.
        routed.hide_captures = (*_captures(seen), capture)
        capture.base_config = routed.hide_base
        module.config = routed
        hook = module.register_forward_hook(ran)
    try:
        yield
    finally:
        with _routes:
            hook.remove()
            routed.hide_captures = tuple(one for one in routed.hide_captures if one is not capture)
            if not routed.hide_captures:
                module.config = routed.hide_base


def _captures(config: Any) -> tuple[_Capture, ...]:
    """Those that are open on the module that has this config, in the order in which they were opened."""
    return getattr(config, "hide_captures", ())


def capturing(model: PreTrainedModel) -> bool:
    """Whether a capture that this thread has opened is open on one of the model's layers."""
    return any(capture.here for module in decoder_attention(model).values() for capture in _captures(module.config))


# Settings of `generate` with the values that leave its rows to its sequences, and why others do not.
_BEAMS = "what lies in the cache is exchanged between beams"
_DRAFTS = "several drafted tokens go through the model at once, and some are taken back"
_OTHER = "it sends other sequences through the model too"
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), _BEAMS),
    "num_beam_groups": ((None, 1), _BEAMS),
    "constraints": ((None,), _BEAMS),
    "force_words_ids": ((None,), _BEAMS),
    "assistant_model": ((None,), _DRAFTS),
    "prompt_lookup_num_tokens": ((None,), _DRAFTS),
    "assistant_early_exit": ((None,), _DRAFTS),
    "use_mtp": ((None, False), _DRAFTS),
    "penalty_alpha": ((None, 0, 0.0), _OTHER),
    "guidance_scale": ((None, 1, 1.0), _OTHER),
    "token_healing": ((None, False), _OTHER),
    "dola_layers": ((None,), "its tokens come from several layers"),
    "custom_generate": ((None,), "what it sends through the model is not known"),
}
_UNSERVED_METHODS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_INSTEAD = "generate first, then capture the rows of the whole sequence in one forward"


class _WatchedGenerate:
    """A model's `generate` while captures are open on it: it tells those of its thread where it begins and ends.

    They are held to as many rows as new tokens. A thread without a capture generates as if there were none.
    """

    def __init__(self, model: Any) -> None:
        """Take the place of `generate`, and of what cannot be captured, until `close`."""
        self.captures: tuple[_Capture, ...] = ()
        self._model = model
        self._own = {name: getattr(model, name) for name in ("generate", *_UNSERVED_METHODS) if hasattr(model, name)}
        self._before = {name: vars(model)[name] for name in self._own if name in vars(model)}
        vars(model)["generate"] = self
        vars(model).update({name: partial(self._unserved, name) for name in self._own if name != "generate"})

    def close(self) -> None:
        """Put everything back."""
        for name in self._own:
            del vars(self._model)[name]
        vars(self._model).update(self._before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        captures = [capture for capture in self.captures if capture.here]
        if not captures:
            return self._own["generate"](*args, **kwargs)
        model = self._model
        arguments = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        prompt = _prompt_length(model, arguments)
        for capture in captures:
            _check_served(model, arguments, None if capture.in_prompt(prompt) else capture.layer)
            chunked = _setting(model, arguments, "prefill_chunk_size") is not None
            capture.begin(_setting(model, arguments, "num_return_sequences") or 1, chunked)
        # A compiled step would not be seen.
        found = self._own["generate"](*args, **{**kwargs, "disable_compile": True})
        sequences = found if isinstance(found, Tensor) else found.sequences
        for capture in captures:
            capture.end(sequences.shape[0], sequences.shape[1] - prompt)
        return found

    def _unserved(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if any(capture.here for capture in self.captures):
            raise ValueError(f"generate: continuous batching packs sequences, so that rows have no place; {_INSTEAD}")
        return self._own[name](*args, **kwargs)


@contextmanager
def _generating(model: Any, captures: Sequence[_Capture]) -> Iterator[None]:
    """Inside, the captures are told of what the model's `generate` does in this thread."""
    if not hasattr(model, "generate"):
        yield
        return
    with _routes:
        watch = vars(model).get("generate")
        if not isinstance(watch, _WatchedGenerate):
            watch = _WatchedGenerate(model)
        watch.captures = (*watch.captures, *captures)
    try:
        yield
    finally:
        with _routes:
            watch.captures = tuple(one for one in watch.captures if all(one is not ours for ours in captures))
            if not watch.captures:
                watch.close()


def _setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """What `generate` takes: its argument, else the given generation_config's value, else the model's own."""
    if name in arguments:
        return arguments[name]
    found = getattr(arguments.get("generation_config"), name, None)
    return found if found is not None else getattr(getattr(model, "generation_config", None), name, None)


def _prompt_length(model: Any, arguments: Mapping[str, Any]) -> int:
    """How many tokens at the beginning of its sequences `generate` was given."""
    given = arguments.get("inputs") if arguments.get("input_ids") is None else arguments["input_ids"]
    if getattr(model.config, "is_encoder_decoder", False):
        given = arguments.get("decoder_input_ids")
    elif given is None and arguments.get("inputs_embeds") is not None:
        return 0
    return 1 if given is None else int(given.shape[-1])


def _check_served(model: Any, arguments: Mapping[str, Any], layer: int | None) -> None:
    """`ValueError` for a way of generating without rows of its sequences; `None`: only rows of the prompt matter."""
    for name, (off, reason) in _UNSERVED.items():
        value = _setting(model, arguments, name)
        harmless = layer is None and reason in (_BEAMS, _DRAFTS)
        if name == "penalty_alpha" and (_setting(model, arguments, "top_k") or 0) <= 1:
            continue
        if not any(value is one or (type(value) in (int, float) and value == one) for one in off) and not harmless:
            shown = type(value).__name__ if name in ("assistant_model", "custom_generate", "constraints") else value
            raise ValueError(f"generate: rows cannot be captured with {name}={shown}: {reason}; {_INSTEAD}")
    if _setting(model, arguments, "cache_implementation") == "paged":
        raise ValueError(f"generate: rows cannot be captured with cache_implementation='paged'; {_INSTEAD}")


def decoder_attention(model: PreTrainedModel) -> dict[int, nn.Module]:
    """`{layer: attention module}` of the language model's decoder layers, vision towers left out.

    Layers without a causal attention that uses transformers' attention interface are left out. Raises `ValueError`,
    with the reason, for models that have no other.
    """
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and getattr(module, "is_causal", False) and hasattr(module, "config"):
            if layer in found:
                raise ValueError(f"model: {type(model).__name__} has two causal attentions of layer {layer} ({name})")
            found[layer] = module
    if not found:
        raise ValueError(f"model: no layer of {type(model).__name__} can be captured; {_why_not(model, 0)}")
    return dict(sorted(found.items()))


def _depth(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> int:
    """The decoder's number of layers, of all kinds."""
    config: Any = model.config.get_text_config(decoder=True)
    return max(getattr(config, "num_hidden_layers", None) or 0, max(modules) + 1)


def _why_not(model: PreTrainedModel, layer: int) -> str:
    """Why a layer that `decoder_attention` leaves out cannot be captured."""
    config: Any = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    kind = kinds[layer] if layer < len(kinds) else None
    # "linear_attention", "mamba", "conv", "moe", ...; a "hybrid" layer has attention beside something else.
    if kind not in (None, "hybrid") and ("attention" not in kind or "linear" in kind):
        return f"layer {layer} is {kind}: it has no softmax rows"
    names = {type(part).__name__ for part in model.modules() if getattr(part, "layer_idx", None) == layer}
    attentions = sorted(name for name in names if "Attention" in name)
    if attentions or not names:
        which = f" ({', '.join(attentions)})" if attentions else ""
        return f"layer {layer} has no causal attention{which} that uses transformers' attention interface"
    return f"layer {layer} is {', '.join(sorted(names))}: it has no softmax rows"


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
    thread: int = field(default_factory=threading.get_ident)
    elsewhere: bool = False
    positions: list[int] = field(default_factory=list)
    tokens: int = 0
    keys: int = 0
    generating: bool = False
    chunked: bool = False
    sequences: int = 1
    called: bool = False

    @property
    def here(self) -> bool:
        """Whether this is the thread that opened it, whose forwards it records."""
        return self.thread == threading.get_ident()

    def begin(self, sequences: int, chunked: bool) -> None:
        """`generate` begins, with so many sequences of each prompt; `chunked`: prompts come in several forwards."""
        self._forget()
        self.generating, self.chunked, self.sequences = True, chunked, sequences

    def end(self, sequences: int, new: int) -> None:
        """`generate` has returned so many sequences with so many new tokens each."""
        self.generating, self.sequences = False, 1
        if self.rows != "generated":
            return
        if self.chunked and len(self.positions) == new + 1:
            # transformers 4.57 decodes the last token of a prompt that came in chunks once more.
            self._keep(range(1, new + 1))
        got = (self.pieces[0].rows.shape[0] if self.pieces else 0, len(self.positions))
        if got != (sequences, new):
            self._forget()
            raise ValueError(
                f"layer {self.layer}: got rows for {got} (sequences, new tokens), want {(sequences, new)}: this way of "
                f"generating cannot be captured; {_INSTEAD}"
            )

    def in_prompt(self, length: int) -> bool:
        """Whether only positions of a prompt of this length are asked for."""
        return isinstance(self.rows, list) and self.rows[-1] < length

    @property
    def flash(self) -> bool:
        """Whether the layer runs a FlashAttention."""
        return "flash" in _implementation(self.base_config)

    def record(self, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        for name in ("s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k"):
            if kwargs.get(name) is not None:
                raise ValueError(f"layer {self.layer}: {name} changes its softmax; rows cannot be captured")
        restarts = kwargs.get("position_ids") if self.flash and mask is None else None
        if restarts is not None and restarts.dim() == 2 and bool((restarts.diff(dim=-1) < 1).any()):
            raise ValueError(f"layer {self.layer}: positions restart: several sequences in one row; unpack them")
        visible = None if mask is None else _visible(mask, key.shape[2])
        if (
            visible is None
            and 1 < query.shape[2] < key.shape[2]
            and not (self.flash or _implementation(self.base_config) == CONTINUING)
        ):
            # A prefill into an empty preallocated cache: the keys beyond the queries are not there yet.
            key = key[:, :, : query.shape[2]]
        first = _first_position(visible, query.shape[2], key.shape[2])
        # Without a cache each step of `generate` sends the whole sequence again.
        again = self.generating and self.rows == "generated" and first == 0
        if first < self.tokens and not again:
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
            if not again:
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
        spans: Any = self.key_spans
        if spans and self.sequences > 1 and (not spans[0] or isinstance(spans[0][0], (list, tuple))):
            # A list for each prompt, whose sequences lie one after another.
            spans = [own for own in spans for _ in range(self.sequences)]
        to_come = _last_key(spans) - key.shape[2]
        if to_come > 0:
            # A span that lies in a later part of the prompt: keys that nobody sees yet.
            limits.setdefault("kv_lens", torch.full((query.shape[0],), key.shape[2], device=query.device))
            key = nn.functional.pad(key, (0, 0, 0, to_come))
        new = attention_rows(
            query[:, :, here[0] : here[-1] + 1] if len(here) == here[-1] - here[0] + 1 else query[:, :, here],
            key,
            key_spans=spans,
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
        self._keep([place for place, position in enumerate(self.positions) if position < first])

    def _keep(self, places: Sequence[int]) -> None:
        """Of the rows, those at these places."""
        if not places:
            self._forget()
        elif len(places) < len(self.positions):
            whole = _joined(self.pieces)
            lse = whole.lse
            kept = list(places)
            self.pieces = [AttentionRows(whole.rows[..., kept, :], None if lse is None else lse[..., kept])]
            self.positions = [self.positions[place] for place in kept]

    def _forget(self) -> None:
        self.pieces.clear()
        self.positions.clear()
        self.keys = self.tokens = 0

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
            hint = "; a forward of another thread is not recorded: open the block in the thread that runs the model"
            raise ValueError(
                f"layer {self.layer}: no forward inside the block computed {what}{hint if self.elsewhere else ''}"
            )
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
    # Read once: another thread may close the last capture meanwhile, and the module then has its own config again.
    config = module.config
    for capture in _captures(config):
        if capture.here:
            capture.called = True
            capture.record(query, key, attention_mask, kwargs)
        else:
            capture.elsewhere = True
    base_config = getattr(config, "hide_base", config)
    implementation = _implementation(base_config)
    if implementation == "eager":
        base = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if base is None:
            raise ValueError(f"layer {module.layer_idx}: no eager attention function found; load the model with sdpa")
    else:
        base = ALL_ATTENTION_FUNCTIONS[implementation]
    return base(_ModuleView(module, base_config), query, key, value, attention_mask, **kwargs)


def _implementation(config: Any) -> str:
    """What a layer runs by its own config: "sdpa", "eager", "flash_attention_2", `CONTINUING`, ..."""
    name: str = config._attn_implementation or "eager"
    # Some set our name by themselves, for a whole model.
    return "sdpa" if name == IMPLEMENTATION else name


AttentionInterface.register(IMPLEMENTATION, _attention)
# Without a mask function of the same name transformers passes no mask at all, and padding is silently attended to.
AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
AttentionInterface.register(CONTINUING, _continuing_attention)
AttentionMaskInterface.register(CONTINUING, _continuing_mask)
