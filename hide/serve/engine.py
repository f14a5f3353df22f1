"""What answers requests: the protocol of an engine, and the one whose model runs on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from hide.serve.limits import Limits
from hide.serve.wire import Answered, Asked, Refused

log = logging.getLogger("hide.serve")
FAILED = "server: it failed at this request; its log says why"

Progress = Callable[[str], None]
"""Called with the name of each step when it begins; raises where nobody wants the answer any more."""


class Engine(Protocol):
    """What a server asks. One that batches requests by itself, as vLLM does, is a class with these."""

    @property
    def ways(self) -> Sequence[str]:
        """The names that a request's `model` may have."""

    async def ask(self, asked: Asked) -> Answered:
        """Answer a request; cancelling it frees what it holds as soon as may be.

        Raises `Refused` for what cannot be answered, or not now.
        """

    def state(self) -> Mapping[str, float]:
        """Numbers of this moment, under the names of `hide.serve.metrics`; it waits for nothing."""

    @property
    def alive(self) -> bool:
        """Whether it still answers."""

    def close(self) -> None:
        """Stop answering; those who wait are refused."""


class Model(Protocol):
    """What runs on the thread of a `Worker`, one request at a time."""

    @property
    def ways(self) -> Sequence[str]:
        """As `Engine.ways`."""

    def answer(self, asked: Asked, progress: Progress) -> Answered:
        """As `Engine.ask`; whatever `progress` raises goes through."""

    def state(self) -> Mapping[str, float]:
        """As `Engine.state`, from any thread, at once even while `answer` runs."""

    def close(self) -> None:
        """Free what it holds."""


class Gone(Exception):
    """Nobody waits for the answer."""


class _Job:
    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.gone = False
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Answered] = self._loop.create_future()

    def step(self, name: str) -> None:
        if self.gone:
            raise Gone(name)

    def finish(self, outcome: Answered | BaseException) -> None:
        """From any thread."""
        # The loop may be closed, with everybody who waited in it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._finish, outcome)

    def _finish(self, outcome: Answered | BaseException) -> None:
        if self.future.done():
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Line:
    """Jobs that wait, those about the same pictures behind each other, so that a prefill serves them all."""

    def __init__(self, limits: Limits) -> None:
        self._most, self._in_a_row = limits.waiting, limits.in_a_row
        self._groups: OrderedDict[bytes, deque[_Job]] = OrderedDict()
        self._changed = threading.Condition()
        self._last, self._row = b"", 0
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._groups.values()))

    def join(self, job: _Job) -> None:
        """`Refused` where as many wait as may."""
        with self._changed:
            if self._closed:
                raise Refused(503, "server: it is shutting down")
            if len(self) >= self._most:
                raise Refused(429, f"line: {self._most} requests wait already", code="rate_limit_exceeded")
            self._groups.setdefault(job.asked.key, deque()).append(job)
            self._changed.notify()

    def leave(self, job: _Job) -> None:
        """Where it still waits."""
        with self._changed:
            waiting = self._groups.get(job.asked.key, ())
            if job in waiting:
                self._take(job.asked.key, job)

    def next(self) -> _Job | None:
        """Waits for one; `None` once the line is closed.

        Jobs about the pictures of the last one come first, but no more than `in_a_row` while others wait.
        """
        with self._changed:
            while not self._groups and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            if self._last in self._groups and self._row >= self._in_a_row:
                self._groups.move_to_end(self._last)
            key = self._last if self._last in self._groups and self._row < self._in_a_row else next(iter(self._groups))
            self._row = self._row + 1 if key == self._last and self._row < self._in_a_row else 1
            self._last = key
            job = self._groups[key][0]
            self._take(key, job)
            return job

    def close(self) -> list[_Job]:
        """Nobody joins any more; returns those who wait."""
        with self._changed:
            self._closed = True
            left = [job for group in self._groups.values() for job in group]
            self._groups.clear()
            self._changed.notify_all()
            return left

    def _take(self, key: bytes, job: _Job) -> None:
        self._groups[key].remove(job)
        if not self._groups[key]:
            del self._groups[key]


class Worker:
    """An engine whose model runs on one thread, which nothing else touches it from."""

    def __init__(self, model: Model, limits: Limits) -> None:
        self.ways = tuple(model.ways)
        self._model, self._line = model, Line(limits)
        self._running: _Job | None = None
        self._thread = threading.Thread(target=self._work, name="hide.serve", daemon=True)
        self._thread.start()

    async def ask(self, asked: Asked) -> Answered:
        """See `Engine`. What already runs stops at its next step."""
        job = _Job(asked)
        self._line.join(job)
        try:
            return await job.future
        finally:
            job.gone = True
            self._line.leave(job)
            # Its error would hold this frame, and so the request's pictures.
            del job

    def state(self) -> Mapping[str, float]:
        """See `Engine`."""
        return {"waiting": len(self._line), "running": int(self._running is not None), **self._model.state()}

    @property
    def alive(self) -> bool:
        """See `Engine`."""
        return self._thread.is_alive()

    def close(self) -> None:
        """See `Engine`; waits for the running step to end."""
        waiting, running = self._line.close(), self._running
        for job in [*waiting, *([running] if running else [])]:
            job.gone = True
            job.finish(Refused(503, "server: it is shutting down"))
        self._thread.join()

    def _work(self) -> None:
        while (job := self._line.next()) is not None:
            self._running = job
            self._answer(job)
            # Not held while the next one is waited for: a request may have many pictures.
            self._running = job = None
        self._model.close()

    def _answer(self, job: _Job) -> None:
        try:
            job.step("line")
            job.finish(self._model.answer(job.asked, job.step))
        except (Gone, Refused) as known:
            job.finish(known.with_traceback(None))
        except BaseException:  # whatever it is, the next request is answered
            log.exception("a request failed")
            job.finish(Refused(500, FAILED))
