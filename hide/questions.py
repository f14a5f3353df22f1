"""Questions, free or with lettered options: what the model is asked, and which letter its reply means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_REQUEST = "Answer with the option's letter from the given choices directly."

# A sentence whose only content is that the reply be a letter, as benchmarks append it in several wordings.
_REQUEST = re.compile(
    r"[^\n.?!]*\b(?:answer|respond|reply)\b[^\n.?!]*\bletter\b[^\n.?!]*(?:[.!]|$)(?:\s*the best answer is:?\s*$)?",
    re.IGNORECASE,
)
_OPTION = re.compile(r"^\s*\(?([A-Z])[).:]\s*(.*\S)\s*$")


@dataclass(frozen=True)
class Question:
    """A question taken apart. `options` is empty for free answers; option i has the letter `LETTERS[i]`."""

    stem: str
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, options: Sequence[str] | None = None) -> Question:
        """Read a question.

        Args:
            text: the question; lines such as `(A) red` or `B. blue`, lettered from A on, are its options, and a
                sentence that asks for a letter only is dropped (it is put back by `prompt`).
            options: the options, when they do not stand in the text; 2 to 26 of them.

        Raises:
            TypeError, ValueError: for a text that is no text or has no word in it, and for options given twice.
        """
        if not isinstance(text, str):
            raise TypeError(f"question: got {type(text).__name__}, want a string")
        found: list[str] = []
        kept = []
        for line in text.splitlines():
            match = _OPTION.match(line)
            if match and len(found) < len(LETTERS) and match[1] == LETTERS[len(found)]:
                found.append(match[2])
            else:
                kept.append(line)
        if len(found) < 2:
            found, kept = [], text.splitlines()
        if options is not None:
            if found:
                raise ValueError(
                    f"options: got {list(options)}, but the question's text has options of its own: {found}"
                )
            if not 2 <= len(options) <= len(LETTERS) or not all(isinstance(o, str) and o.strip() for o in options):
                raise ValueError(f"options: got {options!r}, want 2 to {len(LETTERS)} texts")
            found = [option.strip() for option in options]
        body = "\n".join(kept)
        stem = re.sub(r"\s*\n\s*", "\n", _REQUEST.sub("", body) if found else body).strip()
        if not re.search(r"\w", stem):
            raise ValueError(f"question: got {text[:80]!r}, want a text with at least one word")
        return cls(stem, tuple(found))

    @property
    def text(self) -> str:
        """The question with its options, without the request for a letter: what entities are extracted from."""
        return "\n".join(
            [self.stem, *(f"({letter}) {option}" for letter, option in zip(LETTERS, self.options, strict=False))]
        )

    @property
    def prompt(self) -> str:
        """What the model is asked: `text`, and for options the request to answer with a letter."""
        return f"{self.text}\n{LETTER_REQUEST}" if self.options else self.text

    def letter(self, reply: str) -> str | None:
        """The option that `reply` chooses: a letter, or `None` where it names none or cannot be understood.

        Read in this order: the reply is a letter or starts with one (`B`, `(B)`, `B. blue`), it says `answer: B` or
        `answer is (B)` (the last such place counts), it is or contains exactly one option's text.
        """
        letters = LETTERS[: len(self.options)]
        if not letters:
            return None
        text = reply.strip().strip("*").strip()
        start = re.match(rf"\(?([{letters}])(?:\)|[.:,]|\s*$)", text)
        if start:
            return start[1]
        said = re.findall(rf"answer\W*(?:is\W*)?[(\[]?([{letters}])(?![\w'])", text, re.IGNORECASE)
        if said:
            return said[-1].upper()
        lower = text.lower()
        named = [
            letter
            for letter, option in zip(letters, self.options, strict=True)
            if re.search(rf"(?<!\w){re.escape(option.lower().rstrip('.'))}(?!\w)", lower)
        ]
        return named[0] if len(named) == 1 else None
