"""The prompts of methods that ask a model for more than an answer, in our own words, and the forms of its replies.

The embedded model is trained on exactly these objects. HiDe's own prompts stand beside it (`hide.methods.hide`).
"""

from __future__ import annotations

from collections.abc import Sequence

from hide.questions import LETTERS, Question

__all__ = [
    "ANSWER_FORM",
    "BOX_FORM",
    "BOX_REQUEST",
    "GENERAL_PROMPT",
    "RECHECKED_FORM",
    "SHORT_ANSWER",
    "SHORT_PHRASE",
    "ZOOM_REFINE_ASK",
    "ZOOM_REFINE_RECHECK",
    "box_text",
    "filled",
    "where",
]

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""The suffix of free questions, on a line of its own, that LLaVA-1.5 was trained with and Q-Zoom (arXiv 2604.06912)
appends to every question."""

SHORT_PHRASE = "Answer with a single word or a short phrase."
GENERAL_PROMPT = "Describe this image in general."
"""ViCrop divides the question's attention by that of `GENERAL_PROMPT`; both end with `SHORT_PHRASE`."""

BOX_REQUEST = "Give its bounding box as [x1, y1, x2, y2], in parts of the width and height from 0 to 1."
"""What may follow `where` of a thing; the embedded model points without it too."""

ANSWER_FORM, BOX_FORM = "**Answer: [{answer}]**", "**Bounding box: {box}**"
RECHECKED_FORM = "**Rechecked Answer: [{answer}]**"

ZOOM_REFINE_ASK = (
    "{question}\n"
    "Please do two things, in this order.\n"
    f"1. Answer the question first, in this form: {ANSWER_FORM}, where {{meaning}}.\n"
    "2. Then give the bounding box of the one area of the image that matters most for your answer. Its corners are"
    " parts of the width and height of the image, from 0 to 1, with x1 < x2 and y1 < y2. Make it large enough to hold"
    " what belongs to it: the rows and columns of a table, nearby text, things that touch it, the background. Use"
    f" this form: {BOX_FORM.format(box='[x1, y1, x2, y2]')}"
)
"""The first turn of Zoom-Refine (arXiv 2506.01663); `filled` puts a question in."""

ZOOM_REFINE_RECHECK = (
    "This further image was cut out of the first one, to show a part of it in more detail. Look at it with care, and"
    " leave it aside if it does not hold what is needed. Then look at the first image again together with it: were"
    " details missed, or mistakes made? Whether your earlier answer was true or false, say why and end with"
    f" {RECHECKED_FORM}, where {{meaning}}."
)
"""The second turn, behind the crop; `filled` with the same question."""

_LETTER, _WORD = "Letter", "Words"


def filled(template: str, question: Question) -> str:
    """`ZOOM_REFINE_ASK` or `ZOOM_REFINE_RECHECK` about a question: with options it asks for one of their letters,
    without for a few words."""
    if question.options:
        letters = LETTERS[: len(question.options)]
        answer, meaning = _LETTER, f"{_LETTER} is one of {', '.join(letters[:-1])} or {letters[-1]}"
    else:
        answer, meaning = _WORD, f"{_WORD} are a single word or a short phrase"
    # Replaced one by one: a question may have braces.
    for name, value in (("{answer}", answer), ("{meaning}", meaning), ("{question}", question.text)):
        template = template.replace(name, value)
    return template


def where(thing: str) -> str:
    """The question for a thing's place, whose answer is a box."""
    return f"Where is the {thing}?"


def box_text(box: Sequence[float], size: tuple[int, int]) -> str:
    """A box as models of this form write it: "[0.12, 0.34, 0.56, 0.78]".

    box: pixels x0, y0, x1, y1, half-open. size: width and height of the picture.
    """
    return "[" + ", ".join(f"{edge / size[axis % 2]:.2f}" for axis, edge in enumerate(box)) + "]"
