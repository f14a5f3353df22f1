"""Questions taken apart, put together again, and the letters that replies mean."""

import pytest

from hide.questions import LETTER_REQUEST, TAGGED_LETTER_REQUEST, Question

LETTERED = f"Where is the cat?\n(A) left\n(B) right\n{LETTER_REQUEST}"


@pytest.mark.parametrize(
    "text",
    [
        LETTERED,
        "Where is the cat?\nA. left\nB. right",
        "Where is the cat?\n A) left\n B) right\nPlease answer with only the letter of the best option.",
        "Where is the cat? Respond with the letter only.\n(A) left\n(B) right\nThe best answer is:",
    ],
)
def test_lettered_questions_are_read_however_they_are_written(text):
    question = Question.parse(text)
    assert question.options == ("left", "right")
    assert question.stem.splitlines()[0].startswith("Where is the cat?")
    assert "letter" not in question.text
    assert question.prompt.endswith(LETTER_REQUEST) and question.prompt.count(LETTER_REQUEST) == 1


@pytest.mark.parametrize("request_", [LETTER_REQUEST, TAGGED_LETTER_REQUEST])
def test_the_request_for_a_letter_can_be_chosen_and_is_read_back(request_):
    question = Question.parse(LETTERED)
    asked = question.asked(request_)
    assert asked == f"{question.text}\n{request_}" and Question.parse(asked) == question
    assert Question.parse("Where?").asked(request_) == "Where?"


def test_options_can_be_given_apart_and_parsing_is_idempotent():
    question = Question.parse("Where is the cat?", ["left", " right "])
    assert question.prompt == LETTERED
    assert Question.parse(question.prompt) == question


def test_free_questions_are_asked_as_they_are():
    text = "What letter is on the sign? Answer with one letter."
    question = Question.parse(text)
    assert question.prompt == question.text == text and question.options == ()
    assert question.letter("B") is None


def test_the_last_of_several_lists_holds_the_options():
    question = Question.parse("Which list is right?\n(A) x\n(B) y\nor\n(A) z\n(B) w")
    assert question.options == ("z", "w") and question.stem.endswith("(A) x\n(B) y\nor")


def test_a_sentence_that_asks_about_a_letter_is_no_request_for_one():
    question = Question.parse("Is the answer a letter?\nReply with its letter\n(A) yes\n(B) no")
    assert question.stem == "Is the answer a letter?"


def test_an_option_without_a_word_is_named_by_no_reply():
    assert Question.parse("Which?", ["...", "red"]).letter("It is red, I think") == "B"


def test_a_single_lettered_line_is_no_list_of_options():
    assert Question.parse("Is this\n(A) a cat?").options == ()
    assert Question.parse("Which?\n(B) one\n(C) two").options == ()


@pytest.mark.parametrize(
    "reply, letter",
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("B. right", "B"), ("(A) left", "A"), ("**A**", "A"), (" A \n", "A"),
        ("The answer is B", "B"), ("the answer is (A).", "A"), ("Answer: B", "B"), ("**Answer:** B", "B"),
        ("First answer: A. No, the answer is B.", "B"),
        ("right", "B"), ("It is on the Left side.", "A"), ("left or right", None),
        ("B\n\nBecause it is not on the left.", "B"), ("[B]", "B"), ("The correct option is B.", "B"), ("Option B", "B"),
        ("The answer is B because it is", "B"), ("The answer is A because", "A"), ("The answer: a right turn", "B"),
        ("Answer: a left one", "A"), ("The answer is a.", None),
        ("C", None), ("", None), ("A cat", None), ("Because", None), ("The answer is Because", None),
        ("the answer is about", None), ("I cannot tell", None),
        ("<FINAL_OUTPUT>B</FINAL_OUTPUT>", "B"), ("First A.\n<FINAL_OUTPUT>\n(B)\n</FINAL_OUTPUT> A", "B"),
        ("<FINAL_OUTPUT>A</FINAL_OUTPUT> no, <final_output>B", "B"), ("A <FINAL_OUTPUT>B</FINAL_OUTPUT>", "B"),
        ("<FINAL_OUTPUT>The answer is B.</FINAL_OUTPUT>", "B"), ("<FINAL_OUTPUT>right</FINAL_OUTPUT>", "B"),
        ("<FINAL_OUTPUT>A</FINAL_OUTPUT><FINAL_OUTPUT></FINAL_OUTPUT>", "A"), ("A <FINAL_OUTPUT>?</FINAL_OUTPUT>", None),
    ],
)  # fmt: skip
def test_replies_are_read_strictly(reply, letter):
    assert Question.parse(LETTERED).letter(reply) == letter


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((None,), TypeError, "question: got NoneType"),
        (("",), ValueError, "at least one word"),
        (("?! ...",), ValueError, "at least one word"),
        (("Where?", ["left"]), ValueError, "options"),
        (("Where?", ["left", " "]), ValueError, "options"),
        ((LETTERED, ["left", "right"]), ValueError, "options of its own"),
    ],
)
def test_what_is_no_question_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        Question.parse(*arguments)
