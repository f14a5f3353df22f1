"""The experiment with training on collages: its losses are those of separate questions, and its tables those of the answers."""

import json

import pytest
import torch
from torch.nn import functional as F

from benchmarks import decoupled_training
from benchmarks.decoupled_training import ARMS, BEFORE, Example, answer_loss, read_examples, tables
from hide.engine.decoder import forward
from hide.methods.hide.method import HiDe
from hide.models import load
from hide.session import preprocess
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT, dtype="float32")


@pytest.fixture()
def example(tmp_path):
    scene = draw_scene(7, 280, 196, objects=3)
    scene.image.save(tmp_path / "image.png")
    for number in range(2):
        scene.image.crop((0, 0, 84 + 56 * number, 84)).save(tmp_path / f"collage{number}.png")
    kinds = [thing.kind for thing in scene.objects]
    asked = (
        (f"What is the color of the {kinds[0]}?", "red", tmp_path / "collage0.png"),
        (f"Is the {kinds[1]} on the left or right side of the {kinds[2]}?", "left", tmp_path / "collage1.png"),
    )
    return Example(tmp_path / "image.png", asked)


@pytest.mark.parametrize("decoupled", [False, True])
def test_an_images_answers_are_learned_together_as_each_behind_its_own_image(model, example, decoupled, monkeypatch):
    monkeypatch.setattr(decoupled_training, "VIEW", 40)
    run = HiDe.preset_for(model)[0].run
    weight = model.language_model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    found = answer_loss(model, example, run, decoupled=decoupled)
    (mine,) = torch.autograd.grad(found.value, weight)
    want, terms = torch.zeros(()), 0
    for prompt, answer, collage in example.asked:
        inputs = preprocess(model, [decoupled_training._rgb(example.image)], run, 40)
        if decoupled:
            inputs = inputs + preprocess(model, [decoupled_training._rgb(collage)], run)
        turn, reply = model.turn(prompt, inputs), model.reply_ids(answer)
        ids = torch.cat([turn.input_ids, reply], 1)
        with torch.no_grad():
            features = model.encode(inputs)
        states = forward(model, ids[:, :-1], model.positions(ids, inputs)[0][..., :-1], features)
        logits = model.model.get_output_embeddings()(states[0, turn.input_ids.shape[1] - 1 :])
        want, terms = want + F.cross_entropy(logits, reply[0], reduction="sum"), terms + reply.shape[1]
    (theirs,) = torch.autograd.grad(want, weight)
    assert found.terms == terms
    torch.testing.assert_close(found.value, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_examples_are_read_by_image_and_without_questions_that_had_no_collage(tmp_path):
    def line(*pictures, text="What?", answer="red"):
        shown = [{"type": "image", "image": name} for name in pictures]
        user = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
        return json.dumps({"messages": [user, {"content": [{"type": "text", "text": answer}]}]})

    lines = [line("a.png", "a1.png"), line("b.png"), line("b.png", "b1.png", text="Where?"), line("a.png", "a2.png")]
    (tmp_path / "messages.jsonl").write_text("\n".join(lines))
    first, second = read_examples(tmp_path / "messages.jsonl")
    assert first.image == tmp_path / "a.png" and [path.name for *_, path in first.asked] == ["a1.png", "a2.png"]
    assert second.asked == (("Where?", "red", tmp_path / "b1.png"),)


def test_arms_are_compared_by_their_means_over_seeds():
    def answers(*right):
        own = {"question": "What?", "options": [], "answer": "red", "error": None}
        return [
            {**own, "picture": str(number), "replies": dict.fromkeys(decoupled_training.WAYS, "red" if yes else "blue")}
            for number, yes in enumerate(right)
        ]

    models = {
        BEFORE: answers(True, False, False, False),
        "images-0": answers(True, True, False, False),
        "decoupled-0": answers(True, True, True, False),
        "images-1": answers(True, True, False, True),
    }
    assert len(tables(models)) == 1, "the arms have not as many models"
    models["decoupled-1"] = answers(True, True, True, True)
    _, means, apart = tables(models)
    assert {row[0]: row[1] for row in means.rows} == {"images": "62.5%", "decoupled": "87.5%", BEFORE: "25.0%"}
    found = dict(apart.rows)
    plain = decoupled_training.WAYS[0]
    assert found[f"{plain}, decoupled, above {plain}, images"].startswith("+25.0 (")
    assert found[f"{plain}, images, above {plain}, as it was"].startswith("+37.5 (")
    assert ARMS == ("images", "decoupled")
