"""What the kernels of token_maps compile to for cards that are not here."""

import pytest
import torch

pytest.importorskip("triton")

from hide_kernels.testing.offline import compilations, planned_maps


def test_nothing_recompiles_for_sizes_strides_numbers_or_sigma():
    launches = planned_maps((95, 170))
    launches += planned_maps((1, 1), rows=1, prior_rows=0, sigma=0.0)
    launches += planned_maps((32, 64), (1, 7), (16, 16), rows=64, prior_rows=16, sigma=16.0, strided=True)
    launches += planned_maps(*[(37, 53)] * 17, rows=200, prior_rows=1, sigma=1000.0)
    assert compilations(launches, (9, 0)) == 4


def test_another_dtype_is_one_more_variant_of_the_kernel_that_reads_it():
    assert compilations(planned_maps((95, 170)) + planned_maps((95, 170), dtype=torch.float16), (9, 0)) == 5
