"""Checkpoints that are damaged, lack weights or are of two models: one line names the file; and the preset they name."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hide import PRESETS, HiDe, Plain
from hide.cli import app
from hide.models import load
from hide.models.devices import named_device
from hide.tiny import CHECKPOINT

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7923920\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"
FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
    "chat_template.jinja", WEIGHTS,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    return tmp_path / "model"


def change(folder, edit):
    """The weights as `edit` makes them from those that are there."""
    weights = load_file(folder / WEIGHTS)
    save_file(edit(weights), folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def in_two_files(folder):
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, places = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_weights_that_are_not_there_are_refused_and_named(folder):
    change(folder, lambda all_: {name: own for name, own in all_.items() if ".layers.3." not in name})
    with pytest.raises(ValueError, match=r"lacks 12 weights \(model\.language_model\.layers\.3\.input_layernorm"):
        load(folder)


def test_weights_that_the_model_has_no_place_for_are_in_the_notes_of_every_result(folder):
    change(folder, lambda all_: {**all_, "model.other.weight": torch.ones(3)})
    model = load(folder, device="cpu")
    assert [note for note in model.notes if "1 weight (model.language_model.other.weight)" in note] == list(model.notes)
    assert len(model.notes) == 1
    result = HiDe(model, PRESETS["tiny"]).ask(Image.new("RGB", (140, 140), "red"), "What color is the star?")
    assert model.notes[0] in result.notes


def test_a_sound_checkpoint_has_no_notes_whole_or_in_shards(folder):
    whole = load(folder, device="cpu")
    in_two_files(folder)
    shards = load(folder, device="cpu")
    assert whole.notes == shards.notes == ()
    for one, other in zip(whole.model.parameters(), shards.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_weights_of_another_shape_are_refused_with_their_name(folder):
    change(folder, _shorter)
    with pytest.raises(ValueError, match="embed_tokens.weight of (shape|another shape)"):
        load(folder)


def _shorter(weights):
    name = next(name for name in weights if "embed_tokens" in name)
    return {**weights, name: weights[name][:-5].clone()}


@pytest.mark.parametrize(
    "content", [b"", LFS.encode(), b"\xff\xfe\x00" * 40, b'{"a":'], ids=["empty", "lfs", "binary", "cut"]
)
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_not_what_its_name_says_is_named(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as refused:
        load(folder, device="cpu")
    said = str(refused.value)
    assert str(folder / file) in said and "\n" not in said and said.startswith("model: ")
    if content == LFS.encode():
        assert "Git LFS pointer" in said


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja", WEIGHTS]
)
def test_a_file_that_is_missing_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises((ValueError, OSError), match=f"no {file}") as refused:
        load(folder, device="cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["[]", "null", "3"])
@pytest.mark.parametrize("file", [name for name in FILES if name.endswith(".json")])
def test_json_that_is_no_object_is_named(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises((ValueError, OSError), match=f"{file} holds"):
        load(folder, device="cpu")


@pytest.mark.parametrize("damage", ["missing", "cut", "pointer", "index"])
def test_a_damaged_shard_is_named(folder, damage):
    in_two_files(folder)
    shard = folder / SHARD
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "pointer":
        shard.write_text(LFS)
    else:
        (folder / INDEX).write_text("{")
    with pytest.raises((ValueError, OSError), match=INDEX if damage == "index" else SHARD):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    "template, text",
    [
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{% for m in messages %}{{ 'a' + m.content }}{% endfor %}", "can only concatenate"),
        ("hello", "0 image places for 1 images"),
        ("<|image_pad|>", "text of a user's turn"),
    ],
)
def test_a_chat_template_that_is_no_use_is_refused_while_loading(folder, template, text):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=rf"chat_template\.jinja.*{text}"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    "file, entries, text",
    [
        ("config.json", {"image_token_id": 999}, "image_token_id is 999"),
        ("config.json", {"model_type": "nothing"}, "nothing"),
        ("preprocessor_config.json", {"patch_size": 16}, "patch_size 16, and the model's patch_size is 14"),
        ("preprocessor_config.json", {"merge_size": "x"}, "merge_size 'x'"),
    ],
)
def test_parts_of_two_models_are_refused(folder, file, entries, text):
    edit_json(folder / file, **entries)
    with pytest.raises(ValueError, match=text):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    "file, entries, text",
    [
        ("preprocessor_config.json", {"patch_size": None}, ""),
        ("preprocessor_config.json", {"merge_size": None}, ""),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "mean: got"),
        ("preprocessor_config.json", {"image_mean": "x"}, "mean: got"),
        ("preprocessor_config.json", {"image_std": None}, "std: got"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "std: got .* want no zero"),
        ("generation_config.json", {"eos_token_id": "a"}, "eos_token_id: got 'a'"),
        ("generation_config.json", {"eos_token_id": [2, None]}, "eos_token_id: got"),
        ("generation_config.json", {"repetition_penalty": "x"}, "repetition_penalty: got 'x'"),
        ("generation_config.json", {"repetition_penalty": -1}, "repetition_penalty: got -1"),
        ("generation_config.json", {"max_new_tokens": -1}, "max_new_tokens"),
        ("generation_config.json", {"cache_implementation": "nothing"}, "cache_implementation"),
        ("generation_config.json", {"guidance_scale": 3.0}, "guidance_scale: got 3.0"),
        ("generation_config.json", {"assistant_early_exit": 1}, "assistant_early_exit: got 1"),
        ("generation_config.json", {"stop_strings": ["a"]}, "stop_strings: got"),
        ("generation_config.json", {"token_healing": True}, "token_healing: got True"),
        ("generation_config.json", {"dola_layers": "low"}, "dola_layers: got 'low'"),
    ],
)
def test_settings_that_would_fail_in_the_first_answer_are_refused_while_loading(folder, file, entries, text):
    edit_json(folder / file, **entries)
    with pytest.raises(ValueError, match=f"{file}: the .* cannot be used: .*{text}") as refused:
        load(folder, device="cpu")
    assert "\n" not in str(refused.value)


def test_settings_for_other_ways_of_generating_are_left_aside(folder):
    ways = {"temperature": 0.2, "top_p": 0.8, "top_k": 5, "do_sample": True, "num_beams": 2, "use_cache": False}
    picture = Image.new("RGB", (140, 140), "red")

    def said():
        methods = [method.from_pretrained(folder, device="cpu") for method in (Plain, HiDe)]
        return [method.ask(picture, "What color is the star?").text for method in methods]

    plain = said()
    edit_json(folder / "generation_config.json", **ways)
    assert said() == plain


@pytest.mark.parametrize("path", ["", " ", "x" * 300, "\0"])
def test_what_cannot_be_a_checkpoints_name_is_one_line(path):
    with pytest.raises((ValueError, OSError), match="^model: ") as refused:
        load(path, device="cpu")
    assert "\n" not in str(refused.value)


def test_on_the_command_line_damage_is_one_line(folder, tmp_path):
    os.truncate(folder / WEIGHTS, 1000)
    Image.new("RGB", (140, 140)).save(tmp_path / "p.png")
    for command in (["ask", str(tmp_path / "p.png"), "What?"], ["attend", str(tmp_path / "p.png"), "What?"], ["eval"]):
        done = CliRunner().invoke(app, [*command, "--model", str(folder), "--out", str(tmp_path / "out")])
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
        lines = [line for line in done.output.splitlines() if line.startswith("error")]
        assert len(lines) == 1 and WEIGHTS in lines[0]


def test_a_checkpoint_names_its_preset_wherever_it_lies(folder):
    hide = HiDe.from_pretrained(folder, device="cpu")
    assert hide.preset == PRESETS["tiny"] and hide.notes == ()
    assert HiDe.preset_for(hide.model, "qwen2.5-vl-7b") == (PRESETS["qwen2.5-vl-7b"], ())


def test_without_a_preset_of_its_own_a_checkpoint_takes_its_familys(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["hide_preset"]
    (folder / "config.json").write_text(json.dumps(config))
    found, notes = HiDe.preset_for(load(folder, device="cpu"))
    assert found.settings.layers == (3,) and "nothing was published for 6 layers" in notes[0]


@pytest.mark.parametrize("name", ["large", 5, ["tiny"]])
def test_a_preset_that_is_unknown_is_refused_with_those_there_are(folder, name):
    edit_json(folder / "config.json", hide_preset=name)
    with pytest.raises(ValueError, match=r"config\.json: hide_preset: got .*, want one of .*tiny"):
        HiDe.from_pretrained(folder, device="cpu")


NOWHERE = ["meta", "hpu", "npu", "vulkan", "xla", "privateuseone", "cpu:1", "cpu ", "gpu", "", "CUDA:0", "cuda:99"]


@pytest.mark.parametrize("name", NOWHERE)
def test_a_device_that_computes_nothing_here_is_one_line(name):
    with pytest.raises(
        ValueError, match=r"device: got .*, but .*; want cuda, cuda:1, cpu, ... that is here"
    ) as refused:
        named_device(name)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize("name", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_is_here(name):
    assert named_device(name).type == "cpu"


@pytest.mark.parametrize("command", ["ask", "attend", "eval", "calibrate", "profile"])
def test_every_command_refuses_a_device_in_one_line(tmp_path, command):
    Image.new("RGB", (140, 140)).save(tmp_path / "p.png")
    arguments = [str(tmp_path / "p.png"), "What?"] if command in ("ask", "attend") else []
    if command == "calibrate":
        arguments = ["--limit", "1"]  # as many scenes are drawn before
    done = CliRunner().invoke(app, [command, *arguments, "--device", "meta", "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert sum("device: got 'meta'" in line for line in done.output.splitlines()) == 1
