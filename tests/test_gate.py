"""What the check of `attention_rows` lets pass and what not, on every case and type."""

import pytest
import torch

from hide_kernels import attention_rows
from hide_kernels.attention_rows import AttentionRows
from hide_kernels.testing.cases import CASES, SERVING_CASES, error_of

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
EVERY = pytest.mark.parametrize("case", [*CASES, *SERVING_CASES], ids=lambda case: case.name)


def errors(case, dtype, change):
    """Errors of a right call, whose rows and lse are changed thereafter; the call is the one on the host."""

    def changed(*tensors, **arguments):
        rows, lse = attention_rows(*tensors, **arguments)
        return AttentionRows(change(rows), None if lse is None else change(lse))

    return error_of(case, dtype, "cpu", backend="torch", call=changed)


@HALVES
@EVERY
def test_a_result_that_is_wrong_by_a_thousandth_fails_in_16_bits(case, dtype):
    rows, lse = errors(case, dtype, lambda result: result * 1.001)
    assert rows > 1 and (lse > 1 or not case.arguments.get("softmax", True))


@HALVES
@EVERY
def test_a_result_that_is_off_by_one_unit_in_the_last_place_passes_in_16_bits(case, dtype):
    for towards in (torch.inf, -torch.inf):
        goal = torch.tensor(towards)
        assert max(errors(case, dtype, lambda one, goal=goal: torch.where(one.isinf(), one, one.nextafter(goal)))) <= 1
