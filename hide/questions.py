"""Questions, free or with lettered options: what the model is asked, and which letter its reply means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hide.replies import LETTERS, read_letter
from hide.tags import CLOSE_TAG, OPEN_TAG

LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
TAGGED_LETTER_REQUEST = f"{LETTER_REQUEST.rstrip('.')}, between {OPEN_TAG} and {CLOSE_TAG}."

# What benchmarks put around question and options has words of these only. A sentence of theirs is dropped if it asks
# for something or ends with a colon, and is no question. Each pattern takes time linear in the text, of any length.
_WRAPPER_WORDS = re.compile(
    r"(?<![A-Za-z])(?:please|now|just|only|simply|directly|carefully|then|do|not|you|must|should|can|your|its|it|is|are|be|a|an|the"
    r"|this|that|these|to|of|in|on|at|by|as|for|from|among|between|with|without|using|based|according|e\.g\.?|i\.e\.?|and"
    r"|or|one|single|exactly|best|correct|right|most|appropriate|suitable|proper|corresponding|capital|uppercase"
    r"|above|below|following|follows|given|provided|listed|shown|available|possible|hint|format|form|end|word|words"
    r"|phrase|short|brief|briefly|explanation|reasoning|additional|any|other|text|else|nothing|final|image|images|picture"
    r"|pictures|photo|answer|answers|respond|response|reply|provide|give|output|return|write|select|choose|pick|question"
    r"|questions|multiple|multi|choice|choices|option|options|option['’]s|letter|letters|FINAL_OUTPUT|[A-Z])(?![A-Za-z_])"
    r"|请|根据|基于|按照|图像|图片|图中|选择|选出|选项|上述|上面|以下|下列|下面|中|多项|单项|单选|多选|题目?|问题|的|最佳|最合适|正确|只需|只用|仅|直接"
    r"|用|以|从|回答|作答|给出|输出|字母|答案|列表|如下|所示|为|是|或|和|与|一个|并|即可|对应|提示|不要|解释",
    re.IGNORECASE,
)
_ASKS = re.compile(
    r"\b(?:answer|respond|reply|provide|give|output|return|write|select|choose|pick)\b|选|答|输出|给出", re.I
)
_SENTENCE = re.compile(r"(?:[^\n.?!。！？]|\.(?=[a-z0-9,;:)]))*[\n.?!。！？]?")
# The end of the question's own line, before the options.
_ANNOUNCED = re.compile(
    r"(?<![ \t])[ \t]*"
    r"(?:\bthe (?:choices|options) are (?:listed|shown|given|as) (?:below|follows)|选项列?表?如下(?:所示)?)"
    r"[ \t]*[:：][ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_LABEL = re.compile(r"^[ \t]*(?:question|hint|问题|题目|提示)[ \t]*[:：]", re.IGNORECASE | re.MULTILINE)
_OPTION = re.compile(r"[(（]?([A-Z])[)）.．:：、]\s*(\S.*)")


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
                list where there are several), and then what benchmarks put around them is dropped: "Question:", "The
                choices are listed below:", sentences that only ask to choose or for a letter, in English or Chinese
                (`prompt` puts one back). Lines lose surrounding blanks, empty lines go.
            options: the options, when they do not stand in the text; 2 to 26 of them. Each becomes one line.

        Raises:
            TypeError, ValueError: for a text that is no text, has no word besides options and request or is not
                Unicode, and for options given twice.
        """
        if not isinstance(text, str):
            raise TypeError(f"question: got {type(text).__name__}, want a string")
        check_unicode("question", text)
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
                check_unicode("options", option)
            found = [" ".join(option.split()) for option in options]
        body = "\n".join(line for place, line in enumerate(lines) if place not in places)
        if found:
            body = without_wrapper(body)
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


def check_unicode(name: str, text: str) -> None:
    """`ValueError` for a text with surrogates, which no tokenizer takes."""
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


def without_wrapper(text: str) -> str:
    """`text` without what benchmarks put around a question: requests to choose, for a letter or for a short answer,
    lines that announce the options, and the labels "Question:" and "Hint:"."""
    sentences = _SENTENCE.findall(_LABEL.sub("", _ANNOUNCED.sub("", text)))
    return "".join("\n"[: one.endswith("\n")] if _is_wrapper(one) else one for one in sentences)


def _is_wrapper(sentence: str) -> bool:
    sentence = sentence.strip()
    if sentence.endswith(("?", "？")) or re.search(r"\w", _WRAPPER_WORDS.sub("", sentence)):
        return False
    return bool(sentence.endswith((":", "：")) or _ASKS.search(sentence))
