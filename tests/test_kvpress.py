"""Other people's cache eviction with our scores: kvpress's SnapKV press keeps the same tokens."""

import pytest
import torch
import transformers

kvpress = pytest.importorskip("kvpress", reason="the peers extra")
pytestmark = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 3), reason="kvpress wants transformers below 5.3"
)

from kvpress.utils import get_prerope_query_states  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

from hide.engine.kv_cache import cache_keyword  # noqa: E402
from hide_kernels.recipes import window_scores  # noqa: E402


class OurScores(kvpress.SnapKVPress):
    """SnapKV's press with `window_scores` in place of its own attention."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        cos, sin = (x[:, -self.window_size :] for x in kwargs["position_embeddings"])
        query = get_prerope_query_states(module, hidden_states[:, -self.window_size :])
        query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        scores = window_scores(query, keys, kernel_size=self.kernel_size)
        return torch.nn.functional.pad(scores, (0, self.window_size), value=torch.inf)


def kept(model, press, tokens):
    """The keys of every layer, those of a head in the order of their first number."""
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(tokens, **{cache_keyword(type(model).forward): cache})
    return [layer.keys.gather(2, layer.keys[..., :1].argsort(2).expand_as(layer.keys)) for layer in cache.layers]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kernel_size", [5, 7])
def test_snapkv_keeps_the_same_tokens_with_our_scores(family, kernel_size):
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[family]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = model(config(vocab_size=64, num_hidden_layers=3, head_dim=16, initializer_range=0.3, **sizes)).eval()
    tokens = torch.randint(64, (2, 301))
    presses = [press(0.6, window_size=9, kernel_size=kernel_size) for press in (kvpress.SnapKVPress, OurScores)]
    theirs, ours = (kept(model, press, tokens) for press in presses)
    assert ours[0].shape == (2, 2, 120, 16)
    for one, other in zip(theirs, ours, strict=True):
        assert torch.equal(one, other)
