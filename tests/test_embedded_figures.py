"""The embedded model's figures: boxes are read and compared, and every kind of question is asked as often as wanted."""

import json

import numpy as np
import pytest

from hide import HiDe
from hide.evaluation import embedded_figures as measure
from hide.evaluation.scoring import share
from hide.methods.prompts import ANSWER_FORM, BOX_FORM, RECHECKED_FORM, box_text
from hide.session import Reply
from hide.tiny import model
from hide.tiny.scenes import KINDS, NUMBERS, PLURALS


def test_boxes():
    assert measure.read_box(" [0.10, 0.20, 1.00, 0.40]\n") == (0.1, 0.2, 1.0, 0.4)
    for text in (
        "[0.10, 0.20, 0.10, 0.40]",
        "[0.50, 0.20, 0.10, 0.40]",
        "0.10, 0.20, 1.00, 0.40",
        "[0.10, 0.20, 1.00]",
    ):
        assert measure.read_box(text) is None
    assert measure.overlap((0, 0, 0.5, 1), (0, 0, 0.5, 1)) == 1
    assert measure.overlap((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0
    assert measure.overlap((0, 0, 0.5, 0.5), (0, 0, 0.5, 1)) == pytest.approx(0.5)


def test_every_kind_is_asked(tmp_path):
    model.save(tmp_path, *model.build())
    hide = HiDe.from_pretrained(tmp_path, preset="tiny")
    found = measure.measure_size(hide, 4, measure.SIZES["to 100 tokens"])
    assert {"words", "letters", "boxes", "two turns: form", "vertical", "existence", "count"} <= found.keys()
    assert all(found[kind].total == 4 for kind in ("words", "letters", "boxes", "two turns: form"))
    assert found["two turns: form"].right == 0  # random weights


def test_two_turns_show_the_crop_with_its_margin():
    seen = []
    replies = [ANSWER_FORM.format(answer="B") + "\n" + BOX_FORM.format(box=box_text((20, 30, 40, 60), (100, 100))),
               RECHECKED_FORM.format(answer="A")]  # fmt: skip

    class Session:
        images = (measure.SIZES["to 100 tokens"](0).image.resize((100, 100)),)

        def chat(self, messages, max_new_tokens):
            seen.append(messages)
            return Reply(replies[len(seen) - 1], 0, (), ())

    asked = measure.AskedQuestion("Which?", ("red", "blue"))
    assert measure._two_turns(Session(), asked) == ("B", "A")
    (crop,) = seen[1][-1].images
    assert crop.size == (40, 50) and np.array_equal(crop, Session.images[0].crop((10, 20, 50, 70)))
    replies[0] = "B"
    seen.clear()
    assert measure._two_turns(Session(), asked) is None


def test_the_command_prints_shares_with_intervals(tmp_path, monkeypatch, capsys):
    file, checkpoint = tmp_path / "figures.json", tmp_path / "model"
    model.save(checkpoint, *model.build())
    parts = {"small": lambda hide, count: {"words": share([True] * (count - 1) + [False])}}
    monkeypatch.setattr(measure, "PARTS", parts)
    options = ["--checkpoint", str(checkpoint), "--questions", "4", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["figures", *options])
    assert measure.main() == 0
    assert "words                         75.0%  (30.1% to 95.4% of 4)" in capsys.readouterr().out
    assert json.loads(file.read_text())["small"]["words"]["right"] == 3


def test_methods_are_asked_about_large_pictures(tmp_path):
    model.save(tmp_path, *model.build())
    hide = HiDe.from_pretrained(tmp_path, preset="tiny")
    found = measure.measure_methods(hide, 2, (150, 200))
    assert {name: one.total for name, one in found.items()} == {"plain": 2, "hide": 2, "true_boxes": 2}


def test_what_is_counted_is_one_to_four():
    crowds = [measure._to_count((300, 300), np.random.default_rng(seed)) for seed in range(40)]
    assert {question.answer for _, question in crowds} == set(NUMBERS)
    for scene, question in crowds:
        (kind,) = (kind for kind in KINDS if PLURALS[kind] in question.text)
        assert NUMBERS[[thing.kind for thing in scene.objects].count(kind) - 1] == question.answer
    assert measure._to_count((60, 60), np.random.default_rng(0)) is None
