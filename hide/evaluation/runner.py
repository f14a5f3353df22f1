"""Ask a model every question of a data set, and lose nothing when the run is killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from hide.evaluation.data import BadRecord, Sample, distinct
from hide.evaluation.store import ResultFile, bad_record, blank_record
from hide.evaluation.views import VIEWS
from hide.images import picture_notes
from hide.pipeline import HiDe


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
        ask: samples -> their records, in any order, each as soon as it is known: `partial(ask_here, hide)`, or
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


def ask_here(
    hide: HiDe, samples: Iterable[Sample], methods: Sequence[str] = ("plain", "hide")
) -> Iterator[dict[str, Any]]:
    """One question after the other, in this process."""
    for sample in samples:
        yield answer(hide, sample, methods)


def answer(hide: HiDe, sample: Sample, methods: Sequence[str] = ("plain", "hide")) -> dict[str, Any]:
    """One question's record: each method's reply, tokens and seconds, the boxes and notes; or the error.

    `methods` are names in `METHODS`. Tokens are all that went through the model for the method, prompts and replies;
    seconds its wall time; the prefix and other steps that methods share are counted for each. "true-boxes" is left out
    where the data set has no boxes.
    """
    record = blank_record(sample, "")
    try:
        with picture_notes() as seen:
            image = sample.image()
        start = time.perf_counter()
        with hide.open(image) as session:
            opened = time.perf_counter() - start
            result = hide.ask(session, sample.question, plain="plain" in methods)
            record["replies"] = {"plain": result.plain_answer, "hide": result.answer}
            seconds, tokens = result.seconds, result.tokens
            last = seconds.get("answer", 0.0)
            before = opened + sum(seconds.values()) - seconds.get("plain answer", 0.0) - last
            tokens_before = session.length + tokens["entities"] + tokens["attention rows"]
            record["seconds"] = {"plain": opened + seconds.get("plain answer", 0.0), "hide": before + last}
            record["tokens"] = {
                "plain": session.length + tokens.get("plain answer", 0),
                "hide": tokens_before + tokens.get("answer", tokens.get("plain answer", 0)),
            }
            for method in methods:
                if method not in VIEWS:
                    continue
                own = method == "true-boxes"
                if own and not sample.boxes:
                    continue
                boxes = [torch.tensor(sample.boxes)] if own else result.boxes
                start = time.perf_counter()
                # The data set's boxes are those of the first picture.
                views = [
                    VIEWS[method](picture, of_picture, hide.config.fill) if len(of_picture) else None
                    for picture, of_picture in zip(result.images, boxes, strict=False)
                ]
                reply = hide.answer(session, sample.question, views)
                spent = time.perf_counter() - start
                record["replies"][method] = reply.text
                record["seconds"][method] = (opened if own else before) + spent
                record["tokens"][method] = (session.length if own else tokens_before) + reply.tokens
    except Exception as error:  # whatever one question does, the others are asked
        return blank_record(sample, f"{type(error).__name__}: {error}")
    facts = result.to_dict()
    kept = {name: facts[name] for name in ("images", "entities", "boxes", "collages", "image_tokens", "notes")}
    kept["notes"] = [*sample.notes, *seen, *kept["notes"]]
    asked = {name: {m: of[m] for m in methods if m in of} for name, of in record.items() if isinstance(of, dict)}
    return {**record, **asked, **kept, "error": None}
