"""int8 and int4 weights by torchao: the layers that are meant, the values that their weights have, and what is refused."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES
from PIL import Image
from random_models import qwen2_5_vl
from torch import nn
from transformers import AutoConfig
from typer.testing import CliRunner

import hide.models
from hide import PRESETS, HiDe
from hide.cli import app
from hide.engine import stock
from hide.engine.greedy import prefers_static_decode
from hide.models.quantised import INT4_GROUP, WEIGHTS, check, quantise, quantised_layers
from hide.models.vision_slices import in_slices
from hide.profiling.models import Int4Linear, Int8Linear, build, read_config
from hide.session import ImageSession
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene
from hide_kernels.memory import predict, profile, stage

pytest.importorskip("torchao")
pytest.importorskip("accelerate")

from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

QUESTION = "What is the color of the star?"
CPU = torch.device("cpu")


def parts(tensor):
    """The tensors that a weight is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def bytes_of(module):
    return sum(part.nbytes for tensor in (*module.parameters(), *module.buffers()) for part in parts(tensor))


def is_quantised(layer):
    return isinstance(layer, nn.Linear) and len(parts(layer.weight)) > 1


def dequantised(model):
    """A float model with the very weights of a quantised one."""
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if is_quantised(layer):
            identity = torch.eye(layer.in_features, dtype=layer.weight.dtype)
            layer.weight = nn.Parameter(nn.functional.linear(identity, layer.weight).T.contiguous())
    assert not any(is_quantised(layer) for layer in plain.modules())
    return plain


def with_model(adapter, model):
    return type(adapter)(model, adapter.tokenizer, adapter.image_processor)


def preprocessed(adapter, size=(201, 149)):
    """A small picture: the int4 kernel of the CPU is slow."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return adapter.preprocess([Image.fromarray(pixels)], min_tokens=16, max_tokens=40)


@pytest.fixture(scope="module")
def plain():
    return hide.models.load(CHECKPOINT, device="cpu")


@pytest.fixture(scope="module", params=WEIGHTS)
def loaded(request):
    return request.param, hide.models.load(CHECKPOINT, device="cpu", weights=request.param)


# -- which layers, and their values -----------------------------------------------------------------------------------


def test_every_layer_but_the_head_is_quantised_and_takes_the_bytes_of_codes_and_scales(plain, loaded):
    weights, adapter = loaded
    layers = dict(adapter.model.named_modules())
    named = {name for name, layer in layers.items() if is_quantised(layer)}
    # Every linear layer of the embedded model has whole groups.
    assert named == {name for name, layer in layers.items() if type(layer) is nn.Linear} - {"lm_head"}
    assert len(named) == 6 * 7 + 4 * 5 + 2
    saved = 0
    for name in named:
        rows, columns = layers[name].weight.shape
        codes = rows * columns if weights == "int8" else rows * columns // 2
        scales = rows * (4 + 1) if weights == "int8" else rows * columns // INT4_GROUP * 2 * 4
        assert bytes_of(layers[name]) - 4 * rows * (layers[name].bias is not None) == codes + scales, name
        saved += 4 * rows * columns - codes - scales
    assert bytes_of(plain.model) - bytes_of(adapter.model) == saved
    assert adapter.dtype == plain.dtype == torch.float32 and prefers_static_decode(adapter) is False
    assert layers["lm_head"].weight is adapter.language_model.embed_tokens.weight


def test_a_weight_is_the_checkpoints_to_half_a_step_of_its_scale(plain, loaded):
    weights, adapter = loaded
    exact, found = (dict(model.named_parameters()) for model in (plain.model, dequantised(adapter.model)))
    for name in quantised_layers(plain.model, weights):
        want, got = exact[f"{name}.weight"], found[f"{name}.weight"]
        if weights == "int8":
            steps = want.abs().amax(1, keepdim=True) / 127.5
        else:
            groups = want.unflatten(1, (-1, INT4_GROUP))
            steps = ((groups.amax(2) - groups.amin(2)) / 15).repeat_interleave(INT4_GROUP, 1)
        assert ((got - want).abs() <= 0.51 * steps + 1e-6).all(), name
        assert not torch.equal(got, want)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_checkpoint_is_quantised_where_its_layers_are_named(family, weights, tmp_path):
    adapter = FAMILIES[family]()
    for part in (adapter.model, adapter.tokenizer, adapter.image_processor):
        part.save_pretrained(tmp_path)
    found = hide.models.load(tmp_path, device="cpu", weights=weights)
    got = {name for name, layer in found.model.named_modules() if is_quantised(layer)}
    assert got == set(quantised_layers(adapter.model, weights)) != set()
    left = {name for name, layer in adapter.model.named_modules() if isinstance(layer, nn.Linear)} - got
    assert "lm_head" in left and (weights == "int8" or len(left) > 1), "32 and 96 channels are no whole groups"
    # The same as quantised in place, and as computed with the weights that they stand for.
    quantise(adapter.model, weights, CPU)
    pictures = preprocessed(adapter)
    turn = adapter.turn("star, moon.", pictures)
    rows = [
        stock.attention(one, turn, pictures, layers=[1, 3], causal=False)[0]
        for one in (found, adapter, with_model(adapter, dequantised(adapter.model)))
    ]
    assert torch.equal(rows[0], rows[1])
    torch.testing.assert_close(rows[0], rows[2], atol=1e-5, rtol=1e-4)
    ids = adapter.input_ids(QUESTION, pictures)
    with ImageSession(found, pictures) as session:
        reply = session.reply(ids, max_new_tokens=6)
        with session.branch(ids) as branch:
            logits = branch.logits()
    assert reply == stock.generate_ids(found, ids, pictures, max_new_tokens=6)
    with torch.no_grad():
        want = dequantised(found.model)(**stock.forward_inputs(found, ids, pictures)).logits[:, -1]
    assert (logits.flatten() - want.flatten()).abs().max() < 2e-4


# -- what runs on it --------------------------------------------------------------------------------------------------


def test_the_demo_question_has_the_same_answer_and_rows_close_by(plain):
    """The int8 rows differ from the checkpoint's by what the rounded weights do, and by nothing else."""
    eight = hide.models.load(CHECKPOINT, device="cpu", weights="int8")
    scene = draw_scene(3, 420, 300, objects=3).image
    rows = {}
    for name, adapter in (("plain", plain), ("int8", eight), ("rounded", with_model(plain, dequantised(eight.model)))):
        own = HiDe(adapter, PRESETS["tiny"])
        with own.open(scene) as session:
            rows[name] = own.attention_rows(session, "star.")
    plain_rows, int8_rows, rounded = (rows[name].rows[0] for name in ("plain", "int8", "rounded"))
    torch.testing.assert_close(int8_rows, rounded, atol=1e-6, rtol=1e-4)
    assert 1e-6 < (int8_rows - plain_rows).abs().max() < 0.05 * plain_rows.max()
    demo = hide.models.__path__[0] + "/../examples/scene.jpg"
    said = HiDe.from_pretrained(CHECKPOINT, preset="tiny", weights="int8", device="cpu", max_tokens=500).ask(
        demo, "Is the circle on the left or right side of the triangle?"
    )
    assert said.text == "right" and len(said.boxes[0])


def test_a_step_of_fixed_shapes_decodes_what_generate_does(loaded):
    _, adapter = loaded
    pictures = preprocessed(adapter)
    ids = adapter.input_ids(QUESTION, pictures)
    with ImageSession(adapter, pictures) as session:
        assert session.reply(ids, max_new_tokens=5, static=True) == stock.generate_ids(
            adapter, ids, pictures, max_new_tokens=5
        )


@torch.no_grad()
def test_the_vision_encoder_in_slices_gives_the_whole_ones_features(loaded):
    _, adapter = loaded
    visual = adapter.model.model.visual
    pixels = torch.randn(8 * 14, 1176, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 8, 14]])
    want = adapter.model.model.get_image_features(pixels, grid)
    with in_slices(visual, 40):
        got = adapter.model.model.get_image_features(pixels, grid)
    for mine, theirs in zip(*(getattr(found, "pooler_output", found) for found in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_while_loading_the_full_weights_are_never_there(tmp_path):
    config = qwen2_5_vl().config
    config.text_config.num_hidden_layers, config.text_config.intermediate_size = 24, 512
    config.text_config.layer_types = ["full_attention"] * 24
    adapter = FAMILIES["qwen2_5_vl"]()
    config.image_token_id = adapter.image_token
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for part in (model, adapter.tokenizer, adapter.image_processor):
        part.save_pretrained(tmp_path)
    full = bytes_of(model)
    del model
    with profile(device="cpu") as recording:
        found = hide.models.load(tmp_path, device="cpu", weights="int8")
    assert bytes_of(found.model) < 0.4 * full
    # The layer at hand is there in float32 and in what its scales are made of.
    assert bytes_of(found.model) < recording.report.peak < 0.6 * full


def test_int8_takes_the_bytes_that_are_predicted():
    with predict(rounding=1) as recording:
        guess = build(read_config(str(CHECKPOINT)), torch.float32, "int8")
        predicted = recording.report.live
        del guess
    adapter = hide.models.load(CHECKPOINT, device="cpu", weights="int8")
    assert bytes_of(adapter.model) == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize("columns, rows", [(64, 16), (3584, 512), (1280, 3840), (5120, 48)])
def test_a_gpus_int4_layer_has_the_bytes_that_are_predicted(columns, rows, monkeypatch):
    """torchao packs on any device that only says it is a GPU; the kernel's own memory is what its operators return."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    form = Int4WeightOnlyConfig(
        group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    found = []
    for ours in (False, True):
        with predict(rounding=1) as recording:
            layer = nn.Linear(columns, rows).bfloat16()
            if ours:
                layer = Int4Linear(layer)
            else:
                quantize_(layer, form)
            x = torch.zeros(2, 7, columns, dtype=torch.bfloat16)
            held = recording.report.live
            with torch.no_grad(), stage("product"):
                layer(x)
        (product,) = (one for one in recording.report.stages if one.name == "product")
        found.append((bytes_of(layer), product.peak - held))
    assert found[0] == found[1]
    assert found[0][1] > 2 * 7 * rows * 2


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_profile_measures_int8_weights_beside_the_prediction():
    done = run(
        "profile", "--model", str(CHECKPOINT), "--tokens", "400", "--collage", "64", "--dtype", "float32", "--flow",
        "ours", "--weights", "int8", "--attention", "sdpa", "--measure", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    predicted, measured = json.loads(done.stdout)["flows"]
    assert measured["peak"] == pytest.approx(predicted["peak"], rel=0.01)


def test_a_result_and_its_page_say_what_weights_they_are_of(tmp_path):
    picture = tmp_path / "scene.png"
    draw_scene(0, 300, 200, objects=3).image.save(picture)
    for weights in ("int8", None):
        folder = tmp_path / str(weights)
        done = run("ask", str(picture), QUESTION, "--report", str(folder), *(("--weights", weights) if weights else ()))
        assert done.exit_code == 0, done.output
        assert json.loads((folder / "result.json").read_text())["weights"] == weights
        assert ("int8 weights" in (folder / "report.html").read_text()) == (weights is not None)


def test_a_command_takes_weights_and_a_result_file_keeps_them_apart(small_scenes, tmp_path):
    asked = ("eval", "--limit", "1", "--out", str(tmp_path))
    done = run(*asked, "--weights", "int8")
    assert done.exit_code == 0, done.output
    done = run(*asked)
    assert done.exit_code == 1 and "weights" in done.output and "other settings" in " ".join(done.output.split())


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_not_served_is_named_with_what_to_do(monkeypatch):
    def refused(text, weights="int8", dtype="float32", device="cpu"):
        with pytest.raises(ValueError, match=text):
            check(weights, getattr(torch, dtype), torch.device(device))

    refused("weights: got 'nf4', want one of int8, int4", "nf4")
    refused("dtype: got float16, which int8 weights do not take", dtype="float16")
    refused("no int4 kernel for mps; want cuda or cpu, or int8", "int4", device="mps")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    refused("8.0 .Ampere., Tesla T4 has less; want int8", "int4", "bfloat16", "cuda")
    check("int8", torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    refused("dtype: got float32, but on a GPU int4 weights take bfloat16", "int4", device="cuda")
    check("int4", torch.bfloat16, torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchao.prototype.quantization.int4", None)
        refused("this torchao has no int4 for cpu", "int4")
    for package in ("torchao", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            refused(rf"int8 needs {package}, not installed here; pip install 'hide-kernels\[quant\]'")


def test_a_checkpoint_that_is_quantised_already_is_refused(tmp_path):
    config = AutoConfig.from_pretrained(CHECKPOINT)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantised already \(bitsandbytes\); leave weights out"):
        hide.models.load(tmp_path, device="cpu", weights="int8")


def test_float16_would_overflow_where_it_is_refused():
    """Why it is: codes are multiplied first and scaled then, and activations of a thousand are common in these models."""
    layer = nn.Linear(4096, 16, bias=False).half()
    nn.init.constant_(layer.weight, 1e-3)
    x = torch.full((1, 4096), 100.0, dtype=torch.float16)
    assert layer(x).isfinite().all()
    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    assert not layer(x).isfinite().any()


def test_settings_that_are_everybodys_stay_as_they_are():
    import torch._inductor.config as compiler

    before = (compiler.coordinate_descent_tuning, compiler.force_fuse_int_mm_with_mul)
    precision = torch.get_float32_matmul_precision()
    for weights in WEIGHTS:
        hide.models.load(CHECKPOINT, device="cpu", weights=weights)
    assert (compiler.coordinate_descent_tuning, compiler.force_fuse_int_mm_with_mul) == before == (False, False)
    assert torch.get_float32_matmul_precision() == precision


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
def test_on_a_gpu_layers_have_the_predicted_bytes_and_a_graph_replays_generates_reply(weights):
    full = hide.models.load(CHECKPOINT, device="cpu", dtype="bfloat16")
    expected = nn.Linear(384, 128, dtype=torch.bfloat16)
    expected = {"int8": Int8Linear, "int4": Int4Linear}[weights](expected)
    adapter = hide.models.load(CHECKPOINT, device="cuda", weights=weights)
    named = {name for name, layer in adapter.model.named_modules() if is_quantised(layer)}
    assert named == set(quantised_layers(full.model, weights)) and adapter.dtype is torch.bfloat16
    assert bytes_of(adapter.model.model.visual.blocks[0].mlp.down_proj) == bytes_of(expected)
    assert prefers_static_decode(adapter)
    pictures = preprocessed(adapter)
    ids = adapter.input_ids(QUESTION, pictures)
    with ImageSession(adapter, pictures) as session:
        replies = [session.reply(ids, max_new_tokens=6, static=static) for static in (True, False)]
    assert replies[0] == replies[1]
    turn = adapter.turn("star.", pictures)
    rows, exact = (stock.attention(one, turn, pictures, layers=[0], causal=False)[0].cpu() for one in (adapter, full))
    assert (rows - exact).abs().max() < (0.05 if weights == "int8" else 0.15) * exact.max()
