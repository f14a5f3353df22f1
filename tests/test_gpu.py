"""What only a CUDA device can show: the same results there, on the tensors' own device."""

import pytest
import torch
from random_models import FAMILIES, prompt

from hide_kernels import attention_rows, collage, regions, token_maps
from hide_kernels.integrations.transformers import capture_attention_rows
from hide_kernels.testing import eager_attention_rows, error_budget

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_rows_are_within_budget_of_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    query = (torch.randn(2, 14, 9, 128, generator=generator) * 2).to("cuda", dtype)
    key = torch.randn(2, 2, 3001, 128, generator=generator).to("cuda", dtype)
    want, _ = eager_attention_rows(query.double(), key.double())
    plain, _ = eager_attention_rows(query, key)
    rows = attention_rows(query, key, key_spans=[(5, 2900)]).rows
    assert rows.device == query.device
    want, plain = (p.mean(1)[..., 5:2900] for p in (want, plain))
    assert (rows.double() - want).abs().max() <= error_budget(plain, want)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_rows_equal_eager(family, implementation):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    dtype, tolerance = (torch.float32, 1e-5) if implementation == "sdpa" else (torch.bfloat16, 2e-2)
    model = FAMILIES[family]().to("cuda", dtype)
    inputs = {name: value.to("cuda") for name, value in prompt(family).items()}
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = model(**inputs, output_attentions=True).attentions[2].mean(1)
        model.set_attn_implementation(implementation)
        with capture_attention_rows(model, layers=[2]) as captured:
            model(**inputs)
    assert (captured[2].rows - want).abs().max() <= tolerance


def test_image_operators_give_on_the_device_what_they_give_on_the_host():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(20, 31, 44, generator=generator)]
    image = torch.randint(0, 256, (310, 440, 3), generator=generator, dtype=torch.uint8)
    results = []
    for device in ("cpu", "cuda"):
        maps = token_maps([row.to(device) for row in rows], prior_rows=8, sigma=2.0)
        found = regions(maps.maps[0], 0.7)
        made = collage(image.to(device), found.boxes[0, : int(found.counts[0])].long() * 10)
        assert maps.maps[0].device.type == found.boxes.device.type == made.image.device.type == device
        results.append([maps.maps[0].cpu(), found.boxes.cpu(), found.scores.cpu(), made.image.cpu()])
    for host, device in zip(*results, strict=True):
        assert torch.equal(host, device)
