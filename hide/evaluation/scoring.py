"""Whether a reply is right, how sure a share of right replies is, and what each method scores over all questions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from hide.questions import LETTERS, Question
from hide.replies import plain
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


_KEY = re.compile(
    r"(?:(?:option|answer|choice)\b[ :]*(?:is\b[ :]*)?)?\(?([a-z])(?:[).:,;、]+|(?=\s)|$)[\s–-]*(.*)", re.I
)


def right_answer(question: Question, key: str) -> str:
    """What a data set gives as right, as the letter of an option; for free questions the text itself.

    Read in this order, without regard to blanks: a capital letter, bare or with brackets or a mark (`B`, `(B)`, `B.`);
    an option's text, by its case or, if only one fits, in any; a letter of any case, also after "option" or "answer"
    and before its own option's text (`b`, `(B) blue`, `option B`). Letters are read without quotes and Markdown and in
    full width too (`hide.replies.plain`). The place of an option in the list is no key.

    Raises:
        ValueError: it is none of the question's options, or several; or for free questions has no word. Such a
            question nobody can answer rightly.
    """
    text = " ".join(key.split())
    if not question.options:
        if not _words(text):
            raise ValueError(f"answer: got {key[:80]!r}, want a word at least")
        return text
    letters = LETTERS[: len(question.options)]
    simple = plain(text)
    if bare := re.fullmatch(rf"\(?([{letters}])[).:,;、]*", simple):
        return bare[1]
    for form in (str, _plain) if text else ():
        same = [letter for letter, own in zip(letters, question.options, strict=True) if form(own) == form(text)]
        if len(same) == 1:
            return same[0]
    named = _KEY.fullmatch(simple)
    letter = named[1].upper() if named else ""
    if named and letter in letters and _plain(named[2]) in ("", _plain(plain(question.options[letters.index(letter)]))):
        return letter
    raise ValueError(f"answer: got {key[:80]!r}, want one of the options {letters[0]} to {letters[-1]} or its text")


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
    from scipy.stats import binomtest  # a second of importing

    low, high = binomtest(right, total).proportion_ci(method="wilson")
    return Share(right, total, right / total, float(low), float(high))


class Difference(NamedTuple):
    """How much larger one share is than another of the same questions, with its 95 % interval, which is NaN of fewer
    than two groups; all NaN of nothing."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "none"
        bounds = "" if math.isnan(self.low) else f" ({100 * self.low:+.0f} to {100 * self.high:+.0f})"
        return f"{100 * self.value:+.1f}{bounds}"


RESAMPLES = 4000


def difference(ours: Sequence[bool | None], theirs: Sequence[bool | None], groups: Sequence[str]) -> Difference:
    """Of shares of what is true; `None` counts as false.

    Questions of one group, such as those about one picture, stand or fall together: the interval is that of the
    percentiles over `RESAMPLES` resamples of groups (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13), always the same ones.
    """
    import numpy as np

    if not ours:
        return Difference(math.nan, math.nan, math.nan)
    names = list(dict.fromkeys(groups))
    leads, counts = np.zeros((2, len(names)))
    for one, other, group in zip(ours, theirs, groups, strict=True):
        leads[names.index(group)] += (one is True) - (other is True)
        counts[names.index(group)] += 1
    if len(names) < 2:
        return Difference(float(leads.sum() / counts.sum()), math.nan, math.nan)
    drawn = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    low, high = np.percentile(leads[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return Difference(float(leads.sum() / counts.sum()), float(low), float(high))


def sound(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of questions; those that are none are not scored."""
    return [record for record in records if "place" not in record]


class MethodScore(NamedTuple):
    """One method over all questions: how many are right; replies that could not be read; mean tokens and seconds of
    the questions that did not fail; how many it answers right that the plain question does not, and the reverse: `None`
    where that was not asked.
    """

    share: Share
    unreadable: int
    tokens: float
    seconds: float
    gained: int | None
    lost: int | None


# Whose scores are shown where every question failed and nobody says which methods were asked.
USUAL = ("plain", "hide")


def score_methods(
    records: Sequence[dict[str, Any]], scorer: Scorer, methods: Sequence[str] = USUAL
) -> dict[str, MethodScore]:
    """Each method's score over all questions that it was asked; a failed question counts as wrong for all.

    methods: whose scores are wanted where every question failed.
    """
    found, records = {}, sound(records)
    names = _methods(records, methods)
    for method in names:
        asked = [record for record in records if record["error"] or method in record["replies"]]
        answered = [record for record in asked if not record["error"]]
        right = [verdict(record, method, scorer) for record in asked]
        both = list(zip(right, (verdict(record, "plain", scorer) for record in asked), strict=True))
        tokens, seconds = (
            fmean(record[what][method] for record in answered) if answered else math.nan
            for what in ("tokens", "seconds")
        )
        found[method] = MethodScore(
            share(right),
            sum(one is None and not record["error"] for one, record in zip(right, asked, strict=True)),
            tokens,
            seconds,
            gained=sum(bool(ours) and not theirs for ours, theirs in both) if "plain" in names else None,
            lost=sum(bool(theirs) and not ours for ours, theirs in both) if "plain" in names else None,
        )
    return found


def score_groups(
    records: Sequence[dict[str, Any]], scorer: Scorer, methods: Sequence[str] = USUAL
) -> Iterator[tuple[str, dict[str, Share], int]]:
    """Per split, then per size, then for all: (name, share of right replies by method, failed questions).

    methods: as `score_methods`.
    """
    records = sound(records)
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["split"]):
        groups.setdefault(record["split"], []).append(record)
    for record in sorted(records, key=_image_tokens):
        groups.setdefault(_size(_image_tokens(record)), []).append(record)
    groups["all"] = list(records)
    for name, chosen in groups.items():
        yield (
            name,
            {
                method: share([verdict(r, method, scorer) for r in chosen if r["error"] or method in r["replies"]])
                for method in _methods(records, methods)
            },
            sum(bool(record["error"]) for record in chosen),
        )


# Image tokens: a thumbnail, a screen, a photograph, 4K, what is shrunk to the limit of 16,384.
_SIZES = (100, 1_000, 4_000, 12_000)


def _image_tokens(record: dict[str, Any]) -> float:
    """Of the pictures, without the collages."""
    return sum(record["image_tokens"]) if not record["error"] else math.inf


def _size(tokens: float) -> str:
    if tokens == math.inf:
        return "size unknown"
    above = [limit for limit in _SIZES if limit >= tokens]
    return f"up to {above[0]:,} image tokens" if above else f"above {_SIZES[-1]:,} image tokens"


def _methods(records: Sequence[dict[str, Any]], methods: Sequence[str]) -> list[str]:
    """In the order in which they were asked; where no question could be, `methods`."""
    return list(dict.fromkeys(method for record in records for method in record["replies"])) or list(methods)


def verdict(record: dict[str, Any], method: str, scorer: Scorer) -> bool | None:
    """Whether a method's reply is right; `None`: it cannot be read, or there is none."""
    if method not in record["replies"]:
        return None
    return scorer(Question(record["question"], tuple(record["options"])), record["answer"], record["replies"][method])


def _words(text: str) -> list[str]:
    """Without articles, unless there is nothing else: the letter "A" may be what is asked for."""
    words = re.findall(r"\w+", text.lower())
    return [word for word in words if word not in ("a", "an", "the")] or words


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
