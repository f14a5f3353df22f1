"""The forms in which data sets and harnesses put a question with options: what a model may be sent unread.

`hide` itself reads them (`hide.Question.parse`) and asks in the first form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hide.questions import LETTER_REQUEST, LETTERS, Question

__all__ = ["LETTER_FORMS"]

_SELECT = "Select the best answer to the above multiple-choice question based on the image. "


def _listed(options: Sequence[str], mark: str) -> str:
    return "\n".join(mark.format(letter, option) for letter, option in zip(LETTERS, options, strict=False))


def _letters(options: Sequence[str]) -> str:
    letters = LETTERS[: len(options)]
    return f"({', '.join(letters[:-1])}, or {letters[-1]})"


def _dotted(request: str) -> Callable[[str, Sequence[str]], str]:
    return lambda stem, options: f"{stem}\n{_listed(options, '{}. {}')}\n{request}"


def _best(stem: str, options: Sequence[str]) -> str:
    return (
        f"{stem} The choices are listed below:\n{_listed(options, '({}) {}')}\n{_SELECT}Respond with only the letter "
        f"{_letters(options)} of the correct option.\nThe best answer is:"
    )


LETTER_FORMS: Mapping[str, Callable[[str, Sequence[str]], str]] = {
    "hide": lambda stem, options: Question(stem, tuple(options)).prompt,
    "lmms-eval, V*Bench": _dotted(LETTER_REQUEST),
    "lmms-eval, HR-Bench": _dotted("Answer the option letter directly."),
    "MME-RealWorld": _best,
    "VLMEvalKit": lambda stem, options: (
        f"Question: {stem}\nOptions:\n{_listed(options, '{}. {}')}\n"
        "Please select the correct answer from the options above."
    ),
    "an answer to be filled in": lambda stem, options: f"{stem}\nOptions:\n{_listed(options, '{}. {}')}\nAnswer:",
}
"""Name -> what makes the text of a question's stem and options."""
