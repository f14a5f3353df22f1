"""Question -> entities: the short list of things to look for (first step of HiDe, arXiv 2510.00054)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from hide.questions import Question

Extractor = Callable[[str], str]
"""A user's own extractor: the question with its options -> entities, separated by commas; empty for none."""

OPEN_TAG, CLOSE_TAG = "<FINAL_OUTPUT>", "</FINAL_OUTPUT>"
MAX_ENTITIES = 24

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


def parse_entities(reply: str) -> Entities:
    """Entities of a model's reply.

    The text after the last opening tag, up to the next closing tag or the end. Without tags the whole reply counts, as
    in the published code, but only its last line that is not empty. Items lose surrounding blanks, quotes, full stops
    and articles; empty and repeated ones are dropped; at most `MAX_ENTITIES` are kept.
    """
    notes = []
    if OPEN_TAG in reply:
        body = reply.rpartition(OPEN_TAG)[2].partition(CLOSE_TAG)[0]
    else:
        body = next((line for line in reversed(reply.replace(CLOSE_TAG, "").splitlines()) if line.strip()), "")
        if re.search(r"\w", body):
            notes.append("entities: the model's reply had no tags; its last line was read as the list")
    items: dict[str, None] = {}
    for item in re.split(r"[,;\n]", body):
        item = re.sub(r"\s+", " ", item).strip(" \t\"'.`*-").lower()
        item = re.sub(r"^(?:an?|the)\s+", "", item)
        if re.search(r"\w", item) and len(item) <= 200:
            items[item] = None
    if len(items) > MAX_ENTITIES:
        notes.append(f"entities: the reply named {len(items)}; the first {MAX_ENTITIES} were kept")
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

    Function words, question words, places and names of attributes end a run; the possessive `'s` too. The options are
    read only when the question itself names nothing.
    """
    for text in (question.stem, ", ".join(question.options)):
        items: dict[str, None] = {}
        run: list[str] = []
        position = 0
        for match in _WORD.finditer(text.lower()):
            word = re.sub(r"['’]s$", "", match[0])
            separated = bool(re.search(r"[^\s]", text[position : match.start()]))
            if run and (separated or word in _STOPWORDS):
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
            return Entities(tuple(items)[:MAX_ENTITIES])
    return Entities(())
