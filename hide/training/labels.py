"""What the region branch learns from: maps of attention rows, made without an attention matrix, and labels of cells.

The published code keeps every layer's matrix of an eager model; here the session's prefill and one pass over the tokens
behind the image give the rows of the chosen layers, at any resolution and under any attention implementation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hide.methods.hide.entities import entities_by_rules
from hide.methods.q_zoom.regions import blurred, one_box
from hide.questions import Question
from hide.session import ImageSession
from hide.training.heads import Chosen, Heads, Rows
from hide.training.settings import TriState
from hide_kernels import rows_to_maps
from hide_kernels.integrations.transformers import capture_attention

IGNORED = -100
"""Stands in labels for a cell that says nothing."""
_LETTERS = {1: "1", 0: "0", IGNORED: "."}


def prompt_rows(
    session: ImageSession, text: str, question: Question, rows: Rows, request: str, max_new_tokens: int
) -> tuple[Tensor, list[int], str]:
    """(1, L) ids that are sent, the places of the tokens whose rows are wanted, and the reply, if one was asked for.

    Of a reply of n tokens those are the first n - 1, which the model was fed when it wrote it; of a single one that
    token. Of the question they are the words that name things, by HiDe's rules; where there are none, all.

    text: the question as the model is asked. request: what it is followed by, on a line of its own; may be empty.
    """
    said = f"{text}\n{request}" if request else text
    turn = session.turn(said)
    if rows == "question":
        names = {word for item in entities_by_rules(question).items for word in item.split()}
        spans = [match.span() for match in re.finditer(r"[^\W_]+(?:['’\-][^\W_]+)*", said) if match[0].lower() in names]
        named = [
            place
            for place, (start, stop) in zip(turn.rows, turn.offsets, strict=True)
            if any(start < last and first < stop for first, last in spans)
        ]
        return turn.input_ids, named or list(turn.rows), ""
    reply = session.reply(turn.input_ids, max_new_tokens=max_new_tokens)
    length, fed = turn.input_ids.shape[1], max(1, len(reply) - 1)
    ids = torch.cat([turn.input_ids, torch.tensor([reply[:fed]])], 1)
    return ids, list(range(length, length + fed)), session.model.decode(reply)


def head_maps(session: ImageSession, ids: Tensor, places: Sequence[int], layers: Sequence[int]) -> dict[int, Tensor]:
    """Per layer (heads, h, w) float32: causal softmax rows over all keys, at the image's cells, mean over the tokens.

    ids: (1, L), which begin with the session's. places: of the tokens behind it whose rows are wanted.
    """
    (image,) = session.model.image_tokens(ids, session.inputs)
    with (
        session.branch(ids) as branch,
        capture_attention(
            session.model.model, layers=layers, queries=places, key_spans=[image.span], head_reduction="none"
        ) as captured,
    ):
        branch.run(layers=range(max(layers) + 1), whole=True)
    return {layer: rows_to_maps(captured[layer].weights[0].mean(-2), [image])[0] for layer in layers}


def mean_map(maps: dict[int, Tensor], chosen: Chosen) -> Tensor:
    """(h, w): the mean over (layer, head) pairs."""
    return torch.cat([maps[layer][list(own)] for layer, own in chosen.items()]).mean(0)


def tri_state(
    attention: Tensor, sinks: Tensor | None = None, outside: Tensor | None = None, rules: TriState | None = None
) -> Tensor:
    """(h, w) int64 labels of a map's cells: 1, 0, or `IGNORED`.

    Args:
        attention: (h, w), mean of the grounding heads. sinks: the same of the sink heads, if there are any.
        outside: (h, w) bool, cells of padding around the image.
    """
    rules = rules or TriState()
    nowhere = torch.zeros_like(attention, dtype=torch.bool)
    sunk = nowhere if sinks is None else sinks >= rules.sink
    padding = nowhere if outside is None else outside
    kept = attention.masked_fill(sunk | padding, 0)
    peak = kept.max()
    foreground = (kept > rules.foreground * peak) & (kept > 0)
    region = one_box(blurred(kept * foreground) > 0)
    height, width = attention.shape
    x0, y0, x1, y1 = (0, 0, width, height) if region is None else region.cells
    inside = nowhere.clone()
    inside[y0:y1, x0:x1] = True
    labels = torch.full(attention.shape, IGNORED)
    if (x1 - x0) * (y1 - y0) < rules.largest * height * width and peak >= rules.least_peak:
        quiet = attention.masked_fill(sunk, 0) < rules.background * peak
        labels[(~inside & quiet) | padding] = 0
        labels[foreground] = 1
    return labels


def to_text(labels: Tensor) -> str:
    """A letter for each cell, in reading order, for JSON."""
    return "".join(_LETTERS[value] for value in labels.flatten().tolist())


def from_text(text: str, grid: tuple[int, int]) -> Tensor:
    """What `to_text` wrote of (rows, columns) cells; `ValueError` for another text."""
    values = {letter: value for value, letter in _LETTERS.items()}
    if len(text) != grid[0] * grid[1] or not set(text) <= values.keys():
        raise ValueError(f"labels: got {len(text)} letters {text[:40]!r}, want {grid[0]} x {grid[1]} of 1, 0 and .")
    return torch.tensor([values[letter] for letter in text]).view(grid)


def label(
    session: ImageSession, text: str, question: Question, heads: Heads, rules: TriState, max_new_tokens: int
) -> dict[str, Any]:
    """What is recorded of one question: the reply, the map's grid and its labels."""
    ids, places, reply = prompt_rows(session, text, question, heads.rows, heads.request, max_new_tokens)
    maps = head_maps(session, ids, places, heads.layers)
    sinks = mean_map(maps, heads.sinks).cpu() if heads.sinks else None
    labels = tri_state(mean_map(maps, heads.grounding).cpu(), sinks, rules=rules)
    return {"reply": reply, "grid": list(labels.shape), "labels": to_text(labels)}
