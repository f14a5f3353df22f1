"""The annotated questions, the scores of extractors on them, and entities made wrong on purpose."""

import json

import pytest
from typer.testing import CliRunner

from hide.cli import app
from hide.evaluation.entity_quality import (
    LabelledQuestion,
    content_words,
    corrupting,
    labelled_questions,
    score_entities,
)
from hide.methods.hide.entities import Entities, entities_by_rules
from hide.questions import Question


def test_there_are_many_varied_questions_and_their_entities_come_from_them():
    questions = labelled_questions()
    assert len(questions) >= 60 and len({one.question for one in questions}) == len(questions)
    assert sum(bool(one.question.options) for one in questions) >= 4
    assert sum(not one.entities for one in questions) >= 3 and sum(len(one.entities) >= 2 for one in questions) >= 20
    for question, entities in questions:
        text = content_words(question.text.replace("’s", "'s"))
        for entity in entities:
            assert content_words(entity.replace("’s", "'s")) <= text, (question, entity)


def test_the_same_thing_in_other_words_is_the_same():
    assert content_words("car with red color") == content_words("the Red car") == {"car", "red"}
    assert content_words("umbrella of girl") == content_words("girl's umbrella")
    assert content_words("t-shirt") == {"t-shirt"}


def test_precision_and_recall_are_counted_by_things_and_by_words():
    wanted = [
        LabelledQuestion(Question("a"), ("red car", "tree")),
        LabelledQuestion(Question("b"), ("old dog",)),
        LabelledQuestion(Question("c"), ()),
    ]
    replies = {"a": ("car with red color", "left side"), "b": ("dog",), "c": ()}
    scores = score_entities(lambda question: Entities(replies[question.stem]), wanted)
    assert scores.things == (1, 3, 3) and scores.things.precision == scores.things.recall == pytest.approx(1 / 3)
    assert scores.words == (3, 5, 5)
    assert [one[0].question.stem for one in scores.wrong] == ["a", "b"]
    perfect = score_entities(lambda question: Entities({q.stem: e for q, e in wanted}[question.stem]), wanted)
    assert perfect.things.precision == perfect.words.recall == 1 and not perfect.wrong


def test_rules_find_nearly_every_word_that_matters():
    scores = score_entities(entities_by_rules, labelled_questions())
    assert scores.words.recall > 0.9 and scores.words.precision > 0.7


def test_corruption_errs_in_one_entity_and_repeats_itself():
    text = "Is the star on the left or right side of the ring?"
    others = ("star", "moon", "heart")
    sound = ["star", "ring"]
    dropped = corrupting(entities_by_rules, "drop", others)(text).split(", ")
    assert len(dropped) == 1 and dropped[0] in sound
    added = corrupting(entities_by_rules, "add", others)(text).split(", ")
    assert added[:2] == sound and added[2] in ("moon", "heart")
    wrong = corrupting(entities_by_rules, "wrong", others)(text).split(", ")
    assert len(wrong) == 2 and len(set(wrong) & set(sound)) == 1 and set(wrong) & {"moon", "heart"}
    assert corrupting(entities_by_rules, "wrong", others)(text) == ", ".join(wrong)
    assert corrupting(lambda question: Entities(()), "drop", others)(text) == ""
    with pytest.raises(ValueError, match="no other thing"):
        corrupting(entities_by_rules, "add", ("star",))(text)
    with pytest.raises(ValueError, match="want one of drop, wrong, add"):
        corrupting(entities_by_rules, "change", others)


def test_command_prints_scores_and_misses_and_names_broken_lines(tmp_path):
    result = CliRunner().invoke(app, ["entities", "--misses"])
    assert result.exit_code == 0, result.output
    assert f"Entities of {len(labelled_questions())} questions" in result.output and "wanted: mailbox" in result.output
    broken = tmp_path / "q.jsonl"
    good = json.dumps({"question": "Where is the cat?", "entities": ["cat"]})
    text = json.dumps({"question": "Where is the cat?", "entities": "cat"})
    broken.write_text(f"{good}\n{{\n{text}\n3\n{good}\n")
    result = CliRunner().invoke(app, ["entities", "--data", str(broken)])
    assert result.exit_code == 0 and "Entities of 2 questions" in result.output
    said = " ".join(result.output.split())
    for line, reason in ((2, "not JSON"), (3, "want a list of texts"), (4, "TypeError")):
        assert f"left out entities: line {line} of" in said and reason in said
    with pytest.raises(ValueError, match="line 2 of .*q.jsonl: it is not JSON"):
        labelled_questions(broken)
    broken.write_text("{\n")
    result = CliRunner().invoke(app, ["entities", "--data", str(broken)])
    assert result.exit_code == 1 and "holds no question" in " ".join(result.output.split())
