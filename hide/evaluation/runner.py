"""Ask a model every question of a data set, and lose nothing when the run is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from hide.evaluation.data import BadRecord, Sample, distinct
from hide.evaluation.store import ResultFile, bad_record, blank_record
from hide.images import picture_notes
from hide.methods.base import Method, ask_all


def evaluate(
    ask: Callable[[Iterable[Sample]], Iterable[dict[str, Any]]],
    samples: Iterable[Sample | BadRecord],
    results: ResultFile,
    *,
    retry_failed: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Ask every sample that `results` has no record of, and record each as soon as it is answered.

    A bad record is recorded and not asked. Ids are made unique (`hide.evaluation.data.distinct`). Where the data set
    has another question, options or picture under an id than the result, it is asked again; where only the right answer
    or the split is another, the result gets the new one.

    Args:
        ask: samples -> their records, in any order, each as soon as it is known: `partial(ask_here, methods)`, or
            `hide.evaluation.on_ray`. It may be handed no sample.
        samples: as the readers of `hide.evaluation.data` yield or raise them.
        retry_failed: ask those again whose record is an error.
        progress: called with each record, also with those that were there before.
    """

    def keep(record: dict[str, Any]) -> None:
        if record != results.records.get(record["id"]):
            results.append(record)
        if progress is not None:
            progress(record)

    def open_questions() -> Iterator[Sample]:
        for sample in distinct(samples):
            if isinstance(sample, BadRecord):
                keep(bad_record(sample))
                continue
            record = results.records.get(sample.id)
            if record is None or (retry_failed and record["error"]):
                yield sample
                continue
            now = blank_record(sample, "")
            if any(record.get(name, now[name]) != now[name] for name in ("question", "options", "picture")):
                note = "asked again: under this id the data set had another question before"
                yield replace(sample, notes=(*sample.notes, note))
            else:
                keep({**record, "answer": sample.answer, "split": sample.split})

    for record in ask(open_questions()):
        keep(record)


def ask_here(methods: Sequence[Method[Any]], samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
    """One question after the other, in this process."""
    for sample in samples:
        yield answer(methods, sample)


def answer(methods: Sequence[Method[Any]], sample: Sample) -> dict[str, Any]:
    """One question's record: each method's reply, tokens, seconds, boxes and details, and the notes; or the error.

    The methods share one session. Tokens are all that went through the model for the method, prompts and replies;
    seconds its wall time; the prefix that they share is counted for each. A method that wants the right boxes is left
    out where the data set has none.
    """
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"methods: got {', '.join(names)}, want each name once: results are kept by name")
    record = blank_record(sample, "")
    bound = [method.with_boxes(sample.boxes) for method in methods]
    asked = [method for method in bound if method is not None]
    try:
        if not asked:
            raise ValueError("methods: none can do without the right boxes, which the data set does not have")
        with picture_notes() as seen:
            image = sample.image()
        answers = ask_all(asked, list(image) if isinstance(image, tuple) else image, sample.question)
    except Exception as error:  # whatever one question does, the others are asked
        return blank_record(sample, f"{type(error).__name__}: {error}")
    first = answers[0]
    return {
        **record,
        "replies": {one.method: one.text for one in answers},
        "seconds": {one.method: sum(one.seconds.values()) for one in answers},
        "tokens": {one.method: sum(one.tokens.values()) for one in answers},
        "images": [list(image.size) for image in first.images],
        "image_tokens": list(first.image_tokens),
        "boxes": {one.method: [found.tolist() for found in one.boxes] for one in answers if one.evidence},
        "details": {one.method: dict(one.details) for one in answers if one.details},
        "notes": list(dict.fromkeys([*sample.notes, *seen, *(note for one in answers for note in one.notes)])),
        "error": None,
    }
