"""Scores of patches as scores of image tokens: of the patches that a model itself makes each token of."""

import pytest
import torch
from random_models import internvl, llava, llava_onevision, qwen2_5_vl, qwen3_vl
from torch import nn

from hide_kernels.image_tokens import rows_to_maps
from hide_kernels.integrations.image_spans import image_spans, patches_to_tokens
from hide_kernels.integrations.vision import vision_attention

GRIDS = torch.tensor([[1, 6, 10], [1, 12, 8]])
PATCH = {qwen2_5_vl: 14, qwen3_vl: 16}


def qwen_members(make):
    """(tokens, patches) bool of the merger, the encoder being without blocks."""
    model = make()
    model.model.visual.blocks = nn.ModuleList()
    pixels = torch.randn(int(GRIDS.prod(-1).sum()), 3 * 2 * PATCH[make] ** 2, requires_grad=True)
    found = model.model.get_image_features(pixels, GRIDS)
    tokens = torch.cat(list(getattr(found, "pooler_output", found if isinstance(found[0], torch.Tensor) else found[0])))
    moved = [torch.autograd.grad(token.sum(), pixels, retain_graph=True)[0].abs().sum(-1) > 0 for token in tokens]
    return model, torch.stack(moved)


def tile_members(make):
    """(tokens, 1 + patches) bool of one tile, the encoder being without layers."""
    model = make()
    encoder = vision_attention(model)[0]
    for name, child in list(encoder.named_children()):
        if isinstance(child, nn.ModuleList):
            setattr(encoder, name, nn.ModuleList())
    pixels = torch.randn(1, 3, 56, 56, requires_grad=True)
    found = model.model.get_image_features(
        pixel_values=pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
    )
    tokens = getattr(found, "pooler_output", found)[0]
    moved = [torch.autograd.grad(token.sum(), pixels, retain_graph=True)[0].abs() for token in tokens]
    patches = nn.functional.avg_pool2d(torch.cat(moved), 14).sum(1).flatten(1) > 0
    return model, nn.functional.pad(patches, (1, 0))


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("make", [qwen2_5_vl, qwen3_vl, internvl])
def test_a_token_has_the_scores_of_the_patches_that_it_is_made_of(make, reduction):
    model, members = (qwen_members if make in PATCH else tile_members)(make)
    assert (members.sum(1) == 4).all() and (members.sum(0) <= 1).all()
    scores = torch.rand(2, 3, members.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_tokens = torch.stack([scores[..., patches] for patches in members], -2)
    want = of_tokens.amax(-1) if reduction == "max" else getattr(of_tokens, reduction)(-1)
    torch.testing.assert_close(patches_to_tokens(model, scores, reduction=reduction), want, rtol=1e-14, atol=0)


def test_the_class_token_stays_where_the_decoder_gets_it():
    model = llava()
    assert torch.equal(patches_to_tokens(model, torch.arange(17.0)), torch.arange(1.0, 17.0))
    model.config.vision_feature_select_strategy = "full"
    assert torch.equal(patches_to_tokens(model.config, torch.arange(17.0)), torch.arange(17.0))


def test_flattened_they_lie_as_the_image_s_tokens_do():
    model = internvl()
    ids = torch.tensor([[20, *[5] * 28, 21]])
    (images,) = image_spans(model, ids, tile_grids=[(2, 3)])
    # Patches of tile t have the score t, and their row in it behind the point; the last tile is the thumbnail.
    scores = torch.arange(7.0)[:, None] + torch.cat([torch.zeros(1), torch.arange(4.0).repeat_interleave(4) / 10])
    (found,) = rows_to_maps(patches_to_tokens(model, scores).flatten(), images)
    want = torch.tensor([[0.05], [0.25]]).repeat(2, 6) + torch.tensor(
        [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [3, 3, 4, 4, 5, 5]]
    )
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    "make, patches, arguments, text",
    [
        (qwen2_5_vl, 30, {}, "scores: got 30 patches, want a multiple of 4"),
        (internvl, 16, {}, "scores: got 15 patches of a tile, want 16"),
        (internvl, 17, {"reduction": "median"}, "reduction: got 'median'"),
        (llava_onevision, 16, {}, "model_or_config: got 'llava_onevision', want one of"),
    ],
)
def test_wrong_arguments_are_named(make, patches, arguments, text):
    with pytest.raises(ValueError, match=text):
        patches_to_tokens(make(), torch.zeros(patches), **arguments)
