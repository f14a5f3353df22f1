"""Which tokens of a prompt are image, which cell of the picture each of them shows, and of which patches of the vision
encoder it is made, for Hugging Face models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hide_kernels.image_tokens import ImageTokens


def image_spans(
    model_or_config: Any,
    input_ids: Tensor,
    *,
    image_grid_thw: Tensor | None = None,
    tile_grids: Sequence[tuple[int, int]] | None = None,
    image_sizes: Tensor | None = None,
) -> list[list[ImageTokens]]:
    """Find each image's keys and token grid in tokenised prompts.

    Args:
        model_or_config: a model of a supported family, or its config: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL (the
            `-hf` checkpoints), LLaVA-1.5, LLaVA-OneVision.
        input_ids: (B, L) or (L,), with one placeholder per image token, as the processor makes them; padding on any
            side.
        image_grid_thw: (images, 3), needed for the Qwen families: the processor's output of that name.
        tile_grids: (rows, columns) of tiles of each image, for InternVL pictures of more than one tile; one tile and
            no thumbnail where it is not given.
        image_sizes: (images, 2) heights and widths, needed for LLaVA-OneVision: the processor's output of that name,
            each image cut into tiles.

    Returns:
        Per sample, per image, its `ImageTokens`.

    Raises:
        TypeError, ValueError: for a family that is not supported, a missing argument, or counts that do not match.
    """
    config, layout = _of_family(model_or_config, _LAYOUTS)
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dim() not in (1, 2):
        raise TypeError(f"input_ids: got {input_ids!r:.60}, want an integer tensor (B, L) or (L,)")
    token = next(getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name))
    given = {"image_grid_thw": image_grid_thw, "tile_grids": tile_grids, "image_sizes": image_sizes}
    sizes = layout(config, **given)
    samples: list[list[ImageTokens]] = []
    used = 0
    for ids in input_ids.reshape(-1, input_ids.shape[-1]).cpu():
        images: list[ImageTokens] = []
        positions = torch.nonzero(ids == token).flatten().tolist()
        while positions:
            length, cells = sizes(used, _run(positions))
            start = positions[0]
            if positions[length - 1 : length] != [start + length - 1]:
                raise ValueError(
                    f"input_ids: image {used} begins at {start} and should have {length} tokens in a row, but has "
                    f"{_run(positions)}; were placeholders cut off, or are grids and prompt of different images?"
                )
            images.append(ImageTokens(start, start + length, cells))
            positions = positions[length:]
            used += 1
        samples.append(images)
    for name, of_images in given.items():
        if of_images is not None and len(of_images) != used:
            raise ValueError(f"input_ids: {used} images were found, but {name} of {len(of_images)} were given")
    return samples


def patches_to_tokens(
    model_or_config: Any, scores: Tensor, *, reduction: Literal["mean", "sum", "max"] = "mean"
) -> Tensor:
    """Scores of a vision encoder's patches -> scores of the image tokens that the decoder gets.

    Follows what lies between: 2 x 2 patches become a token (Qwen's merger, InternVL's pixel shuffle), and the class
    token is dropped where the decoder does not get it. Flattened, tokens of all images lie as their placeholders do, as
    `rows_to_maps` takes them.

    Args:
        model_or_config: a model of a supported family, or its config: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL,
            LLaVA-1.5.
        scores: (..., patches), in the encoder's order, a class token first, as `capture_vision_attention` yields them:
            Qwen's of all images, and those of one tile or picture otherwise.
        reduction: over the patches of a token.

    Returns:
        (..., tokens), same dtype.

    Raises:
        ValueError: for a family that is not supported, or a number of patches that it cannot have.
    """
    config, patches = _of_family(model_or_config, _PATCHES)
    if reduction not in ("mean", "sum", "max"):
        raise ValueError(f"reduction: got {reduction!r}, want 'mean', 'sum' or 'max'")
    of_tokens = patches(config, scores)
    return of_tokens.amax(-1) if reduction == "max" else getattr(of_tokens, reduction)(-1)


def _of_family(model_or_config: Any, table: dict[str, Callable[..., Any]]) -> tuple[Any, Callable[..., Any]]:
    """The config, and what the table has for its family."""
    config = getattr(model_or_config, "config", model_or_config)
    # Of the class: transformers 4.57 looks attributes of the instance up in its text_config first.
    family = getattr(type(config), "model_type", None)
    if family not in table:
        raise ValueError(f"model_or_config: got {family or type(config).__name__!r}, want one of {sorted(table)}")
    return config, table[family]


def _run(positions: Sequence[int]) -> int:
    """How many of the first positions follow one another."""
    return next((i for i, position in enumerate(positions) if position != positions[0] + i), len(positions))


Sizes = Callable[[int, int], tuple[int, Tensor]]
"""(number of the image, placeholders in a row at its start) -> (its tokens, its cells)."""


def _qwen(config: Any, *, image_grid_thw: Tensor | None, **_: Any) -> Sizes:
    """Rows of 2 x 2 merged patches."""
    if image_grid_thw is None:
        raise ValueError("image_grid_thw: got None, want the processor's tensor of that name (images, 3)")
    grids = image_grid_thw.tolist()
    merge = config.vision_config.spatial_merge_size

    def sizes(image: int, run: int) -> tuple[int, Tensor]:
        if image >= len(grids):
            raise ValueError(f"image_grid_thw: got {len(grids)} rows, but input_ids has more images")
        frames, rows, columns = grids[image]
        if frames != 1:
            raise ValueError(f"image_grid_thw: image {image} has {frames} frames, want 1; videos are not supported")
        rows, columns = rows // merge, columns // merge
        return rows * columns, torch.arange(rows * columns).view(rows, columns)

    return sizes


def _internvl(config: Any, *, tile_grids: Sequence[tuple[int, int]] | None, **_: Any) -> Sizes:
    """Square tiles in reading order, each in reading order, then a thumbnail where there is more than one tile."""
    per_tile = config.image_seq_length
    side = _square(per_tile, "image_seq_length")

    def sizes(image: int, run: int) -> tuple[int, Tensor]:
        if tile_grids is not None and image >= len(tile_grids):
            raise ValueError(f"tile_grids: got {len(tile_grids)}, but input_ids has more images")
        if tile_grids is None and run != per_tile:
            raise ValueError(
                f"tile_grids: got None, but image {image} has {run} tokens, more than one tile of {per_tile}: pass "
                "(rows, columns) of the tiles of each image"
            )
        rows, columns = tile_grids[image] if tile_grids is not None else (1, 1)
        tiles = rows * columns
        cells = torch.arange(tiles * per_tile).view(rows, columns, side, side).transpose(1, 2)
        return (tiles + (tiles > 1)) * per_tile, cells.reshape(rows * side, columns * side)

    return sizes


def _llava(config: Any, **_: Any) -> Sizes:
    """One square grid per image, behind the class token where the model keeps it."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    extra = int(config.vision_feature_select_strategy == "full")

    def sizes(image: int, run: int) -> tuple[int, Tensor]:
        return side * side + extra, torch.arange(extra, side * side + extra).view(side, side)

    return sizes


def onevision_grid(config: Any, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of tokens that LLaVA-OneVision has of an image's tiles, without the padding around it."""
    from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    tiles = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, tile)
    padded = torch.empty(1, tiles[0] * side, tiles[1] * side, device="meta")
    _, rows, columns = unpad_image(padded, (height, width)).shape
    # As in the model: pictures of many more tokens than that many tiles have are made smaller.
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _llava_onevision(config: Any, *, image_sizes: Tensor | None, **_: Any) -> Sizes:
    """The whole picture as one tile, then its rows without padding, a line break behind each."""
    if image_sizes is None:
        raise ValueError("image_sizes: got None, want the processor's tensor of that name (images, 2)")
    whole = (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def sizes(image: int, run: int) -> tuple[int, Tensor]:
        if image >= len(image_sizes):
            raise ValueError(f"image_sizes: got {len(image_sizes)} rows, but input_ids has more images")
        rows, columns = onevision_grid(config, *map(int, image_sizes[image]))
        length = whole + rows * (columns + 1)
        return length, torch.arange(whole, length).view(rows, columns + 1)[:, :columns]

    return sizes


def _square(count: int, name: str) -> int:
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"model_or_config: its {name} is {count}, want a square number")
    return side


_LAYOUTS: dict[str, Callable[..., Sizes]] = {
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
}


def _qwen_patches(config: Any, scores: Tensor) -> Tensor:
    """(..., tokens, patches of a token), which lie one after another."""
    merged = config.vision_config.spatial_merge_size**2
    if scores.shape[-1] % merged:
        raise ValueError(f"scores: got {scores.shape[-1]} patches, want a multiple of {merged}")
    return scores.unflatten(-1, (-1, merged))


def _internvl_patches(config: Any, scores: Tensor) -> Tensor:
    """As `_qwen_patches`, squares of a tile's patches."""
    scores = _without_class_token(config, scores)
    block = round(1 / config.downsample_ratio)
    side = _square(config.image_seq_length, "image_seq_length")
    if scores.shape[-1] != (side * block) ** 2:
        raise ValueError(f"scores: got {scores.shape[-1]} patches of a tile, want {(side * block) ** 2}")
    return scores.unflatten(-1, (side, block, side, block)).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _llava_patches(config: Any, scores: Tensor) -> Tensor:
    """As `_qwen_patches`, each a token of its own."""
    return _without_class_token(config, scores)[..., None]


def _without_class_token(config: Any, scores: Tensor) -> Tensor:
    return scores[..., 1:] if config.vision_feature_select_strategy == "default" else scores


_PATCHES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "qwen2_vl": _qwen_patches,
    "qwen2_5_vl": _qwen_patches,
    "qwen3_vl": _qwen_patches,
    "internvl": _internvl_patches,
    "llava": _llava_patches,
}
