"""What the released code for InternVL3 calls under names or signatures of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hide.drop_in import qwen
from hide.drop_in.rows import Attention, rows_over
from hide_kernels import token_maps

# InternVL3: tokens on a side of a tile, ids from which on tokens are special, and the window of the noise prior, whose
# first position is the token that ends the image.
SIDE = 16
FIRST_SPECIAL = 151643
WINDOW = 10
THUMBNAIL = [-1, -1]


def process_notsave(
    block_indices: Sequence[Any],
    start_k: int,
    end_k: int,
    attention: Attention,
    input_ids: Any,
    img_url: Sequence[Any],
    img_start: Sequence[int],
    img_end: Sequence[int],
    sig: float,
) -> dict[int, dict[int, NDArray[np.float64]]]:
    """Token-wise Attention Decoupling on tiles: a purified map of the whole picture for each token of the text.

    Args:
        block_indices: [column, row] of every tile in the order of its tokens, [-1, -1] for the thumbnail behind a
            picture's tiles; of several pictures one after another, or a list of them per picture.
        start_k: position of the token that ends the image; words up to `start_k + 9` are the noise prior.
        end_k: position of the last token that ends a turn, exclusive. Special tokens in between have no map.
        attention: see `hide.drop_in.rows.Attention`.
        input_ids: (1, L) token ids.
        img_url: the pictures; only counted.
        img_start: its first element is the position of the first tile's first token; 256 tokens for each tile.
        img_end: not used.
        sig: smoothing in grid cells.

    Returns:
        `{picture: {position: map}}`, (rows, columns) float64 with peak 1, without the thumbnail; order as by `process`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    pictures = _pictures(block_indices)
    if len(img_url) != len(pictures):
        raise ValueError(f"img_url: got {len(img_url)} pictures, want {len(pictures)}, as many as block_indices has")
    ends = int(img_start[0]) + SIDE**2 * np.cumsum([0, *map(len, pictures)])
    spans = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    if spans[-1][1] > start_k:
        raise ValueError(f"start_k: got {start_k}, want at least {spans[-1][1]}, behind the tiles of block_indices")
    words = torch.as_tensor(input_ids)[0, start_k:end_k].tolist()
    positions = [k for k, token in enumerate(words, start_k) if token < FIRST_SPECIAL]
    prior = sum(k < start_k + WINDOW for k in positions)
    rows = rows_over(attention, positions, start_k, spans)
    cells = [_cells(tiles) for tiles in pictures]
    made = token_maps(
        [image_rows[:, own.to(image_rows.device)] for image_rows, own in zip(rows, cells, strict=True)],
        prior_rows=prior,
        sigma=sig,
    )
    found: dict[int, dict[int, NDArray[np.float64]]] = {}
    maps = [of_image.double().cpu().numpy() for of_image in made.maps]
    for token, image in qwen.taken(made):
        found.setdefault(image, {})[positions[prior + token]] = maps[image][token]
    return found


def find_top_n_attended_regions(att_map: NDArray[Any], n: int, threshold: float = 0.5) -> tuple[list[list[int]], int]:
    """`hide.drop_in.find_top_n_attended_regions`, whose first argument has another name here."""
    return qwen.find_top_n_attended_regions(att_map, n, threshold)


def _pictures(block_indices: Sequence[Any]) -> list[list[list[int]]]:
    """[column, row] of each tile of each picture; a picture begins with its tile [0, 0]."""
    try:
        array = [np.asarray(blocks).reshape(-1, 2).tolist() for blocks in block_indices]
    except ValueError:
        raise ValueError(f"block_indices: got {block_indices!r:.80}, want [column, row] of each tile") from None
    pictures: list[list[list[int]]] = []
    for block in (block for blocks in array for block in blocks):
        if block == [0, 0]:
            pictures.append([])
        if not pictures:
            raise ValueError(f"block_indices: got {block} first, want a picture's tile [0, 0]")
        pictures[-1].append(block)
    if not pictures:
        raise ValueError("block_indices: got none, want [column, row] of each tile")
    return pictures


def _cells(blocks: list[list[int]]) -> torch.Tensor:
    """(rows, columns) int64: for each cell of the picture the offset of its token."""
    tiles = [block for block in blocks if block != THUMBNAIL]
    columns, rows = (1 + max(values) for values in zip(*tiles, strict=True))
    if tiles != [[column, row] for row in range(rows) for column in range(columns)]:
        raise ValueError(f"block_indices: got {tiles}, want all tiles of {rows} x {columns}, row by row")
    offsets = torch.arange(len(tiles) * SIDE**2).view(rows, columns, SIDE, SIDE)
    return offsets.transpose(1, 2).reshape(rows * SIDE, columns * SIDE)
