"""Scenes: the same seed draws the same picture, boxes hold their objects, answers are true."""

import numpy as np
import pytest

from hide.tiny.scenes import COLORS, KINDS, NUMBERS, PLURALS, draw_scene, more_questions, questions


def test_same_seed_same_scene():
    first, second, other = (draw_scene(seed, 333, 222) for seed in (5, 5, 6))
    assert first.objects == second.objects != other.objects
    assert np.array_equal(first.image, second.image)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("seed", range(6))
def test_boxes_hold_the_objects_and_nothing_else_is_colorful(seed):
    scene = draw_scene(seed, 900, 700, objects=10)
    pixels = np.asarray(scene.image).astype(int)
    assert pixels.shape == (700, 900, 3)
    assert {thing.kind for thing in scene.objects} == set(KINDS)
    outside = np.ones(pixels.shape[:2], bool)
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        assert 0 <= x0 < x1 <= 900
        assert 0 <= y0 < y1 <= 700
        near = np.abs(pixels[y0:y1, x0:x1] - COLORS[thing.color]).max(axis=-1) < 40
        assert near.mean() > 0.2
        # Tight: the object's color within the outermost rows and columns.
        assert near[:4].any()
        assert near[-4:].any()
        assert near[:, :4].any()
        assert near[:, -4:].any()
        outside[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = False
    for color in COLORS.values():
        assert (np.abs(pixels - color).max(axis=-1) < 20)[outside].mean() < 1e-3


def test_questions_are_true():
    splits = set()
    for seed in range(20):
        scene = draw_scene(seed, 600, 400, objects=12, object_size=(20, 50))
        kinds = [thing.kind for thing in scene.objects]
        for question in questions(scene, np.random.default_rng(seed)):
            splits.add(question.split)
            things = [scene.objects[i] for i in question.targets]
            assert question.options["ABCDEFGH".index(question.letter)] == question.answer
            assert len(set(question.options)) == len(question.options)
            assert question.entities == tuple(thing.kind for thing in things)
            assert all(kinds.count(thing.kind) == 1 and thing.kind in question.text for thing in things)
            if question.split == "attribute":
                assert question.answer == things[0].color
            else:
                assert (question.answer == "left") == (things[0].box[0] < things[1].box[0])
    assert splits == {"attribute", "position"}


def test_more_questions_are_true():
    answers = set()
    for seed in range(20):
        names = [("star", "red")] * (seed % 6) + [("ring", "blue"), ("moon", "pink"), ("cross", "green")]
        scene = draw_scene(seed, 600, 400, objects=names, object_size=(20, 50))
        kinds = [thing.kind for thing in scene.objects]
        asked = more_questions(scene, np.random.default_rng(seed))
        for question in asked:
            answers.add(question.answer)
            things = [scene.objects[i] for i in question.targets]
            assert question.answer in question.options and question.entities == tuple(thing.kind for thing in things)
            if question.split == "vertical":
                assert all(kinds.count(thing.kind) == 1 and thing.kind in question.text for thing in things)
                assert (question.answer == "above") == (things[0].box[1] < things[1].box[1])
            elif question.split == "existence":
                kind = question.text.split()[-1].rstrip("?")
                assert (question.answer == "yes") == (kind in kinds) and kind in KINDS
            else:
                (kind,) = (kind for kind in KINDS if PLURALS[kind] in question.text)
                assert NUMBERS.index(question.answer) + 1 == kinds.count(kind) == len(things)
        truths = [question.answer for question in asked if question.split == "existence"]
        assert truths.count("yes") == truths.count("no")
    assert answers == {"above", "below", "yes", "no", *NUMBERS}


def test_given_objects_and_errors():
    scene = draw_scene(0, 200, 200, objects=[("star", "red"), ("star", "blue")], clutter=0)
    assert [(thing.kind, thing.color) for thing in scene.objects] == [("star", "red"), ("star", "blue")]
    assert questions(scene, np.random.default_rng(0)) == []
    with pytest.raises(ValueError, match="objects: .*house"):
        draw_scene(0, 200, 200, objects=[("house", "red")])
    with pytest.raises(ValueError, match="no room"):
        draw_scene(0, 100, 100, objects=20)
    assert draw_scene(0, 64, 64, objects=0).objects == ()
