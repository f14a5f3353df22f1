"""Small random-weight models of the Hugging Face classes, and inputs for them: no downloads, any transformers version."""

import torch
import transformers
from transformers import PreTrainedModel

V5 = int(transformers.__version__.split(".")[0]) >= 5
VISION_START, VISION_END, IMAGE, VIDEO, END, VOCABULARY = 3, 4, 5, 6, 7, 512


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 1.6 / parameter.shape[1:].numel() ** 0.5)
            else:
                parameter.copy_(noise * 0.1 + (0 if name.endswith("bias") else 1))
    return model.eval()


def text_config(layers: int = 4, **extra: object) -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": END, "tie_word_embeddings": False, **extra,
    }  # fmt: skip


def rope(**extra: object) -> dict[str, object]:
    if V5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **extra}}
    return {"rope_theta": 1e4, **({"rope_scaling": {"rope_type": "default", **extra}} if extra else {})}


def qwen2_5_vl() -> PreTrainedModel:
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config(**rope(mrope_section=[2, 3, 3])),
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
                       "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56, "out_hidden_size": 64,
                       "fullatt_block_indexes": [1]},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl() -> PreTrainedModel:
    config = transformers.Qwen3VLConfig(
        text_config=text_config(head_dim=16, **rope(mrope_section=[4, 2, 2], mrope_interleaved=True)),
        vision_config={"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16,
                       "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
                       "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(transformers.Qwen3VLForConditionalGeneration(config))


def internvl(image: int = IMAGE, tile: int = 56, **text: object) -> PreTrainedModel:
    """Square tiles of `tile` pixels, a token for 28 x 28 of them."""
    config = transformers.InternVLConfig(
        text_config=text_config(model_type="qwen2", use_sliding_window=False, **rope(), **text),
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                       "image_size": [tile, tile], "patch_size": [14, 14]},
        image_token_id=image, image_seq_length=(tile // 28) ** 2, tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(transformers.InternVLForConditionalGeneration(config))


def llava(image: int = IMAGE, **text: object) -> PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config=text_config(model_type="llama", **rope(), **text),
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 3,
                       "num_attention_heads": 2, "intermediate_size": 64, "image_size": 56, "patch_size": 14,
                       "projection_dim": 32},
        image_token_id=image, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(transformers.LlavaForConditionalGeneration(config))


def llava_onevision(image: int = IMAGE, video: int = VIDEO, **text: object) -> PreTrainedModel:
    """Up to 3 x 3 tiles of 4 x 4 tokens; pictures of more than 1.1^2 times four tiles' tokens shrink."""
    config = transformers.LlavaOnevisionConfig(
        text_config=text_config(model_type="qwen2", use_sliding_window=False, **rope(), **text),
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "intermediate_size": 64, "image_size": 56, "patch_size": 14,
                       "vision_use_head": False},
        image_token_index=image, video_token_index=video, vision_feature_layer=-1,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4",
        image_grid_pinpoints=[[56 * h, 56 * w] for h in (1, 2, 3) for w in (1, 2, 3)], tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(transformers.LlavaOnevisionForConditionalGeneration(config))


def sliding_window_llm() -> PreTrainedModel:
    """Mistral: every layer sees a window of 7 keys."""
    config = transformers.MistralConfig(**text_config(sliding_window=7, head_dim=16, **rope()))
    return randomise(transformers.MistralForCausalLM(config))


def llm() -> PreTrainedModel:
    """Llama, text only."""
    return randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**text_config(**rope()))))


FAMILIES = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "internvl": internvl, "llava": llava,
            "llava_onevision": llava_onevision}  # fmt: skip


def prompt(family: str, text_tokens: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs of one image (12, 12, 8, 16 or 52 tokens) between random text: 6 tokens before, `text_tokens` after."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, torch.Tensor] = {}
    if family.startswith("qwen"):
        patch = 14 if family == "qwen2_5_vl" else 16
        inputs["image_grid_thw"] = torch.tensor([[1, 6, 8]])
        inputs["pixel_values"] = torch.randn(48, 3 * 2 * patch * patch, generator=generator)
        image_tokens = 12
    else:
        tiles, image_tokens = {"internvl": (2, 8), "llava": (1, 16), "llava_onevision": (3, 52)}[family]
        if family == "llava_onevision":
            inputs["image_sizes"] = torch.tensor([[56, 112]])
        inputs["pixel_values"] = torch.randn(tiles, 3, 56, 56, generator=generator)
    text = torch.randint(20, VOCABULARY, (5 + text_tokens,), generator=generator).tolist()
    ids = [*text[:5], VISION_START, *[IMAGE] * image_tokens, VISION_END, *text[5:]]
    inputs["input_ids"] = torch.tensor([ids])
    if family.startswith("qwen") and V5:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs
