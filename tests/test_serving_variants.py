"""How many variants of its kernels a serving engine's calls compile: counted without a card."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.carry import noted
from hide_kernels import attention_rows
from hide_kernels.testing.cases import ServingCase
from hide_kernels.testing.offline import compilations

SIZES = {"heads": 28, "kv_heads": 4, "depth": 128, "rows_of": (31, 5), "keys_of": (301, 90)}


def launches_of(**changes):
    """What a call makes of a card; tensors lie as in tests/test_gpu.py."""
    query, key, arguments = ServingCase("compiled", **SIZES | {"block_size": 16} | changes).inputs(torch.bfloat16)
    launches = []
    with noted(launches):
        attention_rows(query, key, **arguments)
    return launches


def test_lengths_tables_and_block_sizes_compile_once():
    base = launches_of()
    assert compilations(base, (9, 0)) == len(base) == 3
    others = launches_of(block_size=32, rows_of=(20, 20), keys_of=(129, 200))
    others += launches_of(block_size=256, rows_of=(20,) * 3, keys_of=(500, 3, 77))
    assert compilations(base + others, (9, 0)) == 3


def test_another_bucket_of_rows_is_one_more_variant():
    """Buckets end at 16: 15 rows with one to spare are 16."""
    base = launches_of()
    assert compilations(base + launches_of(rows_of=(15, 5)), (9, 0)) == 4
