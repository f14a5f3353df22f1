"""H2O's cache against its own published expression, in eager attention with the whole matrix of every forward."""

import threading

import pytest
import torch
from random_models import llm, prompt, qwen2_5_vl, sliding_window_llm
from transformers import DynamicCache

from hide.engine.kv_cache import cache_keyword
from hide_kernels.integrations.h2o import h2o_cache
from hide_kernels.integrations.transformers import capture_attention


def with_cache(model, cache, **arguments):
    """As keyword arguments, whatever this transformers calls a cache."""
    return {cache_keyword(type(model).forward): cache, "use_cache": True, **arguments}


def published(model, ids, heavy, recent, parts):
    """H2O (arXiv 2306.14048) written out: greedy tokens, and per layer the kept positions (B, Hkv, kept).

    After each forward the columns of the softmax matrix are added to the scores of the keys that are left; of those
    before the recent ones, `heavy` with the best scores stay. parts: tokens of each forward; those of `ids` come first.
    """
    model.set_attn_implementation("eager")
    cache, tokens = DynamicCache(), ids
    layers = model.config.num_hidden_layers
    scores, positions, begin = [None] * layers, [None] * layers, 0
    for part in parts:
        new = tokens[:, begin : begin + part]
        places = torch.arange(begin, begin + part)
        begin += part
        found = model(new, output_attentions=True, **with_cache(model, cache, position_ids=places[None]))
        for layer, matrix in enumerate(found.attentions):
            own = cache.layers[layer]
            columns = matrix.sum(2).unflatten(1, (own.keys.shape[1], -1)).sum(2)
            shape = columns.shape[:2]
            if scores[layer] is not None:
                columns[..., :-part] += scores[layer]
            kept = places.expand(*shape, -1)
            kept = kept if positions[layer] is None else torch.cat([positions[layer], kept], -1)
            scores[layer], positions[layer] = columns, kept
            if (excess := columns.shape[-1] - heavy - recent) > 0:
                mask = torch.ones_like(columns, dtype=torch.bool)
                worst = columns[..., : columns.shape[-1] - recent].argsort(-1)[..., :excess]
                mask.scatter_(-1, worst, False)
                scores[layer], positions[layer] = (x[mask].view(*shape, -1) for x in (columns, kept))
                own.keys, own.values = (x[mask].view(*shape, heavy + recent, -1) for x in (own.keys, own.values))
        if begin == tokens.shape[1]:
            tokens = torch.cat([tokens, found.logits[:, -1:].argmax(-1)], 1)
    return tokens, positions, scores


def token_ids(length=60, batch=2, seed=3):
    return torch.randint(10, 500, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_as_published(cache, positions, scores):
    for layer, kept, columns in zip(cache.layers, positions, scores, strict=True):
        assert torch.equal(layer.positions, kept)
        # Published scores are summed over the two heads of a group, ours are their mean.
        columns = columns if layer.heavy_hitters else torch.zeros_like(columns)
        torch.testing.assert_close(2 * layer.scores, columns, rtol=1e-4, atol=1e-5)
        assert layer.keys.shape[2] == layer.values.shape[2] == kept.shape[-1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("heavy, recent", [(12, 9), (20, 0), (0, 17), (90, 10)])
@torch.no_grad()
def test_greedy_tokens_and_kept_keys_are_those_of_the_published_expression(heavy, recent, implementation):
    model, ids = llm(), token_ids()
    want, positions, scores = published(model, ids, heavy, recent, [60] + [1] * 24)
    model.set_attn_implementation(implementation)
    model.generation_config.eos_token_id = None
    with h2o_cache(model, heavy_hitters=heavy, recent=recent) as cache:
        got = model.generate(ids, max_new_tokens=25, do_sample=False, **with_cache(model, cache))
    assert torch.equal(got, want)
    assert_as_published(cache, positions, scores)
    assert cache.get_seq_length() == 84
    if heavy == 12:
        model.set_attn_implementation("sdpa")
        whole = model.generate(ids, max_new_tokens=25, do_sample=False)
        assert not torch.equal(whole, want), "what is dropped changes nothing: the test would pass without a cache"
        assert not torch.equal(cache.layers[0].positions[:, 0], cache.layers[0].positions[:, 1])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_prompt_in_parts_drops_keys_after_each_of_them(implementation):
    model, ids = llm(), token_ids()
    parts = [25, 1, 20, 14]
    want, positions, scores = published(model, ids, 8, 7, parts)
    model.set_attn_implementation(implementation)
    begin = 0
    with h2o_cache(model, heavy_hitters=8, recent=7) as cache:
        for part in parts:
            logits = model(ids[:, begin : begin + part], **with_cache(model, cache)).logits
            begin += part
    assert torch.equal(logits[:, -1].argmax(-1), want[:, -1])
    assert_as_published(cache, positions, scores)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pads", [5, 45])
@torch.no_grad()
def test_padding_on_the_left_is_dropped_first_and_changes_no_sample(pads, implementation):
    model, ids = llm(), token_ids()
    model.set_attn_implementation(implementation)
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    settings = {"max_new_tokens": 12, "do_sample": False}
    with h2o_cache(model, heavy_hitters=10, recent=8) as cache:
        together = model.generate(ids, attention_mask=mask, **settings, **with_cache(model, cache))
    for sample, begin in ((0, pads), (1, 0)):
        with h2o_cache(model, heavy_hitters=10, recent=8) as alone:
            own = model.generate(ids[sample : sample + 1, begin:], **settings, **with_cache(model, alone))
        assert torch.equal(together[sample, begin:], own[0])
        for one, other in zip(cache.layers, alone.layers, strict=True):
            assert torch.equal(one.positions[sample], other.positions[0] + begin)
            torch.testing.assert_close(one.scores[sample], other.scores[0], rtol=1e-4, atol=1e-5)
    if pads == 45:
        with h2o_cache(model, heavy_hitters=10, recent=8) as cache:
            model(ids, attention_mask=mask, **with_cache(model, cache))
        layer = cache.layers[0]
        assert torch.equal(layer.positions[0, 0, 3:], torch.arange(45, 60)), "three of padding: there is nothing else"
        assert (layer.scores[0, :, :3] == -torch.inf).all(), "a token may have received nothing too, and stays"


@torch.no_grad()
def test_a_picture_s_tokens_are_scored_as_any_others():
    model, inputs = qwen2_5_vl(), prompt("qwen2_5_vl", text_tokens=30)
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(**inputs, **settings)
    with h2o_cache(model, heavy_hitters=1000, recent=10) as cache:
        assert torch.equal(model.generate(**inputs, **settings, **with_cache(model, cache)), want)
    with capture_attention(model, layers=[1], queries=[], received="sum", head_reduction="kv_group") as captured:
        model.generate(**inputs, **settings)
    torch.testing.assert_close(cache.layers[1].scores, captured.received[1])


@torch.no_grad()
def test_beams_take_their_keys_along():
    model, ids = llm(), token_ids(batch=1)
    settings = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    want = model.generate(ids, **settings)
    with h2o_cache(model, heavy_hitters=100, recent=10) as cache:
        assert torch.equal(model.generate(ids, **settings, **with_cache(model, cache)), want)
    assert cache.layers[0].scores.shape[0] == 3
    layer = cache.layers[0]
    before = layer.positions, layer.scores, layer.keys
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([1, 2, 5]))
    for one, other in zip((layer.positions, layer.scores, layer.keys), before, strict=True):
        assert torch.equal(one, other[torch.tensor([0, 1, 2])])


@torch.no_grad()
def test_other_caches_run_as_without_a_block_and_a_reset_one_starts_anew():
    model, ids = llm(), token_ids()
    want = model(ids).logits
    with h2o_cache(model, heavy_hitters=5, recent=5) as cache:
        assert torch.equal(model(ids, use_cache=False).logits, want)
        other = DynamicCache()
        assert torch.equal(model(ids, **with_cache(model, other)).logits, want)
        assert (other.get_seq_length(), cache.get_seq_length()) == (60, 0)
        for _ in range(2):
            cache.reset()
            assert torch.equal(model(ids, **with_cache(model, cache)).logits, want)
        assert (cache.get_seq_length(), cache.layers[1].keys.shape[2]) == (60, 10)
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize(
    "counts, error, text",
    [
        ({"heavy_hitters": 0.5, "recent": 4}, TypeError, "heavy_hitters: got 0.5, want a number of keys"),
        ({"heavy_hitters": 4, "recent": -1}, ValueError, "recent: got -1, want 0 or more"),
        ({"heavy_hitters": 0, "recent": 0}, ValueError, "heavy_hitters, recent: got 0 and 0"),
    ],
)
def test_wrong_counts_are_named(counts, error, text):
    with pytest.raises(error, match=text), h2o_cache(llm(), **counts):
        pass


def test_layers_that_do_not_see_all_keys_are_refused():
    with (
        pytest.raises(ValueError, match="model: layer 0 has a DynamicSlidingWindowLayer"),
        h2o_cache(sliding_window_llm(), heavy_hitters=5, recent=5),
    ):
        pass


@torch.no_grad()
def test_a_cache_outside_of_its_block_or_its_thread_is_refused():
    model, ids = llm(), token_ids()
    with h2o_cache(model, heavy_hitters=5, recent=5) as cache:
        model(ids, **with_cache(model, cache))
    with pytest.raises(ValueError, match="cache: its block is closed"):
        model(ids[:, :1], **with_cache(model, cache))
    said = []

    def elsewhere():
        with torch.no_grad():
            model(ids, **with_cache(model, cache))
            try:
                model(ids[:, :1], **with_cache(model, cache))
            except ValueError as error:
                said.append(str(error))

    with h2o_cache(model, heavy_hitters=5, recent=5) as cache:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(said) == 1 and "its last attention was not seen; run the model inside" in said[0]


@torch.no_grad()
def test_padding_behind_tokens_and_going_back_are_refused():
    model, ids = llm(), token_ids()
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with h2o_cache(model, heavy_hitters=5, recent=5) as cache:
        with pytest.raises(ValueError, match="attention_mask: padding behind tokens"):
            model(ids, attention_mask=mask, **with_cache(model, cache))
        with pytest.raises(ValueError, match="H2O's cache cannot go back"):
            cache.crop(-1)
