"""A KV cache in buffers that are allocated once: tokens are written in place, and going back costs nothing.

transformers' own `DynamicCache` copies all keys and values for every new token (0.94 GB for a 7B model at 16k tokens),
and cutting it down to a length differs between its versions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one decoder layer, (B, heads, length, D), as views of buffers with room for more."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        # The slot, (1,) int64, that every update goes to, so that shapes stay as they are (`hide.decoding`).
        self.slot: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate; transformers 4.57 passes the keys alone."""
        value_states = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [
            states.new_empty(*states.shape[:2], self.capacity, states.shape[3]) for states in (key_states, value_states)
        ]
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
        return self._set_length(end)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens; more than there is costs one copy."""
        if capacity <= self.capacity:
            return
        capacity = -(-capacity // 256) * 256
        if self.is_initialized:
            # Both are there before anything changes: where memory is short, the old ones stay in force.
            grown = [old.new_empty(*old.shape[:2], capacity, old.shape[3]) for old in self._buffers]
            for new, old in zip(grown, self._buffers, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
            self._buffers = grown
            self._set_length(self.length)
        self.capacity = capacity

    def clear_room(self) -> None:
        """Zeros behind the tokens: where the whole buffer is attended to, a NaN in there passes any mask."""
        for buffer in self._buffers:
            buffer[:, :, self.length :] = 0

    def rewind(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        if self.length > length:
            self._set_length(length)

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers asks: a negative number of tokens to remove; 4.57 also the length that is to be left."""
        if tokens_to_remove:
            self.rewind(self.length + tokens_to_remove if tokens_to_remove < 0 else tokens_to_remove)

    def get_seq_length(self, *args: Any) -> int:
        """Tokens that are there."""
        return self.length

    def _set_length(self, length: int) -> tuple[Tensor, Tensor]:
        self.length = length
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


class PreallocatedCache(DynamicCache):
    """Cache of a decoder of `layers` layers with room for `capacity` tokens."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__()
        self.layers: list[Any] = [PreallocatedLayer(capacity) for _ in range(layers)]
        # All layers are there: transformers must not append any.
        self.layer_class_to_replicate = None

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for layer in self.layers if layer.is_initialized for buffer in layer._buffers)

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` tokens in every layer."""
        for layer in self.layers:
            layer.reserve(capacity)

    def rewind(self, length: int) -> None:
        """Every layer back to `length` tokens: after an early exit they have different lengths."""
        for layer in self.layers:
            layer.rewind(length)

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
