"""What Qwen3-VL has of its own: two resizes, vision features for early layers, presets, letters between tags."""

import families
import numpy as np
import pytest
import torch
from PIL import Image

from hide import PRESETS, HiDe, Plain
from hide.methods.base import NoSettings, ask_all
from hide.models import qwen2_5_vl as module
from hide.questions import LETTER_REQUEST, TAGGED_LETTER_REQUEST
from hide.session import ImageSession, Reply


@pytest.fixture(scope="module")
def adapter():
    return families.qwen3_vl()


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size, grid", [((7680, 4320), (84, 149)), ((3840, 2160), (67, 120)), ((2250, 1500), (47, 70))])
def test_published_image_token_counts(adapter, monkeypatch, size, grid):
    """16,384 tokens of the loader's 28 pixels are fewer of 32: 7680 x 4320 pixels come to 12,516."""
    # The pixels do not matter, and there are many.
    monkeypatch.setattr(module, "pixel_values", lambda *args, **kwargs: torch.zeros(1))
    pictures = adapter.preprocess([Image.new("RGB", size)], min_tokens=256, max_tokens=16384)
    assert pictures.grids == (grid,) and pictures.tokens == (grid[0] * grid[1],)


def test_pictures_are_resized_to_the_loaders_pixels_and_then_to_the_models(adapter):
    picture = noise(333, 250)
    loaded = picture.resize((12 * 28, 9 * 28), Image.Resampling.BICUBIC)
    size = {"shortest_edge": 4 * 32**2, "longest_edge": 400 * 32**2}
    want = adapter.image_processor(images=[loaded], size=size, return_tensors="pt")
    pictures = adapter.preprocess([picture], min_tokens=4, max_tokens=400)
    assert pictures.grids == ((8, 10),)
    assert torch.equal(pictures.items[0].pixels, want["pixel_values"])


@pytest.mark.parametrize("size", [(900, 1300), (40, 30), (5000, 40)])
def test_the_token_budget_holds_for_large_pictures_and_small(adapter, size):
    ((rows, columns),) = adapter.preprocess([Image.new("RGB", size)], min_tokens=30, max_tokens=50).grids
    assert 30 <= rows * columns <= 50


def test_every_layers_vision_features_come_in_picture_by_picture(adapter):
    """Against the vision encoder run once over all pictures; features of another layer or picture are others."""
    pictures = adapter.preprocess([noise(200, 120), noise(90, 260)], min_tokens=4, max_tokens=60)
    features = adapter.encode(pictures)
    inputs = adapter.image_inputs(pictures)
    with torch.no_grad():
        encoded = adapter.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    embeddings, layers = encoded if isinstance(encoded, tuple) else (encoded.pooler_output, encoded.deepstack_features)
    assert len(features.deepstack) == len(layers) == 2
    for mine, theirs in zip([features.embeddings, *features.deepstack], [embeddings, *layers], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert (features.deepstack[0] - features.deepstack[1]).abs().max() > 0.1


def test_a_picture_without_its_deepstack_features_would_be_another_one(adapter):
    """So that the comparisons of all families show that these features reach their layers."""
    pictures = adapter.preprocess([noise(200, 120)], min_tokens=4, max_tokens=60)
    ids = adapter.input_ids("What is it?", pictures)
    encode = adapter.encode
    with ImageSession(adapter, pictures) as session, session.branch(ids) as branch:
        want = branch.logits()
    adapter.encode = lambda pictures: encode(pictures)._replace(deepstack=())
    try:
        with ImageSession(adapter, pictures) as session, session.branch(ids) as branch:
            assert (branch.logits() - want).abs().max() > 0.1
    finally:
        del adapter.encode


def test_positions_begin_with_the_place_in_the_text(adapter):
    """Without it, transformers 4.57 takes a picture's positions for those of packed sequences under FlashAttention."""
    pictures = adapter.preprocess([noise(200, 120), noise(90, 260)], min_tokens=4, max_tokens=60)
    ids = adapter.input_ids("What is it?", pictures)
    positions, delta = adapter.positions(ids, pictures)
    assert positions[0, 0].tolist() == list(range(ids.shape[1]))
    assert (positions[1:, 0, -1] == ids.shape[1] - 1 + delta).all() and int(delta) < 0


def test_presets_hold_the_published_values():
    presets = [preset for preset in PRESETS.values() if preset.family == "qwen3_vl"]
    every, one = (preset.settings for preset in presets)
    assert (every.layers, every.sigma, every.threshold) == (None, 3.0, 0.5)
    assert (one.layers, one.sigma, one.threshold) == ((18,), 3.0, 0.5)
    for preset in presets:
        assert (preset.run.min_tokens, preset.run.max_tokens, preset.answer.max_new_tokens) == (256, 16384, 1024)
        assert preset.answer.letter_request == TAGGED_LETTER_REQUEST != LETTER_REQUEST


def test_the_presets_request_ends_lettered_questions_and_the_letter_is_read_between_tags(adapter, monkeypatch):
    asked = []

    def ask(session, text, images=(), *, max_new_tokens):
        asked.append(text)
        said = "<FINAL_OUTPUT>B</FINAL_OUTPUT>" if images else "It is A, so <final_output>\nA."
        return Reply(said, 1, (), (9,) * len(images))

    monkeypatch.setattr(ImageSession, "ask", ask)
    preset = PRESETS["qwen3-vl-8b"].changed(min_tokens=20, max_tokens=60)
    hide = HiDe(adapter, preset, extractor=lambda question: "star")
    both = [Plain(adapter, preset.with_settings(NoSettings())), hide]
    answers = ask_all(both, noise(300, 200), "Which?\n(A) red\n(B) blue")
    assert asked == [f"Which?\n(A) red\n(B) blue\n{TAGGED_LETTER_REQUEST}"] * 2
    assert [answer.letter for answer in answers] == ["A", "B"]
    ask_all(both, noise(300, 200), "What color is it?")
    assert asked[2:] == ["What color is it?"] * 2
