"""The embedded model's folder loads like any Qwen2.5-VL checkpoint, and its tokenizer keeps any text."""

import json

import pytest
import torch
import transformers

from hide.methods.hide.config import SEARCH_PROMPT
from hide.methods.prompts import ZOOM_REFINE_ASK, ZOOM_REFINE_RECHECK, filled
from hide.questions import Question
from hide.tiny import model as tiny
from hide.tiny.scenes import COLORS, KINDS, draw_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.save(path, *tiny.build())
    return path


def test_folder(folder):
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 1.0
    assert (folder / "chat_template.jinja").is_file()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        tiny.load(folder / "missing")


def test_plain_classes_load_and_generate(folder):
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = tiny.load(folder)[2]
    content = [{"type": "image"}, {"type": "text", "text": "What is the color of the star?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
    )
    assert text.endswith("<|vision_end|>What is the color of the star?<|im_end|>\n<|im_start|>assistant\n")
    pixels = processor(images=[draw_scene(0, 170, 120, objects=2).image], return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 8, 12]]
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 24), return_tensors="pt")["input_ids"]
    assert int((ids == model.config.image_token_id).sum()) == 24
    kinds = (ids == model.config.image_token_id).int()
    extra = {"mm_token_type_ids": kinds} if int(transformers.__version__.split(".")[0]) >= 5 else {}
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, **extra, max_new_tokens=3, min_new_tokens=3
    )
    assert out.shape == (1, ids.shape[1] + 3)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_same_seed_same_weights():
    first, second, other = (tiny.build(seed)[0].lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_tokenizer(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        "plain words, and  two blanks\n\n  \tand more ",
        "naïve café — Größe 12345.678 €",
        "电视 テスト 🦄👩‍👩‍👧 \u0301e \x00\x7f",
        "0.5, 0.25, 10.25, 0.125 and 3, 1.00,0.12 [0.12, 2.34]",
        "don't (A) <FINAL_OUTPUT>x</FINAL_OUTPUT>\r\n",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for word in (*KINDS, *COLORS, "left", "right", "yes", "no", "A", "B", "C", "D"):
        assert len(tokenizer(word)["input_ids"]) == len(tokenizer(f" {word}")["input_ids"]) == 1
    box = tokenizer("Where? [0.12, 0.34, 1.00, 0.78]")["input_ids"][-9:]
    assert tokenizer.convert_ids_to_tokens(box[1::2]) == ["0.12", "0.34", "1.00", "0.78"]
    assert len({box[2], box[4], box[6]}) == 1
    for template in (ZOOM_REFINE_ASK, ZOOM_REFINE_RECHECK):
        words = filled(template, Question("What is it?", ("red", "blue")))
        assert len(tokenizer(words)["input_ids"]) < 1.5 * len(words.split())
    for token in tiny.SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1
    prefix = tokenizer(SEARCH_PROMPT.rstrip())["input_ids"]
    assert len(prefix) == 8
    for entities in ("star", "red star, ring", "unseen thing"):
        assert tokenizer(SEARCH_PROMPT + entities)["input_ids"][:8] == prefix
