"""attention_rows against the float64 textbook expression, over its whole dense contract."""

import itertools

import numpy as np
import pytest
import torch

from hide_kernels import attention_rows
from hide_kernels.attention_rows import torch_blocked
from hide_kernels.testing import eager_attention_rows, error_budget, poisoned_empty

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def inputs(batch=2, heads=6, kv_heads=2, rows=5, depth=40, length=77, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, rows, depth, generator=generator, dtype=torch.float64) * 2
    key = torch.randn(batch, kv_heads, length, depth, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def oracle(query, key, visible=None, **kwargs):
    return eager_attention_rows(query.double(), key.double(), visible, **kwargs)


@pytest.fixture(autouse=True, params=[128, 2_500, 1 << 22])
def small_blocks(monkeypatch, request):
    """Several blocks of keys, heads and rows even on small inputs, and all at once."""
    monkeypatch.setattr(torch_blocked, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(torch_blocked, "BLOCK_KEYS", 50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, depth", [(6, 2, 40), (7, 1, 72), (4, 4, 80), (1, 1, 3)])
def test_rows_and_lse_equal_the_float64_oracle_within_budget(dtype, heads, kv_heads, depth):
    query, key = inputs(heads=heads, kv_heads=kv_heads, depth=depth, length=301, dtype=dtype)
    want, want_lse = oracle(query, key)
    # The arithmetic is at least float32, so 16-bit inputs earn no larger budget.
    widened = [x.double() if dtype == torch.float64 else x.float() for x in (query, key)]
    plain, plain_lse = eager_attention_rows(*widened)
    with poisoned_empty():
        rows, lse = attention_rows(query, key, head_reduction="none", return_lse=True)
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (rows.double() - want).abs().max() <= error_budget(plain, want, dtype)
    assert (lse.double() - want_lse).abs().max() <= error_budget(plain_lse, want_lse, dtype)
    assert (rows.sum(-1) - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("row_reduction", [None, "mean", "sum"])
@pytest.mark.parametrize("head_reduction", ["mean", "none", "kv_group", "weights"])
@pytest.mark.parametrize("softmax", [True, False])
def test_reductions_equal_reducing_the_oracle(head_reduction, row_reduction, softmax):
    query, key = inputs(dtype=torch.float64)
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
    want = oracle(query, key)[0]
    if not softmax:
        want = query @ key.repeat_interleave(3, dim=1).transpose(2, 3) * 40**-0.5
    want = {
        "mean": lambda p: p.mean(1),
        "none": lambda p: p,
        "kv_group": lambda p: p.unflatten(1, (2, 3)).mean(2),
        "weights": lambda p: (p * weights[:, None, None]).sum(1),
    }[head_reduction](want)
    if row_reduction:
        want = getattr(want, row_reduction)(-2)
    reduction = weights if head_reduction == "weights" else head_reduction
    rows = attention_rows(query, key, head_reduction=reduction, row_reduction=row_reduction, softmax=softmax).rows
    torch.testing.assert_close(rows, want, rtol=0, atol=1e-13)


def test_a_head_subset_is_a_weight_list_with_zeros():
    query, key = inputs()
    rows = attention_rows(query, key, head_reduction=[0, 0, 0.5, 0, 0.5, 0]).rows
    each = attention_rows(query, key, head_reduction="none").rows
    torch.testing.assert_close(rows, (each[:, 2] + each[:, 4]) / 2)


@pytest.mark.parametrize("per_sample", [False, True])
def test_spans_are_columns_of_the_full_row_one_after_another(per_sample):
    query, key = inputs()
    full = attention_rows(query, key).rows
    spans = [(50, 77), (3, 9), (20, 20), (0, 1)]
    if not per_sample:
        rows = attention_rows(query, key, key_spans=spans).rows
        torch.testing.assert_close(rows, full[..., [*range(50, 77), *range(3, 9), 0]], rtol=0, atol=1e-7)
        return
    rows = attention_rows(query, key, key_spans=[spans, [(10, 12)]]).rows
    torch.testing.assert_close(rows[0], full[0][..., [*range(50, 77), *range(3, 9), 0]], rtol=0, atol=1e-7)
    torch.testing.assert_close(rows[1, :, :2], full[1, :, 10:12], rtol=0, atol=1e-7)
    assert (rows[1, :, 2:] == 0).all()


def test_spans_may_be_numpy_integers_and_samples_may_have_none():
    query, key = inputs()
    full = attention_rows(query, key).rows
    rows = attention_rows(query, key, key_spans=[[(np.int64(2), np.int64(5))], []]).rows
    torch.testing.assert_close(rows[0], full[0, :, 2:5], rtol=0, atol=1e-7)
    assert (rows[1] == 0).all()


def test_no_spans_and_no_keys_give_no_columns():
    query, key = inputs()
    assert attention_rows(query, key, key_spans=[]).rows.shape == (2, 5, 0)
    rows, lse = attention_rows(query, key[:, :, :0], return_lse=True)
    assert rows.shape == (2, 5, 0)
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    "causal, window, start, length", [*itertools.product([False, True], [None, 1, 9], [0, 4], [77, 30])]
)
def test_hidden_keys_are_left_out_and_may_be_nan(causal, window, start, length):
    query, key = inputs(dtype=torch.float64)
    positions = torch.tensor([[2, 8, 29, 40, 76], [0, 5, 6, 7, 20]])
    starts, lengths = torch.tensor([start, 0]), torch.tensor([77, length])
    n = torch.arange(77)
    visible = (n >= starts[:, None, None]) & (n < lengths[:, None, None])
    if causal:
        visible = visible & (n <= positions[..., None])
    if window:
        visible = visible & (n > positions[..., None] - window)
    visible = visible.expand(2, 5, 77)
    want, want_lse = oracle(query, key, visible[:, None])
    hidden_from_all = ~visible.any(1)
    key = key.masked_fill(hidden_from_all[:, None, :, None], torch.nan)
    rows, lse = attention_rows(
        query, key, q_positions=positions, causal=causal, window=window, kv_starts=starts, kv_lens=lengths,
        head_reduction="none", return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(rows, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=0)


def test_a_row_that_sees_no_key_is_zeros_with_lse_minus_infinity():
    query, key = inputs()
    rows, lse = attention_rows(query, key, kv_lens=torch.tensor([0, 77]), return_lse=True)
    assert (rows[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert rows[1].sum() == pytest.approx(5, abs=1e-4)
    for infinity in (torch.inf, -torch.inf):
        again = attention_rows(query, key, lse=torch.where(lse.isinf(), infinity, lse)).rows
        torch.testing.assert_close(again, rows, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_ten_thousand_neither_overflow_nor_lose_the_budget(dtype):
    query, key = inputs(dtype=dtype)
    query = query * 1000
    want = oracle(query, key)[0].mean(1)
    plain = eager_attention_rows(query.float(), key.float())[0].mean(1)
    rows = attention_rows(query, key).rows
    assert error_budget(plain, want, dtype) < 0.01 < want.max()
    assert query.double().abs().max() * key.double().abs().max() > 1e4
    assert (rows.double() - want).abs().max() <= error_budget(plain, want, dtype)


def test_softcap_and_scale_act_as_documented():
    query, key = inputs(dtype=torch.float64)
    want = oracle(query, key, scale=0.3, softcap=2.5)[0].mean(1)
    rows = attention_rows(query, key, scale=0.3, softcap=2.5).rows
    torch.testing.assert_close(rows, want, rtol=0, atol=1e-13)


def test_a_given_lse_replaces_the_first_pass():
    query, key = inputs()
    rows, lse = attention_rows(query, key, return_lse=True)
    shifted = attention_rows(query, key, key_spans=[(5, 60)], lse=lse + 1).rows
    torch.testing.assert_close(shifted, rows[..., 5:60] / torch.e, rtol=1e-5, atol=1e-8)


def test_accumulate_adds_to_out_and_overwrites_without():
    query, key = inputs()
    rows = attention_rows(query, key).rows
    out = torch.full((2, 5, 77), torch.nan)
    assert attention_rows(query, key, out=out).rows is out
    torch.testing.assert_close(out, rows, rtol=0, atol=0)
    attention_rows(query, key, out=out, accumulate=True)
    torch.testing.assert_close(out, 2 * rows, rtol=1e-6, atol=0)


@pytest.mark.parametrize("window", [1 << 31, 1 << 40, (1 << 63) - 1])
def test_a_window_longer_than_32_bits_hides_nothing_before_int32_positions(window):
    query, key = inputs()
    positions = torch.tensor([-9, 0, 3, 40, 76], dtype=torch.int32)
    want = attention_rows(query, key, q_positions=positions, causal=True).rows
    found = attention_rows(query, key, q_positions=positions, causal=True, window=window).rows
    assert torch.equal(found, want)


@pytest.mark.parametrize("arguments", [{"row_reduction": "mean"}, {"head_reduction": "none", "row_reduction": "sum"}])
def test_autocast_does_not_round_rows_or_gradients(arguments):
    def rows_and_gradient():
        query, key = inputs()
        rows = attention_rows(query.requires_grad_(), key, **arguments).rows
        rows.square().sum().backward()
        return rows.detach(), query.grad

    want = rows_and_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        found = rows_and_gradient()
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


def test_strided_query_and_key_are_read_in_place():
    query, key = inputs()
    want = attention_rows(query, key).rows
    strided_query = query.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 100, 2, 64), torch.nan)
    wide[:, 11:88, :, 8:48] = key.transpose(1, 2)
    rows = attention_rows(strided_query, wide[:, 11:88, :, 8:48].transpose(1, 2)).rows
    torch.testing.assert_close(rows, want, rtol=0, atol=1e-7)


def test_a_sample_has_the_same_bits_alone_in_a_batch_and_again():
    query, key = inputs(batch=3)
    together = attention_rows(query, key, return_lse=True)
    again = attention_rows(query, key, return_lse=True)
    assert torch.equal(together.rows, again.rows) and torch.equal(together.lse, again.lse)
    for sample in range(3):
        alone = attention_rows(query[sample : sample + 1], key[sample : sample + 1], return_lse=True)
        assert torch.equal(alone.rows[0], together.rows[sample])
        assert torch.equal(alone.lse[0], together.lse[sample])


def test_memory_is_the_output_and_a_block_not_the_score_matrix(monkeypatch):
    monkeypatch.undo()
    query, key = inputs(batch=1, heads=8, kv_heads=2, rows=16, depth=64, length=65_536)
    given = {query.data_ptr(), key.data_ptr()}
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            storages = [
                t.untyped_storage() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)
            ]
            sizes.extend(s.nbytes() for s in storages if s.data_ptr() not in given)
            return result

    with Sizes():
        attention_rows(query, key, key_spans=[(100, 60_000)])
    score_matrix, output = 4 * 8 * 16 * 65_536, 4 * 16 * (60_000 - 100)
    assert output <= max(sizes) <= max(4 * torch_blocked.BLOCK_ELEMENTS, output) < score_matrix


def test_a_large_hidden_score_leaves_gradients_finite():
    query = torch.full((1, 1, 1, 4), 20.0, requires_grad=True)
    key = torch.zeros(1, 1, 3, 4)
    key[0, 0, 2] = 20
    key.requires_grad_()
    attention_rows(query, key, kv_lens=torch.tensor([2])).rows[..., 0].sum().backward()
    assert query.grad.isfinite().all() and (key.grad[0, 0, :2] != 0).all() and (key.grad[0, 0, 2] == 0).all()
