"""Counts of a server, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class _About(NamedTuple):
    kind: str
    help: str


# Without the prefix hide_; those of an engine are its `state`, the others are counted here.
_METRICS = {
    "requests_total": _About("counter", "Requests by path and HTTP status; 499: the client has gone."),
    "answers_total": _About("counter", "Answers by way."),
    "answer_seconds": _About("histogram", "What an answer took, its wait in line included."),
    "tokens_total": _About("counter", "Language-model positions by kind: computed prompt, cached prompt, reply."),
    "waiting": _About("gauge", "Requests in line."),
    "running": _About("gauge", "Requests that are being answered."),
    "held_bytes": _About("gauge", "Bodies of requests that are not answered yet."),
    "prefills_total": _About("counter", "Pictures, or sets of them, that were encoded."),
    "pool_hits_total": _About("counter", "Requests about pictures that were encoded already."),
    "pool_sessions": _About("gauge", "Encoded pictures that are kept."),
    "pool_bytes": _About("gauge", "Device memory that they hold."),
}
_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """Counters of a server; used from the thread of its event loop alone."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, float]] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Count; labels hold names that we choose, and no text of a client."""
        said = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        self._add(name, f"{{{said}}}", value)

    def seconds(self, name: str, value: float) -> None:
        """One more of a histogram."""
        for bound in _BUCKETS:
            self._add(name, f'_bucket{{le="{bound:g}"}}', value <= bound)
        self._add(name, '_bucket{le="+Inf"}', 1)
        self._add(name, "_sum", value)
        self._add(name, "_count", 1)

    def text(self, state: Mapping[str, float]) -> str:
        """All of them, with what an engine says of itself."""
        lines = []
        for name, (kind, about) in _METRICS.items():
            found = {"": state[name]} if name in state else self._counts.get(name, {})
            if found:
                lines += [f"# HELP hide_{name} {about}", f"# TYPE hide_{name} {kind}"]
                lines += [f"hide_{name}{rest} {float(value):.10g}" for rest, value in found.items()]
        return "\n".join([*lines, ""])

    def _add(self, name: str, rest: str, value: float) -> None:
        counts = self._counts.setdefault(name, {})
        counts[rest] = counts.get(rest, 0) + value


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
