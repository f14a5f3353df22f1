"""Ask a model every question of a data set, and lose nothing when the run is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hide.evaluation.data import BadRecord, Sample, distinct
from hide.evaluation.store import ResultFile, bad_record, blank_record
from hide.images import picture_notes
from hide.methods.base import Answer, Method, Step, Steps
from hide.presets import RunSettings


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
        ask: samples -> their records, in any order, each as soon as it is known: `partial(ask_here, ways)`, or
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


def ask_here(ways: Mapping[str, Method[Any]], samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
    """One question after the other, in this process."""
    for sample in samples:
        yield answer(ways, sample)


def answer(ways: Mapping[str, Method[Any]], sample: Sample) -> dict[str, Any]:
    """One question's record; see `answers`."""
    return answers(ways, [sample])[0]


def answers(ways: Mapping[str, Method[Any]], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Records of the questions about one image, or set of images, that all samples share; or the error, for all.

    Of each way: reply, tokens, seconds, boxes, details, `opened` (the part of tokens and seconds that is the session's)
    and `shown` (tokens of what was shown beside the images). `image_tokens` are those of the way that looks at most.

    Ways with the same model and `RunSettings` share a session, whose cost is counted for each. Tokens are all that went
    through the language model, prompts and replies; seconds wall time from the decoded image to the reply. A method
    that wants the right boxes is left out where the data set has none.

    Args:
        ways: name -> method, so that one method may come with several settings.
    """
    try:
        return _answers(ways, samples)
    except Exception as error:  # whatever one image does, the others are asked
        return [blank_record(sample, f"{type(error).__name__}: {error}") for sample in samples]


def _answers(ways: Mapping[str, Method[Any]], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    with picture_notes() as seen:
        image = samples[0].image()
    found: list[dict[str, Answer]] = [{} for _ in samples]
    opened: dict[str, Step] = {}
    for group in _sharing(ways):
        asked = [_bound(group, sample) for sample in samples]
        first = next((method for own in asked for method in own.values()), None)
        if first is None:
            continue
        steps = Steps(first.model.model.device)
        taps = sorted({tap for method in group.values() for tap in method.taps})
        with first.open(list(image) if isinstance(image, tuple) else image, taps=taps, steps=steps) as session:
            spent = steps.finished().values()
            cost = Step(sum(step.seconds for step in spent), sum(step.tokens for step in spent))
            for sample, own, said in zip(samples, asked, found, strict=True):
                for name, method in own.items():
                    said[name], opened[name] = method.ask(session, sample.question), cost
    if not all(found):
        raise ValueError("methods: none can do without the right boxes, which the data set does not have")
    return [
        _record(sample, {name: said[name] for name in ways if name in said}, opened, seen)
        for sample, said in zip(samples, found, strict=True)
    ]


def _sharing(ways: Mapping[str, Method[Any]]) -> list[dict[str, Method[Any]]]:
    """The ways by the session that they can share."""
    groups: dict[tuple[int, RunSettings], dict[str, Method[Any]]] = {}
    for name, method in ways.items():
        groups.setdefault((id(method.model), method.preset.run), {})[name] = method
    return list(groups.values())


def _bound(ways: Mapping[str, Method[Any]], sample: Sample) -> dict[str, Method[Any]]:
    """Those that can be asked the question, with its right boxes where they want them."""
    bound = {name: method.with_boxes(sample.boxes) for name, method in ways.items()}
    return {name: method for name, method in bound.items() if method is not None}


def _record(
    sample: Sample, said: Mapping[str, Answer], opened: Mapping[str, Step], seen: Sequence[str]
) -> dict[str, Any]:
    most = max(said.values(), key=lambda one: sum(one.image_tokens))
    return {
        **blank_record(sample, ""),
        "replies": {name: one.text for name, one in said.items()},
        "seconds": {name: opened[name].seconds + sum(one.seconds.values()) for name, one in said.items()},
        "tokens": {name: opened[name].tokens + sum(one.tokens.values()) for name, one in said.items()},
        "opened": {name: {"seconds": opened[name].seconds, "tokens": opened[name].tokens} for name in said},
        "shown": {name: sum(part.shown_tokens or 0 for part in one.evidence) for name, one in said.items()},
        "images": [list(image.size) for image in most.images],
        "image_tokens": list(most.image_tokens),
        "boxes": {name: [found.tolist() for found in one.boxes] for name, one in said.items() if one.evidence},
        "details": {name: dict(one.details) for name, one in said.items() if one.details},
        "notes": [*dict.fromkeys([*sample.notes, *seen]), *_notes(said)],
        "error": None,
    }


def _notes(said: Mapping[str, Answer]) -> list[str]:
    """Each note once, behind the names of the ways that say it, unless all do."""
    by_note: dict[str, list[str]] = {}
    for name, one in said.items():
        for note in dict.fromkeys(one.notes):
            by_note.setdefault(note, []).append(name)
    return [note if len(names) == len(said) else f"{', '.join(names)}: {note}" for note, names in by_note.items()]
