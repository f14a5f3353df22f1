"""What a vision encoder attends to, out of an unmodified Hugging Face model, and scores of patches as scores of tokens.

Every query of an encoder sees every patch of its image or window, so what counts is what a patch receives: from all of
them, or from the class token where there is one. The model's own attention runs, as in `capture_attention`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hide_kernels.attention_received.request import Reduction
from hide_kernels.integrations.masks import visible_keys
from hide_kernels.integrations.recorder import CapturedLayers
from hide_kernels.integrations.transformers import (
    IMPLEMENTATION,
    PACKED_IMPLEMENTATION,
    Capture,
    checked_queries,
    routed,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def capture_vision_attention(
    model: PreTrainedModel,
    *,
    layers: Sequence[int],
    queries: Sequence[int] = (),
    received: Reduction | None = "mean",
    head_reduction: Literal["mean", "none"] | Tensor | Sequence[float] = "mean",
) -> Iterator[CapturedLayers]:
    """Record what patches receive in chosen layers of the vision encoder while the model runs.

    As `capture_attention` for decoders: with eager, SDPA and FlashAttention, whatever the decoder runs with, the hidden
    states keep their bits, no attention matrix is made, and only forwards of the thread that opened the block are
    recorded. A later forward of the encoder replaces what was captured before::

        with capture_vision_attention(model, layers=[-2], queries=[0]) as captured:  # LLaVA
            model.generate(**inputs)
        captured.received[22]  # (images, 577): what the class token and each patch receive on average
        captured[22].weights  # (images, 1, 577): what the class token attends to

        with capture_vision_attention(model, layers=[-1]) as captured:  # Qwen2.5-VL
            model.generate(**inputs)
        captured.received[31]  # (1, patches of all images), in the order of `pixel_values`

    `patches_to_tokens` makes scores of image tokens of them.

    Args:
        model: a Hugging Face model with a vision encoder, or an encoder, whose layers use transformers' attention
            interface: Qwen2.5-VL, Qwen3-VL, CLIP, SigLIP, InternVL, and models that have one of these.
        layers: zero-based encoder layers; negative ones count from the last.
        queries: strictly increasing positions in an image's sequence whose rows are recorded too, [0] for a class
            token; none for encoders that take images of all sizes at once (Qwen), which have no such token.
        received: "sum", "mean" or "max" over the queries of the image, or of the window where a layer has windows;
            "mean" is per query that sees the patch. `None`: only rows are recorded.
        head_reduction: as in `hide_kernels.attention_received`.

    Yields:
        `{layer: CapturedAttention}`, filled by the forwards that run inside the block, with rows (images, queries,
        patches) and `received`, `{layer: Tensor}` of (images, patches), for a mean over heads. A class token is one of
        the patches. Qwen's patches of all images are one sequence, as in `pixel_values`, whether or not a layer has
        windows.

    Raises:
        ValueError: for models without such an encoder, layers that it does not have, queries that an encoder has not, a
            mask that hides patches, and, on leaving the block, where no forward of this thread ran the layer.
    """
    tower, modules = vision_attention(model)
    positions = checked_queries(queries, received)
    packed = _takes_packed_images(next(iter(modules.values())))
    if packed and positions:
        raise ValueError(
            f"queries: got {positions}, want none: the encoder of {type(model).__name__} has no class token"
        )
    depth = max(modules) + 1
    for layer in layers:
        if not -depth <= layer < depth or layer % depth not in modules:
            raise ValueError(f"layers: got {layer}, want 0 to {depth - 1} ({type(model).__name__})")
    captures = [
        _VisionCapture(layer, positions, causal=False, head_reduction=head_reduction, received=received, packed=packed)
        for layer in dict.fromkeys(layer % depth for layer in layers)
    ]
    if not captures:
        raise ValueError("layers: got none, want at least one encoder layer")
    with ExitStack() as open_now:
        for capture in captures:
            module = modules[capture.layer]
            config: Any = module.config
            flash = packed and "flash" in (config._attn_implementation or "")
            open_now.enter_context(routed(module, capture, PACKED_IMPLEMENTATION if flash else IMPLEMENTATION))
            for handle in (
                tower.register_forward_pre_hook(capture.encoder_starts, with_kwargs=True),
                module.register_forward_pre_hook(capture.layer_starts),
                module.register_forward_hook(capture.layer_ends),
            ):
                open_now.callback(handle.remove)
        yield CapturedLayers(captures)
    for capture in captures:
        capture.check()


def vision_attention(model: PreTrainedModel) -> tuple[nn.Module, dict[int, nn.Module]]:
    """The vision encoder of a model, or the model if it is one, and `{layer: attention module}` of its layers.

    Raises `ValueError` where no attention that is not causal and may use transformers' attention interface is found.
    """
    config = type(getattr(model.config, "vision_config", None) or model.config)
    layers = ""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        place = re.match(r"(.+)\.(\d+)\.", name)
        attends = getattr(module, "is_causal", None) is False and isinstance(getattr(module, "config", None), config)
        if place is None or not attends:
            continue
        if (found and place[1] != layers) or int(place[2]) in found:
            raise ValueError(
                f"model: {type(model).__name__} has two vision encoders, {layers} and {place[1]}; pass one"
            )
        layers = place[1]
        found[int(place[2])] = module
    if not found:
        raise ValueError(
            f"model: no vision encoder of {type(model).__name__} uses transformers' attention interface; its attention "
            "cannot be captured"
        )
    return model.get_submodule(layers.rpartition(".")[0]), found


@dataclass(eq=False)
class _VisionCapture(Capture):
    """What is recorded of one layer of an encoder.

    packed: the encoder takes the patches of all images as one sequence. calls: query, key and arguments of
    the running forward's calls of the attention interface, one or, where sequences are attended to one by one, several.
    order: which patch each place of its sequence has; `None`: patches lie in their order.
    """

    packed: bool = False
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = field(default_factory=list)
    order: Tensor | None = None

    def encoder_starts(self, tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: an encoder with windows lays the patches out window by window."""
        if self.here and hasattr(tower, "fullatt_block_indexes"):
            grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            self.order = _by_windows(grids, tower.spatial_merge_size, tower.window_size // tower.patch_size)

    def layer_starts(self, *_: Any) -> None:
        """Hook: nothing is left of a forward that an exception ended."""
        if self.here:
            self.calls = []

    def record_call(
        self, query: Tensor, key: Tensor, mask: Tensor | None, lse: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        """Keep the call until its forward ends."""
        if mask is not None and not bool(visible_keys(mask, key.shape[2]).all()):
            raise ValueError(f"layer {self.layer}: its attention mask hides patches; it cannot be captured")
        self.calls.append((query, key, kwargs))

    def layer_ends(self, *_: Any) -> None:
        """Hook: record the calls of a forward."""
        if not self.here:
            return
        calls, self.calls = self.calls, []
        self.forget()
        query, key, arguments = calls[0]
        scale = arguments.get("scaling")
        if not self.packed:
            self.record(query, key, first=0, scale=scale)
            return
        bounds = arguments.get("cu_seq_lens_q")
        if bounds is None:
            lengths = torch.tensor([one.shape[2] for one, _, _ in calls], device=key.device)
            bounds = nn.functional.pad(lengths.cumsum(0), (1, 0))
        query = torch.cat([one for one, _, _ in calls], 2)[0].transpose(0, 1)
        key = torch.cat([one for _, one, _ in calls], 2)[0].transpose(0, 1)
        self.record_packed(query, key, bounds, scale=scale, order=self.order)


def _takes_packed_images(module: nn.Module) -> bool:
    """Whether the attention is told where each image's sequence begins."""
    return "cu_seqlens" in inspect.signature(module.forward).parameters


def _by_windows(grids: Tensor, merge: int, window: int) -> Tensor:
    """(patches,) of images with (frames, rows, columns) of patches: window by window, in each in its order.

    merge: a token is made of merge x merge patches, which stay together. window: of rows and columns of patches.
    """
    side, tokens, first = window // merge, [], 0
    for frames, rows, columns in grids.tolist():
        shape = frames, rows // merge, columns // merge
        places = torch.arange(first, first + shape[0] * shape[1] * shape[2]).view(shape)
        first += places.numel()
        for frame in places:
            tokens += [part.flatten() for band in frame.split(side, 0) for part in band.split(side, 1)]
    return (torch.cat(tokens)[:, None] * merge**2 + torch.arange(merge**2)).flatten()
