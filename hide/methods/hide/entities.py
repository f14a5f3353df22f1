"""Question -> entities: the short list of things to look for (first step of HiDe, arXiv 2510.00054)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from hide.questions import Question, without_wrapper
from hide.tags import CLOSE_TAG, OPEN_TAG, tagged, without_tags

Extractor = Callable[[str], str]
"""A user's own extractor: the question with its options -> entities, separated by commas; empty for none."""

MAX_ENTITIES = 24
MAX_LENGTH = 200
"""Characters of one entity: what is longer names no thing."""

ENTITY_PROMPT = f"""\
You list the visible things that a question about a picture speaks of, so that a search can look for each of them.

Work silently through these steps:
1. Collect every noun phrase of the question and of its answer options that could be seen in a picture.
2. Rewrite each phrase by the rules below, each on its own.
3. Where one phrase contains several things, make each thing an item of its own.
4. Join the items with a comma and a space, in lower case.
5. Put the line between the tags.

Rules:
- A thing alone is its bare noun, without article or number: "the two dogs" becomes "dogs".
- An adjective follows its noun as a value of its kind, joined by "with": "a red car" becomes "car with red color", \
"a small wooden box" becomes "box with small size with wood material".
- Possession becomes "of": "the man's hat" becomes "hat of man".
- A phrase that describes a thing stays with it, rewritten by the same rules: "the woman in a blue coat" becomes \
"woman with coat with blue color".
- A phrase that only says where two things stand keeps both as items: "the cup next to the lamp" becomes "cup, lamp".
- A compound noun stays whole: "traffic light" stays "traffic light".
- Leave out question words, verbs, asked-for properties, relations and anything that cannot be seen.

Output only one line: {OPEN_TAG}item, item, item{CLOSE_TAG}

Examples:
Question: What is the color of the girl's umbrella?
{OPEN_TAG}umbrella of girl{CLOSE_TAG}
Question: Is the yellow taxi on the left or right side of the street lamp?
{OPEN_TAG}taxi with yellow color, street lamp{CLOSE_TAG}
Question: Which brand is on the tall glass bottle behind the baker?
{OPEN_TAG}bottle with tall size with glass material, baker{CLOSE_TAG}

Question: {{question}}
"""


class Entities(NamedTuple):
    """`items` in order, each once; `notes` says what was unusual about the reply they come from."""

    items: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The items as the search prompt takes them."""
        return ", ".join(self.items)


def entity_request(question: Question, prompt: str | None = None) -> str:
    """The text to send to the model. `prompt` has `{question}` in it; `None`: `ENTITY_PROMPT`."""
    return (prompt or ENTITY_PROMPT).replace("{question}", question.text)


# A line of a list in Markdown or JSON.
_BULLET = re.compile(r"\s*(?:[-*•\"]|\d+[.)]\s)")
# What may stand before an item: the name of the list or a key of JSON, a number, articles.
_LABEL = re.compile(r"(?:.*:(?=[\s\"*\[{]))?", re.DOTALL)
_BEFORE = re.compile(r"(?:\d+[.)]\s+)?(?:(?:an?|the)\s+)*")
_AROUND = " \t\"'“”‘’`.*•-[]{}"


def parse_entities(reply: str, request: str = ENTITY_PROMPT) -> Entities:
    """Entities of a model's reply.

    The text after the last opening tag that has a word behind it, up to the next tag or the end. Without any tag the
    whole reply counts, as in the published code, but only its last line with a word, or the Markdown or JSON list that
    it ends. Items lose surrounding blanks, quotes, brackets, full stops, articles, numbers and labels; empty, repeated
    and very long ones are dropped; at most `MAX_ENTITIES` are kept.

    Lines of `request` that the reply repeats do not count, lest its examples be taken for entities; a line that begins
    with a tag counts as repeated only behind another such line, because it may also be the answer.
    """
    notes = []
    # A surrogate, which only an extractor of the user's can bring, would stop the tokenizer.
    lines = reply.encode(errors="replace").decode().splitlines()
    own = _without_echo(lines, request)
    if len(own) < len(lines):
        notes.append("entities: the model's reply repeated the request; that part was left out")
    body = tagged("\n".join(own))
    if body is None:
        body = _last_list(without_tags("\n".join(own)).splitlines())
        if body:
            notes.append("entities: the model's reply had no tags; its last line was read as the list")
    items: dict[str, None] = {}
    for item in re.split(r"[,;\n]", body):
        item = re.sub(r"\s+", " ", _LABEL.sub("", item, count=1)).strip(_AROUND).lower()
        item = _BEFORE.sub("", item, count=1).strip(_AROUND)
        if re.search(r"\w", item) and len(item) <= MAX_LENGTH:
            items[item] = None
    return _limited(items, notes)


def _without_echo(lines: list[str], request: str) -> list[str]:
    """`lines` without those of `request`, of which the last may be cut short."""
    known = {line.strip() for line in request.splitlines()}
    kept, echo = [], False
    for place, line in enumerate(lines):
        text = line.strip()
        if text:
            cut = echo and place == len(lines) - 1 and any(whole.startswith(text) for whole in known)
            echo = cut or (text in known and (echo or not text.startswith(OPEN_TAG)))
        if not (echo and text):
            kept.append(line)
    return kept


def _last_list(lines: list[str]) -> str:
    """The last line with a word, with the lines of the list that it ends."""
    worded = [line for line in lines if re.search(r"\w", line)]
    start = len(worded) - 1
    while start > 0 and _BULLET.match(worded[start]) and _BULLET.match(worded[start - 1]):
        start -= 1
    return "\n".join(worded[max(start, 0) :])


def _limited(items: dict[str, None], notes: list[str]) -> Entities:
    if len(items) > MAX_ENTITIES:
        notes = [*notes, f"entities: {len(items)} were named; the first {MAX_ENTITIES} were kept"]
    return Entities(tuple(items)[:MAX_ENTITIES], tuple(notes))


# Words that name no visible thing: they end a phrase.
_STOPWORDS = frozenset(
    """
a an the this that these those there here it its it's they them their he she his her him we us our you your i my me
some any each every all both either neither no not other another same such only just also more most less least many
much few several one ones
what which who whom whose where when why how whether
is are was were be been being am do does did done doing has have had having can could will would shall should may might
must see seen look looks looking appear appears show shows shown visible tell find describe name identify determine
count located placed positioned standing sitting lying facing wearing holding doing made happening written displayed
choose select answer please according based
of in on at to from by with without for into onto over under above below beneath behind beside between among near next
against along across around through inside outside off up down out about than as like
and or but nor so if then because while
left right top bottom side sides upper lower front back middle center centre corner part area region direction
relative position location
color colour colors colours shape size material kind type brand number pattern style texture
image images picture pictures photo photograph scene background foreground option options question
""".split()
)
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*", re.UNICODE)


def entities_by_rules(question: Question) -> Entities:
    """Entities without a model: runs of the question's content words, in any language that separates words.

    Function words, question words, places and names of attributes end a run; the possessive `'s` too, and a length of
    `MAX_LENGTH`. Sentences that only ask for a kind of answer name nothing. The options are read only when the question
    itself names nothing. At most `MAX_ENTITIES` are kept.
    """
    for text in (without_wrapper(question.stem), ", ".join(question.options)):
        items: dict[str, None] = {}
        run: list[str] = []
        position = 0
        for match in _WORD.finditer(text.lower()):
            word = re.sub(r"['’]s$", "", match[0])[:MAX_LENGTH]
            separated = bool(re.search(r"[^\s]", text[position : match.start()]))
            too_long = len(" ".join([*run, word])) > MAX_LENGTH
            if run and (separated or too_long or word in _STOPWORDS):
                items[" ".join(run)] = None
                run = []
            if word not in _STOPWORDS:
                run.append(word)
                if word != match[0]:
                    items[" ".join(run)] = None
                    run = []
            position = match.end()
        if run:
            items[" ".join(run)] = None
        if items:
            return _limited(items, [])
    return Entities(())
