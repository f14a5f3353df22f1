"""ViCrop's map against eager attention of the whole model, its windows against a plain reading of the published rule,
and the two places where the published code fails."""

import copy
import math

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from typer.testing import CliRunner

from hide import Preset
from hide.cli import app
from hide.engine.stock import forward_inputs
from hide.methods.base import AnswerSettings
from hide.methods.vicrop import ViCrop, ViCropSettings, best_window
from hide.questions import Question
from hide.session import RunSettings

QUESTION = Question.parse("What is the color of the star?")


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def vicrop(model, **settings):
    preset = Preset(ViCropSettings(layers=(1,), base=60), RunSettings(16, 80), AnswerSettings(max_new_tokens=4))
    return ViCrop(model, preset.changed(**settings))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava"])
def test_the_map_is_the_published_ratio_of_two_whole_forwards(family):
    model = FAMILIES[family]()
    method, image = vicrop(model), picture(230, 170)
    eager = copy.deepcopy(model.model)
    eager.set_attn_implementation("eager")
    inputs = model.preprocess([image], min_tokens=16, max_tokens=80)
    rows = []
    for text in (
        method.prompt(QUESTION),
        "Describe this image in general. Answer with a single word or a short phrase.",
    ):
        turn = model.turn(text, inputs)
        with torch.no_grad():
            attentions = eager(**forward_inputs(model, turn.input_ids, inputs), output_attentions=True).attentions
        (shown,) = turn.images
        row = attentions[1][0, :, -1].mean(0)
        rows.append(row[shown.span[0] : shown.span[1]][torch.as_tensor(shown.cells)])
    with method.open(image) as session:
        length = session.length
        (found,) = method.maps(session, QUESTION)
    want = rows[0] / rows[1]
    assert found.shape == want.shape == inputs.grids[0] and length < turn.input_ids.shape[1]
    # Of two rows of float32 models, each within 1e-5; how they round differs between processors.
    torch.testing.assert_close(found, want, rtol=3e-5, atol=1e-6)


def published_window(att, size, base):
    """The rule, cell by cell."""
    cell = size[0] / att.shape[1], size[1] / att.shape[0]
    candidates = []
    for ratio in (1, 1.2, 1.4, 1.6, 1.8, 2):
        n = min(int(base * ratio / cell[0]), att.shape[1]), min(int(base * ratio / cell[1]), att.shape[0])
        if n == (att.shape[1], att.shape[0]):
            if ratio == 1:
                return (0, 0, *size)
            continue
        sums = np.array(
            [
                [att[y : y + n[1], x : x + n[0]].sum() for x in range(att.shape[1] - n[0] + 1)]
                for y in range(att.shape[0] - n[1] + 1)
            ]
        )
        best, at = -np.inf, (0, 0)
        for x in range(sums.shape[1]):
            for y in range(sums.shape[0]):
                if sums[y, x] > best:
                    best, at = sums[y, x], (x, y)
        beside = [
            sums[at[1] + dy, at[0] + dx]
            for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1))
            if 0 <= at[1] + dy < sums.shape[0] and 0 <= at[0] + dx < sums.shape[1]
        ]
        with np.errstate(invalid="ignore", divide="ignore"):
            sharpness = np.float64(best - np.mean(beside)) / (n[0] * n[1])
        candidates.append((sharpness, ratio, at, n))
    _, ratio, at, n = candidates[int(np.argmax([candidate[0] for candidate in candidates]))]
    side, box = base * ratio, []
    for axis in (0, 1):
        centre = int(at[axis] * cell[axis] + cell[axis] * n[axis] / 2)
        centre = max(centre, side // 2)
        centre = min(centre, size[axis] - side // 2)
        box.append((max(0, centre - side // 2), min(size[axis], centre + side // 2)))
    return tuple(round(edge) for edge in (box[0][0], box[1][0], box[0][1], box[1][1]))


@pytest.mark.parametrize("seed", range(12))
def test_windows_are_those_of_the_published_rule(seed):
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(3, 20, 2).tolist()
    size, base = tuple(rng.integers(200, 1500, 2).tolist()), int(rng.integers(60, 400))
    weights = rng.random((rows, columns)) ** 6
    settings = ViCropSettings(base=base, published_faults=True)
    assert best_window(torch.from_numpy(weights), size, settings).box == published_window(weights, size, base)
    if min(size[0] / columns, size[1] / rows) <= base:
        mended = best_window(torch.from_numpy(weights), size, ViCropSettings(base=base))
        wide = max(size[0] / columns, size[1] / rows) > base
        assert wide or mended.box == published_window(weights, size, base)


def test_a_small_image_is_shown_whole():
    assert best_window(torch.rand(5, 7), (180, 120), ViCropSettings(base=224)).box == (0, 0, 180, 120)


def test_cells_larger_than_the_window_end_in_a_corner_as_published_and_else_at_the_peak():
    """8K in 256 tokens: 366 pixels a cell."""
    weights = torch.rand(12, 21, generator=torch.Generator().manual_seed(0))
    weights[7, 15] = 9
    published = best_window(weights, (7680, 4320), ViCropSettings(published_faults=True))
    assert published.box == (0, 0, 224, 224) and math.isnan(published.sharpness)
    x0, y0, x1, y1 = best_window(weights, (7680, 4320), ViCropSettings()).box
    middle = (x0 + x1) / 2 / 7680 * 21, (y0 + y1) / 2 / 4320 * 12
    assert 15 <= middle[0] < 16 and 7 <= middle[1] < 8 and x1 - x0 == y1 - y0 >= 224


@pytest.fixture(scope="module")
def model():
    return FAMILIES["qwen2_5_vl"]()


def test_the_crop_is_shown_behind_the_image_in_the_same_turn(model):
    method, image = vicrop(model), picture(300, 200)
    with method.open(image) as session:
        answer = method.ask(session, QUESTION)
        (found,) = answer.evidence
        x0, y0, x1, y1 = found.boxes[0].tolist()
        crop = image.crop((x0, y0, x1, y1))
        assert session.ask(method.prompt(QUESTION), [crop], max_new_tokens=4).text == answer.text
    assert np.array_equal(np.asarray(found.shown), np.asarray(crop)) and found.maps.shape[0] == 1
    assert list(answer.steps) == ["attention", "window", "answer"] and found.shown_tokens >= 16
    assert answer.details["sharpness"][0] > 0 and answer.method == "vicrop"


def test_of_several_images_the_sharpest_window_is_cropped(model):
    method = vicrop(model)
    answer = method.ask([picture(300, 200), picture(200, 310, seed=3)], QUESTION)
    sharpest = int(np.argmax(answer.details["sharpness"]))
    assert [len(boxes) for boxes in answer.boxes] == [int(index == sharpest) for index in range(2)]
    assert answer.shown[1 - sharpest] is None and answer.shown[sharpest] is not None


@pytest.mark.parametrize("size, shape", [((320, 200), (2, 3)), ((100, 400), (4, 1)), ((90, 600), (6, 1))], ids=str)
def test_tiles_are_looked_at_by_themselves_and_portraits_are_no_division_by_zero(model, size, shape):
    method = vicrop(model, tile=110, min_tokens=4, max_tokens=16)
    with method.open(picture(*size)) as session:
        (whole,) = method.maps(session, QUESTION)
        with method.open(picture(*size).crop((0, 0, -(-size[0] // shape[1]), -(-size[1] // shape[0])))) as part:
            (first,) = vicrop(model).maps(part, QUESTION)
    assert whole.shape == (first.shape[0] * shape[0], first.shape[1] * shape[1])
    torch.testing.assert_close(whole[: first.shape[0], : first.shape[1]], first)
    published = vicrop(model, tile=110, published_faults=True, min_tokens=4, max_tokens=16)
    if int(math.ceil(size[1] / 110) * size[0] / size[1]) == 0:
        with pytest.raises(ValueError, match="the published code divides by their number"):
            published.ask(picture(*size), QUESTION)


def test_presets_hold_the_published_values_and_other_models_the_middle_layer(model):
    for name, layer, base, tokens in (
        ("qwen2.5-vl-3b", 22, 224, 256), ("qwen2.5-vl-7b", 22, 224, 256), ("llava-1.5-7b", 14, 336, 16384),
    ):  # fmt: skip
        preset = ViCrop.presets[name]
        assert (preset.settings.layers, preset.settings.base) == ((layer,), base)
        assert (preset.run.max_tokens, preset.answer.max_new_tokens) == (tokens, 20)
    preset, notes = ViCrop.preset_for(model)
    assert preset.settings.layers == (22 * model.num_layers // 36,) and "relative depth" in notes[0]
    assert ViCrop.preset_for(FAMILIES["internvl"]())[0].settings.layers is None
    for wrong in ({"base": 0}, {"tile": 0}, {"layers": ()}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ViCropSettings(**wrong)


def test_the_commands_take_it_like_any_method(small_scenes, tmp_path):
    picture(200, 150).save(tmp_path / "a.png")
    call = ["ask", str(tmp_path / "a.png"), "What is it?", "--method", "vicrop", "--set", "base=40", "--memory"]
    result = CliRunner().invoke(app, [*call, "--report", str(tmp_path / "seen")])
    assert result.exit_code == 0, result.output
    for text in ("vicrop answer", "plain answer", "sharpness", "window", "peak memory"):
        assert text in result.output
    page = (tmp_path / "seen" / "report.html").read_text()
    for text in ("vicrop answer", "question / description", "Sharpness", "peak GB", "base"):
        assert text in page
    result = CliRunner().invoke(app, [*call[:-1], "--set", "sigma=2"])
    assert result.exit_code == 1 and "plain, vicrop has no sigma; there are" in " ".join(result.output.split())
    call = ["eval", "--methods", "plain,vicrop", "--limit", "2", "--out", str(tmp_path / "eval")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0 and "vicrop" in result.output, result.output
    assert "vicrop" in (tmp_path / "eval" / "report.html").read_text()
