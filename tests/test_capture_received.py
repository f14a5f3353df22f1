"""Received attention out of a model that runs, against the columns of eager attention's matrix."""

import pytest
import torch
from random_models import FAMILIES, IMAGE, prompt, qwen2_5_vl, sliding_window_llm
from test_capture import TOLERANCE, eager_rows, text_inputs
from transformers import DynamicCache

from hide.engine.kv_cache import cache_keyword
from hide_kernels.integrations.transformers import capture_attention


def columns(matrix, reduction, queries=None):
    """Of eager attention (B, Hq, Q, K), what each key receives from the queries that see it, and the mean of heads.

    queries: (B, Q) bool, those that count; `None`: all.
    """
    n = torch.arange(matrix.shape[-1])
    counted = torch.ones(matrix.shape[0], matrix.shape[2], dtype=torch.bool) if queries is None else queries
    matrix = matrix * counted[:, None, :, None]
    seen = ((n <= torch.arange(matrix.shape[2])[:, None]) & counted[..., None]).sum(1)
    found = {"sum": matrix.sum(2), "max": matrix.amax(2), "mean": matrix.sum(2) / seen.clamp(min=1)[:, None]}
    return found[reduction].mean(1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_reduction_equals_the_columns_of_eager_beside_rows_and_bits_are_kept(family, implementation):
    model, inputs = FAMILIES[family](), prompt(family)
    image = torch.nonzero(inputs["input_ids"][0] == IMAGE).flatten()
    start, stop = int(image[0]), int(image[-1]) + 1
    arguments = {"layers": [2, 0], "queries": [stop], "key_spans": [(start, stop)]}
    with torch.no_grad():
        model.set_attn_implementation("eager")
        matrices = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation(implementation)
        plain = model(**inputs).logits
        with (
            capture_attention(model, **arguments, received="sum") as sums,
            capture_attention(model, **arguments, received="mean") as means,
            capture_attention(model, **arguments, received="max") as maxima,
        ):
            logits = model(**inputs).logits
    assert torch.equal(logits, plain)
    for reduction, captured in (("sum", sums), ("mean", means), ("max", maxima)):
        assert set(captured) == set(captured.received) == {0, 2}
        for layer in (0, 2):
            want = columns(matrices[layer], reduction)[:, start:stop]
            assert want.std() > 1e-3, "uniform attention would hide errors"
            assert (captured.received[layer] - want).abs().max() < TOLERANCE
            rows = matrices[layer][:, :, stop : stop + 1, start:stop].mean(1)
            assert (captured[layer].weights - rows).abs().max() < TOLERANCE


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_queries_of_padding_give_nothing_and_are_not_counted(reduction, side, implementation):
    model, ids = qwen2_5_vl(), text_inputs()
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad(), capture_attention(model, layers=[1], queries=[], received=reduction) as captured:
        model(**inputs)
    assert list(captured) == []
    want = columns(eager_rows(model, inputs, 1), reduction, mask.bool())
    assert (captured.received[1] - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_where_every_query_sees_every_key_those_of_padding_do_not_count_either(reduction):
    model, ids = qwen2_5_vl(), text_inputs()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    settings = {"layers": [1], "causal": False, "head_reduction": "none"}
    with torch.no_grad(), capture_attention(model, received=reduction, **settings) as captured:
        model(**inputs)
    matrix = captured[1].weights * mask[:, None, :, None]
    number = mask.sum(1)[:, None, None]
    want = {"sum": matrix.sum(2), "mean": matrix.sum(2) / number, "max": matrix.amax(2)}[reduction]
    assert (captured.received[1] - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("spans", [None, [(2, 25)]])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_forwards_that_continue_a_sequence_go_on_with_what_was_received(reduction, spans):
    model, ids = qwen2_5_vl(), text_inputs()
    with (
        torch.no_grad(),
        capture_attention(
            model, layers=[1], queries=[], key_spans=spans, received=reduction, head_reduction="kv_group"
        ) as captured,
    ):
        cache = {cache_keyword(type(model).forward): DynamicCache()}
        for start, stop in ((0, 11), (11, 29), (29, 30)):
            # transformers 4.57 would count the positions of later forwards of this model from the first one's.
            positions = torch.arange(start, stop).expand(3, 2, -1)
            model(input_ids=ids[:, start:stop], position_ids=positions, use_cache=True, **cache)
    matrix = eager_rows(model, {"input_ids": ids}, 1)
    want = torch.stack([columns(matrix[:, g : g + 2], reduction) for g in (0, 2)], 1)
    got = captured.received[1]
    assert (got - (want if spans is None else want[..., 2:25])).abs().max() < TOLERANCE


@pytest.mark.parametrize("use_cache", [True, False])
def test_in_generate_prompt_and_new_tokens_count_but_for_the_last(use_cache):
    model, ids = qwen2_5_vl(), text_inputs()
    with torch.no_grad(), capture_attention(model, layers=[1], queries="generated", received="sum") as captured:
        out = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache)
    matrix = eager_rows(model, {"input_ids": out[:, :-1]}, 1)
    assert captured[1].weights.shape == (2, 4, 33)
    assert (captured.received[1] - columns(matrix, "sum")).abs().max() < TOLERANCE


def test_sliding_windows_are_those_of_the_layer():
    model, ids = sliding_window_llm(), text_inputs()
    with torch.no_grad(), capture_attention(model, layers=[1], queries=[], received="mean") as captured:
        model(input_ids=ids)
    matrix = eager_rows(model, {"input_ids": ids}, 1)
    seen = (matrix > 0).sum(2)
    assert seen.max() < 30
    want = (matrix.sum(2) / seen).mean(1)
    assert (captured.received[1] - want).abs().max() < TOLERANCE


def test_a_sequence_that_starts_anew_replaces_and_one_that_goes_back_is_refused():
    model, ids = qwen2_5_vl(), text_inputs()
    with torch.no_grad(), capture_attention(model, layers=[1], queries=[], received="sum") as captured:
        model(input_ids=ids[:, :12])
        model(input_ids=ids)
    assert captured.received[1].sum() == pytest.approx(2 * 30, abs=1e-3)
    with (
        pytest.raises(ValueError, match="layer 1: a forward goes back to position 10 of 20: what keys received"),
        torch.no_grad(),
        capture_attention(model, layers=[1], queries=[], received="sum"),
    ):
        cache = DynamicCache()
        model(input_ids=ids[:, :20], use_cache=True, **{cache_keyword(type(model).forward): cache})
        cache.crop(-10)
        model(input_ids=ids[:, 10:], use_cache=True, **{cache_keyword(type(model).forward): cache})


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"received": "min"}, "received: got 'min', want None, 'sum', 'mean' or 'max'"),
        ({"received": "sum", "process_group": object()}, "received: got 'sum' together with process_group"),
        ({"received": "sum", "queries": [3, 3]}, "strictly increasing"),
    ],
)
def test_wrong_requests_are_named(arguments, text):
    with pytest.raises(ValueError, match=text), capture_attention(qwen2_5_vl(), layers=[0], **arguments):
        pass


def test_leaving_without_a_forward_is_an_error():
    with (
        pytest.raises(ValueError, match="no forward inside the block"),
        capture_attention(qwen2_5_vl(), layers=[1], queries=[], received="sum"),
    ):
        pass
