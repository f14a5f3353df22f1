"""The flows: each asks for a question's attention rows and its answer, and marks its stages.

They run as they are on a model of any family, real or of fake tensors. The step that asks for the entities has no
picture and little memory; maps and collage are made of a few rows. Both are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hide.engine.decoder import extend
from hide.engine.prefix import Prefix, encode
from hide.engine.stock import forward_inputs
from hide.models.base import Adapter
from hide.profiling.models import eager_decoder
from hide.profiling.workload import Scene, Workload, scene
from hide_kernels.integrations.transformers import capture_attention
from hide_kernels.memory import Owner, stage

# Modules of a vision encoder and what follows it, by their path or by their class where they are called alone.
_VISION = re.compile("visual|Vision[A-Z]|vision_tower|projector")


class Flow(NamedTuple):
    """run: the flow on a workload. family: what `--flow` calls it. about: one line for readers. session: whether it is
    one, which may look at a small view of the picture."""

    run: Callable[[Adapter, Workload], None]
    family: str
    about: str
    session: bool = False


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
        with stage("answer"), session.branch(answer, collage) as branch:
            token = branch.logits().argmax(-1, keepdim=True)
            with stage("next token"):
                every = shown if collage is None else shown + collage.without_pixels()
                places, _ = adapter.positions(answer, every)
                hidden, _ = extend(adapter, session.cache, token, places[..., -1:] + 1)
                adapter.model.get_output_embeddings()(hidden)
    del source


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
    ),
}
"""By name: those of a HiDe question, the hungriest first, then what they are measured against."""

FAMILIES = tuple(dict.fromkeys(flow.family for flow in FLOWS.values()))


def flows_of(name: str) -> tuple[str, ...]:
    """Names in `FLOWS` that "eager", "published", "ours", "plain", a name itself, or, for all but "plain", "all" stands
    for; else `ValueError`."""
    found = tuple(
        key for key, flow in FLOWS.items() if name in (key, flow.family) or (name == "all" and key != "plain")
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
