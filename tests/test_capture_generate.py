"""Rows of generated tokens, captured inside `generate`, against the maps that eager attention returns."""

import copy

import pytest
import torch
from random_models import FAMILIES, IMAGE, V5, VOCABULARY, llm, prompt, qwen2_5_vl, sliding_window_llm

from hide.kv_cache import cache_keyword
from hide_kernels.integrations.transformers import capture_attention_rows

NEW = 6
TOLERANCE = 1e-5


def greedy(model, inputs, **kwargs):
    return model.generate(**inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **kwargs)


def eager_steps(model, inputs, layer):
    """Per generated token (B, Hq, K), the last query's map of the step that predicted it."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    out = greedy(eager, inputs, output_attentions=True, return_dict_in_generate=True)
    return out.sequences, [step[layer][:, :, -1] for step in out.attentions]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


def test_rows_of_every_new_token_equal_eager_and_tokens_do_not_change(family):
    model, inputs = FAMILIES[family](), prompt(family)
    image = torch.nonzero(inputs["input_ids"][0] == IMAGE).flatten()
    start, stop = int(image[0]), int(image[-1]) + 1
    sequences, steps = eager_steps(model, inputs, 2)
    with capture_attention_rows(model, layers=[2], rows="generated", key_spans=[(start, stop)]) as captured:
        tokens = greedy(model, inputs)
    assert torch.equal(tokens, sequences) and torch.equal(tokens, greedy(model, inputs))
    want = torch.stack([step[..., start:stop].mean(1) for step in steps], 1)
    assert captured[2].rows.shape == (1, NEW, stop - start)
    assert (captured[2].rows - want).abs().max() < TOLERANCE


def left_padded():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, VOCABULARY, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :1] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("causal", [True, False])
def test_left_padded_batches_with_a_span_for_each_sample(causal):
    model, inputs = qwen2_5_vl(), left_padded()
    sequences, steps = eager_steps(model, inputs, 1)
    spans = [[(7, 12), (13, 14)], [(1, 10)], [(0, 3)]]
    with capture_attention_rows(model, layers=[1], rows="generated", key_spans=spans, causal=causal) as captured:
        assert torch.equal(greedy(model, inputs), sequences)
    for sample, own in enumerate(spans):
        columns = [column for start, stop in own for column in range(start, stop)]
        want = torch.stack([step[sample][:, columns].mean(0) for step in steps])
        got = captured[1].rows[sample]
        assert (got[:, : len(columns)] - want).abs().max() < TOLERANCE
        assert (got[:, len(columns) :] == 0).all()


def test_without_spans_keys_that_came_later_are_zeros():
    model, inputs = qwen2_5_vl(), left_padded()
    _, steps = eager_steps(model, inputs, 1)
    with capture_attention_rows(model, layers=[1], rows="generated", return_lse=True) as captured:
        greedy(model, inputs)
    rows, lse = captured[1]
    assert rows.shape == (3, NEW, 20 + NEW - 1) and lse.shape == (3, 4, NEW)
    for index, step in enumerate(steps):
        assert (rows[:, index, : 20 + index] - step.mean(1)).abs().max() < TOLERANCE
        assert (rows[:, index, 20 + index :] == 0).all()


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 7}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_chunked_prefill_and_static_caches_give_the_same_rows(options):
    model, inputs = llm(), {name: value[2:] for name, value in left_padded().items()}
    _, steps = eager_steps(model, inputs, 1)
    with capture_attention_rows(model, layers=[1], rows="generated", key_spans=[(0, 20)]) as captured:
        greedy(model, inputs, **options)
    assert captured[1].rows.shape[1] == NEW + (not V5 and "prefill_chunk_size" in options)
    want = torch.stack([step[..., :20].mean(1) for step in steps], 1)
    assert (captured[1].rows[:, -NEW:] - want).abs().max() < TOLERANCE


def test_a_second_generate_replaces_the_first_and_prompt_rows_can_be_had_beside():
    model, inputs = qwen2_5_vl(), left_padded()
    one = {name: value[2:] for name, value in inputs.items()}
    with (
        capture_attention_rows(model, layers=[1], rows="generated", key_spans=[(0, 20)]) as generated,
        capture_attention_rows(model, layers=[1], rows=[3, 19], key_spans=[(0, 20)]) as asked,
    ):
        greedy(model, inputs)
        greedy(model, one)
    assert generated[1].rows.shape == (1, NEW, 20)
    assert (asked[1].rows[:, 1] - generated[1].rows[:, 0]).abs().max() < TOLERANCE


def test_memory_grows_by_the_rows_alone():
    """No step may keep a score, a key or a hidden state alive."""
    model, inputs = qwen2_5_vl(), left_padded()
    with capture_attention_rows(model, layers=[1], rows="generated", key_spans=[(0, 5)]) as captured:
        greedy(model, inputs)
        pieces = captured._captures[1].pieces
        assert [piece.rows.untyped_storage().nbytes() for piece in pieces] == [3 * 1 * 5 * 4] * NEW
        assert all(piece.lse is None and piece.rows.grad_fn is None for piece in pieces)


@pytest.mark.parametrize("length", [3, 20])
def test_a_cache_that_drops_keys_is_refused_instead_of_giving_the_wrong_columns(length):
    model, ids = sliding_window_llm(), left_padded()["input_ids"][2:, :length]
    with pytest.raises(ValueError, match="dropped keys"), capture_attention_rows(model, layers=[1], rows="generated"):
        greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_several_queries_in_a_decode_step_are_refused():
    model, ids = qwen2_5_vl(), left_padded()["input_ids"]
    with (
        pytest.raises(ValueError, match="without an assistant"),
        torch.no_grad(),
        capture_attention_rows(model, layers=[1], rows="generated"),
    ):
        name = cache_keyword(type(model).forward)
        past = model(input_ids=ids[:, :10], use_cache=True)[name]
        for step in (1, 4):
            model(input_ids=ids[:, :step], position_ids=torch.full((3, 3, step), 10), **{name: past})


@pytest.mark.parametrize("rows", ["all", [1.5], "1"])
def test_other_rows_are_refused(rows):
    with pytest.raises(TypeError, match="generated"), capture_attention_rows(qwen2_5_vl(), layers=[0], rows=rows):
        pass
