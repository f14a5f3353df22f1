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


IMAGE = (3, 43)


def positions(kept, length=61):
    """Of text and of the image's tokens, as FastV and SparseVLM put them together and sort them."""
    start, stop = IMAGE
    return torch.stack(
        [torch.tensor(sorted([*range(start), *(row + start).tolist(), *range(stop, length)])) for row in kept]
    )


def test_fastv_keeps_text_and_what_its_code_and_its_text_rank_highest():
    query, key = tensors(61)
    matrix = attention(query, key, causal=True).mean(1)
    # In the code: the last row, at the image's tokens. In the text: what each receives on average.
    last = matrix[:, -1, slice(*IMAGE)].topk(7).indices
    assert torch.equal(recipes.fastv(query[:, :, -1:], key, IMAGE, 7), positions(last))
    average = matrix[:, :, slice(*IMAGE)].mean(1).topk(7).indices
    every = {"q_positions": torch.arange(61), "causal": True}
    assert torch.equal(recipes.fastv(query, key, IMAGE, 7, **every), positions(average))
    assert not torch.equal(positions(last), positions(average))


@pytest.mark.parametrize("count", [9, None])
def test_sparsevlm_keeps_text_and_what_its_raters_rank_highest(count):
    query, key = tensors(61, heads=2, seed=3)
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(1, 40, 8, generator=generator), torch.randn(1, 18, 8, generator=generator)
    # Products of hidden states, the softmax over text, the mean over the image; raters are above the mean of those.
    relevance = torch.einsum("bvc,btc->bvt", image, text).softmax(2).mean(1)
    raters = torch.where(relevance > relevance.mean())[1]
    assert 2 < len(raters) < 16
    assert torch.equal(torch.nonzero(recipes.sparsevlm_raters(image, text)[0]).flatten(), raters)
    places = raters + IMAGE[1]
    rows = attention(query, key, causal=True).mean(1)[:1, places, slice(*IMAGE)]
    number = int(torch.linalg.matrix_rank(rows.float())) if count is None else count
    assert count is not None or number == len(raters)
    got = recipes.sparsevlm(query[:1, :, places], key[:1], IMAGE, count, q_positions=places, causal=True)
    assert torch.equal(got, positions(rows.mean(1).topk(number).indices))


def test_sparsevlm_s_rank_is_lower_where_raters_say_the_same():
    query, key = tensors(1)
    kept = recipes.sparsevlm(query[:1].expand(-1, -1, 5, -1), key[:1], IMAGE)
    assert kept.shape == (1, 61 - 40 + 1)


def test_fastervlm_and_visionzip_keep_what_the_class_token_attends_to():
    query, key = tensors(61, heads=4, kv_heads=4)
    matrix = attention(query, key)
    # FasterVLM: the mean of heads in the class token's row, without itself, as a mask. VisionZip: the sum of heads.
    mask = torch.zeros(2, 60, dtype=torch.bool).scatter_(1, matrix.mean(1)[:, 0, 1:].topk(11).indices, True)
    got = recipes.fastervlm(query, key, 11)
    assert torch.equal(got, torch.stack([torch.nonzero(row).flatten() for row in mask]))
    dominant = matrix[:, :, 0, 1:].sum(1).topk(11).indices.sort(1).values
    assert torch.equal(recipes.visionzip(query, key, 11), dominant)
    assert torch.equal(recipes.visionzip(query[:, :, :1], key, 11), dominant)


def test_visionzip_without_a_class_token_keeps_what_receives_most_on_average():
    query, key = tensors(61, heads=4, kv_heads=4)
    dominant = attention(query, key).mean(1).mean(1).topk(11).indices.sort(1).values
    assert torch.equal(recipes.visionzip(query, key, 11, class_token=False), dominant)
    assert not torch.equal(dominant, recipes.visionzip(query, key, 11))


@pytest.mark.parametrize("count, important", [(16, 0.5), (16, 0.0), (7, 1.0), (3, 0.4), (60, 0.5)])
def test_vispruner_keeps_what_the_class_token_attends_to_and_of_the_rest_what_is_not_alike(count, important):
    query, key = tensors(61, heads=4, kv_heads=4)
    features = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = attention(query, key).mean(1)[:, 0, 1:]
    want = []
    for sample in range(2):
        ranked, first = scores[sample].argsort(descending=True).tolist(), int(count * important)
        kept, rest, wanted = ranked[:first], ranked[first:], count - first
        cosine = F.cosine_similarity(features[sample][:, None], features[sample][None], dim=-1)
        # Rounds of the code: up to eight of every second token go, those most like one of the tokens in between.
        while wanted and len(rest) > wanted:
            between = rest[1::2]
            alike = cosine[rest[::2]][:, between].amax(1).argsort(descending=True).tolist()
            rest = [rest[2 * n] for n in alike[min(8, len(rest) - wanted) :]] + between
        want.append(sorted(kept + rest[:wanted]))
    got = recipes.vispruner(query, key, features, count, important=important)
    assert torch.equal(got, torch.tensor(want))
    if 0 < important < 1 and count < 60:
        assert not torch.equal(got, recipes.fastervlm(query, key, count))


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


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda q, k: recipes.fastv(q, k, IMAGE, 41), "count: got 41, want 0 to 40, the number of tokens"),
        (lambda q, k: recipes.fastervlm(q, k, -1), "count: got -1, want 0 to 60"),
        (lambda q, k: recipes.sparsevlm(q, k, IMAGE), "count: got None for 2 samples"),
        (lambda q, k: recipes.vispruner(q, k, torch.zeros(2, 60, 4), 61), "count: got 61 with important 0.5"),
        (lambda q, k: recipes.vispruner(q, k, torch.zeros(2, 60, 4), 6, important=1.5), "with important 1.5"),
    ],
)
def test_more_tokens_than_there_are_cannot_be_kept(call, text):
    with pytest.raises(ValueError, match=text):
        call(*tensors(61))


def test_observed_scores_want_the_keys_of_all_queries():
    with pytest.raises(ValueError, match="key: got 5 keys, want at least the 9"):
        recipes.observed_scores(torch.zeros(1, 4, 9, 8), torch.zeros(1, 2, 5, 8))
