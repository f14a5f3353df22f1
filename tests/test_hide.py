"""HiDe's steps one by one and together, on a random-weight Qwen2.5-VL."""

import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import hide.session as sessions
from hide import PRESETS, HiDe, HiDeConfig, Plain, Preset
from hide.engine.prefix import Branch, Prefix
from hide.images import on_colour, to_image, to_tensor
from hide.methods.base import AnswerSettings, ask_all
from hide.methods.hide.method import EntityRows, region_boxes
from hide.models.qwen2_5_vl import Qwen25VL
from hide.session import ImageSession, RunSettings
from hide.tiny import CHECKPOINT
from hide.tiny.model import build, save
from hide.tiny.scenes import draw_scene
from hide_kernels import collage_of_maps
from hide_kernels.collage import collage as collage_of_boxes
from hide_kernels.collage import collages_of_maps, from_maps
from hide_kernels.host_read import host_read

GOLDEN = sorted((Path(__file__).parent / "data" / "golden").glob("case_*.npz"))
QUESTION = "What is the color of the star?"
WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def adapter():
    return Qwen25VL(*build())


@pytest.fixture(scope="module")
def config():
    return PRESETS["tiny"].changed(
        include_punctuation=True,
        include_end_token=True,
        threshold=0.7,
        min_tokens=30,
        max_tokens=120,
        max_new_tokens=4,
    )


@pytest.fixture(scope="module")
def hide(adapter, config):
    return HiDe(adapter, config)


@pytest.fixture(scope="module")
def images():
    return [draw_scene(seed, *size, objects=3).image for seed, size in [(0, (400, 300)), (1, (300, 420))]]


@pytest.mark.parametrize("count", [1, 2])
def test_ask_is_its_steps_one_after_another(hide, images, count):
    images = images[:count]
    steps = []
    result = hide.ask(images if count > 1 else images[0], QUESTION, progress=steps.append)
    with hide.open(images) as session:
        entities = hide.entities(QUESTION)
        maps = hide.maps(hide.attention_rows(session, entities))
        zoom = hide.zoom(session, maps)
        shown = [zoom.collages[index].image for index in zoom.order if zoom.collages[index].image is not None]
        reply = session.ask(QUESTION, shown, max_new_tokens=4)
    assert entities.items == ("star",) and result.details["entities"] == ["star"]
    assert sum(len(labels) for labels in zoom.labels) >= 1
    for index, found in enumerate(result.evidence):
        own_maps, own_labels = (part[index] for part in maps.by_image)
        assert torch.equal(own_maps, found.maps) and torch.equal(zoom.maps[index], found.maps)
        assert own_labels == zoom.labels[index] == found.labels
        made = zoom.collages[index]
        assert torch.equal(made.boxes, found.boxes)
        assert (made.image is None) == (found.shown is None)
        assert found.shown is None or to_image(made.image).tobytes() == found.shown.tobytes()
        assert (found.shown is None) == (found.shown_tokens is None)
    assert result.text == reply.text and result.method == "hide" and result.question.stem == QUESTION
    assert list(result.seconds) == steps and steps[0] == "read and resize" and steps[-1] == "answer"
    assert len(result.image_tokens) == count and sum(result.image_tokens) < result.tokens["prefix"]


def test_boxes_are_regions_of_maps_in_pixels_and_the_collage_shows_their_pixels(hide, images):
    (found,) = hide.ask(images[0], QUESTION).evidence
    boxes, collage, maps = found.boxes, found.shown, found.maps
    high = (maps >= hide.settings.threshold).any(0)
    covered = torch.zeros(300, 400, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.tolist():
        covered[y0:y1, x0:x1] = True
    rows, columns = high.shape
    for y, x in torch.nonzero(high).tolist():
        y0, y1, x0, x1 = (
            int(y / rows * 300),
            int((y + 1) / rows * 300),
            int(x / columns * 400),
            int((x + 1) / columns * 400),
        )
        assert covered[y0:y1, x0:x1].all()
    kept = np.asarray(images[0])[covered.any(1).numpy()][:, covered.any(0).numpy()]
    shown = covered[covered.any(1)][:, covered.any(0)].numpy()
    assert np.array_equal(np.asarray(collage)[shown], kept[shown])
    assert (np.asarray(collage)[~shown] == 255).all()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_steps_in_a_row_reproduce_the_published_boxes_and_collages(path):
    with np.load(path) as archive:
        case = dict(archive)
    count = len(case["grids"])
    images = [Image.fromarray(case[f"image_{index}"]) for index in range(count)]
    attention = torch.from_numpy(case["attention"]).mean(0)[:-4]
    spans = zip(case["image_starts"], case["image_ends"], case["grids"].tolist(), strict=True)
    rows = EntityRows(
        tuple(attention[:, a:b].unflatten(1, grid) for a, b, grid in spans), 8, ("",) * (len(attention) - 8)
    )
    config = HiDeConfig(layers=None, sigma=case["sigma"].item(), threshold=case["threshold"].item())
    model = SimpleNamespace(num_layers=1, notes=(), lock=nullcontext(), dtype=torch.float32)
    hide = HiDe(model, Preset(config))
    pixels = tuple(map(to_tensor, images))
    zoom = hide.zoom(SimpleNamespace(pixels=pixels), hide.maps(rows))
    boxes, made = [one.boxes for one in zoom.collages], [one.image for one in zoom.collages]
    collages = [None if one is None else Image.fromarray(one.numpy()) for one in made]
    for index, image in enumerate(images):
        alone = collage_of_boxes(
            pixels[index], region_boxes(zoom.maps[index], config.threshold, image.size), fill=WHITE
        )
        assert torch.equal(alone.boxes, boxes[index])
    got = {
        (index, *(np.array(box) / np.tile(images[index].size, 2)).tolist())
        for index in range(count)
        for box in boxes[index].tolist()
    }
    assert got == {tuple(box) for box in case["final_boxes"].tolist()}
    shown = [collages[index] for index in zoom.order]
    assert len(shown) == case["n_compact"]
    for index, collage in enumerate(shown):
        published = on_colour(Image.fromarray(case[f"compact_{index}"]))
        assert collage.size == published.size and collage.tobytes() == published.tobytes()


def test_attention_planted_in_the_rows_lands_in_the_boxes(hide):
    """A sink that every row has disappears; what only the entities look at stays."""
    rows = torch.rand(8 + 2, 12, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    rows[:, 1, 1] += 3
    rows[8, 3:5, 5:8] += 1
    rows[9, 7:9, 10:13] += 1
    (maps,), labels = hide.changed(sigma=0.0).maps(EntityRows((rows,), 8, ("star", "ring"))).by_image
    boxes = region_boxes(maps, 0.7, (1600, 1200))
    assert labels == (("star", "ring"),)
    assert sorted(boxes.tolist()) == [[500, 300, 800, 500], [1000, 700, 1300, 900]]


def test_collages_are_shown_in_the_order_in_which_tokens_came_to_their_images(hide, images, monkeypatch):
    """As the published code appends them; the collages in the result stay in the order of the images."""

    def planted(session, turn, *, queries, **kwargs):
        rows = [
            torch.rand(len(queries), *grid, generator=torch.Generator().manual_seed(0)) * 0.1
            for grid in session.inputs.grids
        ]
        rows[1][8, 1:3, 1:3] += 2
        rows[0][9, 2:4, 3:5] += 2
        return rows

    monkeypatch.setattr(ImageSession, "attention", planted)
    shown, ask = [], ImageSession.ask
    monkeypatch.setattr(
        ImageSession, "ask", lambda s, text, images, **k: (shown.extend(images), ask(s, text, images, **k))[1]
    )
    first, second = hide.ask(images, "Is the star left of the ring?").evidence
    assert [pixels.shape[1::-1] for pixels in shown] == [second.shown.size, first.shown.size]
    assert first.shown.size != second.shown.size and first.shown_tokens and second.shown_tokens


def test_every_form_of_a_picture_gives_the_same_result(hide, images, tmp_path):
    images[0].save(tmp_path / "a.png")
    array = np.asarray(images[0])
    results = [
        hide.ask(form, QUESTION).to_dict()
        for form in (images[0], str(tmp_path / "a.png"), array, torch.from_numpy(array.copy()).permute(2, 0, 1))
    ]
    for result in results:
        result.pop("seconds")
    assert results[1:] == results[:1] * 3


def test_every_setting_reaches_what_it_sets(adapter, images, monkeypatch):
    settings = HiDeConfig(
        layers=(1, 4), sigma=0.5, threshold=0.6, causal=True, include_end_token=False, max_entity_tokens=5,
        search_prompt="Please look for: ",
    )  # fmt: skip
    preset = Preset(settings, RunSettings(31, 77, prefill_chunk=50), AnswerSettings(max_new_tokens=3))
    calls = {}

    def spy(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            calls.setdefault(name, []).append(kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    method = sys.modules["hide.methods.hide.method"]
    for owner, name in [(adapter, "preprocess"), (method, "search_prompt"), (ImageSession, "attention"),
                        (Branch, "reply"), (sys.modules["hide.engine.prefix"], "extend")]:  # fmt: skip
        spy(owner, name)
    HiDe(adapter, preset).ask(images[0], QUESTION)
    assert (
        all(call == {"min_tokens": 31, "max_tokens": 77} for call in calls["preprocess"])
        and len(calls["preprocess"]) == 2
    )
    (prompt,), (attention,) = calls["search_prompt"], calls["attention"]
    assert prompt == {"prompt": "Please look for: ", "include_end_token": False, "family": adapter.family}
    assert (attention["layers"], attention["causal"]) == ((1, 4), True)
    assert [call["max_new_tokens"] for call in calls["reply"]] == [5, 3]
    # 77 tokens and the chat's around them in chunks of 50.
    layers = [call["layers"] for call in calls["extend"]]
    assert layers.count(range(adapter.num_layers)) >= 4 and layers.count(range(5)) == 1


def test_without_entities_the_questions_own_words_are_searched(adapter, config, images):
    result = HiDe(adapter, config, extractor=lambda text: " , ").ask(images[0], QUESTION)
    assert result.details["entities"] == [QUESTION]
    assert any("none were found" in note for note in result.notes)


def test_an_endless_word_is_searched_by_its_beginning(adapter, config, images):
    found = HiDe(adapter, config, extractor=lambda text: "").entities("_" * 50_000 + "a?")
    assert found.items == ("_" * 200,)


def test_a_users_extractor_is_given_the_options_and_is_believed(adapter, config, images):
    seen = []

    def extractor(text):
        seen.append(text)
        return "red star\nring"

    result = HiDe(adapter, config, extractor=extractor).ask(images[0], QUESTION, options=["red", "blue"])
    assert seen == [f"{QUESTION}\n(A) red\n(B) blue"]
    assert result.details["entities"] == ["red star", "ring"]
    assert result.question.options == ("red", "blue")


def test_an_extractor_that_returns_no_text_is_named(adapter, config):
    with pytest.raises(TypeError, match="extractor: it returned NoneType"):
        HiDe(adapter, config, extractor=lambda text: None).entities(QUESTION)


def test_the_model_itself_extracts_where_the_config_says_so(adapter, config, monkeypatch):
    asked = []

    def reply(prefix, ids, *, max_new_tokens):
        asked.append(ids)
        return adapter.tokenizer("<FINAL_OUTPUT>star</FINAL_OUTPUT>", add_special_tokens=False)["input_ids"]

    monkeypatch.setattr(Prefix, "reply", reply)
    hide = HiDe(adapter, config.changed(entities_from="model", entity_prompt="List: {question}"))
    for _ in range(2):  # The second time it is remembered.
        assert hide.entities(QUESTION).items == ("star",)
    assert [ids.tolist() for ids in asked] == [adapter.input_ids(f"List: {QUESTION}").tolist()]


@pytest.mark.parametrize("value, note", [(0.25, "no region was found"), (torch.nan, "NaN or inf")])
def test_without_a_region_the_answer_is_the_plain_one(adapter, config, images, monkeypatch, value, note):
    rows = ImageSession.attention
    monkeypatch.setattr(
        ImageSession, "attention", lambda *a, **k: [torch.full_like(row, value) for row in rows(*a, **k)]
    )
    plain, result = ask_all([Plain(adapter, config), HiDe(adapter, config)], images[0], QUESTION)
    assert result.shown == (None,) and len(result.boxes[0]) == 0
    assert result.text == plain.text
    assert any(note in text for text in result.notes) and not any(note in text for text in plain.notes)


def test_more_regions_than_slots_are_all_kept():
    maps = torch.zeros(1, 60, 60)
    maps[0, ::2, ::2] = 1
    boxes = region_boxes(maps, 0.7, (60, 60))
    assert len(boxes) == 900 and len({tuple(box) for box in boxes.tolist()}) == 900


def test_cells_within_rounding_of_the_threshold_are_reported(hide):
    row = torch.tensor([[[0.0, 0.7, 0.7 + 1e-5, 0.7 - 1e-5, 0.71, 1.0]]])
    exact = hide.changed(sigma=0.0)
    with hide.open(Image.new("RGB", (60, 60))) as session:
        zoom = exact.zoom(session, exact.maps(EntityRows((row,), 0, ("star",))))
    assert torch.equal(zoom.maps[0], row)
    assert zoom.notes == ("maps: 3 cells lie within 2e-05 of the threshold, the error of torch.float32",)


def test_a_collage_too_thin_for_the_model_gets_a_margin(hide, images):
    thin = Image.new("RGB", (2, 1400), "red")
    with hide.open(images[0]) as session:
        assert session.ask(QUESTION, [thin], max_new_tokens=2).tokens > 0
    with pytest.raises(ValueError, match="200 times"):
        hide.open(thin)


def test_a_saved_checkpoint_gives_what_the_parts_in_memory_give(adapter, config, images, tmp_path):
    save(tmp_path, adapter.model, adapter.tokenizer, adapter.image_processor, dtype=torch.float32)
    loaded = HiDe.from_pretrained(tmp_path, preset="tiny", device="cpu", **config.to_dict())
    assert loaded.preset == config
    first, second = (which.ask(images[0], QUESTION).to_dict() for which in (loaded, HiDe(adapter, config)))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_half_precision_runs_and_says_what_it_cannot_decide(images, config):
    model, tokenizer, processor = build()
    hide = HiDe(Qwen25VL(model.bfloat16(), tokenizer, processor), config)
    result = hide.ask(images[0], QUESTION)
    near = sum(int(((maps - 0.7).abs() <= 2.8e-2).sum()) for maps in (found.maps for found in result.evidence))
    assert near == 0 or any(note.startswith(f"maps: {near} cells") for note in result.notes)


def test_presets_hold_the_published_values_and_other_depths_are_marked(adapter):
    published = PRESETS["qwen2.5-vl-7b"]
    settings, run, answer = published.settings, published.run, published.answer
    assert (settings.layers, settings.sigma, settings.threshold) == ((14,), 3.0, 0.7)
    assert (run.min_tokens, run.max_tokens, answer.max_new_tokens) == (256, 16384, 1024)
    assert (settings.causal, settings.include_end_token, settings.alpha_threshold) == (False, True, 10)
    preset, notes = HiDe.preset_for(adapter)
    assert preset.settings.layers == (3,) and "6 layers" in notes[0]
    assert HiDe.preset_for(adapter, "qwen2.5-vl-7b") == (published, ())
    with pytest.raises(ValueError, match="preset: got 'x'"):
        HiDe.preset_for(adapter, "x")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"layers": ()}, "layers"), ({"sigma": -1}, "sigma"), ({"sigma": float("nan")}, "sigma"),
        ({"sigma": 1001}, "sigma"),
        ({"threshold": 0}, "threshold"), ({"threshold": 1.5}, "threshold"), ({"min_tokens": 0}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "max_tokens"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"max_entity_tokens": 0}, "max_entity_tokens"),
        ({"entities_from": "rule"}, "entities_from"), ({"alpha_threshold": 300}, "alpha_threshold"),
        ({"search_prompt": " "}, "search_prompt"), ({"entity_prompt": "List"}, "question"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(changes, text):
    with pytest.raises(ValueError, match=text):
        Preset(HiDeConfig(layers=(1,), sigma=1.0, threshold=0.5)).changed(**changes)


def test_a_change_of_a_setting_that_there_is_not_names_those_that_there_are(config):
    with pytest.raises(TypeError, match="there is no sigmas; there are layers, sigma, .*max_tokens, .*letter_request"):
        config.changed(sigmas=2)


def test_layers_that_the_model_does_not_have_are_refused(adapter, config):
    with pytest.raises(ValueError, match="layers: got 14, want 0 to 5"):
        HiDe(adapter, config.changed(layers=(14,)))


def test_wrong_numbers_of_images_are_named(hide, images):
    with pytest.raises(ValueError, match="empty list"):
        hide.ask([], QUESTION)
    with hide.open(images) as session, pytest.raises(ValueError, match="boxes: got 0"):
        session.crop([])


def test_commas_have_maps_as_published_unless_they_are_left_out(adapter, config, images):
    entities = "star, ring"
    hide = HiDe(adapter, config)
    with hide.open(images[0]) as session:
        published = hide.attention_rows(session, entities)
        worded = hide.changed(include_punctuation=False).attention_rows(session, entities)
    kept = [place for place, label in enumerate(published.labels) if label != ","]
    assert "," in published.labels and [published.labels[place] for place in kept] == list(worded.labels)
    prior = published.prior_rows
    assert torch.equal(worded.rows[0][:prior], published.rows[0][:prior])
    assert torch.equal(worded.rows[0][prior:], published.rows[0][[prior + place for place in kept]])


@pytest.mark.parametrize("rows", [1, 2])
def test_many_small_tensors_are_read_as_they_are(rows):
    tensors = [
        torch.arange(5.0, dtype=torch.float64)[::2], torch.tensor(True), torch.zeros(0, 3), torch.tensor([[7]])[:, :rows].T,
        torch.arange(12).reshape(3, 4).T, torch.tensor([3, -1], dtype=torch.int32), torch.zeros(1).expand(1),
    ]  # fmt: skip
    for got, want in zip(host_read(tensors), tensors, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert host_read([]) == []


def test_collages_of_several_images_are_those_of_each(images):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(3, 9, 13, generator=generator), torch.rand(2, 11, 7, generator=generator)]
    valid = [torch.tensor([True, False, True]), torch.tensor([True, True])]
    sources = [to_tensor(image) for image in images]
    extra = torch.arange(4)
    made, (read,) = collages_of_maps(
        sources, maps, 0.97, valid=valid, max_regions=2, fill=(255, 255, 255), read_too=[extra]
    )
    assert torch.equal(read, extra)
    for one, source, own, flags in zip(made, sources, maps, valid, strict=True):
        alone = collage_of_maps(source, own, 0.97, valid=flags, fill=(255, 255, 255))
        assert torch.equal(one.image, alone.image) and torch.equal(one.boxes, alone.boxes) and len(one.boxes) > 1
    with pytest.raises(ValueError, match="maps: got 1, want 2"):
        collages_of_maps(sources, maps[:1], 0.5)


@pytest.mark.gpu
def test_from_rows_to_the_encoders_input_a_gpu_is_waited_for_once(images, config, monkeypatch):
    hide = HiDe(Qwen25VL(build()[0].cuda(), *build()[1:]), config.changed(threshold=0.5))
    reads = []

    def read(tensors):
        reads.append(len(tensors))
        torch.cuda.set_sync_debug_mode("default")
        found = host_read(tensors)
        torch.cuda.set_sync_debug_mode("error")
        return found

    with hide.open(images) as session:
        rows = hide.attention_rows(session, "star, ring")
        for checked in (False, True):  # The first time kernels are compiled.
            if checked:
                monkeypatch.setattr(from_maps, "host_read", read)
                torch.cuda.set_sync_debug_mode("error")
            try:
                zoom = hide.zoom(session, hide.maps(rows))
                inputs = session.prepare([one.image for one in zoom.collages])
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 1 and all(item.pixels.is_cuda for item in inputs.items)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(images, config):
    model, tokenizer, processor = build()
    on_cpu = HiDe(Qwen25VL(model, tokenizer, processor), config).ask(images, QUESTION).to_dict()
    on_gpu = HiDe(Qwen25VL(build()[0].cuda(), tokenizer, processor), config).ask(images, QUESTION).to_dict()
    for result in (on_cpu, on_gpu):
        result.pop("seconds")
    assert on_gpu == on_cpu


def test_a_collage_takes_no_more_tokens_than_the_model_has_positions_for(adapter, config, images, monkeypatch):
    hide = HiDe(adapter, config.changed(min_tokens=4, max_tokens=120))
    large = Image.new("RGB", (560, 560))
    with hide.open(images[0]) as session:
        (free,) = session.prepare([large]).tokens
        monkeypatch.setattr(sessions, "QUESTION_ROOM", adapter.max_positions - session.length - 60)
        (tight,) = session.prepare([large]).tokens
        assert len(session.prepare([large, large]).tokens) == 2
        assert sum(session.prepare([large, large]).tokens) <= 60
    assert free == 100 and 40 < tight <= 60


@pytest.mark.parametrize("way", ["ask", "open"])
def test_nobody_holds_the_encoders_input_during_the_prefill(hide, images, monkeypatch, way):
    pixels, alive = [], []
    preprocess, run = Qwen25VL.preprocess, Branch.run

    def noted(self, *args, **kwargs):
        inputs = preprocess(self, *args, **kwargs)
        pixels.extend(weakref.ref(item.pixels) for item in inputs.items)
        return inputs

    def looked(self, *args, **kwargs):
        alive.append([reference() is not None for reference in pixels])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Qwen25VL, "preprocess", noted)
    monkeypatch.setattr(Branch, "run", looked)
    hide.ask(images, QUESTION) if way == "ask" else hide.open(images).close()
    assert alive[0] == [False, False]


def test_a_bound_on_new_tokens_of_one_call_is_for_answers_and_not_for_entities():
    hide = HiDe.from_pretrained(CHECKPOINT, preset="tiny", entities_from="model")
    image, question = draw_scene(3, 280, 196, objects=3).image, "What color is the star in the picture?"
    lengths = []
    real = hide.model.decode
    hide.model.decode = lambda tokens: lengths.append(len(tokens)) or real(tokens)
    hide.ask(image, question, max_new_tokens=1)
    entities, answer = lengths
    assert answer == 1 < entities
    plain = Plain(hide.model)
    plain.ask(image, question, max_new_tokens=1)
    plain.ask(image, question)
    assert lengths[2] == 1 < lengths[3] <= hide.preset.answer.max_new_tokens


@pytest.mark.parametrize("bound, error", [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_bound_on_new_tokens_that_is_none_is_refused_before_anything_runs(bound, error):
    hide = HiDe.from_pretrained(CHECKPOINT, preset="tiny")
    for method in (hide, Plain(hide.model)):
        with pytest.raises(error, match=f"max_new_tokens: got {bound}"):
            method.ask("no such file", "What?", max_new_tokens=bound)


def test_what_was_guessed_about_a_picture_is_a_note_of_every_result_and_no_warning(hide, recwarn):
    ramp = np.tile(np.linspace(-1, 1, 300, dtype=np.float32), (200, 1))
    want = "image: values of -1 to 1 are read as -1 (black) to 1 (white)"
    assert want in hide.ask(ramp, QUESTION).notes
    with hide.open(ramp) as session:
        assert want in hide.ask(session, QUESTION).notes
    assert not recwarn.list
