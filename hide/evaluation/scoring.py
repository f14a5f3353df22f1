"""Whether a reply is right, how sure a share of right replies is, and what each method scores over all questions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist, fmean
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
    """How many are true; `None` counts as false."""
    total, right = len(results), sum(result is True for result in results)
    return Share(right, total, right / total, *wilson(right / total, total)) if total else Share(0, 0, *[math.nan] * 3)


def wilson(value: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of `total`, of which it need not be a whole number (Wilson 1927: usable at 0 and 1
    and for few)."""
    z = NormalDist().inv_cdf(0.975)
    centre, scale = value + z**2 / (2 * total), 1 + z**2 / total
    half = z * math.sqrt(value * (1 - value) / total + (z / (2 * total)) ** 2)
    return (centre - half) / scale if value > 0 else 0.0, (centre + half) / scale if value < 1 else 1.0


class Difference(NamedTuple):
    """How much larger one share is than another of the same questions, with its 95 % interval; that is NaN where all
    groups differ alike, of which nothing can be learnt by resampling, or there are fewer than two. All NaN of nothing.
    """

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
    if np.ptp(leads / counts) == 0:
        return Difference(float(leads.sum() / counts.sum()), math.nan, math.nan)
    drawn = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    low, high = np.percentile(leads[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return Difference(float(leads.sum() / counts.sum()), float(low), float(high))


class Paired(NamedTuple):
    """One way of answering beside another on the same questions: how much more often it is right, how many it answers
    right that the other does not, and the reverse, and the probability of two numbers at least as far apart if each was
    as likely (McNemar 1947, exact, two-sided)."""

    lead: Difference
    gained: int
    lost: int
    p: float


def paired(ours: Sequence[bool | None], theirs: Sequence[bool | None], groups: Sequence[str]) -> Paired:
    """Of what is true; `None` counts as false. groups: as for `difference`; the probability takes questions one by
    one."""
    from scipy.stats import binomtest

    gained = sum(one is True and other is not True for one, other in zip(ours, theirs, strict=True))
    lost = sum(other is True and one is not True for one, other in zip(ours, theirs, strict=True))
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Paired(difference(ours, theirs, groups), gained, lost, p)


def sound(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of questions; those that are none are not scored."""
    return [record for record in records if "place" not in record]


class MethodScore(NamedTuple):
    """One method over all questions: how many are right; replies that could not be read; mean tokens and seconds of
    the questions that did not fail; and it beside the plain question: `None` where that was not asked.
    """

    share: Share
    unreadable: int
    tokens: float
    seconds: float
    against_plain: Paired | None


# Whose scores are shown where every question failed and nobody says which methods were asked.
USUAL = ("plain", "hide")


def score_methods(
    records: Sequence[dict[str, Any]], scorer: Scorer, methods: Sequence[str] = USUAL
) -> dict[str, MethodScore]:
    """Each method's score over all questions that it was asked; a failed question counts as wrong for all.

    methods: whose scores are wanted where every question failed.
    """
    found, records = {}, sound(records)
    names = methods_in(records, methods)
    for method in names:
        asked = [record for record in records if record["error"] or method in record["replies"]]
        answered = [record for record in asked if not record["error"]]
        right = [verdict(record, method, scorer) for record in asked]
        plainly = [verdict(record, "plain", scorer) for record in asked]
        tokens, seconds = (
            fmean(record[what][method] for record in answered) if answered else math.nan
            for what in ("tokens", "seconds")
        )
        found[method] = MethodScore(
            share(right),
            sum(one is None and not record["error"] for one, record in zip(right, asked, strict=True)),
            tokens,
            seconds,
            paired(right, plainly, [group_of(record) for record in asked]) if "plain" in names else None,
        )
    return found


def group_of(record: dict[str, Any]) -> str:
    """What questions about one picture have in common."""
    return str(record.get("picture") or record["id"])


def agreement(records: Sequence[dict[str, Any]], scorer: Scorer, one: str, other: str) -> float:
    """The part of the questions that both ways answered which both get right or both wrong; NaN of none."""
    both = [record for record in sound(records) if {one, other} <= record["replies"].keys()]
    alike = [(verdict(r, one, scorer) is True) == (verdict(r, other, scorer) is True) for r in both]
    return fmean(alike) if alike else math.nan


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
                for method in methods_in(records, methods)
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


def methods_in(records: Sequence[dict[str, Any]], methods: Sequence[str] = USUAL) -> list[str]:
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
