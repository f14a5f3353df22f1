"""attention_rows on packed and paged batches: the reference and, interpreted, the kernels."""

import pytest
import torch

from hide_kernels import attention_rows, attention_rows_workspace, explain
from hide_kernels.testing.cases import SERVING_CASES, ServingCase, error_of

NAMES = [case.name for case in SERVING_CASES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SERVING_CASES, ids=NAMES)
def test_the_reference_equals_each_sequence_alone_in_float64(case, dtype):
    assert max(error_of(case, dtype, "cpu", backend="torch", plain_dtype=torch.float32)) <= 1


class TestKernels:
    """The Triton kernels, interpreted."""

    pytestmark = pytest.mark.filterwarnings(
        "ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
    )

    @pytest.fixture(autouse=True, scope="class")
    def interpreter(self):
        pytest.importorskip("triton")
        from hide_kernels.testing.interpreter import interpreted

        with interpreted():
            yield

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("case", SERVING_CASES, ids=NAMES)
    def test_every_kind_of_call_is_within_budget_of_float64(self, case, dtype):
        errors = error_of(case, dtype, "cpu", backend="triton", plain_dtype=torch.float32)
        assert max(errors) <= (1 if dtype == torch.float32 else 2)
