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
