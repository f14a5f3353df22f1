"""A KV cache in buffers that are allocated once: tokens are written in place, and going back costs nothing.

transformers' own `DynamicCache` copies all keys and values for every new token (0.94 GB for a 7B model at 16k tokens),
and cutting it down to a length differs between its versions. With `offloading=True` it also sends every layer back to
the host whole in every step.

Buffers are plain tensors whatever mode they are allocated in: what `torch.inference_mode` makes cannot be written to
outside of it, and a cache outlives the block that filled it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hide_kernels.memory import host_memory


@cache
def cache_keyword(forward: Callable[..., Any]) -> str:
    """What a forward, and `generate` with it, calls its cache: transformers 5.24 renamed the argument."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one decoder layer, (B, heads, length, D), as views of buffers with room for more."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        # The slot, (1,) int64, that every update goes to, so that shapes stay as they are (`hide.engine.greedy`).
        self.slot: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate; transformers 4.57 passes the keys alone."""
        value_states = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [self._room(states, self.capacity) for states in (key_states, value_states)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens behind those that are there; all keys and values, or with a `slot` the whole buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.slot is not None:
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.slot, states)
            return self._buffers[0], self._buffers[1]
        end = self.length + key_states.shape[2]
        self.reserve(end)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = states
        return self.set_length(end)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens; more than there is costs one copy."""
        if capacity <= self.capacity:
            return
        capacity = -(-capacity // 256) * 256
        if self.is_initialized:
            # Both are there before anything changes: where memory is short, the old ones stay in force.
            grown = [self._room(old, capacity) for old in self._buffers]
            for new, old in zip(grown, self._buffers, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
            self._buffers = grown
            self.set_length(self.length)
        self.capacity = capacity

    def clear_room(self) -> None:
        """Zeros behind the tokens: where the whole buffer is attended to, a NaN in there passes any mask."""
        for buffer in self._buffers:
            buffer[:, :, self.length :] = 0

    def rewind(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        if self.length > length:
            self.set_length(length)

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers asks: a negative number of tokens to remove; 4.57 also the length that is to be left."""
        if tokens_to_remove:
            self.rewind(self.length + tokens_to_remove if tokens_to_remove < 0 else tokens_to_remove)

    def get_seq_length(self, *args: Any) -> int:
        """Tokens that are there."""
        return self.length

    def set_length(self, length: int) -> tuple[Tensor, Tensor]:
        """Let the first `length` tokens of the buffers be those that are there."""
        self.length = length
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def _room(self, like: Tensor, capacity: int) -> Tensor:
        """A buffer for `capacity` tokens such as those of `like`."""
        with torch.inference_mode(False):
            return like.new_empty(*like.shape[:2], capacity, like.shape[3])


class PreallocatedCache(DynamicCache):
    """Cache of a decoder of `layers` layers with room for `capacity` tokens."""

    offloaded: ClassVar[bool] = False
    """Whether keys and values are the host's."""
    _layer: ClassVar[type[PreallocatedLayer]] = PreallocatedLayer

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__()
        self.layers: list[Any] = [self._layer(capacity) for _ in range(layers)]
        # All layers are there: transformers must not append any.
        self.layer_class_to_replicate = None
        # The first layer that runs: how many tokens are there is asked of it.
        self._first = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for layer in self.layers if layer.is_initialized for buffer in layer._buffers)

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` tokens in every layer."""
        for layer in self.layers:
            layer.reserve(capacity)

    def rewind(self, length: int, layers: range | None = None) -> None:
        """These layers, or all, back to `length` tokens: after an early exit they have different lengths."""
        for layer in self.layers if layers is None else self.layers[layers.start : layers.stop]:
            layer.rewind(length)

    def set_length(self, length: int) -> None:
        """Every layer to the first `length` tokens of its buffers, those among them that went to a slot."""
        for layer in self.layers:
            layer.set_length(length)

    @contextmanager
    def from_layer(self, first: int) -> Iterator[None]:
        """Inside, a forward that begins with layer `first` sees that layer's tokens for those that are there."""
        self._first = first
        try:
            yield
        finally:
            self._first = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a layer, or of the first that runs."""
        return super().get_seq_length(max(layer_idx, self._first))

    def get_mask_sizes(self, query: Any, layer_idx: int = 0) -> tuple[int, int]:
        """As transformers asks: keys that queries of this forward will see, and where they begin."""
        return super().get_mask_sizes(query, max(layer_idx, self._first))

    def copy_for(self, batch: int, capacity: int) -> PreallocatedCache:
        """The same tokens for each of `batch` sequences, in buffers of their own."""
        copy = PreallocatedCache(len(self.layers), capacity)
        for mine, theirs in zip(self.layers, copy.layers, strict=True):
            theirs.update(*(states.expand(batch, -1, -1, -1) for states in (mine.keys, mine.values)))
        return copy

    def set_slot(self, slot: Tensor | None) -> None:
        """Let every update of every layer go to one place, which a device may move on; `None`: behind what is there.

        Raises `ValueError` for layers on other devices than `slot`: they would not see it move.
        """
        for layer in self.layers:
            if slot is not None and layer.device != slot.device:
                raise ValueError(f"slot: got one on {slot.device}, want one where the layers are ({layer.device})")
        for layer in self.layers:
            layer.slot = slot
            if slot is not None:
                layer.clear_room()


# -- with gradients ---------------------------------------------------------------------------------------------------


class DifferentiableLayer(PreallocatedLayer):
    """The keys and values of the first call, which gradients go through; later calls see them and leave nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, those that came first before the new ones."""
        if self.keys is not None and self.values is not None:
            return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        self.keys, self.values, self.length = key_states, value_states, key_states.shape[2]
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return key_states, value_states


class DifferentiableCache(PreallocatedCache):
    """Cache of `layers` layers for a prefix and, one after the other, what stands behind it; with gradients."""

    _layer = DifferentiableLayer

    def __init__(self, layers: int) -> None:
        super().__init__(layers, 0)


# -- on the host ------------------------------------------------------------------------------------------------------


class HostLayer(PreallocatedLayer):
    """As `PreallocatedLayer`, in host memory, pinned where the model is on CUDA; `device` is the model's."""

    def _room(self, like: Tensor, capacity: int) -> Tensor:
        # Only pinned memory is copied while the host goes on; PyTorch frees it after the copies that it is part of.
        pinned = self.device.type == "cuda"
        here = torch.cuda.device(self.device) if pinned else nullcontext()
        with host_memory(), here:
            return _token_by_token(like, capacity, torch.device("cpu"), pin_memory=pinned)


class CopyStream:
    """Copies between one device and the host, in their order, beside what the device computes; plain ones on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait_for_compute(self) -> None:
        """Later copies begin when all that was computed up to here is done."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def let_compute_wait(self) -> None:
        """What is computed from here on begins when all copies are done; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def finish(self) -> None:
        """The host waits for all copies."""
        if self._stream is not None:
            self._stream.synchronize()

    def copy(self, to: Tensor, source: Tensor) -> None:
        """One of the two is the host's; both are contiguous, so that nothing else is allocated."""
        if self._stream is None:
            to.copy_(source)
        else:
            with torch.cuda.stream(self._stream):
                to.copy_(source, non_blocking=True)

    def share(self, buffer: Tensor) -> Tensor:
        """A new buffer of the device, whose memory is not used for anything else before copies to and from it are
        done."""
        if self._stream is not None:
            buffer.record_stream(self._stream)
        return buffer


class DoubleBuffer:
    """Two pairs of device buffers for keys and values, in which layers of one device and shape are attended to in turn.

    While a layer's kernels run on one pair, the next layer's tokens are copied into the other. Two waits keep order:

    - Compute waits for all copies before it touches a pair (`take`).
    - Copies wait for all compute that was asked for up to then before they read or overwrite one (`fetch`, `store`).
      The pair that is overwritten is never the one that was taken last: its reader is asked for after `take`, that of
      the other pair, the layer before, was asked for already.

    Copies run in their order. So a layer's new tokens have left their pair before it is overwritten, and are on the
    host before the host's are fetched again.
    """

    def __init__(self, device: torch.device) -> None:
        self.copies = CopyStream(device)
        self._device = device
        self.pairs: list[list[Tensor]] = []
        # Which layer's tokens lie in each pair. They stay the layer's after rewinds: all it gets goes through `store`.
        self._held: list[int | None] = [None, None]
        self._last = 1

    @property
    def nbytes(self) -> int:
        """Bytes of both pairs."""
        return sum(buffer.nbytes for pair in self.pairs for buffer in pair)

    def reserve(self, needed: int, layer: HostLayer) -> None:
        """Room for `needed` tokens, and then for as many as the layer has room for."""
        if self.pairs and self.pairs[0][0].shape[2] >= needed:
            return
        # All are there before anything changes: where memory is short, the old ones stay in force.
        grown = [
            [_token_by_token(buffer, layer.capacity, self._device) for buffer in layer._buffers] for _ in self._held
        ]
        self.pairs = [[self.copies.share(buffer) for buffer in pair] for pair in grown]
        self._held = [None, None]

    def take(self, index: int, layer: HostLayer) -> list[Tensor]:
        """The pair with the layer's tokens, for what is computed next, up to the next `take`."""
        self.fetch(index, layer)
        self.copies.let_compute_wait()
        self._last = self._held.index(index)
        return self.pairs[self._last]

    def fetch(self, index: int, layer: HostLayer) -> None:
        """Begin to copy the layer's tokens into the pair that was not taken last, unless one has them."""
        if index in self._held:
            return
        free = 1 - self._last
        # Forgotten first: a copy that fails leaves the pair with neither's tokens.
        self._held[free] = None
        self.copies.wait_for_compute()
        for mine, theirs in zip(self.pairs[free], layer._buffers, strict=True):
            self.copies.copy(_tokens(mine, 0, layer.length), _tokens(theirs, 0, layer.length))
        self._held[free] = index

    def store(self, layer: HostLayer, start: int, end: int) -> None:
        """Begin to copy new tokens from the pair that was taken to the host."""
        self.copies.wait_for_compute()
        for mine, theirs in zip(self.pairs[self._last], layer._buffers, strict=True):
            self.copies.copy(_tokens(theirs, start, end), _tokens(mine, start, end))


class OffloadedCache(PreallocatedCache):
    """As `PreallocatedCache`, with keys and values in host memory and room for two layers on each device.

    Each forward brings every layer's earlier tokens to the device and takes its new ones to the host. An early exit
    leaves a copy of a layer that nobody asked for; it is good for the next time, or overwritten.
    """

    offloaded = True
    _layer = HostLayer

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers, capacity)
        self._double_buffers: dict[tuple[Any, ...], DoubleBuffer] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the devices: of the pairs alone."""
        return sum(buffers.nbytes for buffers in self._double_buffers.values())

    @property
    def host_nbytes(self) -> int:
        """Bytes on the host: keys and values of all layers. Pinned blocks are powers of two: up to twice as many."""
        return super().nbytes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new tokens; all its keys and values, which hold until its attention was asked for."""
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        start, end = layer.length, layer.length + key_states.shape[2]
        self._reserve(layer, end)
        buffers = self._buffers_of(layer)
        pair = buffers.take(layer_idx, layer)
        for buffer, states in zip(pair, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        buffers.store(layer, start, end)
        layer.set_length(end)
        following = (layer_idx + 1) % len(self.layers)
        if self.layers[following].length:
            self._buffers_of(self.layers[following]).fetch(following, self.layers[following])
        keys, values = (buffer[:, :, :end] for buffer in pair)
        return keys, values

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` tokens in every layer and in the pairs."""
        for layer in self.layers:
            self._reserve(layer, capacity)

    def set_slot(self, slot: Tensor | None) -> None:
        """`ValueError` for a slot: tokens are copied to places that the host must know."""
        if slot is not None:
            raise ValueError(
                "slot: keys and values are in host memory, and fixed shapes want them on the device; use the model's "
                "generate (static=False)"
            )

    def copy_for(self, batch: int, capacity: int) -> PreallocatedCache:
        """`ValueError`: a copy for several sequences would be as large on the device as what was kept off it."""
        raise ValueError("copy_for: keys and values are in host memory; take the sequences one after another")

    def _reserve(self, layer: HostLayer, capacity: int) -> None:
        if not layer.is_initialized:
            layer.reserve(capacity)
            return
        buffers = self._buffers_of(layer)
        if capacity > layer.capacity:
            # The host reads what copies may still be writing.
            buffers.copies.finish()
        layer.reserve(capacity)
        buffers.reserve(capacity, layer)

    def _buffers_of(self, layer: HostLayer) -> DoubleBuffer:
        """Those of the layer's device and shape; layers on several devices have pairs on each."""
        shapes = ((*buffer.shape[:2], buffer.shape[3], buffer.dtype) for buffer in layer._buffers)
        kind = (layer.device, *shapes)
        if kind not in self._double_buffers:
            self._double_buffers[kind] = DoubleBuffer(layer.device)
        return self._double_buffers[kind]


def _token_by_token(like: Tensor, capacity: int, device: torch.device, *, pin_memory: bool = False) -> Tensor:
    """Room for `capacity` tokens such as those of `like`, (B, heads, capacity, D), with all of a token in one place.

    Some tokens in a row are then contiguous: one copy over the bus.
    """
    batch, heads, _, channels = like.shape
    with torch.inference_mode(False):
        whole = torch.empty(capacity, batch, heads, channels, dtype=like.dtype, device=device, pin_memory=pin_memory)
        return whole.permute(1, 2, 0, 3)


def _tokens(buffer: Tensor, start: int, end: int) -> Tensor:
    """(end - start, B, heads, D), contiguous."""
    return buffer.permute(2, 0, 1, 3)[start:end]
