"""The vision encoder in slices: the stock encoder's features, whatever the slices."""

import pytest
import torch
from random_models import qwen2_5_vl, qwen3_vl

from hide.models.vision_slices import in_slices

FAMILIES = {"qwen2_5_vl": (qwen2_5_vl, 14), "qwen3_vl": (qwen3_vl, 16)}
# Frames, rows and columns of patches: whole windows, cut-off ones, two pictures.
GRIDS = [[[1, 16, 8]], [[1, 22, 38]], [[1, 6, 8], [1, 14, 10]]]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    make, patch = FAMILIES[request.param]
    return make(), patch


def features(model, pixels, grids):
    found = model.model.get_image_features(pixels, grids)
    # One tensor per picture; transformers 4 has them first in a tuple where deepstack features follow.
    parts = getattr(found, "pooler_output", found if isinstance(found[0], torch.Tensor) else found[0])
    return torch.cat(list(parts))


@pytest.mark.parametrize("grids", GRIDS, ids=str)
@pytest.mark.parametrize("patches", [16, 40, 130, 10_000])
@torch.no_grad()
def test_features_are_those_of_the_stock_encoder(family, grids, patches):
    model, patch = family
    grids = torch.tensor(grids)
    pixels = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * patch * patch, generator=torch.Generator().manual_seed(0))
    want = features(model, pixels, grids)
    before = pixels.clone()
    with in_slices(model.model.visual, patches):
        # Other pictures in between have other windows.
        features(model, pixels[:48], torch.tensor([[1, 6, 8]]))
        got = features(model, pixels, grids)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert torch.equal(pixels, before), "the input was written to"


@torch.no_grad()
def test_no_block_projects_more_patches_at_once_than_asked(family):
    model, patch = family
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
        for block in model.model.visual.blocks
        for module in (block.attn.qkv, block.attn.proj, block.mlp)
    ]
    norms = [module for module in model.model.visual.merger.modules() if "Norm" in type(module).__name__]
    merged: list[int] = []
    hooks += [
        norm.register_forward_hook(
            lambda module, inputs, output: merged.append(inputs[0].numel() // model.model.visual.config.hidden_size)
        )
        for norm in norms
    ]
    with in_slices(model.model.visual, 40):
        features(model, torch.zeros(22 * 38, 6 * patch * patch), torch.tensor([[1, 22, 38]]))
    for hook in hooks:
        hook.remove()
    assert merged[:-1] == [40] * (len(merged) - 1) and sum(merged) == 22 * 38
    assert max(seen) <= 40 and len(seen) > 3 * len(model.model.visual.blocks) * 20


@torch.no_grad()
def test_the_encoder_is_left_as_it_was_also_after_an_error(family):
    model, _ = family
    blocks = model.model.visual.blocks
    blocks[1].forward = kept = blocks[1].forward
    with pytest.raises(KeyError), in_slices(model.model.visual, 16):
        raise KeyError
    assert "forward" not in blocks[0].__dict__ and blocks[1].__dict__["forward"] is kept
    del blocks[1].forward
