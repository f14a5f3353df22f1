"""Every model family through its adapter, against transformers' own forward and `generate`."""

import re

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, Prompts, worked_example
from PIL import Image
from random_models import llm

import hide.models
from hide import PRESETS, HiDe, HiDeConfig, Plain, Preset
from hide.engine import stock
from hide.engine.greedy import prefers_static_decode
from hide.methods.base import MODELS, AnswerSettings
from hide.methods.hide.config import SEARCH_PROMPT
from hide.methods.hide.search_prompt import search_prompt
from hide.session import ImageSession, RunSettings
from hide_kernels.image_tokens import rows_to_maps
from hide_kernels.integrations.transformers import capture_attention

QUESTION = "What is the color of the star?"
# (width, height) of each picture: odd, thin, smaller than a token, several.
SIZES = [[(401, 299)], [(90, 601)], [(9, 13)], [(400, 300), (263, 421)], [(47, 333), (333, 47), (150, 150)]]


EVERY = {**FAMILIES, "docs/model_families.md": worked_example}


@pytest.fixture(scope="module", params=EVERY)
def adapter(request):
    return EVERY[request.param]()


def preprocessed(adapter, sizes, seed=0):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    return adapter.preprocess(images, min_tokens=30, max_tokens=120)


@pytest.fixture(scope="module")
def collage(adapter):
    return preprocessed(adapter, [(170, 121)], seed=9)


def forward(adapter, ids, pictures, **arguments):
    """The model's own."""
    with torch.no_grad():
        return adapter.model(**stock.forward_inputs(adapter, ids, pictures), **arguments)


def test_every_family_that_is_known_is_tested_and_has_presets():
    assert set(FAMILIES) == set(hide.models.FAMILIES)
    for model_type in FAMILIES:
        known = hide.models.adapter_class(model_type)
        assert known.family == model_type and known.checkpoints
        for presets in (MODELS, PRESETS):
            assert any(preset.family == model_type for preset in presets.values())
        assert getattr(transformers, known.model_class).config_class.model_type == model_type


@pytest.mark.parametrize("family", FAMILIES)
def test_other_depths_than_the_presets_are_marked(family, monkeypatch):
    adapter, own = FAMILIES[family](), [preset for preset in PRESETS.values() if preset.family == family]
    preset, (note,) = HiDe.preset_for(adapter)
    assert f"{adapter.num_layers} layers" in note
    # All but the layers.
    assert preset.changed(layers=own[0].settings.layers) == own[0]
    HiDe(adapter, preset)
    monkeypatch.setattr(type(adapter), "num_layers", own[0].depth)
    assert HiDe.preset_for(adapter) == (own[0], ())
    for preset in own:
        HiDe(adapter, preset)


def test_a_family_without_presets_wants_one_to_be_named():
    adapter = worked_example()
    for method in (HiDe, Plain):
        with pytest.raises(ValueError, match=r"preset: there is none for vipllava; name one of qwen2\.5-vl-7b"):
            method.preset_for(adapter)
    assert HiDe.preset_for(adapter, "llava-1.5-7b") == (PRESETS["llava-1.5-7b"], ())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_prompt_has_the_tokens_that_the_model_takes_and_every_cell_has_its_own(adapter, sizes):
    pictures = preprocessed(adapter, sizes)
    turn = adapter.turn(QUESTION, pictures)
    ids = turn.input_ids[0]
    # The model's own check of its features against the places in the prompt.
    assert forward(adapter, turn.input_ids, pictures).logits.isfinite().all()
    assert len(turn.images) == len(sizes)
    covered = [position for image in turn.images for position in range(*image.span)]
    assert covered == torch.nonzero(ids == adapter.image_token).flatten().tolist()
    assert tuple(image.stop - image.start for image in turn.images) == pictures.tokens
    assert [len(features) for features in adapter.encode(pictures)[0].split(pictures.tokens)] == list(pictures.tokens)
    for image, grid in zip(turn.images, pictures.grids, strict=True):
        cells = image.cells.flatten().tolist()
        assert (
            image.grid == grid and len(set(cells)) == len(cells) and set(cells) <= set(range(image.stop - image.start))
        )
    assert adapter.tokenizer.decode(ids[turn.rows.start : turn.rows.stop]).strip() == QUESTION


def test_the_search_prompts_fixed_words_come_first_and_the_entities_after_them(adapter):
    pictures = preprocessed(adapter, [(401, 299), (90, 601)])
    prompt = search_prompt(Prompts(adapter, pictures), "star, red ring", include_end_token=False)
    text = adapter.tokenizer.decode(prompt.turn.input_ids[0, prompt.rows.start : prompt.rows.start + prompt.prior_rows])
    assert text.strip() == SEARCH_PROMPT.rstrip()
    assert "".join(prompt.labels) == "star,redring"


@pytest.mark.parametrize("layers", [(0,), (1, 3), None])
def test_captured_rows_are_those_of_eager_attention(adapter, layers):
    """Also of a forward that ends after the first layer, before the vision features of later layers come in."""
    pictures = preprocessed(adapter, [(401, 299), (90, 601)])
    turn = adapter.turn(f"{SEARCH_PROMPT}star, ring", pictures)
    rows = stock.attention(adapter, turn, pictures, layers=layers)
    adapter.model.set_attn_implementation("eager")
    try:
        attentions = forward(adapter, turn.input_ids, pictures, output_attentions=True).attentions
    finally:
        adapter.model.set_attn_implementation("sdpa")
    chosen = torch.stack([attentions[layer] for layer in layers or range(adapter.num_layers)])
    chosen = chosen[:, 0, :, turn.rows].mean((0, 1))
    spans = torch.cat([chosen[:, image.start : image.stop] for image in turn.images], 1)
    for mine, theirs in zip(rows, rows_to_maps(spans, turn.images), strict=True):
        assert theirs.max() > 1.5 * theirs.mean(), "flat rows show little"
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def poison_room(session):
    """NaN where the cache holds nothing yet: only what is masked may be read there."""
    for layer in session.cache.layers:
        for buffer in layer._buffers:
            buffer[:, :, layer.length :] = torch.nan


# Thin ones, one of a single tile and several, by chunks and at once: every size with either.
@pytest.mark.parametrize(
    "sizes, chunk", [(SIZES[0], 4096), (SIZES[1], 37), (SIZES[2], 4096), *((SIZES[3], n) for n in (4096, 37))], ids=str
)
def test_a_branch_is_the_unshared_forward_and_its_reply_that_of_generate(adapter, collage, sizes, chunk, monkeypatch):
    # Random weights may well end a reply at once.
    monkeypatch.setattr(adapter.model.generation_config, "eos_token_id", None)
    pictures = preprocessed(adapter, sizes)
    with ImageSession(adapter, pictures, run=RunSettings(prefill_chunk=chunk)) as session:
        for more in (None, collage):
            every = pictures if more is None else pictures + more
            ids = adapter.input_ids(QUESTION, every)
            want = forward(adapter, ids, every).logits[:, -1]
            with session.branch(ids, more) as branch:
                torch.testing.assert_close(branch.logits(), want, atol=1e-4, rtol=0)
            reply = stock.generate_ids(adapter, ids, every, max_new_tokens=16)
            assert len(set(reply)) > 3, "a reply that repeats itself shows little"
            assert session.reply(ids, more, max_new_tokens=16, static=False) == reply
            poison_room(session)
            assert session.reply(ids, more, max_new_tokens=16, static=True) == reply


@pytest.mark.parametrize("chunk", [4096, 37])
@pytest.mark.parametrize(
    "layers, causal, sizes",
    [((0,), False, SIZES[3]), ((0, 3), True, SIZES[3]), ((2,), False, SIZES[1]), (None, False, SIZES[3])],
    ids=str,
)
def test_rows_of_a_session_are_those_of_the_unshared_forward(adapter, layers, causal, sizes, chunk):
    pictures = preprocessed(adapter, sizes)
    turn = adapter.turn(f"{SEARCH_PROMPT}star, ring", pictures)
    want = stock.attention(adapter, turn, pictures, layers=layers, causal=causal)
    with ImageSession(adapter, pictures, run=RunSettings(prefill_chunk=chunk)) as session:
        got = session.attention(turn, layers=layers, causal=causal)
    assert [rows.shape for rows in got] == [(len(turn.rows), *grid) for grid in pictures.grids]
    for mine, theirs in zip(got, want, strict=True):
        assert theirs.max() > 1.5 * theirs.mean(), "flat rows show little"
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=0)


def test_a_saved_checkpoint_is_loaded_by_its_type_and_answers_the_same(adapter, tmp_path, monkeypatch):
    own = type(adapter)
    monkeypatch.setitem(hide.models.FAMILIES, own.family, f"{own.__module__}:{own.__name__}")
    for part in (adapter.model, adapter.tokenizer, adapter.image_processor):
        part.save_pretrained(tmp_path)
    loaded = hide.models.load(tmp_path, device="cpu")
    assert type(loaded) is own
    pictures = [preprocessed(one, [(401, 299)]) for one in (adapter, loaded)]
    assert torch.equal(pictures[0].items[0].pixels, pictures[1].items[0].pixels)
    mine, theirs = (
        stock.generate(one, QUESTION, own, max_new_tokens=8)
        for one, own in zip((adapter, loaded), pictures, strict=True)
    )
    # Weights that lie elsewhere in memory may be summed in another order.
    assert mine == theirs._replace(margin=pytest.approx(theirs.margin, abs=1e-4))


# A red field in a blue picture of 640 x 400, a quarter of its width and half of its height.
RED, BLUE = (220, 40, 40), (30, 60, 120)
PLACES = [(320, 0, 480, 200), (0, 200, 160, 400)]


def plant(adapter, layer, entities, min_tokens, max_tokens):
    """Set weights so that the entities look at what is red, and the fixed words at what is blue.

    Vision: the encoder's blocks and its position embeddings are zero, so that a token shows its own pixels and nothing
    else; patches, projection and the way into the prompt stay random. Decoder: no layer writes anything, and the query
    and key of `layer` are one number each, read off the states that come in there: +1 for the entities' tokens and -1
    for the fixed words, +1 for an all red picture's tokens and -1 for an all blue one's. It lies where rotary positions
    turn least.
    """
    model = adapter.model
    decoder = set(adapter.language_model.modules())
    blocks = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and module not in decoder and "Attention" in repr(module)
    ]
    assert blocks
    silent = [parameter for module in blocks for parameter in module.parameters()]
    silent += [parameter for name, parameter in model.named_parameters() if re.search(r"pos(ition)?_embed", name)]
    silent += [
        p for one in adapter.language_model.layers for p in (one.self_attn.o_proj.weight, one.mlp.down_proj.weight)
    ]
    with torch.no_grad():
        for parameter in silent:
            parameter.zero_()
        prompts, states = [], []
        hook = adapter.language_model.layers[layer].input_layernorm.register_forward_hook(
            lambda module, arguments, output: states.append(output[0].double())
        )
        for colour in (RED, BLUE):
            pictures = adapter.preprocess(
                [Image.new("RGB", (640, 400), colour)], min_tokens=min_tokens, max_tokens=max_tokens
            )
            prompts.append(search_prompt(Prompts(adapter, pictures), entities, include_end_token=False))
            forward(adapter, prompts[-1].turn.input_ids, pictures)
        hook.remove()
        rows = prompts[0].rows
        sign = torch.ones(len(rows), dtype=torch.float64)
        sign[: prompts[0].prior_rows] = -1
        shown = [
            own[prompt.turn.images[0].start + int(prompt.turn.images[0].cells[0, 0])]
            for own, prompt in zip(states, prompts, strict=True)
        ]
        attention = adapter.language_model.layers[layer].self_attn
        for projection, inputs, wanted in (
            (attention.q_proj, states[0][rows.start : rows.stop], sign),
            (attention.k_proj, torch.stack(shown), torch.tensor([1.0, -1.0], dtype=torch.float64)),
        ):
            direction = torch.linalg.pinv(inputs) @ wanted * attention.head_dim**0.5
            projection.weight.zero_()
            projection.weight.unflatten(0, (-1, attention.head_dim))[:, attention.head_dim // 2 - 1] = direction.float()
            if projection.bias is not None:
                projection.bias.zero_()


@pytest.mark.parametrize("family", EVERY)
def test_boxes_land_on_the_place_that_attention_was_planted_on(family):
    adapter = EVERY[family]()
    run = RunSettings(min_tokens=60, max_tokens=300)
    plant(adapter, 2, "star", run.min_tokens, run.max_tokens)
    config = HiDeConfig(layers=(2,), sigma=0.0, threshold=0.5, include_end_token=False)
    preset = Preset(config, run, AnswerSettings(max_new_tokens=2))
    hide = HiDe(adapter, preset, extractor=lambda question: "star")
    for place in PLACES:
        picture = Image.new("RGB", (640, 400), BLUE)
        picture.paste(RED, place)
        (found,) = hide.ask(picture, QUESTION).evidence
        boxes, collage = found.boxes, found.shown
        rows, columns = found.maps.shape[1:]
        assert len(boxes) == 1, (place, boxes)
        # A cell that the field's edge runs through may count or not; boxes are cut to whole pixels.
        cell = torch.tensor([640 / columns, 400 / rows] * 2) + 1
        assert ((boxes[0] - torch.tensor(place)).abs() <= cell).all(), (place, boxes)
        assert collage is not None and collage.getpixel((collage.width // 2, collage.height // 2)) == RED


def test_a_family_that_is_not_supported_is_named_with_those_that_are_and_its_rows_can_be_captured(tmp_path):
    model = llm()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'llama'; HiDe knows " + ", ".join(FAMILIES)) as error:
        hide.models.load(tmp_path)
    assert "capture_attention" in str(error.value)
    ids = torch.arange(20, 51)[None]
    with torch.no_grad(), capture_attention(model, layers=[1], queries=[28, 30], key_spans=[(3, 17)]) as captured:
        model(ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(ids, output_attentions=True).attentions[1][0, :, [28, 30], 3:17].mean(0)
    assert want.max() > 0.01
    torch.testing.assert_close(captured[1].weights[0], want, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("family", EVERY)
def test_on_a_gpu_a_session_gives_the_forwards_logits_and_a_replayed_graph_generates_reply(family):
    adapter = EVERY[family]()
    adapter.model.double().cuda()
    pictures, collage = preprocessed(adapter, [(400, 300), (263, 421)]), preprocessed(adapter, [(170, 121)], seed=9)
    ids = adapter.input_ids(QUESTION, pictures + collage)
    want = forward(adapter, ids, pictures + collage).logits[:, -1].float()
    reply = stock.generate_ids(adapter, ids, pictures + collage, max_new_tokens=21)
    assert prefers_static_decode(adapter)
    with ImageSession(adapter, pictures, run=RunSettings(prefill_chunk=64)) as session:
        with session.branch(ids, collage) as branch:
            torch.testing.assert_close(branch.logits(), want, atol=1e-4, rtol=0)
        for static in (True, False):
            assert session.reply(ids, collage, max_new_tokens=21, static=static) == reply
