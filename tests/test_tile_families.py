"""InternVL, LLaVA-1.5 and LLaVA-OneVision: tiles, padding and line breaks, one image span for several pictures.

What holds for every family, the shared prefix above all, is in test_families.py.
"""

import dataclasses

import numpy as np
import pytest
import torch
from families import Prompts
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from hide import PRESETS, HiDe, HiDeConfig, Plain, Preset
from hide.engine import stock
from hide.engine.prefix import Prefix
from hide.methods.base import AnswerSettings, NoSettings, ask_all
from hide.methods.hide.method import EntityRows, region_boxes
from hide.methods.hide.search_prompt import PUBLISHED_PRIOR, search_prompt
from hide.models.inputs import ImageInput, ImageInputs
from hide.models.internvl import tile_grid
from hide.session import ImageSession, RunSettings, open_session
from hide_kernels import rows_to_maps
from hide_kernels.integrations.image_spans import image_spans
from tests import families_tiles

BUILDERS = {name: getattr(families_tiles, name) for name in ("internvl", "llava", "llava_onevision")}
QUESTION = "What is the color of the star?"
# Odd ones, one of a single tile, one far from square; (width, height).
SIZES = [[(171, 107)], [(53, 50)], [(40, 211)], [(171, 107), (60, 90)]]


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)[:height, :width])


def preprocessed(adapter, sizes, seed=0, most=80):
    images = [noise(*size, seed=seed + i) for i, size in enumerate(sizes)]
    return adapter.preprocess(images, min_tokens=4, max_tokens=most)


@pytest.fixture(scope="module", params=BUILDERS)
def adapter(request):
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def internvl():
    return BUILDERS["internvl"]()


@pytest.fixture(params=SIZES, ids=str)
def pictures(adapter, request):
    return preprocessed(adapter, request.param)


def stock_logits(adapter, ids, pictures):
    with torch.no_grad():
        return adapter.model(**stock.forward_inputs(adapter, ids, pictures)).logits[:, -1].float()


# The shared prefix


@pytest.mark.parametrize("chunk", [4096, 23])
@pytest.mark.parametrize("sizes", [[(171, 107)], [(171, 107), (60, 90)]], ids=str)
def test_a_collage_in_the_pictures_own_span_is_the_unshared_forward(internvl, sizes, chunk):
    first = dataclasses.replace(preprocessed(internvl, sizes), joined=True)
    collage = preprocessed(internvl, [(90, 64)], seed=7)
    ids = internvl.input_ids(QUESTION, first + collage)
    name = internvl.tokenizer.convert_tokens_to_ids
    start, end, image = name("<img>"), name("</img>"), name("<IMG_CONTEXT>")
    row = ids[0].tolist()
    count = sum(first.tokens) + sum(collage.tokens)
    at = row.index(start)
    assert row.count(start) == row.count(end) == 1 and row[at + 1 : at + 1 + count] == [image] * count
    assert row[at + 1 + count] == end and internvl.tokenizer.decode(row[at + 2 + count :]).startswith(f"\n{QUESTION}")
    with ImageSession(internvl, first, run=RunSettings(prefill_chunk=chunk)) as session:
        assert session.ids[0].tolist() == row[: at + 1 + sum(first.tokens)], "it ends before the image does"
        with session.branch(ids, collage) as branch:
            assert (branch.logits() - stock_logits(internvl, ids, first + collage)).abs().max() < 1e-4
        want = stock.generate_ids(internvl, ids, first + collage, max_new_tokens=12)
        assert session.reply(ids, collage, max_new_tokens=12, static=False) == want
        prompt = search_prompt(session, "star")
        assert [found.grid for found in prompt.turn.images] == list(first.grids)
        assert prompt.prior_rows == 9 and prompt.rows.start == session.length + 1
        rows = session.attention(prompt.turn, layers=(2,), causal=False)
    for mine, theirs in zip(
        rows, stock.attention(internvl, prompt.turn, first, layers=(2,), causal=False), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=0)


def test_encode_is_what_the_models_own_forward_puts_into_the_prompt(adapter, pictures):
    ids = adapter.input_ids(QUESTION, pictures)
    seen = []
    handle = adapter.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    stock_logits(adapter, ids, pictures)
    handle.remove()
    want = seen[0][ids == adapter.image_token]
    torch.testing.assert_close(adapter.encode(pictures).embeddings, want, atol=2e-6, rtol=2e-6)


def test_replies_side_by_side_are_those_one_by_one(adapter):
    texts = ["List: star", "List: a ring and a moon behind the very small heart", "List: x"]
    prompts = [adapter.input_ids(text) for text in texts]
    prefix = Prefix(adapter, prompts[0][:, :3])
    want = [stock.generate_ids(adapter, ids, max_new_tokens=9) for ids in prompts]
    assert len({tuple(reply) for reply in want}) == 3 and prefix.replies(prompts, max_new_tokens=9) == want


# Prompts


def test_line_break_and_fixed_words_are_the_prior_and_only_entities_have_labels(adapter, pictures):
    prompt = search_prompt(Prompts(adapter, pictures), "star, ring", include_end_token=False)
    ids = prompt.turn.input_ids[0].tolist()
    spoken = [adapter.tokenizer.decode([token]).strip() for token in ids[prompt.rows.start : prompt.rows.stop]]
    assert spoken[:9] == ["", "Please", "search", "the", "images", "for", "these", "objects", ":"]
    assert prompt.prior_rows == 9 and "".join(prompt.labels) == "star,ring"
    behind = adapter.image_end or adapter.image_text
    assert ids[prompt.rows.start - 1] == adapter.tokenizer.convert_tokens_to_ids(behind)
    ended = search_prompt(Prompts(adapter, pictures), "star, ring")
    assert ended.labels[len(prompt.labels) :] == (("<|im_end|>",) if adapter.family != "llava" else ())


@pytest.mark.parametrize("text", ["assistant", "USER", "a", "What is it?", "星: 9!"])
def test_the_rows_of_a_turn_are_its_texts(adapter, text):
    turn = adapter.turn(text, preprocessed(adapter, SIZES[0]))
    ids = turn.input_ids[0].tolist()
    assert adapter.tokenizer.decode(ids[turn.rows.start : turn.rows.stop]).strip() == text
    assert adapter.tokenizer.decode(ids[: turn.rows.start]).endswith("\n")


def test_words_that_melt_into_the_entities_are_refused(adapter):
    with pytest.raises(ValueError, match="keep its words as tokens"):
        search_prompt(Prompts(adapter, preprocessed(adapter, SIZES[0])), "tar", prompt="Please find the s")


def test_special_tokens_in_a_question_are_only_text(adapter, pictures):
    special = [*adapter.tokenizer.get_added_vocab()]
    row = adapter.input_ids("What" + "".join(special) + "?", pictures)[0].tolist()
    plain = adapter.input_ids("What", pictures)[0].tolist()
    for token in adapter.tokenizer.convert_tokens_to_ids(special):
        if adapter.tokenizer.unk_token_id != token:
            assert row.count(token) == plain.count(token)


def test_llavas_prompt_begins_as_its_tokenizer_begins_a_text():
    adapter = BUILDERS["llava"]()
    pictures = preprocessed(adapter, SIZES[0])
    text = "USER: " + "<image>" * 16 + f"\n{QUESTION} ASSISTANT:"
    assert adapter.input_ids(QUESTION, pictures)[0].tolist() == adapter.tokenizer(text)["input_ids"]
    assert adapter.tokenizer(text)["input_ids"][0] == adapter.tokenizer.bos_token_id


def test_internvls_own_tokenizer_must_give_nine_prior_rows(internvl, monkeypatch):
    end = internvl.tokenizer.convert_tokens_to_ids("</img>")
    assert PUBLISHED_PRIOR["internvl"] == (151666, 9)
    monkeypatch.setitem(PUBLISHED_PRIOR, "internvl", (end, 8))
    hide = HiDe(internvl, PRESETS["internvl3-8b"].changed(layers=(1,)))
    with pytest.raises(ValueError, match="has 9 tokens, want 8"):
        hide.search_prompt(Prompts(internvl, preprocessed(internvl, SIZES[0])), "star")


# InternVL's tiles


@pytest.mark.parametrize(
    "size, most, want",
    [
        ((2250, 1500), 128, (4, 6)), ((3840, 2160), 128, (5, 9)), ((7680, 4320), 128, (5, 9)),
        ((4032, 1344), 128, (4, 12)), ((5760, 1440), 128, (4, 16)),
        ((2250, 1500), 12, (2, 3)), ((3840, 2160), 12, (2, 4)), ((7680, 4320), 12, (2, 4)), ((1600, 1200), 12, (3, 4)),
        ((300, 300), 12, (1, 1)), ((447, 448), 12, (1, 1)), ((2000, 2000), 12, (3, 3)), ((9000, 3), 12, (1, 12)),
    ],
)  # fmt: skip
def test_published_tile_counts(size, most, want):
    assert tile_grid(size[1], size[0], 448, 1, most) == want


def test_tiles_are_those_of_transformers_own_processor(internvl):
    try:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
    except ImportError:
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
    rng = np.random.default_rng(0)
    for least, most in [(1, 12), (1, 40), (5, 9)]:
        for height, width in np.exp(rng.uniform(np.log(30), np.log(6000), (60, 2))).astype(int).tolist():
            rows, columns = tile_grid(height, width, 448, least, most)
            assert (columns, rows) == get_optimal_tiled_canvas((height, width), (448, 448), least, most)
    for size in [(171, 107), (53, 50), (40, 211), (57, 56)]:
        image = noise(*size)
        want = internvl.image_processor(
            images=[image], crop_to_patches=True, min_patches=1, max_patches=19, return_tensors="pt"
        )
        (got,) = internvl.preprocess([image], min_tokens=4, max_tokens=80).items
        assert torch.equal(got.pixels, want["pixel_values"]) and got.tokens == 4 * int(want["num_patches"][0])


def test_token_limits_hold_with_the_thumbnail(internvl):
    for least, most in [(4, 4), (4, 11), (4, 12), (9, 40), (30, 60), (60, 60)]:
        for picture in preprocessed(internvl, [(171, 107), (30, 30), (9, 400)], most=most).items:
            assert picture.tokens <= most
        for picture in internvl.preprocess([noise(30, 30)], min_tokens=least, max_tokens=most).items:
            assert least <= picture.tokens <= most
    with pytest.raises(ValueError, match="max_tokens: got 3, want at least 4"):
        preprocessed(internvl, SIZES[0], most=3)
    assert PRESETS["internvl3-8b"].run.max_tokens == 129 * 256


def test_gaps_of_a_collage_are_black_to_internvl_and_its_pixels_keep_their_colour(internvl):
    image = Image.new("RGB", (200, 200), (250, 240, 230))
    boxes = torch.tensor([[0, 0, 56, 56], [100, 100, 156, 156]])
    with open_session(internvl, image, RunSettings(min_tokens=4, max_tokens=80)) as session:
        (cut,) = session.crop([boxes], fill=PRESETS["internvl3-8b"].settings.fill)
    collage = cut.image
    assert collage.shape == (112, 112, 4) and cut.boxes.tolist() == boxes.tolist()
    (picture,) = internvl.preprocess([collage], min_tokens=4, max_tokens=80).items
    assert picture.layout[0] == picture.layout[1]
    mean, std = (torch.tensor(internvl.image_processor.__dict__[name]) for name in ("image_mean", "image_std"))
    seen = (picture.pixels[-1].permute(1, 2, 0) * std + mean) * 255
    expected = torch.zeros(56, 56, 3)
    expected[:28, :28] = expected[28:, 28:] = torch.tensor([250.0, 240, 230])
    inside = [*range(25), *range(31, 56)]  # Pillow's filter mixes what lies within two pixels of an edge
    assert (seen - expected)[inside][:, inside].abs().max() < 1e-3
    opaque = Image.new("RGBA", (100, 60), (9, 8, 7, 255))
    pixels = [internvl.preprocess([one], min_tokens=4, max_tokens=80).items[0].pixels
              for one in (opaque, opaque.convert("RGB"))]  # fmt: skip
    assert torch.equal(*pixels)


def planted(token, tiles=(1, 2), prior=9):
    """The specification's row on the stitched grid: noise, a sink in cell (1, 1), and for entities a moving block."""
    row = np.random.default_rng(token).uniform(0, 0.2, (16 * tiles[0], 16 * tiles[1]))
    row[1, 1] += 3
    if token >= prior:
        at = 14 + token - prior
        row[5:7, at : at + 3] += 1
    return torch.from_numpy(row * 0.4 / row.sum()).float()


@pytest.mark.parametrize("sigma", [0, 1])
def test_golden_blocks_across_the_seam_of_two_tiles_are_one_box_each(sigma):
    adapter = families_tiles.internvl(tile=448)
    pictures = ImageInputs((ImageInput(torch.zeros(0), (1, 2), (16, 32), 768),))
    hide = HiDe(adapter, PRESETS["internvl3-8b"].changed(layers=(1,), sigma=sigma, threshold=0.7))
    prompt = hide.search_prompt(Prompts(adapter, pictures), "star, ring")
    assert prompt.prior_rows == 9 and prompt.labels == ("star", ",", "ring")
    rows = torch.full((len(prompt.rows), 768), 9.0)  # the thumbnail's are larger than all others
    for token, row in enumerate(rows):
        for tile, part in enumerate(planted(token).split(16, dim=1)):
            row[256 * tile : 256 * (tile + 1)] = part.flatten()
    found = hide.maps(EntityRows(tuple(rows_to_maps(rows, prompt.turn.images)), prompt.prior_rows, prompt.labels))
    (maps,), labels = found.by_image
    assert maps.shape == (3, 16, 32) and labels == (("star", ",", "ring"),)
    for token, own in enumerate(maps):
        boxes = region_boxes(own[None], hide.settings.threshold, (320, 160))
        assert boxes.tolist() == [[140 + 10 * token, 50, 170 + 10 * token, 70]]


# LLaVA-1.5's square


def test_llavas_map_is_the_picture_and_nothing_else():
    """A white picture on the mean colour: its cells are white, all others are not; squares are as the processor's."""
    adapter = BUILDERS["llava"]()
    mean, std = (torch.tensor(adapter.image_processor.__dict__[name]) for name in ("image_mean", "image_std"))
    for size in [(100, 100), (171, 107), (40, 211), (9, 400), (64, 48)]:
        pictures = adapter.preprocess([Image.new("RGB", size, "white")], min_tokens=4, max_tokens=80)
        (found,) = adapter.image_tokens(adapter.input_ids(QUESTION, pictures), pictures)
        assert found.grid == pictures.grids[0] and found.stop - found.start == 16
        brightness = (pictures.items[0].pixels[0].permute(1, 2, 0) * std + mean).amin(-1)
        white = brightness.unfold(0, 14, 14).unfold(1, 14, 14).flatten(0, 1).amin((1, 2)) > 0.99
        grey = brightness.unfold(0, 14, 14).unfold(1, 14, 14).flatten(0, 1).amax((1, 2)) < 0.5
        mine = torch.zeros(16, dtype=torch.bool)
        mine[found.cells.flatten()] = True
        assert torch.equal(white, mine) and torch.equal(grey, ~mine)
    square = noise(90, 90)
    want = adapter.image_processor(images=[square], return_tensors="pt")["pixel_values"]
    assert torch.equal(adapter.preprocess([square], min_tokens=4, max_tokens=80).items[0].pixels, want)
    with pytest.raises(ValueError, match="max_tokens: got 15, want at least 16"):
        preprocessed(adapter, SIZES[0], most=15)


# LLaVA-OneVision's tiles


def test_onevisions_cells_are_the_tokens_that_the_model_packs_there():
    """Features that say where they come from, packed by the model itself."""
    adapter = BUILDERS["llava_onevision"]()
    shrunk = 0
    for seed, (width, height) in enumerate([(171, 107), (53, 50), (40, 211), (100, 100), (168, 160), (400, 60)]):
        pictures = preprocessed(adapter, [(width, height)], seed, most=200)
        (picture,) = pictures.items
        (found,) = adapter.image_tokens(adapter.input_ids(QUESTION, pictures), pictures)
        tiles = len(picture.pixels) - 1
        sizes = torch.tensor([picture.layout])
        pinpoints = adapter.model.config.image_grid_pinpoints
        down, across = (side // 56 for side in select_best_resolution((height, width), pinpoints))
        assert down * across == tiles
        y, x = torch.meshgrid(torch.arange(4.0 * down), torch.arange(4.0 * across), indexing="ij")
        marks = torch.stack([y, x], -1).view(down, 4, across, 4, 2).transpose(1, 2).reshape(tiles, 16, 2)
        packed, _ = adapter.model.model.pack_image_features(
            [torch.cat([torch.full((1, 16, 2), -5.0), marks])], sizes, image_newline=torch.tensor([-9.0, -9.0]),
            vision_aspect_ratio=adapter.model.config.vision_aspect_ratio,
        )  # fmt: skip
        packed = packed[0]
        assert len(packed) == picture.tokens == found.stop - found.start
        cells = packed[found.cells]
        assert (cells >= 0).all(), "neither the whole picture nor a line break"
        assert cells[:, :1, 1].unique().numel() == 1 and cells[:1, :, 0].unique().numel() == 1
        assert (cells[1:, :, 0] > cells[:-1, :, 0]).all() and (cells[:, 1:, 1] > cells[:, :-1, 1]).all()
        middle = cells.mean((0, 1)) - torch.tensor([4.0 * down - 1, 4.0 * across - 1]) / 2
        assert middle.abs().max() < 1e-4, "the padding that is left is the same on both sides"
        aspect = found.grid[1] / found.grid[0] * height / width
        assert 0.6 < aspect < 1.6
        shrunk += found.grid[0] * found.grid[1] < 4 * 4 * tiles and tiles > 4
    assert shrunk >= 2


def test_onevisions_pixels_are_the_processors_and_too_many_tokens_shrink_the_picture():
    adapter = BUILDERS["llava_onevision"]()
    image = noise(171, 107)
    want = adapter.image_processor(images=[image], return_tensors="pt")
    (picture,) = adapter.preprocess([image], min_tokens=4, max_tokens=200).items
    assert torch.equal(picture.pixels, want["pixel_values"][0]) and picture.layout == (107, 171)
    (smaller,) = adapter.preprocess([image], min_tokens=4, max_tokens=50).items
    assert smaller.tokens <= 50 < picture.tokens and smaller.layout[0] < 107
    with pytest.raises(ValueError, match="max_tokens: got 20, want at least"):
        preprocessed(adapter, SIZES[0], most=20)


def test_pixels_are_taken_as_pictures(adapter):
    image = noise(171, 107)
    tensor = torch.from_numpy(np.array(image))
    one, other = (adapter.preprocess([it], min_tokens=4, max_tokens=80).items[0] for it in (image, tensor))
    assert torch.equal(one.pixels, other.pixels) and one[1:] == other[1:]


def test_transparency_is_white_to_llava_and_black_to_internvl(adapter):
    clear = Image.new("RGBA", (100, 60), (200, 0, 0, 0))
    plain = Image.new("RGB", (100, 60), "black" if adapter.family == "internvl" else "white")
    pixels = [adapter.preprocess([one], min_tokens=4, max_tokens=80).items[0].pixels for one in (clear, plain)]
    assert torch.equal(*pixels)


# All of it


@pytest.mark.parametrize("in_span", [False, True])
def test_hide_answers_from_picture_and_collage_as_stock_generate_does(adapter, in_span):
    preset = Preset(
        HiDeConfig(
            layers=(2,), sigma=0, threshold=0.5, entities_from="rules", include_end_token=False,
            fill=None if in_span else (255, 255, 255),
        ),
        RunSettings(min_tokens=4, max_tokens=80, join_images=in_span),
        AnswerSettings(max_new_tokens=8),
    )  # fmt: skip
    if in_span and not adapter.joins_images:
        with pytest.raises(ValueError, match=f"join_images: got True, but {adapter.family}"):
            HiDe(adapter, preset)
        return
    image, both = noise(171, 107), [Plain(adapter, preset.with_settings(NoSettings())), HiDe(adapter, preset)]
    plain, answer = ask_all(both, image, QUESTION)
    assert answer.shown[0] is not None and answer.notes[:1] != ("collage: no region",)
    pictures = adapter.preprocess([image, answer.shown[0]], min_tokens=4, max_tokens=80)
    pictures = dataclasses.replace(pictures, joined=in_span)
    assert answer.text == stock.generate(adapter, QUESTION, pictures, max_new_tokens=8).text
    assert plain.text == stock.generate(adapter, QUESTION, ImageInputs(pictures.items[:1]), max_new_tokens=8).text


def test_onevisions_spans_need_sizes_that_fit():
    adapter = BUILDERS["llava_onevision"]()
    pictures = preprocessed(adapter, SIZES[0])
    ids = adapter.input_ids(QUESTION, pictures)
    with pytest.raises(ValueError, match="image_sizes: got None"):
        image_spans(adapter.model, ids)
    with pytest.raises(ValueError, match="should have"):
        image_spans(adapter.model, ids, image_sizes=torch.tensor([[168, 168]]))
    with pytest.raises(ValueError, match="image_sizes of 2 were given"):
        image_spans(adapter.model, ids, image_sizes=torch.tensor([[107, 171]] * 2))
