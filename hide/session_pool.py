"""Sessions of several pictures within a bound of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hide.session import ImageSession


class SessionPool:
    """Sessions of several pictures, least recently used ones closed when they hold more than `budget` bytes.

    Several threads may share a pool. A session that another thread has got from it leaves the pool in the same way, but
    is not closed: its memory is freed when that thread lets go of it. An empty pool is true, as any pool.
    """

    def __init__(self, budget: int) -> None:
        """budget: bytes of keys, values and sources on the devices, in all; the newest session is kept even if it alone
        has more. Sessions with `offload` count for two layers and the sources: the host's memory has no bound here."""
        if budget < 0:
            raise ValueError(f"budget: got {budget}, want bytes, 0 or more")
        self.budget = budget
        # With the threads that have got each.
        self._sessions: dict[object, tuple[ImageSession, set[int]]] = {}
        self._lock = threading.RLock()

    def get(self, key: object, open_session: Callable[[], ImageSession]) -> ImageSession:
        """The session of `key`, made by `open_session` where there is none; other threads wait meanwhile.

        Where memory is too short for it, all others are closed and it is tried once more.
        """
        with self._lock:
            session, users = self._sessions.pop(key, (None, set[int]()))
            if session is None or session.closed:
                session, users = None, set()
                try:
                    session = open_session()
                except MemoryError:
                    if not self._sessions:
                        raise
                if session is None:
                    # Out here, where the error no longer holds what the first try had made.
                    while self._sessions:
                        self._drop_oldest()
                    session = open_session()
            self._sessions[key] = session, {*users, threading.get_ident()}
            while self.nbytes > self.budget and len(self._sessions) > 1:
                self._drop_oldest()
            return session

    @property
    def nbytes(self) -> int:
        """Held by all sessions."""
        with self._lock:
            return sum(session.nbytes for session, _ in self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)

    def __bool__(self) -> bool:
        return True

    def close(self) -> None:
        """Close all, those of other threads too."""
        with self._lock:
            for session, _ in self._sessions.values():
                session.close()
            self._sessions.clear()

    def _drop_oldest(self) -> None:
        session, users = self._sessions.pop(next(iter(self._sessions)))
        if users <= {threading.get_ident()}:
            session.close()
