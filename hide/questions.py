"""Questions, free or with lettered options: what the model is asked, and which letter its reply means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hide.replies import LETTERS, read_letter
from hide.tags import CLOSE_TAG, OPEN_TAG

LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
TAGGED_LETTER_REQUEST = f"{LETTER_REQUEST.rstrip('.')}, between {OPEN_TAG} and {CLOSE_TAG}."

# A sentence that only asks for a letter, as benchmarks append it in several wordings: it has one of these words, then
# "letter", and is no question. Each pattern takes time linear in the text, which may have any length.
_SENTENCE = re.compile(r"[^\n.?!]*[\n.?!]?")
_ASKS = re.compile(r"\b(?:answer|respond|reply)\b", re.IGNORECASE)
_LETTER = re.compile(r"\bletter\b", re.IGNORECASE)
_BEST_ANSWER = re.compile(r"\s*the best answer is:?\s*", re.IGNORECASE)
_OPTION = re.compile(r"\(?([A-Z])[).:]\s*(\S.*)")


@dataclass(frozen=True)
class Question:
    """A question taken apart. `options` is empty for free answers; option i has the letter `LETTERS[i]`."""

    stem: str
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, options: Sequence[str] | None = None) -> Question:
        """Read a question.

        Args:
            text: the question; lines such as `(A) red` or `B. blue`, lettered from A on, are its options (the last such
                list where there are several), and a sentence that asks for a letter only is dropped (it is put back by
                `prompt`). Lines lose surrounding blanks, empty lines go.
            options: the options, when they do not stand in the text; 2 to 26 of them. Each becomes one line.

        Raises:
            TypeError, ValueError: for a text that is no text, has no word besides options and request or is not
                Unicode, and for options given twice.
        """
        if not isinstance(text, str):
            raise TypeError(f"question: got {type(text).__name__}, want a string")
        _check_unicode("question", text)
        lines = [line.strip() for line in text.splitlines()]
        places = _lettered(lines)
        found = [_OPTION.fullmatch(lines[place])[2] for place in places]  # type: ignore[index]
        if options is not None:
            if found:
                raise ValueError(
                    f"options: got {list(options)}, but the question's text has options of its own: {found}"
                )
            if not 2 <= len(options) <= len(LETTERS) or not all(isinstance(o, str) and o.strip() for o in options):
                raise ValueError(f"options: got {options!r}, want 2 to {len(LETTERS)} texts")
            for option in options:
                _check_unicode("options", option)
            found = [" ".join(option.split()) for option in options]
        body = "\n".join(line for place, line in enumerate(lines) if place not in places)
        if found:
            body = "".join(map(_without_request, _SENTENCE.findall(body)))
        stem = "\n".join(line.strip() for line in body.split("\n") if line.strip())
        if not re.search(r"\w", stem):
            raise ValueError(
                f"question: got {text[:80]!r}, want at least one word besides options and the request for a letter"
            )
        return cls(stem, tuple(found))

    @property
    def text(self) -> str:
        """The question with its options, without the request for a letter: what entities are extracted from."""
        return "\n".join(
            [self.stem, *(f"({letter}) {option}" for letter, option in zip(LETTERS, self.options, strict=False))]
        )

    @property
    def prompt(self) -> str:
        """What the model is asked: `asked` with the usual request."""
        return self.asked(LETTER_REQUEST)

    def asked(self, letter_request: str) -> str:
        """`text`, and for options the request to answer with a letter."""
        return f"{self.text}\n{letter_request}" if self.options else self.text

    def letter(self, reply: str) -> str | None:
        """The option that `reply` chooses, `None` where it names none or cannot be understood; the rule is that of
        `hide.replies.read_letter`."""
        return read_letter(reply, self.options)


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: got {text[:80]!r}, want Unicode; character {error.start} is a surrogate") from None


def _lettered(lines: Sequence[str]) -> list[int]:
    """Where the last list of at least two lines stands that are lettered from A on; other lines may lie between."""
    lists: list[list[int]] = [[]]
    for place, line in enumerate(lines):
        match = _OPTION.fullmatch(line)
        if match and match[1] == "A":
            lists.append([])
        if match and match[1] == LETTERS[len(lists[-1]) :][:1]:
            lists[-1].append(place)
    return next((places for places in reversed(lists) if len(places) >= 2), [])


def _without_request(sentence: str) -> str:
    """`sentence`, or the end of its line where it only asks for a letter."""
    asks = _ASKS.search(sentence)
    request = asks and _LETTER.search(sentence, asks.end()) and not sentence.endswith("?")
    return "\n"[: sentence.endswith("\n")] if request or _BEST_ANSWER.fullmatch(sentence) else sentence
