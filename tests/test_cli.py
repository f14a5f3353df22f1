"""The `hide` command as a user meets it."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hide.cli import app
from hide.engine.kv_cache import OffloadedCache, PreallocatedLayer
from hide.methods.base import MODELS
from hide.models import FAMILIES, adapter_class
from hide.tiny.scenes import draw_scene

QUESTION = "What is the color of the star?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    draw_scene(0, 300, 200, objects=3).image.save(path)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_ask_prints_entities_boxes_answers_times_and_saves_pictures(picture, tmp_path):
    result = run("ask", picture, QUESTION, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    for text in ("embedded", "entities", "star", "boxes", "plain answer", "hide answer", "attention rows", "total"):
        assert text in result.output
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["entities"] == ["star"] and document["model"] == "embedded"
    for name in ("overview.png", "image_0_heat.png", "image_0_boxes.png", "image_0_shown.png"):
        with Image.open(tmp_path / name) as image:
            assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 20, f"{name} shows nothing"
    with Image.open(tmp_path / "image_0_shown.png") as collage:
        assert list(collage.size) == document["shown"][0]


def test_keys_and_values_on_the_host_give_the_same_answer(picture, tmp_path, monkeypatch):
    made, real = [], OffloadedCache.__init__
    monkeypatch.setattr(OffloadedCache, "__init__", lambda *a: (made.append(a), real(*a))[1])
    documents = []
    for arguments in ((), ("--offload-kv",)):
        assert not made
        result = run("ask", picture, QUESTION, "--out", str(tmp_path), "--json", *arguments)
        assert result.exit_code == 0, result.output
        documents.append(json.loads(result.stdout))
        documents[-1].pop("seconds")
    assert made and documents[0] == documents[1]


def test_json_output_is_json_and_settings_reach_the_method(picture, tmp_path):
    result = run(
        "ask", picture, QUESTION, "--out", str(tmp_path), "--json", "--layer", "1", "--sigma", "0",
        "--threshold", "1.0", "--option", "red", "--option", "blue",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["question"].endswith("(A) red\n(B) blue")
    width, height = document["images"][0]
    cells = [(x1 - x0) * (y1 - y0) / (width * height) for x0, y0, x1, y1 in document["boxes"][0]]
    assert max(cells) < 0.02, "threshold 1 leaves single cells"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["missing.png", QUESTION], "missing.png is not a file"),
        (["PICTURE", "?!"], "at least one word"),
        (["PICTURE", QUESTION, "--model", "."], "no config.json"),
        (["PICTURE", QUESTION, "--layer", "77"], "want 0 to 5"),
        (["PICTURE", QUESTION, "--preset", "best"], "one of qwen2.5-vl-7b, qwen3-vl-8b,"),
        (["PICTURE", QUESTION, "--dtype", "int4"], "dtype"),
        (["PICTURE", QUESTION, "--device", "gpu"], "device: got 'gpu', but"),
        (["PICTURE", QUESTION, "--device", "cuda:99"], "device: got 'cuda:99', but"),
        (["PICTURE", QUESTION, "--device", "vulkan"], "device: got 'vulkan', but"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(picture, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    result = run("ask", *[picture if argument == "PICTURE" else argument for argument in arguments])
    assert result.exit_code == 1
    assert text in " ".join(result.output.split()) and "Traceback" not in result.output


def test_a_picture_that_does_not_fit_is_one_line_with_advice(picture, tmp_path, monkeypatch):
    def short(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(PreallocatedLayer, "update", short)
    result = run("ask", picture, QUESTION, "--out", str(tmp_path))
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and "do not fit into memory" in said and "Traceback" not in said


def test_models_lists_each_family_with_its_class_checkpoints_and_presets():
    result = run("models")
    assert result.exit_code == 0, result.output
    for model_type in FAMILIES:
        family = adapter_class(model_type)
        presets = [name for name, preset in MODELS.items() if preset.family == model_type]
        assert presets, "a family without a preset"
        for text in (model_type, family.model_class, *family.checkpoints, *presets, family.tested):
            assert text in result.output, text


def test_help_teaches():
    assert "ask" in run("--help").output
    output = run("ask", "--help").output
    for option in (
        "--model",
        "--preset",
        "--layer",
        "--sigma",
        "--threshold",
        "--device",
        "--dtype",
        "--weights",
        "--offload-kv",
        "--max-new-tokens",
        "--out",
        "--json",
    ):
        assert option in output
    assert "extra [quant]" in " ".join(output.replace("│", " ").split()), "taken for a style"
