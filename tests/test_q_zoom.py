"""Q-Zoom: branches beside a stock model against plain forwards, the crop behind the image against both images from
scratch, the rules between map and crop, and checkpoints with exactly the released keys."""

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from region_branches import DEPTH, LAYER, released_names, save, with_branches
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

from hide.cli import app
from hide.cli.loading import way_names
from hide.engine import stock
from hide.engine.decoder import extend
from hide.engine.kv_cache import PreallocatedCache
from hide.evaluation.data import scene_questions
from hide.methods.base import Preset
from hide.methods.plain import Plain
from hide.methods.q_zoom.branches import Branches, branches_of, new_branches, region_scores
from hide.methods.q_zoom.method import QZoom, QZoomSettings
from hide.methods.q_zoom.regions import (
    Region,
    blurred,
    component_box,
    inside_source,
    kept_tokens,
    one_box,
    pixel_box,
    without_corner,
    without_sinks,
)
from hide.models import load
from hide.presets import AnswerSettings, NoSettings, RunSettings
from hide.profiling.models import build, read_config
from hide.questions import LETTER_REQUEST, Question
from hide.session import Message
from hide.tiny import CHECKPOINT
from hide_kernels.integrations.transformers import capture_attention

SERVED = ("qwen2_5_vl", "qwen3_vl", "llava")
QUESTION = Question("What color is the star?")
RUN, ANSWER = RunSettings(min_tokens=20, max_tokens=60), AnswerSettings(max_new_tokens=6)
ALWAYS = {"gate_threshold": 0.0, "region_threshold": -1.0}


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGE = picture(250, 170)


@pytest.fixture(scope="module", params=SERVED)
def model(request):
    return with_branches(request.param)


@pytest.fixture(scope="module")
def qwen():
    return with_branches("qwen2_5_vl")


def method_of(model, run=RUN, **settings):
    return QZoom(model, Preset(QZoomSettings(**settings), run, ANSWER))


def everything(model, *images, run=RUN):
    return model.preprocess(list(images), min_tokens=run.min_tokens, max_tokens=run.max_tokens)


def stretched(crop):
    """As LLaVA is shown it."""
    return Image.fromarray(crop.numpy()).resize((56, 56), Image.Resampling.BILINEAR)


# -- the branches, against the stock forward with their layers in its own place -----------------------------------------


QUERIES_AND_KEYS = {}


def _recording(module, query, key, *arguments, **keywords):
    QUERIES_AND_KEYS[id(module)] = query, key
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *arguments, **keywords)


AttentionInterface.register("q_zoom_recording", _recording)
AttentionMaskInterface.register("q_zoom_recording", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def plainly(model, prompt, layers):
    """States behind layers 0..K-1 and these, of a copy of the stock model that has no others and no norm."""
    other = copy.deepcopy(model.model)
    decoder = other.model.language_model
    added = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
    decoder.layers = nn.ModuleList([*decoder.layers[:LAYER], *added])
    decoder.norm = nn.Identity()
    decoder.config._attn_implementation = "q_zoom_recording"
    decoder.config.num_hidden_layers = len(decoder.layers)
    decoder.config.layer_types = ["full_attention"] * len(decoder.layers)
    for layer in decoder.layers:
        layer.self_attn.config = decoder.config
    with torch.no_grad():
        inputs = stock.forward_inputs(model, prompt, everything(model, IMAGE))
        states = other.model(**inputs, use_cache=False).last_hidden_state
    return states, added


def spied(monkeypatch):
    """What is asked of, and found by, the method's own steps."""
    from hide.methods.q_zoom.branches import Glance

    found = {}
    for name in ("gate", "scores", "first_token_scores"):
        real = getattr(Glance, name)

        def call(self, *arguments, name=name, real=real):
            found[name] = real(self, *arguments)
            return found[name]

        monkeypatch.setattr(Glance, name, call)
    return found


@pytest.mark.parametrize("chunk, implementation", [(2048, "sdpa"), (11, "sdpa"), (11, "eager")])
def test_gate_and_map_are_those_of_plain_forwards_through_all_heads_and_rows(model, chunk, implementation, monkeypatch):
    method = method_of(
        model, RunSettings(min_tokens=20, max_tokens=60, prefill_chunk=chunk), **ALWAYS, sinks="first token"
    )
    found = spied(monkeypatch)
    model.model.set_attn_implementation(implementation)
    try:
        with method.open(IMAGE) as session:
            method.ask(session, QUESTION)
            turn = session.turn(method.prompt(QUESTION))
    finally:
        model.model.set_attn_implementation("sdpa")
    branches, prompt = method.branches, turn.input_ids
    states, _ = plainly(model, prompt, branches.gate)
    want = float(branches.head(states[:, -1]).sigmoid())
    assert 0.01 < want < 0.99 and float(found["gate"]) == pytest.approx(want, abs=1e-5)
    image = turn.images[0]
    cells = image.start + image.cells.flatten()
    if model.family == "llava":
        # No rotation, and two norms: the score of the released code, written out.
        states, _ = plainly(model, prompt, branches.regions[:-1])
        last = branches.regions[-1]
        entering = last.input_layernorm(branches.norm(states))
        query, key = (getattr(last.self_attn, f"{kind}_proj")(entering) for kind in "qk")
        query, key = (x.unflatten(-1, (-1, last.self_attn.head_dim)).transpose(1, 2) for x in (query, key))
    else:
        _, added = plainly(model, prompt, branches.regions)
        query, key = QUERIES_AND_KEYS[id(added[-1].self_attn)]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)[:, :, cells]
    by_head = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    torch.testing.assert_close(found["scores"].flatten(), by_head[0, :, -1].mean(0), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found["first_token_scores"].flatten(), by_head[0, 0, 0], atol=2e-5, rtol=1e-5)


def test_scores_of_folded_queries_are_the_mean_over_heads_with_the_same_gradients():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, 2, 16, generator=generator, requires_grad=True)
    keys = torch.randn(1, 2, 9, 16, generator=generator, requires_grad=True)
    folded = region_scores(query.unflatten(1, (2, 3)).mean(2), keys)
    by_head = (query @ keys.repeat_interleave(3, 1).transpose(-1, -2) / 4).mean(1)
    torch.testing.assert_close(folded, by_head)
    weights = torch.randn(folded.shape, generator=generator)
    mine, plain = (torch.autograd.grad((one * weights).sum(), (query, keys)) for one in (folded, by_head))
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other)


# -- answers ------------------------------------------------------------------------------------------------------------


def test_below_the_threshold_of_the_gate_the_answer_is_the_stock_models_own(model, monkeypatch):
    method = method_of(model, gate_threshold=math.inf)
    found = spied(monkeypatch)
    answer = method.ask(IMAGE, QUESTION)
    ids = model.input_ids(method.prompt(QUESTION), everything(model, IMAGE))
    want = stock.generate_ids(model, ids, everything(model, IMAGE), max_new_tokens=ANSWER.max_new_tokens)
    assert answer.text == model.decode(want) and "scores" not in found
    assert answer.details["zoomed"] is False and answer.details["gate"] == round(float(found["gate"]), 4)
    assert list(answer.steps) == ["read and resize", "prefix", "gate", "answer"]


@pytest.mark.parametrize(
    "family, continuous", [("qwen2_5_vl", True), ("qwen3_vl", True), *((family, False) for family in SERVED)]
)
def test_the_crop_behind_the_image_is_both_images_from_scratch(family, continuous):
    """Logits of the reused prefix against one forward over everything, ours and the stock model's, at the positions of
    the crop's rule."""
    model = with_branches(family)
    method = method_of(model, reuse_src_pos=continuous, **ALWAYS)
    region = Region((1, 1, 4, 3))
    with method.open(IMAGE) as session:
        prompt = method.prompt(QUESTION)
        turn = session.turn(prompt)
        crop = session.pixels[0][40:120, 30:150]
        with method.zoomed(session, turn, prompt, crop, region) as (branch, tokens):
            got, ids, places = branch.logits()[0], branch.ids, branch.positions
            reply = branch.reply(ANSWER.max_new_tokens)
    shown = crop if model.family != "llava" else stretched(crop)
    both = everything(model, IMAGE, shown)
    features = model.encode(both)
    assert tokens == both.tokens[1]
    if not continuous:
        torch.testing.assert_close(places, model.positions(ids, both)[0].to(places.dtype))
    cache = PreallocatedCache(model.num_layers, ids.shape[1])
    states, _ = extend(model, cache, ids, places, features)
    want = model.model.get_output_embeddings()(states[0, -1])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    if not continuous:
        assert reply == stock.generate_ids(model, ids, both, max_new_tokens=ANSWER.max_new_tokens)
    own = {"position_ids": places} if continuous else {}
    with torch.no_grad():
        stocks = model.model(**stock.forward_inputs(model, ids, both), **own).logits[0, -1]
    torch.testing.assert_close(got, stocks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_replies_behind_a_crop_inside_its_source_go_on_one_place_at_a_time(family):
    model = with_branches(family)
    method = method_of(model, reuse_src_pos=True, **ALWAYS)
    with method.open(IMAGE) as session:
        prompt = method.prompt(QUESTION)
        crop = session.pixels[0][40:120, 30:150]
        with method.zoomed(session, session.turn(prompt), prompt, crop, Region((1, 1, 4, 3))) as (branch, _):
            replies = [branch.reply(5, static=static) for static in (True, False)]
            ids, places = branch.ids, branch.positions
        assert replies[0] == replies[1]
        longer = torch.cat([ids, torch.tensor([replies[0][:-1]])], 1)
        steps = places[..., -1:] + torch.arange(1, len(replies[0]))
        assert int(places[0, 0, -1]) == ids.shape[1] - 1
        both = everything(model, IMAGE, crop)
        cache = PreallocatedCache(model.num_layers, longer.shape[1])
        states, _ = extend(model, cache, longer, torch.cat([places, steps], -1), model.encode(both))
    scores = model.model.get_output_embeddings()(states[0, -len(replies[0]) :])
    penalty = model.model.generation_config.repetition_penalty
    for number, token in enumerate(replies[0]):
        own = scores[number].clone()
        seen = longer[0, : ids.shape[1] + number].unique()
        own[seen] = torch.where(own[seen] < 0, own[seen] * penalty, own[seen] / penalty)
        assert int(own.argmax()) == token


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_at_the_places_of_a_second_image_a_zoomed_answer_is_that_to_both_images(family):
    model = with_branches(family)
    method = method_of(model, reuse_src_pos=False, gate_threshold=0.0, region_threshold=0.4, sinks="none")
    with method.open(IMAGE) as session:
        answer = method.ask(session, QUESTION)
        want = session.ask(method.prompt(QUESTION), [answer.evidence[0].shown], max_new_tokens=ANSWER.max_new_tokens)
    (box,) = answer.boxes[0].tolist()
    assert answer.details["zoomed"] and answer.text == want.text and answer.notes == ()
    assert answer.evidence[0].shown.size == (box[2] - box[0], box[3] - box[1])
    assert answer.evidence[0].shown_tokens == want.image_tokens[0]
    assert list(answer.steps) == ["gate", "region", "crop", "answer"]
    assert answer.evidence[0].threshold == 0.4 and answer.evidence[0].maps.shape[0] == 1


def test_questions_about_one_image_share_what_the_branches_make_of_it(qwen):
    """Once per session and branch; and a question before, zoomed or not, changes nothing in those behind it."""
    method = method_of(qwen, **ALWAYS)
    rows, hooks = {"gate": 0, "regions": 0}, []
    for name in rows:
        first = getattr(method.branches, name)[0]

        def add(module, arguments, keywords, name=name):
            rows[name] += (arguments[0] if arguments else keywords["hidden_states"]).shape[1]

        hooks.append(first.register_forward_pre_hook(add, with_kwargs=True))
    questions = [QUESTION, Question("Is the ring on the left?"), QUESTION]
    try:
        with method.open(IMAGE) as session:
            own = [session.turn(method.prompt(one)).input_ids.shape[1] - session.length for one in questions]
            before = session.nbytes
            texts = [method.ask(session, one).text for one in questions]
            assert session.nbytes > before
            plain = session.ask("Is it raining?", max_new_tokens=5)
            direct = method.changed(gate_threshold=2.0).ask(session, QUESTION)
            length = session.length
    finally:
        for hook in hooks:
            hook.remove()
    assert rows == {"gate": length + sum(own) + own[0], "regions": length + sum(own)}
    alone = [method.ask(IMAGE, one).text for one in questions]
    assert texts == alone and texts[0] == texts[2]
    with method.open(IMAGE) as fresh:
        assert fresh.ask("Is it raining?", max_new_tokens=5).ids == plain.ids
    assert direct.text == method.changed(gate_threshold=2.0).ask(IMAGE, QUESTION).text


def test_the_gate_alone_decides_where_it_lies_at_the_threshold(qwen):
    method = method_of(qwen, region_threshold=-1.0, sinks="none", gate_threshold=0.0)
    with method.open(IMAGE) as session:
        gate = session_gate(method, session)
        for threshold, zoomed in ((gate, True), (math.nextafter(gate, 2), False), (0.0, True), (1.5, False)):
            assert method.changed(gate_threshold=threshold).ask(session, QUESTION).details["zoomed"] is zoomed


def session_gate(method, session):
    turn = session.turn(method.prompt(QUESTION))
    with session.branch(turn.input_ids) as branch:
        states = branch.run(layers=range(LAYER))
        return float(method._glance(session, turn, branch).gate(states, branch.positions[..., session.length :]))


def test_checkpoints_without_a_gate_always_look():
    model = with_branches("qwen2_5_vl", gate=False)
    answer = method_of(model, gate_threshold=2.0, region_threshold=-1.0).ask(IMAGE, QUESTION)
    assert answer.details["gate"] is None and answer.details["zoomed"]


def test_a_map_without_a_cell_above_the_threshold_is_a_plain_answer_with_a_note(qwen):
    method = method_of(qwen, gate_threshold=0.0, region_threshold=1.0)
    answer = method.ask(IMAGE, QUESTION)
    plain = Plain(qwen, Preset(NoSettings(), RUN, ANSWER)).ask(IMAGE, Question(method.prompt(QUESTION)))
    assert answer.text == plain.text and "no cell is above" in answer.notes[0]
    assert len(answer.evidence[0].maps) == 1 and not len(answer.boxes[0]) and answer.evidence[0].shown is None


def test_several_images_are_answered_plainly_with_a_note(qwen):
    method = method_of(qwen, **ALWAYS)
    answer = method.ask([IMAGE, picture(120, 90, 1)], QUESTION)
    assert "for one image" in answer.notes[0] and answer.details["zoomed"] is False and answer.evidence == ()


@pytest.mark.parametrize("size", [(700, 30), (30, 700)])
def test_an_image_of_one_row_or_column_of_cells_is_zoomed(qwen, size):
    answer = method_of(qwen, RunSettings(min_tokens=4, max_tokens=60), reuse_src_pos=True, **ALWAYS).ask(
        picture(*size), QUESTION
    )
    assert 1 in answer.evidence[0].maps.shape[1:] and answer.details["zoomed"]


def test_transparent_images_are_zoomed_into_all_the_same(model):
    image = picture(120, 90).convert("RGBA")
    image.putalpha(0)
    image.putpixel((70, 20), (255, 0, 0, 255))
    answer = method_of(model, **ALWAYS).ask(image, QUESTION)
    assert answer.boxes[0].tolist() == [[0, 0, 120, 90]] and answer.evidence[0].shown.size == (120, 90)


def test_numbers_that_are_none_are_a_plain_answer_with_a_note(qwen, monkeypatch):
    found = spied(monkeypatch)
    method = method_of(qwen, gate_threshold=0.0, region_threshold=0.2)
    head = method.branches.head
    with torch.no_grad():
        before = head.bias.clone()
        head.bias.fill_(math.nan)
    try:
        answer = method.ask(IMAGE, QUESTION)
    finally:
        with torch.no_grad():
            head.bias.copy_(before)
    assert math.isnan(found["gate"]) and "NaN" in answer.notes[0] and answer.details["gate"] is None
    monkeypatch.setattr(method, "map", lambda scores, first: torch.full_like(scores, math.nan))
    answer = method.ask(IMAGE, QUESTION)
    assert "the map holds NaN" in answer.notes[0] and not answer.details["zoomed"]


@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_answers_are_the_same_in_every_mode_and_with_keys_on_the_host(qwen, mode):
    method = method_of(qwen, gate_threshold=0.0, region_threshold=0.5, reuse_src_pos=True)
    want = method.ask(IMAGE, QUESTION)
    with mode(), method.open(IMAGE) as session:
        inside = method.ask(session, QUESTION)
    # What was made in one mode is used in another.
    with mode():
        session = method.changed(offload_kv=True).open(IMAGE)
        method.ask(session, QUESTION)
    outside = method.ask(session, QUESTION)
    session.close()
    for other in (inside, outside):
        assert other.text == want.text and other.details == want.details
        assert torch.equal(other.evidence[0].maps, want.evidence[0].maps)


def test_threads_share_a_session_and_what_the_branches_make_of_it(qwen):
    method = method_of(qwen, gate_threshold=0.0, region_threshold=0.5)
    questions = [Question(f"Is thing {number} red?") for number in range(4)]
    want = [method.ask(IMAGE, one).to_dict()["answer"] for one in questions]
    with method.open(IMAGE) as session, ThreadPoolExecutor(3) as threads:
        assert [answer.text for answer in threads.map(lambda one: method.ask(session, one), questions)] == want


def test_branches_without_memory_say_what_to_do_and_the_session_goes_on(qwen, monkeypatch):
    method = method_of(qwen, **ALWAYS)
    want = method.ask(IMAGE, QUESTION).text
    with method.open(IMAGE) as session:
        with monkeypatch.context() as full:

            def refused(*_, **__):
                raise torch.OutOfMemoryError("Tried to allocate 9 GB")

            full.setattr("hide.engine.beside.through", refused)
            with pytest.raises(MemoryError, match="^3 layers beside the decoder, of .* tokens, do not .*max_tokens"):
                method.ask(session, QUESTION)
        assert method.ask(session, QUESTION).text == want


def test_captures_know_nothing_of_the_branches(qwen):
    from families import FAMILIES

    prompt, rows = qwen.input_ids(QUESTION.text, everything(qwen, IMAGE)), []
    for adapter in (qwen, FAMILIES["qwen2_5_vl"]()):
        with capture_attention(adapter.model, layers=[-1], queries=range(40, 43)) as captured, torch.no_grad():
            adapter.model(**stock.forward_inputs(adapter, prompt, everything(adapter, IMAGE)))
        rows.append(captured[3].weights)
    assert torch.equal(*rows)


def test_in_16_bits_cells_near_the_threshold_are_counted():
    method = method_of(with_branches("qwen2_5_vl"), gate_threshold=0.0, region_threshold=0.5)
    heat = torch.tensor([[0.5, 0.505, 0.493, 0.9]])
    assert method._doubts(heat) == []
    method.model.model.bfloat16()
    assert method._doubts(heat) == [
        "region: 3 cells lie within 0.0078125 of the threshold, a step of torch.bfloat16 at 1"
    ]
    answer = method.ask(IMAGE, QUESTION)
    assert answer.evidence[0].maps.dtype == torch.float32 and answer.text


@pytest.mark.parametrize("name", ["region_threshold", "gate_threshold"])
def test_thresholds_are_numbers(name):
    for value in (math.nan, *([math.inf, -math.inf] if name == "region_threshold" else [])):
        with pytest.raises(ValueError, match=f"{name}: got .*number"):
            QZoomSettings(**{name: value})


def test_prompts_end_with_the_request_once():
    model = with_branches("qwen2_5_vl")
    method = method_of(model)
    said = method.prompt(QUESTION)
    assert said == "What color is the star?\nAnswer the question using a single word or phrase."
    assert method.prompt(Question(said)) == said
    lettered = method.prompt(Question("Which color?", ("red", "blue")))
    assert lettered.splitlines()[-2:] == [method.preset.answer.letter_request, method.settings.answer_request]
    assert method.changed(answer_request="").prompt(QUESTION) == QUESTION.text


# -- from the map to the crop -------------------------------------------------------------------------------------------


def test_the_blur_is_torchvisions_reflected_gaussian():
    values = torch.rand(7, 5, generator=torch.Generator().manual_seed(0))
    line = torch.exp(-0.5 * torch.tensor([-1.0, 0.0, 1.0]) ** 2)
    line /= line.sum()
    kernel = (line[:, None] * line[None])[None, None]
    padded = nn.functional.pad(values[None, None], (1, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(blurred(values), nn.functional.conv2d(padded, kernel)[0, 0])
    assert line.tolist() == pytest.approx([0.274, 0.452, 0.274], abs=1e-3)
    row = torch.tensor([[0.0, 1.0, 0.0]])
    assert blurred(row).tolist()[0] == pytest.approx([2 * 0.27407, 0.45186, 2 * 0.27407], abs=1e-4)
    assert blurred(torch.tensor([[0.7]])).tolist() == [[pytest.approx(0.7)]]


def test_corners_of_large_maps_are_cleared():
    values = torch.ones(20, 16)
    cleared = without_corner(values, 256)
    want = torch.ones(20, 16)
    want[:5, 0], want[0, :4] = 0, 0
    assert torch.equal(cleared, want) and bool((values == 1).all())
    assert torch.equal(without_corner(values, 320), values), "not more cells than that"
    narrow = without_corner(torch.ones(1, 300), 256)
    assert int((narrow == 0).sum()) == 75


def test_cells_that_the_first_token_scores_high_are_sinks():
    scores = torch.tensor([[1.09, math.log(3), 1.11, -5.0]])
    assert without_sinks(torch.full((1, 4), 0.5), scores).tolist() == [[0.5, 0.0, 0.0, 0.5]]


def test_one_box_holds_all_that_is_true():
    positive = torch.zeros(6, 9, dtype=torch.bool)
    assert one_box(positive) is None
    positive[1, 7] = positive[4, 2] = True
    assert one_box(positive) == Region((2, 1, 8, 5))


@pytest.mark.parametrize(
    "cells, grid, size, least, want",
    [
        ((1, 1, 5, 3), (4, 6), (600, 400), 28, (100, 100, 500, 300)),
        ((0, 0, 1, 1), (10, 10), (101, 99), 28, (0, 0, 28, 28)),
        ((9, 9, 10, 10), (10, 10), (100, 100), 28, (72, 72, 100, 100)),
        ((5, 0, 6, 10), (10, 10), (100, 100), 28, (41, 0, 69, 100)),
        ((0, 0, 2, 1), (1, 2), (20, 300), 28, (0, 0, 20, 300)),
        ((0, 0, 1, 1), (4, 4), (3, 3), 1, (0, 0, 1, 1)),
        ((3, 3, 4, 4), (4, 4), (2, 2), 1, (1, 1, 2, 2)),
    ],
)
def test_boxes_in_pixels(cells, grid, size, least, want):
    assert pixel_box(cells, grid, size, least) == want


def test_components_of_one_cell_or_too_many_are_left_out():
    positive = torch.zeros(24, 24, dtype=torch.bool)
    positive[3, 3] = True
    assert component_box(positive) is None
    positive[10:12, 20] = True
    small = component_box(positive)
    assert small == Region((19, 9, 22, 12)), "two cells become three by three, the single one is nothing"
    positive[:, :12] = True
    assert component_box(positive) == small, "288 cells are too many"
    positive[:, :12] = False
    positive[4:8, 2:7] = True
    both = component_box(positive)
    assert both.cells == (2, 4, 21, 12) and torch.equal(both.kept, positive[4:12, 2:21])
    kept = kept_tokens(both, (24, 24))
    assert 0 < int(kept.sum()) < 576 and kept_tokens(small, (24, 24)) is None
    edge = torch.zeros(24, 24, dtype=torch.bool)
    edge[22:24, 23] = True
    assert component_box(edge).cells == (22, 21, 24, 24)


def test_parts_of_a_crop_that_are_not_true_are_not_shown_to_llava(monkeypatch):
    model = with_branches("llava")
    method = method_of(model, gate_threshold=0.0)
    positive = torch.zeros(4, 4, dtype=torch.bool)
    positive[:2, :2] = positive[3, 2:] = True
    monkeypatch.setattr(method, "region", lambda found: component_box(positive))
    with method.open(picture(100, 100)) as session:
        prompt = method.prompt(QUESTION)
        turn, crop = session.turn(prompt), session.pixels[0]
        with method.zoomed(session, turn, prompt, crop, method.region(None)) as (branch, tokens):
            got = branch.logits()[0]
        answer = method.ask(session, QUESTION)
    kept = kept_tokens(component_box(positive), (4, 4))
    assert tokens == answer.evidence[0].shown_tokens == int(kept.sum()) < 16
    images = picture(100, 100), stretched(crop)
    whole, part = (model.encode(everything(model, one)).embeddings for one in images)
    head, image = turn.input_ids[:, : turn.images_end], model.image_token
    ids = torch.cat([head, torch.full((1, tokens), image), turn.input_ids[:, turn.images_end :]], 1)
    embedded = model.language_model.get_input_embeddings()(ids)
    embedded = embedded.masked_scatter((ids == image)[..., None], torch.cat([whole, part[kept]]))
    with torch.no_grad():
        states = model.language_model(inputs_embeds=embedded).last_hidden_state
        torch.testing.assert_close(got, model.model.get_output_embeddings()(states[0, -1]), atol=1e-5, rtol=1e-5)


def test_the_table_of_positions():
    """A source of 4 x 6 cells whose first token stands at 15, a crop of 6 x 10 out of its cells 1, 1 to 5, 3."""
    before, source, crop, behind = 15, 24, 60, 3
    start = before + source + 2
    text = torch.arange(before + source + crop + behind + 4).float()
    stock_axes = torch.zeros(3, 1, len(text))
    stock_axes[:, 0, :before] = torch.arange(before)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"))
    stock_axes[:, 0, before : before + source] = 15 + torch.stack([torch.zeros(24), rows, columns])
    stock_axes[:, 0, before + source], stock_axes[:, 0, before + source + 1] = 21, 22
    rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(6), torch.arange(10), indexing="ij"))
    stock_axes[:, 0, start : start + crop] = 23 + torch.stack([torch.zeros(60), rows, columns])
    stock_axes[:, 0, start + crop :] = 33 + torch.arange(stock_axes.shape[2] - start - crop)
    positions = torch.cat([text[None, None], stock_axes]).long()
    moved = inside_source(positions, before, start, (6, 10), (1, 1, 5, 3))
    of_crop = moved[:, 0, start : start + crop].view(4, 6, 10)
    assert bool((of_crop[1] == 23).all())
    torch.testing.assert_close(of_crop[2], torch.linspace(16, 17, 6)[:, None].expand(6, 10))
    torch.testing.assert_close(of_crop[3], torch.linspace(16, 19, 10)[None].expand(6, 10))
    elsewhere = torch.ones(len(text), dtype=torch.bool)
    elsewhere[start : start + crop] = False
    assert torch.equal(moved[..., elsewhere], positions[..., elsewhere].float())
    assert moved[1:, 0, start + crop].tolist() == [33] * 3 and moved[1:, 0, start + crop + 1].tolist() == [34] * 3
    line = inside_source(positions, before, start, (60, 1), (2, 1, 5, 3))
    assert line[3, 0, start : start + crop].unique().tolist() == [17], "an axis of one cell takes the start"


def test_the_table_is_what_the_family_makes_of_two_images(qwen):
    """e, e + 1, e + 2, e + max + 2: text and time of both rules are those of the stock model's second image."""
    method = method_of(qwen, reuse_src_pos=True, **ALWAYS)
    with method.open(IMAGE) as session:
        prompt = method.prompt(QUESTION)
        turn = session.turn(prompt)
        crop = session.pixels[0][:60, :150]
        with method.zoomed(session, turn, prompt, crop, Region((0, 0, 3, 2))) as (branch, _):
            moved = branch.positions[:, 0]
        both = session.turn([Message(prompt, [crop])])
    (first, second), (grid,) = both.images, both.more.grids
    origin, end = moved[1, first.start], moved[1, first.stop]
    assert end == origin + max(first.grid) and moved[1, first.stop + 1] == end + 1
    assert bool((moved[1, second.start : second.stop] == end + 2).all())
    assert moved[1:, second.stop].tolist() == [end + max(grid) + 2] * 3
    assert moved[2, second.start : second.stop].max() == origin + 1
    assert moved[3, second.start : second.stop].max() == origin + 2


# -- checkpoints --------------------------------------------------------------------------------------------------------


LAYOUTS = {
    "qwen2_5_vl": ("model.", True),
    "qwen2_5_vl, SD-RPN": ("model.", False),
    "qwen2_5_vl, of today": ("model.language_model.", True),
    "qwen3_vl": ("model.language_model.", True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_the_released_layout_loads_without_a_key_too_many_or_too_few(layout, tmp_path):
    family, (prefix, gate) = layout.partition(",")[0], LAYOUTS[layout]
    made = with_branches(family, gate=gate)
    more = {"model.twig_norm.weight": torch.ones(64)} if "SD-RPN" in layout else {}
    folder = save(tmp_path, made, prefix=prefix, gate=gate, more=more, shards=layout == "qwen3_vl",
                  config={"text_config_junk": {"mm_config": {}}, "reuse_src_pos": gate})  # fmt: skip
    adapter = load(folder, device="cpu", dtype="float32")
    names = released_names(family, gate=gate)
    assert adapter.notes == (), "what a method reads itself is nothing left over"
    method = QZoom(adapter, Preset(QZoomSettings(**ALWAYS), RUN, ANSWER))
    assert method.branches.reuse_src_pos is gate
    mine, theirs = (one.language_model.state_dict() for one in (adapter, made))
    assert {name for name in mine if name.startswith(("twig_", "high_res_"))} == set(names)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not any(one.is_meta for one in (*adapter.model.parameters(), *adapter.model.buffers()))
    assert (
        method.taps == (LAYER,)
        and method.ask(IMAGE, QUESTION).text == method_of(made, reuse_src_pos=gate, **ALWAYS).ask(IMAGE, QUESTION).text
    )


def test_branches_of_llavas_own_layout_are_attached_to_the_model_beside_it(tmp_path):
    """As released for LLaVA: a folder of another class, whose branches alone are read."""
    made = with_branches("llava", gate=False)
    branches = made.language_model.state_dict()
    own = {f"model.{name}": branches[name] for name in released_names("llava", gate=False, norm=True)}
    own |= {"model.twig_layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "twig_head.weight": torch.ones(4, 64)}
    own |= {"model.layers.0.input_layernorm.weight": torch.ones(64)}
    save_file(own, tmp_path / "model.safetensors")
    fields = '{"model_type": "llava_llama", "enable_twig": true, "twig_K": 2, "twig_T": 3, "roi_multi_head": true}'
    (tmp_path / "config.json").write_text(fields)
    from families import FAMILIES

    base = FAMILIES["llava"]()
    method = method_of(base, branches=str(tmp_path), **ALWAYS)
    assert method.ask(IMAGE, QUESTION).text == method_of(made, **ALWAYS).ask(IMAGE, QUESTION).text
    assert branches_of(base, str(tmp_path)) is method.branches and branches_of(base) is method.branches
    with pytest.raises(ValueError, match="are attached to the model; load it anew for elsewhere"):
        method.changed(branches="elsewhere")


def without(folder, name):
    weights = load_file(folder / "model.safetensors")
    save_file({key: own for key, own in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"})


def test_what_a_checkpoint_lacks_or_has_otherwise_is_named(tmp_path):
    made = with_branches("qwen2_5_vl")
    folder = save(tmp_path, made, prefix="model.")
    adapter = load(folder, device="cpu", dtype="float32")
    cases = {
        "lacks 1 weight \\(twig_layers.1.mlp.up_proj.weight\\)": "model.twig_layers.1.mlp.up_proj.weight",
        "lacks 2 weights": "model.high_res_head.bias",
    }
    for message, name in cases.items():
        without(folder, name)
        with pytest.raises(ValueError, match=message):
            branches_of(adapter)
    assert not hasattr(adapter.language_model, "twig_layers")


@pytest.mark.parametrize(
    "message, fields, tensor",
    [
        ("enable_twig is False", {"enable_twig": False}, None),
        ("enable_twig is 'false', want true or false", {"enable_twig": "false"}, None),
        ("reuse_src_pos is 'no', want true or false", {"reuse_src_pos": "no"}, None),
        ("roi_source is 'hidden_states'", {"roi_source": "hidden_states"}, None),
        ("high_res_K is 1, want twig_K", {"high_res_K": 1}, None),
        ("high_res_T is 0, want a number of layers", {"high_res_T": 0}, None),
        ("twig_K is None", {"twig_K": None}, None),
        ("twig_K: got 4, want 1 to 3", {"twig_K": 4}, None),
        ("twig_T: got 1", {"twig_T": 1}, None),
        ("has 12 weights .*twig_layers.2.* more than", {"twig_T": 2, "high_res_T": 3}, None),
        ("has 38 weights .*high_res_head.bias.* more than", {"enable_high_res": False}, None),
        ("twig_layers.0.input_layernorm.weight of shape", {}, torch.ones(3)),
        ("twig_layers.0.input_layernorm.weight in torch.int8", {}, torch.ones(64, dtype=torch.int8)),
        ("twig_layers.0.input_layernorm.weight in torch.float8", {}, torch.ones(64).to(torch.float8_e4m3fn)),
    ],
)
def test_branches_that_are_not_what_their_config_says_are_refused(qwen, message, fields, tensor, tmp_path):
    from families import FAMILIES

    more = {} if tensor is None else {"model.twig_layers.0.input_layernorm.weight": tensor}
    save(tmp_path, qwen, prefix="model.", config=fields, more=more)
    with pytest.raises(ValueError, match=message):
        branches_of(FAMILIES["qwen2_5_vl"](), tmp_path)


def test_fields_of_config_that_are_null_are_as_none(qwen, tmp_path):
    from families import FAMILIES

    save(tmp_path, qwen, prefix="model.", config={"high_res_K": None, "high_res_T": None, "reuse_src_pos": None})
    found = branches_of(FAMILIES["qwen2_5_vl"](), tmp_path)
    assert len(found.gate) == DEPTH and found.reuse_src_pos is False


def test_one_folder_may_be_named_in_two_ways(qwen, tmp_path, monkeypatch):
    from families import FAMILIES

    save(tmp_path, qwen, prefix="model.")
    base = FAMILIES["qwen2_5_vl"]()
    found = branches_of(base, tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert branches_of(base, tmp_path.name) is branches_of(base, f"{tmp_path}/../{tmp_path.name}") is found
    adapter = load(tmp_path, device="cpu", dtype="float32")
    assert branches_of(adapter, tmp_path.name) is branches_of(adapter) and adapter.left_out == ()


@pytest.mark.parametrize("copied", [True, False])
def test_a_tied_output_head_is_left_out_of_a_checkpoint_or_copied_into_it(copied, tmp_path):
    made = with_branches("qwen3_vl")
    made.model.lm_head.weight = made.language_model.embed_tokens.weight
    folder = save(tmp_path, made, prefix="model.language_model.")
    if not copied:
        without(folder, "lm_head.weight")
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"tie_word_embeddings": True}
    # The release's text config refers to the whole one, which is then written into it.
    config["text_config"] |= {"tie_word_embeddings": True, "mm_config": {"text_config": {}, "twig_K": 9}, "twig_K": 8}
    file.write_text(json.dumps(config))
    method = method_of(load(folder, device="cpu", dtype="float32"), reuse_src_pos=False, **ALWAYS)
    assert method.model.left_out == () and method.taps == (LAYER,)
    assert method.ask(IMAGE, QUESTION).text == method_of(made, reuse_src_pos=False, **ALWAYS).ask(IMAGE, QUESTION).text


def test_positions_inside_an_image_are_refused_where_there_is_one_axis():
    with pytest.raises(ValueError, match="reuse_src_pos: got True, but llava"):
        method_of(with_branches("llava"), reuse_src_pos=True)


def test_models_and_folders_without_branches_say_what_to_name(tmp_path):
    from families import FAMILIES

    for family, message in {"internvl": "no region branches for internvl", "qwen2_5_vl": "branches=FOLDER"}.items():
        with pytest.raises(ValueError, match=message):
            method_of(FAMILIES[family]())
    adapter = FAMILIES["qwen2_5_vl"]()
    with pytest.raises(ValueError, match="branches: got no name"):
        method_of(adapter, branches=" ")
    with pytest.raises(OSError, match="some/name .* no folder, and the hub's cache does not have it"):
        method_of(adapter, branches="some/name")
    (tmp_path / "config.json").write_text('{"enable_twig": true}')
    with pytest.raises(OSError, match="no safetensors"):
        method_of(adapter, branches=str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(OSError, match="no safetensors"):
        method_of(adapter, branches=str(tmp_path))
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no region branch"):
        method_of(adapter, branches=str(tmp_path))


def test_a_task_has_its_published_thresholds_and_budget():
    presets = QZoom.presets
    assert presets["qwen2.5-vl-7b-vstar"].settings.region_threshold == 0.03
    assert presets["qwen3-vl-4b-ocrbench"].to_dict().items() >= {
        "region_threshold": 0.125, "gate_threshold": 0.1, "min_tokens": 128, "max_tokens": 576, "max_new_tokens": 128,
    }.items()  # fmt: skip
    asked = {
        task: QZoom.presets[f"llava-1.5-7b-{task}"] for task in ("docvqa", "chartqa", "ocrbench", "vstar", "hr-bench")
    }
    assert [one.settings.answer_request for one in asked.values()] == [
        "Answer the question using a single word or phrase.", "Answer the question with a single word.", "", "", "",
    ]  # fmt: skip
    assert asked["vstar"].answer.letter_request == LETTER_REQUEST
    assert asked["hr-bench"].answer.letter_request == "Answer the option letter directly."
    adapter = with_branches("qwen3_vl")
    assert QZoom.preset_for(adapter) == (presets["qwen3-vl-4b"], ())
    assert isinstance(QZoom(adapter).branches, Branches) and len(QZoom(adapter).branches.regions) == DEPTH


# -- commands -----------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("q-zoom"), with_branches("qwen2_5_vl"), prefix="model.")


def test_a_checkpoint_answers_on_the_command_line_and_in_a_report(checkpoint, tmp_path):
    IMAGE.save(tmp_path / "image.png")
    done = run(
        "ask", tmp_path / "image.png", QUESTION.text, "--model", checkpoint, "--method", "q-zoom",
        "--preset", "qwen2.5-vl-7b-ocrbench", "--set", "gate_threshold=0", "--set", "region_threshold=0.01",
        "--set", "max_tokens=140", "--max-new-tokens", "4", "--report", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0 and "UNEXPECTED" not in done.output, done.output
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["zoomed"] and 0 < found["gate"] < 1 and found["shown_tokens"][0] >= 128 and found["notes"] == []
    assert found["cells"] and found["labels"] == [["region branch"]] and len(found["boxes"][0]) == 1
    assert 128 <= found["image_tokens"][0] < 200, "the plain answer's session has the task's budget too"
    page = (tmp_path / "out" / "report.html").read_text()
    for said in ("region branch", "gate", str(found["gate"]), "region_threshold", "Zoomed"):
        assert said in page


def test_it_is_evaluated_beside_a_plain_answer(checkpoint, tmp_path, small_scenes):
    done = run(
        "eval", "--methods", "plain,q-zoom", "--model", checkpoint, "--limit", "1", "--set", "max_tokens=60",
        "--set", "min_tokens=20", "--set", "max_new_tokens=2", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (record,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines()[1:])
    assert "q-zoom" in json.dumps(record)


def test_a_model_without_branches_is_one_line_that_says_what_to_name(tmp_path):
    IMAGE.save(tmp_path / "image.png")
    (tmp_path / "config.json").write_text("{}")
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    done = run(
        "ask", tmp_path / "image.png", QUESTION.text, "--method", "q-zoom", "--set", f"branches={tmp_path}",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 1 and "(branches=FOLDER)" in " ".join(done.output.split())


def test_all_methods_are_those_that_a_checkpoint_has_the_parts_of(checkpoint, tmp_path):
    assert "q-zoom" in way_names("all", checkpoint, print)
    (tmp_path / "config.json").write_text("{}")
    assert "q-zoom" not in way_names("all", tmp_path, print) and "hide" in way_names("all", tmp_path, print)
    assert way_names("q-zoom", tmp_path, print) == ["q-zoom"]


@pytest.mark.parametrize(
    "name, billions",
    [("Qwen2.5-VL-3B-Instruct", 0.46), ("Qwen2.5-VL-7B-Instruct", 1.40), ("Qwen3-VL-4B-Instruct", 0.61)],
)
def test_branches_of_real_sizes_have_the_published_parameters(name, billions):
    config = read_config(name)
    config.text_config.num_hidden_layers, config.vision_config.depth = 4, 1
    with torch.device("meta"):
        branches = new_branches(build(config, torch.bfloat16), 2, 3, gate_depth=3)
    count = sum(own.numel() for module in branches.modules().values() for own in module.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.006)


def test_the_embedded_models_branches_look_at_what_is_asked_about():
    """And the gate sees where it need not; without training neither does."""
    found = {}
    for name in ("trained", "untrained"):
        method = QZoom.from_pretrained(CHECKPOINT, max_tokens=350, gate_threshold=0.0)
        if name == "untrained":
            torch.manual_seed(0)
            for one in method.branches.modules().values():
                for parameter in one.parameters():
                    torch.nn.init.normal_(parameter, std=0.05)
        hits, gates = [], []
        for sample in scene_questions(9_000_000, (300, 350), "scene"):
            answer = method.ask(sample.image(), sample.question)
            heat = answer.evidence[0].maps[0]
            row, column = divmod(int(heat.argmax()), heat.shape[1])
            x, y = (column + 0.5) / heat.shape[1], (row + 0.5) / heat.shape[0]
            width, height = sample.image().size
            hits.append(any(a - 9 < x * width < c + 9 and b - 9 < y * height < d + 9 for a, b, c, d in sample.boxes))
            gates.append(answer.details["gate"])
        found[name] = hits, max(gates)
    assert sum(found["trained"][0]) >= 5 and found["trained"][1] < 0.05
    assert sum(found["untrained"][0]) < 3 and found["untrained"][1] > 0.05
