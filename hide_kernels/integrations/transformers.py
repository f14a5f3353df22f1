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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(f"{__name__} needs transformers: pip install 'hide-kernels[hide]'") from None

from hide_kernels.attention_received.request import Reduction
from hide_kernels.attention_rows.request import KeySpans
from hide_kernels.integrations.generate import ThreadRecorder, changing, watched_generate
from hide_kernels.integrations.masks import first_position, visible_keys
from hide_kernels.integrations.recorder import CapturedLayers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Neither "flash" nor "sdpa" may stand in the name: transformers reads meaning into both.
IMPLEMENTATION = "hide_rows"
# But an encoder of packed images is to find "flash" there if it has it: it then makes one call instead of one a window.
PACKED_IMPLEMENTATION = "hide_rows_flash"
LOWER_RIGHT: set[str] = set()
"""Implementations, beside FlashAttention's, that take the end of the queries for the end of the keys without a mask."""


@contextmanager
def capture_attention(
    model: PreTrainedModel,
    *,
    layers: Sequence[int],
    queries: Sequence[int] | Literal["generated"] | None = None,
    key_spans: KeySpans | None = None,
    causal: bool = True,
    head_reduction: Literal["mean", "none", "kv_group"] | Tensor | Sequence[float] = "mean",
    return_lse: bool = False,
    received: Reduction | None = None,
    on_layer: Callable[[int, CapturedLayers], None] | None = None,
    process_group: ProcessGroup | None = None,
) -> Iterator[CapturedLayers]:
    """Record softmax attention rows of chosen layers while the model runs.

    Works with eager, SDPA and FlashAttention, with any cache, in one forward or in several that continue a sequence
    (a chunked prefill): rows are addressed by their position in the sequence, and those of later forwards are
    appended. A forward that starts a sequence anew replaces what was captured before. Only forwards of the thread that
    opened the block are recorded; those of other threads run as if there were no block::

        with capture_attention(model, layers=[14], queries=range(900, 920), key_spans=[(15, 889)]) as captured:
            model(**inputs)
        captured[14].weights  # (B, 20, 874), float32

        with capture_attention(model, layers=[14], queries="generated", key_spans=[(15, 889)]) as captured:
            model.generate(**inputs, max_new_tokens=50)
        captured[14].weights  # (B, 50, 874): row i is that of the query from which token i was predicted

        with capture_attention(model, layers=[2], queries=[], key_spans=[(15, 889)], received="mean") as captured:
            model(**inputs)
        captured.received[2]  # (B, 874): what image tokens receive on average from the queries that see them

    Args:
        model: a Hugging Face model whose decoder layers use transformers' attention interface.
        layers: zero-based decoder layers; negative ones count from the last.
        queries: strictly increasing positions in the (padded) sequence; `None`: every query of every forward;
            "generated": the last query of the prompt and then each new token's, inside the model's `generate`: as many
            rows as it returns new tokens, those behind a sample's end included, greedy or sampled, with any cache or
            none; decoding is not compiled meanwhile. Batches must be padded on the left, as `generate` wants. With
            `num_return_sequences` the spans of a prompt are those of all its sequences.
        key_spans, head_reduction, return_lse: as in `hide_kernels.attention_rows`.
        received: "sum", "mean" or "max": also what each key receives from all queries, of padding apart, reduced as in
            `hide_kernels.attention_received`, whichever rows are asked for (`queries=[]`: none); without gradients, and
            without `process_group`. Forwards that continue a sequence, a decode's steps too, go on with it.
        process_group: the ranks of a model under tensor parallelism (`tp_plan="auto"`), each of which runs the same
            block; sums over heads are then over the heads of all of them.
        causal: True gives the model's own attention, equal to `output_attentions=True`; False lets every row see
            every key of its forward (published HiDe, arXiv 2510.00054). Padding is left out in both.

    Yields:
        `{layer: CapturedAttention}`, filled by the forwards that run inside the block, whose `received` is `{layer:
        Tensor}`, (B, keys) for a mean over heads. Memory is that of the rows. With
        "generated" and no `key_spans`, earlier rows are padded with zeros for the keys that came later.

    Raises:
        ValueError: for layers that the model does not have or that have no softmax rows (the others of a hybrid decoder
            can be captured), a mask that is not causal, sliding or padding, attention sinks, from `generate` for a way
            of generating whose rows belong to no sequence (beams, an assistant, guidance, ...), and, on leaving the
            block, for rows that no forward of this thread computed.
    """
    modules = decoder_attention(model)
    depth = _depth(model, modules)
    if queries is not None and not (isinstance(queries, str) and queries == "generated"):
        queries = checked_queries(queries, received, 'None, "generated" or ')
    for layer in layers:
        if not -depth <= layer < depth:
            raise ValueError(f"layers: got {layer}, want 0 to {depth - 1} ({type(model).__name__})")
        if layer % depth not in modules:
            able = ", ".join(map(str, modules))
            raise ValueError(f"layers: {_why_not(model, layer % depth)}; layers that can be captured: {able}")
    if queries == "generated" and not hasattr(model, "generate"):
        raise ValueError(f'queries: got "generated", want the model that generates; {type(model).__name__} does not')
    if received is not None and process_group is not None:
        raise ValueError(f"received: got {received!r} together with process_group, want None")
    captures = [
        Capture(layer, queries, key_spans, causal, head_reduction, return_lse, process_group, received)
        for layer in dict.fromkeys(layer % depth for layer in layers)
    ]
    if not captures:
        raise ValueError("layers: got none, want at least one decoder layer")
    captured = CapturedLayers(captures)
    if on_layer is not None:
        for capture in captures:
            capture.on_record = partial(on_layer, capture.layer, captured)
    with ExitStack() as routes:
        for capture in captures:
            routes.enter_context(routed(modules[capture.layer], capture))
        routes.enter_context(watched_generate(model, captures))
        yield captured
    for capture in captures:
        capture.check()


@contextmanager
def capture_module(
    module: nn.Module, *, queries: Sequence[int], key_spans: KeySpans | None = None, causal: bool = True
) -> Iterator[CapturedLayers]:
    """`capture_attention` of one attention module, while it runs by itself or inside a model; head mean.

    Args:
        module: with a `config` whose attention implementation it runs through transformers' attention interface.
        queries, key_spans, causal: as in `capture_attention`.

    Yields:
        `{layer: CapturedAttention}` of the module's `layer_idx` (0 where it has none).

    Raises:
        ValueError: as `capture_attention`.
    """
    capture = Capture(getattr(module, "layer_idx", None) or 0, list(queries), key_spans, causal)
    with routed(module, capture):
        yield CapturedLayers([capture])
    capture.check()


@dataclass(eq=False)
class Capture(ThreadRecorder):
    """What is recorded of one attention module.

    base_config: the module's own. called: its forward came to us. on_record: called when a forward was recorded.
    """

    base_config: Any = None
    called: bool = False
    on_record: Callable[[], None] | None = None

    def record_call(
        self, query: Tensor, key: Tensor, mask: Tensor | None, lse: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        """Record one call of transformers' attention interface, whose attention found this log-sum-exp."""
        for name in ("s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k"):
            if kwargs.get(name) is not None:
                raise ValueError(f"layer {self.layer}: {name} changes its softmax; rows cannot be captured")
        implementation = _implementation(self.base_config)
        flash = "flash" in implementation
        restarts = kwargs.get("position_ids") if flash and mask is None else None
        if restarts is not None and restarts.dim() == 2 and bool((restarts.diff(dim=-1) < 1).any()):
            raise ValueError(f"layer {self.layer}: positions restart: several sequences in one row; unpack them")
        visible = None if mask is None else visible_keys(mask, key.shape[2])
        queries = query.shape[2]
        if visible is None and 1 < queries < key.shape[2] and not (flash or implementation in LOWER_RIGHT):
            # A prefill into an empty preallocated cache: the keys beyond the queries are not there yet.
            key = key[:, :, :queries]
        first = first_position(visible, queries, key.shape[2])
        sliding = kwargs.get("sliding_window")
        self.start_forward(first, queries)
        if sliding is not None and (first != self.tokens if self.tokens else first >= max(1, sliding - 1)):
            raise ValueError(
                f"layer {self.layer}: its sliding-window cache may have dropped keys, so their places are unknown; "
                "capture a layer with full attention, or use a cache that keeps all keys"
            )
        recorded = self.record(
            query,
            key,
            first=first,
            visible=visible,
            key_spans=self.spans_of_sequences(),
            window=sliding,
            scale=kwargs.get("scaling"),
            softcap=kwargs.get("softcap"),
            lse=lse,
        )
        if recorded and self.on_record is not None:
            self.on_record()

    def check(self) -> None:
        """As `check_complete`, with the hint that another thread may have run the layer."""
        hint = "; a forward of another thread is not recorded: open the block in the thread that runs the model"
        self.check_complete(hint if self.elsewhere else "")


def checked_queries(queries: Sequence[int], received: Reduction | None, also: str = "") -> list[int]:
    """Strictly increasing positions, none only where `received` is recorded; also: what else the caller takes."""
    try:
        positions = [operator.index(query) for query in queries]
    except TypeError:
        raise TypeError(f"queries: got {queries!r}, want {also}strictly increasing ints") from None
    none = not positions and received is None
    if none or any(query < 0 for query in positions[:1]) or any(a >= b for a, b in pairwise(positions)):
        raise ValueError(f"queries: got {positions}, want {also}strictly increasing positions >= 0")
    return positions


@contextmanager
def routed(module: nn.Module, capture: Capture, implementation: str = IMPLEMENTATION) -> Iterator[None]:
    """Inside, the module sees a config that sends its attention through the capture, beside those that are open."""

    def ran(*_: Any) -> None:
        if capture.here and not capture.called:
            raise ValueError(
                f"layer {capture.layer}: its {type(module).__name__} computes attention by itself, not through "
                "transformers' attention interface; its rows cannot be captured"
            )
        if capture.here:
            capture.called = False

    with changing:
        seen: Any = module.config
        config = seen if _captures(seen) else copy.copy(seen)
        if config is not seen:
            config._attn_implementation_internal = implementation
            config.hide_base = seen
        # A new tuple each time: who reads it in another thread has the old one or the new one.
        config.hide_captures = (*_captures(seen), capture)
        capture.base_config = config.hide_base
        module.config = config
        hook = module.register_forward_hook(ran)
    try:
        yield
    finally:
        with changing:
            hook.remove()
            config.hide_captures = tuple(one for one in config.hide_captures if one is not capture)
            if not config.hide_captures:
                module.config = config.hide_base


def _captures(config: Any) -> tuple[Capture, ...]:
    """Those that are open on the module that has this config, in the order in which they were opened."""
    return getattr(config, "hide_captures", ())


def capturing(model: PreTrainedModel) -> bool:
    """Whether a capture that this thread has opened is open on one of the model's layers."""
    return any(capture.here for module in decoder_attention(model).values() for capture in _captures(module.config))


def decoder_attention(model: PreTrainedModel) -> dict[int, nn.Module]:
    """`{layer: attention module}` of the language model's decoder layers, vision towers left out.

    Layers without a causal attention that uses transformers' attention interface are left out. Raises `ValueError`,
    with the reason, for models that have no other.
    """
    found: dict[int, nn.Module] = {}
    own = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and getattr(module, "is_causal", False) and hasattr(module, "config"):
            if own is not None and layer >= own:
                # Beside the decoder's own: a branch, or layers that predict further tokens.
                continue
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


class _ModuleView:
    """An attention module with its own config again, for implementations that read `module.config`."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # by its place where kvpress stands between
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function registered as `hide_rows`: run the model's own implementation, and record."""
    # Read once: another thread may close the last capture meanwhile, and the module then has its own config again.
    config = module.config
    base_config = getattr(config, "hide_base", config)
    implementation = _implementation(base_config)
    if implementation == "eager":
        base = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if base is None:
            raise ValueError(f"{type(module).__name__}: no eager attention function found; load the model with sdpa")
    else:
        base = ALL_ATTENTION_FUNCTIONS[implementation]
    own = _OwnLse()
    # Its gradient would be lost, and another implementation may scale or mask as it likes. SDPA itself is not causal
    # where the call says so, and knows no softcap.
    watched = implementation == "sdpa" and not torch.compiler.is_compiling()
    watched = watched and kwargs.get("is_causal") is not False and kwargs.get("softcap") is None
    with own if watched and not (query.requires_grad or key.requires_grad) else nullcontext():
        result = base(_ModuleView(module, base_config), query, key, value, attention_mask, dropout=dropout, **kwargs)
    for capture in _captures(config):
        if capture.here:
            capture.called = True
            capture.record_call(query, key, attention_mask, own.of(query), kwargs)
        else:
            capture.elsewhere = True
    return result


class _OwnLse(TorchDispatchMode):
    """Inside, the log-sum-exp that PyTorch's fused attention returns beside its output is kept instead of dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[Tensor | None, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            # As it arrives in inference mode: what it is made of says more.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        results = func(*args, **(kwargs or {}))
        for place, returned in enumerate(func._schema.returns):
            if returned.name == "logsumexp":
                self._found.append((results[place], args[0].dtype))
        return results

    def of(self, query: Tensor) -> Tensor | None:
        """(B, Hq, Q), that of one call for all queries as they are; `None` if there was another, or it kept none.

        Autocast may have rounded the queries, and cuDNN's attention returns nothing where no gradient is recorded.
        """
        if len(self._found) != 1:
            return None
        ((lse, dtype),) = self._found
        return lse if lse is not None and lse.shape == query.shape[:3] and dtype == query.dtype else None


def _implementation(config: Any) -> str:
    """What a layer runs by its own config: "sdpa", "eager", "flash_attention_2", `CONTINUING`, ..."""
    name: str = config._attn_implementation or "eager"
    # Some set our name by themselves, for a whole model.
    return "sdpa" if name == IMPLEMENTATION else name


for _name in (IMPLEMENTATION, PACKED_IMPLEMENTATION):
    AttentionInterface.register(_name, _attention)
# Without a mask function of the same name transformers passes no mask at all, and padding is silently attended to.
AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
