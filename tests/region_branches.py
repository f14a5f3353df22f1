"""Small models with random branches of the released layouts, and checkpoints with exactly the released keys."""

import json

import torch
from families import FAMILIES
from safetensors.torch import save_file

from hide.methods.q_zoom.branches import attach, new_branches

LAYER, DEPTH = 2, 3
DECODER_LAYER = [
    "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight",
    *(f"self_attn.{kind}_proj.weight" for kind in "qkv"), *(f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")),
]  # fmt: skip
OF_FAMILY = {
    "qwen2_5_vl": [f"self_attn.{kind}_proj.bias" for kind in "qkv"],
    "qwen3_vl": ["self_attn.q_norm.weight", "self_attn.k_norm.weight"],
    "llava": [],
}
CONFIG = {
    "enable_twig": True, "twig_K": LAYER, "twig_T": DEPTH, "roi_source": "qk", "roi_loss": "bce", "roi_super_type": "v1",
    "roi_multi_head": True, "roi_post_training": False, "reuse_src_pos": False, "roi_skip_ffn": False,
}  # fmt: skip


def randomise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 1.6 / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(noise * 0.1 + (0 if name.endswith("bias") else 1))


def with_branches(family, *, gate=True, layer=LAYER):
    """An adapter of the family, random branches attached."""
    adapter = FAMILIES[family]()
    branches = new_branches(adapter, layer, DEPTH, gate_depth=DEPTH if gate else 0)
    for seed, module in enumerate(branches.modules().values()):
        randomise(module, seed + 7)
        module.requires_grad_(False)
    if gate:
        branches.head.weight.mul_(0.05)  # so that no probability is 0 or 1
    attach(adapter, branches)
    return adapter


def released_names(family, *, gate=True, norm=False):
    """Names of the branches' tensors within the text model."""
    names = [*DECODER_LAYER, *OF_FAMILY[family]]
    found = [f"twig_layers.{i}.{name}" for i in range(DEPTH) for name in names]
    found += ["twig_norm.weight"] if norm else []
    if gate:
        found += [f"high_res_layers.{i}.{name}" for i in range(DEPTH) for name in names]
        found += ["high_res_head.weight", "high_res_head.bias"]
    return found


def save(folder, adapter, *, prefix, gate=True, without=(), more=(), config=None, shards=False):
    """A checkpoint of an adapter with branches as a release has it, their names behind `prefix`."""
    for part in (adapter.model.config, adapter.tokenizer, adapter.image_processor, adapter.model.generation_config):
        part.save_pretrained(folder)
    branches = {
        name: tensor
        for name, tensor in adapter.language_model.state_dict().items()
        if name.startswith(("twig_", "high_res_"))
    }
    wanted = set(released_names(adapter.family, gate=gate, norm=adapter.family == "llava"))
    assert wanted <= branches.keys()
    old = prefix == "model."
    stock = {
        (name.replace("model.language_model.", "model.").replace("model.visual.", "visual.") if old else name): tensor
        for name, tensor in adapter.model.state_dict().items()
        if not any(part in name for part in ("twig_", "high_res_"))
    }
    own = {f"{prefix}{name}": branches[name] for name in sorted(wanted - set(without))} | dict(more)
    own = {name: tensor.contiguous().clone() for name, tensor in (stock | own).items()}
    if shards:
        names = sorted(own)
        parts = [names[::2], names[1::2]]
        files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for file, part in zip(files, parts, strict=True):
            save_file({name: own[name] for name in part}, folder / file, metadata={"format": "pt"})
        index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    fields = CONFIG | ({"enable_high_res": True} if gate else {"enable_high_res": False}) | (config or {})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder
