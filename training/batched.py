"""The embedded model's network for training on a CPU: the Hugging Face model's own weights, batches of equal-size
pictures.

The Hugging Face code takes the pictures of a batch one by one in attention and uses operations whose CPU gradients
are slow. Here each layer is one batched call, patches are embedded by a matrix product, and attention is two matrix
products. A test holds both codes to the same numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["TextOutput", "encode_images", "image_positions", "image_to_patches", "run_text"]

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class TextOutput(NamedTuple):
    """What the language model computed.

    `hidden`: (B, S, C) after the last norm. `states`: (B, S, C) behind each wanted layer. `rows`: (B, Q, S), the head
    mean of the attention probabilities of each wanted layer.
    """

    hidden: Tensor
    states: dict[int, Tensor]
    rows: dict[int, Tensor]


def image_to_patches(images: Tensor, patch: int = 14, merge: int = 2) -> Tensor:
    """Pixels (B, H, W, 3) uint8, sides multiples of patch * merge -> normalised patches (B, N, 3 * patch * patch)
    float32.

    The patches lie in the order of the Hugging Face image processor: those of one merged token next to each other. A
    still image's two frames are equal, so that only one is returned.
    """
    batch, height, width, _ = images.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    mean = images.new_tensor(_MEAN, dtype=torch.float32) * 255
    std = images.new_tensor(_STD, dtype=torch.float32) * 255
    blocks = ((images.float() - mean) / std).view(batch, rows, merge, patch, columns, merge, patch, 3)
    return blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, rows * columns * merge * merge, 3 * patch * patch)


def image_positions(rows: int, columns: int) -> Tensor:
    """Row and column (2, rows * columns) int64 of each token of a grid, in raster order."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([row.flatten(), column.flatten()])


def _patch_positions(rows: int, columns: int, merge: int = 2) -> Tensor:
    grid = torch.arange(rows * merge * columns * merge).view(rows, merge, columns, merge).transpose(1, 2).flatten()
    return torch.stack([grid // (columns * merge), grid % (columns * merge)])


def _windows(rows: int, columns: int, side: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """The places (N,) of the patches, window by window of `side` x `side` tokens, those of equal shape together; and of
    each shape how many windows there are, of how many patches.
    """
    grid = torch.arange(rows * columns * 4).view(rows, columns, 4)
    by_shape: dict[tuple[int, int], list[Tensor]] = {}
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            window = grid[top : top + side, left : left + side]
            by_shape.setdefault((window.shape[0], window.shape[1]), []).append(window.flatten())
    order = torch.cat([window for own in by_shape.values() for window in own])
    return order, [(len(own), len(own[0])) for own in by_shape.values()]


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return torch.softmax(scores if bias is None else scores + bias, dim=-1)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    if not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    # The fused attention's gradient is slower than this on a CPU.
    return _probabilities(query, key, bias).to(value.dtype) @ value


def _attend_in_groups(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Attention of the last tokens of which there are keys, in the `groups` of `run_text`."""
    if not groups:
        return _attend(query, key, value, bias)
    before, skipped = key.shape[2] - sum(groups), key.shape[2] - query.shape[2]
    mixed, start = [], before
    if skipped < before:
        first = slice(0, before - skipped)
        mixed.append(_attend(query[:, :, first], key[:, :, :before], value[:, :, :before], bias[:, :, first, :before]))
    for length in groups:
        rows, own = slice(start - skipped, start - skipped + length), slice(start, start + length)
        keys, values = (torch.cat([part[:, :, :before], part[:, :, own]], dim=2) for part in (key, value))
        own_bias = torch.cat([bias[:, :, rows, :before], bias[:, :, rows, own]], dim=3)
        mixed.append(_attend(query[:, :, rows], keys, values, own_bias))
        start = own.stop
    return torch.cat(mixed, dim=2)


def encode_images(model: Any, patches: Tensor, rows: int, columns: int) -> Tensor:
    """Patches (B, N, 588) of pictures of rows x columns tokens -> image features (B, rows * columns, hidden size)."""
    visual = model.model.visual
    kernel = visual.patch_embed.proj.weight  # (C, 3, 2, patch, patch)
    x = F.linear(patches, kernel.sum(dim=2).flatten(1))
    batch, count, width = x.shape
    heads = visual.blocks[0].attn.num_heads
    quarter = width // heads // 4
    frequency = 10000.0 ** (-torch.arange(quarter) / quarter)
    angle = (_patch_positions(rows, columns)[..., None] * frequency).permute(1, 0, 2).reshape(count, 2 * quarter)
    config = visual.config
    order, windows = _windows(rows, columns, config.window_size // config.patch_size // config.spatial_merge_size)
    x, angle = x[:, order], angle[order]
    for index, block in enumerate(visual.blocks):
        qkv = block.attn.qkv(_norm(block.norm1, x)).view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = angle.cos().to(qkv.dtype), angle.sin().to(qkv.dtype)
        query, key, value = _rotate(qkv[0], cos, sin), _rotate(qkv[1], cos, sin), qkv[2]
        if index in config.fullatt_block_indexes or len(windows) == 1 == windows[0][0]:
            mixed = _attend(query, key, value, None)
        else:
            parts, start = [], 0
            for number, length in windows:
                span = slice(start, start + number * length)
                q, k, v = (part[:, :, span].unflatten(2, (number, length)) for part in (query, key, value))
                parts.append(_attend(q, k, v, None).flatten(2, 3))
                start = span.stop
            mixed = torch.cat(parts, dim=2)
        x = x + block.attn.proj(mixed.transpose(1, 2).reshape(batch, count, width))
        x = x + _mlp(block.mlp, _norm(block.norm2, x))
    x = x[:, order.argsort()]
    return visual.merger.mlp(_norm(visual.merger.ln_q, x).view(batch, rows * columns, -1))


def _advance(layer: Any, x: Tensor, mixed: Tensor) -> Tensor:
    """What a layer makes of its input and its attention's (B, H, S, D) result."""
    x = x + layer.self_attn.o_proj(mixed.transpose(1, 2).reshape(x.shape))
    return x + _mlp(layer.mlp, _norm(layer.post_attention_layernorm, x))


def _project(layer: Any, x: Tensor, angle: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, (B, H, S, D) each: turned to their positions, key and value repeated for all heads."""
    y = _norm(layer.input_layernorm, x)
    attention = layer.self_attn
    query = attention.q_proj(y).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = attention.k_proj(y).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    value = attention.v_proj(y).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    cos, sin = angle.cos().to(query.dtype), angle.sin().to(query.dtype)
    repeats = heads // kv_heads
    key = _rotate(key, cos, sin).repeat_interleave(repeats, dim=1)
    return _rotate(query, cos, sin), key, value.repeat_interleave(repeats, dim=1)


def run_text(
    model: Any,
    embeddings: Tensor,
    positions: Tensor,
    bias: Tensor,
    *,
    frozen: int = 0,
    groups: tuple[int, ...] = (),
    row_indices: Tensor | None = None,
    row_layers: tuple[int, ...] = (),
    state_layers: tuple[int, ...] = (),
) -> TextOutput:
    """Run the language model.

    Args:
        model: whose weights to use.
        embeddings: (B, S, C), image features in place.
        positions: (3, B, S), the mRoPE positions.
        bias: (B, 1, S, S) of zeros and minus infinities, added to the attention scores.
        frozen: so many tokens at the start take no gradients, except as keys and values; they must not see later ones.
        groups: lengths of parts at the end of which none sees another, whatever `bias` says; all see what is before
            them, which sees none of them. It saves the time of computing what is masked out.
        row_indices: (B, Q), the tokens whose attention rows to return, none of them frozen.
        row_layers: the zero-based layers to return rows of.
        state_layers: the zero-based layers behind which to return the hidden states.
    """
    text = model.model.language_model
    config = model.config.text_config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    # Transformers 5 and 4 name it differently.
    section = (getattr(config, "rope_parameters", None) or config.rope_scaling)["mrope_section"]
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    # (3, B, S) -> the position of the axis that each frequency belongs to -> (B, 1, S, frequencies)
    angle = (positions[axis].permute(1, 2, 0).float() * text.rotary_emb.inv_freq[: len(axis)])[:, None]
    start, x = embeddings[:, :frozen].detach(), embeddings[:, frozen:]
    rows, states = {}, {}
    for index, layer in enumerate(text.layers):
        query, key, value = _project(layer, x, angle[:, :, frozen:], heads, kv_heads)
        if frozen:
            first = _project(layer, start, angle[:, :, :frozen], heads, kv_heads)
            key, value = torch.cat([first[1], key], dim=2), torch.cat([first[2], value], dim=2)
            with torch.no_grad():
                mixed = _attend(*first, bias[:, :, :frozen, :frozen].to(query.dtype))
                start = _advance(layer, start, mixed)
        own_bias = bias[:, :, frozen:].to(query.dtype)
        if row_indices is not None and index in row_layers:
            wanted = row_indices - frozen
            chosen = query.gather(2, wanted[:, None, :, None].expand(-1, heads, -1, query.shape[-1]))
            chosen_bias = own_bias[:, 0].gather(1, wanted[:, :, None].expand(-1, -1, key.shape[2]))[:, None]
            rows[index] = _probabilities(chosen, key, chosen_bias).float().mean(dim=1)
        x = _advance(layer, x, _attend_in_groups(query, key, value, own_bias, groups))
        if index in state_layers:
            states[index] = torch.cat([start, x], dim=1)
    return TextOutput(_norm(text.norm, torch.cat([start, x], dim=1)), states, rows)
