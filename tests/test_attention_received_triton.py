"""The Triton kernels of attention_received, interpreted on the CPU, against the columns of the matrix in float64."""

import re

import pytest
import torch

pytest.importorskip("triton")

from hide_kernels import attention_received, explain
from hide_kernels.attention_received import triton_configs, triton_launch
from hide_kernels.attention_rows import triton_launch as rows_launch
from hide_kernels.testing.cases import RECEIVED_CASES, RECEIVED_SERVING_CASES, Case, ServingCase, received_error_of
from hide_kernels.testing.interpreter import interpreted

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with interpreted():
        yield


@pytest.fixture
def launched(monkeypatch):
    """Names and grids of the kernels that ran."""
    names = []
    real = triton_launch.Launch.run

    def record(launch):
        names.append((re.sub(r".* (\w+)\(.*", r"\1", launch.kernel.fn.__name__), launch.grid))
        real(launch)

    monkeypatch.setattr(triton_launch.Launch, "run", record)
    return names


# float32 takes its products in slices, in tiles of their own.
SLICED = {
    "plain", "group of 7", "head size 40", "one key", "causal, mean", "causal, queries in no order, mean", "every mask",
    "spans per sample, max", "weights", "softcap, causal", "scores of ten thousand", "packed, causal, mean",
}  # fmt: skip
EVERY = [*RECEIVED_CASES, *RECEIVED_SERVING_CASES]
KINDS = [(case, torch.bfloat16) for case in EVERY] + [(case, torch.float32) for case in EVERY if case.name in SLICED]
KINDS += [(case, torch.float16) for case in EVERY if case.name in ("plain", "head size 80")]


@pytest.mark.parametrize("case, dtype", KINDS, ids=lambda value: getattr(value, "name", str(value)))
def test_every_kind_of_call_is_within_budget_of_float64(case, dtype, launched):
    assert max(received_error_of(case, dtype, "cpu", backend="triton")) <= 1
    assert {"receive", "join_heads"} <= {name for name, _ in launched}


@pytest.mark.parametrize("family", ["mma", "wgmma", "tcgen05"])
def test_every_entry_of_the_table_of_tiles_gives_the_columns_of_float64(family, monkeypatch, launched):
    capability = {"mma": (8, 0), "wgmma": (9, 0), "tcgen05": (10, 0)}[family]
    monkeypatch.setattr(rows_launch, "INTERPRETED", rows_launch.Card(capability, 100))
    used = set()
    choose = triton_launch.receive_config
    monkeypatch.setattr(triton_launch, "receive_config", lambda *of: used.add(choose(*of)) or choose(*of))
    mean = {"q_positions": torch.arange(150), "causal": True, "reduction": "mean"}
    for length in (60, 150):
        dense = Case("tile", batch=1, heads=2, kv_heads=1, rows=150, length=length, depth=80, arguments=mean)
        assert max(received_error_of(dense, torch.bfloat16, "cpu", backend="triton")) <= 1
    windows = ServingCase("tile, windows", heads=2, depth=72, rows_of=(60, 33), keys_of=(60, 33), arguments={
        "max_seqlen_k": 60,
    })  # fmt: skip
    assert max(received_error_of(windows, torch.bfloat16, "cpu", backend="triton")) <= 1
    assert used == {config for (of, _), config in triton_configs.RECEIVE.items() if of == family}


@pytest.mark.parametrize("arguments", [{}, {"q_positions": torch.arange(301), "causal": True}], ids=["all", "causal"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_queries_are_split_over_programs_where_few_keys_are_asked_for(reduction, arguments, launched):
    case = Case("split", batch=1, heads=2, kv_heads=1, rows=301, length=301, depth=32, arguments={
        "reduction": reduction, "key_spans": [(40, 77), (290, 301)], **arguments,
    })  # fmt: skip
    assert max(received_error_of(case, torch.float16, "cpu", backend="triton")) <= 1
    assert dict(launched)["receive"][1] > 2


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_a_program_that_takes_many_tiles_of_queries_masks_both_ends(reduction, launched, monkeypatch):
    monkeypatch.setattr(rows_launch, "INTERPRETED", rows_launch.Card((8, 0), 1))
    window = {"q_positions": torch.arange(301), "causal": True, "window": 190, "key_spans": [(100, 130)]}
    for arguments in (window, {}):
        case = Case("many tiles", batch=1, heads=2, kv_heads=1, rows=301, length=301, depth=32, arguments={
            "reduction": reduction, **arguments,
        })  # fmt: skip
        assert max(received_error_of(case, torch.float16, "cpu", backend="triton")) <= 1
        assert dict(launched)["receive"][1] < 4


def test_a_query_with_an_infinite_lse_gives_nothing_and_is_not_counted(launched):
    query, key, _ = Case("infinite", heads=2, kv_heads=1, rows=70).inputs(torch.float16)
    for reduction in ("sum", "mean", "max"):
        lse = attention_received(query, key, return_lse=True, backend="triton").lse
        lse[:, :, 40:50], lse[:, :, 50:] = torch.inf, -torch.inf
        launched.clear()
        got = attention_received(query, key, reduction=reduction, lse=lse, backend="triton").received
        assert [name for name, _ in launched] == ["receive", "join_heads"]
        want = attention_received(query[:, :, :40], key, reduction=reduction, backend="torch").received
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_out_may_be_strided_and_accumulates_without_touching_anything_else():
    query, key, _ = Case("out", rows=20).inputs(torch.float16)
    arguments = {"key_spans": [[(0, 40)], [(1, 61)]], "head_reduction": "kv_group", "backend": "triton"}
    want = attention_received(query, key, **arguments).received
    wide = torch.full((2, 4, 60, 3), 7.0)
    out = wide[:, 1:3, :, 1]
    assert attention_received(query, key, out=out, **arguments).received is out
    assert torch.equal(out, want) and (want[0, :, 40:] == 0).all()
    attention_received(query, key, out=out, accumulate=True, **arguments)
    assert torch.equal(out, want + want)
    wide[:, 1:3, :, 1] = 7.0
    assert (wide == 7).all()


def test_a_sample_has_the_same_bits_alone_in_a_batch_and_again():
    query, key, _ = Case("batch", batch=3, heads=2, kv_heads=1, rows=70, depth=32).inputs(torch.float16)
    arguments = {"backend": "triton", "return_lse": True, "reduction": "mean", "causal": True,
                 "q_positions": torch.arange(69, 139)}  # fmt: skip
    together, again = (attention_received(query, key, **arguments) for _ in range(2))
    assert torch.equal(together.received, again.received) and torch.equal(together.lse, again.lse)
    for sample in range(3):
        alone = attention_received(query[sample : sample + 1], key[sample : sample + 1], **arguments)
        assert torch.equal(alone.received[0], together.received[sample])


def test_64_bit_offsets_give_the_same_bits_and_rows_that_are_not_aligned_are_read_in_place(monkeypatch):
    query, key, _ = Case("offsets", heads=2, kv_heads=1, rows=40).inputs(torch.float16)
    want = attention_received(query, key, backend="triton").received
    odd = torch.full((2, 1, 139, 67), torch.nan, dtype=torch.float16)
    odd[..., 1:65] = key
    seen = []
    real = triton_launch.Launch.run
    note = ("ALIGN", "WIDE")
    monkeypatch.setattr(
        triton_launch.Launch, "run",
        lambda launch: (seen.append(tuple(launch.arguments.get(name) for name in note)), real(launch)),
    )  # fmt: skip
    got = attention_received(query, odd[..., 1:65], backend="triton").received
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    assert (1, False) in seen
    monkeypatch.setattr(rows_launch, "WIDE_FROM", 0)
    assert torch.equal(attention_received(query, key, backend="triton").received, want)
    assert (8, True) in seen


def test_no_queries_no_keys_and_no_columns():
    query, key, _ = Case("empty").inputs(torch.float16)
    for reduction in ("sum", "mean", "max"):
        arguments = {"reduction": reduction, "backend": "triton"}
        assert attention_received(query, key, key_spans=[], **arguments).received.shape == (2, 0)
        assert (attention_received(query[:, :, :0], key, **arguments).received == torch.zeros(2, 139)).all()
        received, lse = attention_received(query, key[:, :, :0], return_lse=True, **arguments)
        assert received.shape == (2, 0) and (lse == -torch.inf).all()


def test_what_cannot_be_served_is_refused_by_name_and_falls_back_without():
    query, key = torch.zeros(1, 4, 2, 20), torch.zeros(1, 2, 3, 20)
    with pytest.raises(ValueError, match="'triton' cannot serve this call of attention_received: head size 20"):
        attention_received(query, key, backend="triton")
    assert explain("attention_received", query=query, key=key).chosen == "torch"
    short = torch.zeros(1, 1, 1, 64, dtype=torch.float16)
    long = short.expand(1, 28, 1 << 17, 64)
    assert explain("attention_received", query=long, key=short.expand(1, 4, 1 << 17, 64)).chosen == "triton"
    refused = explain("attention_received", query=long, key=short)
    assert refused.chosen == "torch" and "is more than 65535 tiles of rows" in str(refused)
