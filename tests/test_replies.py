"""Which option a reply names: what is read as option B, and what is read as none."""

import pytest

from hide.questions import Question
from hide.replies import read_letter

COLORS = ("red", "blue", "green", "pink")

NAMES_B = [
    # A letter alone.
    "B", "b", "b.", "(b)", "[B]", "{B}", "'B'", '"B"', "“B”", "«B»", "「B」", "`B`", "**B**", "__B__", "**B.**", "B)",
    "B!", " B \n", "- B", "Ｂ", "Ⓑ", "🅱️", "⒝", "【B】", "B。", "（B）", "\ufeffB", "\u200bB\u200b", "\xa0B", "$B$", "B</s>",
    "B<|im_end|>", "```\nB\n```",
    # The option's text, alone or behind its letter.
    "blue", "Blue.", "**blue**", "B blue", "b blue", "B (blue)", "B — blue", "It is blue", "The star is light-blue? No, blue.",
    # A letter and a mark.
    "B: blue", "B) blue", "(B) blue", "(b) blue", "b) blue", "b. blue", "B, because it is", "**B**: blue", "B - blue",
    "B because of the sky", "B：蓝色", "B、蓝色", "B，因为", "B\n\nThe star is not red.", "- B. blue", "B. A red one is behind it.",
    # What the answer is.
    "Answer: b", "Answer: B", "**Answer:** B", "Answer - B", "Ans. B", "ANSWER: B", "Answer:\n\nB", "Final Answer: (B)",
    "the answer is B", "The answer is B because it is blue", "The correct answer is option B.", "The answer is: **B**",
    "My answer would be B.", "The best answer must be (b).", "The right answer should be B: blue", "the answer is b.",
    "First answer: A. No, the answer is B.", "A. red? No. The answer is B.", "The answer is most likely B.",
    "A) red\nB) blue\nC) green\nD) pink\n\nAnswer: B", "(A) red (B) blue (C) green (D) pink. The answer is B.",
    "Of A, B, C and D the answer is B.", "A or B? The answer is B.", "### Answer\nB",
    # Other words.
    "Option B", "option b", "option (b)", "Option B: blue", "The correct option is B.", "Choice B", "I choose B.",
    "I'd go with B", "I’d go with B.", "I would say B.", "I think it's B", "I believe it is B.", "It's B", "It’s B.",
    "That's B.", "This is B", "B is correct.", "B is right", "B is the correct answer.", "B is the best option.",
    "(B) is correct", "option b is correct", "I pick b", "so B.", "Therefore, B", "Probably B.", "=> B", "Sure! B",
    "The correct one is B.", "A is wrong, B is right", "not A but B", "It's not A, but B.", "A and C are wrong, so B.",
    "It isn't A; I choose B", "B is correct, not A.", "The star is like the sky.\n\nB", "The star is like the sky.\n(B)",
    # Other languages.
    "答案是B", "答案：B", "答案为B。", "答案是（B）", "答案应该是B", "答案选B", "正确答案是(B)", "正确答案是：B", "选B", "我选择B。", "应选B",
    "故选B", "因此选B", "选项B", "选项B正确", "B选项正确", "B是正确的", "应该是B", "不是A，是B。答案：B", "答えはB", "答えはBです。", "正解はBです",
    "Bです", "정답은 B", "정답은 B입니다.", "정답: B", "B입니다", "La respuesta es B", "La respuesta correcta es la B.",
    "Respuesta: B", "Elijo B", "La opción correcta es B", "La réponse est B.", "La bonne réponse est la B", "C'est B.",
    "Die Antwort ist B", "Die richtige Antwort ist B.", "Antwort: b", "A resposta é B", "La risposta è B", "Ответ: B",
    # Marked, boxed, behind thoughts.
    "<think>It may be A.</think>B", "It may be A, or C.</think>\n\nB", "<thinking>A</thinking> The answer is B.",
    "◁think▷A◁/think▷B", "[THINK]Answer: A[/THINK]B", "B<think>or is it A?", "<answer>B</answer>", "<answer> (b) </answer>",
    "<think>A</think><answer>B</answer>", "A? <answer>B</answer> A", "<answer>B", "<think>A <answer>B</answer>",
    "<|begin_of_box|>B<|end_of_box|>", "\\boxed{B}", "$\\boxed{B}$", "$$\\boxed{\\text{B}}$$", "\\(\\boxed{\\text{(B) blue}}\\)",
    "The answer is $\\boxed{\\mathbf{B}}$.", "\\text{B}", "\\boxed{A} is wrong: \\boxed{B}", '{"answer": "B"}',
    '```json\n{"answer": "B", "reason": "option A is red"}\n```', '{"final_answer": "b"}', '{"choice": "(B) blue"}',
    "<FINAL_OUTPUT>b</FINAL_OUTPUT>", "<think><FINAL_OUTPUT>A</FINAL_OUTPUT></think><FINAL_OUTPUT>B</FINAL_OUTPUT>",
]  # fmt: skip


@pytest.mark.parametrize("reply", NAMES_B)
def test_a_reply_that_names_option_b_is_read(reply):
    assert read_letter(reply, COLORS) == "B"


NAMES_NONE = [
    "", " ", "...", "?", "A cat", "A man is standing", "a man", "A car, I think.", "As far as I can see",
    "Because", "Big", "I cannot tell", "I'm sorry, I can't help with that.", "I don't know the answer. A man is there.",
    "Vitamin B", "It shows vitamin B", "plan B", "The sign says B-flat", "It is a B-52", "The answer is B-flat", "U.S.", "N/A",
    "Answer: N/A", "B+", "C++", "C#", "It's B minor", "The answer is about", "The answer is a.",
    "A or B", "A and B", "A, B", "A/B", "A & B", "(A) or (B)", "(a) or (b)", "A、B", "A和B", "Answer: A or B", "答案是A或B", "AB", "It's A or B.",
    "The answer is A, B or C", "Neither A nor B", "red or blue", "A. red\nB. blue", "(A) red (B) blue", "A is wrong", "not B",
    "B is not correct", "It isn't B", "It can't be B.", "Option B is wrong", "B不对", "不是B", "答案不是B", "It is not blue.",
    "E", "(E)", "e", "The answer is E.", "E. blue", "答案是E", "E) none", "<think>It may be B", "<think>B</think>", "<answer></answer> B",
    "答案是B超", "B超", "B's hat", "Ba", "4B", "B2", "The letters are a b c d", "A man made a choice a man makes", "the option above",
    "The best option a person has", "Select the letter", "it's a", "I pick a", "so a", "C'est la vie", "d'accord",
    "The answer is not B.", "<FINAL_OUTPUT></FINAL_OUTPUT>B", "A. The star is not.\nB. The star may be.",
]  # fmt: skip


@pytest.mark.parametrize("reply", NAMES_NONE)
def test_a_reply_that_names_no_option_is_not_read(reply):
    assert read_letter(reply, COLORS) is None


@pytest.mark.parametrize(
    "reply, options, letter",
    [
        ("a", COLORS, "A"), ("a.", COLORS, "A"), ("answer: a", COLORS, "A"), ("option a", COLORS, "A"), ("(a) red", COLORS, "A"),
        ("A is correct", COLORS, "A"), ("The answer is A because it is", COLORS, "A"), ("a red car", COLORS, "A"),
        # A text within another's is not named; a letter before a text decides.
        ("It is light blue.", ("blue", "light blue"), "B"), ("The left side", ("left", "left side"), "B"),
        ("A is larger", ("B is larger", "A is larger"), "B"), ("Both A and B", ("x", "y", "Both A and B"), "C"),
        ("The answer is B: red", COLORS, "B"), ("C. blue", COLORS, "C"),
        # Options that are letters themselves.
        ("B", ("B", "A"), "B"), ("b", ("b", "d"), "A"), ("p", ("d", "p"), "B"),
        # Numbers, quotes, other writing.
        ("There are 5.", ("3", "5"), "B"), ("15", ("5", "7"), None), ("3.5", ("5", "3.5"), "B"), ("2.5", ("5", "2"), None),
        ("$5", ("$5", "$50"), "A"), ('The sign says "STOP"', ("Go", "“Stop”"), "B"), ("它是蓝色的", ("红色", "蓝色"), "B"),
        ("ＢＬＵＥ", COLORS, "B"), ("Straße", ("Weg", "STRASSE"), "B"), ("No, it is red", ("blue", "red"), "B"), ("No", ("Yes", "No"), "B"),
        # `I` is an option only where there are nine.
        ("I", [str(n) for n in range(9)], "I"), ("I think it is 3", [str(n) for n in range(9)], "D"),
        ("The answer: I would say none", [str(n) for n in range(9)], None),
    ],
)  # fmt: skip
def test_letters_and_texts_are_told_apart(reply, options, letter):
    assert read_letter(reply, options) == letter


def test_a_question_reads_replies_by_this_rule_and_a_free_one_reads_none():
    assert Question.parse("What color?", COLORS).letter("选B") == "B"
    assert Question.parse("What color?").letter("B") is None


@pytest.mark.parametrize(
    "part", ["<think>", "(A) ", "A or ", "answer ", "<answer>", "the answer is ", "red ", "not ", "\\boxed{", "* "]
)
def test_long_replies_are_read_in_time(part):
    """A pattern that backtracks would take minutes here."""
    read_letter(part * 4000, COLORS)
