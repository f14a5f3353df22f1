"""The embedded model's figures: true answers score, boxes in pixels find their tokens, every count is as asked."""

import pytest

from hide.pipeline import HiDe
from hide.tiny import measure, model


@pytest.fixture(scope="module")
def hide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    model.save(folder, *model.build())
    return HiDe.from_pretrained(folder, preset="tiny")


def test_questions_are_balanced():
    scenes = (measure._small_scene(seed) for seed in range(100))
    asked = [question for _, chosen in measure._asked(scenes, 40) for question in chosen]
    assert len(asked) == 40
    assert abs(sum(question.split == "attribute" for question in asked) - 20) <= 1


def test_small_and_large(hide):
    small = measure.measure_small(hide, 3)
    assert small["questions"] == 3
    assert set(small["times_area_by_layer"]) == set(range(6))
    assert 0 <= small["plain"] <= 1
    large = measure.measure_large(hide, 2, (150, 200))
    assert large["questions"] == 2
    assert set(large["accuracy"]) == {"plain", "hide", "true_boxes"}
