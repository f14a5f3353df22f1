"""What the Triton kernels compile to for cards that are not here: registers, stack, shared memory, number of variants."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import static_report
from hide_kernels import attention_rows
from hide_kernels.attention_rows import triton_launch
from hide_kernels.attention_rows.request import RowRequest
from hide_kernels.testing.cases import Case
from hide_kernels.testing.interpreter import interpreted
from hide_kernels.testing.offline import (
    SHARED_LIMIT,
    compilations,
    compile_launch,
    fingerprint,
    opcodes,
    planned,
    planned_maps,
    sass,
    target,
    uncoalesced,
    usage_of,
)

TENSOR_CORES = {(8, 0): "mma", (8, 6): "mma", (8, 9): "mma", (9, 0): "wgmma", (10, 0): "tcgen05", (12, 0): "mma"}
# Types and layouts without tiles for tensor cores, or with tiles too small for the newest.
SLICED = ("fp32", "fp16 D 128 R 32, weights, not aligned", "bf16 D 128 R 32, not aligned")


@pytest.mark.parametrize("capability", static_report.CARDS, ids=str)
def test_kernels_use_no_stack_fit_the_card_and_its_tensor_cores(capability):
    """All of the report: what has not changed since it was written has its figures from there, the rest is compiled."""
    for name, launch in static_report.launches(capability):
        usage = static_report.usage(launch, capability)
        assert static_report.acceptable(usage, capability, name), (name, usage)
        if name.startswith("bf16 D") and not name.startswith(SLICED):
            if usage.kernel == "reduce_rows" and "heads apart" not in name:
                assert getattr(usage, TENSOR_CORES[capability]) > 0, (name, usage)
            assert usage.mma + usage.wgmma + usage.tcgen05 > 0, (name, usage)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_the_report_says_what_a_fresh_compilation_says(capability):
    """A sample, always compiled: the first pass, the sums and a kernel of `token_maps`."""
    sample = [*planned(capability, depth=128, rows=32, masked=True)[::2], planned_maps((95, 170))[1]]
    for launch in sample:
        assert static_report.usage(launch, capability) == compile_launch(launch, capability)


@pytest.mark.parametrize("depth", [104, 120])
def test_head_sizes_between_those_of_the_report_use_no_stack(depth):
    """Two halves of 64, of which the second is padded, did where all columns were taken at once."""
    last = planned((10, 0), depth=depth, rows=5, masked=True)[-1]
    assert static_report.acceptable(compile_launch(last, (10, 0)), (10, 0), f"bf16 D {depth}")


def order_of(launch):
    """The instructions of a launch on a Hopper, in order, without their variants."""
    with target((9, 0)):
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    return [opcode.split(".")[0] for opcode in opcodes(sass(compiled.asm["cubin"]))]


def test_on_a_hopper_keys_are_asked_for_before_anything_waits():
    """At the shape of Qwen2.5-VL-7B, unmasked: no barrier stands before the first copy of either pass."""
    for launch in (planned((9, 0))[0], planned((9, 0))[-1]):
        code = order_of(launch)
        assert code.index("LDGSTS") < code.index("BAR"), launch.kernel.fn.__name__


def test_on_a_hopper_the_second_pass_asks_for_tiles_while_it_multiplies():
    code = order_of(planned((9, 0))[-1])
    product = code.index("HGMMA")
    loop = code[product : code.index("MUFU", product)]
    # The copies of a later tile are issued behind the product, and before its result is waited for and taken.
    assert "LDGSTS" in loop and loop.index("LDGSTS") < len(loop) - 1 - loop[::-1].index("WARPGROUP")


def test_on_a_hopper_each_kernel_starts_before_the_one_in_front_has_ended():
    first, second, third = map(order_of, planned((9, 0)))
    assert "PREEXIT" in first and "PREEXIT" in second
    for code in (second, third):
        # Waits for the other kernel before it reads anything.
        assert code.index("ACQBULK") < min(code.index(read) for read in ("LDG", "LDGSTS") if read in code)
    # What is launched early waits, and the first, which does not wait, is not: it writes what calls before it read.
    early = [bool(launch.arguments.get("launch_pdl")) for launch in planned((9, 0))]
    assert early == ["ACQBULK" in code for code in (first, second, third)] == [False, True, True]
    older = planned((8, 0))
    assert not any(launch.arguments.get("launch_pdl") or launch.arguments["DEPENDENT"] for launch in older)


def test_an_access_across_columns_is_counted():
    """Also where columns come first, but one thread has all of a row's and its neighbours have other rows'."""
    threads = {"a": ([4, 8], [1, 0]), "b": ([8, 4], [0, 1]), "c": ([32, 1], [1, 0])}
    layouts = "".join(
        f"#{name} = #ttg.blocked<{{sizePerThread = [1, 4], threadsPerWarp = {per_warp}, order = {order}}}>\n"
        for name, (per_warp, order) in threads.items()
    )
    loads = "".join(f"%x = tt.load %p : tensor<16x64x!tt.ptr<f64>, #{layout}>\n" for layout in "aabcd")
    assert uncoalesced(layouts + loads + "tt.store %p, %v : tensor<64x!tt.ptr<f32>, #d>\n") == 3


@pytest.fixture
def driven(monkeypatch):
    """What Triton's driver would be given for each launch."""
    from triton.compiler.compiler import CompiledKernel

    calls = []
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda kernel: None)
    monkeypatch.setattr(CompiledKernel, "run", property(lambda kernel: lambda *given: calls.append(given)))
    with target((9, 0)):
        yield calls


def test_a_layout_that_was_planned_before_goes_to_the_driver_without_triton(driven, monkeypatch):
    query = torch.empty(1, 4, 5, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(1, 300, 2, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    request = RowRequest.of(
        query, key, spans=[[(0, 300)]], q_positions=None, causal=False, window=None, kv_starts=None, kv_lens=None,
        scale=1.0, softcap=None, softmax=True, head_reduction="mean", row_reduction=None,
    )  # fmt: skip

    def launches():
        out = torch.empty(request.shape, device="meta")
        return triton_launch.plan(query, key, request, None, out, False, triton_launch.Card.of((9, 0), 132))[0]

    for launch in launches():
        launch.run()
    first = list(driven)
    driven.clear()
    monkeypatch.setattr(type(launch.kernel), "run", lambda *_, **__: pytest.fail("Triton was asked"))
    again = launches()
    for launch in again:
        launch.run()
    assert len(first) == len(driven) == 3
    for given, before, launch in zip(driven, first, again, strict=True):
        tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
        assert any(x is y for x in given for y in tensors), "the tensors of this call"
        assert len(given) == len(before)
        for place, (ours, theirs) in enumerate(zip(given, before, strict=True)):
            if isinstance(ours, torch.Tensor):
                assert ours.shape == theirs.shape and ours.stride() == theirs.stride()
            elif place != 6:  # what hooks are told, made anew each time
                assert ours == theirs


@pytest.mark.parametrize("change", [{"depth": 80}, {"rows": 9}, {"dtype": torch.float16}, {"unaligned": True}])
def test_figures_of_one_kernel_are_not_taken_for_another(change, monkeypatch):
    base, other = planned((9, 0), rows=32)[-1], planned((9, 0), **{"rows": 32, **change})[-1]
    marks = {fingerprint(base, (9, 0)), fingerprint(other, (9, 0)), fingerprint(base, (8, 0))}
    assert len(marks) == 3
    monkeypatch.setattr(base.kernel, "hash", "another text")
    assert fingerprint(base, (9, 0)) not in marks


def test_at_the_shape_of_qwen2_5_vl_7b_two_programs_of_the_first_pass_share_an_sm_of_a_hopper():
    first = compile_launch(planned((9, 0), depth=128, rows=32)[0], (9, 0))
    assert first.registers <= 128 and 2 * first.shared <= SHARED_LIMIT[9, 0]


def test_nothing_recompiles_for_lengths_spans_strides_rows_of_a_bucket_or_the_batch():
    base = planned((9, 0), rows=30, length=5_000)
    launches = list(base)
    for change in (
        {"length": 4_999}, {"length": 65_536}, {"length": 129}, {"rows": 17}, {"rows": 32}, {"batch": 3}, {"batch": 16},
        {"spans": [[(1, 17), (20, 21), (300, 2_000)]]}, {"spans": [[(0, 16)] * 9]}, {"key_heads_apart": True},
        {"batch": 3, "spans": [[(0, 16)], [(1, 16)], [(2, 500)]]}, {"scale": 1.0}, {"scale": 0.3},
    ):  # fmt: skip
        launches += planned((9, 0), **{"rows": 30, "length": 5_000, **change})
    assert compilations(base, (9, 0)) == 3
    assert compilations(launches, (9, 0)) == 3
    # Rows that are summed: the first block of them writes, the others add.
    summed = planned((9, 0), rows=70, row_reduction="sum")
    assert compilations(summed, (9, 0)) == compilations(summed + planned((9, 0), rows=300, row_reduction="sum"), (9, 0))


def test_another_bucket_mode_or_alignment_is_one_more_variant_and_is_counted():
    base = planned((9, 0), rows=30)
    assert compilations(base + planned((9, 0), rows=16), (9, 0)) == 4
    assert compilations(base + planned((9, 0), rows=30, head_reduction="none"), (9, 0)) == 4
    assert compilations(base + planned((9, 0), rows=30, masked=True), (9, 0)) == 5
    assert compilations(base + planned((9, 0), rows=30, unaligned=True), (9, 0)) == 5


def test_triton_itself_compiles_once_for_two_lengths():
    """The same through Triton's own cache of compiled kernels, with the compiler running."""
    capability = (8, 0)
    cache = triton_launch.kernels.reduce_rows.device_caches
    counts = []
    for length in (300, 77):
        for launch in planned(capability, depth=64, rows=5, length=length, kv_heads=1, heads=2):
            compile_launch(launch, capability)
        counts.append(len(cache[capability][0]))
    assert counts[0] == counts[1]


def test_a_request_that_no_launch_serves_plans_nothing():
    query = torch.empty(1, 4, 2, 64, device="meta", dtype=torch.float16)
    key = torch.empty(1, 2, 0, 64, device="meta", dtype=torch.float16)
    request = RowRequest.of(
        query, key, spans=[[]], q_positions=None, causal=False, window=None, kv_starts=None, kv_lens=None, scale=1.0,
        softcap=None, softmax=True, head_reduction="mean", row_reduction=None,
    )  # fmt: skip
    out = torch.empty(request.shape, device="meta")
    card = triton_launch.Card((9, 0), 132)
    launches, lse = triton_launch.plan(query, key, request, None, out, False, card, need_rows=False)
    assert launches == [] and lse is None
    launches, lse = triton_launch.plan(query, key, request, None, out, False, card, need_rows=False, need_lse=True)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["partial_lse"] and lse is not None


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_kernels_compile_to_the_same_after_some_were_interpreted():
    launch = planned((8, 0), depth=32, rows=3, length=100)[-1]
    before = compile_launch(launch, (8, 0))
    query, key, _ = Case("between", depth=32).inputs(torch.float16)
    with interpreted():
        attention_rows(query, key, backend="triton")
    # As another device, so that nothing comes from a cache in memory; the cache on disk is off.
    with target((8, 0), "again"), mock.patch.dict("os.environ", TRITON_ALWAYS_COMPILE="1"):
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    assert usage_of("reduce_rows", compiled) == before
