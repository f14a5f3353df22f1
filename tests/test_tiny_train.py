"""The embedded model's training: batches say what they claim, a stopped run goes on as if it had not stopped."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hide.tiny.model import build, build_tokenizer, load
from hide.tiny.scenes import COLORS, KINDS
from training.data import IGNORED, Stage, make_batch, prefix_ids
from training.train import Heads, losses, train

STAGES = (
    Stage("vision", 2, 1e-3, 1e-4, (4, 5), (2, 3), 40, text=False),
    Stage("text", 2, 1e-3, 1e-4, (4, 5), (2, 3), 40, collages=1.0, letters=0.5, farthest=9),
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_batch(tokenizer):
    batch = make_batch(STAGES[1], 0, 7, tokenizer)
    again, other = (make_batch(STAGES[1], 0, step, tokenizer) for step in (7, 8))
    assert torch.equal(batch.images, again.images)
    assert batch.images.shape != other.images.shape or not torch.equal(batch.images, other.images)
    size, tokens = len(batch.images), batch.rows * batch.columns
    assert batch.images.shape == (size, batch.rows * 28, batch.columns * 28, 3)
    assert batch.kinds.shape == batch.colors.shape == (size, tokens)
    assert int(batch.kinds.max()) <= len(KINDS)
    text = batch.text
    count, height, width = text.collages.shape[1:4]
    slots, forms = height * width // 28**2, set()
    assert count >= 1
    start = len(prefix_ids(tokenizer)) + max(batch.rows, batch.columns) + 1
    for i in range(size):
        for number in range(int(text.branch[i].max()) + 1):
            mine = text.branch[i] == number
            words, wanted = text.ids[i][mine], text.labels[i][mine]
            said = tokenizer.decode(words.tolist())
            assert said.count("<|image_pad|>") == (slots if number < count else 0)
            if number < count:
                shown = text.ids[i][text.collage_tokens[i, number]]
                assert set(tokenizer.convert_ids_to_tokens(shown.tolist())) == {"<|image_pad|>"}
                assert set(text.branch[i][text.collage_tokens[i, number]].tolist()) == {number}
            # A label is the token that follows.
            spoken = torch.nonzero(wanted != IGNORED).flatten()
            assert torch.equal(wanted[spoken], words[spoken + 1])
            if number == count:
                assert said.startswith("Please search the images for these objects: ")
                assert not len(spoken)
            else:
                assert tokenizer.decode(wanted[spoken].tolist()).endswith("<|im_end|>")
            shift = int(text.positions[0, i, mine][0]) - start
            assert 0 <= shift <= (STAGES[1].farthest if number < count else 0)
            forms.add((number < count, shift > 0))
            # Lettered: one option is right, and it is the one that the letter names.
            options = text.right_options[i][mine]
            if (options != IGNORED).any():
                right = tokenizer.decode([int(words[options == 1])]).strip()
                letter = tokenizer.decode([int(wanted[spoken[0]])])
                assert f"({letter}) {right}\n" in said
        for e in range(text.words.shape[1]):
            word, color, cells = text.words[i, e], text.word_colors[i, e], text.word_cells[i, e]
            if color != IGNORED:
                kind = KINDS.index(tokenizer.decode([int(text.ids[i, word])]).strip())
                inside = batch.kinds[i][cells[:tokens]]
                assert set(inside.tolist()) <= {kind, IGNORED, len(KINDS)}
                which = int(text.word_collage[i, e])
                assert which == (int(text.branch[i, word]) if text.branch[i, word] < count else -1)
                assert cells[tokens:].any() == (which >= 0) != cells[:tokens].any()
                if which >= 0:
                    blocks = text.collages[i, which].unflatten(1, (-1, 28)).unflatten(0, (-1, 28)).transpose(1, 2)
                    pixels = blocks.flatten(0, 1)[cells[tokens:]].int()
                    assert ((pixels - torch.tensor(list(COLORS.values())[color])).abs().amax(-1) < 40).any()
    assert {(True, True), (False, False)} <= forms


def test_branches_do_not_see_each_other(tokenizer):
    model = build()[0]
    heads = Heads(model.config.text_config.hidden_size)
    batch = make_batch(STAGES[1], 0, 3, tokenizer)
    with torch.no_grad():
        before = losses(model, heads, tokenizer, batch).log
        labels = batch.text.labels
        last = batch.text.branch == batch.text.branch.max(dim=1, keepdim=True).values
        labels[last] = IGNORED
        first = losses(model, heads, tokenizer, batch).log["answer_loss"]
        batch.text.ids[last & (batch.text.ids > 20)] = 5
        assert losses(model, heads, tokenizer, batch).log["answer_loss"] == first != before["answer_loss"]


def test_a_stopped_run_goes_on(tmp_path):
    # A batch's pictures, questions and collages are those of the tests above; here one of each is enough.
    vision, text = (replace(stage, image_tokens=20, max_questions=1, collage_side=4) for stage in STAGES)
    stages = vision, replace(text, steps=1)
    train(tmp_path / "once", seed=3, threads=1, stages=stages)
    train(tmp_path / "twice", seed=3, threads=1, stages=stages[:1])
    train(tmp_path / "twice", seed=3, threads=1, stages=stages)
    states = []
    for name in ("once", "twice"):
        state = json.loads((tmp_path / name / "state.json").read_text())
        assert (state["stage"], state["step"]) == (2, 0)
        states.append(load_file(tmp_path / name / state["file"]))
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], msg=key)
    assert (tmp_path / "once" / "curves.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (tmp_path / "twice" / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["vision", "text"]
    model = load(tmp_path / "once" / "checkpoint")[0]
    assert model.get_input_embeddings().weight.dtype == torch.float32
