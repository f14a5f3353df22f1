"""Each recipe against its method's own formula, written out with the whole attention matrix."""

import pytest
import torch
from torch.nn import functional as F

from hide_kernels import recipes
from hide_kernels.attention_received import torch_blocked
from hide_kernels.image_tokens import ImageTokens

# A picture of 4 x 5 tokens behind 3 tokens of text, and one of 2 x 3 with a token that shows no cell.
FIRST = ImageTokens(3, 23, torch.arange(20).view(4, 5))
SECOND = ImageTokens(30, 37, torch.tensor([[1, 2, 3], [4, 5, 6]]))


def tensors(rows, length=61, seed=0, heads=6, kv_heads=2):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, rows, 16, generator=generator, dtype=torch.float64) * 2
    return query, torch.randn(2, kv_heads, length, 16, generator=generator, dtype=torch.float64)


def attention(query, key, causal=False):
    """Softmax of Q K^T / sqrt(d) with keys repeated for their heads; causal: queries stand at the end."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    if causal:
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(key.shape[2] - query.shape[2] + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1)


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


def test_image_maps_are_the_head_mean_at_the_image_s_tokens():
    query, key = tensors(4)
    mean = attention(query, key).mean(1)
    first, second = recipes.image_maps(query, key, [FIRST, SECOND])
    assert_same(first, mean[..., 3:23].reshape(2, 4, 4, 5))
    assert_same(second, mean[..., 31:37].reshape(2, 4, 2, 3))
    apart = recipes.image_maps(query, key, [FIRST], head_reduction="none")[0]
    assert_same(apart, attention(query, key)[..., 3:23].reshape(2, 6, 4, 4, 5))


def test_relative_maps_are_the_question_s_attention_over_the_generic_one_s():
    question, generic = tensors(1), tensors(1, seed=1)
    maps = recipes.relative_maps(*question, *generic, [FIRST])[0]
    # ViCrop: attention[layer][0, :, -1, image].mean(heads) of one prompt, divided by that of the other.
    quotient = attention(*question)[:, :, -1, 3:23].mean(1) / attention(*generic)[:, :, -1, 3:23].mean(1)
    assert_same(maps, quotient.view(2, 1, 4, 5))


def test_token_scores_are_fastv_s_of_the_last_token():
    query, key = tensors(61)
    # FastV: the head mean of a layer's attention, its last row, at the image tokens.
    want = attention(query, key, causal=True).mean(1)[:, -1, 3:23]
    assert_same(recipes.token_scores(query[:, :, -1:], key, [(3, 23)]), want)


def test_token_scores_are_sparsevlm_s_of_text_raters():
    query, key = tensors(61)
    raters = torch.tensor([40, 47, 55])
    # SparseVLM: the rows of the raters in the head-mean attention, averaged, at the image tokens.
    want = attention(query, key, causal=True).mean(1)[:, raters, 3:23].mean(1)
    assert_same(recipes.token_scores(query[:, :, raters], key, [(3, 23)], q_positions=raters, causal=True), want)


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel_size", [1, 5, 7])
def test_window_scores_are_snapkv_s_per_key_value_head(pooling, kernel_size):
    query, key = tensors(9)
    # SnapKV: sum over the window's queries, pooling per head; then the mean over the group.
    summed = attention(query, key, causal=True)[..., :-9].sum(2)
    pool = {"avg": F.avg_pool1d, "max": F.max_pool1d}[pooling]
    pooled = pool(summed, kernel_size=kernel_size, padding=kernel_size // 2, stride=1)
    want = pooled.view(2, 2, 3, 52).mean(2)
    assert_same(recipes.window_scores(query, key, kernel_size=kernel_size, pooling=pooling), want)


def test_observed_scores_are_h2o_s_column_sums_without_the_matrix(monkeypatch):
    monkeypatch.setattr(torch_blocked, "BLOCK_ELEMENTS", 500)
    query, key = tensors(61)
    want = attention(query, key, causal=True).sum(2).view(2, 2, 3, 61).mean(2)
    assert_same(recipes.observed_scores(query, key), want)
    # As kvpress normalises them: key n is seen by the queries from n on.
    assert_same(recipes.observed_scores(query, key, reduction="mean"), want / torch.arange(61, 0, -1))


def test_observed_scores_of_a_decode_add_up_to_those_of_the_whole():
    query, key = tensors(61)
    total = torch.zeros(2, 2, 61, dtype=torch.float64)
    recipes.observed_scores(query[:, :, :50], key[:, :, :50], out=total[..., :50])
    for n in range(50, 61):
        one = query[:, :, n : n + 1], key[:, :, : n + 1]
        recipes.observed_scores(*one, out=total[..., : n + 1], accumulate=True)
    assert_same(total, recipes.observed_scores(query, key))


def test_a_window_as_long_as_the_keys_has_no_scores():
    query, key = tensors(9, length=9)
    assert recipes.window_scores(query, key).shape == (2, 2, 0)
    assert recipes.window_scores(query, key, pooling="max").shape == (2, 2, 0)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"kernel_size": 4}, "kernel_size: got 4"),
        ({"kernel_size": -1}, "kernel_size: got -1"),
        ({"pooling": "mean"}, "pooling: got 'mean'"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    query, key = tensors(9)
    with pytest.raises(ValueError, match=text):
        recipes.window_scores(query, key, **arguments)


def test_fewer_keys_than_the_window_has_queries_are_refused():
    query, key = tensors(9)
    with pytest.raises(ValueError, match="key: got 5 keys, want at least the 9"):
        recipes.window_scores(query, key[:, :, :5])


def test_observed_scores_want_the_keys_of_all_queries():
    with pytest.raises(ValueError, match="key: got 5 keys, want at least the 9"):
        recipes.observed_scores(torch.zeros(1, 4, 9, 8), torch.zeros(1, 2, 5, 8))
