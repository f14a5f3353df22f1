"""Whether a reply is right, and how sure a share of right replies is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hide.questions import Question
from hide.tags import tagged

Scorer = Callable[[Question, str, str], "bool | None"]
"""(question, its right answer, reply) -> right, wrong, or `None`: the reply cannot be read."""


def strict(question: Question, answer: str, reply: str) -> bool | None:
    """A lettered question is right if the reply names the right option and no other; a free one if the reply, without
    case, articles and punctuation, is the answer. A reply that names no option is `None`, and counts as wrong."""
    if question.options:
        letter = question.letter(reply)
        return None if letter is None else letter == answer
    words = _words(reply)
    return words == _words(answer) if words else None


def compat(question: Question, answer: str, reply: str) -> bool | None:
    """The published V*Bench metric: the last character of the reply, upper-cased, is the letter. It takes "B." and
    "(B)" for wrong and cannot say that a reply is unreadable; an empty reply, on which it crashes, is wrong. None is
    published for replies with tags (`hide.tags`): of them it reads what stands between. Free answers as `strict`."""
    if not question.options:
        return strict(question, answer, reply)
    between = tagged(reply)
    return (reply if between is None else between.strip())[-1:].upper() == answer


SCORERS: dict[str, Scorer] = {"strict": strict, "compat": compat}


class Share(NamedTuple):
    """A share of `total`, with the 95 % Wilson interval; all NaN of nothing."""

    right: int
    total: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.0%} ({100 * self.low:.0f}–{100 * self.high:.0f})" if self.total else "none"


def share(results: Sequence[bool | None]) -> Share:
    """How many are true; `None` counts as false (Wilson 1927: usable at 0 and 1 and for few questions)."""
    total, right = len(results), sum(result is True for result in results)
    if not total:
        return Share(0, 0, math.nan, math.nan, math.nan)
    z = 1.959964
    value = right / total
    centre = (value + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(value * (1 - value) / total + z**2 / (4 * total**2))
    return Share(right, total, value, max(0.0, centre - half), min(1.0, centre + half))


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]
