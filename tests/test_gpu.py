"""What only a CUDA device can show: the same results there, on the tensors' own device."""

import numpy as np
import pytest
import torch
from random_models import FAMILIES, prompt
from test_collage import assert_same_collage, noise, scattered
from test_regions import PATTERNS, spiral

from hide_kernels import attention_rows, collage, collage_of_maps, explain, geometry, native, regions, token_maps
from hide_kernels.collage import compiled
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


@pytest.fixture(params=["extension", "cupy"])
def launcher(request, monkeypatch):
    """The kernels as nvcc built them, and as CuPy compiles them."""
    module, reason = native.extension()
    if request.param == "extension":
        if module is None or not module.cuda:
            pytest.skip(reason or "the extension has no CUDA part")
    else:
        pytest.importorskip("cupy")
        monkeypatch.setattr(native, "extension", lambda: (None, "hidden by the test"))


def many_maps():
    """Batches of maps of every density, odd sizes, both dtypes; hard patterns; one too large for a block."""
    generator = torch.Generator().manual_seed(0)
    for shape in [(5, 12, 17), (3, 1, 40), (3, 40, 1), (2, 1, 1), (48, 95, 170), (9, 200, 200), (2, 501, 470)]:
        for density in (0.01, 0.1, 0.3, 0.5, 0.8, 1.0):
            maps = torch.rand(shape, generator=generator, dtype=torch.float64)
            yield maps.float() if density < 0.5 else maps, 1 - density
    yield from ((torch.from_numpy(pattern.astype(np.float32))[None], 0.5) for pattern in PATTERNS.values())
    yield torch.from_numpy(np.stack([spiral(401), 1 - spiral(401)])), 0.5
    yield torch.zeros(0, 4, 6), 0.5


@pytest.mark.parametrize("fits", [True, False])
def test_regions_are_those_of_the_host_bit_for_bit_however_often(launcher, fits, monkeypatch):
    if not fits:
        monkeypatch.setattr(geometry, "shared_limit", lambda device: 0)
    for maps, threshold in many_maps():
        want = regions(maps, threshold, backend="scipy", max_regions=60)
        for _ in range(5):
            # Memory that was used before holds garbage.
            torch.full((1 << 20,), -1, device="cuda")
            got = regions(maps.cuda(), threshold, backend="cuda", max_regions=60)
            for one, other in zip(got, want, strict=True):
                assert one.is_cuda and torch.equal(one.cpu(), other)


def test_regions_by_cupys_labels_are_those_of_the_host_bit_for_bit():
    pytest.importorskip("cupy")
    for maps, threshold in many_maps():
        want = regions(maps, threshold, backend="scipy", max_regions=60)
        for one, other in zip(regions(maps.cuda(), threshold, backend="cupy", max_regions=60), want, strict=True):
            assert one.is_cuda and torch.equal(one.cpu(), other)


def test_strided_maps_and_maps_that_are_not_valid(launcher):
    maps = torch.rand(17, 6, 30, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)[:, ::2]
    valid = torch.tensor([True, False] * 6)[::2]
    want = regions(maps, 0.6, valid=valid, backend="scipy")
    strided = torch.empty_strided(maps.shape, (1, 17 * 6, 6), device="cuda").copy_(maps)
    for one, other in zip(regions(strided, 0.6, valid=valid.cuda(), backend="cuda"), want, strict=True):
        assert torch.equal(one.cpu(), other)


def test_regions_never_synchronise_and_run_on_the_current_stream(launcher):
    maps = torch.rand(100, 128, 128, device="cuda")
    regions(maps, 0.7, backend="cuda")
    side = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            late = torch.zeros_like(maps)
            torch.cuda._sleep(50_000_000)
            late.copy_(maps)
            got = regions(late, 0.7, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    for one, other in zip(got, regions(maps.cpu(), 0.7, backend="scipy"), strict=True):
        assert torch.equal(one.cpu(), other)


def test_regions_replay_in_a_graph(launcher):
    maps = torch.rand(7, 95, 170, device="cuda")
    regions(maps, 0.7, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = regions(maps, 0.7, backend="cuda")
    maps.copy_(torch.rand(7, 95, 170))
    graph.replay()
    for one, other in zip(got, regions(maps.cpu(), 0.7, backend="scipy"), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("fill", [None, (255, 255, 255), (1, 200, 3)])
@pytest.mark.parametrize("channels", [3, 4])
def test_collages_are_those_of_the_host_bit_for_bit(launcher, channels, fill):
    image = noise(900, 1210, channels)
    if channels == 4:
        image[..., 3] |= 16
        image[200:600, 400:700, 3] = 3
    planar = image.permute(2, 0, 1).contiguous().cuda().permute(1, 2, 0)
    for count, largest in ((0, 3), (1, 900), (20, 90), (700, 20), (1500, 9)):
        boxes = scattered(count, 900, largest, count)
        want = collage(image, boxes, fill=fill, backend="numpy")
        for source in (image.cuda(), planar, planar[::2, 1::2]):
            if source.shape != image.shape:
                boxes = boxes.clamp(max=400)
                want = collage(source.cpu(), boxes, fill=fill, backend="numpy")
            for given in (boxes, boxes.int().cuda()):
                got = collage(source, given, fill=fill, backend="cuda")
                assert got.boxes.device == given.device and (got.image is None or got.image.is_cuda)
                on_host = None if got.image is None else got.image.cpu()
                assert_same_collage(got._replace(image=on_host, boxes=got.boxes.cpu()), want)


def test_a_box_outside_the_image_is_named(launcher):
    with pytest.raises(ValueError, match=r"boxes\[1\]: got \[5, 5, 11, 9\]"):
        collage(noise(10, 10, 3).cuda(), torch.tensor([[0, 0, 4, 4], [5, 5, 11, 9]], device="cuda"), backend="cuda")


@pytest.mark.parametrize("slots", [3, 256])
def test_maps_to_collage_reads_the_plan_once(launcher, slots, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    maps, image = torch.rand(9, 95, 170, generator=generator), noise(1080, 1920, 3)
    threshold = 0.9995
    want = collage_of_maps(image, maps, threshold, max_regions=slots, fill=(255, 255, 255))
    plans = []
    plan = compiled.plan_compiled
    monkeypatch.setattr(compiled, "plan_compiled", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1])
    got = collage_of_maps(image.cuda(), maps.cuda(), threshold, max_regions=slots, fill=(255, 255, 255))
    # Maps with more regions than slots are done again, and read again.
    assert len(plans) == (2 if slots == 3 else 1)
    assert got.boxes.is_cuda and got.image.is_cuda
    assert_same_collage(got._replace(image=got.image.cpu(), boxes=got.boxes.cpu()), want)


def test_the_device_is_preferred_and_a_mixed_call_is_served(launcher):
    maps, image = torch.rand(2, 9, 9, device="cuda"), noise(90, 90, 3).cuda()
    assert explain("regions", maps=maps).chosen == explain("collage", image=image).chosen == "cuda"
    mixed = collage_of_maps(image, maps.cpu(), 0.9, fill=(0, 0, 0))
    assert mixed.boxes.device.type == "cpu" and mixed.image.is_cuda
    alike = collage_of_maps(image, maps, 0.9, fill=(0, 0, 0))
    assert torch.equal(mixed.image, alike.image)
