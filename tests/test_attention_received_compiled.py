"""What the Triton kernels of attention_received compile to for cards that are not here, and how often.

Registers, stack and shared memory of all configurations are tested with those of attention_rows, from one report.
"""

import pytest

pytest.importorskip("triton")

from benchmarks import static_report
from hide_kernels.attention_received.triton_configs import receive_config
from hide_kernels.testing.offline import SHARED_LIMIT, compilations, compile_launch, planned_received

HOPPER = (9, 0)


def test_the_report_says_what_a_fresh_compilation_says():
    launch = planned_received(HOPPER, masked=True, reduction="mean")[-2]
    assert static_report.usage(launch, HOPPER) == compile_launch(launch, HOPPER)


def test_without_a_mask_two_programs_share_an_sm_of_a_hopper():
    usage = compile_launch(planned_received(HOPPER)[-2], HOPPER)
    assert usage.wgmma and usage.registers <= 128 and 2 * usage.shared <= SHARED_LIMIT[HOPPER]


def test_nothing_recompiles_for_lengths_spans_strides_or_the_batch():
    base = planned_received(HOPPER, length=5_000, reduction="mean")
    launches = list(base)
    for change in (
        {"length": 4_999}, {"length": 16_384}, {"rows": 700}, {"batch": 3}, {"batch": 16}, {"key_heads_apart": True},
        {"spans": [[(1, 117), (120, 121), (300, 2_000)]]}, {"spans": [[(0, 16)] * 9]}, {"scale": 0.3},
    ):  # fmt: skip
        launches += planned_received(HOPPER, **{"length": 5_000, "reduction": "mean", **change})
    names = {launch.kernel.fn.__name__ for launch in launches}
    assert {"partial_lse", "receive", "join_heads"} <= names
    assert compilations(launches, HOPPER) == len(names)
    assert compilations(launches + planned_received(HOPPER, length=5_000), HOPPER) == len(names) + 2


def test_the_report_has_every_entry_of_the_table_of_tiles():
    for capability in static_report.CARDS:
        launches = [launch for _, launch in static_report.launches(capability) if "BLOCK_R" in launch.arguments]
        tiles = {(x.arguments["BLOCK_N"], x.arguments["BLOCK_R"]) for x in launches if "MAXIMUM" in x.arguments}
        wanted = [receive_config(capability, keys, sliced) for keys in (64, 128) for sliced in (False, True)]
        assert tiles == {(config.keys, config.queries) for config in wanted}
