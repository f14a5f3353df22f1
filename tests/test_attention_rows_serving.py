"""attention_rows on packed and paged batches: values, and what is refused."""

import re
from pathlib import Path

import pytest
import torch

from hide_kernels import attention_rows, attention_rows_workspace, explain
from hide_kernels.testing.cases import SERVING_CASES, ServingCase, error_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SERVING_CASES, ids=lambda case: case.name)
def test_every_kind_of_call_equals_each_sequence_alone_in_float64(case, dtype):
    assert max(error_of(case, dtype, "cpu", backend="torch")) <= 1


def dense(lengths, seed=0, heads=4, depth=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, n, depth, generator=generator, dtype=torch.float64) for n in lengths]


def pack(tensors):
    return torch.cat([x[0].transpose(0, 1) for x in tensors])


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def test_packed_sequences_give_the_rows_and_lse_of_dense_calls_one_by_one():
    queries, keys = dense([3, 1, 4]), dense([9, 20, 5], heads=2)
    got = attention_rows(
        pack(queries), pack(keys), cu_seqlens_q=bounds([3, 1, 4]), cu_seqlens_k=bounds([9, 20, 5]), max_seqlen_q=4,
        max_seqlen_k=20, key_spans=[(2, 5), (4, 20)], head_reduction="none", return_lse=True,
    )  # fmt: skip
    assert got.rows.shape == (8, 4, 19) and got.lse.shape == (4, 8)
    first = 0
    for query, key in zip(queries, keys, strict=True):
        rows, lse = attention_rows(query, key, head_reduction="none", return_lse=True)
        last = first + query.shape[2]
        columns = [n for n in (*range(2, 5), *range(4, 20)) if n < key.shape[2]]
        mine = got.rows[first:last].transpose(0, 1)
        torch.testing.assert_close(mine[..., : len(columns)], rows[0][..., columns], rtol=1e-12, atol=0)
        assert (mine[..., len(columns) :] == 0).all()
        torch.testing.assert_close(got.lse[:, first:last], lse[0], rtol=1e-12, atol=0)
        first = last


@pytest.mark.parametrize("heads_first", [False, True], ids=["NHD", "HND"])
@pytest.mark.parametrize("block_size", [16, 48, 256])
def test_paged_keys_give_the_rows_of_the_same_keys_in_a_row(block_size, heads_first):
    query, key = dense([5])[0].expand(2, -1, -1, -1), torch.cat(dense([300, 300], heads=2)).view(2, 2, 300, 8)
    pages = -(-300 // block_size)
    padded = torch.nn.functional.pad(key, (0, 0, 0, pages * block_size - 300), value=torch.nan)
    order = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(0))
    cache = torch.empty(2 * pages, block_size, 2, 8, dtype=torch.float64)
    cache[order] = padded.transpose(1, 2).reshape(2 * pages, block_size, 2, 8)
    if heads_first:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    lens = torch.tensor([300, 130])
    arguments = {"kv_lens": lens, "key_spans": [(7, 300)], "row_reduction": "mean"}
    want = attention_rows(query, key, **arguments).rows
    rows = attention_rows(query, cache, block_table=order.view(2, pages).int(), **arguments).rows
    torch.testing.assert_close(rows, want, rtol=1e-12, atol=0)


def test_a_given_lse_is_that_of_flash_attention_s_packed_layout_and_accumulate_adds():
    case = ServingCase("packed")
    query, key, arguments = case.inputs(torch.float32)
    rows, lse = attention_rows(query, key, return_lse=True, **arguments)
    assert (lse[:, -2:] == -torch.inf).all() and (rows[-2:] == 0).all()
    out = torch.ones_like(rows)
    again = attention_rows(query, key, lse=lse + 1, out=out, accumulate=True, **arguments).rows
    assert again is out
    torch.testing.assert_close(out, 1 + rows / torch.e, rtol=1e-5, atol=1e-7)


def test_rows_and_keys_past_the_maxima_are_left_out():
    queries, keys = dense([3, 2]), dense([9, 20], heads=4)
    arguments = {"cu_seqlens_q": bounds([3, 2]), "cu_seqlens_k": bounds([9, 20])}
    rows, lse = attention_rows(pack(queries), pack(keys), max_seqlen_q=2, max_seqlen_k=11, return_lse=True, **arguments)
    assert (rows[2] == 0).all() and (lse[:, 2] == -torch.inf).all()
    torch.testing.assert_close(rows[3:], attention_rows(queries[1], keys[1][:, :, :11]).rows[0], rtol=1e-12, atol=0)


def test_a_sequence_has_the_same_bits_in_any_batch():
    queries, keys = dense([3, 1, 4]), dense([9, 20, 5], heads=2)
    sizes = {"max_seqlen_q": 4, "max_seqlen_k": 20}
    together = attention_rows(
        pack(queries), pack(keys), cu_seqlens_q=bounds([3, 1, 4]), cu_seqlens_k=bounds([9, 20, 5]), **sizes
    ).rows
    alone = attention_rows(
        pack(queries[2:]), pack(keys[2:]), cu_seqlens_q=bounds([4]), cu_seqlens_k=bounds([5]), **sizes
    ).rows
    assert torch.equal(together[4:], alone)


def test_no_sample_and_no_row():
    query, key = torch.zeros(0, 4, 8), torch.zeros(0, 2, 8)
    nothing = torch.zeros(1, dtype=torch.int32)
    arguments = {"max_seqlen_q": 0, "max_seqlen_k": 7, "cu_seqlens_q": nothing, "cu_seqlens_k": nothing}
    rows, lse = attention_rows(query, key, return_lse=True, key_spans=[(0, 7)], **arguments)
    assert rows.shape[0] == 0 and lse.shape == (4, 0)
    assert attention_rows(query, key, row_reduction="mean", **arguments).rows.shape[0] == 0


Q, K, PACKED = ServingCase("packed").inputs(torch.float32)
_, PAGES, PAGED = ServingCase("paged", block_size=16).inputs(torch.float32)
DENSE_Q = torch.zeros(4, 6, 5, 64)
TABLE = {name: PAGED[name] for name in ("block_table", "kv_lens")}


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"query": DENSE_Q}, ValueError, r"query: got shape .* want three dimensions \(total_q, Hq, D\)"),
        ({"key": torch.zeros(4, 2, 9, 64)}, ValueError, r"key: got shape .* want three dimensions \(total_k, Hkv, D\)"),
        ({"max_seqlen_q": None}, ValueError, "max_seqlen_q: got None, want the most .* because cu_seqlens_q is set"),
        ({"max_seqlen_k": None}, ValueError, "max_seqlen_k: got None, want the most .* because cu_seqlens_k is set"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q: got -1"),
        ({"cu_seqlens_q": [0, 5]}, TypeError, "cu_seqlens_q: got list"),
        ({"cu_seqlens_q": torch.zeros(2, 2).int()}, ValueError, r"cu_seqlens_q: got shape .* want \(B \+ 1,\)"),
        ({"cu_seqlens_q": torch.zeros(5)}, TypeError, "cu_seqlens_q: got torch.float32"),
        ({"cu_seqlens_k": torch.zeros(4).int()}, ValueError, r"cu_seqlens_k: got shape .* want 4"),
        ({"q_positions": torch.zeros(5).int()}, ValueError, r"q_positions: got shape \(5,\), want \(25,\)"),
        ({"causal": True}, ValueError, r"q_positions: got None, want \(total_q,\)"),
        ({"lse": torch.zeros(4, 6, 18)}, ValueError, r"lse: got shape .* want \(6, 25\)"),
        ({"out": torch.zeros(4, 18, 142)}, ValueError, r"out: got shape .* want \(25, 142\)"),
        ({"key_spans": [(0, 143)]}, ValueError, "key_spans: got"),
        ({"key_spans": [[(0, 1)]]}, ValueError, r"one per sample \(4\)"),
        ({"kv_lens": torch.zeros(3).int()}, ValueError, "kv_lens: got shape"),
        ({"query": Q.clone().requires_grad_()}, ValueError, "query: packed and paged calls record no gradients"),
        ({"shard": "rows"}, ValueError, "shard: got 'rows'"),
        ({"process_group": object()}, TypeError, "process_group: got object"),
        ({"workspace": torch.zeros(3).double()}, TypeError, "workspace: got torch.float64"),
        ({"workspace": torch.zeros(3, 2)}, ValueError, "workspace: got shape"),
        ({"workspace": torch.zeros(30)[::2]}, ValueError, "workspace: got shape .* strides \\(2,\\), want one contiguous"),
        (TABLE, ValueError, "block_table: got a table together with cu_seqlens_k"),
        ({"key": PAGES, "cu_seqlens_k": None, **TABLE, "max_seqlen_k": 161}, ValueError, "at most 160"),
        (
            {"key": PAGES, "cu_seqlens_k": None, **TABLE, "block_table": PAGED["block_table"][:3]},
            ValueError, r"block_table: got shape \(3, 10\), want \(4, 10\)",
        ),
        ({"key": PAGES, "cu_seqlens_k": None, "block_table": torch.zeros(4, 9)}, TypeError, "block_table: got torch.float"),
        ({"key": PAGES, "cu_seqlens_k": None, "block_table": [[0]] * 4}, TypeError, "block_table: got list"),
        (
            {"key": PAGES, "cu_seqlens_k": None, "block_table": torch.tensor(0)},
            ValueError, r"block_table: got shape \(\), want \(4, max_blocks\)",
        ),
        ({"key": K[..., ::2]}, ValueError, "want the last to be 64"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        attention_rows(**{"query": Q, "key": K, **PACKED, **arguments})


def test_dense_calls_take_no_maxima():
    with pytest.raises(ValueError, match="max_seqlen_q: got 5 for tensors that are not packed"):
        attention_rows(DENSE_Q, torch.zeros(4, 2, 9, 64), max_seqlen_q=5)


def test_the_reference_takes_no_workspace():
    assert attention_rows_workspace(Q, K, **PACKED) == 0
    with pytest.raises(ValueError, match="max_seqlen_q: got None"):
        attention_rows_workspace(Q, K, **{**PACKED, "max_seqlen_q": None})


def test_compiled_calls_take_packed_and_paged_tensors_of_any_length():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(query, key, cu_seqlens_q, block_table, kv_lens, most):
        return attention_rows(
            query, key, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=most, block_table=block_table, kv_lens=kv_lens,
            return_lse=True,
        )  # fmt: skip

    for keys in ((139, 30, 1, 77), (50, 60, 70, 80), (200, 3, 0, 9)):
        query, key, arguments = ServingCase("paged", block_size=16, keys_of=keys).inputs(torch.float32)
        del arguments["max_seqlen_k"]
        want = attention_rows(query, key, return_lse=True, **arguments)
        got = compiled(query, key, *(arguments[n] for n in ("cu_seqlens_q", "block_table", "kv_lens", "max_seqlen_q")))
        assert torch.equal(got.rows, want.rows) and torch.equal(got.lse, want.lse)
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", [SERVING_CASES[i] for i in (0, 8, 3)], ids=lambda case: case.name)
def test_schema_fake_and_dynamic_shapes_pass_opcheck(case):
    query, key, given = case.inputs(torch.float32)
    spans = [given["max_seqlen_k"]] * len(case.keys_of)
    operands = (
        query, key, None, None, given.get("q_positions"), None, given.get("kv_lens"), given["cu_seqlens_q"],
        given.get("cu_seqlens_k"), given.get("block_table"), [x for n in spans for x in (0, n)],
        [1] * len(spans), max(spans), given["max_seqlen_q"], given["max_seqlen_k"],
        given.get("head_reduction", "mean"), given.get("row_reduction"), given.get("causal", False), None, 0.125, None,
        True, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.hide_kernels.attention_rows.default, operands)


def test_explain_says_which_pages_the_kernels_take(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for size, chosen in ((16, "triton"), (256, "triton"), (48, "torch")):
        key = torch.zeros(3, size, 2, 64)
        found = explain("attention_rows", query=DENSE_Q, key=key, block_table=torch.zeros(4, 2).int())
        assert found.chosen == chosen
    assert "pages of 48 keys are not served" in str(found)


def test_bounds_that_no_launch_can_have_go_to_the_reference(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    given = {"query": Q, "key": K, "cu_seqlens_q": PACKED["cu_seqlens_q"], "cu_seqlens_k": PACKED["cu_seqlens_k"]}
    assert explain("attention_rows", **given, max_seqlen_q=1 << 19, max_seqlen_k=1 << 29).chosen == "triton"
    for bound, text in (
        ({"max_seqlen_q": 1 << 20}, "65535 tiles of rows"),
        ({"max_seqlen_k": 1 << 30}, "2 \\*\\* 30 keys"),
    ):
        found = explain("attention_rows", **given, **bound)
        assert found.chosen == "torch" and re.search(text, str(found))
    with pytest.raises(ValueError, match="65535 tiles of rows"):
        attention_rows(Q, K, **{**PACKED, "max_seqlen_q": 1 << 20, "row_reduction": "sum", "backend": "triton"})


def test_the_code_of_the_documentation_runs_and_gives_the_shapes_that_it_says():
    text = (Path(__file__).parents[1] / "docs/serving.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    for block in blocks[:3] + blocks[4:]:  # the fourth needs several ranks
        exec(block, names)
    assert "process_group=group" in blocks[3]
    assert names["rows"].shape == (2, 768) and names["lse"].shape == (28, 8)
    assert names["out"].shape == (8, 768) and names["out"].sum(1).allclose(torch.ones(8))
