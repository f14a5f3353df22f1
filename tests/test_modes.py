"""Whatever mode of PyTorch a session is opened in and used in, and an operator is given tensors of, results are equal."""

from contextlib import nullcontext

import pytest
import torch
from random_models import qwen2_5_vl, randomise

from hide import PRESETS, HiDe, Plain, open_session
from hide.drop_in import process
from hide.methods.attend import attend
from hide.methods.base import NoSettings
from hide.methods.hide.method import region_boxes
from hide.models.qwen2_5_vl import Qwen25VL
from hide.session import Message
from hide.tiny.model import build
from hide.tiny.scenes import draw_scene
from hide_kernels import (
    attention_rows,
    collage,
    collage_of_maps,
    maps_to_pixels,
    pixel_values,
    regions,
    token_maps,
)
from hide_kernels.integrations.transformers import capture_attention

QUESTION = "What is the color of the star?"
MODES = {
    "gradients": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(scope="module")
def adapter():
    model, tokenizer, processor = build()
    return Qwen25VL(randomise(model), tokenizer, processor)


@pytest.fixture(scope="module")
def image():
    return draw_scene(0, 140, 112, objects=2).image


def hide_of(adapter, **changes):
    return HiDe(adapter, PRESETS["tiny"].changed(max_new_tokens=3, max_entity_tokens=6, **changes))


def every_verb(hide, session, image):
    """What each verb makes of a session, as Python's own numbers."""
    adapter = hide.model
    rows = hide.attention_rows(session, "star, ring")
    (maps,), _ = hide.maps(rows).by_image
    boxes = region_boxes(maps, hide.settings.threshold, image.size)
    (collage,) = session.crop([boxes])
    ids = adapter.input_ids(QUESTION, session.inputs)
    # Long enough that the buffers grow, here or in the next mode.
    longer = adapter.input_ids(f"{QUESTION} {'star ' * 200}", session.inputs)
    with session.branch(ids) as branch:
        logits = branch.logits()
    with session.branch(ids) as branch:
        half = branch.run(layers=range(3))
    answer, plain = hide.ask(session, QUESTION), Plain(adapter, hide.preset.with_settings(NoSettings()))
    talk = [Message(QUESTION), session.chat([Message(QUESTION)], max_new_tokens=3), Message("And the ring?", [image])]
    return [
        [of_image.tolist() for of_image in rows.rows],
        maps.tolist(),
        [boxes.tolist(), collage.boxes.tolist()],
        collage.image.tolist(),
        half.tolist(),
        session.hidden(2).tolist(),
        session.chat(talk, max_new_tokens=3),
        [of_layer.rows[0].tolist() for of_layer in hide.attention_rows_by_layer(session, "star")],
        logits.tolist(),
        session.replies([ids, ids], max_new_tokens=2) if not session.cache.offloaded else [],
        session.reply(longer, max_new_tokens=2),
        session.ask(QUESTION, [image], max_new_tokens=3),
        hide.entities_of([QUESTION, "Is the ring on the left?"]),
        (answer.text, plain.ask(session, QUESTION).text, [found.maps.tolist() for found in answer.evidence]),
        attend(adapter, image, QUESTION, layers=[1], new_tokens=2).maps.tolist(),
    ]


@pytest.mark.parametrize(
    "offload, opened", [(False, ["inference_mode", "autocast"]), (True, ["inference_mode"])], ids=["", "offload"]
)
def test_a_session_of_any_mode_serves_every_verb_in_any_mode(adapter, image, offload, opened):
    hide = hide_of(adapter, offload_kv=offload)
    want = every_verb(hide, open_session(adapter, image, hide.preset.run, taps=[2]), image)
    for opened_in in opened:
        hide = hide_of(adapter, offload_kv=offload)
        with MODES[opened_in]():
            session = open_session(adapter, image, hide.preset.run, taps=[2])
            hide.entities(QUESTION)
        # One session through all modes: what one leaves behind is there for the next.
        for used_in, other in MODES.items():
            hide._extract._known.clear()
            with other():
                got = every_verb(hide, session, image)
            for verb, (one, wanted) in enumerate(zip(got, want, strict=True)):
                assert one == wanted, f"opened in {opened_in}, used in {used_in}, verb {verb}"


def given(mode):
    """Arguments made in a mode, with gradients to come where the mode records them."""
    generator = torch.Generator().manual_seed(0)
    with mode():
        query, key = (torch.randn(1, heads, 60, 32, generator=generator) for heads in (4, 2))
        maps = torch.rand(6, 6, 10, generator=generator)
        image = torch.randint(256, (60, 100, 3), generator=generator, dtype=torch.uint8)
    if not query.is_inference():
        query.requires_grad_()
        maps.requires_grad_()
    return query, key, maps, image


OPERATORS = {
    "attention_rows": lambda query, key, maps, image: attention_rows(query, key, key_spans=[(0, 60)]).rows,
    "token_maps": lambda query, key, maps, image: token_maps([maps], prior_rows=2, sigma=1.0).maps[0],
    "regions": lambda query, key, maps, image: regions(maps, 0.7).scores,
    "regions, scipy": lambda query, key, maps, image: regions(maps, 0.7, backend="scipy").scores,
    "collage": lambda query, key, maps, image: collage(image, torch.tensor([[3, 3, 30, 20], [50, 30, 80, 50]])).image,
    "collage_of_maps": lambda query, key, maps, image: collage_of_maps(image, maps, 0.7).image,
    "pixel_values": lambda query, key, maps, image: pixel_values(
        image, [(56, 112)], mean=[0.5] * 3, std=[0.5] * 3, patch=14, merge=2, temporal=2, dtype=torch.float32
    ),
    "maps_to_pixels": lambda query, key, maps, image: maps_to_pixels(maps, (60, 100)),
    "process": lambda query, key, maps, image: torch.from_numpy(
        process({}, 0, 60, attention_rows(query, key), {"image_grid_thw": [[1, 4, 6]]}, [20], [26], 1.0)[0][8]
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_computes_the_same_in_any_mode_of_tensors_of_any_mode(name):
    operator = OPERATORS[name]
    want = operator(*given(torch.no_grad)).detach()
    for made_in, mode in MODES.items():
        for used_in, other in MODES.items():
            with other():
                got = operator(*given(mode)).detach()
            assert got.dtype == want.dtype and torch.equal(got, want), f"made in {made_in}, used in {used_in}"


def test_rows_that_were_captured_in_one_mode_are_read_in_another():
    model, ids = qwen2_5_vl(), torch.arange(8, 28)[None]
    want = None
    for mode in (MODES["gradients"], MODES["no_grad"], MODES["inference_mode"]):
        with capture_attention(model, layers=[1], queries=[3, 11, 19], key_spans=[(0, 8)]) as captured:
            with mode():
                model(input_ids=torch.cat([ids, ids.flip(1)]))
            with torch.no_grad():
                # Again from the start: the rows of before are cut and joined.
                model(input_ids=torch.cat([ids, ids.flip(1)]))
        rows = captured[1].weights.detach()
        want = rows if want is None else want
        assert torch.equal(rows, want)
