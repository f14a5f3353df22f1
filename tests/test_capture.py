"""capture_attention against output_attentions=True with eager attention, on models of four families."""

import copy
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from random_models import FAMILIES, IMAGE, VOCABULARY, prompt, qwen2_5_vl, randomise, sliding_window_llm
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hide.engine.chunked_sdpa import CONTINUING, continuing
from hide.engine.kv_cache import cache_keyword
from hide_kernels.integrations import recorder
from hide_kernels.integrations import transformers as transformers_capture
from hide_kernels.integrations.masks import first_position, visible_keys
from hide_kernels.integrations.transformers import (
    IMPLEMENTATION,
    capture_attention,
    decoder_attention,
)

TOLERANCE = 1e-5


def eager_rows(model, inputs, layer):
    """(B, Hq, Q, K) of the same weights run with eager attention."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return eager(**inputs, output_attentions=True).attentions[layer]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return FAMILIES[family]()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_equal_output_attentions_and_logits_keep_their_bits(model, family, implementation):
    inputs = prompt(family)
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    ids = inputs["input_ids"][0]
    image = torch.nonzero(ids == IMAGE).flatten()
    span = (int(image[0]), int(image[-1]) + 1)
    rows = range(span[1] + 1, len(ids))
    with torch.no_grad():
        plain = model(**inputs).logits
        with capture_attention(model, layers=[2, 0], queries=rows, key_spans=[span]) as captured:
            logits = model(**inputs).logits
    assert torch.equal(logits, plain)
    assert set(captured) == {0, 2}
    for layer, result in captured.items():
        want = eager_rows(model, inputs, layer)[:, :, rows, span[0] : span[1]].mean(1)
        assert want.std() > 1e-3, "uniform attention would hide errors"
        assert (result.weights - want).abs().max() < TOLERANCE


def test_heads_and_all_rows_equal_eager(model, family):
    inputs = prompt(family)
    with torch.no_grad(), capture_attention(model, layers=[-1], head_reduction="none") as captured:
        model(**inputs)
    want = eager_rows(model, inputs, 3)
    assert (captured[3].weights - want).abs().max() < TOLERANCE


def test_non_causal_rows_also_see_later_keys(model, family):
    """Published HiDe takes its softmax over every key: the eager scores without the mask."""
    inputs = prompt(family)
    rows = [20, 22]
    with torch.no_grad():
        with capture_attention(model, layers=[1], queries=rows, causal=False, head_reduction="none") as free:
            model(**inputs)
        with capture_attention(model, layers=[1], queries=rows, head_reduction="none") as causal:
            model(**inputs)
    free, causal = free[1].weights[0], causal[1].weights[0]
    assert (free.sum(-1) - 1).abs().max() < 1e-5
    for index, row in enumerate(rows):
        assert (causal[:, index, row + 1 :] == 0).all() and (free[:, index, row + 1 :] > 0).all()
        renormalised = free[:, index, : row + 1] / free[:, index, : row + 1].sum(-1, keepdim=True)
        torch.testing.assert_close(causal[:, index, : row + 1], renormalised, rtol=1e-4, atol=1e-7)


def text_inputs(seed=0, length=30):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, VOCABULARY, (2, length), generator=generator)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_eager(implementation, side, padding):
    model = qwen2_5_vl()
    model.set_attn_implementation(implementation)
    ids = text_inputs()
    mask = torch.ones_like(ids)
    mask[0, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    mask[1, slice(0, padding) if side == "left" else slice(30 - padding, None)] = 0
    rows = range(10, 21)
    with torch.no_grad(), capture_attention(model, layers=[2], queries=rows) as captured:
        model(input_ids=ids, attention_mask=mask)
    want = eager_rows(model, {"input_ids": ids, "attention_mask": mask}, 2)[:, :, rows].mean(1)
    assert (captured[2].weights - want).abs().max() < TOLERANCE
    with torch.no_grad(), capture_attention(model, layers=[2], queries=rows, causal=False) as captured:
        model(input_ids=ids, attention_mask=mask)
    free = captured[2].weights
    assert (free[mask[:, None].expand(2, 11, 30) == 0] == 0).all()
    assert (free.sum(-1) - 1).abs().max() < 1e-5
    # Which rows they are: up to its own position each is the causal row, but for the normaliser of every head.
    each = {}
    for causal in (True, False):
        with (
            torch.no_grad(),
            capture_attention(model, layers=[2], queries=rows, causal=causal, head_reduction="none") as captured,
        ):
            model(input_ids=ids, attention_mask=mask)
        each[causal] = captured[2].weights
    for index, row in enumerate(rows):
        head = each[False][:, :, index, : row + 1]
        assert (head / head.sum(-1, keepdim=True) - each[True][:, :, index, : row + 1]).abs().max() < TOLERANCE


def test_sliding_window_layers_equal_eager():
    model, ids = sliding_window_llm(), text_inputs()
    with torch.no_grad(), capture_attention(model, layers=[1], head_reduction="none") as captured:
        model(input_ids=ids)
    want = eager_rows(model, {"input_ids": ids}, 1)
    assert (want[:, :, 20, :13] == 0).all()
    assert (captured[1].weights - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_chunked_prefill_gives_the_rows_of_one_forward(cache):
    model, ids = qwen2_5_vl(), text_inputs()
    rows = [3, 9, 11, 12, 25, 29]
    want = eager_rows(model, {"input_ids": ids}, 2)[:, :, rows].mean(1)
    past = transformers.DynamicCache()
    if cache == "static":
        past = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=40, max_batch_size=2)
    positions = torch.arange(30)[None].expand(3, 2, 30)
    with (
        torch.no_grad(),
        capture_attention(model, layers=[2], queries=rows, key_spans=[(0, 9), (20, 30)]) as captured,
    ):
        for start, stop in [(0, 10), (10, 12), (12, 30)]:
            model(
                input_ids=ids[:, start:stop], position_ids=positions[..., start:stop], use_cache=True,
                cache_position=torch.arange(start, stop), **{cache_keyword(type(model).forward): past},
            )  # fmt: skip
    assert (captured[2].weights - want[..., [*range(9), *range(20, 30)]]).abs().max() < TOLERANCE


@pytest.mark.parametrize("inside", [True, False])
def test_chunks_on_a_sliding_window_cache_that_dropped_keys_are_refused(inside):
    model, ids = sliding_window_llm(), text_inputs()
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), pytest.raises(ValueError, match="dropped keys"):
        if not inside:
            model(input_ids=ids[:, :10], use_cache=True, **{cache_keyword(type(model).forward): past})
        with capture_attention(model, layers=[1], queries=[12]):
            for start in (0, 10) if inside else (10,):
                model(
                    input_ids=ids[:, start : start + 10], use_cache=True, **{cache_keyword(type(model).forward): past}
                )


def test_a_new_sequence_replaces_the_rows_of_the_last():
    model = qwen2_5_vl()
    with torch.no_grad(), capture_attention(model, layers=[0], queries=[4, 7]) as captured:
        model(input_ids=text_inputs(seed=1))
        model(input_ids=text_inputs(seed=2))
    want = eager_rows(model, {"input_ids": text_inputs(seed=2)}, 0)[:, :, [4, 7]].mean(1)
    assert (captured[0].weights - want).abs().max() < TOLERANCE


def test_flash_attention_runs_through_a_view_with_its_own_config(monkeypatch):
    """FlashAttention's wrapper reads the implementation's name and the layer's index off the module it is given."""
    model, ids = qwen2_5_vl(), text_inputs()
    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, module.layer_idx, attention_mask))
        next(layer for layer in module.modules() if isinstance(layer, torch.nn.Linear))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    want = eager_rows(model, {"input_ids": ids}, 1).mean(1)
    model.config.text_config._attn_implementation_internal = "flash_attention_2"
    with torch.no_grad(), capture_attention(model, layers=[1]) as captured:
        model(input_ids=ids)
    assert seen == [("flash_attention_2", layer, None) for layer in range(4)]
    assert (captured[1].weights - want).abs().max() < TOLERANCE


def test_a_chunked_prefill_on_flash_attention_keeps_all_keys_for_nested_captures(monkeypatch):
    """FlashAttention gets no mask for queries behind a cache; it aligns them with the last keys."""
    model, ids = qwen2_5_vl(), text_inputs()

    def flash(module, query, key, value, attention_mask, **kwargs):
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask[None, None], **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    want = eager_rows(model, {"input_ids": ids}, 1).mean(1)
    model.config.text_config._attn_implementation_internal = "flash_attention_2"
    past = transformers.DynamicCache()
    positions = torch.arange(30)[None].expand(3, 2, 30)
    with (
        torch.no_grad(),
        capture_attention(model, layers=[1], queries=[3, 25], key_spans=[(0, 30)]) as outer,
        capture_attention(model, layers=[1], key_spans=[(0, 30)]) as inner,
    ):
        for start, stop in [(0, 18), (18, 30)]:
            model(
                input_ids=ids[:, start:stop],
                position_ids=positions[..., start:stop],
                use_cache=True,
                **{cache_keyword(type(model).forward): past},
            )
    assert (inner[1].weights - want).abs().max() < TOLERANCE
    assert (outer[1].weights - want[:, [3, 25]]).abs().max() < TOLERANCE


def test_sequences_packed_into_one_are_refused_on_flash_attention(monkeypatch):
    model, ids = sliding_window_llm(), text_inputs()[:1]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation_internal = "flash_attention_2"
    packed = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with (
        pytest.raises(ValueError, match="positions restart"),
        torch.no_grad(),
        capture_attention(model, layers=[1]),
    ):
        model(input_ids=ids, position_ids=packed)


def test_captures_nest_and_everything_is_restored_also_after_an_exception():
    model, ids = qwen2_5_vl(), text_inputs()
    modules = decoder_attention(model)
    before = {layer: module.config for layer, module in modules.items()}
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    with torch.no_grad(), capture_attention(model, layers=[1, 2]) as outer:
        with capture_attention(model, layers=[2], queries=[5], causal=False) as inner:
            model(input_ids=ids)
        assert torch.equal(inner[2].weights.sum(-1).round(), torch.ones(2, 1))
        assert outer[2].weights.shape == (2, 30, 30)
    with pytest.raises(ZeroDivisionError), capture_attention(model, layers=[0]):
        raise ZeroDivisionError
    assert {layer: module.config for layer, module in modules.items()} == before
    assert all(modules[layer].config is config for layer, config in before.items())
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == functions


def test_only_the_language_model_has_decoder_attention(model):
    modules = decoder_attention(model)
    assert list(modules) == [0, 1, 2, 3]
    names = {id(module): name for name, module in model.named_modules()}
    assert all("language_model" in names[id(module)] for module in modules.values())


def test_a_model_set_to_our_implementation_as_a_whole_keeps_its_padding_mask():
    """Registered without a mask function, transformers would silently attend to padding."""
    model, ids = qwen2_5_vl(), text_inputs()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation({"text_config": IMPLEMENTATION})
        got = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(got[0, 9:], want[0, 9:]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"layers": [4]}, "layers: got 4, want 0 to 3"),
        ({"layers": []}, "layers: got none"),
        ({"layers": [0], "queries": [3, 3]}, "strictly increasing"),
        ({"layers": [0], "queries": []}, "strictly increasing"),
        ({"layers": [0], "queries": [-1]}, "strictly increasing"),
        ({"layers": [0], "queries": [5, 31, 40]}, r"queries \[31, 40\]"),
        ({"layers": [0], "key_spans": [(0, 31)]}, "key_spans"),
    ],
)
def test_wrong_requests_are_named(arguments, text):
    model = qwen2_5_vl()
    with pytest.raises(ValueError, match=text), torch.no_grad(), capture_attention(model, **arguments):
        model(input_ids=text_inputs())


@pytest.fixture
def known(monkeypatch):
    """Whether each call for rows was given the log-sum-exp."""
    calls = []
    rows_of = recorder.attention_rows
    monkeypatch.setattr(
        recorder, "attention_rows", lambda *x, lse=None, **y: calls.append(lse is not None) or rows_of(*x, lse=lse, **y)
    )
    return calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("padding", [0, 9], ids=["whole", "left padding"])
def test_the_log_sum_exp_of_the_models_own_attention_is_taken_and_gives_the_rows_of_eager(known, padding, mode):
    model, ids = qwen2_5_vl(), text_inputs()
    model.set_attn_implementation("sdpa")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, :padding] = 0
    rows = [0, 3, 10, 29]
    with mode():
        plain = model(**inputs).logits
        with capture_attention(model, layers=[1], queries=rows, head_reduction="none") as captured:
            logits = model(**inputs).logits
    assert known == [True] and torch.equal(logits, plain)
    want = eager_rows(model, inputs, 1)[:, :, rows]
    hidden = [row for row in rows if row < padding]
    # Eager attention spreads a row that sees nothing over all keys.
    want[0, :, [rows.index(row) for row in hidden]] = 0
    assert (captured[1].weights - want).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "arguments, implementation",
    [({"causal": False}, "sdpa"), ({"return_lse": True}, "sdpa"), ({}, "eager")],
    ids=["every row sees every key", "it is asked for", "eager"],
)
def test_the_log_sum_exp_is_computed_where_the_models_own_is_of_other_scores_or_absent(
    known, arguments, implementation
):
    model, ids = qwen2_5_vl(), text_inputs()
    model.set_attn_implementation(implementation)
    with torch.no_grad(), capture_attention(model, layers=[1], queries=[10, 29], **arguments):
        model(input_ids=ids)
    with torch.enable_grad(), capture_attention(model, layers=[1], queries=[10, 29]):
        model(input_ids=ids)
    assert known == [False, False]


@pytest.mark.parametrize("change", ["autocast", "is_causal", "softcap"])
def test_the_log_sum_exp_of_other_scores_than_those_recorded_is_not_taken(known, change, monkeypatch):
    """SDPA casts its inputs under autocast, takes `is_causal` from the call, and in transformers 4 ignores a softcap."""
    model, ids = qwen2_5_vl(), text_inputs()
    model.set_attn_implementation("sdpa")
    keywords = {} if change == "autocast" else {"is_causal": False} if change == "is_causal" else {"softcap": 0.5}
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *x, softcap=None, **y: sdpa(*x, **y))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast")
    with torch.no_grad(), autocast, capture_attention(model, layers=[1]) as captured:
        model(input_ids=ids, **keywords)
    assert known == [False]
    torch.testing.assert_close(captured[1].weights.sum(-1), torch.ones(2, 30), rtol=0, atol=1e-5)


def test_fused_attention_that_keeps_no_log_sum_exp_leaves_it_to_be_computed():
    """cuDNN's, and PyTorch's memory-efficient one without gradients, return none or an empty one."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    for kept in (None, torch.zeros(2, 4, 0)):
        own = transformers_capture._OwnLse()
        fused = mock.Mock(return_value=(torch.zeros(2, 4, 3, 8), kept, *[None] * 7), _schema=operator._schema)
        own.__torch_dispatch__(fused, (), (torch.zeros(2, 4, 3, 8),))
        assert own.of(torch.zeros(2, 4, 3, 8)) is None


def test_layers_named_twice_are_captured_once_and_gradients_may_be_recorded():
    model, ids = qwen2_5_vl(), text_inputs()
    with capture_attention(model, layers=[2, -2], queries=np.array([4, 7])) as captured:
        model(input_ids=ids)
    assert list(captured) == [2] and captured[2].weights.requires_grad
    want = eager_rows(model, {"input_ids": ids}, 2)[:, :, [4, 7]].mean(1)
    assert (captured[2].weights - want).abs().max() < TOLERANCE


def test_leaving_without_a_forward_is_an_error():
    with (
        pytest.raises(ValueError, match="no forward inside the block"),
        capture_attention(qwen2_5_vl(), layers=[1]),
    ):
        pass


def test_masks_that_cannot_be_reproduced_are_refused():
    model, ids = sliding_window_llm(), text_inputs()
    block = torch.ones(2, 1, 30, 30).tril().bool()
    block[:, :, :, 4] = False
    with (
        pytest.raises(ValueError, match="not causal, sliding or padding"),
        torch.no_grad(),
        capture_attention(model, layers=[0]),
    ):
        model(input_ids=ids, attention_mask=block)


SIZES = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip


def small(model_type, **sizes):
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    return randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


@pytest.mark.parametrize(
    "model_type, sizes",
    [
        ("gemma2", {**SIZES, "head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 2.0}),
        ("gemma3_text", {**SIZES, "head_dim": 16, "sliding_window": 5}),
        ("gpt2", {"vocab_size": 64, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64}),
        ("gpt_neox", SIZES),
        (
            "deepseek_v3",
            {
                **SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1,
                "topk_group": 1, "num_experts_per_tok": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1,
            },
        ),
    ],
)  # fmt: skip
def test_softcaps_windows_and_value_heads_of_another_size_equal_eager(model_type, sizes):
    model, ids = small(model_type, **sizes), torch.arange(3, 15)[None]
    with torch.no_grad():
        want = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        with capture_attention(model, layers=range(4), head_reduction="none") as captured:
            model(input_ids=ids, use_cache=False)
    for layer in range(4):
        assert (captured[layer].weights - want[layer]).abs().max() < TOLERANCE


def test_softmax_layers_of_a_hybrid_decoder_equal_eager_and_the_others_are_refused_for_what_they_are():
    model, ids = small("qwen3_next", **SIZES, **EXPERTS, head_dim=16), torch.arange(3, 15)[None]
    with torch.no_grad():
        want = model(input_ids=ids, output_attentions=True, use_cache=False).attentions[-1]
        with capture_attention(model, layers=[-1], head_reduction="none") as captured:
            model(input_ids=ids, use_cache=False)
    assert list(captured) == [3] and (captured[3].weights - want).abs().max() < TOLERANCE
    with (
        pytest.raises(ValueError, match="layer 1 is linear_attention: it has no softmax rows; layers .* captured: 3"),
        capture_attention(model, layers=[3, 1]),
    ):
        pass
    with pytest.raises(ValueError, match="got 4, want 0 to 3"), capture_attention(model, layers=[4]):
        pass


def test_attention_sinks_are_refused_by_layer():
    model = small("gpt_oss", **SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="layer 2: s_aux"), torch.no_grad(), capture_attention(model, layers=[2]):
        model(input_ids=torch.arange(3, 15)[None])


@pytest.mark.parametrize(
    "model_type, sizes, text",
    [
        ("bloom", {"vocab_size": 64, "hidden_size": 48, "n_layer": 2, "n_head": 4}, "BloomAttention"),
        ("mamba", {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8}, "no softmax rows"),
    ],
)
def test_decoders_with_attention_of_their_own_or_none_are_refused_for_that(model_type, sizes, text):
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"no layer of .* can be captured; layer 0 .*{text}"):
        decoder_attention(model)


def test_a_module_that_computes_attention_by_itself_is_named_when_it_has_run(monkeypatch):
    model = sliding_window_llm()
    attention = decoder_attention(model)[1]
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    with (
        pytest.raises(ValueError, match="layer 1: its MistralAttention computes attention by itself"),
        torch.no_grad(),
        capture_attention(model, layers=[1]),
    ):
        model(input_ids=text_inputs())
    assert not attention._forward_hooks


def test_models_without_the_attention_interface_are_refused():
    model = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=99
        )
    )
    with pytest.raises(ValueError, match="attention interface"):
        decoder_attention(model)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_continuing_a_cache_needs_no_mask_and_gives_the_same(monkeypatch, padded):
    model = FAMILIES["qwen2_5_vl"]()
    decoder, config = model.model.language_model, model.model.language_model.config
    states = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 21, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
    want = decoder(inputs_embeds=states, attention_mask=mask).last_hidden_state
    masks = []
    real = ALL_ATTENTION_FUNCTIONS[CONTINUING]

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return real(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, CONTINUING, spy)
    cache, found = DynamicCache(), []
    with continuing(decoder):
        for start, stop in [(0, 6), (6, 13), (13, 20), (20, 21)]:
            piece = decoder(
                inputs_embeds=states[:, start:stop], use_cache=True, attention_mask=mask[:, :stop] if padded else None,
                **{cache_keyword(type(decoder).forward): cache},
            )  # fmt: skip
            found.append(piece.last_hidden_state)
    got = torch.cat(found, 1)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)
    assert len(masks) == 16 and all((one is None) != padded for one in masks)
    assert config._attn_implementation == "sdpa"


def test_a_decoder_with_another_attention_is_left_as_it_is():
    model = FAMILIES["qwen2_5_vl"]()
    model.set_attn_implementation("eager")
    with continuing(model.model.language_model):
        assert model.model.language_model.config._attn_implementation == "eager"


def test_a_mask_of_one_key_is_one_of_all_keys_as_a_model_adds_it():
    """MiniMax's of transformers 5.24, behind its cache: a linear layer comes first and says that nothing is cached."""
    for mask in (torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.long)):
        visible = visible_keys(mask, 13)
        assert visible.shape == (2, 1, 13) and visible.all()
        assert first_position(visible, 1, 13) == 12


def test_a_mask_of_fewer_keys_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 1, 2, 5\), want 7 keys or more"):
        visible_keys(torch.ones(1, 1, 2, 5, dtype=torch.bool), 7)
