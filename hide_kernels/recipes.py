"""What published methods read off attention, each as one call of `attention_rows` or `attention_received`.

Functions take the query and key of one layer, after RoPE and q-norm, as `attention_rows` does, and further arguments of
it by name (`kv_lens`, `scale`, `backend`, ...). Nothing here picks layers, numbers or thresholds. Scores that a capture
has recorded need no query and key: `best_tokens` and `different_tokens` rank them.
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


def best_tokens(scores: Tensor, count: int) -> Tensor:
    """Which tokens have the highest scores, in their order: what all of the methods below keep.

    Args:
        scores: (..., tokens), of these recipes or of a capture, such as `captured[22].weights[:, 0, 1:]`.
        count: how many to keep.

    Returns:
        (..., count) int64, increasing.

    Raises:
        ValueError: for a count that is negative or larger than the number of tokens.
    """
    if not 0 <= count <= scores.shape[-1]:
        raise ValueError(f"count: got {count}, want 0 to {scores.shape[-1]}, the number of tokens")
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def fastervlm(query: Tensor, key: Tensor, count: int, **arguments: Any) -> Tensor:
    """The patches that a vision encoder's class token attends to most: FasterVLM (arXiv 2412.01818v1).

    Of LLaVA's CLIP, the layer is the one before the last, whose features the decoder gets.

    Args:
        query: (B, H, N, D), or the class token's alone. key: (B, H, N, D), the class token first.
        count: patches to keep.

    Returns:
        (B, count) int64, increasing places among the N - 1 patches, as in the features that the decoder gets.

    Raises:
        TypeError, ValueError: as `attention_rows` and `best_tokens`.
    """
    return best_tokens(_class_token_scores(query, key, **arguments), count)


def visionzip(query: Tensor, key: Tensor, count: int, *, class_token: bool = True, **arguments: Any) -> Tensor:
    """The patches of a vision encoder that get most attention: VisionZip's dominant tokens (arXiv 2412.04467,
    "Dominant Token Selection").

    From the class token; without one, on average from all patches. VisionZip keeps the class token as well, and merges
    the other patches into contextual tokens, by the similarity of their keys: that needs hidden states, not scores, and
    is not done here.

    Args:
        query, key: as in `fastervlm`; without a class token N patches. count: patches to keep, beside the class token.
        class_token: whether there is one.

    Returns:
        (B, count) int64, increasing places among the patches.

    Raises:
        TypeError, ValueError: as `attention_received` and `best_tokens`.
    """
    if class_token:
        return fastervlm(query, key, count, **arguments)
    return best_tokens(attention_received(query, key, reduction="mean", **arguments).received, count)


def vispruner(
    query: Tensor, key: Tensor, features: Tensor, count: int, *, important: float = 0.5, **arguments: Any
) -> Tensor:
    """Important patches and different ones: VisPruner (arXiv 2412.01818v2, which has taken FasterVLM's place).

    `different_tokens` by the scores that `fastervlm` ranks with.

    Args:
        query, key: as in `fastervlm`. features: (B, N - 1, C), the patches as the decoder gets them, before they are
            projected. count, important: as in `different_tokens`.

    Returns:
        (B, count) int64, increasing places among the N - 1 patches.

    Raises:
        TypeError, ValueError: as `attention_rows` and `different_tokens`.
    """
    return different_tokens(_class_token_scores(query, key, **arguments), features, count, important=important)


def different_tokens(scores: Tensor, features: Tensor, count: int, *, important: float = 0.5) -> Tensor:
    """Those with the highest scores, and of the rest those that are least like one another, as VisPruner chooses them.

    Of the rest, in the order of their scores, those most like another are removed, at most eight at a time: of every
    second one its largest cosine with those in between counts.

    Args:
        scores: (B, tokens), of these recipes or of a capture. features: (B, tokens, C).
        count: how many to keep, a part of which, `important`, by their scores alone, rounded down.

    Returns:
        (B, count) int64, increasing.

    Raises:
        ValueError: for a count that is negative or larger than the number of tokens, or a part that is none.
    """
    if not 0 <= count <= scores.shape[1] or not 0 <= important <= 1:
        raise ValueError(f"count: got {count} with important {important}, want 0 to {scores.shape[1]}, and 0 to 1")
    kept, others = scores.argsort(-1, descending=True).tensor_split([int(count * important)], 1)
    wanted = count - kept.shape[1]
    features = torch.nn.functional.normalize(features, dim=-1)
    while wanted and others.shape[1] > wanted:
        fewer = min(8, others.shape[1] - wanted)
        seconds, between = others[:, ::2], others[:, 1::2]
        one, other = (features.gather(1, x[..., None].expand(-1, -1, features.shape[2])) for x in (seconds, between))
        alike = (one @ other.transpose(1, 2)).amax(-1).argsort(-1, descending=True)
        others = torch.cat([seconds.gather(1, alike[:, fewer:]), between], 1)
    return torch.cat([kept, others[:, :wanted]], 1).sort(-1).values


def fastv(query: Tensor, key: Tensor, image_span: tuple[int, int], count: int, **arguments: Any) -> Tensor:
    """What a decoder goes on with behind a layer: all text, and the image tokens that get most attention: FastV
    (arXiv 2403.06764, section 4.1).

    In FastV's code from the prompt's last token, in its text on average from all tokens: as many rows as are given,
    with their `q_positions` and `causal=True` where keys come behind them.

    Args:
        query: (B, Hq, R, D), the last token's of layer K. key: (B, Hkv, N, D). image_span: of the image, (start, stop).
        count: image tokens to keep.

    Returns:
        (B, N - image tokens + count) int64, increasing positions, as `drop_tokens` takes them of one sample.

    Raises:
        TypeError, ValueError: as `attention_rows` and `best_tokens`.
    """
    best = best_tokens(token_scores(query, key, [image_span], **arguments), count)
    return _beside_text(best, image_span, key)


def sparsevlm(
    query: Tensor, key: Tensor, image_span: tuple[int, int], count: int | None = None, **arguments: Any
) -> Tensor:
    """What a decoder goes on with behind a layer: all text, and the image tokens that text raters attend to most:
    SparseVLM (arXiv 2410.04417, "Sparsification Guidance from Text to Visual Modality").

    The tokens that it drops SparseVLM clusters and recycles as a few: that needs hidden states, not scores, and is not
    done here.

    Args:
        query: (B, Hq, R, D), the raters of `sparsevlm_raters`, with their `q_positions` and `causal=True` where keys
            come behind them. key: (B, Hkv, N, D). image_span: of the image, (start, stop).
        count: image tokens to keep; `None`: of one sample, as many as the rank of the raters' rows, the paper's level
            of sparsification.

    Returns:
        (B, N - image tokens + count) int64, increasing positions, as `drop_tokens` takes them of one sample.

    Raises:
        TypeError, ValueError: as `attention_rows` and `best_tokens`, and for several samples without a count.
    """
    rows = attention_rows(query, key, key_spans=[image_span], **arguments).rows
    if count is None:
        if len(rows) != 1:
            raise ValueError(f"count: got None for {len(rows)} samples, whose ranks may differ, want a number")
        count = int(torch.linalg.matrix_rank(rows[0].float()))
    return _beside_text(best_tokens(rows.mean(1), count), image_span, key)


def sparsevlm_raters(image_states: Tensor, text_states: Tensor) -> Tensor:
    """Which text tokens rate the image in SparseVLM (arXiv 2410.04417, "Relevant Text Token Selection").

    Those that the image's tokens are more similar to than to text on average: the softmax over text of their products,
    meaned over the image's tokens.

    Args:
        image_states: (B, V, C), hidden states of the image's tokens as the decoder gets them. text_states: (B, T, C),
            of the text behind them.

    Returns:
        (B, T) bool.
    """
    relevance = (image_states @ text_states.transpose(1, 2)).softmax(-1).mean(1)
    return relevance > relevance.mean(-1, keepdim=True)


def _class_token_scores(query: Tensor, key: Tensor, **arguments: Any) -> Tensor:
    """(B, patches), what the first token attends to behind it."""
    return token_scores(query[:, :, :1], key, [(1, key.shape[2])], **arguments)


def _beside_text(best: Tensor, image_span: tuple[int, int], key: Tensor) -> Tensor:
    """Positions of the best of the image's tokens, with those of all that is before and behind the image."""
    start, stop = image_span
    before, behind = (torch.arange(*ends, device=best.device) for ends in ((0, start), (stop, key.shape[2])))
    return torch.cat([before.expand(len(best), -1), best + start, behind.expand(len(best), -1)], 1)
