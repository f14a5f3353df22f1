"""What published methods read off attention, each as one call of `attention_rows` or `attention_received`.

Every function takes the query and key of one layer, after RoPE and q-norm, as `attention_rows` does, and further
arguments of it by name (`kv_lens`, `scale`, `backend`, ...). Nothing here picks layers, tokens or thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hide_kernels.attention_received import attention_received
from hide_kernels.attention_rows import attention_rows
from hide_kernels.attention_rows.request import KeySpans
from hide_kernels.image_tokens import ImageTokens, rows_to_maps


def image_maps(query: Tensor, key: Tensor, images: Sequence[ImageTokens], **arguments: Any) -> list[Tensor]:
    """Where each query looks in each image: HiDe's maps before they are purified (arXiv 2510.00054).

    The softmax row over all keys, meaned over heads, at the tokens of the image. Rows are not causal, as published;
    `causal=True` with `q_positions` is the model's own attention.

    Args:
        query: (B, Hq, R, D), the entity tokens. key: (B, Hkv, N, D). images: as `image_spans` finds them.

    Returns:
        Per image (B, R, rows, columns), float32. With another `head_reduction` a dimension of heads comes after B.

    Raises:
        TypeError, ValueError: as `attention_rows`.
    """
    rows = attention_rows(query, key, key_spans=[image.span for image in images], **arguments).rows
    return rows_to_maps(rows, images)


def relative_maps(
    query: Tensor,
    key: Tensor,
    generic_query: Tensor,
    generic_key: Tensor,
    images: Sequence[ImageTokens],
    **arguments: Any,
) -> list[Tensor]:
    """ViCrop's relative attention: how much more a question looks at each cell than a generic instruction does
    (arXiv 2502.17422).

    The map of the question's last token divided by that of the last token of a generic one ("Write a general
    description of the image."), cell by cell, each of its own forward, both meaned over heads.

    Args:
        query, generic_query: (B, Hq, R, D), with R = 1 the last token before the answer. key, generic_key:
            (B, Hkv, N, D) of the two forwards; `images` lie at the same keys in both.

    Returns:
        Per image (B, R, rows, columns), float32. Where the generic map is 0 the quotient is inf, or NaN for 0 / 0.

    Raises:
        TypeError, ValueError: as `attention_rows`.
    """
    asked = image_maps(query, key, images, **arguments)
    generic = image_maps(generic_query, generic_key, images, **arguments)
    return [one / other for one, other in zip(asked, generic, strict=True)]


def token_scores(query: Tensor, key: Tensor, key_spans: KeySpans, **arguments: Any) -> Tensor:
    """How much the given queries attend to each image token, for pruning: the mean over queries and heads.

    FastV (arXiv 2403.06764): the one query is the last token's, at layer K. SparseVLM (arXiv 2410.04417): the queries
    are the text raters, the text tokens most relevant to the image. A row that keys come after sees them unless
    `q_positions` and `causal=True` are passed.

    Args:
        query: (B, Hq, R, D). key: (B, Hkv, N, D). key_spans: the image tokens, as `attention_rows` takes them.

    Returns:
        (B, image tokens), float32.

    Raises:
        TypeError, ValueError: as `attention_rows`.
    """
    return attention_rows(query, key, key_spans=key_spans, row_reduction="mean", **arguments).rows


def window_scores(
    query: Tensor, key: Tensor, *, kernel_size: int = 5, pooling: Literal["avg", "max"] = "avg", **arguments: Any
) -> Tensor:
    """How much the last tokens of a prompt attend to each token before them: SnapKV (arXiv 2404.14469).

    The attention of the window's queries, causal within the window, summed over them and pooled along the keys (at the
    borders with zeros beyond, which an average counts and a maximum does not); then the mean over the heads of a
    key/value head, of which each keeps its own keys.

    Args:
        query: (B, Hq, W, D), the last W queries of the prompt. key: (B, Hkv, N, D), all of its keys, N >= W.
        kernel_size: odd; 5 or 7 as published. 1: no pooling.
        pooling: "max" holds the scores of all heads, (B, Hq, N - W), for a moment; a mean goes past it.

    Returns:
        (B, Hkv, N - W), float32. The window itself is always kept and has no score.

    Raises:
        TypeError, ValueError: as `attention_rows`, for an even kernel size and for fewer keys than queries.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: got {kernel_size}, want an odd number from 1 on")
    if pooling not in ("avg", "max"):
        raise ValueError(f"pooling: got {pooling!r}, want 'avg' or 'max'")
    window, before = query.shape[2], key.shape[2] - query.shape[2]
    if before < 0:
        raise ValueError(f"key: got {key.shape[2]} keys, want at least the {window} of query's window")
    scores = attention_rows(
        query,
        key,
        key_spans=[(0, before)],
        q_positions=torch.arange(before, before + window, device=query.device),
        causal=True,
        # Averages along keys and over heads may swap; maxima may not.
        head_reduction="kv_group" if pooling == "avg" else "none",
        row_reduction="sum",
        **arguments,
    ).rows
    if kernel_size > 1 and before:
        pool = torch.nn.functional.avg_pool1d if pooling == "avg" else torch.nn.functional.max_pool1d
        scores = pool(scores, kernel_size, stride=1, padding=kernel_size // 2)
    return scores if pooling == "avg" else scores.unflatten(1, (key.shape[1], -1)).mean(2)


def observed_scores(query: Tensor, key: Tensor, **arguments: Any) -> Tensor:
    """How much attention each token has got from all queries so far: H2O's accumulated score (arXiv 2306.14048).

    The causal attention that key n receives, summed over all queries, and its mean over the heads of a key/value head:
    no N x N matrix. In a decode `out=` with `accumulate=True` adds a new query's row. `reduction="mean"` divides by the
    number of queries that see the key, so that the first ones have no advantage.

    Args:
        query: (B, Hq, R, D), the queries of the last R tokens. key: (B, Hkv, N, D), N >= R.

    Returns:
        (B, Hkv, N), float32.

    Raises:
        TypeError, ValueError: as `attention_received`, and for fewer keys than queries.
    """
    if key.shape[2] < query.shape[2]:
        raise ValueError(f"key: got {key.shape[2]} keys, want at least the {query.shape[2]} of query's tokens")
    positions = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)
    return attention_received(
        query, key, q_positions=positions, causal=True, head_reduction="kv_group", **arguments
    ).received
