"""What attention_rows refuses, by the name of the argument, and what `explain` says of its backends."""

import re
from types import SimpleNamespace

import pytest
import torch
from test_attention_rows import inputs

from hide_kernels import attention_rows, backends, explain

Q, K = inputs()


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"query": Q.tolist()}, TypeError, "query: got list"),
        ({"query": Q[0]}, ValueError, "query: got shape"),
        ({"query": Q.int()}, TypeError, "query: got torch.int32"),
        ({"key": K.half()}, TypeError, "key: got torch.float16"),
        ({"key": K[:1]}, ValueError, "key: got shape"),
        ({"key": K[..., :3]}, ValueError, "key: got shape"),
        ({"key": K.transpose(2, 3).contiguous().transpose(2, 3)}, ValueError, "unit last stride"),
        ({"query": Q[:, :5]}, ValueError, "multiple of key's 2"),
        ({"key": K.to("meta")}, ValueError, "key: got device meta"),
        ({"key_spans": [(0, 78)]}, ValueError, "key_spans: got \\(0, 78\\)"),
        ({"key_spans": [(5, 4)]}, ValueError, "key_spans"),
        ({"key_spans": [[(0, 1)]]}, ValueError, "one per sample"),
        ({"key_spans": [("a", "b")]}, (TypeError, ValueError), "key_spans"),
        ({"causal": True}, ValueError, "q_positions: got None"),
        ({"window": 0, "q_positions": torch.arange(5)}, ValueError, "window"),
        ({"window": 4.0, "q_positions": torch.arange(5)}, TypeError, "window"),
        ({"q_positions": torch.arange(4)}, ValueError, "q_positions: got shape"),
        ({"q_positions": torch.arange(5.0)}, TypeError, "q_positions: got torch.float32"),
        ({"kv_lens": torch.tensor([1])}, ValueError, "kv_lens: got shape"),
        ({"kv_starts": [1, 2]}, TypeError, "kv_starts: got list"),
        ({"head_reduction": "max"}, ValueError, "head_reduction"),
        ({"head_reduction": [1.0]}, ValueError, "head_reduction"),
        ({"row_reduction": "max"}, ValueError, "row_reduction"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"softcap": float("inf")}, ValueError, "softcap"),
        ({"scale": float("nan")}, ValueError, "scale"),
        ({"scale": float("inf")}, ValueError, "scale"),
        ({"head_reduction": None}, TypeError, "head_reduction: got None"),
        ({"key_spans": (0, 5)}, TypeError, "key_spans: got \\(0, 5\\)"),
        ({"key_spans": [(0, 1.7)]}, TypeError, "pair of ints"),
        ({"key_spans": [(0, 1, 2)]}, TypeError, "pair of ints"),
        ({"lse": torch.zeros(2, 6, 5, dtype=torch.bfloat16)}, TypeError, "lse: got torch.bfloat16"),
        ({"lse": torch.zeros(2, 6, 4)}, ValueError, "lse: got shape"),
        ({"return_lse": True, "softmax": False}, ValueError, "softmax"),
        ({"accumulate": True}, ValueError, "accumulate"),
        ({"out": torch.zeros(2, 5, 76)}, ValueError, "out: got shape"),
        ({"out": torch.zeros(2, 5, 77, dtype=torch.float16)}, TypeError, "out: got torch.float16"),
        ({"backend": "triton9"}, ValueError, "backend: got 'triton9'"),
        ({"backend": "triton"}, ValueError, "backend 'triton' cannot serve this call of attention_rows: query is on"),
        ({"key": K.to(torch.float8_e4m3fn)}, TypeError, "key: got torch.float8_e4m3fn"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        attention_rows(**{"query": Q, "key": K, **arguments})


def test_out_whose_elements_share_memory_is_refused():
    with pytest.raises(ValueError, match=r"out: got strides \(77, 0, 1\), want elements that share no memory"):
        attention_rows(Q, K, out=torch.zeros(2, 1, 77).expand(2, 5, 77))
    assert attention_rows(Q[:, :, :1], K, out=torch.zeros(2, 77).unsqueeze(1)).rows.shape == (2, 1, 77)


def test_out_is_refused_where_gradients_are_recorded():
    with pytest.raises(ValueError, match="out: cannot be written"):
        attention_rows(Q.clone().requires_grad_(), K, out=torch.zeros(2, 5, 77))


def reasons(**arguments):
    explanation = explain("attention_rows", **arguments)
    return explanation.chosen, {backend.name: reason for backend, reason in explanation.candidates}


class OnCuda(SimpleNamespace):
    """What the predicates look at of a CUDA tensor, where there is none."""

    def __init__(self, dtype=torch.bfloat16, shape=(1, 28, 32, 128), device="cuda:0"):
        super().__init__(dtype=dtype, shape=shape, device=torch.device(device))


@pytest.mark.parametrize(
    "card, query, key, chosen, against_triton",
    [
        ((9, 0), OnCuda(), OnCuda(), "triton", None),
        ((8, 0), OnCuda(torch.float16), OnCuda(torch.float16), "triton", None),
        ((7, 5), OnCuda(torch.float16), OnCuda(torch.float16), "torch", "sm_75 is older than sm_80"),
        ((9, 0), OnCuda(torch.float64), OnCuda(torch.float64), "torch", "float64 is not served"),
        ((9, 0), OnCuda(shape=(1, 2, 3, 264)), OnCuda(), "torch", "head size 264"),
        ((9, 0), OnCuda(shape=(1, 2, 3, 36)), OnCuda(), "torch", "head size 36"),
        ((9, 0), OnCuda(), OnCuda(torch.float8_e4m3fn), None, "key is float8_e4m3fn"),
        ((9, 0), OnCuda(), OnCuda(torch.int8), None, "quantised"),
        ((9, 0), OnCuda(device="mps"), OnCuda(), "torch", "need a CUDA device"),
        (None, OnCuda(), OnCuda(), "torch", "no CUDA device"),
    ],
)
def test_explain_answers_for_cards_types_and_sizes(monkeypatch, card, query, key, chosen, against_triton):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: card)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    found, why = reasons(query=query, key=key)
    assert found == chosen
    assert why["triton"] is None if against_triton is None else re.search(against_triton, why["triton"])


def test_explain_answers_without_tensors_and_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reasons() == ("torch", {"triton": "no CUDA device is seen", "torch": None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert reasons()[1]["triton"] == "triton is not installed"


def test_explain_names_the_backend_and_the_reason_against_it():
    found, why = reasons(query=Q, key=K)
    assert found == "torch" and "query is on the CPU" in why["triton"]
    refused = explain("attention_rows", key=torch.zeros(1, dtype=torch.int8))
    assert refused.chosen is None and "quantised" in str(refused)
    with pytest.raises(ValueError, match="operator: got 'rows'"):
        explain("rows")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("row_reduction", [None, "mean", "sum"])
@pytest.mark.parametrize("reduction, heads", [("mean", ()), ("none", (4,)), ("kv_group", (2,)), ([0.5] * 4, ())])
@pytest.mark.parametrize("batch, rows, keys", [(0, 3, 50), (2, 0, 50), (2, 3, 0), (0, 0, 50), (0, 3, 0)])
def test_nothing_has_the_shape_of_something_and_is_zero(batch, rows, keys, reduction, heads, row_reduction, grad):
    """No sample, no row, no key: through the kernels' registration too, where gradients are recorded."""
    query = torch.ones(batch, 4, rows, 32, requires_grad=grad)
    key = torch.ones(batch, 2, keys, 32, requires_grad=grad)
    spans = [(0, keys // 2), (0, keys // 5)]
    own = [[(0, keys // 5)]] * batch
    for given, columns in ((None, keys), (spans, keys // 2 + keys // 5), ([], 0), (own, keys // 5 if batch else 0)):
        got, lse = attention_rows(
            query, key, key_spans=given, head_reduction=reduction, row_reduction=row_reduction, return_lse=True
        )
        assert got.shape == (batch, *heads, *(() if row_reduction else (rows,)), columns)
        assert lse.shape == (batch, 4, rows)
        assert bool((got == 0).all())
