"""The losses of the stages: sums over what counts, and how much that is, so that a step's mean
is the same however its questions are spread over processes. What is frozen runs without gradients, and no further than
its output is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hide.engine.decoder import extend, forward
from hide.engine.kv_cache import PreallocatedCache
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


def together(losses: Iterable[Loss]) -> Loss:
    """The sum of losses."""
    own = [one for one in losses if one.value is not None]
    values = [one.value for one in own if one.value is not None]
    return Loss(torch.stack(values).sum(), sum(one.terms for one in own)) if own else NOTHING


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


def see(model: Adapter, inputs: ImageInputs, features: Features, prompts: Sequence[str], layer: int) -> list[Seen]:
    """Send an image and questions about it through layers 0 to K - 1, and no further; the image once."""
    turns = [model.turn(prompt, inputs) for prompt in prompts]
    end, layers = turns[0].images[0].stop, range(layer)
    cache = PreallocatedCache(model.num_layers, max(turn.input_ids.shape[1] for turn in turns))
    found: list[Seen] = []
    for turn in turns:
        ids = turn.input_ids
        positions, _ = model.positions(ids, inputs)
        if not found:
            before, _ = extend(model, cache, ids[:, :end], positions[..., :end], features, layers=layers)
        behind, _ = extend(model, cache, ids[:, end:], positions[..., end:], layers=layers)
        cache.rewind(end, layers)
        found.append(Seen(turn, inputs, features, positions, torch.cat([before, behind], 1)))
    return found


@contextmanager
def mixed(model: Adapter) -> Iterator[None]:
    """Inside, float32 weights are multiplied in the model's dtype where that has 16 bits."""
    with torch.autocast(model.input_device.type, model.dtype, enabled=model.dtype.itemsize == 2):
        yield


def region_loss(model: Adapter, branches: Branches, seen: Sequence[Seen], labels: Sequence[Tensor]) -> Loss:
    """Binary cross entropy of the region branch's maps of questions about one image and (h, w) labels, over the cells
    that have one.

    A map of another grid is resized to that of the labels, bilinearly.
    """
    known = [(one, own) for one, own in zip(seen, labels, strict=True) if (own != IGNORED).any()]
    if not known:
        return NOTHING
    with mixed(model):
        found = branches.looked(model, [(one.states, one.positions) for one, _ in known], seen[0].turn.images[0])
    sums, terms = [], 0
    for looked, (_, own) in zip(found, known, strict=True):
        scores = looked.scores
        if scores.shape != own.shape:
            scores = F.interpolate(scores[None, None], size=own.shape, mode="bilinear", align_corners=False)[0, 0]
        told = (own != IGNORED).to(scores.device)
        wanted = own.to(scores)[told]
        sums.append(F.binary_cross_entropy_with_logits(scores[told], wanted, reduction="sum"))
        terms += len(wanted)
    return Loss(torch.stack(sums).sum(), terms)


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
    (seen,) = see(model, *encoded(model, image, run), [prompt], branches.layer)
    with torch.no_grad():
        with mixed(model):
            (looked,) = branches.looked(model, [(seen.states, seen.positions)], seen.turn.images[0])
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
