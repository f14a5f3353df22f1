"""How good an entity extractor is, on questions with annotated entities; and entities made wrong on purpose."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hide.evaluation.files import json_records
from hide.methods.hide.entities import Entities
from hide.questions import Question

if TYPE_CHECKING:
    from hide.methods.hide.method import HiDe

CORRUPTIONS = ("drop", "wrong", "add")


class LabelledQuestion(NamedTuple):
    """A question and the things that should be looked for."""

    question: Question
    entities: tuple[str, ...]


class Score(NamedTuple):
    """Sums over questions: what was found that should be, what was found, what should be."""

    right: int
    found: int
    wanted: int

    @property
    def precision(self) -> float:
        """Part of what was found that is right; 1 of nothing."""
        return self.right / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Part of what should be found that was; 1 of nothing."""
        return self.right / self.wanted if self.wanted else 1.0

    def __add__(self, other: tuple[int, ...]) -> Score:  # type: ignore[override]
        return Score(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class EntityScores(NamedTuple):
    """`things` counts entities whose content words are the annotated ones; `words` counts content words, each of which
    has a map of its own in HiDe; `wrong` is (annotated question, what was found) where things differ.
    """

    things: Score
    words: Score
    wrong: tuple[tuple[LabelledQuestion, tuple[str, ...]], ...]


def labelled_questions(
    path: str | Path | None = None, *, bad: Callable[[str], None] | None = None
) -> list[LabelledQuestion]:
    """The project's own questions, or those of a file of JSON lines with question, entities and, if any, options.

    Entities are noun phrases as the question writes them, without articles: things that can be seen, each with what
    describes it ("woman in yellow raincoat"), two things for "the cup next to the lamp".

    bad: called with each line that is no such question, its place and reason; without it, the first one is a
    `ValueError`, as is a file without any question.
    """
    if path is None:
        with resources.as_file(resources.files("hide.evaluation").joinpath("entity_questions.jsonl")) as own:
            return labelled_questions(own)
    found = []
    for _, place, record in json_records(Path(path), lines=True):
        try:
            found.append(_labelled(record))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"entities: {place}: {error if isinstance(error, ValueError) else repr(error)}"
            if bad is None:
                raise ValueError(reason) from None
            bad(reason)
    if not found:
        raise ValueError(f"entities: {path} holds no question with entities")
    return found


def _labelled(record: Any) -> LabelledQuestion:
    if isinstance(record, ValueError):
        raise record
    question, entities = Question.parse(record["question"], record.get("options") or None), record["entities"]
    if not isinstance(entities, list) or not all(isinstance(entity, str) for entity in entities):
        raise ValueError(f"entities: got {entities!r}, want a list of texts")
    return LabelledQuestion(question, tuple(entities))


# Words that an extractor may write between a thing and what describes it; they are no things themselves.
_JOINTS = frozenset("a an the of with in and de la s color colour size material shape".split())


def content_words(entity: str) -> frozenset[str]:
    """Of "car with red color" and of "red car": {car, red}."""
    return frozenset(re.findall(r"\w+(?:-\w+)*", entity.lower())) - _JOINTS


def score_entities(
    extract: Callable[[Question], Entities],
    questions: Iterable[LabelledQuestion],
    *,
    progress: Callable[[], None] | None = None,
) -> EntityScores:
    """Ask an extractor, such as `entities_by_rules` or `HiDe.entities`, for every question's entities."""
    things, words, wrong = Score(0, 0, 0), Score(0, 0, 0), []
    for annotated in questions:
        items = extract(annotated.question).items
        found = {words_of for words_of in map(content_words, items) if words_of}
        wanted = {content_words(entity) for entity in annotated.entities}
        things += (len(found & wanted), len(found), len(wanted))
        found_words, wanted_words = frozenset().union(*found), frozenset().union(*wanted)
        words += (len(found_words & wanted_words), len(found_words), len(wanted_words))
        if found != wanted:
            wrong.append((annotated, items))
        if progress is not None:
            progress()
    return EntityScores(things, words, tuple(wrong))


def other_things(data: str) -> list[str]:
    """Things that a data set's questions, by its name, could ask about as well: those of drawn scenes, for others those
    of the project's own questions."""
    from hide.tiny.scenes import KINDS

    own = (entity for question in labelled_questions() for entity in question.entities)
    return list(KINDS) if data.startswith("scenes") else sorted(set(own))


def with_wrong_entities(hide: HiDe, how: str, others: Sequence[str]) -> HiDe:
    """The same method, of whose entities one of every question is wrong; how, others: as `corrupting`."""
    extractor = corrupting(hide.entities, how, others)
    return type(hide)(hide.model, hide.preset, extractor=extractor, notes=hide.notes)


def corrupting(extract: Callable[[Question], Entities], how: str, others: Sequence[str]) -> Callable[[str], str]:
    """An extractor for `HiDe` that errs in one entity of every question.

    Args:
        extract: the extractor whose entities are made wrong.
        how: "drop" leaves one out, "wrong" puts another thing in its place, "add" adds another thing at the end. Where
            "drop" leaves none, `HiDe` searches for the question's own words.
        others: the other things to choose from; those with a word of the question in them are not chosen. The choice
            follows from the question's text alone.

    Raises:
        ValueError: an unknown `how`, or no other thing to choose.
    """
    if how not in CORRUPTIONS:
        raise ValueError(f"corrupt_entities: got {how!r}, want one of {', '.join(CORRUPTIONS)}")

    def extractor(text: str) -> str:
        question = Question.parse(text)
        items = list(extract(question).items)
        choose = random.Random(text)
        free = [other for other in others if not content_words(other) & content_words(question.text)]
        if how != "drop" and not free:
            raise ValueError(f"corrupt_entities: no other thing than those of {question.stem!r} to choose from")
        place = choose.randrange(len(items)) if items else 0
        if how == "drop":
            del items[place : place + 1]
        else:
            items[place if how == "wrong" else len(items) : place + 1] = [choose.choice(free)]
        return ", ".join(items)

    return extractor
