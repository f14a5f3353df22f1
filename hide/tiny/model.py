"""The embedded model: Hugging Face's Qwen2.5-VL class with about four million parameters, and a tokenizer of its own.

`build` makes all parts with random weights, `save` writes a folder that loads like any Qwen2.5-VL checkpoint, `load`
reads one.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from hide.methods import prompts
from hide.questions import LETTERS, TAGGED_LETTER_REQUEST, Question
from hide.tiny.letter_forms import LETTER_FORMS
from hide.tiny.scenes import COLORS, KINDS, PLURALS

__all__ = ["COORDINATES", "SPECIAL_TOKENS", "build", "build_tokenizer", "load", "save"]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PATCH, MERGE = 14, 2
MIN_PIXELS, MAX_PIXELS = 4 * (PATCH * MERGE) ** 2, 16384 * (PATCH * MERGE) ** 2

_VOCABULARY = 2048
# The base is small: each of the 16 frequencies then turns noticeably within a few image tokens, and few wrap round
# in the width of a large picture.
_ROPE_THETA = 30.0
_ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6]}
# Parts of 1 with two digits, as boxes have them, and the comma between two; a word with the one blank before it; other
# digits one by one; runs of punctuation; line breaks; other blanks.
COORDINATES = tuple(f"{part / 100:.2f}" for part in range(101))
_SPLIT = r", (?=[01]\.\d\d(?!\d))|[01]\.\d\d(?!\d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = """
You are a helpful assistant system user
Please search the images for these objects image object picture
What What's is are was the a an of on in at or and with color colour shape kind size side left right above below top
bottom corner middle center up down between next behind under over inside near there this that it its which where who
how many much Is Are Does Do Which Where Who How Can Could Find Look Tell Name Describe List Count Answer answer
option letter from given choices choice directly one word only by using single your please find look tell name
describe list count yes no Yes No not none zero two three four five six seven eight nine ten
white black gray grey brown big small large tiny thing things shape shapes background same other both any all
material value noun question entity entities final output
"""

# Every word of theirs is a token.
_TEMPLATES = (
    prompts.SHORT_ANSWER,
    prompts.SHORT_PHRASE,
    prompts.GENERAL_PROMPT,
    prompts.BOX_REQUEST,
    prompts.ZOOM_REFINE_ASK,
    prompts.ZOOM_REFINE_RECHECK,
)

_CHAT_TEMPLATE = """\
{%- if not messages or messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def _image_processor_class() -> Any:
    # Transformers 5 gives its PIL class that name; the plain name would need torchvision there. Version 4 has only
    # the plain one.
    return getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that encodes any text without loss and has every word of the scenes as one token.

    Each word is one token with and without a leading blank, in lower case and capitalised.
    """
    asked = Question("What?", ("red", "blue", "green"))
    templates = " ".join(
        [
            *(prompts.filled(text, one) for text in _TEMPLATES for one in (asked, Question("What?"))),
            *(form(asked.stem, asked.options) for form in LETTER_FORMS.values()),
            TAGGED_LETTER_REQUEST,
        ]
    )
    words = {*_WORDS.split(), *re.findall("[A-Za-z]+", templates), *LETTERS[:8], *KINDS, *PLURALS.values(), *COLORS}
    spellings = sorted({form for word in words for form in (word, word.lower(), word.capitalize())})
    marks = {mark for text in (templates, "**Answer: [B]**\n**") for mark in re.findall(r" ?[^\w\s]+", text)}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - len(SPECIAL_TOKENS),
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    forms = [form for word in spellings for form in (word, f" {word}")]
    bpe.train_from_iterator([*forms, *sorted(marks), *COORDINATES, ", 0.00"], trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    token: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    if int(transformers.__version__.split(".")[0]) >= 5:
        rope: dict[str, Any] = {"rope_parameters": {"rope_theta": _ROPE_THETA, **_ROPE}}
    else:
        rope = {"rope_theta": _ROPE_THETA, "rope_scaling": _ROPE}
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
        "tie_word_embeddings": True,
        **rope,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 192,
        # Of eight image tokens a side: what an object looks like is learned from small pictures for those of any size.
        "window_size": 8 * PATCH * MERGE,
        "fullatt_block_indexes": [2],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build(seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast, Any]:
    """The model with random float32 weights, its tokenizer, and its image processor."""
    tokenizer = build_tokenizer()
    config = _config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
        _initialise(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = _image_processor_class()(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
    )
    return model, tokenizer, processor


def _initialise(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Random weights for a fast start: unit gain in every layer, and vision heads that each look at a near place at
    first.
    """
    vision: Any = model.config.vision_config
    text: Any = model.config.text_config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            fan_in = parameter.shape[1:].numel()
            depth = vision.depth if "visual" in name else text.num_hidden_layers
            residual = name.endswith(("attn.proj.weight", "o_proj.weight", "down_proj.weight"))
            parameter.normal_(0, fan_in**-0.5 * ((2 * depth) ** -0.5 if residual else 1))
        dim = vision.hidden_size // vision.num_heads
        frequency = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
        for block in model.model.visual.blocks:
            query, key, _ = block.attn.qkv.bias.view(3, vision.num_heads, 2, 2, dim // 4)
            # Equal biases make a kernel of the distance with its peak at zero; turning the key's moves the peak.
            angle = torch.empty(vision.num_heads, 2, 1).uniform_(-2, 2) * frequency
            query[:, 0, :, :3] = 2.5
            key[:, 0, :, :3], key[:, 1, :, :3] = 2.5 * angle.cos()[..., :3], 2.5 * angle.sin()[..., :3]


def save(
    directory: str | Path,
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    processor: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a folder that loads like any Qwen2.5-VL checkpoint; the given model keeps its own dtype."""
    directory = Path(directory)
    stored: Any = copy.deepcopy(model)
    stored.to(dtype).save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    tokenizer.save_pretrained(directory)
    processor.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    # Transformers 4 reads some settings under other names than 5 writes, and leaves defaults out; 5 reads both.
    _update_json(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    _update_json(directory / "preprocessor_config.json", min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    _update_json(directory / "generation_config.json", repetition_penalty=1.0)
    text = json.loads((directory / "config.json").read_text(encoding="utf-8"))["text_config"]
    text |= {"rope_theta": _ROPE_THETA, "rope_scaling": _ROPE}
    _update_json(directory / "config.json", text_config=text, hide_preset="tiny")


def _update_json(path: Path, **entries: Any) -> None:
    data = {**json.loads(path.read_text(encoding="utf-8")), **entries}
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(
    directory: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast, Any]:
    """Read a saved folder with the plain Hugging Face classes.

    Raises:
        FileNotFoundError: the folder holds no config.json.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"directory: {directory} holds no config.json")
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    return model, tokenizer, _image_processor_class().from_pretrained(directory)
