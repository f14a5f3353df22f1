"""attention_received against the columns of the whole matrix in float64, over its contract."""

import pytest
import torch
from test_attention_rows import inputs, oracle
from torch._dynamo.testing import CompileCounterWithBackend

from hide_kernels import attention_received, attention_rows, explain
from hide_kernels.attention_received import api, torch_blocked
from hide_kernels.testing import poisoned_empty
from hide_kernels.testing.cases import RECEIVED_CASES, RECEIVED_SERVING_CASES, Case, received_error_of

EVERY = [*RECEIVED_CASES, *RECEIVED_SERVING_CASES]


@pytest.fixture(params=[1_500, 1 << 19], ids=["many blocks", "few blocks"])
def blocks(monkeypatch, request):
    """Several blocks of queries and heads even on small inputs, and all at once."""
    monkeypatch.setattr(torch_blocked, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(torch_blocked, "QUERIES_AT_LEAST", 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_kind_of_call_is_within_budget_of_float64(case, dtype, blocks):
    assert max(received_error_of(case, dtype, "cpu", backend="torch")) <= 1


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_a_given_lse_gives_the_same_and_is_handed_back(case, blocks):
    query, key, arguments = case.inputs(torch.float32)
    want = attention_received(query, key, return_lse=True, **arguments)
    with poisoned_empty():
        again = attention_received(query, key, lse=want.lse, return_lse=True, **arguments)
    torch.testing.assert_close(again.received, want.received, rtol=3e-5 if case.gain < 10 else 5e-3, atol=1e-6)
    assert again.lse is want.lse


@pytest.mark.parametrize("head_reduction", ["mean", "none", "kv_group", "weights"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_queries_are_reduced_first_then_heads(reduction, head_reduction):
    query, key = inputs(rows=77, dtype=torch.float64)
    positions, weights = torch.arange(77), torch.linspace(-1, 2, 6, dtype=torch.float64)
    visible = torch.ones(77, 77, dtype=torch.bool).tril()
    matrix = oracle(query, key, visible)[0]
    # Key n is seen by the queries from n on.
    each = {"sum": matrix.sum(2), "mean": matrix.sum(2) / torch.arange(77, 0, -1), "max": matrix.amax(2)}[reduction]
    want = {
        "mean": each.mean(1), "none": each, "kv_group": each.unflatten(1, (2, 3)).mean(2),
        "weights": (each * weights[:, None]).sum(1),
    }[head_reduction]  # fmt: skip
    got = attention_received(
        query, key, reduction=reduction, q_positions=positions, causal=True,
        head_reduction=weights if head_reduction == "weights" else head_reduction,
    ).received  # fmt: skip
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_sums_are_those_of_the_rows_and_amount_to_one_for_each_query():
    query, key = inputs(rows=30)
    received = attention_received(query, key).received
    torch.testing.assert_close(received, attention_rows(query, key, row_reduction="sum").rows)
    assert received.sum() == pytest.approx(2 * 30, abs=1e-4)


@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_a_query_with_an_infinite_lse_gives_nothing_and_is_not_counted(infinity):
    query, key = inputs(rows=30)
    lse = attention_received(query, key, return_lse=True).lse
    lse[:, :, 20:] = infinity
    for reduction in ("sum", "mean", "max"):
        got = attention_received(query, key, reduction=reduction, lse=lse).received
        want = attention_received(query[:, :, :20], key, reduction=reduction).received
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_out_is_written_and_added_to_also_where_it_is_strided(blocks):
    query, key = inputs(rows=30)
    arguments = {"key_spans": [[(0, 40)], [(1, 61)]], "reduction": "mean"}
    want = attention_received(query, key, **arguments).received
    wide = torch.full((2, 60, 3), 7.0)
    assert attention_received(query, key, out=wide[..., 1], **arguments).received.data_ptr() == wide[..., 1].data_ptr()
    assert torch.equal(wide[..., 1], want)
    attention_received(query, key, out=wide[..., 1], accumulate=True, **arguments)
    assert torch.equal(wide[..., 1], want + want)
    assert (wide[..., ::2] == 7).all()


def test_a_sample_has_the_same_bits_alone_in_a_batch_and_again(blocks):
    query, key = inputs(batch=3, rows=40)
    arguments = {"return_lse": True, "reduction": "mean", "q_positions": torch.arange(37, 77), "causal": True}
    together, again = (attention_received(query, key, **arguments) for _ in range(2))
    assert torch.equal(together.received, again.received) and torch.equal(together.lse, again.lse)
    for sample in range(3):
        alone = attention_received(query[sample : sample + 1], key[sample : sample + 1], **arguments)
        assert torch.equal(alone.received[0], together.received[sample])
        assert torch.equal(alone.lse[0], together.lse[sample])


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_nothing_has_the_shape_of_something_and_is_zero(reduction):
    for batch, rows, keys in ((0, 3, 50), (2, 0, 50), (2, 3, 0), (0, 0, 0)):
        query, key = torch.ones(batch, 4, rows, 32), torch.ones(batch, 2, keys, 32)
        for head_reduction, heads in (("mean", ()), ("none", (4,)), ("kv_group", (2,))):
            got, lse = attention_received(
                query, key, reduction=reduction, head_reduction=head_reduction, return_lse=True
            )
            assert got.shape == (batch, *heads, keys) and lse.shape == (batch, 4, rows)
            assert (got == 0).all() and (lse == -torch.inf).all()


def test_memory_is_linear_in_queries_and_keys():
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(
                x.untyped_storage().nbytes()
                for x in torch.utils._pytree.tree_leaves(result)
                if isinstance(x, torch.Tensor)
            )
            return result

    length = 4_096
    query, key = inputs(batch=1, heads=1, kv_heads=1, rows=length, depth=8, length=length)
    with Sizes():
        attention_received(query, key, q_positions=torch.arange(length), causal=True, reduction="mean")
    assert max(sizes) == 4 * torch_blocked.BLOCK_ELEMENTS < 4 * length**2 / 16


def test_gradients_are_refused_and_not_lost():
    query, key = inputs()
    with pytest.raises(ValueError, match="query: attention_received records no gradients, want torch.no_grad"):
        attention_received(query.requires_grad_(), key)
    with torch.no_grad():
        assert not attention_received(query, key).received.requires_grad


Q, K = inputs()


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"reduction": "min"}, ValueError, "reduction: got 'min', want 'sum', 'mean' or 'max'"),
        ({"query": Q.tolist()}, TypeError, "query: got list"),
        ({"key": K[..., :3]}, ValueError, "key: got shape"),
        ({"key_spans": [(0, 78)]}, ValueError, "key_spans: got \\(0, 78\\)"),
        ({"causal": True}, ValueError, "q_positions: got None"),
        ({"head_reduction": "max"}, ValueError, "head_reduction"),
        ({"lse": torch.zeros(2, 6, 5, dtype=torch.bfloat16)}, TypeError, "lse: got torch.bfloat16"),
        ({"out": torch.zeros(2, 5, 77)}, ValueError, r"out: got shape \(2, 5, 77\), want \(2, 77\)"),
        ({"accumulate": True}, ValueError, "accumulate: got True without out"),
        ({"backend": "rows"}, ValueError, "backend: got 'rows', want None or one of"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        attention_received(**{"query": Q, "key": K, **arguments})


def test_explain_names_what_runs():
    assert explain("attention_received", query=Q, key=K).chosen == "torch"


OPERATOR = torch.ops.hide_kernels.attention_received.default


def test_a_compiled_call_sees_one_operator_and_gives_the_eager_bits():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(query, key, positions):
        return attention_received(query, key, reduction="mean", q_positions=positions, causal=True, return_lse=True)

    for length in (41, 57):
        query, key = inputs(rows=length, length=length)
        positions = torch.arange(length)
        want = attention_received(query, key, reduction="mean", q_positions=positions, causal=True, return_lse=True)
        got = compiled(query, key, positions)
        assert torch.equal(got.received, want.received) and torch.equal(got.lse, want.lse)
    assert counter.frame_count == 1
    targets = [node.target for graph in counter.graphs for node in graph.graph.nodes]
    assert sum(target in (OPERATOR, OPERATOR.overloadpacket) for target in targets) == 1


def test_the_gate_fails_what_is_wrong_by_a_thousandth():
    def changed(*tensors, **arguments):
        received, lse = attention_received(*tensors, **arguments)
        return api.AttentionReceived(received * 1.001, lse)

    for case in (Case("plain", rows=139, batch=1), RECEIVED_SERVING_CASES[0]):
        assert received_error_of(case, torch.bfloat16, "cpu", backend="torch", call=changed)[0] > 1
