"""Other people's cache eviction with our scores: kvpress's presses keep the same tokens, and H2O's runs in its pipeline."""

import pytest
import torch
import transformers

kvpress = pytest.importorskip("kvpress", reason="the peers extra")
pytestmark = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 3), reason="kvpress wants transformers below 5.3"
)

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    QuantizedCache,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hide.engine.kv_cache import cache_keyword  # noqa: E402
from hide_kernels.integrations import kvpress as ours  # noqa: E402
from hide_kernels.integrations.h2o import h2o_cache  # noqa: E402
from hide_kernels.integrations.transformers import capture_attention  # noqa: E402


def random_model(family):
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[family]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = model(config(vocab_size=64, num_hidden_layers=3, head_dim=16, initializer_range=0.3, **sizes)).eval()
    model.generation_config.eos_token_id = None
    return model


def kept(model, press, tokens):
    """The keys of every layer, those of a head in the order of their first number."""
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(tokens, **{cache_keyword(type(model).forward): cache})
    return [layer.keys.gather(2, layer.keys[..., :1].argsort(2).expand_as(layer.keys)) for layer in cache.layers]


def assert_same_keys(some, others):
    assert some[0].shape == (2, 2, 120, 16)
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kernel_size", [5, 7])
def test_snapkv_keeps_the_same_tokens_with_our_scores(family, kernel_size):
    model, tokens = random_model(family), torch.randint(64, (2, 301), generator=torch.Generator().manual_seed(0))
    presses = [press(0.6, window_size=9, kernel_size=kernel_size) for press in (kvpress.SnapKVPress, ours.SnapKVPress)]
    assert_same_keys(*(kept(model, press, tokens) for press in presses))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_observed_attention_keeps_the_same_tokens_and_needs_no_eager_attention(family):
    model, tokens = random_model(family), torch.randint(64, (2, 301), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    theirs = kept(model, kvpress.ObservedAttentionPress(0.6), tokens)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():  # keys that differ in the last bits
            mine = kept(model, ours.ObservedAttentionPress(0.6), tokens)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_h2o_s_press_answers_in_the_pipeline_what_h2o_s_cache_does(family):
    model, tokens = random_model(family), torch.randint(64, (1, 120), generator=torch.Generator().manual_seed(0))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pipeline = kvpress.KVPressTextGenerationPipeline(
        model=model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words)
    )
    question, press = tokens[:, -7:], ours.H2OPress(heavy_hitters=20, recent=10)
    for _ in range(2):  # a prompt begins anew
        cache = DynamicCache()
        given = {"context_ids": tokens[:, :-7], "questions_ids": [question]}
        with torch.no_grad():
            (answer,) = pipeline._forward(given, max_new_tokens=15, press=press, cache=cache)
        with torch.no_grad(), h2o_cache(model, heavy_hitters=20, recent=10) as whole:
            name = cache_keyword(type(model).forward)
            model(tokens[:, :-7], **{name: whole})
            new = model.generate(tokens, max_new_tokens=15, do_sample=False, **{name: whole})[0, 120:]
        assert answer == " ".join(f"w{token}" for token in new)
        assert cache.layers[0].keys.shape[2] == 30
    assert len(set(new.tolist())) > 3


def test_h2o_s_press_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="heavy_hitters, recent: got 0 and 0"):
        ours.H2OPress()
    model, press = random_model("llama"), ours.H2OPress(heavy_hitters=2, recent=2)
    quantised = QuantizedCache.__new__(QuantizedCache)
    hook = {"hidden_states": torch.zeros(1, 4, 64), "past_key_values": quantised}
    with pytest.raises(TypeError, match="cache: got a QuantizedCache"):
        press.forward_hook(model.model.layers[0].self_attn, [], hook, [])


def test_attention_is_captured_though_kvpress_stands_before_every_implementation():
    model, tokens = random_model("llama"), torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), capture_attention(model, layers=[1], queries=[39]) as captured:
        model(tokens)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(tokens, output_attentions=True).attentions[1][:, :, 39:].mean(1)
    assert (captured[1].weights - want).abs().max() < 1e-5
