"""What patches receive in vision encoders that run, against the columns of eager attention's matrices."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
import transformers
from random_models import V5, internvl, llava, llm, prompt, qwen2_5_vl, qwen3_vl, randomise
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hide_kernels.integrations.transformers import capture_attention
from hide_kernels.integrations.vision import capture_vision_attention, vision_attention
from hide_kernels.memory import profile
from hide_kernels.recipes import best_tokens

TOLERANCE = 1e-5
# Frames, rows and columns of patches: whole windows and cut-off ones, and a video's frames.
GRIDS = torch.tensor([[1, 6, 10], [1, 12, 8], [2, 4, 4]])
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
         "image_size": 56, "patch_size": 14}  # fmt: skip


def pictures(count=3):
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def patches(size):
    return torch.randn(int(GRIDS.prod(-1).sum()), 3 * 2 * size**2, generator=torch.Generator().manual_seed(0))


def clip():
    config = transformers.CLIPVisionConfig(**SIZES)
    return randomise(transformers.CLIPVisionModel(config)), lambda model: model(pixel_values=pictures())


def siglip():
    config = transformers.SiglipVisionConfig(**SIZES)
    return randomise(transformers.SiglipVisionModel(config)), lambda model: model(pixel_values=pictures())


def of_pictures(layer):
    chosen = {"vision_feature_layer": layer, "vision_feature_select_strategy": "default"}
    return lambda model: model.model.get_image_features(pixel_values=pictures(), **chosen)


def of_llava():
    return llava(), of_pictures(-2)


def of_internvl():
    return internvl(), of_pictures(-1)


def of_qwen2_5_vl():
    return qwen2_5_vl(), lambda model: model.model.get_image_features(patches(14), GRIDS)


def of_qwen3_vl():
    return qwen3_vl(), lambda model: model.model.get_image_features(patches(16), GRIDS)


PACKED = {"qwen2_5_vl": of_qwen2_5_vl, "qwen3_vl": of_qwen3_vl}
ENCODERS = {"clip": clip, "siglip": siglip, "llava": of_llava, "internvl": of_internvl, **PACKED}


def set_attention(model, name):
    model.config._attn_implementation_internal = name
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = name


def matrices(model, run, monkeypatch):
    """{layer: (images, H, N, N)} of eager attention, of packed images one matrix with blocks, patches in their order."""
    tower, modules = vision_attention(model)
    found = {layer: [] for layer in modules}
    files = {sys.modules[type(module).__module__] for module in modules.values()}
    with monkeypatch.context() as patched:
        for file in files:
            own = file.eager_attention_forward

            def watched(module, *args, own=own, **kwargs):
                output, weights = own(module, *args, **kwargs | {"output_attentions": True})
                for layer, one in modules.items():
                    if one is module:
                        found[layer].append(weights)
                return output, weights

            patched.setattr(file, "eager_attention_forward", watched)
        set_attention(model, "eager")
        with torch.no_grad():
            run(model)
    if not hasattr(tower, "spatial_merge_size"):
        return {layer: one for layer, (one,) in found.items()}
    places = torch.arange(int(GRIDS.prod(-1).sum()))
    if hasattr(tower, "fullatt_block_indexes"):
        if hasattr(tower, "get_window_index"):
            index = torch.as_tensor(tower.get_window_index(GRIDS)[0])
        else:
            from transformers.vision_utils import get_vision_window_index

            index = get_vision_window_index(GRIDS, 2, tower.window_size, tower.patch_size)[0]
        places = places.view(-1, 4)[index].flatten()
    whole = {}
    for layer, parts in found.items():
        heads = [torch.block_diag(*(part[0, head] for part in parts)) for head in range(parts[0].shape[1])]
        whole[layer] = torch.empty(1, len(heads), len(places), len(places))
        whole[layer][:, :, places[:, None], places] = torch.stack(heads)[None]
    return whole


def columns(matrix, reduction):
    """Of (images, H, N, N), what each patch receives from the queries that see it."""
    seen = (matrix > 0).sum(2)
    found = {"sum": matrix.sum(2), "mean": matrix.sum(2) / seen, "max": matrix.amax(2)}
    return found[reduction]


def features(found):
    found = getattr(found, "pooler_output", found)
    while not isinstance(found, torch.Tensor):
        found = torch.cat(list(found)) if isinstance(found[0], torch.Tensor) else found[0]
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ENCODERS)
def test_every_layer_s_patches_receive_the_columns_of_eager_and_bits_are_kept(family, implementation, monkeypatch):
    model, run = ENCODERS[family]()
    want = matrices(model, run, monkeypatch)
    set_attention(model, implementation)
    with torch.no_grad():
        plain = features(run(model))
        with (
            capture_vision_attention(model, layers=list(want)) as means,
            capture_vision_attention(model, layers=list(want), received="sum", head_reduction="none") as sums,
            capture_vision_attention(model, layers=list(want), received="max") as maxima,
        ):
            beside = features(run(model))
    assert torch.equal(beside, plain)
    assert set(means.received) == set(sums.received) == set(maxima.received) == set(want)
    for layer, matrix in want.items():
        mean = columns(matrix, "mean").mean(1)
        assert mean.std() > 1e-3, "uniform attention would hide errors"
        assert (means.received[layer] - mean).abs().max() < TOLERANCE
        assert (sums.received[layer] - columns(matrix, "sum")).abs().max() < TOLERANCE
        assert (maxima.received[layer] - columns(matrix, "max").mean(1)).abs().max() < TOLERANCE


def test_windows_are_those_of_the_layers_that_have_them(monkeypatch):
    model, run = of_qwen2_5_vl()
    windows, full = matrices(model, run, monkeypatch).values()
    assert int((windows > 0).sum(-1).max()) == 16 and int((full > 0).sum(-1).max()) == 96


@pytest.mark.parametrize("family", [name for name in ENCODERS if name not in PACKED])
def test_rows_of_chosen_queries_are_those_of_eager(family, monkeypatch):
    model, run = ENCODERS[family]()
    want = matrices(model, run, monkeypatch)[1]
    set_attention(model, "sdpa")
    with torch.no_grad(), capture_vision_attention(model, layers=[1], queries=[0, 5], received=None) as captured:
        run(model)
    assert captured.received == {}
    assert (captured[1].weights - want[:, :, [0, 5]].mean(1)).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ENCODERS)
def test_flash_attention_runs_with_its_own_config_and_with_all_images_at_once(family, monkeypatch):
    model, run = ENCODERS[family]()
    want = matrices(model, run, monkeypatch)
    seen = []

    def flash(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
        seen.append((module.config._attn_implementation, query.shape[2]))
        lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
        parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
        outputs = [ALL_ATTENTION_FUNCTIONS["sdpa"](module, *part, attention_mask, **kwargs)[0] for part in parts]
        return torch.cat(outputs, 1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    set_attention(model, "flash_attention_2")
    with torch.no_grad(), capture_vision_attention(model, layers=[0]) as captured:
        run(model)
    assert (captured.received[0] - columns(want[0], "mean").mean(1)).abs().max() < TOLERANCE
    if V5:
        assert seen == [("flash_attention_2", want[0].shape[-1])] * len(want)


def test_inside_generate_nested_with_rows_of_the_decoder():
    model, inputs = llava(), prompt("llava")
    with (
        torch.no_grad(),
        capture_vision_attention(model, layers=[-2], queries=[0]) as seen,
        capture_attention(model, layers=[1], queries="generated") as said,
    ):
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert seen[1].weights.shape == (1, 1, 17) and seen.received[1].shape == (1, 17)
    assert said[1].weights.shape[:2] == (1, 3)


def test_memory_is_not_that_of_a_matrix():
    model, grid = qwen2_5_vl(), torch.tensor([[1, 48, 48]])
    pixels, matrix = torch.randn(48 * 48, 3 * 2 * 14**2), 2 * (48 * 48) ** 2 * 4
    peaks = []
    for layers in ([], [1]):
        with torch.no_grad(), profile(model) as measured, ExitStack() as captures:
            if layers:
                captures.enter_context(capture_vision_attention(model, layers=layers))
            model.model.get_image_features(pixels, grid)
        peaks.append(measured.report.peak)
    assert 0 < peaks[1] - peaks[0] < matrix / 10, peaks


def test_captured_scores_rank_as_fastervlm_ranks_output_attentions(monkeypatch):
    model, run = clip()
    want = matrices(model, run, monkeypatch)[1][:, :, 0, 1:].mean(1).topk(5).indices.sort(1).values
    set_attention(model, "sdpa")
    with torch.no_grad(), capture_vision_attention(model, layers=[-2], queries=[0], received=None) as captured:
        run(model)
    assert torch.equal(best_tokens(captured[1].weights[:, 0, 1:], 5), want)


def test_a_later_forward_replaces_also_after_one_that_failed():
    model, run = of_qwen3_vl()
    modules = vision_attention(model)[1]
    with torch.no_grad(), capture_vision_attention(model, layers=[1]) as captured:
        run(model)
        want = captured.received[1]
        hook = modules[1].proj.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model)
        hook.remove()
        model.model.get_image_features(patches(16)[:48], torch.tensor([[1, 6, 8]]))
        assert captured.received[1].shape == (1, 48)
        run(model)
    assert torch.equal(captured.received[1], want)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.config is modules[0].config for module in modules.values())


def test_forwards_of_other_threads_are_not_recorded():
    model, run = of_qwen2_5_vl()
    with (
        pytest.raises(ValueError, match="layer 0: no forward inside the block.*a forward of another thread"),
        capture_vision_attention(model, layers=[0]) as captured,
        ThreadPoolExecutor(1) as pool,
    ):
        with torch.no_grad():
            pool.submit(run, model).result()
        assert captured.received == {}


@pytest.mark.parametrize(
    "make, arguments, text",
    [
        (clip, {"layers": [3]}, r"layers: got 3, want 0 to 2 \(CLIPVision"),
        (clip, {"layers": []}, "layers: got none"),
        (clip, {"layers": [0], "received": None}, r"queries: got \[\], want strictly increasing positions"),
        (clip, {"layers": [0], "received": "min"}, "received: got 'min'"),
        (clip, {"layers": [0], "queries": [17]}, r"layer 0: no forward inside the block computed queries \[17\]"),
        (of_qwen3_vl, {"layers": [0], "queries": [0]}, "queries: got .0., want none: the encoder of Qwen3VLFor"),
        (lambda: (llm(), None), {"layers": [0]}, "model: no vision encoder of LlamaForCausalLM"),
    ],
)
def test_wrong_requests_are_named(make, arguments, text):
    model, run = make()
    with torch.no_grad(), pytest.raises(ValueError, match=text), capture_vision_attention(model, **arguments):
        run(model)


def test_a_mask_that_hides_patches_is_refused():
    model = randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)))
    modules = vision_attention(model)[1]
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., 4] = torch.finfo(torch.float32).min
    with pytest.raises(ValueError, match="hides patches"), capture_vision_attention(model, layers=[0]):
        modules[0](torch.randn(1, 5, 32), attention_mask=mask)


def test_the_encoder_is_found_in_the_model_and_by_itself():
    model = qwen2_5_vl()
    (within, layers), (alone, same) = vision_attention(model), vision_attention(model.model.visual)
    assert within is alone is model.model.visual and layers == same and list(layers) == [0, 1]


def test_two_encoders_are_refused():
    model = qwen2_5_vl()
    model.more = copy.deepcopy(model.model.visual)
    with pytest.raises(ValueError, match="two vision encoders, model.visual.blocks and more.blocks; pass one"):
        vision_attention(model)
