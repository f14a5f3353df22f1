"""Attention maps per token of a prompt and its reply, against eager attention."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hide.cli import app
from hide.engine.stock import forward_inputs
from hide.methods.attend import attend
from hide.models.qwen2_5_vl import Qwen25VL
from hide.present.pages import save_attention
from hide.tiny.model import build
from hide.tiny.scenes import draw_scene

TEXT = "What is the color of the star?"


@pytest.fixture(scope="module")
def adapter():
    return Qwen25VL(*build())


@pytest.fixture(scope="module")
def picture():
    return draw_scene(0, 300, 200, objects=3).image


def test_maps_of_prompt_and_reply_equal_eager_attention_of_a_model_with_grouped_heads(adapter, picture):
    assert adapter.model.config.get_text_config().num_key_value_heads == 2
    found = attend(adapter, picture, TEXT, layers=[1, 4], new_tokens=5)
    pictures = adapter.preprocess([picture], min_tokens=4, max_tokens=16384)
    turn = adapter.turn(TEXT, pictures)
    eager = copy.deepcopy(adapter.model)
    eager.set_attn_implementation("eager")
    out = eager.generate(
        **forward_inputs(adapter, turn.input_ids, pictures), do_sample=False, max_new_tokens=5, output_attentions=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    (image,) = turn.images
    prompt = torch.stack([out.attentions[0][layer][0, :, turn.rows, image.start : image.stop] for layer in (1, 4)])
    reply = torch.stack(
        [
            torch.stack([step[layer][0, :, -1, image.start : image.stop] for step in out.attentions], 1)
            for layer in (1, 4)
        ]
    )
    want = torch.cat([prompt, reply], 2).mean((0, 1)).unflatten(-1, image.grid)
    assert found.maps.shape == want.shape and (found.maps - want).abs().max() < 1e-6
    assert "".join(found.tokens[: found.prompt_tokens]) == TEXT
    ids = out.sequences[0, turn.input_ids.shape[1] :].tolist()
    assert list(found.tokens[found.prompt_tokens :]) == [adapter.tokenizer.decode([token]) for token in ids]
    assert found.reply == adapter.decode(ids)


def test_saved_files_hold_the_maps_and_a_panel_for_each_token(adapter, picture, tmp_path):
    found = attend(adapter, picture, TEXT, layers=[0], new_tokens=2)
    png, npz = save_attention(found, tmp_path / "new")
    with np.load(npz) as archive:
        np.testing.assert_array_equal(archive["maps"], found.maps.numpy())
        assert archive["tokens"].tolist() == list(found.tokens)
        assert archive["prompt_tokens"] == found.prompt_tokens and archive["layers"].tolist() == [0]
    with Image.open(png) as figure:
        assert len(figure.convert("RGB").getcolors(figure.width * figure.height)) > 1000


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"text": "  "}, "text: got nothing"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"layers": [6]}, "want 0 to 5"),
        ({"layers": []}, "got none"),
    ],
)
def test_wrong_requests_are_named(adapter, picture, arguments, text):
    with pytest.raises(ValueError, match=text):
        attend(adapter, picture, **{"text": TEXT, "layers": [0], **arguments})


def test_the_command_draws_and_tells(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    result = CliRunner().invoke(
        app, ["attend", str(tmp_path / "a.png"), TEXT, "--layers", "1,4", "--tokens", "3", "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 0, result.output
    assert "star" in result.output and "embedded" in result.output and (tmp_path / "o" / "attention.png").is_file()
    for layers in ("x", "1-9"):
        result = CliRunner().invoke(app, ["attend", str(tmp_path / "a.png"), TEXT, "--layers", layers])
        assert result.exit_code == 1 and "layers" in result.output and "Traceback" not in result.output


def test_doctor_is_a_command():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "attention_rows" in result.output
