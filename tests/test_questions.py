"""Questions taken apart, put together again, and the letters that replies mean."""

import pytest

from hide.methods.hide.entities import entities_by_rules
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


STEM, OPTIONS = "What is the color of the umbrella?", "(A) red\n(B) blue\n(C) green\n(D) pink\n(E) none of these"
MME_REQUEST = "Select the best answer to the above multiple-choice question based on the image. "
MME_LETTER = "Respond with only the letter (A, B, C, D, or E) of the correct option."
CN_REQUEST = "根据图像选择上述多项选择题的最佳答案。只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为： "
LISTED = "A. red\nB. blue"
WRAPPED = {
    "lmms-eval, MME-RealWorld": f"{STEM} The choices are listed below:\n{OPTIONS}\n{MME_REQUEST}{MME_LETTER}\nThe best answer is: ",
    "lmms-eval, MME-RealWorld-CN": f"{STEM} 选项如下所示:\n{OPTIONS}\n{CN_REQUEST}",
    "lmms-eval, V*Bench": f"{STEM}\n{LISTED}\nAnswer with the option's letter from the given choices directly.",
    "lmms-eval, HR-Bench": f"{STEM}\n{LISTED}\nAnswer the option letter directly.",
    "VLMEvalKit": f"Question: {STEM}\nOptions:\n{LISTED}\nPlease select the correct answer from the options above. \n",
    "VLMEvalKit, MME-RealWorld": f"{STEM} {OPTIONS}\n{MME_REQUEST}           {MME_LETTER} \nThe best answer is:".replace(" (A)", "\n(A)"),
    "VLMEvalKit, Chinese": f"{STEM}\n{LISTED}\n请直接回答选项字母。",
    "VLMEvalKit, MathVista": f"Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\nQuestion: {STEM}\nChoices:\n{LISTED}",
    "published MME-RealWorld": f"{STEM} The choices are listed below: \n{OPTIONS}\n{MME_REQUEST}{MME_LETTER}\nThe best answer is:",
    "Chinese letters": f"问题：{STEM}\n选项列表如下所示：\n（A）red\n（B）blue\n根据图像选择上述多项选择题的最佳答案。只用正确选项的字母（A、B、C、D或E）回答。最佳答案为：",
    "an answer to be filled in": f"{STEM}\nOptions:\n{LISTED}\nAnswer:",
    "a picture's words": f"Please answer the multiple-choice question based on the image.\n{STEM}\n{LISTED}\nChoose one. Give only the letter.",
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_what_benchmarks_put_around_a_question_leaves_its_stem_and_its_entities_clean(name):
    question = Question.parse(WRAPPED[name])
    assert question.stem == STEM and question.options[:2] == ("red", "blue") and len(question.options) in (2, 5)
    assert entities_by_rules(question).items == ("umbrella",)
    assert Question.parse(question.prompt) == question


@pytest.mark.parametrize(
    "stem",
    [
        "Which of the options listed below the menu is the best?",
        "What letter is on the sign? The reply of the man is on the letter in his hand.",
        "Select the option that describes the umbrella of the girl.",
        "Choose the color of the car.",
        "The question on the board is about a dog.",
        "What answer is given on the poster?",
        "Is the picture above the sofa or below the choices of wine?",
        "What does the man answer",
        "The best answer is written on the board: which one?",
        "选择牌子上的字母是什么？",
        "图中牌子上写的正确答案是什么",
        "Price: 3.50, e.g. of a ticket. What is it?",
        "What stands behind the word Question: on the page?",
    ],
)
def test_a_question_that_has_words_of_such_wrappers_is_not_cut(stem):
    assert Question.parse(f"{stem}\n{OPTIONS}\nAnswer with the letter.").stem == stem


def test_a_free_question_keeps_its_request_and_its_entities_do_not_have_it():
    question = Question.parse("What is on the table? Answer the question using a single word or phrase.")
    assert question.stem.endswith("phrase.") and entities_by_rules(question).items == ("table",)


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
