"""How good the embedded model is, on scenes that training never saw: `python -m hide.evaluation.embedded_model`.

Prints plain accuracy on small pictures, how much of an entity word's attention lies inside the entity's box, layer
by layer, and plain against HiDe on large cluttered pictures, with collages from the true boxes as the upper bound.
Everything goes through `hide.HiDe`. `--answers` keeps every reply and box, and `--against` says which of them have
changed since: `python -m hide.evaluation.embedded_model --against benchmarks/results/embedded-model.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hide.evaluation.calibrate import cells_inside
from hide.methods.ablations import TrueBoxes
from hide.methods.base import NoSettings
from hide.methods.hide.method import HiDe
from hide.methods.plain import Plain
from hide.session import ImageSession
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import Question, Scene, draw_scene, large_scene, questions

__all__ = ["attention_shares", "main", "measure_large", "measure_small", "small_scene"]

_CELL = 28
_SMALL, _LARGE = 1_000, 1_000_000  # first seeds; training draws from 2**40 on


def small_scene(seed: int) -> Scene:
    """A picture of 16 to 100 image tokens."""
    rng = np.random.default_rng(seed)
    columns, rows = (int(side) for side in rng.integers(4, 11, 2))
    count = min(int(rng.integers(2, 7)), max(2, rows * columns // 7))
    return draw_scene(seed, columns * _CELL, rows * _CELL, objects=count, object_size=(28, 70))


def _asked(scenes: Iterator[Scene], count: int) -> Iterator[tuple[Scene, list[Question]]]:
    """Scenes with up to six questions, as many of each split as there are of both, until `count` are asked."""
    rng = np.random.default_rng(count)
    for scene in scenes:
        found = questions(scene, rng)
        by_split = [[question for question in found if question.split == split] for split in ("attribute", "position")]
        each = min(3, *map(len, by_split))
        chosen = [question for pair in zip(*(group[:each] for group in by_split), strict=True) for question in pair][
            :count
        ]
        if chosen:
            yield scene, chosen
        count -= len(chosen)
        if count <= 0:
            return


def attention_shares(hide: HiDe, scene: Scene, session: ImageSession, layer: int) -> list[tuple[float, float]]:
    """For each kind that occurs once: (share of its word's attention over the image inside its box, the box's share
    of the area).

    The search prompt names one kind; the row is the mean over heads of the softmax over all keys, as in HiDe.
    """
    kinds = [thing.kind for thing in scene.objects]
    found = []
    for thing in scene.objects:
        if kinds.count(thing.kind) > 1:
            continue
        prompt = hide.search_prompt(session, thing.kind)
        (rows,) = session.attention(prompt.turn, layers=(layer,), causal=False, queries=prompt.rows)
        row = rows[-1].cpu()
        inside = cells_inside([thing.box], scene.image.size, (row.shape[0], row.shape[1]))
        found.append((float(row[inside].sum() / row.sum()), float(inside.float().mean())))
    return found


def _asked_of(scene: Scene, question: Question) -> dict[str, Any]:
    return {"picture": list(scene.image.size), "question": question.text, "answer": question.answer}


def _says(reply: str, question: Question) -> bool:
    return reply.strip().lower().rstrip(".") == question.answer


def measure_small(hide: HiDe, count: int, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Plain accuracy by split and attention shares by layer on small pictures; each question is added to `answers`."""
    right: dict[str, list[bool]] = defaultdict(list)
    shares: dict[int, list[tuple[float, float]]] = defaultdict(list)
    plain = Plain(hide.model, hide.preset.with_settings(NoSettings()))
    scenes = (small_scene(seed) for seed in range(_SMALL, _LARGE))
    for scene, asked in _asked(scenes, count):
        with hide.open(scene.image) as session:
            for question in asked:
                reply = plain.ask(session, question.text).text
                right[question.split].append(_says(reply, question))
                answers.append({"part": "small", **_asked_of(scene, question), "replies": {"plain": reply}})
            for layer in range(hide.model.num_layers):
                shares[layer] += attention_shares(hide, scene, session, layer)
    everything = [one for split in right.values() for one in split]
    return {
        "questions": len(everything),
        "plain": float(np.mean(everything)),
        "plain_by_split": {split: float(np.mean(numbers)) for split, numbers in right.items()},
        "words": len(shares[0]),
        "inside_by_layer": {
            layer: float(np.mean([share for share, _ in numbers])) for layer, numbers in shares.items()
        },
        "times_area_by_layer": {
            layer: float(np.mean([share / area for share, area in numbers])) for layer, numbers in shares.items()
        },
    }


def measure_large(hide: HiDe, count: int, tokens: tuple[int, int], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Plain, HiDe, and collages from the true boxes on large pictures; each question is added to `answers`."""
    right: dict[str, list[bool]] = defaultdict(list)
    splits: dict[str, list[bool]] = defaultdict(list)
    shares, found, kept = [], [], []
    plain = Plain(hide.model, hide.preset.with_settings(NoSettings()))
    true_boxes = TrueBoxes(hide.model, hide.preset)
    scenes = (large_scene(seed, tokens) for seed in range(_LARGE, 2 * _LARGE))
    for scene, asked in _asked(scenes, count):
        with hide.open(scene.image) as session:
            for question in asked:
                result = hide.ask(session, question.text)
                boxes_asked = [scene.objects[i].box for i in question.targets]
                bound = true_boxes.with_boxes(boxes_asked)
                replies = {
                    "plain": plain.ask(session, question.text).text,
                    "hide": result.text,
                    "true_boxes": "" if bound is None else bound.ask(session, question.text).text,
                }
                for name, reply in replies.items():
                    right[name].append(_says(reply, question))
                    splits[f"{name} {question.split}"].append(right[name][-1])
                boxes = result.boxes[0]
                seen = {"replies": replies, "entities": result.details["entities"], "boxes": boxes.tolist()}
                answers.append({"part": "large", **_asked_of(scene, question), **seen})
                for target in torch.tensor(boxes_asked):
                    middle = (target[:2] + target[2:]) / 2
                    found.append(bool(((boxes[:, :2] <= middle) & (middle < boxes[:, 2:])).all(1).any()))
                collage = result.shown[0]
                kept.append(
                    0.0
                    if collage is None
                    else collage.width * collage.height / (scene.image.width * scene.image.height)
                )
            shares += attention_shares(hide, scene, session, (hide.settings.layers or (0,))[0])
    return {
        "questions": len(right["plain"]),
        "accuracy": {name: float(np.mean(numbers)) for name, numbers in right.items()},
        "by_split": {name: float(np.mean(numbers)) for name, numbers in sorted(splits.items())},
        "targets_in_boxes": float(np.mean(found)),
        "collage_share_of_area": float(np.mean(kept)),
        "layer": (hide.settings.layers or (0,))[0],
        "inside": float(np.mean([share for share, _ in shares])),
        "times_area": float(np.mean([share / area for share, area in shares])),
    }


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--questions", type=int, default=500, help="on small and on large pictures each")
    parser.add_argument("--parts", choices=("small", "large", "both"), default="both")
    parser.add_argument("--tokens", type=int, nargs=2, default=(1560, 2050), help="range of the large pictures' sizes")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--layer", type=int, help="instead of the preset's")
    parser.add_argument("--threshold", type=float, help="instead of the preset's")
    parser.add_argument("--sigma", type=float, help="instead of the preset's")
    parser.add_argument("--end-token", action=argparse.BooleanOptionalAction, help="instead of the preset's")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--answers", type=Path, help="also write every question here, with replies and boxes")
    parser.add_argument("--against", type=Path, help="a file of --answers; exit code 1 where a reply or box differs")
    arguments = parser.parse_args()
    changes: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("threshold", "sigma") if getattr(arguments, name) is not None
    }
    if arguments.layer is not None:
        changes["layers"] = (arguments.layer,)
    if arguments.end_token is not None:
        changes["include_end_token"] = arguments.end_token
    hide = HiDe.from_pretrained(arguments.checkpoint, preset=arguments.preset, **changes)
    report = {}
    answers: list[dict[str, Any]] = []
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "small": lambda: measure_small(hide, arguments.questions, answers),
        "large": lambda: measure_large(hide, arguments.questions, tuple(arguments.tokens), answers),
    }
    for part, measure in parts.items():
        if arguments.parts in (part, "both"):
            began = time.perf_counter()
            report[part] = measure()
            report[part]["seconds"] = round(time.perf_counter() - began, 1)
            print(part)
            for key, value in report[part].items():
                print(f"  {key}: {_readable(value)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    lines = [json.dumps(one) for one in answers]
    if arguments.answers:
        arguments.answers.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if arguments.against:
        before = arguments.against.read_text(encoding="utf-8").splitlines()
        changed = [pair for pair in zip(before, lines, strict=False) if pair[0] != pair[1]]
        print(f"{len(changed)} of {len(lines)} answers differ from the {len(before)} of {arguments.against}")
        for old, new in changed[:5]:
            print(f"  was {old}\n  is  {new}")
        return 1 if changed or len(lines) != len(before) else 0
    return 0


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_readable(number)}" for key, number in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
