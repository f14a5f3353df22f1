"""What only a CUDA device can show: the same results there, on the tensors' own device."""

import numpy as np
import pytest
import torch
from random_models import FAMILIES, prompt
from test_collage import assert_same_collage, noise, scattered
from test_pixel_values import NORMALISE, SIZES, photo, stored
from test_regions import PATTERNS, spiral

from hide.images import decode
from hide_kernels import (
    attention_received,
    attention_rows,
    attention_rows_workspace,
    collage,
    collage_of_maps,
    explain,
    geometry,
    native,
    pixel_values,
    regions,
    resize,
    token_maps,
)
from hide_kernels.collage import compiled
from hide_kernels.integrations.transformers import capture_attention
from hide_kernels.pixel_values import compiled as patches
from hide_kernels.testing.cases import (
    CASES,
    RECEIVED_CASES,
    RECEIVED_SERVING_CASES,
    SERVING_CASES,
    Case,
    ServingCase,
    error_of,
    received_error_of,
)
from hide_kernels.testing.map_cases import MAP_CASES, MAP_ERROR, map_error

pytestmark = pytest.mark.gpu


@pytest.fixture
def launched(monkeypatch):
    """The launches of Triton kernels, in order."""
    triton_launch = pytest.importorskip("hide_kernels.attention_rows.triton_launch")
    launches = []
    real = triton_launch.Launch.run
    monkeypatch.setattr(triton_launch.Launch, "run", lambda launch: (launches.append(launch), real(launch)))
    return launches


def names(launches):
    return [launch.kernel.fn.__name__ for launch in launches]


def tensors(dtype=torch.bfloat16, device="cuda", **sizes):
    return Case("gpu", **{"heads": 28, "kv_heads": 4, "rows": 32, "depth": 128, "length": 3001, **sizes}).inputs(
        dtype, device
    )[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_serve_every_kind_of_call_within_budget(case, dtype, launched):
    rows, lse = error_of(case, dtype, "cuda", backend="triton")
    assert rows <= 1 and lse <= 1
    assert "reduce_rows" in names(launched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 32, 70, 600])
def test_rows_over_many_keys_are_within_budget(dtype, rows):
    assert max(error_of(Case("long", 1, 28, 4, rows, 128, 20_011), dtype, "cuda", backend="triton")) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*RECEIVED_CASES, *RECEIVED_SERVING_CASES], ids=lambda case: case.name)
def test_what_keys_receive_is_within_budget_in_every_kind_of_call(case, dtype, launched):
    assert max(received_error_of(case, dtype, "cuda", backend="triton")) <= 1
    assert names(launched)[-1] == "join_heads"


def test_what_keys_receive_never_synchronises_has_the_same_bits_and_replays_in_a_graph():
    query, key = tensors(batch=1, rows=3001)
    arguments = {"reduction": "mean", "causal": True, "q_positions": torch.arange(3001, device="cuda")}
    want = attention_received(query, key, **arguments).received
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = attention_received(query, key, **arguments).received
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_received(query, key, **arguments).received
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, want)


def test_the_kernels_are_what_a_cuda_call_gets(launched):
    query, key = tensors()
    assert explain("attention_rows", query=query, key=key).chosen == "triton"
    attention_rows(query, key)
    assert names(launched) == ["partial_lse", "combine_lse", "reduce_rows"]


def test_bits_are_the_same_again_alone_and_in_any_span():
    query, key = tensors(batch=3)
    together, again = (attention_rows(query, key, return_lse=True) for _ in range(2))
    assert torch.equal(together.rows, again.rows) and torch.equal(together.lse, again.lse)
    alone = attention_rows(query[1:2], key[1:2], return_lse=True)
    assert torch.equal(alone.rows[0], together.rows[1]) and torch.equal(alone.lse[0], together.lse[1])
    parts = attention_rows(query, key, key_spans=[(1000, 3001), (0, 1000)]).rows
    assert torch.equal(parts, torch.cat([together.rows[..., 1000:], together.rows[..., :1000]], -1))


def test_a_call_waits_for_nothing_and_can_be_captured_in_a_graph():
    query, key = tensors(batch=2)
    arguments = {
        "key_spans": [[(5, 1000)], [(7, 2500), (2600, 3000)]],
        "q_positions": torch.arange(32, device="cuda") * 90,
        "causal": True,
        "kv_lens": torch.tensor([2900, 3001], device="cuda"),
        "return_lse": True,
    }
    attention_rows(query, key, **arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_rows(query, key, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_rows(query, key, **arguments)
    query.copy_(query.flip(2))
    arguments["kv_lens"].copy_(torch.tensor([3001, 1500]))
    graph.replay()
    want = attention_rows(query, key, **arguments)
    assert torch.equal(captured.rows, want.rows) and torch.equal(captured.lse, want.lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SERVING_CASES, ids=lambda case: case.name)
def test_the_kernels_serve_packed_and_paged_batches_within_budget(case, dtype, launched):
    rows, lse = error_of(case, dtype, "cuda", backend="triton")
    assert rows <= 1 and lse <= 1
    assert "reduce_rows" in names(launched)


@pytest.mark.parametrize("block_size", [0, 16])
def test_a_packed_call_with_out_and_a_workspace_waits_for_nothing_allocates_nothing_and_replays(block_size):
    sizes = {"heads": 28, "kv_heads": 4, "depth": 128, "rows_of": (32, 5, 0, 17), "keys_of": (3001, 900, 40, 2000)}
    query, key, arguments = ServingCase("graph", block_size=block_size, **sizes).inputs(torch.bfloat16, "cuda")
    arguments |= {"key_spans": [(3, 900), (1000, 3000)], "backend": "triton"}
    want = attention_rows(query, key, **arguments).rows
    out = torch.full_like(want, torch.nan)
    memory = torch.full((attention_rows_workspace(query, key, **arguments),), torch.nan, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_rows(query, key, out=out, workspace=memory, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before and torch.equal(out, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention_rows(query, key, out=out, workspace=memory, **arguments)
    # Other lengths, within the same maxima.
    arguments["cu_seqlens_q"].copy_(torch.tensor([0, 3, 20, 51, 54]))
    if block_size:
        arguments["kv_lens"].copy_(torch.tensor([100, 77, 3, 1999]))
    else:
        arguments["cu_seqlens_k"].copy_(torch.tensor([0, 5, 2900, 2900, 5941]))
    graph.replay()
    assert torch.equal(out, attention_rows(query, key, **arguments).rows)


def test_lengths_tables_and_block_sizes_compile_once(launched):
    # `max_seqlen_q` is one more than the most rows; 17 to 32 are one bucket.
    sizes = {"heads": 28, "kv_heads": 4, "depth": 128, "rows_of": (31, 5), "keys_of": (3001, 900)}
    query, key, arguments = ServingCase("compiled", block_size=16, **sizes).inputs(torch.bfloat16, "cuda")
    attention_rows(query, key, **arguments)
    caches = [launch.kernel.device_caches[query.device.index][0] for launch in launched]
    counts = [len(cache) for cache in caches]
    for block_size, keys in ((32, (129, 2000)), (256, (5000, 3, 77))):
        case = ServingCase(
            "compiled", block_size=block_size, **{**sizes, "rows_of": (20,) * len(keys), "keys_of": keys}
        )
        query, key, arguments = case.inputs(torch.bfloat16, "cuda")
        attention_rows(query, key, **arguments)
    assert [len(cache) for cache in caches] == counts


def test_new_memory_is_the_rows_and_little_else():
    query, key = tensors(length=16_384, batch=1)
    attention_rows(query, key)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rows = attention_rows(query, key).rows
    assert rows.numel() * 4 <= torch.cuda.max_memory_allocated() - before <= 2.5e6


def test_two_lengths_of_a_mode_compile_once(launched):
    query, key = tensors(batch=1)
    attention_rows(query, key, key_spans=[(3, 900)])
    caches = [launch.kernel.device_caches[query.device.index][0] for launch in launched]
    sizes = [len(cache) for cache in caches]
    for length in (2999, 129, 3000):
        attention_rows(query[:, :, :20], key[:, :, :length], key_spans=[(1, 17), (50, 128)])
    assert [len(cache) for cache in caches] == sizes


def test_offsets_beyond_32_bits_are_right():
    """Head 1 of the keys starts 2 ** 31 elements after head 0."""
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GiB")
    wide = torch.zeros(2 * 2**31 // 64, 64, dtype=torch.float16, device="cuda")
    key = wide.view(1, 2, -1, 64)[:, :, :33_000_000:300_000]
    query, near = tensors(torch.float16, batch=1, heads=4, kv_heads=2, rows=5, depth=64, length=key.shape[2])
    key.copy_(near)
    assert torch.equal(attention_rows(query, key).rows, attention_rows(query, near).rows)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_launch_on_the_tensors_device():
    query, key = tensors(device="cuda:1")
    with torch.cuda.device(0):
        rows = attention_rows(query, key).rows
    assert rows.device == query.device
    assert torch.equal(rows.cpu(), attention_rows(query.to("cuda:0"), key.to("cuda:0")).rows.cpu())


def test_gradients_equal_those_of_the_reference():
    results = []
    for backend in ("triton", "torch"):
        leaves = [x.detach().clone().requires_grad_() for x in tensors(torch.float32, batch=1, length=500)]
        attention_rows(*leaves, softcap=8.0, backend=backend).rows.square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_compiled_calls_give_the_eager_bits():
    compiled = torch.compile(lambda q, k: attention_rows(q, k, key_spans=[(3, 400)]).rows, fullgraph=True)
    query, key = tensors(batch=1)
    assert torch.equal(compiled(query, key), attention_rows(query, key, key_spans=[(3, 400)]).rows)


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
        with capture_attention(model, layers=[2]) as captured:
            model(**inputs)
    assert (captured[2].weights - want).abs().max() <= tolerance


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


MAP_BACKENDS = ("triton", "cupy", "cucim", "scipy")


def random_maps(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(56, *grid, generator=generator).to("cuda", dtype) for grid in ((95, 170), (37, 53))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", MAP_BACKENDS)
def test_token_maps_of_every_backend_are_those_of_the_reference(backend, dtype):
    for module in {"cupy": ("cupy",), "cucim": ("cupy", "cucim")}.get(backend, ()):
        pytest.importorskip(module)
    for case in MAP_CASES:
        assert map_error(case, dtype, "cuda", backend=backend) <= MAP_ERROR, case.name


def test_token_maps_as_pairs_of_float32_are_those_of_the_reference(monkeypatch):
    """What another card would run: the arithmetic is the same on all."""
    map_launch = pytest.importorskip("hide_kernels.token_maps.triton_launch")
    monkeypatch.setattr(map_launch, "SLOW_FLOAT64", {torch.cuda.get_device_capability()})
    for case in MAP_CASES:
        assert map_error(case, torch.float32, "cuda", backend="triton") <= MAP_ERROR, case.name


@pytest.mark.parametrize("backend", MAP_BACKENDS[:3])
def test_token_maps_never_synchronise_and_run_on_the_current_stream(backend):
    for module in {"cupy": ("cupy",), "cucim": ("cupy", "cucim")}.get(backend, ()):
        pytest.importorskip(module)
    rows = random_maps()
    arguments = {"prior_rows": 8, "sigma": 3.0, "backend": backend}
    token_maps(rows, **arguments)
    side = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            late = [torch.zeros_like(image) for image in rows]
            torch.cuda._sleep(50_000_000)
            for image, given in zip(late, rows, strict=True):
                image.copy_(given)
            got = token_maps(late, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    want = token_maps([image.cpu() for image in rows], prior_rows=8, sigma=3.0, backend="scipy")
    assert torch.equal(got.valid.cpu(), want.valid) and torch.equal(got.image_index.cpu(), want.image_index)
    for one, other in zip(got.maps, want.maps, strict=True):
        assert (one.cpu() - other).abs().max() <= MAP_ERROR


def test_token_maps_replay_in_a_graph_with_four_launches_and_equal_bits(launched):
    rows = random_maps()
    token_maps(rows, prior_rows=8, sigma=3.0)
    assert names(launched) == ["scan_rows", "smooth_rows", "subtract_prior", "normalise_maps"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_maps(rows, prior_rows=8, sigma=3.0)
    for image in rows:
        image.copy_(torch.rand(image.shape))
    graph.replay()
    want = token_maps(rows, prior_rows=8, sigma=3.0)
    assert torch.equal(captured.image_index, want.image_index) and torch.equal(captured.valid, want.valid)
    assert all(torch.equal(one, other) for one, other in zip(captured.maps, want.maps, strict=True))


def test_other_sizes_of_maps_compile_nothing(launched):
    token_maps(random_maps(), prior_rows=8, sigma=3.0)
    caches = [launch.kernel.device_caches[torch.cuda.current_device()][0] for launch in launched]
    sizes = [len(cache) for cache in caches]
    for grids in (((1, 1),), ((32, 64), (16, 16)), ((3, 5),) * 11):
        token_maps([torch.rand(9, *grid, device="cuda").bfloat16() for grid in grids], prior_rows=1, sigma=20.0)
    assert [len(cache) for cache in caches] == sizes


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


@pytest.mark.parametrize("before, after", SIZES)
def test_resized_pixels_are_pillows_for_any_layout(launcher, before, after):
    for channels in (3, 4):
        image = noise(*before, channels)
        want = resize(image, after, backend="pillow")
        planar = image.permute(2, 0, 1).contiguous().cuda().permute(1, 2, 0)
        for source in (image.cuda(), planar):
            # Memory that was used before holds garbage.
            torch.full((1 << 20,), -1, device="cuda")
            got = resize(source, after, backend="cuda")
            assert got.is_cuda and torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [[(1400, 1456)], [(140, 112), (224, 196)], [(1428, 1456), (1428, 1456)]], ids=str)
def test_pixel_values_are_those_of_the_host_bit_for_bit(launcher, sizes, dtype):
    for channels in (3, 4):
        image = noise(1411, 1447, channels)
        want = pixel_values(image, sizes, **NORMALISE, dtype=dtype, backend="pillow")
        got = pixel_values(image.cuda(), sizes, **NORMALISE, dtype=dtype, backend="cuda")
        assert got.is_cuda and torch.equal(got.cpu(), want)


def test_pixel_values_never_synchronise_run_on_the_current_stream_and_replay_in_a_graph(launcher):
    image, sizes = noise(300, 517, 3), [(140, 224), (168, 252)]
    source, want = image.cuda(), pixel_values(image, sizes, **NORMALISE)
    pixel_values(source[:50], sizes, **NORMALISE, backend="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            late = torch.zeros_like(source)
            torch.cuda._sleep(50_000_000)
            late.copy_(source)
            # Sizes that are new: their tables are uploaded.
            got = pixel_values(late, sizes, **NORMALISE, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    assert torch.equal(got.cpu(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = pixel_values(source, sizes, **NORMALISE, backend="cuda")
    source.copy_(image.flip(0))
    graph.replay()
    assert torch.equal(got.cpu(), pixel_values(image.flip(0), sizes, **NORMALISE))


def test_a_resize_and_its_patches_take_two_launches_and_two_resizes_four(launcher, monkeypatch):
    launches = []
    launch = native.launch
    monkeypatch.setattr(native, "launch", lambda kernel, *rest: (launches.append(kernel), launch(kernel, *rest)))
    planar = noise(4, 300, 517).cuda().permute(1, 2, 0)
    for sizes in ([(140, 224)], [(56, 560)], [(140, 224), (168, 252)]):
        launches.clear()
        pixel_values(planar, sizes, **NORMALISE, backend="cuda")
        assert len(launches) == 2 * len(sizes) and launches[-1] == "resize_to_patches_32"
    assert explain("pixel_values", image=planar).chosen == "cuda"
    assert patches.plan((300, 517), [(300, 504)], any_layout=True)[0].axis == 1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_decoded_on_the_device_is_pillows_within_a_few_levels(orientation, subsampling):
    pytest.importorskip("nvidia.nvimgcodec")
    data = stored(photo().resize((900, 370)), orientation=orientation, subsampling=subsampling, quality=90)
    want = decode(data)
    got = decode(data, device="cuda", decoder="nvimgcodec")
    difference = (got.cpu().int() - want.int()).abs()
    print(f"nvImageCodec: {difference.max()} levels from Pillow, {difference.double().mean():.4f} on average")
    assert got.is_cuda and got.is_contiguous() and difference.max() <= 8 and difference.double().mean() <= 0.5
