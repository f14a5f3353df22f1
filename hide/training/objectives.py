"""The losses of the stages, of one question each: sums over what counts, and how much that is, so that a step's mean
is the same however its questions are spread over processes. What is frozen runs without gradients, and no further than
its output is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hide.engine.decoder import forward
from hide.engine.prefix import encode
from hide.images import to_tensor, within_aspect
from hide.methods.q_zoom.branches import Branches
from hide.methods.q_zoom.method import QZoom
from hide.models.base import Adapter
from hide.models.inputs import Features, ImageInputs
from hide.models.prompts import Turn
from hide.presets import RunSettings
from hide.questions import Question
from hide.session import preprocess
from hide.training.labels import IGNORED


class Loss(NamedTuple):
    """value: () float32, a sum over `terms`; `None` where there are none."""

    value: Tensor | None
    terms: int


NOTHING = Loss(None, 0)


class Seen(NamedTuple):
    """An image with a question as a model takes it, and what enters layer K of its tokens, without gradients."""

    turn: Turn
    inputs: ImageInputs
    features: Features
    positions: Tensor
    states: Tensor


def encoded(model: Adapter, image: Image.Image | Tensor, run: RunSettings) -> tuple[ImageInputs, Features]:
    """An image as `see` takes it, whatever is asked about it."""
    return encode(model, preprocess(model, [image], run))


def see(model: Adapter, inputs: ImageInputs, features: Features, prompt: str, layer: int) -> Seen:
    """Send an image and a question through layers 0 to K - 1, and no further."""
    turn = model.turn(prompt, inputs)
    positions, _ = model.positions(turn.input_ids, inputs)
    with model.alone():
        states = forward(model, turn.input_ids, positions, features, layers=range(layer))
    return Seen(turn, inputs, features, positions, states)


@contextmanager
def mixed(model: Adapter) -> Iterator[None]:
    """Inside, float32 weights are multiplied in the model's dtype where that has 16 bits."""
    with torch.autocast(model.input_device.type, model.dtype, enabled=model.dtype.itemsize == 2):
        yield


def region_loss(model: Adapter, branches: Branches, seen: Seen, labels: Tensor) -> Loss:
    """Binary cross entropy of the region branch's map and (h, w) labels, over the cells that have one.

    A map of another grid is resized to that of the labels, bilinearly.
    """
    known = labels != IGNORED
    if not known.any():
        return NOTHING
    with mixed(model):
        scores = branches.looked(model, seen.states, seen.positions, seen.turn.images[0]).scores
    if scores.shape != labels.shape:
        scores = F.interpolate(scores[None, None], size=labels.shape, mode="bilinear", align_corners=False)[0, 0]
    known = known.to(scores.device)
    wanted = labels.to(scores)[known]
    return Loss(F.binary_cross_entropy_with_logits(scores[known], wanted, reduction="sum"), len(wanted))


def gate_loss(model: Adapter, branches: Branches, seen: Seen, wanted: int) -> Loss:
    """Binary cross entropy of the gate and whether it is to open."""
    with mixed(model):
        logit = branches.gate_logit(model, seen.states, seen.positions)
    return Loss(F.binary_cross_entropy_with_logits(logit, logit.new_tensor(float(wanted))), 1)


def answer_loss(method: QZoom, image: Image.Image, question: Question, answer: str, run: RunSettings) -> Loss:
    """Cross entropy of the answer's tokens behind an image, the crop that the frozen region branch makes of it, and the
    question, with gradients in all layers; nothing where there is no region. Logits are made of those tokens alone.
    """
    model, branches, prompt = method.model, method.branches, method.prompt(question)
    seen = see(model, *encoded(model, image, run), prompt, branches.layer)
    with torch.no_grad():
        with mixed(model):
            looked = branches.looked(model, seen.states, seen.positions, seen.turn.images[0])
        region = method.region(method.map(looked.scores, lambda: looked.first_token))
    if region is None:
        return NOTHING
    (box,) = method.box(region, seen.turn.images[0].grid, image.size).tolist()
    crop = within_aspect(to_tensor(image.crop(box)), model.max_aspect)
    more, features = encoded(model, crop, run)
    both = seen.inputs + more
    turn, reply = model.turn(prompt, both), model.reply_ids(answer)
    ids = torch.cat([turn.input_ids, reply], 1)
    positions = method.inside(ids, turn.images, both, region)
    if positions is None:
        positions, _ = model.positions(ids, both)
    shown = Features(
        torch.cat([seen.features.embeddings, features.embeddings]),
        tuple(map(torch.cat, zip(seen.features.deepstack, features.deepstack, strict=True))),
    )
    with mixed(model):
        # Each token is predicted from the one before.
        states = forward(model, ids[:, :-1], positions[..., :-1], shown)[0, turn.input_ids.shape[1] - 1 :]
        logits = model.model.get_output_embeddings()(states).float()
    return Loss(F.cross_entropy(logits, reply[0].to(logits.device), reduction="sum"), reply.shape[1])
