"""The Triton kernels of attention_rows on packed and paged batches: interpreted."""

import pytest
import torch

pytest.importorskip("triton")

from hide_kernels import attention_rows, attention_rows_workspace
from hide_kernels.attention_rows import triton_launch
from hide_kernels.testing.cases import SERVING_CASES, Case, ServingCase, error_of
from hide_kernels.testing.interpreter import interpreted
from hide_kernels.testing.offline import compilations, planned

warnings = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


@pytest.fixture
def launched():
    """The launches that ran, interpreted."""
    launches = []
    with interpreted(), pytest.MonkeyPatch.context() as patch:
        checked = triton_launch.Launch.run
        patch.setattr(triton_launch.Launch, "run", lambda launch: (launches.append(launch), checked(launch)))
        yield launches


# As in test_attention_rows_triton.py: the products of float32 are taken in slices, what comes after them is the same.
SLICED = {
    "packed, causal", "packed, heads apart", "packed, raw, weights", "paged, heads first, causal", "paged, pages of 128",
    "paged, one row each",
}  # fmt: skip
KINDS = [(case, torch.float16) for case in SERVING_CASES]
KINDS += [(case, torch.float32) for case in SERVING_CASES if case.name in SLICED]


@warnings
@pytest.mark.parametrize("case, dtype", KINDS, ids=lambda value: getattr(value, "name", str(value)))
def test_every_kind_of_call_is_within_budget_of_float64(case, dtype, launched):
    errors = error_of(case, dtype, "cpu", backend="triton")
    assert max(errors) <= 1
    assert launched[-1].kernel.fn.__name__ == "reduce_rows"
    assert launched[-1].arguments["MASKED"] and not launched[-1].arguments["WIDE"]


@warnings
def test_a_sequence_has_the_same_bits_in_any_batch_and_64_bit_offsets_change_none(launched, monkeypatch):
    case = ServingCase("bits", block_size=16, rows_of=(3, 1, 4), keys_of=(139, 200, 65))
    query, key, arguments = case.inputs(torch.float16)
    together = attention_rows(query, key, return_lse=True, backend="triton", **arguments)
    monkeypatch.setattr(triton_launch, "WIDE_FROM", 0)
    wide = attention_rows(query, key, return_lse=True, backend="triton", **arguments)
    assert launched[-1].arguments["WIDE"]
    assert torch.equal(wide.rows, together.rows) and torch.equal(wide.lse, together.lse)
    bounds = torch.tensor([0, 4]).int()
    wide_table = torch.full((3, 40), -1, dtype=torch.int32)
    wide_table[:, : arguments["block_table"].shape[1]] = arguments["block_table"]
    sliced = {**arguments, "block_table": wide_table[:, : arguments["block_table"].shape[1]]}
    assert torch.equal(attention_rows(query, key, backend="triton", **sliced).rows, together.rows)
    one = {"cu_seqlens_q": bounds, **{name: arguments[name][2:] for name in ("block_table", "kv_lens")}}
    alone = attention_rows(query[4:8], key, return_lse=True, backend="triton", **{**arguments, **one})
    assert torch.equal(alone.rows, together.rows[4:8]) and torch.equal(alone.lse, together.lse[:, 4:8])


@warnings
@pytest.mark.parametrize(
    "case",
    [
        ServingCase("packed"), ServingCase("paged", block_size=16, keys_of=(300, 30, 1, 77)),
        ServingCase("rows summed", arguments={"row_reduction": "sum", "softmax": False}),
        ServingCase("dense queries", block_size=16, rows_of=()), Case("dense", length=300),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_with_out_and_a_workspace_a_call_allocates_nothing(case, launched, monkeypatch):
    query, key, arguments = case.inputs(torch.float16)
    arguments["backend"] = "triton"
    want = attention_rows(query, key, **arguments).rows
    size = attention_rows_workspace(query, key, **arguments)
    assert (size == 0) == (arguments.get("softmax") is False)
    memory = torch.full((size + 8,), torch.nan)
    out = torch.full_like(want, torch.nan)
    allocated = []

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            given = {x.untyped_storage().data_ptr() for x in (query, key, out, memory, *tensors)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
                allocated.append(func)
            return result

    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    checked = triton_launch.Launch.run

    def unwatched(launch):  # the interpreter itself allocates
        with torch.utils._python_dispatch._disable_current_modes():
            checked(launch)

    monkeypatch.setattr(triton_launch.Launch, "run", unwatched)
    with Allocations():
        attention_rows(query, key, out=out, workspace=memory[:size], **arguments)
    assert allocated == []
    assert torch.equal(out, want) and memory[size:].isnan().all()
    if size:
        with pytest.raises(ValueError, match=f"workspace: got shape .* want \\({size},\\) or more"):
            attention_rows(query, key, out=out, workspace=memory[: size - 1], **arguments)


def test_the_workspace_serves_the_chunk_of_rows_that_needs_most(launched, monkeypatch):
    monkeypatch.setattr(triton_launch, "ROWS_AT_ONCE", 300)
    monkeypatch.setattr(triton_launch, "INTERPRETED", triton_launch.Card((9, 0), 2))
    sizes = []
    plan = triton_launch.plan
    monkeypatch.setattr(triton_launch, "plan", lambda *a, **k: ([], sizes.append(a) or plan(*a, **k)[1]))
    query, key, _ = Case("chunks", batch=1, rows=301, length=1_000).inputs(torch.float16)
    size = attention_rows_workspace(query, key, backend="triton")
    attention_rows(query, key, workspace=torch.zeros(size), backend="triton")
    assert len(sizes) == 2
    first = attention_rows_workspace(query[:, :, :300], key, backend="triton")
    last = attention_rows_workspace(query[:, :, 300:], key, backend="triton")
    assert size == max(first, last)


def test_the_workspace_serves_a_query_that_is_copied_to_be_read(launched, monkeypatch):
    plan = triton_launch.plan
    monkeypatch.setattr(triton_launch, "plan", lambda *a, **k: launched.extend(plan(*a, **k)[0]) or ([], None))
    case = Case("columns", batch=1, heads=28, kv_heads=4, rows=40, depth=128, length=2_100)
    query, key, _ = case.inputs(torch.float16)
    query = query.transpose(2, 3).contiguous().transpose(2, 3)
    size = attention_rows_workspace(query, key, backend="triton")
    attention_rows(query, key, key_spans=[(0, 9)], workspace=torch.zeros(size), backend="triton")
    assert launched[0].arguments["partial"].numel() <= size <= 2 * launched[0].arguments["partial"].numel()


@warnings
@pytest.mark.parametrize(
    "masks, unseen",
    [
        ({"causal": True, "window": 4, "q_positions": torch.tensor([10, 11, 60])}, range(3, 14)),
        ({"kv_starts": torch.tensor([10]), "kv_lens": torch.tensor([5])}, range(16)),
        ({"window": 4, "q_positions": torch.tensor([20, 21, 60]), "kv_lens": torch.tensor([5])}, range(16)),
    ],
    ids=["between windows", "none left", "windows past the end"],
)
@pytest.mark.parametrize("garbage", [-1, 1 << 30])
def test_pages_that_no_row_sees_may_be_anything(masks, unseen, garbage, launched):
    query, key = torch.randn(1, 4, 3, 64).half(), torch.randn(20, 4, 2, 64).half()
    table = torch.randperm(20)[:16].int()[None]
    want = attention_rows(query, key, block_table=table, return_lse=True, backend="torch", **masks)
    table[0, list(unseen)] = garbage
    found = attention_rows(query, key, block_table=table, return_lse=True, backend="triton", **masks)
    torch.testing.assert_close(found.rows, want.rows, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.lse, want.lse, atol=1e-5, rtol=1e-5)


@warnings
@pytest.mark.parametrize("keys_of", [(30, 20, 1, 3), (139, 200, 1, 77)], ids=["one chunk", "several"])
def test_rows_of_no_sample_have_lse_minus_infinity_whatever_the_memory_held(keys_of, launched):
    query, key, arguments = ServingCase("rest", keys_of=keys_of).inputs(torch.float16)
    arguments["backend"] = "triton"
    used = torch.full((attention_rows_workspace(query, key, **arguments),), 7.0)
    rows, lse = attention_rows(query, key, return_lse=True, workspace=used, **arguments)
    assert (lse[:, -2:] == -torch.inf).all() and (rows[-2:] == 0).all() and lse[:, :-2].isfinite().all()
    assert ("combine_lse" in {launch.kernel.fn.__name__ for launch in launched}) == (max(keys_of) > 100)


def test_nothing_recompiles_for_lengths_tables_block_sizes_or_layouts_of_pages():
    base = {"rows": 30, "length": 5_000, "packed": True}
    for layout in ({}, {"block_size": 16}):
        launches = planned((9, 0), **base, **layout)
        assert compilations(launches, (9, 0)) == 3
        changes = [{"length": 4_999}, {"length": 129}, {"rows": 17}, {"batch": 5}, {"spans": [[(1, 17), (20, 21)]]}]
        if layout:
            changes += [{"block_size": size} for size in (1, 32, 64, 256)] + [{"key_heads_apart": True}]
        for change in changes:
            launches += planned((9, 0), **{**base, **layout, **change})
        assert compilations(launches, (9, 0)) == 3
