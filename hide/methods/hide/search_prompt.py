"""HiDe's search prompt: fixed words, whose attention is the noise prior, then the entities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hide.methods.hide.config import SEARCH_PROMPT
from hide.session import Message, Session, Turn

# By family the id of the token that ends an image in its own tokenizer, and how many prior rows the published code has
# with it: the eight tokens of the prompt, and with InternVL the line break that its template puts behind an image.
PUBLISHED_PRIOR = {"qwen2_5_vl": (151653, 8), "qwen3_vl": (151653, 8), "internvl": (151666, 9)}


@dataclass(frozen=True)
class SearchPrompt:
    """The turn, and its rows that count.

    rows: places of the tokens, those of the fixed words first. prior_rows: how many those are. labels: text of each
    token after them.
    """

    turn: Turn
    rows: range
    prior_rows: int
    labels: tuple[str, ...]


def search_prompt(
    session: Session,
    entities: str,
    images: Sequence[Tensor] = (),
    *,
    family: str = "",
    prompt: str = SEARCH_PROMPT,
    include_end_token: bool = True,
) -> SearchPrompt:
    """The session's images, further ones, then `prompt` + `entities`, and where its tokens lie.

    What the chat template puts between the images and the prompt, such as a line break, belongs to the prior.

    Args:
        family: of the model; of those that HiDe was published for, the number of prior rows is checked.
        include_end_token: whether the token that ends the turn counts as an entity's.

    Raises `ValueError` if the prompt's fixed words are not tokens of their own before these entities, or if the
    family's own tokenizer does not make as many of them as the published code has.
    """
    text = prompt + entities
    turn = session.turn([Message(text, list(images))] if images else text)
    start, fixed = turn.images_end, len(prompt.rstrip())
    behind = [(place, first) for place, (first, end) in zip(turn.rows, turn.offsets, strict=True) if end > fixed]
    stop, first = behind[0] if behind else (turn.rows.stop, fixed)
    if first < fixed:
        raise ValueError(
            f"search_prompt: {prompt!r} followed by {entities[:40]!r} does not keep its words as tokens of their own; "
            "end it with punctuation and a blank"
        )
    if prompt == SEARCH_PROMPT and family in PUBLISHED_PRIOR:
        end_of_image, want = PUBLISHED_PRIOR[family]
        if turn.input_ids[0, start - 1] == end_of_image and stop - start != want:
            raise ValueError(
                f"tokenizer: the search prompt has {stop - start} tokens, want {want} with the family's own"
            )
    rows = range(start, turn.rows.stop + (include_end_token and turn.ended))
    labels = tuple(label.strip() for label in turn.labels[stop - start : rows.stop - start])
    return SearchPrompt(turn, rows, stop - start, labels)
