"""Answers with a model of this process, whose sessions serve later requests about the same pictures too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hide.methods.base import Method, Steps, added
from hide.presets import RunSettings
from hide.serve.engine import Progress
from hide.serve.wire import Answered, Asked, Refused
from hide.session import ImageSession
from hide.session_pool import SessionPool


class LocalModel:
    """Ways of answering on one model; see `hide.serve.engine.Model`."""

    def __init__(self, ways: Mapping[str, Method[Any]], pool_bytes: int) -> None:
        """ways: name -> method, all on the same model. pool_bytes: of sessions that are kept (`SessionPool`)."""
        self.ways = tuple(ways)
        self._methods = dict(ways)
        self._pool = SessionPool(pool_bytes)
        self._prefills = self._hits = 0
        self._state: Mapping[str, float] = {}
        self._note_state()
        # Ways that are run alike share sessions, which keep the states that any of them looks at.
        self._taps: dict[RunSettings, set[int]] = {}
        for method in ways.values():
            self._taps.setdefault(method.preset.run, set()).update(method.taps)

    def answer(self, asked: Asked, progress: Progress) -> Answered:
        """See `hide.serve.engine.Model`. Where memory is too short, it is tried once more without any other session."""
        try:
            try:
                return self._answer(asked, progress)
            except MemoryError:
                self._pool.close()
            return self._answer(asked, progress)
        except MemoryError as error:
            raise Refused(413, f"messages: {error}", "messages") from None
        finally:
            self._note_state()

    def state(self) -> Mapping[str, float]:
        """See `hide.serve.engine.Model`; as it was after the last answer."""
        return self._state

    def close(self) -> None:
        """See `hide.serve.engine.Model`."""
        self._pool.close()

    def _note_state(self) -> None:
        # Asked for later it would wait: the pool is locked while a session is opened.
        pool = {"pool_sessions": len(self._pool), "pool_bytes": self._pool.nbytes}
        self._state = {"prefills_total": self._prefills, "pool_hits_total": self._hits, **pool}

    def _answer(self, asked: Asked, progress: Progress) -> Answered:
        method = self._methods[asked.way]
        run = method.preset.run
        steps = Steps(method.model.model.device, progress)
        before = self._prefills

        def opened() -> ImageSession:
            session = method.open(asked.pictures, taps=sorted(self._taps[run]), steps=steps)
            self._prefills += 1
            return session

        most = method.preset.answer.max_new_tokens
        most = most if asked.max_tokens is None else min(asked.max_tokens, most)
        try:
            session = self._pool.get((asked.key, run), opened)
            answer = method.ask(session, asked.question, max_new_tokens=most, progress=progress)
        # What a model cannot do with pictures and texts says so with these.
        except ValueError as error:
            raise Refused(400, str(error), "messages") from None
        held = session.length if self._prefills == before else 0
        self._hits += bool(held)
        answer = dataclasses.replace(
            answer, steps=added(steps.finished(), answer.steps), notes=(*asked.notes, *answer.notes)
        )
        reply = len(method.model.reply_ids(answer.text)[0]) - 1
        # Benchmarks look for the bare letter, and find one in words that mean another.
        return Answered(
            answer.letter or answer.text,
            prompt_tokens=held + sum(answer.tokens.values()) - reply,
            completion_tokens=reply,
            cached_tokens=held,
            cut=reply >= most,
            found=answer.to_dict(),
        )
