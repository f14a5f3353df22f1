"""A small adapter of every model family: random float32 weights, grouped heads, the family's prompt and preprocessing.

A family's tests are its entry in `FAMILIES`; `test_families.py` runs on every one.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import families_tiles
import random_models
import transformers
from random_models import V5, randomise
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from hide.models.base import Adapter
from hide.models.inputs import ImageInputs
from hide.models.qwen2_5_vl import Qwen25VL
from hide.models.qwen3_vl import Qwen3VL
from hide.session import Session, Turn
from hide.tiny.model import build_tokenizer

VIP_LLAVA_TEMPLATE = """\
{%- for message in messages -%}
{{- '###' + message['role'].capitalize() + ': ' -}}
{%- for part in message['content'] -%}
{{- '<image>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '###Assistant: ' -}}
{%- endif -%}
"""


def tokenizer(template: str | None = None, *special: str) -> PreTrainedTokenizerFast:
    """The embedded model's, with a family's chat template and its special tokens."""
    made = build_tokenizer()
    made.add_tokens(list(special), special_tokens=True)
    made.chat_template = template or made.chat_template
    return made


def model(like: PreTrainedModel, tokens: PreTrainedTokenizerFast, seed: int = 0, **ids: str) -> PreTrainedModel:
    """A model such as `like` for the tokenizer: ids are the config's names of special tokens."""
    config: Any = like.config
    config.text_config.vocab_size = len(tokens)
    for name, token in ids.items():
        setattr(config, name, tokens.convert_tokens_to_ids(token))
    made = randomise(type(like)(config), seed)
    # The repetition penalty is that of Qwen2.5-VL's checkpoints.
    made.generation_config = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.05,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return made


def qwen(
    adapter: type[Qwen25VL], tokens: PreTrainedTokenizerFast, like: PreTrainedModel, seed: int = 0, **settings: Any
) -> Qwen25VL:
    made = model(
        like,
        tokens,
        seed,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )
    return adapter(made, tokens, adapter.processor_class()(merge_size=2, temporal_patch_size=2, **settings))


def qwen2_5_vl() -> Qwen25VL:
    return qwen(Qwen25VL, tokenizer(), random_models.qwen2_5_vl(), patch_size=14)


def qwen3_vl() -> Qwen25VL:
    tokens, half = tokenizer(), [0.5, 0.5, 0.5]
    # As the checkpoint has it, without the system turn that Qwen2.5-VL's begins with.
    tokens.chat_template = tokens.chat_template.partition("{%- endif -%}\n")[2]
    # A seed whose replies do not repeat one token.
    return qwen(Qwen3VL, tokens, random_models.qwen3_vl(), 1, patch_size=16, image_mean=half, image_std=half)


FAMILIES: dict[str, Callable[[], Adapter]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": families_tiles.internvl,
    "llava": families_tiles.llava,
    "llava_onevision": families_tiles.llava_onevision,
}


class Prompts(Session):
    """The prompts of a session about images that no model has seen."""

    def __init__(self, model: Adapter, inputs: ImageInputs) -> None:
        self._model, self._inputs = model, inputs

    def turn(self, said: Any) -> Turn:
        return self._model.turn(said, self._inputs)


def worked_example() -> Adapter:
    """VipLLaVA by the first piece of code in docs/model_families.md."""
    page = (Path(__file__).parents[1] / "docs" / "model_families.md").read_text()
    module: Any = ModuleType("hide.models.vip_llava")
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], module.__dict__)
    sys.modules[module.__name__] = module
    layers = {"vision_feature_layer" if V5 else "vision_feature_layers": [-2, -1]}
    config = transformers.VipLlavaConfig(
        text_config=random_models.text_config(model_type="llama", **random_models.rope()),
        vision_config=random_models.llava().config.vision_config.to_dict(),
        tie_word_embeddings=False,
        **layers,
    )
    tokens = tokenizer(VIP_LLAVA_TEMPLATE, "<image>")
    made = model(transformers.VipLlavaForConditionalGeneration(config), tokens, image_token_index="<image>")
    return module.VipLlava(made, tokens, module.VipLlava.processor_class()(size=56, crop_size=56))
