"""What the Triton kernels compile to for cards that are not here: registers, stack, shared memory, number of variants."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from hide_kernels import attention_rows
from hide_kernels.attention_rows import triton_launch
from hide_kernels.attention_rows.request import RowRequest
from hide_kernels.testing.cases import Case
from hide_kernels.testing.interpreter import interpreted
from hide_kernels.testing.offline import SHARED_LIMIT, compilations, compile_launch, planned, read_cubin, target

TENSOR_CORES = {(8, 0): "mma", (9, 0): "wgmma", (10, 0): "tcgen05"}


@pytest.mark.parametrize("capability", TENSOR_CORES, ids=str)
@pytest.mark.parametrize("depth, rows", [(64, 8), (72, 16), (80, 32), (96, 64), (128, 1), (128, 32), (256, 32)])
def test_16_bit_kernels_use_no_stack_fit_the_card_and_its_tensor_cores(capability, depth, rows):
    for launch in planned(capability, depth=depth, rows=rows, masked=rows > 1):
        usage = compile_launch(launch, capability)
        assert usage.stack <= (0 if depth <= 128 else 32), usage
        assert usage.shared <= SHARED_LIMIT[capability], usage
        if usage.kernel == "reduce_rows":
            assert getattr(usage, TENSOR_CORES[capability]) > 0, usage
        if usage.kernel == "partial_lse":
            assert usage.mma + usage.wgmma + usage.tcgen05 > 0, usage


@pytest.mark.parametrize("capability", TENSOR_CORES, ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": torch.float32},
        {"head_reduction": "none"},
        {"head_reduction": torch.empty(28, device="meta"), "unaligned": True, "dtype": torch.float16},
        {"softmax": False, "softcap": 30.0, "row_reduction": "sum", "head_reduction": "kv_group", "accumulate": True},
    ],
    ids=["float32", "heads apart", "weights, unaligned", "raw"],
)
def test_other_modes_use_next_to_no_stack(capability, arguments):
    limit = 32 if arguments.get("dtype") == torch.float32 else 0
    for launch in planned(capability, depth=128, rows=20, masked=True, **arguments):
        usage = compile_launch(launch, capability)
        assert usage.stack <= limit and usage.shared <= SHARED_LIMIT[capability], usage


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
    assert compilations(base + planned((9, 0), rows=33), (9, 0)) == 4
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
    assert read_cubin("reduce_rows", compiled.asm["cubin"], compiled.metadata.shared) == before
