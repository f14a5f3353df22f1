"""Latency of every operator and of a question, for comparing commits: `pytest benchmarks --benchmark-autosave`.

`pytest benchmarks --benchmark-compare` sets a run beside the last saved one. Runs on the GPU where there is one. Each
result is checked before it is timed; memory is in `extra_info`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import attention_rows as rows_benchmark
from benchmarks import shared_prefix
from benchmarks.measure import new_memory
from benchmarks.regions_to_collage import SIZES, THRESHOLD, WHITE, picture, synthetic_maps
from benchmarks.token_maps import PRIOR, SIGMA
from hide.engine import stock
from hide.session import ImageSession
from hide_kernels import attention_rows, collage_of_maps, pixel_values, token_maps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def timed(benchmark: Any, call: Callable[[], Any]) -> None:
    """Time a call until its result is there; with the memory that it takes."""

    def until_done() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["new_bytes"] = new_memory(call, DEVICE)
    benchmark.pedantic(until_done, rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("keys", [1_024, 16_384])
def test_attention_rows(benchmark: Any, dtype: torch.dtype, keys: int) -> None:
    query, key = rows_benchmark.Shape("7B", 28, 4, 128, 32, keys).inputs(dtype, DEVICE)
    want = rows_benchmark.oracle(query, key)
    assert (attention_rows(query, key).rows - want).abs().max() <= 1e-3 * want.max()
    timed(benchmark, lambda: attention_rows(query, key))


def test_token_maps(benchmark: Any) -> None:
    rows = [synthetic_maps(PRIOR + 48).to(DEVICE)]
    assert bool(token_maps(rows, prior_rows=PRIOR, sigma=SIGMA).valid.all())
    timed(benchmark, lambda: token_maps(rows, prior_rows=PRIOR, sigma=SIGMA))


def test_maps_to_a_collage(benchmark: Any) -> None:
    source, maps = picture(SIZES["8K"]).to(DEVICE), synthetic_maps().to(DEVICE)
    assert collage_of_maps(source, maps, THRESHOLD, fill=WHITE).image is not None
    timed(benchmark, lambda: collage_of_maps(source, maps, THRESHOLD, fill=WHITE))


def test_a_picture_to_pixel_values(benchmark: Any) -> None:
    source = picture((1410, 1446)).to(DEVICE)
    assert pixel_values(source, [(1400, 1456)], **CLIP).shape == (10_400, 1176)
    timed(benchmark, lambda: pixel_values(source, [(1400, 1456)], **CLIP))


def test_a_question_on_an_open_session(benchmark: Any) -> None:
    bench = shared_prefix.Bench(shared_prefix.MID._replace(image=(20, 22), collage=(7, 7)), DEVICE)
    ids = bench.model.input_ids(bench.questions[0], bench.every)
    layers, tokens = [bench.scale.layer], bench.scale.answer_tokens
    (want,) = stock.attention(bench.model, bench.turn, bench.image, layers=layers, causal=False)
    reply = stock.generate_ids(bench.model, ids, bench.every, max_new_tokens=tokens)
    with ImageSession(bench.model, bench.image) as session:

        def ask() -> tuple[torch.Tensor, list[int]]:
            (rows,) = session.attention(bench.turn, layers=layers, causal=False)
            return rows, session.reply(ids, bench.collage, max_new_tokens=tokens)

        rows, said = ask()
        exact = bench.model.dtype == torch.float32
        assert (rows - want).abs().max() <= (1e-3 if exact else 3e-2) * want.max()
        assert said == reply or not exact
        timed(benchmark, ask)
