"""The embedded model's training: batches say what they claim, a stopped run goes on as if it had not stopped."""

import json
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hide.methods.prompts import BOX_REQUEST, RECHECKED_FORM, ZOOM_REFINE_ASK, ZOOM_REFINE_RECHECK, filled
from hide.models.qwen2_5_vl import Qwen25VL
from hide.questions import Question
from hide.tiny.model import build, build_tokenizer, load
from hide.tiny.scenes import COLORS, KINDS, PLURALS
from training.data import IGNORED, SORTS, Stage, make_batch, prefix_ids
from training.train import STAGES, Heads, _rate, _Run, losses, main, train

ASKS = (("attribute", 2.0), ("position", 1.0), ("existence", 1.0), ("box", 1.0), ("search", 1.0), ("general", 1.0))
VISION = Stage("vision", 2, 1e-3, 1e-4, ((1.0, (4, 5)),), (2, 3), 40, text=False)
COLLAGES = Stage(
    "text", 2, 1e-3, 1e-4, ((1.0, (4, 5)),), (2, 3), 40, ASKS, letters=0.5, second=(("collage", 1.0),), farthest=9
)
TURNS = replace(COLLAGES, second=(("two-turn", 1.0),), letters=1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("stage", [COLLAGES, TURNS], ids=["collages", "turns"])
def test_batch(tokenizer, stage):
    batch = make_batch(stage, 0, 7, tokenizer)
    again, other, beside = (
        make_batch(stage, 0, *which) for which in ((7, tokenizer), (8, tokenizer), (7, tokenizer, 1))
    )
    assert torch.equal(batch.images, again.images) and torch.equal(batch.text.ids, again.text.ids)
    assert batch.images.shape != other.images.shape or not torch.equal(batch.images, other.images)
    # Of two processes: other pictures of one size.
    assert batch.images.shape == beside.images.shape and not torch.equal(batch.images, beside.images)
    size, tokens = len(batch.images), batch.rows * batch.columns
    assert batch.images.shape == (size, batch.rows * 28, batch.columns * 28, 3)
    assert batch.kinds.shape == batch.colors.shape == (size, tokens)
    assert int(batch.kinds.max()) <= len(KINDS)
    assert torch.equal(batch.edges.isnan().any(-1), batch.edges.isnan().all(-1))
    known = batch.edges[~batch.edges.isnan().any(-1)]
    assert (known[:, :2] < 0.5).all() and (known[:, 2:] > -0.5).all() and len(known)
    text = batch.text
    count, height, width = text.collages.shape[1:4]
    slots, said_all = height * width // 28**2, []
    assert count == 1
    start = len(prefix_ids(tokenizer)) + max(batch.rows, batch.columns) + 1
    for i in range(size):
        for number in range(int(text.branch[i].max()) + 1):
            mine = text.branch[i] == number
            words, wanted, sorts = text.ids[i][mine], text.labels[i][mine], text.sorts[i][mine]
            said = tokenizer.decode(words.tolist())
            said_all.append(said)
            assert said.count("<|image_pad|>") == (slots if number == 0 else 0)
            if number == 0:
                shown = text.ids[i][text.collage_tokens[i, number]]
                assert set(tokenizer.convert_ids_to_tokens(shown.tolist())) == {"<|image_pad|>"}
                assert set(text.branch[i][text.collage_tokens[i, number]].tolist()) == {number}
            # A label is the token that follows, and has a sort.
            spoken = torch.nonzero(wanted != IGNORED).flatten()
            assert torch.equal(wanted[spoken], words[spoken + 1])
            assert torch.equal(wanted != IGNORED, sorts != IGNORED)
            if said.startswith("Please search"):
                assert not len(spoken)
            else:
                assert tokenizer.decode(wanted[spoken].tolist()).endswith("<|im_end|>")
            shift = int(text.positions[0, i, mine][0]) - start
            assert 0 <= shift <= (stage.farthest if number == 0 else 0)
            for place in spoken.tolist():
                sort, token = SORTS[int(sorts[place])], tokenizer.decode([int(wanted[place])])
                assert (sort == "box") == bool(re.fullmatch(r"[01]\.\d\d", token))
                if sort in ("letter", "collage_letter", "first"):
                    assert token in "ABCDE"
            # Lettered: one option is right, and it is the one that the letter names.
            options = text.right_options[i][mine]
            if (options != IGNORED).any():
                right = tokenizer.decode([int(words[options == 1])]).strip()
                letter = re.search(rf"\b([A-E])[).] {right}\n", said)[1]
                named = [place for place in spoken.tolist() if "letter" in SORTS[int(sorts[place])]]
                if stage is TURNS and number == 0:
                    named = [place for place in spoken.tolist() if SORTS[int(sorts[place])] in ("first", "recheck")]
                    assert RECHECKED_FORM.format(answer=letter) in said
                assert named and {tokenizer.decode([int(wanted[place])]) for place in named} == {letter}
        for e in range(text.words.shape[1]):
            word, color, cells = text.words[i, e], text.word_colors[i, e], text.word_cells[i, e]
            if color != IGNORED:
                named = tokenizer.decode([int(text.ids[i, word])]).strip()
                kind = next(k for k, one in enumerate(KINDS) if named in (one, PLURALS[one]))
                inside = batch.kinds[i][cells[:tokens]]
                assert set(inside.tolist()) <= {kind, IGNORED, len(KINDS)}
                which = int(text.word_collage[i, e])
                assert (text.word_boxes[i, e] == IGNORED).all() == (which >= 0)
                if which < 0:
                    x0, y0, x1, y1 = (text.word_boxes[i, e] * torch.tensor([batch.columns, batch.rows] * 2)).tolist()
                    seen = cells[:tokens].view(batch.rows, batch.columns)
                    assert seen[(y0 + y1) // 200, (x0 + x1) // 200]
                assert which == (0 if text.branch[i, word] == 0 and stage is COLLAGES else -1)
                assert cells[tokens:].any() == (which >= 0) != cells[:tokens].any()
                if which >= 0:
                    blocks = text.collages[i, which].unflatten(1, (-1, 28)).unflatten(0, (-1, 28)).transpose(1, 2)
                    pixels = blocks.flatten(0, 1)[cells[tokens:]].int()
                    assert ((pixels - torch.tensor(list(COLORS.values())[color])).abs().amax(-1) < 40).any()
    assert any(said.startswith("Where is the ") for said in said_all)
    if stage is TURNS:
        said = said_all[0]
        stem, options = said[: said.index("\n")], tuple(re.findall(r"^\([A-E]\) (\w+)$", said, re.M))
        for template in (ZOOM_REFINE_ASK, ZOOM_REFINE_RECHECK):
            assert filled(template, Question(stem, options)) in said


@pytest.mark.parametrize("stage", [COLLAGES, TURNS], ids=["collages", "turns"])
def test_conversations_are_those_of_sessions(stage):
    """The tokens and, by their number, the places are what `hide` makes of the same images and texts."""
    model = Qwen25VL(*build())
    batch = make_batch(stage, 0, 5, model.tokenizer)
    pixels = [batch.images[0], batch.text.collages[0, 0]]
    picture, second = (model.preprocess([Image.fromarray(one.numpy())], min_tokens=4, max_tokens=999) for one in pixels)
    before = len(prefix_ids(model.tokenizer)) + batch.rows * batch.columns + 1
    for number in range(int(batch.text.branch[0].max()) + 1):
        words = batch.text.ids[0][batch.text.branch[0] == number].tolist()
        said = model.tokenizer.decode(words).replace("<|image_pad|>", "")
        turns = [re.split(re.escape("<|im_end|>\n<|im_start|>assistant\n"), turn) for turn in
                 said.split("<|im_end|>\n<|im_start|>user\n")]  # fmt: skip
        if len(turns[0]) == 1:  # a search prompt
            turns[0].append("")
        shown = [picture] + [second] * (len(turns) - 1)
        if number == 0 and stage is COLLAGES:
            shown[0] = picture + second
        texts = [turn[0].removeprefix("<|vision_start|><|vision_end|>") for turn in turns]
        made = model.conversation(list(zip(texts, shown, strict=True)), [turn[1] for turn in turns[:-1]])
        expected = made.input_ids[0, before:].tolist()
        if said.startswith("Please search"):
            expected = expected[: len(words)]
        assert words[: len(expected)] == expected
        reply = turns[-1][1].removesuffix("<|im_end|>")
        assert model.tokenizer.decode(words[len(expected) : -1]) == reply


def test_every_request_of_the_prompts_is_drawn(tokenizer):
    said = [
        tokenizer.decode(make_batch(COLLAGES, 0, step, tokenizer).text.ids.flatten().tolist()) for step in range(12)
    ]
    for words in (
        BOX_REQUEST,
        "\nAnswer the question using",
        "between <FINAL_OUTPUT>",
        "The best answer is:",
        "Options:",
    ):
        assert any(words in one for one in said), words


def test_the_run_visits_all_sizes():
    sides = [side for stage in STAGES for _, bounds in stage.sizes for side in bounds]
    assert min(sides) <= 4 and max(sides) ** 2 >= 2000
    assert {second for stage in STAGES for second, _ in stage.second} == {"collage", "two-turn"}


def test_branches_do_not_see_each_other(tokenizer):
    model = build()[0]
    heads = Heads(model.config.text_config.hidden_size)
    batch = make_batch(COLLAGES, 0, 3, tokenizer)
    with torch.no_grad():
        before = losses(model, heads, tokenizer, batch).log
        last = batch.text.branch == batch.text.branch.max(dim=1, keepdim=True).values
        batch.text.labels[last] = IGNORED
        first = losses(model, heads, tokenizer, batch).log["answer_loss"]
        batch.text.ids[last & (batch.text.ids > 20)] = 5
        assert losses(model, heads, tokenizer, batch).log["answer_loss"] == first != before["answer_loss"]


def test_attention_is_taught_only_where_it_is_to_be(tokenizer):
    model = build()[0]
    heads = Heads(model.config.text_config.hidden_size)
    batch = make_batch(COLLAGES, 0, 3, tokenizer)
    with torch.no_grad():
        taught = losses(model, heads, tokenizer, batch)
        untaught = losses(model, heads, tokenizer, batch, look_weight=0)
        half = losses(model, heads, tokenizer, batch, look_weight=0.1)
    assert "look_loss" not in untaught.log
    torch.testing.assert_close(taught.loss - untaught.loss, 2 * (half.loss - untaught.loss), rtol=1e-3, atol=1e-4)
    assert taught.loss > untaught.loss


def _state(folder):
    state = json.loads((folder / "state.json").read_text())
    return (state["stage"], state["step"]), load_file(folder / state["file"])


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("training.train._SAVE_EVERY", 2)
    # A batch's pictures, questions and collages are those of the tests above; here one of each is enough, as is one
    # round of the iteration that makes Muon's steps orthogonal.
    small = {"asks": (("attribute", 1.0), ("box", 1.0)), "tokens": 20}
    monkeypatch.setattr("torch.optim.Muon", partial(torch.optim.Muon, ns_steps=1))
    stages = (
        replace(VISION, tokens=20, steps=1),
        replace(COLLAGES, steps=3, **small),
        replace(TURNS, name="turns", steps=1, **small),
    )
    train(tmp_path / "once", seed=3, processes=1, stages=stages)
    # Killed a step behind a save, then at one in the middle of a stage.
    for steps in (2, 2, None):
        train(tmp_path / "often", seed=3, processes=1, stages=stages, steps=steps)
    (place, once), (again, often) = _state(tmp_path / "once"), _state(tmp_path / "often")
    assert place == again == (3, 0)
    assert once.keys() == often.keys()
    assert any(key.startswith("optimizer.") for key in once)
    assert [key for key in once if not torch.equal(once[key], often[key])] == []
    assert (tmp_path / "once" / "curves.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (tmp_path / "once" / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["vision", "text", "turns"]
    model = load(tmp_path / "once" / "checkpoint")[0]
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_two_processes_average_their_gradients(tmp_path):
    stage = replace(VISION, tokens=20, steps=1)
    train(tmp_path / "two", seed=3, processes=2, stages=(stage,))
    torch.set_num_threads(1)
    (tmp_path / "one").mkdir()
    run = _Run(tmp_path / "one", 3)
    for process in (0, 1):
        batch = make_batch(stage, 3, 0, run.tokenizer, process)
        (losses(run.model, run.heads, run.tokenizer, batch).loss / 2).backward()
    run.update(_rate(stage, 0), 1, text=False)
    run.save()
    two, one = (_state(tmp_path / name)[1] for name in ("two", "one"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, msg=key)
    assert not list((tmp_path / "two").glob("meeting-*"))


def test_a_worker_stops_when_its_run_was_killed(tmp_path, monkeypatch):
    dead = SimpleNamespace(is_alive=lambda: False)
    monkeypatch.setattr("torch.multiprocessing.parent_process", lambda: dead)
    train(tmp_path, seed=3, processes=1, stages=(VISION,))
    assert not list(tmp_path.iterdir())


def test_a_short_run_has_the_first_stages_as_they_are(monkeypatch):
    asked = {}
    monkeypatch.setattr("training.train.train", lambda output, **options: asked.update(options))
    monkeypatch.setattr("sys.argv", ["train", "--output", "x", "--until", "few", "--no-attention-loss"])
    main()
    assert asked["stages"] == STAGES[:2] and asked["stages"][-1].name == "few"
    assert asked["look_weight"] == 0 and asked["processes"] == 2
