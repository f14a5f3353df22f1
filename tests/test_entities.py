"""Replies of the extractor, and the extractor without a model."""

import pytest

from hide.methods.hide.entities import ENTITY_PROMPT, Entities, entities_by_rules, entity_request, parse_entities
from hide.questions import Question


@pytest.mark.parametrize(
    "reply, items",
    [
        ("<FINAL_OUTPUT>car with red color, dog</FINAL_OUTPUT>", ("car with red color", "dog")),
        ("thinking\n<FINAL_OUTPUT>cat</FINAL_OUTPUT> no: <FINAL_OUTPUT>dog</FINAL_OUTPUT> done", ("dog",)),
        ("<FINAL_OUTPUT>cat, ", ("cat",)),
        ("<FINAL_OUTPUT> The Cat ,a dog,\n'bird'. , cat</FINAL_OUTPUT>", ("cat", "dog", "bird")),
        ("<FINAL_OUTPUT></FINAL_OUTPUT>", ()),
        ("<FINAL_OUTPUT> , ;\n</FINAL_OUTPUT>", ()),
        ("", ()),
        ("...", ()),
    ],
)
def test_tagged_replies(reply, items):
    assert parse_entities(reply) == Entities(items)


def test_a_reply_without_tags_is_read_by_its_last_line_and_said_so():
    found = parse_entities("Let me think.\n\ncat, dog\n")
    assert found.items == ("cat", "dog") and "no tags" in found.notes[0]


@pytest.mark.parametrize(
    "question, items",
    [
        ("What is the color of the star?", ("star",)),
        ("Is the star on the left or right side of the ring?", ("star", "ring")),
        ("What color is the man's hat?", ("man", "hat")),
        ("Is the red traffic light above the dog, the cat or a fire-truck?", ("red traffic light", "dog", "cat", "fire-truck")),
        ("What is it?\n(A) a cat\n(B) the dog", ("cat", "dog")),
        ("What is it?", ()),
        ("Какого цвета зонт?", ("какого цвета зонт",)),
    ],
)  # fmt: skip
def test_rules_find_the_content_words(question, items):
    assert entities_by_rules(Question.parse(question)).items == items


def test_the_request_holds_the_whole_question_and_no_letter_request():
    question = Question.parse("Where is {question}?", ["left", "right"])
    request = entity_request(question)
    assert request == ENTITY_PROMPT.replace("{question}", question.text)
    assert "(B) right" in request and "letter" not in request.rpartition("Question: ")[2]
    assert entity_request(question, "List: {question}") == f"List: {question.text}"
