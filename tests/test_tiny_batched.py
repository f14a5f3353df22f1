"""The training code's network gives the same numbers as the Hugging Face model."""

import numpy as np
import pytest
import torch
import transformers

from hide.tiny import model as tiny
from hide.tiny.scenes import draw_scene
from training.batched import encode_images, image_positions, image_to_patches, run_text


@pytest.mark.parametrize(
    ("grad", "frozen", "rows", "columns"), [(True, 0, 3, 5), (True, 12, 3, 5), (False, 0, 3, 5), (True, 0, 9, 17)]
)
def test_same_hidden_states_as_hugging_face(grad, frozen, rows, columns):
    model, tokenizer, processor = tiny.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    images = [draw_scene(seed, 28 * columns, 28 * rows, objects=2).image for seed in (0, 1)]
    pixels = processor(images=images, return_tensors="pt")
    patches = image_to_patches(torch.stack([torch.from_numpy(np.array(image)) for image in images]))
    frames = pixels["pixel_values"].view(2, -1, 3, 2, 14 * 14)
    assert torch.equal(frames[..., 0, :], frames[..., 1, :])
    torch.testing.assert_close(patches, frames[..., 0, :].flatten(2), atol=1e-5, rtol=0)

    before = tokenizer("<|im_start|>user\n<|vision_start|>")["input_ids"]
    after = tokenizer("<|vision_end|>What is the color of the star?")["input_ids"]
    ids = torch.tensor([before + [model.config.image_token_id] * rows * columns + after] * 2)
    extra = {}
    if int(transformers.__version__.split(".")[0]) >= 5:
        extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.set_grad_enabled(grad):
        features = encode_images(model, patches, rows, columns)
        grid = torch.cat([torch.zeros(1, rows * columns, dtype=torch.long), image_positions(rows, columns)]) + len(
            before
        )
        start, end = torch.arange(len(before)), torch.arange(len(after)) + len(before) + max(rows, columns)
        positions = torch.cat([start.expand(3, -1), grid, end.expand(3, -1)], dim=1)[:, None].expand(-1, 2, -1)
        embeddings = model.get_input_embeddings()(ids)
        embeddings = torch.cat([embeddings[:, : len(before)], features, embeddings[:, -len(after) :]], dim=1)
        bias = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1).expand(2, 1, -1, -1)
        wanted = torch.tensor([[ids.shape[1] - 1, ids.shape[1] - 3]] * 2)
        out = run_text(model, embeddings, positions, bias, frozen=frozen, row_indices=wanted, row_layers=(2,))
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids, **pixels, **extra, output_attentions=True)
    torch.testing.assert_close(model.lm_head(out.hidden), expected.logits, atol=2e-3, rtol=1e-3)
    heads = expected.attentions[2].mean(dim=1)
    torch.testing.assert_close(out.rows[2], heads[torch.arange(2)[:, None], wanted], atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("frozen", [0, 5])
def test_groups_save_time_and_change_nothing(frozen):
    model = tiny.build()[0]
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 16, model.config.text_config.hidden_size, generator=generator)
    positions = torch.arange(16).expand(3, 2, -1)
    allowed = torch.ones(16, 16, dtype=torch.bool).tril()
    allowed[11:, 5:11] = False
    bias = torch.zeros(2, 1, 16, 16).masked_fill(~allowed, float("-inf"))
    wanted = torch.tensor([[6, 12]] * 2)
    arguments = {"frozen": frozen, "row_indices": wanted, "row_layers": (1,), "state_layers": (2,)}
    whole, grouped = (
        run_text(model, embeddings, positions, bias, groups=groups, **arguments) for groups in ((), (6, 5))
    )
    torch.testing.assert_close(whole.hidden, grouped.hidden)
    torch.testing.assert_close(whole.states[2], grouped.states[2])
    torch.testing.assert_close(whole.rows[1], grouped.rows[1])
    # What is in no group's sight is not computed.
    bias[:, :, 11:, 5:11] = 0
    torch.testing.assert_close(
        grouped.hidden, run_text(model, embeddings, positions, bias, groups=(6, 5), **arguments).hidden
    )
