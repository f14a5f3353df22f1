"""`hide profile` and its flows: the configurations' sizes, the paper's figures, what fits, and a baseline of peaks."""

import contextlib
import csv
import dataclasses
import functools
import json
import math
import re
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import memory
from hide.cli import app
from hide.models import FAMILIES, load, qwen2_5_vl
from hide.models.vision_slices import PATCHES
from hide.presets import RunSettings
from hide.profiling import runs
from hide.profiling.flows import FLOWS, flows_of, owner_group
from hide.profiling.models import (
    WEIGHTS,
    Int4Linear,
    Int8Linear,
    build,
    configurations,
    fused_attention,
    parameter_count,
    read_config,
    storages,
)
from hide.profiling.runs import (
    FlowRun,
    Settings,
    fits,
    largest_within,
    measure_flow,
    parse_bytes,
    parse_pixels,
    predict_flow,
)
from hide.profiling.workload import Workload, scene
from hide.tiny import CHECKPOINT
from hide_kernels.memory import Sample, predict, stage

TINY = str(CHECKPOINT)
SMALL = Workload(400, collage=64, text=9, chunk=150)
# Parameters of the checkpoints as they are published.
PUBLISHED = {
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "InternVL3-2B-hf": 2.09e9,
    "InternVL3-8B-hf": 7.94e9,
    "InternVL3-14B-hf": 15.1e9,
    "llava-onevision-qwen2-7b-ov-hf": 8.03e9,
}


def run(*arguments):
    return CliRunner().invoke(app, ["profile", *arguments])


def seven(layers=28, blocks=32):
    """The 7B's configuration with so many decoder layers and blocks of the vision encoder, the last of which is full."""
    config = read_config(memory.MODEL)
    config.text_config.num_hidden_layers, config.text_config.layer_types = layers, ["full_attention"] * layers
    config.vision_config.depth = blocks
    if blocks < 32:
        config.vision_config.fullatt_block_indexes = [blocks - 1]
    return config


def tiny_config(layers=2):
    """The embedded model's configuration with fewer layers: a window, a full one, and what every layer allocates."""
    config = read_config(TINY)
    config.text_config.num_hidden_layers, config.text_config.layer_types = layers, ["full_attention"] * layers
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 2, [1]
    return config


@functools.cache
def weights_of_the_7b():
    with predict() as recording:
        adapter = build(seven(), torch.bfloat16, "bf16")
        assert adapter.dtype == torch.bfloat16
        return recording.report.live


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_packaged_configuration_has_the_checkpoints_parameters(name):
    assert set(configurations()) == set(PUBLISHED)
    config = transformers.AutoConfig.from_pretrained(configurations()[name])
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    exact = isinstance(PUBLISHED[name], int)
    assert count == PUBLISHED[name] if exact else count == pytest.approx(PUBLISHED[name], rel=2e-3)


def test_the_7b_in_bfloat16_is_the_published_16_58_gb():
    assert parameter_count(seven()) == 8_292_166_656
    assert weights_of_the_7b() == pytest.approx(16.584e9, rel=1e-4)


# -- the claim --------------------------------------------------------------------------------------------------------


CLAIMED = [flow for flow in flows_of("all") if flow != "eager, all layers kept"]


def build_with_a_stage(*arguments):
    """A flow's search and answer have their peaks in the vision encoder or in the decoder, which grows with its depth."""
    adapter = build(*arguments)
    running = contextlib.ExitStack()
    adapter.language_model.register_forward_pre_hook(lambda *_: running.enter_context(stage("decoder")) and None)
    adapter.language_model.register_forward_hook(lambda *_: running.close())
    return adapter


@functools.cache
def shallow(flow, tokens, layers):
    """With larger slices of a large picture in the vision encoder, so fewer operators: more memory, but not at a peak
    that is elsewhere. Up to 4,096 tokens the slices are as they are."""
    larger = functools.partial(qwen2_5_vl.in_slices, patches=max(PATCHES, tokens))
    with (
        mock.patch.object(qwen2_5_vl, "in_slices", larger),
        mock.patch.object(runs, "build", build_with_a_stage),
    ):
        return predict_flow(seven(layers, 2), flow, Workload(tokens))


def at_depth(layers, pair, weights):
    """The run of so many layers from those of two and three: beside the weights, each stage grows by the same a layer."""
    two, three = ({one.name: one for one in run.report.stages} for run in pair)

    def grown(small, large):
        return small + (layers - 2) * (large - small)

    peaks = {name: grown(*(at[name].peak - at["weights"].live for at in (two, three))) for name in two}
    highest = max(peaks, key=peaks.get)
    kinds = [
        {dataclasses.replace(owner, bytes=0, count=0): (owner.bytes, owner.count) for owner in at[highest].owners}
        for at in (two, three)
    ]
    owners = [
        dataclasses.replace(kind, bytes=size, count=count)
        for kind in kinds[1]
        if kind.group != "weights"
        for size, count in [map(grown, kinds[0].get(kind, (0, 0)), kinds[1][kind])]
    ]
    groups = Counter(weights=weights)
    for owner in owners:
        groups[owner.group] += owner.bytes
    report = dataclasses.replace(
        pair[0].report,
        peak=weights + peaks[highest],
        peak_stage=highest,
        owners=tuple(sorted(owners, key=lambda owner: -owner.bytes)),
        timeline=(Sample(0, weights + peaks[highest], highest, groups),),
    )
    return dataclasses.replace(pair[0], report=report)


@functools.cache
def predicted(flow, tokens):
    """Of the whole 7B, from predictions of two and three of its layers: a tenth of the operators, and the same bytes."""
    found = at_depth(28, [shallow(flow, tokens, layers) for layers in (2, 3)], weights_of_the_7b())
    assert found.report.peak_stage != "encode"
    return found


@pytest.mark.parametrize("flow", CLAIMED)
def test_a_prediction_from_two_depths_is_that_of_the_depth_itself(flow):
    two, three, four = (shallow(flow, 4096, layers) for layers in (2, 3, 4))
    found = at_depth(4, [two, three], four.groups["weights"])
    assert found.report.peak == four.report.peak
    large = [{owner for owner in run.owners if owner.bytes > 10**6} for run in (found, four)]
    assert large[0] == large[1] != set()


@pytest.mark.parametrize("flow", CLAIMED)
def test_no_peak_has_risen_above_the_baseline(flow, benchmark):
    stored = json.loads(memory.BASELINE.read_text(encoding="utf-8"))
    if stored["versions"] != memory.versions():
        pytest.skip(f"the baseline is of {stored['versions']}, this is {memory.versions()}")
    found = benchmark.pedantic(predicted, (flow, stored["tokens"]), rounds=1)
    benchmark.extra_info.update(peak_bytes=found.report.peak, stage=found.report.peak_stage, tokens=found.tokens)
    message = memory.risen(stored["flows"][flow], memory.summary(found))
    assert message is None, f"{flow}: {message}; if it must be, python -m benchmarks.memory --baseline"


def test_96_gb_is_one_eager_layer_and_20_gb_is_fused_attention_with_one_tokens_logits():
    peak = {flow: predicted(flow, 16384).report.peak / 1e9 for flow in CLAIMED}
    assert peak["eager, one layer alive"] == pytest.approx(94.9, rel=0.01)
    assert peak["published"] == pytest.approx(22.8, rel=0.02)
    assert peak["published, last logits"] == pytest.approx(20.6, rel=0.02)
    assert peak["ours"] <= 18.0
    eager = predicted("eager, one layer alive", 16384)
    rows = 15 + 16384 + 1 + 30
    assert [(owner.shape, owner.dtype) for owner in eager.owners[:3]] == [
        ((1, 28, rows, rows), dtype) for dtype in ("float32", "float32", "bfloat16")
    ]
    assert predicted("published", 16384).owners[0].shape == (rows, 152064)


def test_eager_grows_with_the_square_of_the_tokens_and_the_others_in_proportion():
    def exponent(flow):
        return memory.exponent(predicted(flow, 4096), predicted(flow, 16384))

    assert 1.85 <= exponent("eager, one layer alive") <= 2.0
    for flow in ("published", "published, last logits", "ours"):
        assert exponent(flow) <= 1.05


def test_the_page_has_the_figures_of_fresh_predictions():
    page = memory.PAGE.read_text(encoding="utf-8")
    stated = re.search(r"torch ([\d.]+) and transformers ([\d.]+):", page)
    if stated is None or (stated[1], stated[2]) != tuple(memory.versions().values()):
        pytest.skip(f"docs/memory.md is of other versions than {memory.versions()}")
    header, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.partition("### Peak in GB")[2].partition("###")[0].splitlines()
        if line.startswith("|") and "---" not in line
    ]
    for row in rows:
        for tokens in (4096, 16384):
            if row[0] in CLAIMED:
                fresh = predicted(row[0], tokens).report.peak / 1e9
                assert float(row[header.index(f"{tokens:,}")]) == pytest.approx(fresh, rel=0.01), (
                    f"{row[0]} at {tokens}: run python -m benchmarks.memory"
                )


def test_a_rise_names_its_owner():
    before = {"peak": 1000, "stage": "a", "owners": {"x": 100, "y": 300}}
    assert memory.risen(before, {"peak": 1010, "stage": "a", "owners": {"x": 110}}) is None
    text = memory.risen(before, {"peak": 10_011, "stage": "b", "owners": {"y": 310, "z": 9001}})
    assert "stage b" in text and "z, +0.000 GB" in text and "+901.1%" in text


# -- flows ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return build(tiny_config(), torch.float32)


OFFLOADED = dataclasses.replace(SMALL, offload=True)


# Two layers always stay on the device: of an offloaded session two more are looked at.
@pytest.mark.parametrize(
    "flow, work, layers",
    [*((flow, SMALL, 3 if flow == "q-zoom" else 2) for flow in FLOWS), ("ours", OFFLOADED, 4)],
)
def test_a_flows_prediction_is_its_measurement(flow, work, layers):
    config = tiny_config(layers)
    predicted = predict_flow(config, flow, work, Settings("float32", attention="sdpa")).report
    measured = measure_flow(build(config, torch.float32), flow, work, owners=True)
    stages = {stage.name: stage.peak for stage in predicted.stages}
    for part in measured.report.stages:
        # What the operators take inside, and 512 bytes of each tensor, are not in both.
        assert part.peak == pytest.approx(stages[part.name], rel=0.03), part.name
    assert measured.report.peak == pytest.approx(predicted.peak, rel=0.01)
    assert measured.groups.keys() <= {*predicted.timeline[-1].groups}


@pytest.mark.parametrize("flow", ["ours", "published, last logits"])
def test_predicted_operations_are_those_that_torch_counts_in_a_real_run(flow):
    config = tiny_config(3)
    # Its counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
        FLOWS[flow].run(build(config, torch.float32), SMALL)
    for attention in ("sdpa", "flash"):
        found = predict_flow(config, flow, SMALL, Settings("float32", attention=attention), owners=False)
        assert sum(found.flops.values()) == counter.get_total_flops()
    if flow == "ours":
        assert found.flops_in("answer") > found.flops_in("answer/encode") > found.flops_in("answer/next token") > 0
        assert sum(map(found.flops_in, ("encode", "prefill", "search", "answer"))) == sum(found.flops.values())


def test_quantised_weights_take_the_operations_of_the_others():
    work = Workload(100, collage=64)
    flops = [predict_flow(tiny_config(), "plain", work, Settings(weights=kind), owners=False).flops for kind in WEIGHTS]
    assert flops[0] == flops[1] == flops[2] != {}


def test_a_view_takes_what_a_picture_of_its_size_takes_and_keeps_the_pixels_of_the_whole():
    settings = Settings("float32")
    viewed, small, whole = (
        predict_flow(tiny_config(), "ours", dataclasses.replace(SMALL, image=image, view=view), settings, owners=False)
        for image, view in ((900, 225), (225, None), (900, None))
    )
    assert (viewed.name, viewed.tokens, viewed.whole) == ("ours, view", 225, 900)
    assert (whole.name, whole.tokens, whole.whole) == ("ours", 900, None)
    assert viewed.flops == small.flops and sum(viewed.flops.values()) < sum(whole.flops.values()) / 4
    pixels = 3 * 28**2 * (900 - 225)
    for one, other in zip(viewed.report.stages, small.report.stages, strict=True):
        assert one.name == other.name
        assert one.peak - other.peak == (0 if one.name == "weights" else pytest.approx(pixels, abs=512))
    wide = predict_flow(tiny_config(), "plain", Workload((432, 768), view=100), settings, owners=False)
    assert (wide.tokens, wide.whole) == (7 * 13, 15 * 27)


def test_keeping_all_layers_keeps_a_matrix_of_each():
    config, settings = tiny_config(layers=3), Settings("float32")
    flows = flows_of("eager")
    kept, alive = (predict_flow(config, flow, SMALL, settings, owners=False).report.peak for flow in flows)
    rows = 15 + 400 + 1 + 9
    matrix = 6 * rows**2 * 4
    # The last layer's are there with and without the others'; what vision attention returns is kept too.
    vision = 2 * 1600 * 128 * 4
    assert kept - alive == pytest.approx(2 * matrix + vision, rel=0.02)


def test_fused_attention_counts_output_and_log_sum_exp_and_leaves_the_model_as_it_was(tiny):
    work = Workload(400, collage=64)
    before = tiny.model.config.text_config._attn_implementation
    with fused_attention(tiny), predict(tiny.model, owners=True) as recording:
        FLOWS["published, last logits"].run(tiny, work)
    assert recording.report.error is None
    assert tiny.model.config.text_config._attn_implementation == before != "flash_attention_2"
    exact = predict_flow(tiny_config(), "published, last logits", work, Settings("float32", attention="sdpa"))
    assert recording.report.peak == pytest.approx(exact.report.peak, rel=0.02)


def test_flows_change_nothing_on_the_model(tiny):
    weights = {name: parameter.clone() for name, parameter in tiny.model.named_parameters()}
    implementation = tiny.model.config.text_config._attn_implementation
    for name in flows_of("all"):
        FLOWS[name].run(tiny, SMALL)
    assert tiny.model.config.text_config._attn_implementation == implementation
    assert all(torch.equal(weights[name], parameter) for name, parameter in tiny.model.named_parameters())


def test_prompts_share_the_prefix_and_count_the_pictures(tiny):
    given = scene(tiny, SMALL)
    search, answer = given.search.input_ids[0], given.answer[0]
    assert given.image.tokens == (400,) and given.collage.tokens == (64,) and given.prefix == 416
    assert search[: given.prefix].tolist() == answer[: given.prefix].tolist()
    token = tiny.image_token
    assert ((search == token).sum(), (answer == token).sum()) == (400, 464)
    assert given.search.images[0].span == (15, 415) and len(given.search.rows) == 9


def test_a_picture_in_pixels_has_the_tokens_of_the_familys_rule():
    config = tiny_config(layers=1)
    found = predict_flow(config, "ours", Workload((420, 830), collage=64), Settings("float32"), owners=False)
    picture = Image.new("RGB", (830, 420))
    adapter = load(CHECKPOINT, device="cpu")
    assert found.tokens == adapter.preprocess([picture], min_tokens=1, max_tokens=10**4).tokens[0] == 15 * 30


def test_owners_are_sorted_into_groups():
    found = predicted("published, last logits", 4096)
    assert sum(found.groups.values()) == found.report.peak
    assert found.groups["weights"] == pytest.approx(16.584e9, rel=1e-4)
    # Three activations of the decoder's feed-forward layers.
    rows = 15 + 4096 + 1 + 1024 + 31
    assert found.groups["feed-forward"] == pytest.approx(3 * rows * 18944 * 2, rel=1e-3)
    sample = next(owner for owner in predicted("published", 16384).owners if owner.group == "keys and values")
    assert "cache_utils.py" in sample.line
    for module, group in {
        "LlavaOnevisionModel.language_model.norm": "other",
        "Qwen2_5_VisionTransformerPretrainedModel.blocks.*.mlp": "vision encoder",
        "InternVLForConditionalGeneration.model.multi_modal_projector": "vision encoder",
        "Qwen2_5_VLTextModel.layers.*.self_attn": "attention",
    }.items():
        assert owner_group(dataclasses.replace(sample, line=None, module=module)) == group


# -- weights ----------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.odd, self.head = nn.Linear(256, 384), nn.Linear(96, 8), nn.Linear(384, 10, bias=False)

    def get_output_embeddings(self):
        return self.head


def bytes_of(module):
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def test_quantised_layers_have_the_storages_of_codes_and_scales():
    # The 256 input channels of int4 are filled up to 1,024, and 64 of them share a scale and a zero point.
    for weights, codes, scales in (("int8", 256 * 384, 384 * (4 + 1)), ("int4", 1024 * 384 // 2, 16 * 384 * 2 * 2)):
        model = Head().bfloat16()
        storages(model, weights)
        assert bytes_of(model.first) == codes + scales + 384 * 2
        assert type(model.head) is nn.Linear and model.first(torch.zeros(3, 256, dtype=torch.bfloat16)).shape == (
            3,
            384,
        )
        # 96 channels are no whole group.
        assert isinstance(model.odd, nn.Linear if weights == "int4" else Int8Linear)
    assert isinstance(model.first, Int4Linear)


def test_int8_turns_one_weight_at_a_time_into_the_activations_dtype():
    model = Head().bfloat16()
    storages(model, "int8")
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    with predict(model, x, rounding=1) as recording:
        model.first(x)
    assert recording.report.peak - recording.report.start == 256 * 384 * 2 + 3 * 384 * 2
    model = Head().bfloat16()
    model.first.weight.data = torch.randint(-9, 9, (384, 256)).bfloat16()
    exact = model.first(x + 1)
    quantised = Int8Linear(model.first)
    quantised.codes.copy_(model.first.weight)
    torch.testing.assert_close(quantised(x + 1), exact)


def test_the_7b_with_int4_weights_takes_two_fifths():
    layers, blocks = 2, 2
    sizes = {}
    for weights in ("bf16", "int8", "int4"):
        with predict() as recording:
            adapter = build(seven(layers, blocks), torch.bfloat16, weights)
            sizes[weights] = recording.report.live / 1e9
            assert recording.report.peak <= recording.report.live * 1.01, "the full weights are never there"
            del adapter

    def saved(layers, blocks):
        """GB that int8 and int4 save."""
        hidden, wide = 3584, 18944
        linear = layers * (2 * hidden * hidden + 2 * 512 * hidden + 3 * hidden * wide) / 1e9
        vision = blocks * (4 * 1280**2 + 3 * 1280 * 3420) / 1e9 + (5120**2 + 5120 * hidden) / 1e9
        # Of the vision encoder's feed-forward layers, 3,420 channels are neither whole groups nor whole rows.
        packed = vision - blocks * 3 * 1280 * 3420 / 1e9
        filled = layers * (4096 * (2 * hidden + 2 * 512 + 2 * wide) + 19456 * hidden) / 1e9
        filled += (blocks * 2048 * 4 * 1280 + 5120 * (5120 + hidden)) / 1e9
        return linear + vision, 2 * (linear + packed) - filled * (0.5 + 4 / 64)

    int8, int4 = saved(layers, blocks)
    assert sizes["bf16"] - sizes["int8"] == pytest.approx(int8, rel=2e-3)
    assert sizes["bf16"] - sizes["int4"] == pytest.approx(int4, rel=2e-3)
    whole = weights_of_the_7b() / 1e9
    assert whole - saved(28, 32)[1] < 0.45 * whole


# -- what fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [17e9, 24e9, 50e9])
@pytest.mark.parametrize("power", [2, 4])
def test_the_largest_size_is_found_to_half_a_percent_in_few_predictions(budget, power):
    asked = []

    def peak(size):
        asked.append(size)
        return round(16.6e9 + 3e4 * size**2 + (800 * size**power if power == 4 else 0))

    size, limited = largest_within(peak, budget, 209)
    exact = max((size for size in range(1, 210) if peak(size) <= budget), default=0)
    assert exact - max(1, exact // 200) <= size <= exact and limited == (size == 209)
    assert len(set(asked[:-209])) == len(asked) - 209 <= 11


def test_nothing_fits_or_everything_does():
    assert largest_within(lambda size: 10, 9, 209) == (0, False)
    assert largest_within(lambda size: None if size > 77 else 1, 9, 209) == (77, True)
    assert largest_within(lambda size: size, 10**9, 209) == (209, True)


def test_a_fit_is_the_largest_picture_that_the_prediction_allows():
    config, settings = tiny_config(layers=1), Settings("float32")
    work = Workload(1, collage=16)
    (fit,) = fits(config, ["eager, one layer alive"], 60 * 10**6, work, settings, ["bf16"])
    width, height = fit.size
    at = {}
    for grown in (0, 1):
        own = Workload((height + grown * 28 * 2, width + grown * 28 * 3), collage=16)
        at[grown] = predict_flow(config, fit.flow, own, settings).report.peak
    assert at[0] == fit.peak <= 60 * 10**6 < at[1]
    assert fit.tokens == (width // 28) * (height // 28) and not fit.limited


def test_a_fit_tries_smaller_pieces_and_keys_and_values_on_the_host_where_they_hold_more(monkeypatch):
    """Of a card of 12 GB, with 9.4 GB of weights and sizes about as a 7B's."""

    def predict_flow(config, flow, work, settings, owners):
        tokens = work.image[0] * work.image[1] // 28**2
        fixed = {"int8": 9_400, "bf16": 16_600}[settings.weights] * 10**6
        held = 57_344 * tokens * (2 if work.offload else 28) // 28
        stages = {"encode": encoder * tokens, "prefill": held + 110_000 * work.chunk + 7_200 * tokens}
        stage = max(stages, key=stages.get)
        report = SimpleNamespace(peak=fixed + stages[stage], peak_stage=stage)
        return FlowRun(flow, tokens, report, 0.0)

    monkeypatch.setattr(runs, "predict_flow", predict_flow)

    def fitted(work, budget=12 * 10**9, kinds=("int8",)):
        found = fits(None, ["ours"], budget, work, Settings(), kinds)
        assert all(fit.peak <= budget for fit in found if fit.tokens)
        return [(fit.chunk, fit.offload) for fit in found], [fit.tokens for fit in found]

    encoder = 40_000
    tried, tokens = fitted(Workload(1))
    assert tried == [(2048, False), (1024, False), (1024, True)]
    assert tokens[1] > 1.03 * tokens[0] and tokens[2] > 1.5 * tokens[1]
    assert fitted(Workload(1, chunk=512))[0] == [(512, False), (512, True)]
    # As asked for; all that there is; nothing, however small.
    assert fitted(Workload(1, offload=True))[0] == [(2048, True)]
    assert fitted(Workload(1), 24 * 10**9)[0] == [(2048, False)]
    assert fitted(Workload(1), kinds=("bf16",)) == ([(2048, False), (1024, False)], [0, 0])
    # While pictures are encoded there are no keys yet.
    encoder = 200_000
    assert fitted(Workload(1))[0] == [(2048, False)]


@pytest.mark.parametrize("text, size", [("24GB", 24 * 10**9), ("1.5 gib", 3 * 2**29), ("900mb", 9 * 10**8)])
def test_sizes_of_cards(text, size):
    assert parse_bytes(text) == size


def test_sizes_of_pictures_are_width_first():
    assert parse_pixels("7680x4320") == parse_pixels(" 7680 × 4320") == (4320, 7680)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four-layers")
    tiny_config(layers=4).save_pretrained(folder)
    return str(folder)


def test_the_command_prints_and_writes_stages_owners_and_pictures(tiny_folder, tmp_path):
    done = run(
        "--model", tiny_folder, "--tokens", "400", "--collage", "64", "--dtype", "float32", "--measure", "--device", "cpu",
        "--flow", "ours", "--out", str(tmp_path),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for text in ("prefill", "answer/encode", "vision encoder", "made by", "Measured on cpu", "ours"):
        assert text in done.output
    document = json.loads((tmp_path / "profile.json").read_text())
    predicted, measured = document["flows"]
    assert (predicted["kind"], measured["kind"]) == ("predicted", "measured")
    assert sum(predicted["groups"].values()) == predicted["peak"] and predicted["tokens"] == 400
    with (tmp_path / "profile.csv").open() as file:
        rows = {(row["kind"], row["stage"]): int(row["peak"]) for row in csv.DictReader(file)}
    assert rows["predicted", ""] == predicted["peak"] and rows["measured", "prefill"] > 0
    with Image.open(tmp_path / "ours.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    page = (tmp_path / "profile.html").read_text()
    assert page.count("data:image") == 1 and "http" not in page.replace("http-equiv", "") and "answer/encode" in page


def test_the_command_puts_a_view_beside_the_whole_picture_and_a_plain_answer(monkeypatch, tmp_path):
    real, asked = predict_flow(tiny_config(), "plain", Workload(100), Settings("float32")), []

    def predicted(config, flow, work, settings):
        asked.append((flow, work.view))
        times = 1 if work.view is None else 0.25
        flops = {name: int(count * times) for name, count in real.flops.items()}
        return dataclasses.replace(real, flow=flow, whole=None if work.view is None else 900, flops=flops)

    monkeypatch.setattr(runs, "predict_flow", predicted)
    done = run("--model", TINY, "--tokens", "900", "--flow", "ours", "--view", "100", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert asked == [("ours", None), ("ours", 100), ("plain", None), ("plain", 100)]
    assert "a view of 100 of 900 image tokens" in " ".join(done.output.split())
    table = (tmp_path / "profile.html").read_text()
    assert table.count(">ours, view</") == 1 and table.count(">0.25</") == 2 and (tmp_path / "ours_view.png").exists()
    document = json.loads((tmp_path / "profile.json").read_text())
    flows = {(flow["flow"], flow["whole"]): flow["flops"] for flow in document["flows"]}
    assert flows["plain", 900] == pytest.approx(flows["plain", None] / 4, abs=9)
    with (tmp_path / "profile.csv").open() as file:
        rows = {(row["flow"], row["stage"]): row["flops"] for row in csv.DictReader(file)}
    assert int(rows["ours, view", ""]) == flows["ours", 900] > int(rows["ours, view", "answer"]) > 0
    asked.clear()
    assert run("--model", TINY, "--tokens", "900", "--flow", "plain", "--view", "auto", "--json").exit_code == 0
    assert asked == [("plain", None), ("plain", RunSettings(view_tokens="auto").view(840, 840))]


def test_the_command_keeps_keys_and_values_on_the_host(tiny_folder):
    arguments = (
        "--model",
        tiny_folder,
        "--tokens",
        "400",
        "--collage",
        "64",
        "--dtype",
        "float32",
        "--flow",
        "ours",
        "--json",
    )
    plain, offloaded = (json.loads(run(*arguments, *more).stdout) for more in ((), ("--offload-kv",)))
    held = [
        {stage["name"]: stage["live"] for stage in document["flows"][0]["stages"]}["prefill"]
        for document in (plain, offloaded)
    ]
    # Four layers of 15 + 400 + 1 + 256 tokens in float32; two of them stay.
    text = tiny_config().get_text_config()
    channels = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    assert held[0] - held[1] == pytest.approx(2 * 2 * channels * 4 * 672, rel=0.01)
    assert (plain["workload"]["offload"], offloaded["workload"]["offload"]) == (False, True)


def test_json_is_json_and_a_fit_needs_no_size(tiny_folder):
    done = run(
        "--model", tiny_folder, "--fit", "3MB", "--flow", "ours", "--dtype", "float32", "--weights", "int8", "--json"
    )
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["flows"] == [] and document["budget"] == 3 * 10**6
    (fit,) = document["fits"]
    assert fit["weights"] == "int8" and fit["tokens"] == 0 and 3 * 10**6 < fit["peak"] < 16 * 10**6


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--model", "Qwen9"], "packaged are InternVL3-14B-hf"),
        (["--model", TINY, "--flow", "best"], "want one of eager, published, ours, plain, q-zoom, all"),
        (["--model", TINY, "--tokens", "0"], "at least 1 token"),
        (["--model", TINY, "--tokens", "40000"], "the model takes 32,768"),
        (["--tokens", "10000000000"], "the model takes"),
        (["--image", "99999x99999"], "the model takes"),
        (["--image", "20x9999"], "200 times as long"),
        (["--image", "20"], "7680x4320"),
        (["--image", "20x20", "--tokens", "9"], "want one of them"),
        (["--fit", "24"], "24GB"),
        (["--dtype", "float8"], "bfloat16, float16, float32"),
        (["--weights", "int2"], "bf16, int8, int4"),
        (["--attention", "ring"], "flash, sdpa"),
        (["--chunk", "0"], "chunk: got 0"),
        (["--view", "half"], "view: got 'half', want a number of tokens, or auto"),
        (["--view", "0"], "view_tokens: got 0, want at least 1"),
        (["--weights", "int4", "--measure", "--device", "cpu"], "measure on a GPU"),
        (["--weights", "int8", "--dtype", "float16", "--measure", "--device", "cpu"], "int8 weights do not take"),
        (["--model", TINY, "--measure", "--device", "gpu"], "device: got 'gpu', but "),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(arguments, text):
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    assert text in " ".join(done.output.split()) and "Traceback" not in done.output


def test_a_family_without_a_flow_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = run("--model", str(tmp_path))
    assert done.exit_code == 1 and f"'llama'; there are flows for {next(iter(FAMILIES))}" in " ".join(
        done.output.split()
    )
    assert (*flows_of("all"), "plain", "q-zoom") == tuple(FLOWS) and len(flows_of("eager")) == 2
    assert flows_of("q-zoom") == ("q-zoom",)


def test_exponents_are_those_of_powers():
    class Run:
        def __init__(self, tokens):
            self.tokens, self.groups = tokens, {"weights": 50}
            self.report = type("Report", (), {"peak": 50 + tokens**3})

    assert math.isclose(memory.exponent(Run(10), Run(40)), 3)
