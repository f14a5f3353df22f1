"""The Triton kernels of attention_rows, interpreted on the CPU, against the float64 textbook expression."""

import itertools
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from hide_kernels import attention_rows, explain
from hide_kernels.attention_rows import triton_configs, triton_launch
from hide_kernels.attention_rows.dispatch import run
from hide_kernels.attention_rows.request import RowOutput, RowRequest
from hide_kernels.attention_rows.validate import validated_request
from hide_kernels.testing.cases import CASES, Case, ServingCase, error_of
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


def rows_of(query, key, **arguments):
    return attention_rows(query, key, backend="triton", **arguments).rows


# float32 takes its products in slices of the head size, in tiles of their own: what meets those is run in it too, and
# what comes after the products is not run twice.
SLICED = {
    "plain", "group of 7, 32 rows", "heads = kv heads", "one kv head, group of 11", "one row", "head size 40", "one key",
    "spans per sample", "every mask", "heads apart", "kv groups", "weights", "rows averaged", "raw scores, softcap",
    "negative scale, softcap", "no scale", "scores of ten thousand",
}  # fmt: skip
KINDS = [(case, torch.bfloat16) for case in CASES] + [(case, torch.float32) for case in CASES if case.name in SLICED]
KINDS += [(case, torch.float16) for case in CASES if case.name in ("plain", "negative scale", "head size 80")]


@pytest.mark.parametrize("case, dtype", KINDS, ids=lambda value: getattr(value, "name", str(value)))
def test_every_kind_of_call_is_within_budget_of_float64(case, dtype, launched):
    rows, lse = error_of(case, dtype, "cpu", backend="triton")
    assert max(rows, lse) <= 1
    assert "reduce_rows" in {name for name, _ in launched}


def test_the_interpreter_contracts_as_a_gpu_does_where_a_launch_allows_it(monkeypatch):
    """Scores of ten thousand: a product that is not rounded here, and was where the lse was made."""
    (case,) = [case for case in CASES if case.name == "scores of ten thousand"]
    options = triton_launch.kernel_options
    monkeypatch.setattr(triton_launch, "kernel_options", lambda tiles: {**options(tiles), "enable_fp_fusion": True})
    triton_launch._planned.cache_clear()
    assert error_of(case, torch.float32, "cpu", backend="triton")[0] > 100
    triton_launch._planned.cache_clear()


class Looked(dict):
    """A table that notes which of its entries were used."""

    def __init__(self, table):
        super().__init__(table)
        self.used = set()

    def __getitem__(self, entry):
        self.used.add(entry)
        return super().__getitem__(entry)


@pytest.mark.parametrize("family", ["mma", "wgmma", "tcgen05"])
def test_every_entry_of_the_tables_of_tiles_gives_the_rows_of_float64(family, monkeypatch, launched):
    capability = {"mma": (8, 0), "wgmma": (9, 0), "tcgen05": (10, 0)}[family]
    monkeypatch.setattr(triton_launch, "INTERPRETED", triton_launch.Card(capability, 100))
    looked = [Looked(triton_configs.LSE), Looked(triton_configs.ROWS)]
    for name, table in zip(("LSE", "ROWS"), looked, strict=True):
        monkeypatch.setattr(triton_configs, name, table)
    triton_configs.lse_config.cache_clear()
    triton_configs.rows_config.cache_clear()
    sizes = {"batch": 1, "heads": 14, "length": 139}
    for rows, depth in ((2, 128), (5, 80), (13, 256), (40, 96)):
        dense = Case(f"{rows} rows", rows=rows, depth=depth, **sizes)
        paged = ServingCase(
            f"{rows} rows, paged", heads=14, depth=depth, rows_of=(rows, 1), keys_of=(139, 20), block_size=16
        )
        for case in (dense, paged):
            assert max(error_of(case, torch.bfloat16, "cpu", backend="triton")) <= 1, case.name
    for table in looked:
        assert table.used == {entry for entry in table if entry[0] == family}


def test_more_programs_than_a_card_runs_at_once_write_all_columns(launched):
    case = Case("waves", batch=1, heads=2, kv_heads=1, rows=1, depth=32, length=9_000)
    assert max(error_of(case, torch.bfloat16, "cpu", backend="triton")) <= 1
    assert dict(launched)["reduce_rows"][0] > triton_launch.INTERPRETED.processors


WINDOW = {"q_positions": torch.tensor([200, 210, 230, 320, 332]), "causal": True, "window": 190}


@pytest.mark.parametrize(
    "arguments, dtype",
    [
        ({}, torch.float16),
        ({"kv_starts": torch.tensor([70, 0]), "kv_lens": torch.tensor([333, 290])}, torch.float16),
        ({"q_positions": torch.tensor([0, 60, 64, 150, 300]), "causal": True}, torch.float16),
        (WINDOW, torch.float16), (WINDOW, torch.float32),
    ],
    ids=["all", "padded", "causal", "window", "window, float32"],
)  # fmt: skip
def test_a_program_that_takes_many_blocks_of_keys_masks_both_ends(arguments, dtype, launched, monkeypatch):
    monkeypatch.setattr(triton_launch, "INTERPRETED", triton_launch.Card((8, 0), 1))
    monkeypatch.setitem(triton_configs.LSE, ("mma", 16), triton_configs.LseConfig(16, 32, 4))
    triton_configs.lse_config.cache_clear()
    case = Case("many blocks", length=333, arguments=arguments)
    assert max(error_of(case, dtype, "cpu", backend="triton")) <= 1
    triton_configs.lse_config.cache_clear()
    assert 333 / launched[0][1][0] > 3 * 32


def test_an_address_outside_the_tensors_is_noticed():
    query, key, _ = Case("outside").inputs(torch.float16)
    out = torch.zeros(2, 5, 139)
    with pytest.raises(IndexError, match="reduce_rows: addresses lie outside"):
        request = RowRequest.of(
            query, key, spans=[[(0, 200)]] * 2, q_positions=None, causal=False, window=None, kv_starts=None,
            kv_lens=None, scale=1.0, softcap=None, softmax=False, head_reduction="mean", row_reduction=None,
        )  # fmt: skip
        triton_launch.attention_rows_triton(query, key, request, RowOutput(out=out))


def test_keys_are_split_over_programs_and_joined_by_a_second_launch(launched):
    query, key, _ = Case("split").inputs(torch.float16)
    rows_of(query, key)
    assert [name for name, _ in launched] == ["partial_lse", "combine_lse", "reduce_rows"]
    assert launched[0][1][0] == 2
    launched.clear()
    rows_of(query, key[:, :, :90])
    assert [name for name, _ in launched] == ["partial_lse", "reduce_rows"]


def test_with_lse_given_the_first_pass_does_not_run(launched):
    query, key, _ = Case("given").inputs(torch.float16)
    rows, lse = attention_rows(query, key, return_lse=True, backend="triton")
    launched.clear()
    shifted = attention_rows(query, key, key_spans=[(5, 60)], lse=lse + 1, return_lse=True, backend="triton")
    assert [name for name, _ in launched] == ["reduce_rows"]
    torch.testing.assert_close(shifted.rows, rows[..., 5:60] / torch.e, rtol=2e-6, atol=1e-9)
    assert torch.equal(shifted.lse, lse + 1)


@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_a_given_lse_of_either_infinity_is_a_row_of_zeros(infinity):
    query, key, _ = Case("infinite").inputs(torch.float16)
    rows, lse = attention_rows(query, key, return_lse=True, head_reduction="none", backend="triton")
    lse[0, 2, 3] = infinity
    again = rows_of(query, key, lse=lse, head_reduction="none")
    assert (again[0, 2, 3] == 0).all()
    rows[0, 2, 3] = 0
    torch.testing.assert_close(again, rows, rtol=2e-6, atol=1e-9)


def test_a_row_that_sees_no_key_is_zeros_with_lse_minus_infinity():
    query, key, _ = Case("blind").inputs(torch.float16)
    rows, lse = attention_rows(query, key, kv_lens=torch.tensor([0, 139]), return_lse=True, backend="triton")
    assert (rows[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert rows[1].sum() == pytest.approx(5, abs=1e-4)


def test_no_rows_no_keys_and_no_columns():
    query, key, _ = Case("empty").inputs(torch.float16)
    assert rows_of(query, key, key_spans=[]).shape == (2, 5, 0)
    assert rows_of(query[:, :, :0], key).shape == (2, 0, 139)
    assert (rows_of(query[:, :, :0], key, row_reduction="sum") == 0).all()
    rows, lse = attention_rows(query, key[:, :, :0], return_lse=True, backend="triton")
    assert rows.shape == (2, 5, 0) and (lse == -torch.inf).all()


@pytest.mark.parametrize("row_reduction", [None, "mean"])
def test_more_rows_than_fit_at_once_go_in_chunks(row_reduction, launched, monkeypatch):
    monkeypatch.setattr(triton_launch, "ROWS_AT_ONCE", 4)
    case = Case("chunks", arguments={"q_positions": torch.tensor([0, 50, 7, 130, 138]), "causal": True})
    case.arguments["row_reduction"] = row_reduction
    rows, lse = error_of(case, torch.float32, "cpu", backend="triton")
    assert rows <= 1 and lse <= 1
    assert [name for name, _ in launched].count("reduce_rows") == 2


@pytest.fixture
def offsets(monkeypatch):
    """ALIGN and WIDE of the launches that ran."""
    seen = []
    real = triton_launch.Launch.run
    monkeypatch.setattr(
        triton_launch.Launch,
        "run",
        lambda launch: (seen.append(tuple(launch.arguments.get(n) for n in ("ALIGN", "WIDE"))), real(launch)),
    )
    return seen


def test_64_bit_offsets_give_the_same_bits(offsets, monkeypatch):
    query, key, _ = Case("offsets").inputs(torch.float16)
    want = rows_of(query, key, row_reduction="sum")
    assert (8, False) in offsets and (8, True) not in offsets
    monkeypatch.setattr(triton_launch, "WIDE_FROM", 0)
    assert torch.equal(rows_of(query, key, row_reduction="sum"), want)
    assert (8, True) in offsets


@pytest.mark.parametrize("arguments", [{}, {"head_reduction": "none"}], ids=["mean", "none"])
def test_rows_that_are_not_aligned_to_16_bytes_are_read_in_place(arguments, offsets):
    query, key, _ = Case("unaligned").inputs(torch.float16)
    odd = torch.full((2, 2, 139, 67), torch.nan, dtype=torch.float16)
    odd[..., 1:65] = key
    rows = rows_of(query, odd[..., 1:65], **arguments)
    torch.testing.assert_close(rows, rows_of(query, key, **arguments), rtol=1e-5, atol=1e-8)
    assert offsets[0] == (1, False) and offsets[-1] == (8, False)


def test_weights_may_have_any_stride_and_are_not_printed(monkeypatch):
    query, key, _ = Case("weights").inputs(torch.float16)
    heads = query.shape[1]
    weights = torch.rand(heads)
    want = rows_of(query, key, head_reduction=weights)
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda *_, **__: pytest.fail("a tensor was printed"))
    assert torch.equal(rows_of(query, key, head_reduction=weights.repeat_interleave(3)[::3]), want)
    one = rows_of(query, key, head_reduction=torch.full((heads,), 0.5))
    assert torch.equal(rows_of(query, key, head_reduction=torch.tensor(0.5).expand(heads)), one)


@pytest.mark.parametrize(
    "given, plain",
    [
        ({"softcap": np.float32(2.5)}, {"softcap": 2.5}),
        ({"softcap": torch.tensor(2.5)}, {"softcap": 2.5}),
        ({"window": np.int64(40)}, {"window": 40}),
        ({"causal": np.bool_(True), "softmax": np.bool_(False)}, {"causal": True, "softmax": False}),
    ],
    ids=["softcap", "softcap, tensor", "window", "truth values"],
)
def test_numbers_of_numpy_are_as_good_as_pythons_and_spoil_no_plan_for_them(given, plain):
    """They are equal and have equal hashes, by which plans are kept."""
    query, key, _ = Case("numbers").inputs(torch.float16)
    positions = {"q_positions": torch.tensor([0, 50, 7, 130, 138])}
    triton_launch._planned.cache_clear()
    first = rows_of(query, key, **positions, **given)
    assert torch.equal(first, rows_of(query, key, **positions, **plain))
    for launch in triton_launch.plan(*planning(query, key, **positions, **given))[0]:
        numbers = [x for x in launch.arguments.values() if not isinstance(x, torch.Tensor | str | None)]
        assert {type(x) for x in numbers} <= {int, float, bool}


def planning(query, key, **arguments):
    """What `plan` takes for a call."""
    request = validated_request(query, key, **arguments)
    return query, key, request, None, torch.zeros(request.shape), False, triton_launch.INTERPRETED


def test_out_may_be_strided_and_accumulates_without_touching_anything_else():
    query, key, _ = Case("out").inputs(torch.float16)
    want = rows_of(query, key, key_spans=[[(0, 40)], [(1, 61)]])
    wide = torch.full((2, 9, 60, 3), 7.0)
    out = wide[:, 2:7, :, 1]
    assert rows_of(query, key, key_spans=[[(0, 40)], [(1, 61)]], out=out) is out
    assert torch.equal(out, want)
    rows_of(query, key, key_spans=[[(0, 40)], [(1, 61)]], out=out, accumulate=True)
    assert torch.equal(out, want + want)
    wide[:, 2:7, :, 1] = 7.0
    assert (wide == 7).all()


def test_a_sample_has_the_same_bits_alone_in_a_batch_and_again():
    query, key, _ = Case("batch", batch=3, heads=6, rows=9, depth=80).inputs(torch.float16)
    arguments = {"backend": "triton", "return_lse": True, "head_reduction": "kv_group"}
    together, again = (attention_rows(query, key, **arguments) for _ in range(2))
    assert torch.equal(together.rows, again.rows) and torch.equal(together.lse, again.lse)
    for sample in range(3):
        alone = attention_rows(query[sample : sample + 1], key[sample : sample + 1], **arguments)
        assert torch.equal(alone.rows[0], together.rows[sample])
        assert torch.equal(alone.lse[0], together.lse[sample])


def test_a_column_has_the_same_bits_in_any_span():
    query, key, _ = Case("columns").inputs(torch.float16)
    whole = rows_of(query, key)
    parts = rows_of(query, key, key_spans=[(100, 139), (0, 100)])
    assert torch.equal(parts, torch.cat([whole[..., 100:], whole[..., :100]], -1))


def test_captured_rows_take_a_query_that_is_not_contiguous_along_its_head():
    query, key, _ = Case("query").inputs(torch.float16)
    flipped = query.transpose(2, 3).contiguous().transpose(2, 3)
    assert flipped.stride(3) != 1
    assert torch.equal(rows_of(flipped, key), rows_of(query, key))


def test_a_tile_spends_no_program_on_samples_or_heads_that_are_not_there(launched):
    query, key, _ = Case("grid", batch=3, heads=4, rows=70).inputs(torch.float16)
    rows_of(query, key, key_spans=[[(0, 130), (138, 139)], [(0, 130), (138, 139)], [(0, 139)]])
    # 128 keys to a block, 32 rows: two blocks and one, for two samples; two blocks for the third.
    assert [grid for name, grid in launched if name == "reduce_rows"] == [(3, 3, 2), (2, 3, 1)]


def test_the_split_of_the_first_pass_fills_the_card_and_does_not_look_at_the_batch():
    config = triton_configs.LSE["wgmma", 128]
    for length, tiles in itertools.product((100, 4_096, 16_384, 65_536, 262_144), (1, 8, 56)):
        keys = triton_configs.chunk_length(length, config.block_n, tiles, config.resident, 132)
        programs = -(-length // keys) * tiles
        slots = 132 * config.resident
        assert keys % config.block_n == 0
        # Long inputs leave less than a third of the last wave idle; short ones take one wave of short chunks.
        waves = -(-programs // slots)
        if length // config.block_n * tiles > 2 * slots:
            assert programs / (waves * slots) > 2 / 3
        else:
            assert waves == 1
    with pytest.raises(TypeError):
        triton_configs.chunk_length(16_384, 128, 8, 2, 132, batch=2)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda q, k: (q.double(), k.double()), "float64 is not served"),
        (lambda q, k: (q[..., :20], k[..., :20]), "head size 20"),
        (lambda q, k: (q.expand(40_000, -1, -1, -1), k.expand(40_000, -1, -1, -1)), "65535 programs"),
    ],
)
def test_a_named_backend_that_cannot_serve_is_refused_and_none_falls_back(change, text):
    query, key = change(torch.zeros(1, 4, 2, 32), torch.zeros(1, 2, 3, 32))
    with pytest.raises(ValueError, match=text):
        attention_rows(query, key, backend="triton")
    assert explain("attention_rows", query=query, key=key).chosen == "torch"


def test_the_registered_operator_runs_the_kernels_and_their_gradients_equal_the_reference(launched):
    query, key, _ = Case("gradients", depth=32, length=70).inputs(torch.float32)
    results = {}
    for backend in ("triton", "torch"):
        leaves = [x.detach().clone().requires_grad_() for x in (query, key)]
        rows, lse = attention_rows(*leaves, softcap=3.0, return_lse=True, backend=backend)
        (rows.square().sum() + lse.sum()).backward()
        results[backend] = [rows.detach(), *(x.grad for x in leaves)]
    assert [name for name, _ in launched][-1] == "reduce_rows"
    for got, want in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_both_backends_are_reached_by_name(launched):
    query, key, _ = Case("names").inputs(torch.float16)
    attention_rows(query, key, backend="torch")
    assert launched == []
    attention_rows(query, key, backend="triton")
    assert launched != [] and run.__module__ == "hide_kernels.attention_rows.dispatch"
