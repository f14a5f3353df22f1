"""The embedded model's figures: true answers score, boxes in pixels find their tokens, every count is as asked."""

import json

import pytest

from hide import HiDe
from hide.evaluation import embedded_model as measure
from hide.tiny import model


@pytest.fixture(scope="module")
def hide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    model.save(folder, *model.build())
    return HiDe.from_pretrained(folder, preset="tiny")


def test_questions_are_balanced():
    scenes = (measure.small_scene(seed) for seed in range(100))
    asked = [question for _, chosen in measure._asked(scenes, 40) for question in chosen]
    assert len(asked) == 40
    assert abs(sum(question.split == "attribute" for question in asked) - 20) <= 1


def test_small_and_large(hide):
    small = measure.measure_small(hide, 3, [])
    assert small["questions"] == 3
    assert set(small["times_area_by_layer"]) == set(range(6))
    assert 0 <= small["plain"] <= 1
    large = measure.measure_large(hide, 2, (150, 200), [])
    assert large["questions"] == 2
    assert set(large["accuracy"]) == {"plain", "hide", "true_boxes"}


def test_answers_are_kept_and_a_change_of_one_is_said(tmp_path, monkeypatch, capsys):
    file = tmp_path / "answers.jsonl"

    def run(option):
        arguments = ["embedded_model", "--questions", "2", "--tokens", "150", "200", option, str(file)]
        monkeypatch.setattr("sys.argv", arguments)
        return measure.main()

    assert run("--answers") == 0
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["part"] for one in kept] == ["small", "small", "large", "large"]
    assert kept[2]["replies"].keys() == {"plain", "hide", "true_boxes"} and kept[2]["boxes"]
    assert run("--against") == 0
    kept[3]["boxes"][0][2] += 1
    file.write_text("".join(json.dumps(one) + "\n" for one in kept))
    capsys.readouterr()
    assert run("--against") == 1
    assert "1 of 4 answers differ" in capsys.readouterr().out
