"""What a card's machine without network or compilers is to be given: `python -m benchmarks.carry FOLDER`. Needs no GPU.

`FOLDER/triton` is a cache for TRITON_CACHE_DIR of every kernel that the checks and tables of `benchmarks.gpu` launch on
sm_90, with `--tests` of the other types in the tests' cases too; `FOLDER/_csrc.abi3.so` the extension with its CUDA
part, where nvcc is; `FOLDER/commit` what HIDE_COMMIT is to be there. Triton looks kernels up by a hash of itself, which
differs between versions and, for its compiled part, between Pythons: run this on the version of Triton that the card's
machine has, and name with `--wheel` the file that was installed there (`make carry` does both). `--check` says there
how many kernels Triton finds: exit code 1 if none, and here if one is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from shutil import copy, which
from typing import Any
from unittest import mock

import torch

from benchmarks import attention_received as received_benchmark
from benchmarks import attention_rows as rows_benchmark
from benchmarks import end_to_end, rows_to_pixel_values, shared_prefix, token_maps, window_scores
from benchmarks.measure import commit
from benchmarks.regions_to_collage import SIZES, synthetic_maps
from hide_kernels import attention_received, attention_rows, backends
from hide_kernels import token_maps as maps_of
from hide_kernels.attention_received import triton_launch as received_launch
from hide_kernels.attention_received.torch_blocked import attention_received_torch
from hide_kernels.attention_rows import triton_launch
from hide_kernels.attention_rows.torch_blocked import attention_rows_torch
from hide_kernels.integrations.transformers import _OwnLse
from hide_kernels.launch import Launch
from hide_kernels.testing.cases import CASES, RECEIVED_CASES, RECEIVED_SERVING_CASES, SERVING_CASES
from hide_kernels.testing.map_cases import MAP_CASES
from hide_kernels.testing.offline import planned, planned_maps, target, variants
from hide_kernels.token_maps import triton_launch as map_launch
from hide_kernels.token_maps.reference import token_maps_reference

CAPABILITY = (9, 0)
# A model with the 7B's attention and little else.
NARROW = end_to_end.SMALL._replace(
    text={**shared_prefix.SEVEN_B.text, "vocab_size": 32_000, "intermediate_size": 64, "num_hidden_layers": 2},
    vision={"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "fullatt_block_indexes": [1]},
    layer=1, answer_tokens=2, entity_tokens=2,
)  # fmt: skip


@contextlib.contextmanager
def noted(launches: list[Launch]) -> Iterator[None]:
    """Inside, calls on the CPU are planned as on the card, whose launches are noted, and computed by the references."""

    def both(plan: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            plan(*arguments)
            return compute(*arguments)

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "_no_triton", lambda tensor, argument: None))
        card = triton_launch.Card.of(CAPABILITY, triton_launch.INTERPRETED.processors)
        stack.enter_context(mock.patch.object(triton_launch, "card_of", lambda device: card))
        # The attention of a card may keep no log-sum-exp; with one there is a kernel less, and none that is another.
        stack.enter_context(mock.patch.object(_OwnLse, "of", lambda own, query: None))
        stack.enter_context(mock.patch.object(Launch, "run", lambda launch: launches.append(launch)))
        for module, name, compute in (
            (triton_launch, "attention_rows_triton", attention_rows_torch),
            (received_launch, "attention_received_triton", attention_received_torch),
            (map_launch, "token_maps_triton", token_maps_reference),
        ):
            stack.enter_context(mock.patch.object(module, name, both(getattr(module, name), compute)))
        yield


def benchmark_calls() -> None:
    """What the checks and tables of `benchmarks.gpu` call on a GPU."""
    case_calls(rows_benchmark.DTYPES["cuda"], (token_maps.DTYPES["cuda"],))
    for shape in rows_benchmark.shapes():
        query, key = shape.inputs(torch.bfloat16, "cpu")
        lse = attention_rows(query, key, return_lse=True).lse
        attention_rows(query, key, lse=lse)
    calls, *_ = rows_benchmark.serving_calls(rows_benchmark.REQUESTS, torch.bfloat16, "cpu")
    for name, call in calls.items():
        if name.startswith("attention_rows"):
            call()
    length = 300  # of whatever length, the kernels are the same
    few = [x[:, :, :length] for x in received_benchmark.inputs("cpu", *received_benchmark.SHAPES["cuda"])]
    for causal in (False, True):
        received_benchmark.variants(*few, causal)["attention_received"]()
    window_scores.variants(*window_scores.inputs("cpu"))["window_scores"]()
    grids = [(rows, grid, token_maps.DTYPES["cuda"]) for rows, grid in token_maps.SHAPES]
    for rows, grid, dtype in grids:
        maps_of([synthetic_maps(token_maps.PRIOR + rows, grid).to(dtype)], prior_rows=token_maps.PRIOR, sigma=3.0)
    maps_of([rows_to_pixel_values.attention()], prior_rows=rows_to_pixel_values.PRIOR, sigma=3.0)
    # Whole questions: the small model of the checks in float32, the 7B's attention in bfloat16.
    for scale, dtype in ((end_to_end.SMALL, torch.float32), (NARROW, torch.bfloat16)):
        adapter = shared_prefix.model(scale, "cpu", dtype)
        bench = end_to_end.Bench(adapter, scale, "cpu", SIZES["2K"], end_to_end.GATE_TOKENS)
        with tempfile.TemporaryDirectory() as folder:
            for way in end_to_end.ways(bench, Path(folder, "none")).values():
                with contextlib.suppress(FileNotFoundError):  # the published flow, behind its rows
                    way()
        shared_prefix.Bench(scale._replace(image=(20, 22), collage=(5, 8)), "cpu", adapter).rows()


def case_calls(row_dtypes: tuple[torch.dtype, ...], map_dtypes: tuple[torch.dtype, ...]) -> None:
    """Every case of the operators in these types."""
    for dtype in row_dtypes:
        for case in [*CASES, *SERVING_CASES]:
            query, key, arguments = case.inputs(dtype)
            attention_rows(query, key, return_lse=arguments.get("softmax", True), **arguments)
        for case in [*RECEIVED_CASES, *RECEIVED_SERVING_CASES]:
            query, key, arguments = case.inputs(dtype)
            attention_received(query, key, return_lse=True, **arguments)
    for dtype in map_dtypes:
        for map_case in MAP_CASES:
            maps_of(map_case.inputs(dtype), prior_rows=map_case.prior_rows, sigma=map_case.sigma)


@functools.cache
def wanted(tests: bool) -> list[Launch]:
    """One launch of every variant of a kernel, in an order that is the same in every process."""
    launches: list[Launch] = []
    with noted(launches), torch.no_grad():
        benchmark_calls()
        if tests:
            halves = (torch.float32, torch.float16)
            case_calls(halves, (*halves, torch.float64))
    return list(dict(zip(variants(launches, CAPABILITY), launches, strict=True)).values())


def compile_one(tests: bool, number: int) -> None:
    launch = wanted(tests)[number]
    with target(CAPABILITY):
        launch.kernel.warmup(grid=launch.grid, **launch.arguments)


@contextlib.contextmanager
def hashed_as(wheel: Path | None) -> Iterator[None]:
    """Inside, Triton takes itself for what is in a wheel: the same version, built for another Python."""
    from triton.runtime import cache

    with contextlib.ExitStack() as stack:
        if wheel is not None:
            place = stack.enter_context(tempfile.TemporaryDirectory())
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(
                    place, [name for name in archive.namelist() if name.endswith((".py", "libtriton.so"))]
                )
            with mock.patch.object(cache, "__file__", f"{place}/triton/runtime/cache.py"):
                key = cache.triton_key.__wrapped__()
            stack.enter_context(mock.patch.object(cache, "triton_key", lambda: key))
        yield


def own_hash() -> str:
    """Of the Triton at hand, in short."""
    from triton.runtime import cache

    return hashlib.sha256(cache.triton_key().encode()).hexdigest()[:12]


def fill(folder: Path, tests: bool, workers: int | None) -> None:
    """The cache of Triton, the commit, and the extension if it can be built."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commit").write_text(f"{commit() or ''}\n", encoding="utf-8")
    (folder / "triton.txt").write_text(f"{own_hash()}\n", encoding="utf-8")
    os.environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_STORE_BINARY_ONLY": "1"}
    number = len(wanted(tests))
    print(f"{number} kernels for sm_{CAPABILITY[0]}{CAPABILITY[1]}", flush=True)
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(compile_one, [tests] * number, range(number)))
    for text in (folder / "triton").glob("*/*.source"):  # a third of the size; it must be there, and nobody reads it
        text.write_text("", encoding="utf-8")
    if which("nvcc") is None:
        print("nvcc is not on PATH: the extension is left out, and CuPy compiles its kernels there")
        return
    build = {"HIDE_KERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*CAPABILITY)}
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", made, "--build-temp", f"{made}/temp"]
        subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ | build, check=True)
        copy(next(Path(made, "hide_kernels").glob("_csrc*.so")), folder)


def check(folder: Path) -> tuple[int, int]:
    """How many of the kernels at the tables' anchor, and how many of those, Triton finds in the folder's cache."""
    from triton import knobs

    found: list[bool] = []
    launches = [*planned(CAPABILITY), *planned_maps((95, 170), dtype=torch.bfloat16)]
    previous = knobs.compilation.listener
    knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
    try:
        with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(folder / "triton")), target(CAPABILITY, object()):
            for launch in launches:
                launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    finally:
        knobs.compilation.listener = previous
    return len(launches), sum(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/card"), help="default build/card")
    parser.add_argument("--tests", action="store_true", help="the types of `pytest -m gpu` too")
    parser.add_argument("--check", action="store_true", help="only say whether Triton here finds what is in the folder")
    parser.add_argument("--wheel", type=Path, help="Triton as it is installed there (default: the one that is here)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    with hashed_as(arguments.wheel):
        if not arguments.check:
            fill(folder, arguments.tests, arguments.workers)
        number, found = check(folder)
        label = folder / "triton.txt"
        made = label.read_text(encoding="utf-8").strip() if label.is_file() else "nothing"
        print(f"Triton {own_hash()} finds {found} of {number} kernels in {folder}, which was made for {made}")
    return int(found < (1 if arguments.check else number))


if __name__ == "__main__":
    sys.exit(main())
