"""What the gate learns from: questions that a model answers alike from some image budget on, and those that it always
answers alike (consistency-aware routing, arXiv 2604.06912)."""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# Of a question that is hard: how often one of its largest wrong budgets is shown.
WRONG_SHOWN = 0.9
_UNMARKED = str.maketrans("", "", string.punctuation)


class Route(NamedTuple):
    """A question of the gate's stage. wrong: how many of the lowest budgets answer it otherwise; 0: it is easy."""

    id: str
    wrong: int


def same(one: str, other: str) -> bool:
    """Whether either text is a part of the other; an empty one is the same as none."""
    return bool(one and other) and (one in other or other in one)


def normal(text: str) -> str:
    """In lower case, without blanks around it and without punctuation."""
    return text.lower().strip().translate(_UNMARKED)


def route(id: str, replies: Sequence[str], answer: str) -> Route | None:
    """A question by the replies at ascending budgets; `None` where they say nothing.

    The two at the largest budgets agree, with each other and with the answer. The others do too, or those that do not
    are the lowest, and wrong.
    """
    said, truth = [normal(reply) for reply in replies], answer.lower().strip()
    agreed = said[-1]
    if said[-2] != agreed or not same(agreed, truth):
        return None
    other = [not same(one, agreed) for one in said]
    count = sum(other)
    known = all(other[:count]) and not any(same(one, truth) for one in said[:count])
    return Route(id, count) if known else None


def routes(records: Iterable[Mapping[str, Any]], budgets: Sequence[int], most: int, seed: int) -> list[Route]:
    """All hard questions, as many easy ones by chance, shuffled, and of these `most`.

    records: with `id`, `answer` and `replies` by budget, as text.
    """
    found = [route(one["id"], [one["replies"][str(budget)] for budget in budgets], one["answer"]) for one in records]
    known = [one for one in found if one is not None]
    hard, easy = ([one for one in known if bool(one.wrong) is kind] for kind in (True, False))
    rng = random.Random(seed)
    chosen = hard + rng.sample(easy, min(len(easy), len(hard)))
    rng.shuffle(chosen)
    return chosen[:most]


def shown(route: Route, budgets: Sequence[int], rng: random.Random) -> tuple[int, int] | None:
    """The budget in which a question is shown, and whether the gate is to open (1) or not (0).

    An easy one in any but the two largest. A hard one mostly in one of the two largest that answer it wrongly, else in
    one that answers it rightly, below the two largest; `None` where there is none.
    """
    below = budgets[:-2]
    if not route.wrong:
        return rng.choice(below), 0
    if rng.random() < WRONG_SHOWN:
        return rng.choice(budgets[max(0, route.wrong - 2) : route.wrong]), 1
    right = below[route.wrong :]
    return (rng.choice(right), 0) if right else None
