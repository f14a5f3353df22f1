"""A small adapter of every model family: random float32 weights, grouped heads, the family's prompt and preprocessing.

A family's tests are its entry in `FAMILIES`; `test_families.py` runs on every one.
"""

from collections.abc import Callable
from typing import Any

import random_models
import transformers
from random_models import randomise
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from hide.models.base import Adapter
from hide.models.qwen2_5_vl import Qwen25VL
from hide.models.qwen3_vl import Qwen3VL
from hide.tiny.model import build_tokenizer

# As the checkpoint has it: unlike Qwen2.5-VL's, without a system turn of its own.
QWEN3_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
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


def tokenizer(template: str | None = None, *special: str) -> PreTrainedTokenizerFast:
    """The embedded model's, with a family's chat template and its special tokens."""
    made = build_tokenizer()
    made.add_tokens(list(special), special_tokens=True)
    made.chat_template = template or made.chat_template
    return made


def model(like: PreTrainedModel, tokens: PreTrainedTokenizerFast, **ids: str) -> PreTrainedModel:
    """A model such as `like` for the tokenizer: ids are the config's names of special tokens."""
    config: Any = like.config
    config.text_config.vocab_size = len(tokens)
    for name, token in ids.items():
        setattr(config, name, tokens.convert_tokens_to_ids(token))
    made = randomise(type(like)(config))
    # The repetition penalty is that of Qwen2.5-VL's checkpoints.
    made.generation_config = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.05,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return made


def processor(adapter: type[Adapter], **settings: Any) -> Any:
    """The family's image processor, as `Adapter.from_pretrained` chooses it."""
    return next(found for name in adapter.processors if (found := getattr(transformers, name, None)))(**settings)


def qwen(adapter: type[Qwen25VL], like: PreTrainedModel, template: str | None = None, **settings: Any) -> Qwen25VL:
    tokens = tokenizer(template)
    made = model(
        like,
        tokens,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )
    return adapter(made, tokens, processor(adapter, merge_size=2, temporal_patch_size=2, **settings))


def qwen2_5_vl() -> Qwen25VL:
    return qwen(Qwen25VL, random_models.qwen2_5_vl(), patch_size=14)


def qwen3_vl() -> Qwen25VL:
    half = [0.5, 0.5, 0.5]
    return qwen(
        Qwen3VL, random_models.qwen3_vl(), QWEN3_TEMPLATE, patch_size=16, image_mean=half, image_std=half
    )


FAMILIES: dict[str, Callable[[], Adapter]] = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
