"""The registered operator: schema, fake tensors, gradients, torch.compile."""

import functools
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from hide_kernels import attention_rows
from hide_kernels.attention_rows import api, backward

OPERATOR = torch.ops.hide_kernels.attention_rows.default
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def inputs(rows=3, length=9, depth=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, rows, depth, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, length, depth, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def operands(query, key, *, lse=None, weights=None, positions=None, lens=None, spans=((0, 5), (3, 9)), **changed):
    described = {
        "head_reduction": "mean", "row_reduction": None, "causal": positions is not None, "window": None, "scale": 0.5,
        "softcap": None, "softmax": True, "backend": None, **changed,
    }  # fmt: skip
    flat = [bound for span in spans for bound in span] * len(query)
    masks = (positions, None, lens, None, None, None)
    per_sample = [len(spans)] * len(query)
    columns = sum(stop - start for start, stop in spans)
    return (query, key, lse, weights, *masks, flat, per_sample, columns, None, None, *described.values())


@pytest.mark.parametrize(
    "dtype, changed",
    [
        (torch.float64, {}), (torch.bfloat16, {"lens": torch.tensor([0, 7])}),
        (torch.float16, {"softmax": False}), (torch.float32, {"softcap": 2.0, "row_reduction": "mean", "spans": ()}),
        (torch.float32, {"head_reduction": "none", "lse": torch.zeros(2, 4, 3)}),
        (torch.float32, {"weights": torch.ones(4), "positions": torch.arange(3).expand(2, 3)}),
    ],
    ids=str,
)  # fmt: skip
def test_schema_gradient_and_fake_tensors_pass_opcheck(dtype, changed):
    query, key = inputs(dtype=dtype)
    strided = key.transpose(1, 2).contiguous().transpose(1, 2)
    values = operands(query.requires_grad_(), strided.requires_grad_(), **changed)
    torch.library.opcheck(OPERATOR, values, test_utils=CHECKS)


# Tracing with symbolic sizes takes seconds and is the same in every dtype: each option is in one of these.
@pytest.mark.parametrize(
    "changed",
    [
        {"lens": torch.tensor([0, 7]), "head_reduction": "none", "lse": torch.zeros(2, 4, 3)},
        {"softmax": False, "softcap": 2.0, "row_reduction": "mean", "spans": ()},
        {"softcap": 2.0, "weights": torch.ones(4), "positions": torch.arange(3).expand(2, 3)},
    ],
    ids=["lens, lse", "logits", "weights, positions"],
)
def test_sizes_may_be_symbols_forwards_and_backwards(changed):
    leaves = [x.requires_grad_() for x in inputs(dtype=torch.float32)]
    torch.library.opcheck(OPERATOR, operands(*leaves, **changed), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("rows, length", [(0, 9), (3, 0)])
def test_empty_tensors_pass_opcheck(rows, length):
    torch.library.opcheck(OPERATOR, operands(*inputs(rows, length, dtype=torch.float32), spans=((0, length),)))


MASKS = {
    "all": {},
    "causal": {"q_positions": torch.tensor([0, 4, 8]), "causal": True},
    "a sample without keys": {"kv_lens": torch.tensor([0, 5])},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"key_spans": [(0, 2), (5, 9), (1, 6)]}, {"softcap": 1.3}, {"softmax": False, "softcap": 0.7},
        {"softmax": False, "row_reduction": "mean"}, {"head_reduction": "none", "row_reduction": "sum"},
        {"head_reduction": "kv_group"}, {"key_spans": [[(0, 2)], [(3, 9)]]},
    ],
    ids=str,
)  # fmt: skip
def test_gradients_of_query_and_key_equal_finite_differences(arguments, mask, monkeypatch):
    monkeypatch.setattr(backward, "KEYS_AT_LEAST", 4)  # several blocks of keys
    monkeypatch.setattr(backward, "BLOCK_ELEMENTS", 1)
    leaves = [x.requires_grad_() for x in inputs()]
    # Along random directions; along each by itself in the first case, which has blocks, spans that overlap and a mask.
    everywhere = (arguments, mask) == ({"key_spans": [(0, 2), (5, 9), (1, 6)]}, "causal")
    rows = functools.partial(attention_rows, **MASKS[mask], **arguments)
    torch.autograd.gradcheck(lambda q, k: rows(q, k).rows, leaves, fast_mode=not everywhere)


@pytest.mark.parametrize("softmax", [True, False])
def test_gradients_of_lse_and_weights_equal_finite_differences(softmax):
    query, key, lse, weights = (
        *inputs(),
        torch.full((2, 4, 3), 1.5, dtype=torch.float64),
        torch.tensor([0.5, -1, 2, 0], dtype=torch.float64),
    )
    leaves = [x.requires_grad_() for x in (query, key, weights)]
    torch.autograd.gradcheck(
        lambda q, k, w: attention_rows(q, k, head_reduction=w, softmax=softmax).rows, leaves, fast_mode=True
    )
    if softmax:
        leaves = [query, key, lse.requires_grad_()]
        torch.autograd.gradcheck(lambda q, k, given: attention_rows(q, k, lse=given).rows, leaves, fast_mode=True)
        both = functools.partial(attention_rows, return_lse=True, key_spans=[(2, 7)])
        torch.autograd.gradcheck(lambda q, k: both(q, k), [query, key], fast_mode=True)


def test_gradients_of_no_rows_are_zeros():
    query, key = inputs(rows=0)
    weights = torch.rand(4, dtype=torch.float64)
    for x in (query, key, weights):
        x.requires_grad_()
    attention_rows(query, key, head_reduction=weights, row_reduction="sum").rows.sum().backward()
    assert query.grad.shape == query.shape and not key.grad.any() and not weights.grad.any()


def test_a_second_derivative_is_refused_rather_than_left_out():
    query, key = (x.requires_grad_() for x in inputs())
    loss = attention_rows(query, key).rows.square().sum() + query.pow(3).sum()
    with pytest.raises(RuntimeError, match="attention_rows differentiates once"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_weights_are_not_printed_which_would_wait_for_the_device(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda *_, **__: pytest.fail("a tensor was printed"))
    query, key = inputs()
    weights = torch.rand(4, dtype=torch.float64, requires_grad=True)
    attention_rows(query, key, head_reduction=weights).rows.sum().backward()


def test_what_hidden_keys_hold_reaches_no_gradient():
    query, key = inputs()
    key[:, :, 5:] = torch.nan
    leaves = [query.requires_grad_(), key.requires_grad_()]
    for arguments in ({}, {"softmax": False}, {"softcap": 2.0}):
        rows = attention_rows(*leaves, kv_lens=torch.tensor([5, 5]), **arguments).rows
        for gradient in torch.autograd.grad(rows[..., :5].square().sum(), leaves):
            assert gradient.isfinite().all() and (gradient != 0).any()


def test_one_compilation_serves_every_length_span_and_number_of_rows_and_gives_the_eager_bits():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(query, key, positions, stop):
        return attention_rows(query, key, key_spans=[(2, stop)], q_positions=positions, causal=True, return_lse=True)

    for rows, length in ((3, 40), (5, 57), (7, 90)):
        query, key = inputs(rows, length, 32, torch.float32)
        positions = torch.arange(rows) * 9
        arguments = {"key_spans": [(2, length - 3)], "q_positions": positions, "causal": True, "return_lse": True}
        want, got = attention_rows(query, key, **arguments), compiled(query, key, positions, length - 3)
        assert torch.equal(got.rows, want.rows) and torch.equal(got.lse, want.lse)
    assert counter.frame_count == 1
    targets = [node.target for graph in counter.graphs for node in graph.graph.nodes]
    assert sum(target in (OPERATOR, OPERATOR.overloadpacket) for target in targets) == 1


@pytest.mark.parametrize("accumulate", [False, True])
def test_compiled_calls_write_out_and_keep_a_given_lse(accumulate):
    query, key = inputs(dtype=torch.float32)
    lse = torch.full((2, 4, 3), 2.0)
    want = attention_rows(query, key, lse=lse, softcap=3.0).rows

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(query, key, out):
        return attention_rows(
            query, key, lse=lse, softcap=3.0, out=out, accumulate=accumulate, return_lse=True, head_reduction=[0.25] * 4
        )

    out = torch.ones(2, 3, 9)
    rows, returned = compiled(query, key, out)
    torch.testing.assert_close(out, want + 1 if accumulate else want, rtol=1e-6, atol=1e-7)
    assert torch.equal(rows, out) and torch.equal(returned, lse)


def test_a_compiled_call_refuses_a_backend_that_cannot_serve_it():
    compiled = torch.compile(lambda q, k: attention_rows(q, k, backend="triton").rows, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="query is on the CPU"):
        compiled(*inputs(dtype=torch.float32, depth=32))


def test_a_compiled_call_differentiates():
    query, key = (x.requires_grad_() for x in inputs())
    compiled = torch.compile(lambda q, k: attention_rows(q, k).rows.square().sum(), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(query, key), (query, key))
    want = torch.autograd.grad(attention_rows(query, key).rows.square().sum(), (query, key))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "head_reduction, row_reduction", [*itertools.product(["mean", "none", "kv_group"], [None, "sum"])]
)
def test_fake_tensors_take_the_shape_that_real_ones_take(head_reduction, row_reduction):
    arguments = {"head_reduction": head_reduction, "row_reduction": row_reduction, "key_spans": [[(0, 2)], [(1, 8)]]}
    real = attention_rows(*inputs(), return_lse=True, **arguments)
    with FakeTensorMode() as mode:
        fake = attention_rows(*(mode.from_tensor(x) for x in inputs()), return_lse=True, **arguments)
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


def test_eager_calls_without_gradients_do_not_pass_the_dispatcher(monkeypatch):
    seen = []

    class Operators(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    ran = []
    real = api.run
    monkeypatch.setattr(api, "run", lambda name, *args: (ran.append(name), real(name, *args))[1])
    query, key = inputs()
    with Operators():
        attention_rows(query, key)
        assert ran == ["torch"] and OPERATOR not in seen
        attention_rows(query.requires_grad_(), key)
    assert OPERATOR in seen
