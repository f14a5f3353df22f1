"""The flows: each asks for a question's attention rows and its answer, and marks its stages.

They run as they are on a model of any family, real or of fake tensors. The step that asks for the entities has no
picture and little memory; maps and collage are made of a few rows. Both are left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hide.engine.decoder import extend
from hide.engine.prefix import Prefix, encode
from hide.engine.stock import forward_inputs
from hide.methods.q_zoom.branches import Branches, Glance, new_branches
from hide.models.base import Adapter
from hide.models.inputs import ImageInputs
from hide.profiling.models import eager_decoder, materialise
from hide.profiling.workload import Scene, Workload, picture_of, scene
from hide_kernels.integrations.transformers import capture_attention
from hide_kernels.memory import Owner, stage

# Q-Zoom's released branches have so many layers each; its largest published budget, of image and crop alike.
BRANCH_LAYERS, CROP_TOKENS = 3, 4096
# Modules of a vision encoder and what follows it, by their path or by their class where they are called alone.
_VISION = re.compile("visual|Vision[A-Z]|vision_tower|projector")


class Flow(NamedTuple):
    """run: the flow on a workload. family: what `--flow` calls it. about: one line for readers. session: whether it is
    one, which prefills in chunks, may keep keys and values on the host, and may look at a small view of the picture.
    extra: only predicted when it is asked for by name."""

    run: Callable[[Adapter, Workload], None]
    family: str
    about: str
    session: bool = False
    extra: bool = False


@torch.no_grad()
def eager(adapter: Adapter, work: Workload, *, keep: bool) -> None:
    """The search prompt through transformers' own forward, with attention matrices in the decoder.

    The vision encoder keeps its fused attention: one of its full layers would have 16 matrices of 4 x 4 times as many
    elements. keep: all layers' matrices, as `output_attentions=True` returns them.
    """
    with stage("inputs"):
        inputs = _forward_inputs(adapter, scene(adapter, work), answer=False)
    with eager_decoder(adapter), stage("search"):
        adapter.model(**inputs, output_attentions=keep, use_cache=True)


@torch.no_grad()
def published(adapter: Adapter, work: Workload, *, last_logits: bool) -> None:
    """HiDe as published: the search prompt with rows of one layer, then the answer, each over the whole picture.

    last_logits: logits of the last token alone in the first pass, where the published code makes those of all.
    """
    kept = {"logits_to_keep": 1} if last_logits else {}
    with stage("inputs"):
        given = scene(adapter, work)
        inputs, prompt = _forward_inputs(adapter, given, answer=False), given.search
        del given
    with (
        stage("search"),
        capture_attention(
            adapter.model,
            layers=[_layer(adapter, work)],
            queries=prompt.rows,
            key_spans=[image.span for image in prompt.images],
            causal=False,
        ),
    ):
        adapter.model(**inputs, use_cache=True, **kept)
    del inputs
    with stage("inputs of the answer"):
        inputs = _forward_inputs(adapter, scene(adapter, work), answer=True)
    with stage("answer"):
        # What `generate` does before its first token.
        adapter.model(**inputs, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def ours(adapter: Adapter, work: Workload, *, plainly: bool = False) -> None:
    """A session: the picture is encoded and prefilled once, rows and answer are branches behind it.

    plainly: the answer alone, from the picture alone.
    """
    layer = _layer(adapter, work)
    with stage("inputs"):
        given = scene(adapter, work)
        # Collages are cut out of the picture itself, whatever is looked at.
        source = torch.zeros(*work.pixels, 3, dtype=torch.uint8, device=adapter.model.device)
    search = given.search
    answer, collage = (search.input_ids, None) if plainly else (given.answer, given.collage)
    head = search.input_ids[:, : given.prefix]
    shown, features = encode(adapter, given.image)
    del given
    session = Prefix(adapter, head, shown, features=features, prefill_chunk=work.chunk, offload=work.offload)
    del features
    with session:
        if not plainly:
            with stage("search"), session.branch(search.input_ids) as branch:
                branch.attention(search, layers=[layer], causal=False)
        with stage("answer"):
            _answer(adapter, session, answer, collage)
    del source


@torch.no_grad()
def q_zoom(adapter: Adapter, work: Workload) -> None:
    """Q-Zoom where the gate opens: a session, gate and region branch, and a crop with the budget of the picture."""
    with stage("weights"):
        branches = untrained_branches(adapter)
    with stage("inputs"):
        crop = min(picture_of(adapter, work.image).tokens, CROP_TOKENS)
        given = scene(adapter, dataclasses.replace(work, collage=crop))
        source = torch.zeros(*work.pixels, 3, dtype=torch.uint8, device=adapter.model.device)
    search, answer, cut = given.search, given.answer, given.collage
    head = search.input_ids[:, : given.prefix]
    shown, features = encode(adapter, given.image)
    del given
    session = Prefix(
        adapter,
        head,
        shown,
        features=features,
        prefill_chunk=work.chunk,
        offload=work.offload,
        taps=(branches.layer,),
    )
    del features
    with session:
        with session.branch(search.input_ids) as branch:
            before, behind = branch.positions[..., : session.length], branch.positions[..., session.length :]
            with stage("gate"):
                states = branch.run(layers=range(branches.layer))
                hidden = session.hidden(branches.layer)
                glance = Glance(adapter, branches, hidden, before, search.images[0], work.chunk)
                glance.gate(states, behind)
            with stage("region"):
                glance.scores(states, behind)
        with stage("answer"):
            _answer(adapter, session, answer, cut)
    del source


def untrained_branches(adapter: Adapter) -> Branches:
    """Branches of the released sizes for any model, where it is and in its dtype, at the layer that its configuration
    names, or at the relative depth of the releases."""
    depth = adapter.num_layers
    layer = getattr(adapter.model.config, "twig_K", None)
    if layer is None:
        layer = depth * 15 // 32 if adapter.family == "llava" else depth * 2 // 3
    with torch.device("meta"):
        found = new_branches(adapter, layer, BRANCH_LAYERS, gate_depth=BRANCH_LAYERS)
    for module in found.modules().values():
        materialise(module.to(adapter.dtype), adapter.model.device)
        for parameter in module.parameters():
            parameter.requires_grad_(False).normal_(std=0.02)
    return found


def _answer(adapter: Adapter, session: Prefix, answer: Tensor, more: ImageInputs | None) -> None:
    """The reply's first two tokens, behind a further picture, if there is one."""
    with session.branch(answer, more) as branch:
        token = branch.logits().argmax(-1, keepdim=True)
        with stage("next token"):
            places = branch.positions[..., -1:] + 1
            hidden, _ = extend(adapter, session.cache, token, places)
            adapter.model.get_output_embeddings()(hidden)


def _forward_inputs(adapter: Adapter, given: Scene, *, answer: bool) -> dict[str, Tensor]:
    """Arguments of the model's own forward; the scene's own pixels would be on the host."""
    if answer:
        inputs = forward_inputs(adapter, given.answer, given.image + given.collage)
    else:
        inputs = forward_inputs(adapter, given.search.input_ids, given.image)
    # All ones, which transformers drops, unless it looks at fake tensors.
    del inputs["attention_mask"]
    return inputs


def _layer(adapter: Adapter, work: Workload) -> int:
    return adapter.num_layers // 2 if work.layer is None else work.layer


FLOWS = {
    "eager, all layers kept": Flow(
        lambda adapter, work: eager(adapter, work, keep=True),
        "eager",
        "transformers with output_attentions=True: every layer's attention matrix is returned",
    ),
    "eager, one layer alive": Flow(
        lambda adapter, work: eager(adapter, work, keep=False),
        "eager",
        "transformers with eager attention: a layer's matrix is freed before the next",
    ),
    "published": Flow(
        lambda adapter, work: published(adapter, work, last_logits=False),
        "published",
        "HiDe's code: fused attention, rows of one layer, logits of all tokens; then the answer anew",
    ),
    "published, last logits": Flow(
        lambda adapter, work: published(adapter, work, last_logits=True),
        "published",
        "the same with the last token's logits only",
    ),
    "ours": Flow(ours, "ours", "one session: the image encoded and prefilled once, in chunks", session=True),
    "plain": Flow(
        lambda adapter, work: ours(adapter, work, plainly=True),
        "plain",
        "a session that answers from the image alone, with no HiDe",
        session=True,
        extra=True,
    ),
    "q-zoom": Flow(
        q_zoom,
        "q-zoom",
        "Q-Zoom: a session with a trained gate and region branch, and a crop",
        session=True,
        extra=True,
    ),
}
"""By name: those of a HiDe question, the hungriest first, then the extra ones."""

FAMILIES = tuple(dict.fromkeys(flow.family for flow in FLOWS.values()))


def flows_of(name: str) -> tuple[str, ...]:
    """Names in `FLOWS` that a family, or a name itself, stands for; "all" for those that are no `extra`; else
    `ValueError`."""
    found = tuple(
        key for key, flow in FLOWS.items() if name in (key, flow.family) or (name == "all" and not flow.extra)
    )
    if not found:
        raise ValueError(f"flow: got {name!r}, want one of {', '.join((*FAMILIES, 'all', *FLOWS))}")
    return found


def owner_group(owner: Owner) -> str:
    """What a tensor belongs to, for the picture of memory over the run."""
    module, line = owner.module or "", owner.line or ""
    if owner.group == "weights":
        return "weights"
    if "kv_cache.py" in line or "cache_utils.py" in line:
        return "keys and values"
    if _VISION.search(module):
        return "vision encoder"
    for part, name in (("self_attn", "attention"), (".mlp", "feed-forward"), ("lm_head", "logits")):
        if part in module:
            return name
    return "inputs" if owner.group.startswith("inputs") else "other"
