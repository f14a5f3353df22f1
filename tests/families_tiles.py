"""Adapters of the families that cut pictures into squares: small random models, tokenizers with their kind of template.

The tokenizers differ where adapters could go wrong: InternVL's and LLaVA-OneVision's are byte-level, as the embedded
model's; LLaVA-1.5's begins every text with a token of its own and every word with a mark, and has no token that ends a
turn. All put a line break between the images and the text.
"""

import json

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hide.models.internvl import InternVL
from hide.models.llava import Llava
from hide.models.llava_onevision import LlavaOnevision
from hide.tiny import model as tiny
from tests import random_models

_TURNS = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- 'IMAGE\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_VICUNA = """\
{%- for message in messages -%}
{{- message['role'].upper() + ': ' -}}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] + ' ' -}}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def _byte_level(place: str, *special: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = _TURNS.replace("IMAGE", place)
    return tokenizer


def _sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama's: a mark before every word and at the beginning of every piece between special tokens; bytes."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, min_frequency=1, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([tiny._WORDS, tiny._WORDS.lower(), "USER: ASSISTANT: star, ring"], trainer)
    # Bytes are no special tokens; the trainer made them so.
    state = json.loads(bpe.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    bpe = Tokenizer.from_str(json.dumps(state))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<image>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=_VICUNA
    )


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Settings of a decoder for a tokenizer."""
    return {"vocab_size": -(-len(tokenizer) // 64) * 64, "eos_token_id": tokenizer.eos_token_id}


def _processor(adapter: type, **settings: object) -> object:
    return getattr(transformers, adapter.processors[0 if random_models.V5 else 1])(**settings)


def _talkative(model):
    """The kind of repetition penalty that checkpoints have, so that replies depend on every token; and no early end."""
    model.generation_config.repetition_penalty = 1.05
    with torch.no_grad():
        model.lm_head.weight[model.config.get_text_config().eos_token_id] = 0
    return model


def internvl(tile: int = 56) -> InternVL:
    """Tiles of `tile` pixels, a token for 28 x 28 of them."""
    tokenizer = _byte_level("<IMG_CONTEXT>", "<img>", "</img>", "<IMG_CONTEXT>")
    model = random_models.internvl(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tile, **_text(tokenizer))
    normal = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    size = {"height": tile, "width": tile}
    return InternVL(_talkative(model), tokenizer, _processor(InternVL, size=size, **normal))


def llava() -> Llava:
    """56 pixels a side, 4 x 4 tokens."""
    tokenizer = _sentence_piece()
    model = random_models.llava(tokenizer.convert_tokens_to_ids("<image>"), **_text(tokenizer))
    processor = _processor(Llava, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return Llava(_talkative(model), tokenizer, processor)


def llava_onevision() -> LlavaOnevision:
    """Tiles of 56 pixels and 4 x 4 tokens, up to 3 x 3 of them, of which more than about four shrink."""
    tokenizer = _byte_level("<image>", "<image>", "<video>")
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    model = random_models.llava_onevision(image, video, **_text(tokenizer))
    pinpoints = model.config.image_grid_pinpoints
    processor = _processor(LlavaOnevision, size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints)
    return LlavaOnevision(_talkative(model), tokenizer, processor)
