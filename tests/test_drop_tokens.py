"""Weights during the forward, and tokens that are dropped behind a layer: against eager models that hide them by masks."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
import transformers
from random_models import IMAGE, internvl, llava, llm, prompt, qwen2_5_vl, qwen3_vl
from test_capture import eager_rows, text_inputs

from hide_kernels.integrations.dropping import drop_tokens
from hide_kernels.integrations.transformers import capture_attention

MODELS = {"qwen2_5_vl": qwen2_5_vl, "internvl": internvl, "llava": llava}
NEW = 6


def fastv(model, inputs, layer, count):
    """Greedy logits (NEW, vocabulary) of one sample, and the prompt's tokens that layers behind `layer` had."""
    image = torch.nonzero(inputs["input_ids"][0] == IMAGE).flatten()
    span, tokens, kept = (int(image[0]), int(image[-1]) + 1), inputs["input_ids"].shape[1], []

    def choose(layer, captured):
        best = captured[layer].weights[0, 0].topk(count).indices + span[0]
        kept[:] = sorted({*range(tokens)} - {*image.tolist()} | {*best.tolist()})

    with (
        torch.no_grad(),
        capture_attention(model, layers=[layer], queries=[tokens - 1], key_spans=[span], on_layer=choose),
        drop_tokens(model, behind=layer, keep=lambda: kept),
    ):
        out = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
    return torch.cat(out.logits), kept


def masked(model, inputs, behind):
    """As `fastv`, of an eager model that runs all tokens, where {layer: tokens that it drops} are hidden behind it."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    ids, logits = inputs["input_ids"], []

    def hide(dropped):
        def hook(_, args, kwargs):
            mask = kwargs["attention_mask"].clone()
            mask[..., dropped] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            return args, kwargs | {"attention_mask": mask}

        return hook

    with torch.no_grad(), ExitStack() as hooks:
        for layer, dropped in behind.items():
            for later in model.get_decoder().layers[layer + 1 :]:
                hooks.callback(later.register_forward_pre_hook(hide(dropped), with_kwargs=True).remove)
        for _ in range(NEW):
            more = {"input_ids": ids}
            if "mm_token_type_ids" in inputs:
                more["mm_token_type_ids"] = (ids == IMAGE).int()
            logits.append(model(**inputs | more).logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return torch.cat(logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
def test_fastv_s_greedy_tokens_are_those_of_a_model_in_which_what_it_drops_is_masked(family, implementation):
    model, inputs = MODELS[family](), prompt(family)
    ids = inputs["input_ids"][0]
    image = torch.nonzero(ids == IMAGE).flatten()
    # FastV's code: the head mean of layer 1's attention, its last row, of the image's tokens the largest.
    last = eager_rows(model, inputs, 1)[0].mean(0)[-1]
    dropped = image[last[image].argsort(descending=True)[4:]]
    want = masked(model, inputs, {1: dropped})
    model.set_attn_implementation(implementation)
    got, kept = fastv(model, inputs, 1, 4)
    assert kept == [n for n in range(len(ids)) if n not in dropped]
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    whole = masked(model, inputs, {})
    assert (want - whole).abs().max() > 1e-2, "dropping must matter, or a test of it shows nothing"


def test_blocks_nest_and_count_what_is_left():
    model, inputs = llava(), prompt("llava")
    want = masked(model, inputs, {0: [7, 8, 9], 2: [10, 12]})
    tokens = inputs["input_ids"].shape[1]
    left = [n for n in range(tokens) if n not in (7, 8, 9)]
    fewer = [place for place, n in enumerate(left) if n not in (10, 12)]
    with (
        torch.no_grad(),
        drop_tokens(model, behind=0, keep=lambda: left),
        drop_tokens(model, behind=2, keep=lambda: torch.tensor(fewer)),
        capture_attention(model, layers=[0, 1, 3], queries=[3], received="sum") as captured,
    ):
        got = model(**inputs).logits[:, -1]
    torch.testing.assert_close(got, want[:1], atol=1e-4, rtol=1e-4)
    assert [captured.received[layer].shape[-1] for layer in (0, 1, 3)] == [tokens, tokens - 3, tokens - 5]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_batches_with_padding_drop_the_same_tokens_also_of_the_padding(implementation):
    model, ids = llm(), text_inputs()
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    kept = [n for n in range(ids.shape[1]) if n not in (2, 3, 4, 5, 12, 15)]
    greedy = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    greedy |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        with drop_tokens(model, behind=-3, keep=lambda: kept):
            got = model.generate(input_ids=ids, attention_mask=mask, **greedy)
        for sample, start in enumerate((9, 0)):
            own = [n - start for n in kept if n >= start]
            with drop_tokens(model, behind=1, keep=lambda own=own: own):
                want = model.generate(input_ids=ids[sample, start:][None], **greedy)
            for one, alone in zip(got.logits, want.logits, strict=True):
                torch.testing.assert_close(one[sample], alone[0], atol=1e-4, rtol=1e-4)


def test_other_threads_run_whole_prompts_and_nothing_stays():
    model, inputs = llava(), prompt("llava")
    with torch.no_grad():
        whole = model(**inputs).logits
    with drop_tokens(model, behind=0, keep=lambda: [0, 30]), ThreadPoolExecutor(1) as pool:

        def run():
            with torch.no_grad():
                return model(**inputs).logits

        assert torch.equal(pool.submit(run).result(), whole)
        assert run().shape[1] == 2
    assert torch.equal(run(), whole)


@pytest.mark.parametrize("behind", [3, -1, 4, -5])
def test_a_layer_that_none_comes_behind_is_refused(behind):
    with (
        pytest.raises(ValueError, match=f"behind: got {behind}, want 0 to 2"),
        drop_tokens(llm(), behind=behind, keep=list),
    ):
        pass


def test_tokens_stay_where_features_of_the_image_are_added_to_all():
    with pytest.raises(ValueError, match="behind: got 0, want 1 or more"), drop_tokens(qwen3_vl(), behind=0, keep=list):
        pass
    model, inputs = qwen3_vl(), prompt("qwen3_vl")
    kept = [n for n in range(inputs["input_ids"].shape[1]) if n not in (7, 8)]
    with torch.no_grad(), drop_tokens(model, behind=1, keep=lambda: kept):
        got = model(**inputs).logits[:, -1]
    torch.testing.assert_close(got, masked(model, inputs, {1: [7, 8]})[:1], atol=1e-4, rtol=1e-4)


def test_models_without_layers_and_without_rotary_embeddings_are_named():
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=32))
    with (
        pytest.raises(ValueError, match="gives its layers no position_embeddings"),
        drop_tokens(model, behind=0, keep=lambda: [0]),
    ):
        model(input_ids=torch.tensor([[8, 9]]))
    with pytest.raises(ValueError, match="model: got BloomModel, want a decoder with layers"):
        drop_tokens(transformers.BloomModel(transformers.BloomConfig(**sizes)), behind=0, keep=list).__enter__()


def test_a_layer_is_told_of_as_soon_as_it_is_recorded_and_only_then():
    model, ids, seen = qwen2_5_vl(), text_inputs(), []

    def on_layer(layer, captured):
        seen.append((layer, sorted(captured), captured[layer].weights.clone()))

    settings = {"layers": [2, 0], "queries": [20, 25]}
    with torch.no_grad(), capture_attention(model, on_layer=on_layer, **settings) as captured:
        model(input_ids=ids[:, :15])
        assert seen == []
        model(input_ids=ids)
    assert [(layer, there) for layer, there, _ in seen] == [(0, [0]), (2, [0, 2])]
    assert all(torch.equal(weights, captured[layer].weights) for layer, _, weights in seen)


def test_in_generate_it_is_called_for_every_new_token_and_what_it_raises_ends_the_forward():
    model, ids, rows = qwen2_5_vl(), text_inputs(), []

    def on_layer(layer, captured):
        rows.append(captured[layer].weights.shape[1])
        if len(rows) == 4:
            raise StopIteration("enough")

    with (
        torch.no_grad(),
        pytest.raises(StopIteration, match="enough"),
        capture_attention(model, layers=[1], queries="generated", on_layer=on_layer),
    ):
        model.generate(input_ids=ids, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert rows == [1, 2, 3, 4]
