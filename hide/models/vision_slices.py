"""Qwen's vision encoder in slices: beyond residual, keys and values nothing grows with the image.

The model's own forward runs, with its own positions and windows; only its blocks and mergers work slice by slice.
Windows are independent, so a slice is some of them, equal ones in one attention call. A block with full attention keeps
keys and values of all patches, and attends with a slice of queries at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

# Patches at once: 1,024 tokens, some thousand tiles of a product, enough to keep a GPU busy.
PATCHES = 4096


@contextmanager
def in_slices(visual: Any, patches: int = PATCHES) -> Iterator[None]:
    """Inside, blocks and mergers of a Qwen2.5-VL or Qwen3-VL vision encoder run on about so many patches at a time.

    The result is the same up to the rounding of matrix products of other sizes. For inference: no gradients.
    """
    group = visual.spatial_merge_size**2
    mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
    parts = [*visual.blocks, *mergers]
    if any(hasattr(part, "_hf_hook") for part in parts):
        # Accelerate moves inputs to each of them in its forward, which must run then.
        yield
        return
    before = [part.__dict__.get("forward") for part in parts]
    lengths: dict[int, tuple[Tensor, list[int]]] = {}
    try:
        for block in visual.blocks:
            block.forward = partial(_block, block, patches, lengths)
        for merger in mergers:
            # Whole groups of patches, each of which becomes one token.
            merger.forward = partial(_merged, merger.forward, max(patches // group, 1) * group)
        yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            if forward is None:
                del part.forward
            else:
                part.forward = forward


def _block(
    block: Any,
    patches: int,
    known: dict[int, tuple[Tensor, list[int]]],
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> Tensor:
    """What the block's own forward computes, written over (patches, channels) `hidden_states`."""
    if id(cu_seqlens) not in known:
        # Each read waits for the device, and all blocks share two of these. Kept, so that no other gets its identity.
        known[id(cu_seqlens)] = (cu_seqlens, [b - a for a, b in pairwise(cu_seqlens.tolist())])
    lengths = known[id(cu_seqlens)][1]
    if max(lengths) > patches:
        _attend_to_all(block, patches, lengths, hidden_states, position_embeddings)
    else:
        _attend_in_windows(block, patches, lengths, hidden_states, position_embeddings)
    for some in _pieces(len(hidden_states), patches):
        hidden_states[some] += block.mlp(block.norm2(hidden_states[some]))
    return hidden_states


def _attend_in_windows(
    block: Any, patches: int, lengths: list[int], hidden_states: Tensor, positions: tuple[Tensor, Tensor]
) -> None:
    start = 0
    while lengths:
        count, stop = 0, start
        while count < len(lengths) and stop + lengths[count] <= start + patches:
            stop += lengths[count]
            count += 1
        query, key, value = _projected(block, hidden_states[start:stop], positions, slice(start, stop))
        at = 0
        for length, run in groupby(lengths[:count]):
            some = slice(at, at := at + length * len(list(run)))
            # The windows of a run side by side: (windows, heads, length, D).
            q, k, v = (states[some].unflatten(0, (-1, length)).transpose(1, 2) for states in (query, key, value))
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=block.attn.scaling)
            query[some] = found.transpose(1, 2).flatten(0, 1)
        hidden_states[start:stop] += block.attn.proj(query.flatten(1))
        lengths, start = lengths[count:], stop


def _attend_to_all(
    block: Any, patches: int, lengths: list[int], hidden_states: Tensor, positions: tuple[Tensor, Tensor]
) -> None:
    start = 0
    for length in lengths:
        own = [slice(start + some.start, start + some.stop) for some in _pieces(length, patches)]
        parts: list[Tensor] = []
        for some in own:
            made = _projected(block, hidden_states[some], positions, some)[1:]
            if not parts:
                parts = [states.new_empty(length, *states.shape[1:]) for states in made]
            for part, states in zip(parts, made, strict=True):
                part[some.start - start : some.stop - start] = states
            # The next slice's are made while these would still be there.
            del made, states
        key, value = (part.transpose(0, 1)[None] for part in parts)
        for some in own:
            # Made a second time rather than kept: at 16,384 tokens 2 % of Qwen2.5-VL's encoder, 3 % of Qwen3-VL's. Only
            # this slice changes below.
            query = _projected(block, hidden_states[some], positions, some)[0].transpose(0, 1)[None]
            found = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=block.attn.scaling)
            hidden_states[some] += block.attn.proj(found[0].transpose(0, 1).flatten(1))
            del query, found
        start += length


def _merged(forward: Callable[[Tensor], Tensor], patches: int, hidden_states: Tensor) -> Tensor:
    """What a merger's own forward makes of (patches, channels), whose groups of patches are independent."""
    made, at = hidden_states.new_empty(0), 0
    for some in _pieces(len(hidden_states), patches):
        part = forward(hidden_states[some])
        if not at:
            made = part.new_empty(len(hidden_states) * len(part) // len(hidden_states[some]), part.shape[1])
        made[at : at + len(part)] = part
        at += len(part)
    return made


def _projected(
    block: Any, hidden_states: Tensor, positions: tuple[Tensor, Tensor], some: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (n, heads, D) of some patches, rotated to their places by the model's own function."""
    rotate = vars(sys.modules[type(block).__module__])["apply_rotary_pos_emb_vision"]
    both = block.attn.qkv(block.norm1(hidden_states)).unflatten(-1, (3, block.attn.num_heads, -1))
    query, key, value = both.unbind(1)
    query, key = rotate(query, key, positions[0][some], positions[1][some])
    return query, key, value


def _pieces(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
