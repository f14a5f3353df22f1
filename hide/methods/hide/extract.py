"""HiDe's first step with a model: it is asked what a question mentions; what was asked once is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hide.engine import stock
from hide.engine.greedy import supports_static_decode
from hide.engine.prefix import Prefix
from hide.methods.hide.config import HiDeConfig
from hide.methods.hide.entities import (
    MAX_LENGTH,
    Entities,
    Extractor,
    entities_by_rules,
    entity_request,
    parse_entities,
)
from hide.models.base import Adapter
from hide.questions import Question
from hide.tags import CLOSE_TAG, OPEN_TAG

# Questions whose entities are remembered.
MEMO = 4096


class EntityExtractor:
    """Questions -> entities, by a user's function, by rules, or by the model."""

    def __init__(self, model: Adapter, extractor: Extractor | None = None, *, prefill_chunk: int = 2048) -> None:
        """extractor: in place of rules and model. prefill_chunk: for the instruction, as `RunSettings` has it."""
        self._model, self._extractor, self._chunk = model, extractor, prefill_chunk
        self._instruction: tuple[str | None, Prefix] | None = None
        # Under the question and all that its entities depend on.
        self._known: dict[tuple[Any, ...], Entities] = {}

    def __call__(self, questions: Sequence[Question], settings: HiDeConfig) -> list[Entities]:
        """Of each question; those that the model is asked for are decoded as one batch."""
        made_by = (settings.entities_from, settings.entity_prompt, settings.max_entity_tokens)
        with self._model.lock:
            seen = {one.text: self._known.get((one.text, made_by)) for one in questions}
        known = {text: entities for text, entities in seen.items() if entities is not None}
        new = {question.text: question for question in questions if question.text not in known}
        if self._extractor is not None:
            for text in new:
                reply = self._extractor(text)
                if not isinstance(reply, str):
                    raise TypeError(f"extractor: it returned {type(reply).__name__}, want a string")
                known[text] = parse_entities(f"{OPEN_TAG}{reply}{CLOSE_TAG}")
        elif settings.entities_from == "rules":
            known |= {text: entities_by_rules(question) for text, question in new.items()}
        elif new:
            requests = [entity_request(question, settings.entity_prompt) for question in new.values()]
            for text, request, reply in zip(new, requests, self._replies(requests, settings), strict=True):
                known[text] = parse_entities(reply, request)
        with self._model.lock:
            self._known |= {(text, made_by): known[text] for text in new}
            while len(self._known) > MEMO:
                self._known.pop(next(iter(self._known)))
        return [_or_own_words(known[question.text], question) for question in questions]

    def _replies(self, requests: Sequence[str], settings: HiDeConfig) -> list[str]:
        """What the model says; the words that all requests begin with were sent through it once."""
        most, model = settings.max_entity_tokens, self._model
        prefix = self._prefix(settings)
        prompts = [model.input_ids(request) for request in requests]
        if not all(torch.equal(ids[:, : prefix.length], prefix.ids) for ids in prompts):
            return [stock.generate(model, request, max_new_tokens=most).text for request in requests]
        if len(prompts) > 1 and supports_static_decode(model):
            replies = prefix.replies(prompts, max_new_tokens=most)
        else:
            replies = [prefix.reply(ids, max_new_tokens=most) for ids in prompts]
        return [model.decode(reply) for reply in replies]

    def _prefix(self, settings: HiDeConfig) -> Prefix:
        asked = settings.entity_prompt
        with self._model.lock:
            if self._instruction is None or self._instruction[0] != asked:
                ids = [
                    self._model.input_ids(entity_request(Question.parse(text), asked))[0]
                    for text in ("What?", "9 things are there.")
                ]
                shorter = min(map(len, ids))
                differs = (ids[0][:shorter] != ids[1][:shorter]).nonzero()
                # The last common token may melt into other questions.
                common = max(1, int(differs[0]) - 1) if len(differs) else shorter - 1
                self._instruction = (asked, Prefix(self._model, ids[0][None, :common], prefill_chunk=self._chunk))
            return self._instruction[1]


def _or_own_words(entities: Entities, question: Question) -> Entities:
    if entities.items:
        return entities
    words = " ".join(question.stem.split())[:MAX_LENGTH]
    note = "entities: none were found; the question's own words took their place"
    return Entities((words,), (*entities.notes, note))
