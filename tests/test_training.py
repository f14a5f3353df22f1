"""Q-Zoom's training: labels against an eager model, losses against plain expressions and against inference, routing, a
loop that a kill does not change, and checkpoints that inference loads."""

import copy
import json
import math
import pickle
import random
import shlex
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from region_branches import save, with_branches
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from hide.cli import app
from hide.engine import stock
from hide.engine.beside import key_heads, query_heads, rotation, through
from hide.evaluation.calibrate import head_sweep
from hide.evaluation.data import Sample, scene_questions
from hide.methods.base import Preset
from hide.methods.q_zoom.branches import attach, branches_of
from hide.methods.q_zoom.method import QZoom, QZoomSettings
from hide.methods.q_zoom.regions import Region
from hide.models import load
from hide.presets import AnswerSettings, RunSettings
from hide.questions import Question
from hide.session import open_session
from hide.training import loop, q_zoom
from hide.training.checkpoint import save_checkpoint
from hide.training.heads import GROUNDING, PUBLISHED, Heads, HeadScore, choose, head_scores, published
from hide.training.labels import IGNORED, from_text, head_maps, label, mean_map, prompt_rows, to_text, tri_state
from hide.training.loop import Processes, fit, read_log, scale, shuffled
from hide.training.objectives import NOTHING, Loss, answer_loss, encoded, gate_loss, region_loss, see, together
from hide.training.q_zoom import Pool, Training, copied_branches
from hide.training.released import convert, read_pickle
from hide.training.routing import Route, route, routes, shown
from hide.training.settings import Recipe, Settings, TriState, settings_for

SERVED = ("qwen2_5_vl", "qwen3_vl", "llava")
QUESTION = Question("What color is the star?")
RUN = RunSettings(min_tokens=20, max_tokens=60)


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGE = picture(250, 170)


@pytest.fixture(scope="module", params=SERVED)
def model(request):
    adapter = FAMILIES[request.param]()
    attach(adapter, copied_branches(adapter, 1, 3))
    adapter.model.requires_grad_(False)
    return adapter


@pytest.fixture
def branches(model):
    """Those that are attached, moved off their copies and learning."""
    found = branches_of(model)
    generator = torch.Generator().manual_seed(3)
    for name, module in found.modules().items():
        module.requires_grad_(True)
        size = 0.002 if name == "high_res_head" else 0.05  # so that no probability is 0 or 1
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    yield found
    for module in found.modules().values():
        module.zero_grad()
        module.requires_grad_(False)


def method_of(model, **settings):
    settings = {"gate_threshold": 0.0, "region_threshold": -1.0, **settings}
    return QZoom(model, Preset(QZoomSettings(**settings), RUN, AnswerSettings(max_new_tokens=6)))


# -- labels -------------------------------------------------------------------------------------------------------------


def test_rows_of_the_reply_are_those_of_an_eager_model_that_keeps_every_matrix(model):
    layers = [1, 3]
    with open_session(model, IMAGE, RUN) as session:
        ids, places, said = prompt_rows(session, QUESTION.text, QUESTION, "reply", "", 5)
        maps = head_maps(session, ids, places, layers)
        turn = session.turn(QUESTION.text)
    eager = copy.deepcopy(model.model)
    eager.set_attn_implementation("eager")
    inputs = stock.forward_inputs(model, turn.input_ids, model.preprocess([IMAGE], min_tokens=20, max_tokens=60))
    with torch.no_grad():
        found = eager.generate(
            **inputs, max_new_tokens=5, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    new = found.sequences[0, turn.input_ids.shape[1] :].tolist()
    assert said == model.decode(new) and ids[0, places[0] :].tolist() == new[:-1] and len(places) == 4
    (image,) = turn.images
    cells = image.start + image.cells
    for layer in layers:
        rows = torch.stack([step[layer][0, :, 0, cells] for step in found.attentions[1:]])
        torch.testing.assert_close(maps[layer], rows.mean(0), atol=1e-5, rtol=0)
        assert rows.mean(0).max() > 3 * rows.mean(0).median(), "far from uniform"


def test_a_reply_of_one_token_has_that_tokens_row(model, monkeypatch):
    with open_session(model, IMAGE, RUN) as session:
        monkeypatch.setattr(session, "reply", lambda ids, max_new_tokens: [7])
        ids, places, _ = prompt_rows(session, QUESTION.text, QUESTION, "reply", "", 5)
        assert ids[0, places].tolist() == [7] and places[-1] == ids.shape[1] - 1
        monkeypatch.setattr(session, "reply", lambda ids, max_new_tokens: [9, 7])
        ids, places, _ = prompt_rows(session, QUESTION.text, QUESTION, "reply", "", 5)
        assert ids[0, places].tolist() == [9]


def test_of_a_question_the_words_that_name_things_are_looked_at(model):
    question = Question("Is the star left of the other ring?")
    with open_session(model, IMAGE, RUN) as session:
        ids, places, said = prompt_rows(session, question.text, question, "question", "Give its box.", 5)
        assert said == "" and model.decode(ids[0, places].tolist()) == "star ring"
        assert "Give its box." in model.decode(ids[0].tolist())
        question = Question("Where is it?")
        ids, places, _ = prompt_rows(session, question.text, question, "question", "", 5)
        assert model.decode(ids[0, places].tolist()) == question.text


def test_a_label_is_of_the_mean_over_chosen_heads_at_any_resolution(model):
    heads = Heads("question", {1: (0, 3), 2: (1,)}, {0: (2,)})
    for most in (16, 60):
        run = RunSettings(min_tokens=4, max_tokens=most)
        with open_session(model, IMAGE, run) as session:
            ids, places, _ = prompt_rows(session, QUESTION.text, QUESTION, "question", "", 5)
            maps = head_maps(session, ids, places, heads.layers)
            rules = TriState(sink=0.3, largest=2.0)
            found = label(session, QUESTION.text, QUESTION, heads, rules, 5)
            grid = session.inputs.grids[0]
        want = (maps[1][0] + maps[1][3] + maps[2][1]) / 3
        torch.testing.assert_close(mean_map(maps, heads.grounding), want)
        labels = from_text(found["labels"], found["grid"])
        assert tuple(found["grid"]) == grid and torch.equal(labels, tri_state(want, maps[0][2], rules=rules))
        assert int((labels == 1).sum()) and json.dumps(found)


def blob():
    attention = torch.full((24, 24), 1e-4)
    attention[6:9, 10:14] = 0.02
    attention[7, 11] = 0.05
    return attention


def test_labels_have_a_foreground_a_box_one_cell_larger_and_a_background():
    attention = blob()
    attention[2, 3] = 0.02 * 0.9 * 0.25 / 0.4  # 0.01125: below a quarter of the peak, above a twentieth
    labels = tri_state(attention)
    assert bool((labels[6:9, 10:14] == 1).all()) and int((labels == 1).sum()) == 12
    ring = torch.zeros(24, 24, dtype=torch.bool)
    ring[5:10, 9:15] = True
    ring[6:9, 10:14] = False
    assert bool((labels[ring] == IGNORED).all()) and labels[2, 3] == IGNORED
    ring[6:9, 10:14] = ring[2, 3] = True
    assert bool((labels[~ring] == 0).all())


def test_sinks_are_no_foreground_and_background_outside_the_box():
    attention, sinks = blob(), torch.zeros(24, 24)
    attention[0, 0] = 0.9
    sinks[0, 0] = sinks[7, 12] = 1e-2
    labels = tri_state(attention, sinks)
    assert labels[0, 0] == 0 and labels[7, 12] == IGNORED and labels[7, 11] == 1
    assert tri_state(attention)[0, 0] == 1, "without sinks it is the peak"


def test_padding_is_background_whatever_lies_there():
    attention, outside = blob(), torch.zeros(24, 24, dtype=torch.bool)
    outside[:, :12] = True
    labels = tri_state(attention, outside=outside)
    assert bool((labels[:, :12] == 0).all()) and labels[7, 13] == 1


def test_maps_that_say_nothing_have_no_label():
    spread = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    for attention in (spread, blob() * 0.09, torch.zeros(24, 24)):
        assert bool((tri_state(attention) == IGNORED).all())
    assert int((tri_state(blob() * 0.11) == 1).sum()) == 12, "a peak of 0.0055 is enough"


def test_labels_are_letters_in_json_lines():
    labels = torch.tensor([[1, 0, IGNORED], [0, 0, 1]])
    assert to_text(labels) == "10.001" and torch.equal(from_text("10.001", (2, 3)), labels)
    for wrong in ("10.00", "10.00x"):
        with pytest.raises(ValueError, match="want 2 x 3 of 1, 0 and"):
            from_text(wrong, (2, 3))


# -- heads --------------------------------------------------------------------------------------------------------------


def test_heads_that_look_into_the_boxes_are_chosen_and_written_down(tmp_path):
    generator, inside = torch.Generator().manual_seed(0), torch.zeros(6, 8, dtype=torch.bool)
    inside[2:4, 3:5] = True
    maps = []
    for _ in range(5):
        for rows in ("reply", "question"):
            found = 0.001 * torch.rand(3, 4, 6, 8, generator=generator)
            if rows == "question":
                found[1, 2, 2:4, 3:5] = found[1, 3, 2:4, 3:5] = 0.2
                found[2, 0, 0, 0] = 0.6
                found[0, 1] = 1e-5  # in the boxes alone, but hardly looking
                found[0, 1, 3, 3] = 1e-3
            maps.append((rows, found, inside))
    heads = choose(head_scores(maps), "Where?")
    assert heads == Heads("question", {1: (2, 3)}, {2: (0,)}, "Where?")
    score = next(one for one in head_scores(maps) if one[:3] == ("question", 2, 0))
    assert score.sink == pytest.approx(0.6) and score.lost == 0 and score.inside < 0.02
    file = tmp_path / "heads.json"
    file.write_text(json.dumps(heads.to_dict()))
    assert Heads.read(file) == heads


def test_a_sink_head_hides_no_box():
    def score(head, **values):
        return HeadScore("reply", 0, head, **{"image": 0.5, "inside": 0.0, "sink": 0.5, "lost": 0.0, **values})

    good = [score(head, inside=0.9 - head / 10) for head in range(GROUNDING)]
    heads = choose([*good, score(8), score(9, lost=0.1), score(10, sink=0.02), score(11, image=0.01)])
    assert heads.sinks == {0: (8,)} and heads.grounding == {0: (0, 1, 2, 3)}
    with pytest.raises(ValueError, match="no head gives the image 5% of its attention"):
        choose([score(0, image=0.04)])


def test_heads_that_look_nowhere_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no head looks into the boxes"):
        choose([HeadScore("reply", 0, 0, 0.5, 0.0, 0.1, 0.0)])
    with pytest.raises(ValueError, match="heads: .*none.json cannot be read: No such file"):
        Heads.read(tmp_path / "none.json")


def test_boxes_outside_of_the_picture_say_nothing_of_heads():
    failed = {}
    samples = [
        Sample(str(x), lambda: IMAGE, QUESTION, "red", "all", ((x, 10, x + 60, 60),), picture="a") for x in (20, 900)
    ]
    adapter = load(q_zoom_base(), device="cpu")
    scores = head_sweep(adapter, samples, failed=lambda sample, error: failed.update({sample.id: str(error)}))
    assert list(failed) == ["900"] and "none of which is in the picture" in failed["900"]
    assert not any(math.isnan(one.lost) for one in scores)


def test_heads_that_a_model_has_not_are_refused(tmp_path):
    adapter = FAMILIES["qwen2_5_vl"]()
    for wrong in ({4: (0,)}, {0: (4,)}):
        with pytest.raises(ValueError, match="the model has 4 layers of 4"):
            Heads("reply", wrong).check(adapter)
    with pytest.raises(ValueError, match="none are published for qwen2_5_vl of width 64; choose some with `hide cali"):
        published(adapter)
    assert PUBLISHED["qwen2_5_vl", 3584].grounding == {22: (1, 4), 23: (6, 11)}
    for wrong in ("[]", '{"rows": "all", "grounding": {"0": [0]}}', '{"rows": "reply", "grounding": {}}', "{"):
        (tmp_path / "heads.json").write_text(wrong)
        with pytest.raises(ValueError, match="heads.json has no heads"):
            Heads.read(tmp_path / "heads.json")


# -- losses -------------------------------------------------------------------------------------------------------------


def labels_of(grid):
    labels = torch.full(grid, IGNORED)
    labels[0], labels[-1, : grid[1] // 2] = 0, 1
    return labels


@pytest.mark.parametrize("resized", [False, True])
def test_the_region_branchs_loss_and_gradients_are_those_of_all_heads_written_out(model, branches, resized):
    (seen,) = see(model, *encoded(model, IMAGE, RUN), [QUESTION.text], branches.layer)
    (image,) = seen.turn.images
    grid = (image.grid[0] * 2, image.grid[1] + 1) if resized else image.grid
    labels = labels_of(grid)
    value, terms = region_loss(model, branches, [seen], [labels])

    states = through(model, branches.regions[:-1], seen.states, seen.positions)
    last = branches.regions[-1]
    normed = last.input_layernorm(states if branches.norm is None else branches.norm(states))
    turned = None if branches.norm is not None else rotation(model, states, seen.positions)
    query, key = query_heads(last, normed, turned), key_heads(last, normed, turned)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]))[0, :, -1].mean(0)[image.start + image.cells]
    if resized:
        scores = F.interpolate(scores[None, None], grid, mode="bilinear", align_corners=False)[0, 0]
    known = labels != IGNORED
    want = (F.softplus(scores) - scores * labels)[known].sum()
    assert terms == int(known.sum())
    torch.testing.assert_close(value, want, atol=1e-4, rtol=1e-5)
    parameters = dict(branches.regions.named_parameters())
    mine, theirs = (torch.autograd.grad(one, parameters.values(), allow_unused=True) for one in (value, want))
    for name, one, other in zip(parameters, mine, theirs, strict=True):
        dead = name.startswith("2.") and not any(part in name for part in ("input_layernorm", "q_", "k_"))
        assert (one is None) == (other is None) == dead, name
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=name)


def test_questions_about_one_image_are_learned_from_together_as_from_each(model, branches):
    prompts = [QUESTION.text, "Is the star on the left or right side of the ring?", "What?"]
    inputs, features = encoded(model, IMAGE, RUN)
    ran = []
    hook = model.language_model.layers[0].register_forward_hook(lambda _, args, out: ran.append(out[0].shape[-2]))
    seen = see(model, inputs, features, prompts, branches.layer)
    hook.remove()
    end = seen[0].turn.images[0].stop
    assert ran == [end, *(one.turn.input_ids.shape[1] - end for one in seen)], "the image goes through once"
    labels = [labels_of(one.turn.images[0].grid) for one in seen]
    labels[1] = labels[1].flip(0)
    labels[2][:] = IGNORED
    value, terms = region_loss(model, branches, seen, labels)
    alone = [
        region_loss(model, branches, see(model, inputs, features, [prompt], branches.layer), [own])
        for prompt, own in zip(prompts, labels, strict=True)
    ]
    assert alone[2] == NOTHING and terms == alone[0].terms + alone[1].terms
    want = alone[0].value + alone[1].value
    torch.testing.assert_close(value, want, atol=1e-4, rtol=1e-5)
    parameters = list(branches.regions.parameters())
    mine, theirs = (torch.autograd.grad(one, parameters, allow_unused=True) for one in (value, want))
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_labels_without_a_cell_cost_no_forward(model, branches, monkeypatch):
    (seen,) = see(model, *encoded(model, IMAGE, RUN), [QUESTION.text], branches.layer)
    monkeypatch.setattr("hide.methods.q_zoom.branches.through", None)
    assert region_loss(model, branches, [seen], [torch.full(seen.turn.images[0].grid, IGNORED)]) == NOTHING


def test_training_sees_what_inference_sees_and_runs_no_layer_above(model, branches):
    method, found, ran = method_of(model, sinks="first token"), {}, []
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(model.language_model.layers)
    ]
    (seen,) = see(model, *encoded(model, IMAGE, RUN), [method.prompt(QUESTION)], branches.layer)
    for hook in hooks:
        hook.remove()
    assert {*ran} == {*range(branches.layer)} and not seen.states.requires_grad
    (looked,) = branches.looked(model, [(seen.states, seen.positions)], seen.turn.images[0])
    gate = branches.gate_logit(model, seen.states, seen.positions)
    with method.open(IMAGE) as session:
        turn = session.turn(method.prompt(QUESTION))
        with session.branch(turn.input_ids) as branch:
            states = branch.run(layers=range(branches.layer))
            glance = method._glance(session, turn, branch)
            places = branch.positions[..., session.length :]
            found = glance.scores(states, places), glance.first_token_scores(), glance.gate(states, places)
    for one, other in zip((*looked, gate.sigmoid()), found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
    for wanted in (0, 1):
        value, terms = gate_loss(model, branches, seen, wanted)
        probability = float(found[2])
        assert terms == 1
        assert float(value.detach()) == pytest.approx(-math.log(probability if wanted else 1 - probability), abs=1e-5)
    value.backward()
    assert branches.head.weight.grad.abs().max() > 0 and branches.gate[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_tuned_models_loss_is_that_of_the_stock_model_on_both_images(family, monkeypatch):
    adapter = with_branches(family)
    method = method_of(adapter, reuse_src_pos=False)
    region = Region((1, 1, 4, 3))
    monkeypatch.setattr(method, "region", lambda found: region)
    adapter.model.requires_grad_(False)
    layers = dict(adapter.language_model.layers.named_parameters())
    for parameter in layers.values():
        parameter.requires_grad_(True)
    value, terms = answer_loss(method, IMAGE, QUESTION, "red", RUN)
    mine = torch.autograd.grad(value, layers.values())

    first = adapter.preprocess([IMAGE], min_tokens=20, max_tokens=60)
    (box,) = method.box(region, first.grids[0], IMAGE.size).tolist()
    both = first + adapter.preprocess([IMAGE.crop(box)], min_tokens=20, max_tokens=60)
    prompt, reply = adapter.input_ids(method.prompt(QUESTION), both), adapter.reply_ids("red")
    assert adapter.decode(reply[0].tolist()) == "red" and int(reply[0, -1]) in adapter.end_tokens and terms == 2
    ids = torch.cat([prompt, reply], 1)
    logits = adapter.model(**stock.forward_inputs(adapter, ids, both), use_cache=False).logits[
        0, prompt.shape[1] - 1 : -1
    ]
    want = F.cross_entropy(logits, reply[0], reduction="sum")
    torch.testing.assert_close(value, want, atol=1e-4, rtol=1e-5)
    for name, one, other in zip(layers, mine, torch.autograd.grad(want, layers.values()), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3, msg=name)

    # At positions inside the source, as inference has them.
    inside = method.changed(reuse_src_pos=True)
    monkeypatch.setattr(inside, "region", lambda found: region)
    monkeypatch.setattr(adapter, "reply_ids", lambda text: reply[:, :1])
    value, terms = answer_loss(inside, IMAGE, QUESTION, "red", RUN)
    with inside.open(IMAGE) as session:
        turn, said = session.turn(inside.prompt(QUESTION)), inside.prompt(QUESTION)
        crop = session.crop([torch.tensor([box])])[0].image
        with inside.zoomed(session, turn, said, crop, region) as (branch, _):
            scores = branch.logits()
    torch.testing.assert_close(value.detach(), F.cross_entropy(scores, reply[0, :1]), atol=1e-4, rtol=1e-5)
    monkeypatch.setattr(inside, "region", lambda found: None)
    assert answer_loss(inside, IMAGE, QUESTION, "red", RUN) == NOTHING


# -- routing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "replies, wrong",
    [
        (["Red.", "red", " RED", "red"], 0),
        (["blue", "green", "red", "red"], 2),
        (["blue", "red", "red", "red"], 1),
        (["dark red", "red", "red", "red"], 0),
        (["", "red", "red", "red"], 1),
        (["red", "blue", "red", "red"], None),
        (["red", "red", "red", "blue"], None),
        (["blue", "blue", "blue", "blue"], None),
        (["", "", "", ""], None),
        (["blue or red ones", "red ones", "red", "red"], 0),
    ],
)
def test_questions_are_easy_hard_or_say_nothing(replies, wrong):
    assert route("a", replies, "Red ") == (None if wrong is None else Route("a", wrong))


def test_a_reply_that_differs_from_the_consensus_but_fits_the_answer_says_nothing():
    assert route("a", ["red", "dark", "dark"], "red dark") is None
    assert route("a", ["blue", "dark", "dark"], "red dark") == Route("a", 1)


def test_easy_questions_are_as_many_as_hard_ones_and_the_same_every_time():
    def record(number, low):
        return {"id": f"{number:02}", "answer": "red", "replies": {"1": low, "2": "red", "4": "red"}}

    records = [record(number, "blue" if number % 5 == 0 else "red") for number in range(20)]
    found = routes(records, (1, 2, 4), 100, 0)
    assert sum(one.wrong for one in found) == 4 and len(found) == 8
    assert found == routes(records, (1, 2, 4), 100, 0) != routes(records, (1, 2, 4), 100, 1)
    assert routes(records, (1, 2, 4), 3, 0) == found[:3]


def test_what_is_shown_of_a_route():
    budgets, rng = (64, 128, 256, 512, 1024), random.Random(0)

    def many(wrong):
        return [shown(Route("a", wrong), budgets, rng) for _ in range(400)]

    assert {*many(0)} == {(64, 0), (128, 0), (256, 0)}
    assert {*many(1)} == {(64, 1), (128, 0), (256, 0)}
    hard = many(2)
    assert {*hard} == {(64, 1), (128, 1), (256, 0)} and 0.85 < sum(label for _, label in hard) / 400 < 0.95
    assert {*many(3)} == {(128, 1), (256, 1), None}, "no smaller budget answers it rightly"


# -- the loop -----------------------------------------------------------------------------------------------------------


def learned(folder, steps=None, processes=None, seed=0, items=11, batch=4):
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    unused = nn.Parameter(torch.ones(2))
    examples = torch.randn(items, 3, generator=torch.Generator().manual_seed(5))

    def one(number, epoch):
        if number == 3:
            return NOTHING
        off = examples[number] @ weight - epoch
        return Loss((off**2).sum() * (number % 3 + 1), number % 3 + 1)

    def loss(numbers, epoch):
        return together(one(number, epoch) for number in numbers)

    more = {} if processes is None else {"processes": processes}
    fit(folder, {"weight": weight, "unused": unused}, range(items), loss, Recipe(0.1, batch, epochs=3), seed=seed,
        group=lambda number: number // 2, steps=steps, **more)  # fmt: skip
    return weight.detach().clone(), unused


def test_a_run_that_was_killed_ends_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    whole, unused = learned(tmp_path / "whole")
    log = read_log(tmp_path / "whole")
    assert [line["step"] for line in log] == list(range(9)) and [line["epoch"] for line in log] == sorted([0, 1, 2] * 3)
    assert torch.equal(unused, torch.ones(2)) and {path.name for path in (tmp_path / "whole").iterdir()} == {
        "log.jsonl", "trained.safetensors",
    }  # fmt: skip
    learned(tmp_path / "killed", steps=5)
    assert json.loads((tmp_path / "killed" / "state.json").read_text())["step"] == 4
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    learned(tmp_path / "killed", steps=1)
    assert torch.equal(learned(tmp_path / "killed")[0], whole)
    again = read_log(tmp_path / "killed")
    assert [{**line, "seconds": 0} for line in again] == [{**line, "seconds": 0} for line in log]
    # What has ended is read, not learned again; and nothing else is.
    assert torch.equal(learned(tmp_path / "killed")[0], whole)
    for other in ({"seed": 1}, {"items": 10}, {"batch": 3}):
        with pytest.raises(ValueError, match="was made with .* use another folder"):
            learned(tmp_path / "killed", **other)


def test_processes_that_share_a_batch_learn_what_one_does(tmp_path):
    """A question counts as much as it has terms, wherever it is learned from."""
    barrier, sums, found = threading.Barrier(2), {}, {}

    class Meeting(Processes):
        def wait(self):
            barrier.wait()

        def total(self, tensors):
            sums[self.rank] = torch.cat([one.flatten() for one in tensors])
            barrier.wait()
            both = sums[0] + sums[1]
            barrier.wait()
            for one, part in zip(tensors, both.split([one.numel() for one in tensors]), strict=True):
                one.copy_(part.view_as(one))

    def work(rank):
        found[rank] = learned(tmp_path / "shared", processes=Meeting(rank, 2))[0]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone, _ = learned(tmp_path / "alone")
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], alone)
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("shared", "alone")]
    assert losses[0] == pytest.approx(losses[1])


def test_what_is_shared_comes_one_after_another_and_every_process_has_its_part():
    items = [f"{picture}{number}" for number in range(3) for picture in "abcdefgh"]
    order = [items[place] for place in shuffled(items, lambda item: item[0], "0 1")]
    assert sorted(order) == sorted(items) and order != sorted(items)
    assert [item[0] for item in order[::3]] == [item[0] for item in order[2::3]], "pictures stay whole"
    assert order != [items[place] for place in shuffled(items, lambda item: item[0], "0 2")]
    parts = [Processes(rank, 3).part(order[:10]) for rank in range(3)]
    assert [*parts[0], *parts[1], *parts[2]] == order[:10] and {len(part) for part in parts} == {3, 4}


def test_the_rate_goes_up_in_a_line_and_down_in_a_cosine():
    rates = [scale(step, 100, 0.03) for step in range(100)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1]) and rates[-1] < 1e-3
    assert rates[51] == pytest.approx((1 + math.cos(math.pi * 48 / 97)) / 2) and rates[3:] == sorted(rates[3:])[::-1]


def test_a_gradient_that_is_no_number_ends_the_run(tmp_path):
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="gradient of step 0 is nan; a lower rate"):
        fit(tmp_path, {"weight": weight}, [0], lambda *_: Loss((weight * math.nan).sum(), 1), Recipe(0.1, 1))
    with pytest.raises(ValueError, match="no question is left"):
        fit(tmp_path, {"weight": weight}, [], lambda *_: NOTHING, Recipe(0.1, 1))


# -- stages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["state.json", "state-2.safetensors", "trained.safetensors"])
@pytest.mark.parametrize("content", [None, b"{}", b"cut off"])
def test_a_damaged_state_is_named(tmp_path, monkeypatch, file, content):
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    learned(tmp_path, steps=None if file == "trained.safetensors" else 3)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    elif file != "state-2.safetensors":
        learned(tmp_path)  # none of the two is a run that has not begun
        return
    with pytest.raises(ValueError, match="is damaged .*; without it the stage begins anew"):
        learned(tmp_path)


def test_a_file_that_the_disk_does_not_take_is_named_and_not_left(tmp_path):
    resource = pytest.importorskip("resource")
    loop.put_tensors(tmp_path / "own.safetensors", {"a": torch.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="own.safetensors cannot be written"):
            loop.put_tensors(tmp_path / "own.safetensors", {"a": torch.ones(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]
    assert load_file(tmp_path / "own.safetensors")["a"].shape == (3,)


def test_scenes_are_found_by_id_and_are_no_evaluations():
    pool = Pool("scenes:130", 7)
    every = list(pool)
    assert len(every) == 7 == len({one.id for one in every}) == len(pool)
    for one in (every[0], every[6]):
        same = pool[one.id]
        assert (same.question, same.answer, same.boxes) == (one.question, one.answer, one.boxes)
        assert same.image().tobytes() == one.image().tobytes()
    assert all(int(one.id.split("-")[1]) >= 10_000_000 for one in every)
    assert [one.id for one in scene_questions(3, (120, 140), "few")][:2] == ["few-3-0", "few-3-1"]
    with pytest.raises(ValueError, match="want scenes:TOKENS, or FORMAT:PATH"):
        Pool("scenes")
    assert Pool("scenes:130", 3).of(one.id for one in reversed(every)) == sorted(one.id for one in every[:3])


def test_a_file_of_questions_is_a_pool(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    rows = [
        {"id": "x", "question": "What color is it?", "labels": "red", "image_path": "a.png"},
        {"id": "y"},
        {"id": "z", "question": "Where?", "labels": "left", "image_path": "a.png"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    pool = Pool(f"list:{tmp_path / 'list.json'}")
    assert [one.id for one in pool] == ["x", "z"] and pool["z"].answer == "left" and pool.of("zyx") == ["x", "z"]
    assert [one.id for one in pool.bad] == ["y"]
    (tmp_path / "list.json").write_text(json.dumps(rows[1:2]))
    with pytest.raises(ValueError, match="list.json has no question; data: "):
        Pool(f"list:{tmp_path / 'list.json'}")


SMALL = Settings(
    layer=1, heads=Heads("question", {1: (0, 1)}), label_tokens=60, budgets=(40, 60), routes=(20, 30, 40, 60),
    min_tokens=20, max_new_tokens=3, labels=TriState(largest=2.0, least_peak=0.0, background=0.5),
    region=Recipe(1e-2, 2), tuning=Recipe(1e-3, 2), gate=Recipe(1e-2, 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint that has other branches already, in shards."""
    return save(tmp_path_factory.mktemp("base"), with_branches("qwen3_vl"), prefix="model.language_model.", shards=True)


@pytest.fixture
def questions(tmp_path):
    rows = []
    for number in range(4):
        picture(200 + 10 * number, 150, number).save(tmp_path / f"{number}.png")
        text = f"What color is thing {number}?"
        rows.append({"id": str(number), "question": text, "labels": "red", "image_path": f"{number}.png"})
    (tmp_path / "list.json").write_text(json.dumps(rows))
    return f"list:{tmp_path / 'list.json'}"


def test_all_stages_make_a_checkpoint_that_answers_as_what_was_trained(base, questions, tmp_path, monkeypatch):
    out = tmp_path / "out"
    # Random replies are neither right nor consistent.
    monkeypatch.setattr(q_zoom, "verdict", lambda record, method, scorer: method == "plain")
    monkeypatch.setattr(
        q_zoom, "routes", lambda found, *_: [Route(one["id"], number % 2) for number, one in enumerate(found)]
    )

    def begun():
        adapter = load(base, device="cpu", dtype="float32")
        return adapter, Training(adapter, Pool(questions), out, SMALL)

    adapter, training = begun()
    assert training.save() is None
    with pytest.raises(ValueError, match="no trained region branch; run the stage region first"):
        training.tuning()
    with pytest.raises(ValueError, match="labels: there are none in"):
        training.region()
    before = {name: one.clone() for name, one in adapter.model.state_dict().items()}
    training.labels()
    training.region()
    now = adapter.language_model.state_dict()
    for name, one in before.items():
        inner = name.removeprefix("model.language_model.")
        if not inner.startswith("twig_layers."):
            assert torch.equal(now.get(inner, one), one), f"{name} was frozen"
    assert not torch.equal(now["twig_layers.0.mlp.up_proj.weight"], now["layers.1.mlp.up_proj.weight"])
    dead = [
        name
        for name in now
        if name.startswith("twig_layers.2.") and "layernorm" not in name and "q_" not in name and "k_" not in name
    ]
    assert len(dead) == 5 and all(
        torch.equal(now[name], now[name.replace("twig_layers.2", "layers.3")]) for name in dead
    )

    # Each by itself, in a process of its own.
    for stage in ("tuning", "gate"):
        adapter, training = begun()
        getattr(training, stage)()
        folder = training.save()
        assert json.loads((folder / "config.json").read_text())["enable_high_res"] is (stage == "gate")
    assert not torch.equal(
        adapter.language_model.layers[3].mlp.up_proj.weight, before["model.language_model.layers.3.mlp.up_proj.weight"]
    )
    assert torch.equal(adapter.language_model.norm.weight, before["model.language_model.norm.weight"])
    mined = [json.loads(line) for line in (out / "mined.jsonl").read_text().splitlines()[1:]]
    assert all(one["zoomed"] and set(one["replies"]) == {"plain", "q-zoom"} for one in mined)

    fields = json.loads((folder / "config.json").read_text())
    assert fields["enable_twig"] and fields["enable_high_res"] and (fields["twig_K"], fields["twig_T"]) == (1, 3)
    assert fields["reuse_src_pos"] is True
    loaded = load(folder, device="cpu", dtype="float32")
    assert loaded.notes == ()
    mine, theirs = loaded.language_model.state_dict(), adapter.language_model.state_dict()
    settings = QZoomSettings(gate_threshold=0.0, region_threshold=0.4, reuse_src_pos=True)
    preset = Preset(settings, RUN, AnswerSettings(max_new_tokens=4))
    answers = [QZoom(one, preset).ask(IMAGE, QUESTION) for one in (loaded, adapter)]
    mine = loaded.language_model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert answers[0].text == answers[1].text
    torch.testing.assert_close(answers[0].evidence[0].maps, answers[1].evidence[0].maps)

    # A gate of another model than the tuned one is none of it.
    with monkeypatch.context() as other:
        other.setattr(Training, "_tuned", lambda self: False)
        assert not json.loads((training.save() / "config.json").read_text())["enable_high_res"]

    # Nothing is done twice.
    monkeypatch.setattr(q_zoom, "recorded", lambda ask, samples: [1 / 0 for _ in samples])
    monkeypatch.setattr(q_zoom, "encoded", None)
    adapter, training = begun()
    for stage in ("labels", "region", "gate"):
        getattr(training, stage)()
    assert torch.equal(adapter.language_model.high_res_head.weight, theirs["high_res_head.weight"])


@pytest.mark.parametrize("kept, encodings", [(0, 12), (2**30, 4)])
def test_images_are_encoded_once_as_long_as_there_is_room(base, questions, tmp_path, monkeypatch, kept, encodings):
    monkeypatch.setattr(q_zoom, "KEPT", kept)
    thrice = replace(SMALL, budgets=(40,), region=replace(SMALL.region, epochs=3))
    training = Training(load(base, device="cpu", dtype="float32"), Pool(questions), tmp_path, thrice)
    training.labels()
    calls = []
    monkeypatch.setattr(q_zoom, "encoded", lambda *seen: calls.append(seen) or encoded(*seen))
    training.region()
    assert len(calls) == encodings
    losses = [line["loss"] for line in read_log(tmp_path / "region")]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_two_processes_label_a_part_of_the_pictures_each(base, questions, tmp_path):
    adapter = load(base, device="cpu", dtype="float32")

    class Two(Processes):
        def wait(self):
            pass

    for rank in (0, 1):
        Training(adapter, Pool(questions), tmp_path / "out", SMALL, processes=Two(rank, 2)).labels()
    training = Training(adapter, Pool(questions), tmp_path / "out", SMALL)
    assert [one["id"] for one in training._records("labels")] == ["0", "1", "2", "3"]
    files = sorted(path.name for path in (tmp_path / "out").glob("labels*.jsonl"))
    assert files == ["labels-1.jsonl", "labels.jsonl"]
    alone = Training(adapter, Pool(questions), tmp_path / "alone", SMALL)
    alone.labels()
    assert alone._records("labels") == training._records("labels")


def test_a_picture_that_fails_costs_its_own_questions(base, questions, tmp_path):
    (tmp_path / "1.png").write_bytes(b"no picture")
    adapter = load(base, device="cpu", dtype="float32")
    notes = []
    training = Training(adapter, Pool(questions), tmp_path / "out", SMALL, note=notes.append)
    training.labels()
    training.region()
    assert [one["id"] for one in training._records("labels")] == ["0", "2", "3"]
    assert notes[0].startswith("labels: 1 of 4 questions failed and are left out; the first, 1: ValueError: image: ")


def test_what_a_stage_reads_is_of_the_same_model_questions_and_layers(base, questions, tmp_path):
    out = tmp_path / "out"
    adapter = load(base, device="cpu", dtype="float32")
    Training(adapter, Pool(questions), out, SMALL).labels()
    with pytest.raises(ValueError, match="labels.jsonl was made with other settings .data: 'list:.*, 'scenes:60' now"):
        Training(adapter, Pool("scenes:60", 4), out, SMALL).region()
    Training(adapter, Pool(questions), out, SMALL).region()
    for wrong, message in (
        (replace(SMALL, layer=2, depth=2), "depth: 3 there, 2 now; layer: 1 there, 2 now"),
        (replace(SMALL, depth=2), "region was made with other settings .depth: 3 there, 2 now"),
    ):
        training = Training(adapter, Pool(questions), out, wrong)
        for reading in (training.save, training.tuning):
            with pytest.raises(ValueError, match=message):
                reading()
    # One question is another one now, and so is its label.
    rows = json.loads((tmp_path / "list.json").read_text())
    rows[0]["question"] = "Where is thing 0?"
    (tmp_path / "list.json").write_text(json.dumps(rows))
    training = Training(adapter, Pool(questions), out, SMALL)
    training.labels()
    with pytest.raises(ValueError, match="region was made with other settings .learned: "):
        training.region()
    lines = (out / "labels.jsonl").read_text().splitlines()[1:]
    (out / "labels-2.jsonl").write_text(lines[0] + "\n" + lines[1])
    with pytest.raises(ValueError, match="labels-2.jsonl does not begin with what it was made with"):
        training.region()
    (out / "labels-2.jsonl").unlink()
    # Files of processes that a later run has not.
    (out / "labels.jsonl").rename(out / "labels-1.jsonl")
    with pytest.raises(ValueError, match="labels-1.jsonl was made with other settings .tokens: 60 there, 50 now"):
        Training(adapter, Pool(questions), out, replace(SMALL, label_tokens=50)).labels()


def test_the_checkpoint_asks_for_the_positions_that_the_model_was_tuned_with(base, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(q_zoom, "verdict", lambda record, method, scorer: method == "plain")
    adapter = load(base, device="cpu", dtype="float32")
    training = Training(adapter, Pool(questions), tmp_path / "out", replace(SMALL, reuse_src_pos=False))
    for stage in (training.labels, training.region, training.tuning):
        stage()
    folder = Training(adapter, Pool(questions), tmp_path / "out", SMALL).save()
    assert json.loads((folder / "config.json").read_text())["reuse_src_pos"] is False


def test_one_run_at_a_time_learns_in_a_folder(base, questions, tmp_path):
    adapter = load(base, device="cpu", dtype="float32")
    training = Training(adapter, Pool(questions), tmp_path / "out", SMALL)
    training.labels()
    with (
        loop.held(tmp_path / "out" / "region", loop.ALONE),
        pytest.raises(ValueError, match="region: another run is learning in"),
    ):
        training.region()
    training.region()
    assert not list((tmp_path / "out").glob("*.lock"))


def test_a_checkpoint_takes_no_other_folders_place(base, questions, tmp_path):
    adapter = load(base, device="cpu", dtype="float32")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="is no checkpoint of Q-Zoom's, and would be replaced"):
        Training(adapter, Pool(questions), tmp_path, SMALL)
    assert (tmp_path / "checkpoint" / "mine.txt").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint").symlink_to(base)
    with pytest.raises(ValueError, match="is the model that is trained, and would be replaced"):
        Training(adapter, Pool(questions), tmp_path / "out", SMALL)


def test_branches_and_head_have_their_places_in_older_layouts(tmp_path):
    text = "language_model.model."
    own = {
        f"{text}layers.0.input_layernorm.weight": torch.ones(2),
        f"{text}layers.0.self_attn.q_proj.weight": torch.ones(2, 2, dtype=torch.bfloat16),
        "language_model.lm_head.weight": torch.ones(3, 2),
    }
    files = {"model-1.safetensors": own, "model-2.safetensors": {f"{text}twig_layers.0.a": torch.ones(1)}}
    (tmp_path / "base").mkdir()
    for file, tensors in files.items():
        save_file(tensors, tmp_path / "base" / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "base" / "config.json").write_text("{}")
    branches = copied_branches(FAMILIES["llava"](), 1, 2)
    save_checkpoint(tmp_path / "new", tmp_path / "base", branches, {"lm_head.weight": torch.zeros(3, 2)})
    first, last = (load_file(tmp_path / "new" / file) for file in files)
    assert first.keys() == own.keys() and not first["language_model.lm_head.weight"].any()
    assert f"{text}twig_layers.0.a" not in last
    assert {one.dtype for one in last.values()} == {torch.bfloat16}, "as the model's layers, and not as its norms"


def test_a_tied_head_that_is_written_down_twice_is_tuned_twice(tmp_path):
    own = {
        "model.layers.0.input_layernorm.weight": torch.ones(2),
        "model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2),
        "model.embed_tokens.weight": torch.ones(3, 2),
        "lm_head.weight": torch.ones(3, 2),
    }
    (tmp_path / "base").mkdir()
    save_file(own, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    branches = copied_branches(FAMILIES["qwen2_5_vl"](), 1, 2)
    save_checkpoint(tmp_path / "new", tmp_path / "base", branches, {"embed_tokens.weight": torch.zeros(3, 2)})
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert not found["model.embed_tokens.weight"].any() and not found["lm_head.weight"].any()


def test_layers_that_there_are_not_are_refused():
    for layer, depth in ((2, 3), (0, 2), (-1, 2), (1, 1)):
        with pytest.raises(ValueError, match=f"layer, depth: got {layer} and {depth}, and the model has 4 layers to"):
            copied_branches(FAMILIES["qwen2_5_vl"](), layer, depth)


def test_quantised_layers_are_not_copied():
    adapter = FAMILIES["qwen2_5_vl"]()
    adapter.model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="its weights are quantised"):
        copied_branches(adapter, 1, 2)


def test_settings_are_changed_by_name():
    settings = Settings().changed({"region.rate": 1e-3, "budgets": [500], "depth": 2, "labels.sink": 0.1})
    assert settings.region == replace(Settings().region, rate=1e-3) and settings.budgets == (500,)
    assert settings.labels.sink == 0.1 and settings.run(500) == RunSettings(min_tokens=500, max_tokens=500)
    for wrong in ({"region.speed": 1}, {"colour": 1}):
        with pytest.raises(ValueError, match="set: there is no"):
            Settings().changed(wrong)
    with pytest.raises(TypeError, match="region.rate: got 'fast', want float, such as 0.0001"):
        Settings().changed({"region.rate": "fast"})
    with pytest.raises(ValueError, match="at least three that ascend"):
        Settings(routes=(64, 64, 128))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"label_tokens": 0}, "label_tokens: got 0, want at least 1"),
        ({"min_tokens": 0}, "min_tokens: got 0, want at least 1"),
        ({"most_routes": 0}, "most_routes: got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"region.rate": math.inf}, "recipe: got"),
        ({"labels.foreground": -1}, "labels: got .* want sink above 0"),
        ({"labels.sink": math.nan}, "labels: got .* want sink above 0"),
        ({"labels.largest": 0.0}, "labels: got .* want largest above 0"),
        ({"labels.least_peak": math.nan}, "labels: got .* want largest above 0"),
        ({"labels": 3}, "set: labels has parts: labels.sink, labels.foreground"),
        ({"heads": 3}, "`--heads` takes a file of them"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings().changed(wrong)


def test_llavas_crops_have_no_place_inside_their_source():
    assert not settings_for(FAMILIES["llava"]()).reuse_src_pos and settings_for(FAMILIES["qwen3_vl"]()).reuse_src_pos


# -- the released data --------------------------------------------------------------------------------------------------


class Harm:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_is_read_as_arrays_and_nothing_else(tmp_path, capsys):
    file = tmp_path / "labels.pkl"
    value = [{"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(2), "c": None, "d": "text"}]
    for protocol in range(6):
        file.write_bytes(pickle.dumps(value, protocol))
        (found,) = read_pickle(file)
        assert np.array_equal(found["a"], value[0]["a"]) and found["b"] == 2 and found["d"] == "text"
    for wrong, message in ((Harm(), "it names builtins.print"), (torch.ones(1), "it names torch._utils")):
        file.write_bytes(pickle.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            read_pickle(file)
    file.write_bytes(b"text")
    with pytest.raises(ValueError, match="labels.pkl"):
        read_pickle(file)
    assert "run" not in capsys.readouterr().out


def test_released_labels_are_cut_to_the_picture_and_trained_on(tmp_path):
    picture(480, 240).save(tmp_path / "wide.png")
    grounding, sinks = blob().numpy(), np.zeros((24, 24), np.float32)
    entry = {
        "uid": 1,
        "image": "wide.png",
        "prompt": "What is it?",
        "text": "a dog",
        "sink_attn": sinks,
        "grounding_attn_o2i": grounding,
    }
    (tmp_path / "labels.pkl").write_bytes(pickle.dumps([entry]))
    command = convert(tmp_path / "labels.pkl", tmp_path, tmp_path / "out")
    line = json.loads((tmp_path / "out" / "labels.jsonl").read_text().splitlines()[1])
    assert line["grid"] == [12, 24] and "--stages region" in command
    outside = torch.ones(24, 24, dtype=torch.bool)
    outside[6:18] = False
    assert torch.equal(from_text(line["labels"], line["grid"]), tri_state(blob(), torch.zeros(24, 24), outside)[6:18])
    pool = Pool(f"list:{tmp_path / 'out' / 'questions.json'}")
    assert pool["0"].question.text == "What is it?" and pool["0"].image().size == (480, 240)


def test_released_answers_are_routes(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    entry = {
        "id": 7,
        "image": "a.png",
        "prompt": "What?\n(A) red\n(B) blue",
        "text": "A",
        "res": [64, 128, 256],
        "ms_answers": ["B", "A", "A"],
    }
    out = tmp_path / "with a blank"
    (tmp_path / "routes.pkl").write_bytes(pickle.dumps({7: entry, 8: {**entry, "image": "none.png"}}))
    command = shlex.split(convert(tmp_path / "routes.pkl", tmp_path, out))
    line, missing = map(json.loads, (out / "routes.jsonl").read_text().splitlines()[1:])
    assert routes([line], (64, 128, 256), 9, 0) == [Route("0", 1)] and "FileNotFoundError" in missing["error"]
    assert command[3:5] == ["--data", f"list:{out / 'questions.json'}"] and command[-1] == "routes=(64, 128, 256)"
    assert Pool(command[4])["0"].question.options == ("red", "blue")
    for wrong, message in (
        ({"res": [128, 64, 256]}, "do not ascend"),
        ({"text": ...}, "record 1 of .*: it has no 'text'"),
    ):
        other = {name: value for name, value in {**entry, **wrong}.items() if value is not ...}
        (tmp_path / "routes.pkl").write_bytes(pickle.dumps([entry if "text" in wrong else other, other]))
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "routes.pkl", tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# -- commands -----------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_trains_the_embedded_model_and_goes_on(tmp_path):
    small = (
        "--set",
        "label_tokens=60",
        "--set",
        "budgets=(40,)",
        "--set",
        "region.epochs=1",
        "--set",
        "region.batch=2",
    )
    more = ("--data", "scenes:60", "--limit", "3", "--out", tmp_path / "out", *small)
    done = run("train", "q-zoom", "--stages", "labels", *more)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out" / "checkpoint").exists()
    done = run("train", "q-zoom", "--stages", "labels,region", *more)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "losses.png").stat().st_size > 5000
    config = json.loads((tmp_path / "out" / "checkpoint" / "config.json").read_text())
    assert (
        (config["twig_K"], config["twig_T"]) == (1, 2)
        and not config["enable_high_res"]
        and config["hide_preset"] == "tiny"
    )
    answer = QZoom(load(tmp_path / "out" / "checkpoint", device="cpu")).ask(IMAGE, QUESTION)
    assert answer.details["gate"] is None and len(answer.evidence[0].maps) == 1
    for wrong, message in (
        (("--stages", "regions"), "want some of labels, region, tuning, gate"),
        (("--set", "region.rat=1"), "there is no region.rat"),
        (("--weights", "int8"), "copies of layers that are not quantised"),
        (("--heads", "boxes"), "none are published for qwen2_5_vl of width 192"),
    ):
        done = run("train", "q-zoom", *more, *wrong)
        assert done.exit_code == 1 and message in " ".join(done.output.split())


def test_of_several_processes_the_one_that_an_error_ends_says_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = run("train", "q-zoom", "--stages", "regions", "--out", tmp_path)
    assert done.exit_code == 1 and "want some of labels" in done.output


def test_the_command_says_what_it_leaves_out(tmp_path):
    rows = [{"id": "x", "question": "What color is it?", "labels": "red", "image_path": "none.png"}, {"id": "y"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    data = f"list:{tmp_path / 'list.json'}"
    done = run("train", "q-zoom", "--data", data, "--stages", "labels,region", "--out", tmp_path / "out")
    said = " ".join(done.output.split())
    assert done.exit_code == 1 and "1 records are no questions and left out; the first: data: " in said
    assert "1 of 1 questions failed and are left out; the first, x: FileNotFoundError: " in said


def test_heads_are_chosen_by_calibration(tmp_path, small_scenes):
    done = run("calibrate", "--heads", "--limit", "2", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    heads = Heads.read(tmp_path / "heads.json")
    heads.check(load(q_zoom_base(), device="cpu"))
    assert 1 <= sum(map(len, heads.grounding.values())) <= GROUNDING
    assert "Heads that look at what is asked about" in (tmp_path / "summary.md").read_text()


def q_zoom_base():
    from hide.tiny import CHECKPOINT

    return CHECKPOINT
