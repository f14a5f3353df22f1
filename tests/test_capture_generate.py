"""Rows of generated tokens, captured inside `generate`, against the maps that eager attention returns."""

import copy

import pytest
import torch
from random_models import FAMILIES, IMAGE, VOCABULARY, llm, prompt, qwen2_5_vl, sliding_window_llm
from transformers import CompileConfig, GenerationConfig

from hide.engine.kv_cache import cache_keyword
from hide_kernels.integrations.transformers import capture_attention

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
    with capture_attention(model, layers=[2], queries="generated", key_spans=[(start, stop)]) as captured:
        tokens = greedy(model, inputs)
    assert torch.equal(tokens, sequences) and torch.equal(tokens, greedy(model, inputs))
    want = torch.stack([step[..., start:stop].mean(1) for step in steps], 1)
    assert captured[2].weights.shape == (1, NEW, stop - start)
    assert (captured[2].weights - want).abs().max() < TOLERANCE


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
    with capture_attention(model, layers=[1], queries="generated", key_spans=spans, causal=causal) as captured:
        assert torch.equal(greedy(model, inputs), sequences)
    for sample, own in enumerate(spans):
        columns = [column for start, stop in own for column in range(start, stop)]
        want = torch.stack([step[sample][:, columns].mean(0) for step in steps])
        got = captured[1].weights[sample]
        assert (got[:, : len(columns)] - want).abs().max() < TOLERANCE
        assert (got[:, len(columns) :] == 0).all()


def test_without_spans_keys_that_came_later_are_zeros():
    model, inputs = qwen2_5_vl(), left_padded()
    _, steps = eager_steps(model, inputs, 1)
    with capture_attention(model, layers=[1], queries="generated", return_lse=True) as captured:
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
    with capture_attention(model, layers=[1], queries="generated", key_spans=[(0, 20)]) as captured:
        greedy(model, inputs, **options)
    want = torch.stack([step[..., :20].mean(1) for step in steps], 1)
    assert captured[1].weights.shape == want.shape
    assert (captured[1].weights - want).abs().max() < TOLERANCE


def test_a_second_generate_replaces_the_first_and_prompt_rows_can_be_had_beside():
    model, inputs = qwen2_5_vl(), left_padded()
    one = {name: value[2:] for name, value in inputs.items()}
    with (
        capture_attention(model, layers=[1], queries="generated", key_spans=[(0, 20)]) as generated,
        capture_attention(model, layers=[1], queries=[3, 19], key_spans=[(0, 20)]) as asked,
    ):
        greedy(model, inputs)
        greedy(model, one)
    assert generated[1].weights.shape == (1, NEW, 20)
    assert (asked[1].weights[:, 1] - generated[1].weights[:, 0]).abs().max() < TOLERANCE


def test_memory_grows_by_the_rows_alone():
    """No step may keep a score, a key or a hidden state alive."""
    model, inputs = qwen2_5_vl(), left_padded()
    with capture_attention(model, layers=[1], queries="generated", key_spans=[(0, 5)]) as captured:
        greedy(model, inputs)
        pieces = captured._recorders[1].pieces
        assert [piece.rows.untyped_storage().nbytes() for piece in pieces] == [3 * 1 * 5 * 4] * NEW
        assert all(piece.lse is None and piece.rows.grad_fn is None for piece in pieces)


@pytest.mark.parametrize("length", [3, 20])
def test_a_cache_that_drops_keys_is_refused_instead_of_giving_the_wrong_columns(length):
    model, ids = sliding_window_llm(), left_padded()["input_ids"][2:, :length]
    with pytest.raises(ValueError, match="dropped keys"), capture_attention(model, layers=[1], queries="generated"):
        greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_several_queries_in_a_decode_step_are_refused():
    model, ids = qwen2_5_vl(), left_padded()["input_ids"]
    with (
        pytest.raises(ValueError, match="without an assistant"),
        torch.no_grad(),
        capture_attention(model, layers=[1], queries="generated"),
    ):
        name = cache_keyword(type(model).forward)
        past = model(input_ids=ids[:, :10], use_cache=True)[name]
        for step in (1, 4):
            model(input_ids=ids[:, :step], position_ids=torch.full((3, 3, step), 10), **{name: past})


@pytest.mark.parametrize("queries", ["all", [1.5], "1"])
def test_other_queries_are_refused(queries):
    with pytest.raises(TypeError, match="generated"), capture_attention(qwen2_5_vl(), layers=[0], queries=queries):
        pass


SPANS = [[(7, 12)], [(0, 5)], [(2, 7)]]


def rows_afterwards(model, sequences, layer, prompts):
    """(sequences, new tokens, 5) of the spans, by one eager forward of what was generated."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    each = len(sequences) // prompts
    mask = left_padded()["attention_mask"][:prompts].repeat_interleave(each, 0)
    mask = torch.cat([mask, torch.ones(len(sequences), sequences.shape[1] - 20, dtype=mask.dtype)], 1)
    with torch.no_grad():
        maps = eager(
            input_ids=sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0),
            output_attentions=True, use_cache=False,
        ).attentions[layer].mean(1)[:, 19:-1]  # fmt: skip
    return torch.stack([maps[i, :, slice(*SPANS[i // each][0])] for i in range(len(sequences))])


SERVED = {
    "without a cache": {"use_cache": False},
    "three samples of each": {"do_sample": True, "num_return_sequences": 3},
    "two samples, no cache": {"do_sample": True, "num_return_sequences": 2, "use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "a compiled decode is asked for": {
        "cache_implementation": "static", "compile_config": CompileConfig(backend="eager", fullgraph=False),
    },
    "a dictionary is returned": {"return_dict_in_generate": True, "output_logits": True},
    "one token": {"max_new_tokens": 1, "min_new_tokens": 1},
    "samples end early": {"min_new_tokens": None, "eos_token_id": list(range(0, VOCABULARY, 5))},
    "embeddings": {"inputs_embeds": True},
}  # fmt: skip


@pytest.mark.parametrize("way", SERVED)
def test_each_way_of_generating_gives_as_many_rows_as_new_tokens_and_they_are_those_of_its_sequences(way):
    model, inputs, options = llm(), left_padded(), dict(SERVED[way])
    if options.pop("inputs_embeds", False):
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
        ids = inputs.pop("input_ids")
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0} | options
    torch.manual_seed(0)
    with capture_attention(model, layers=[1], queries="generated", key_spans=SPANS) as captured:
        found = model.generate(**inputs, **settings)
    sequences = found if isinstance(found, torch.Tensor) else found.sequences
    if "inputs_embeds" in inputs:
        sequences = torch.cat([ids, sequences], 1)
    want = rows_afterwards(model, sequences, 1, 3)
    assert captured[1].weights.shape == want.shape == (len(sequences), sequences.shape[1] - 20, 5)
    assert (captured[1].weights - want).abs().max() < TOLERANCE


REFUSED = {
    "num_beams=2": {"num_beams": 2},
    "num_beams=4": {"generation_config": GenerationConfig(num_beams=4, pad_token_id=0)},
    "prompt_lookup_num_tokens=3": {"prompt_lookup_num_tokens": 3},
    "assistant_model=LlamaForCausalLM": {"assistant_model": True},
    "assistant_early_exit=1": {"assistant_early_exit": 1},
    "penalty_alpha=0.6": {"penalty_alpha": 0.6, "top_k": 4},
    "guidance_scale=1.5": {"guidance_scale": 1.5},
    "dola_layers=high": {"dola_layers": "high"},
    "custom_generate=function": {"custom_generate": lambda model, input_ids, **_: input_ids},
    "cache_implementation='paged'": {"cache_implementation": "paged"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_ways_of_generating_without_rows_of_their_sequences_are_refused_by_name_before_they_begin(name):
    model, options = llm(), dict(REFUSED[name])
    if options.get("assistant_model"):
        options["assistant_model"] = llm()
    inputs = {key: value[2:] for key, value in left_padded().items()}
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with (
        pytest.raises(ValueError, match=f"{name}.*generate first"),
        capture_attention(model, layers=[1], queries="generated"),
    ):
        model.generate(**inputs, max_new_tokens=NEW, **options)
    assert not calls and "generate" not in vars(model)


def test_continuous_batching_is_refused():
    model = llm()
    with pytest.raises(ValueError, match="continuous batching"), capture_attention(model, layers=[1]):
        model.generate_batch([[20, 21, 22]])
    assert "generate_batch" not in vars(model)


def test_beams_leave_the_rows_of_the_prompt_but_none_of_the_reply():
    model, inputs = llm(), {name: value[2:] for name, value in left_padded().items()}
    with capture_attention(model, layers=[1], queries=[3, 19], key_spans=[(0, 20)]) as captured:
        model.generate(**inputs, num_beams=2, max_new_tokens=3, pad_token_id=0)
    with torch.no_grad(), capture_attention(model, layers=[1], queries=[3, 19], key_spans=[(0, 20)]) as plain:
        model(**inputs)
    assert (captured[1].weights - plain[1].weights).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="num_beams=2"), capture_attention(model, layers=[1], queries=[3, 20]):
        model.generate(**inputs, num_beams=2, max_new_tokens=3, pad_token_id=0)


def test_a_model_that_does_not_generate_has_no_generated_rows():
    with (
        pytest.raises(ValueError, match="want the model that generates"),
        capture_attention(llm().model, layers=[1], queries="generated"),
    ):
        pass
