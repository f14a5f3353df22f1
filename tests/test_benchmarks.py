"""The benchmarks' own parts: baselines that say what they claim, a gate that closes, a result that can be read."""

import contextlib
import dataclasses
import functools
import json
import re
import runpy
import subprocess
import sys
import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import (
    attention_received,
    cpu,
    end_to_end,
    gpu,
    measure,
    measured_memory,
    real_weights,
    regions_to_collage,
    render,
    rows_to_pixel_values,
    shared_prefix,
    smaller_cards,
    token_maps,
    window_scores,
)
from benchmarks import attention_rows as operator
from hide.engine import kv_cache
from hide.engine.prefix import Branch
from hide.methods.hide import method
from hide.profiling.runs import Settings
from hide.session import ImageSession
from hide_kernels import explain
from hide_kernels.attention_rows import torch_blocked
from hide_kernels.testing.cases import RECEIVED_CASES, received_error_of

SMALL = operator.Shape("small", 14, 2, 64, 5, 700)
ENVIRONMENT = {"gpu": {"name": "Test Card"}, "cpu": "", "threads": 1, "dirty": False, "torch": "2", "triton": "3",
                   "python": "3.11", "git": "0123456789", "time": "2026-01-02T03:04:05"}  # fmt: skip


@pytest.mark.parametrize("baseline", [operator.published_loop, operator.repeated_keys, operator.grouped])
def test_a_baseline_computes_the_rows_that_ours_is_compared_on(baseline):
    query, key = SMALL.inputs(torch.float32, "cpu")
    torch.testing.assert_close(baseline(query, key).double(), operator.oracle(query, key), rtol=1e-5, atol=1e-8)


def test_the_calls_for_a_batch_of_requests_give_the_same_rows():
    calls, want, plain = operator.serving_calls((70, 301, 16), torch.float32, "cpu", SMALL, block_size=16)
    assert len(calls) == 4 and want[:5, 70:].abs().max() == 0 < want[:5, :70].min()
    for rows in (*(call() for call in calls.values()), plain):
        torch.testing.assert_close(rows.double(), want, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line_and_an_exit_code():
    pytest.importorskip("triton")
    module = "benchmarks.tune_attention_rows"
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    # Packages that are imported may have something to say too.
    assert "needs a CUDA device" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.filterwarnings("ignore:'benchmarks.gpu' found in sys.modules:RuntimeWarning")
def test_without_a_gpu_all_benchmarks_are_one_line_and_an_exit_code(monkeypatch, capfd):
    """As `python -m` runs it, in this process: a fresh one would import everything once more."""
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
    assert ended.value.code == 2
    assert capfd.readouterr() == ("", "benchmarks.gpu needs a CUDA device, and PyTorch sees none\n")


def test_the_gate_names_the_calls_that_a_broken_implementation_gets_wrong(monkeypatch):
    assert list(operator.failures("cpu")) == []
    real = torch_blocked.visible_keys
    monkeypatch.setattr(torch_blocked, "visible_keys", lambda *a: None if a[0].causal else real(*a))
    broken = list(operator.failures("cpu"))
    assert ("causal, float32", "torch") in [(failure.case, failure.backend) for failure in broken]
    assert all("causal" in failure.case or "mask" in failure.case for failure in broken)
    # No figure is of a call with a mask.
    assert not any(failure.figures for failure in broken)


def test_figures_of_rows_rest_on_the_cases_of_their_layout(monkeypatch):
    def wrong_at(name):
        monkeypatch.setattr(operator, "error_of", lambda case, *a, **k: (9.0 if case.name == name else 0.1, 0.1))
        return {failure.figures for failure in operator.failures("cpu")}

    assert wrong_at("one key") == wrong_at("head size 128") == {("dense",)}
    assert wrong_at("packed") == {("packed",)} and wrong_at("paged, pages of one key") == {("paged",)}
    assert wrong_at("head size 40") == wrong_at("softcap") == wrong_at("paged, heads first, causal") == {()}
    assert wrong_at("no such case") == set()


@pytest.mark.parametrize("layout", ["dense", "packed", "paged"])
def test_only_figures_of_the_layout_that_failed_are_withheld(layout, monkeypatch):
    monkeypatch.setattr(operator, "shapes", lambda: [SMALL])
    monkeypatch.setattr(operator, "REQUESTS", (70, 33))
    monkeypatch.setattr(operator, "cuda_times", times_on_the_host)
    rows = list(operator.gpu_table(60, "cpu", {layout}))
    left_out = [row["variant"] for row in rows if row.get("skipped") == measure.WITHHELD]
    assert left_out and all("attention_rows" in name for name in left_out)
    assert {operator._rests_on(name) for name in left_out} == {layout}
    others = [row["variant"] for row in rows if row["variant"] not in left_out]
    assert sum(name.startswith("attention_rows") for name in others) == 6 - len(left_out)
    assert "repeated keys (b)" in others and not any(
        "skipped" in row or "failed" in row for row in rows if row["variant"] in others
    )


def test_what_fails_is_named_and_gets_no_figures_and_takes_no_other_with_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {**ENVIRONMENT})
    monkeypatch.setattr(gpu, "gpu_state", lambda: {"clocks.sm": "1980"})
    wrong = measure.Failure("plain, bfloat16", "triton", "3.00 times the budget", ("dense",))
    monkeypatch.setattr(operator, "failures", lambda device: [wrong])
    rest = {**dataclasses.asdict(SMALL), "variant": "attention_rows", "skipped": measure.WITHHELD}
    monkeypatch.setattr(
        operator, "gpu_table", lambda seconds, device, withheld: [rest] if withheld == {"dense"} else []
    )
    monkeypatch.setattr(regions_to_collage, "failures", lambda device: [])
    fast = regions_to_collage.Row("whole", "48", "collage_of_maps", 9.0, 8.0, 10.0, 1000, 5, 1)._asdict()
    monkeypatch.setattr(regions_to_collage, "gpu_table", lambda *given: [fast])
    monkeypatch.setattr(rows_to_pixel_values, "failures", lambda device: [])
    decoded = {**fast, "what": "decode", "largest": 3, "mean": 0.25}
    monkeypatch.setattr(rows_to_pixel_values, "gpu_table", lambda *given: [decoded])
    monkeypatch.setattr(token_maps, "failures", lambda device: [])
    maps = list(token_maps.shape_rows(8, (32, 32), torch.device("cpu")))
    monkeypatch.setattr(token_maps, "gpu_table", lambda *given: maps)
    monkeypatch.setattr(shared_prefix, "failures", lambda device: [])
    shared = shared_prefix.Row("shared prefix (c)", "7B", 1.5, {"prefix": 1.25, "answer": 0.25}, 900)._asdict()
    monkeypatch.setattr(shared_prefix, "gpu_table", lambda *given: [shared])
    monkeypatch.setattr(window_scores, "failures", lambda device: [])
    scores = {"variant": "window_scores", "milliseconds": measure.quantiles([0.25]), "new_bytes": 2_000_000}
    monkeypatch.setattr(window_scores, "gpu_table", lambda *given: [scores])
    monkeypatch.setattr(attention_received, "failures", lambda device: [])
    monkeypatch.setattr(attention_received, "gpu_table", lambda *given: [])
    monkeypatch.setattr(end_to_end, "failures", lambda device: [])
    before = {"what": "8K", "skipped": "no room"}
    monkeypatch.setattr(end_to_end, "gpu_table", lambda *given: (before if i else 1 / 0 for i in (1, 0)))
    monkeypatch.setattr(measured_memory, "failures", lambda device: 1 / 0)
    monkeypatch.setattr(smaller_cards, "failures", lambda device: [])
    monkeypatch.setattr(smaller_cards, "gpu_table", lambda *given: [{"what": "int4 weights", "skipped": "not here"}])
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 1
    (file,) = tmp_path.glob("*.json")
    assert file.name == "gpu-test-card-01234567.json"
    found = json.loads(file.read_text())
    operators = found["operators"]
    assert found["environment"]["gpu after"] == {"clocks.sm": "1980"}
    assert operators["attention_rows"]["failures"] == [json.loads(json.dumps(wrong._asdict()))]
    assert operators["attention_rows"]["table"] == [rest]
    assert operators["regions_to_collage"]["table"] == [fast] and operators["token_maps"]["table"] == maps
    # One that breaks takes no other with it.
    assert operators["end_to_end"]["error"] == "ZeroDivisionError: division by zero"
    assert operators["end_to_end"]["table"] == [before]
    (broken,) = operators["measured_memory"]["failures"]
    assert broken["error"] == "ZeroDivisionError: division by zero" and broken["figures"] == [measure.EVERYTHING]
    assert "table" not in operators["measured_memory"]
    page = file.with_suffix(".md").read_text()
    assert "Ended early: ZeroDivisionError" in page and "8K: no room" in page
    assert "- plain, bfloat16, triton: 3.00 times the budget (dense)" in page
    printed = capsys.readouterr().out
    assert "rows to maps     8 x 32x32" in printed
    assert "attention_rows: checks failed, no speed of dense" in printed and "5 launches, 1 syncs" in printed
    assert operators["rows_to_pixel_values"]["table"] == [decoded]
    assert "3 levels from Pillow, 0.250 on average" in printed
    assert operators["window_scores"]["table"] == [scores]
    assert "0.250 ms (0.250 to 0.250)  new 2.00 MB" in printed
    assert "900 tokens  (prefix 1.250, answer 0.250)" in printed


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """`benchmarks.gpu` with one operator, whose check and rows a test gives; the folder of its results."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {**ENVIRONMENT})
    monkeypatch.setattr(gpu, "gpu_state", dict)
    monkeypatch.setattr(gpu, "DRAWING", 0)
    monkeypatch.setattr(token_maps, "failures", lambda device: [])
    folder = tmp_path / "new" / "out"
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "token_maps", "--seconds", "1", "--out", str(folder)])
    return folder


def entry_in(folder):
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())["operators"]["token_maps"]


def test_a_run_ends_in_its_time_with_the_rows_so_far(alone, monkeypatch):
    def rows(seconds, device, withheld):
        assert 0 < seconds <= gpu.BEGIN
        yield {"what": "first", "skipped": "quick"}
        time.sleep(60)
        yield {"what": "second", "skipped": "late"}

    monkeypatch.setattr(token_maps, "gpu_table", rows)
    begun = time.monotonic()
    assert gpu.main() == 0
    assert 0.9 < time.monotonic() - begun < 10
    entry = entry_in(alone)
    assert entry["table"] == [{"what": "first", "skipped": "quick"}] and entry["cut off"] == "after 1 s"
    assert "Ended early: after 1 s" in next(alone.glob("*.md")).read_text()


def test_a_slow_check_pushes_no_end_and_leaves_what_it_found_and_no_figures(alone, monkeypatch):
    failure = measure.Failure("equal peaks", "cupy", "wrong", ("cupy",))

    def slow(device):
        yield failure
        while True:
            # Whoever catches every exception must not go on.
            with contextlib.suppress(Exception):
                time.sleep(60)

    monkeypatch.setattr(token_maps, "failures", slow)
    monkeypatch.setattr(token_maps, "gpu_table", lambda *given: pytest.fail("measured"))
    begun = time.monotonic()
    assert gpu.main() == 1
    assert 0.4 < time.monotonic() - begun < 10
    entry = entry_in(alone)
    assert entry["failures"][0]["case"] == "equal peaks" and "table" not in entry
    assert entry["skipped"] == "the checks were not done after 0 s"


def test_each_row_is_on_disk_before_the_next_is_measured(alone, monkeypatch):
    def rows(*given):
        for name in ("first", "second"):
            yield {"what": name, "skipped": "quick"}
            assert entry_in(alone)["table"][-1]["what"] == name
        assert not list(alone.glob("*.part"))
        raise KeyboardInterrupt

    monkeypatch.setattr(token_maps, "gpu_table", rows)
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    assert [row["what"] for row in entry_in(alone)["table"]] == ["first", "second"]


def test_where_there_is_no_repository_the_commit_is_what_the_variable_says(monkeypatch):
    monkeypatch.setattr(measure, "_output", lambda *command: None)
    monkeypatch.delenv("HIDE_COMMIT", raising=False)
    assert measure.environment()["git"] is None and measure.environment()["dirty"] is None
    for said, dirty in (("0123abc", False), ("0123abc-dirty", True)):
        monkeypatch.setenv("HIDE_COMMIT", said)
        found = measure.environment()
        assert (found["git"], found["dirty"]) == ("0123abc", dirty)
    monkeypatch.setattr(measure, "_output", lambda *command: "456def" if command[0] == "git" else None)
    assert measure.environment()["git"] == "456def"


def test_times_are_taken_with_clean_and_with_dirty_lines_in_the_l2(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            done.append("event")
            self.at = len(done)

        def elapsed_time(self, stop):
            assert stop.at == self.at + 2
            return 2e-3 if "write" in done[self.at - 2] else 1e-3

    class Other:
        def zero_(self):
            done.append("write")

    monkeypatch.setattr(torch, "zeros", lambda *size, device: Other())
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(torch, "sum", lambda tensor, axis, out: done.append("read"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = measure.cuda_times(lambda: done.append("run"), runs=2, capture=False)
    assert done[3:] == ["read", "event", "run", "event"] * 2 + ["write", "event", "run", "event"] * 2
    assert times["median"] == pytest.approx(1) and times["dirty median"] == pytest.approx(2)
    assert "1.0 us (1.0 to 1.0, dirty L2 2.0)" in measure.spread(times, "us")


def test_the_gate_of_maps_to_boxes_names_the_backend_that_is_wrong(monkeypatch):
    assert list(regions_to_collage.failures("cpu")) == []
    monkeypatch.setattr(regions_to_collage, "_scikit_image", lambda maps: [[] for _ in maps])
    broken = list(regions_to_collage.failures("cpu"))
    name = "scikit-image, map by map"
    assert [str(failure) for failure in broken] == [f"boxes of {n} maps, {name}: wrong boxes" for n in (3, 48)]
    assert all(failure.figures == (f"maps to boxes, {name}",) for failure in broken)
    chosen = explain("regions", maps=torch.ones(1, 3, 3)).chosen
    monkeypatch.undo()
    monkeypatch.setattr(regions_to_collage, "regions", fails_by(chosen, regions_to_collage.regions))
    broken = list(regions_to_collage.failures("cpu"))
    assert {failure.figures for failure in broken} == {(f"maps to boxes, {chosen}", "collage_of_maps")}
    assert "RuntimeError: no kernel image" in broken[0].error
    (row,) = islice(regions_to_collage.gpu_table(60, "cpu", broken[0].figures), 1)
    assert row["implementation"] == "collage_of_maps" and row["skipped"] == measure.WITHHELD


def fails_by(name, real):
    """A backend that breaks, the others as they are."""

    def call(*given, backend=None, **how):
        if backend == name:
            raise RuntimeError("no kernel image")
        return real(*given, backend=backend, **how)

    return call


def test_a_backend_that_breaks_at_a_shape_is_a_row_among_the_others(monkeypatch):
    monkeypatch.setattr(regions_to_collage, "measure", measured_once)
    monkeypatch.setattr(regions_to_collage, "regions", fails_by("cpp", regions_to_collage.regions))
    rows = {row["implementation"]: row for row in islice(regions_to_collage._regions_rows(torch.device("cpu")), 3)}
    assert "RuntimeError: no kernel image" in rows["cpp"]["failed"] and "median" in rows["scipy"]
    assert "no kernel image" in regions_to_collage.line(rows["cpp"])
    assert regions_to_collage.line(rows["cpp"]).startswith("maps to boxes, 8 x 64x64, cpp: ")


def test_the_gate_of_rows_to_pixels_notices_other_values(monkeypatch):
    assert list(rows_to_pixel_values.failures("cpu")) == []
    real = rows_to_pixel_values._scipy_maps
    monkeypatch.setattr(rows_to_pixel_values, "_scipy_maps", lambda rows: real(rows)[:, ::-1].copy())
    (broken,) = list(rows_to_pixel_values.failures("cpu"))
    assert str(broken) == "a 2K picture, the operators: wrong values beside those of the published steps"
    first, *_ = rows_to_pixel_values.gpu_table(0, "cpu", broken.figures)
    assert first == {"what": "rows to pixels", "skipped": measure.NO_TIME}
    monkeypatch.setattr(rows_to_pixel_values, "_whole_rows", lambda device: pytest.fail("measured"))
    first, *_ = islice(rows_to_pixel_values.gpu_table(60, "cpu", broken.figures), 1)
    assert first == {"what": "rows to pixels", "skipped": measure.WITHHELD}


@pytest.mark.parametrize("launches, limit", [(None, 120.0), (9, 3.0)])
def test_rows_to_pixels_have_a_limit_on_each_kind_of_device(launches, limit):
    ours = {"implementation": rows_to_pixel_values.OURS, "launches": launches}
    assert rows_to_pixel_values.within_limit([{**ours, "median": 999 * limit}])
    assert not rows_to_pixel_values.within_limit([{**ours, "median": 1001 * limit}])


def test_the_gate_of_token_maps_names_the_calls_that_a_broken_backend_gets_wrong(monkeypatch):
    assert list(token_maps.failures("cpu")) == []
    monkeypatch.setattr(token_maps, "map_error", lambda case, *a, **k: 1e-3 if case.sigma == 40 else 0.0)
    (broken,) = list(token_maps.failures("cpu"))
    assert str(broken) == "taps far beyond the map, scipy: error 1.0e-03" and broken.figures == ("scipy",)
    (row,) = token_maps.shape_rows(3, (9, 11), torch.device("cpu"), broken.figures)
    assert row["skipped"] == measure.WITHHELD
    monkeypatch.setattr(token_maps, "MAP_ERROR", -1.0)
    (row,) = token_maps.shape_rows(3, (9, 11), torch.device("cpu"))
    assert row["failed"] == "wrong maps" and "scipy: wrong maps" in token_maps.line(row)


def test_an_error_above_the_budget_at_a_measured_shape_gets_no_figures(monkeypatch):
    monkeypatch.setattr(operator, "cuda_times", lambda *a, **k: pytest.fail("measured"))
    want = torch.zeros(3, dtype=torch.float64)
    entry = operator._gpu_entry("attention_rows", lambda: torch.full((3,), 1e-3), want, budget=1e-4)
    assert list(operator._gpu_entry("a baseline", lambda: 1 / 0, want, budget=1e-4)) == ["skipped"]
    assert list(entry) == ["failed"] and "above the budget" in entry["failed"]
    assert "above" in operator._gpu_entry("attention_rows", lambda: torch.full((3,), torch.nan), want, 1e-4)["failed"]


def test_the_cpu_table_compares_time_error_and_memory():
    table = operator.cpu_table(1, SMALL)
    assert {row["variant"] for row in table} >= {"attention_rows", "grouped (c)", "published loop (a)"}
    for row in table:
        assert row["error"] < (1e-7 if row["dtype"] == "float32" or row["variant"] == "attention_rows" else 1e-2)
        assert row["milliseconds"]["p20"] <= row["milliseconds"]["median"] <= row["milliseconds"]["p80"]
    found = cpu.ratios(table, "float32")
    ours, repeated = (
        next(row for row in table if row["dtype"] == "float32" and row["variant"].startswith(name))
        for name in ("attention_rows", "repeated")
    )
    assert found["memory"] == ours["new_bytes"] / repeated["new_bytes"]
    assert operator.line(ours).split()[-2] == f"{ours['new_bytes'] / 1e6:.2f}"


def test_new_memory_counts_what_is_alive_at_once():
    def call():
        large = torch.zeros(1_000_000)
        del large
        return torch.zeros(500_000) + 1

    assert 4_000_000 <= measure.new_memory(call, "cpu") <= 4_010_000


def test_the_state_of_the_card_is_asked_by_its_identity(monkeypatch):
    asked = []

    def output(*command):
        asked.append(command[-1])
        return None if "GPU-" in command[-1] else "570.1, P0, 1980, 2619, 1980, 120.5, 700.00, 41"

    monkeypatch.setattr(measure, "_output", output)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ab-12"))
    state = measure.gpu_state()
    assert asked == ["--id=GPU-ab-12", "--id=0"]
    assert state["driver_version"] == "570.1" and state["power.limit"] == "700.00" and state["clocks.sm"] == "1980"
    monkeypatch.setattr(measure, "_output", lambda *command: None)
    assert measure.gpu_state() == {}


def test_figures_that_json_has_no_word_for_become_text(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    path = measure.write("gpu", {"environment": ENVIRONMENT, "rows": [{"error": float("nan")}, (float("-inf"), 1.5)]})
    assert json.loads(path.read_text())["rows"] == [{"error": "nan"}, ["-inf", 1.5]]


def test_quantiles_are_of_the_samples():
    assert measure.quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "p20": pytest.approx(1.8), "p80": 4.2}


def test_the_gate_of_the_shared_prefix_notices_other_rows_and_replies(monkeypatch):
    monkeypatch.setattr(shared_prefix, "MID", TINY)
    assert list(shared_prefix.failures("cpu")) == []
    rows, reply = ImageSession.attention, Branch.reply
    monkeypatch.setattr(ImageSession, "attention", lambda *a, **k: [of.roll(1, -1) for of in rows(*a, **k)])
    monkeypatch.setattr(Branch, "reply", lambda *a, **k: [0, *reply(*a, **k)[1:]])
    first, second = list(shared_prefix.failures("cpu"))
    assert str(first).startswith("rows, shared prefix (c): they differ by")
    assert str(second).startswith("replies, shared prefix (c): they differ: ")
    assert first.figures == second.figures == shared_prefix.OURS
    monkeypatch.setattr(shared_prefix, "SEVEN_B", TINY)
    monkeypatch.setattr(shared_prefix, "seven_b", lambda device: shared_prefix.model(TINY, device))
    monkeypatch.setattr(shared_prefix, "RUNS", 1)
    rows = list(shared_prefix.gpu_table(60, "cpu", first.figures))
    assert [row["what"] for row in rows if "seconds" in row] == ["plain answer (a)", "published flow (b)"]
    assert [shared_prefix.line(row).split()[-1] for row in rows if "skipped" in row] == ["failed"] * 3


def test_the_shared_prefix_is_judged_per_token_per_question_and_against_the_published_flow():
    def rows(ours, five, published):
        times = {"plain answer (a)": 1.0, "published flow (b)": published, "shared prefix (c)": ours, "five": five}
        tokens = {"shared prefix (c)": 110}
        return [shared_prefix.Row(name, "m", t, {}, tokens.get(name, 100))._asdict() for name, t in times.items()]

    assert shared_prefix.within_limit(rows(1.15, 2.9, 2.4))
    assert not shared_prefix.within_limit(rows(1.17, 2.9, 2.4))
    assert not shared_prefix.within_limit(rows(1.15, 3.1, 2.4))
    assert not shared_prefix.within_limit(rows(1.15, 2.9, 2.2))
    host = {**rows(1.15, 2.5, 2.4)[0], "seconds": 3.0}
    assert shared_prefix.ratios([*rows(1.15, 2.5, 2.4), host])["keys on the host over on the device"] == 1.2


def test_a_result_file_becomes_markdown_and_pictures(tmp_path):
    shape = {"model": "m", "heads": 4, "kv_heads": 2, "depth": 64, "rows": 8}
    times = {"median": 9.0, "p20": 8.0, "p80": 10.0}
    table = [
        {**shape, "keys": keys, "variant": name, "microseconds": times, "graph": True, "error": 1e-7, "new_bytes": 10}
        for keys in (512, 1024)
        for name in ("attention_rows", "other")
    ]
    wrong = measure.Failure("equal peaks", "cupy", "wrong map")._asdict()
    operators = {"attention_rows": {"failures": [], "table": table}, "token_maps": {"failures": [wrong]}}
    path = tmp_path / "gpu-test.json"
    path.write_text(json.dumps({"environment": ENVIRONMENT, "operators": operators}))
    page, *drawn = render.render(path)
    text = page.read_text()
    assert "Test Card" in text and "commit 01234567" in text and "9.0 us (8.0 to 10.0)" in text
    assert "- equal peaks, cupy: wrong map" in text and text.count("attention_rows  ") == 2
    for picture in drawn:
        assert picture.name in text
        with Image.open(picture) as image:
            assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 8
    assert len(drawn) == 2


def test_the_pages_tables_are_those_of_the_newest_results():
    text = render.PAGE.read_text()
    assert render.page(text) == text, "run python -m benchmarks.render"
    with pytest.raises(ValueError, match="0 places for cpu results"):
        render.page("no markers")


def test_the_gate_of_window_scores_notices_other_tokens(monkeypatch):
    assert list(window_scores.failures("cpu")) == []
    real = window_scores.window_scores
    monkeypatch.setattr(window_scores, "window_scores", lambda *a, **k: real(*a, kernel_size=7))
    (broken,) = list(window_scores.failures("cpu"))
    assert broken.error.startswith("a kept token scores ") and broken.figures == ("window_scores",)
    monkeypatch.setattr(window_scores, "inputs", functools.partial(window_scores.inputs, keys=700))
    monkeypatch.setattr(window_scores, "cuda_times", times_on_the_host)
    ours, *others = window_scores.gpu_table(60, "cpu", broken.figures)
    assert ours == {"variant": "window_scores", "skipped": measure.WITHHELD} and all("new_bytes" in x for x in others)
    assert window_scores.line(ours).endswith(measure.WITHHELD)


def test_window_scores_are_judged_by_time_and_memory():
    def table(milliseconds, new_bytes):
        times = (milliseconds, new_bytes), (2.0, 400)
        return [{"milliseconds": {"median": of}, "new_bytes": size} for of, size in times]

    assert window_scores.within_limit(table(2.0, 100))
    assert not window_scores.within_limit(table(2.1, 100))
    assert not window_scores.within_limit(table(2.0, 101))


def test_the_gate_of_attention_received_notices_a_wrong_column(monkeypatch):
    case = RECEIVED_CASES[0]
    monkeypatch.setattr(attention_received, "RECEIVED_CASES", [case])
    monkeypatch.setattr(attention_received, "RECEIVED_SERVING_CASES", [])
    assert list(attention_received.failures("cpu")) == []
    monkeypatch.setattr(
        attention_received, "received_error_of", functools.partial(received_error_of, call=lambda *a, **k: 1 / 0)
    )
    broken = list(attention_received.failures("cpu"))
    assert [failure.error for failure in broken] == ["ZeroDivisionError: division by zero"] * 2
    monkeypatch.setattr(attention_received, "SHAPES", {"cuda": ((4, 2, 32), torch.float32, 70)})
    monkeypatch.setattr(attention_received, "cuda_times", times_on_the_host)
    ours, *others = attention_received.gpu_table(60, "cpu", broken[0].figures)
    assert ours["skipped"] == measure.WITHHELD and "new_bytes" in others[0]
    assert attention_received.line(ours).endswith(measure.WITHHELD)


def test_what_keys_receive_is_judged_by_the_time_of_sdpa_and_the_memory_of_the_matrix():
    def table(milliseconds, new_bytes):
        figures = {
            "attention_received": (milliseconds, new_bytes),
            "SDPA's forward": (2.0, 9),
            "whole matrix": (9, 900),
        }
        return [
            {"variant": name, "causal": causal, "milliseconds": {"median": of}, "new_bytes": size}
            for causal in (False, True)
            for name, (of, size) in figures.items()
        ]

    assert attention_received.within_limit(table(3.0, 18))
    assert not attention_received.within_limit(table(3.1, 18))
    assert not attention_received.within_limit(table(3.0, 19))


def test_the_columns_of_the_whole_matrix_are_those_that_keys_receive():
    for causal in (False, True):
        calls = attention_received.variants(*attention_received.inputs("cpu", (2, 2, 16), torch.float32, 50), causal)
        want = calls.pop("whole matrix")()
        del calls["SDPA's forward"]
        for call in calls.values():
            torch.testing.assert_close(call(), want, rtol=1e-5, atol=1e-6)


def colreduce_on_the_host(query, key, reduction, is_causal):
    """What flash-colreduce returns, (B, H, N), of as many key heads as query heads."""
    assert reduction == "mean" and query.shape == key.shape
    each = [attention_received.eager(query[:, h, None], key[:, h, None], is_causal) for h in range(query.shape[1])]
    return torch.stack(each, 1)


def test_flash_colreduce_gets_what_it_can_take_and_errors_are_to_float64(monkeypatch):
    given = attention_received.inputs("cpu", (6, 2, 16), torch.float32, 50)
    with pytest.raises(ImportError, match=r"pip install flash-colreduce==0\.2\.2"):
        attention_received.colreduce(*given, True)
    monkeypatch.setitem(sys.modules, "flash_colreduce", SimpleNamespace(flash_colreduce=colreduce_on_the_host))
    for causal in (False, True):
        want = attention_received.exact(*given, causal)
        assert want.dtype == torch.float64
        torch.testing.assert_close(want, attention_received.eager(*(x.double() for x in given), causal))
        assert attention_received.error_of(lambda c=causal: attention_received.colreduce(*given, c), want) < 1e-5
        assert attention_received.error_of(lambda w=want: 1.001 * w, want) == pytest.approx(1e-3)
    assert attention_received.error_of(lambda: given[0], want) is None


def test_an_operators_command_keeps_its_result_where_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(attention_received, "failures", lambda device: [])
    monkeypatch.setattr(attention_received, "SHAPES", {"cpu": ((2, 2, 16), torch.float32, 60)})
    monkeypatch.setattr(attention_received, "within_limit", lambda rows: True)
    monkeypatch.setattr(sys, "argv", ["attention_received", "--save"])
    assert measure.alone(attention_received, 1) == 0
    (path,) = tmp_path.glob("attention-received-*.json")
    assert str(path) in capsys.readouterr().out
    page = render.received_section(json.loads(path.read_text()))
    assert page.count("| attention_received |") == 2 and page.count("| whole matrix | causal |") == 1


def test_kept_keys_that_differ_are_counted_and_their_gap_is_measured():
    wanted = [torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0, 0.5]]])]
    assert real_weights.agreement(wanted, wanted, 0.5) == (3, 3, 0.0)
    other = [torch.tensor([[[5.0, 4.0, 2.0, 3.0, 1.0, 0.5]]])]
    same, of, short = real_weights.agreement(other, wanted, 0.5)
    assert (same, of) == (2, 3) and short == pytest.approx(1 / 3)
    assert real_weights.added(real_weights.Kept(1, 2, 0.5), real_weights.Kept(3, 4, 0.25)) == (4, 6, 0.5)


def test_the_page_on_dropped_keys_shows_the_result_that_is_there():
    text, page = (path.read_text() for path in (real_weights.SHOWN, real_weights.PAGE))
    assert real_weights.COMMAND in page and page in text
    assert real_weights.shown(text, page) == text
    with pytest.raises(ValueError, match="0 places"):
        real_weights.shown("no marks", page)


def test_planted_facts_stand_in_prompts_of_one_length_with_their_question_at_the_end():
    class Letters:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    texts = torch.full((12, real_weights.PROMPT), ord("x"))
    prompts, answers = real_weights.planted(Letters(), texts)
    assert prompts.shape == (12, real_weights.PROMPT) and answers.shape == (12, real_weights.DIGITS)
    asked = set()
    for prompt, answer in zip(prompts, answers, strict=True):
        text, code = ("".join(map(chr, x.tolist())) for x in (prompt, answer))
        who = text.rpartition("The secret code of the ")[2].removesuffix(" is ")
        assert text.count(f"The secret code of the {who} is {code}.") == 1
        asked.add((who, code))
    assert len(asked) == 12


def times_on_the_host(call, runs=50, capture=True):
    call()
    return measure.quantiles([1.0])


def measured_once(what, shape, name, run, moved, device):
    run()
    return regions_to_collage.Row(what, shape, name, 2.0, 1.0, 3.0, moved, 5, 1)


TINY = end_to_end.SMALL._replace(
    text={**end_to_end.SMALL.text, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    vision={"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "fullatt_block_indexes": [1]},
    layer=1, image=(12, 14), collage=(5, 8), answer_tokens=2, entity_tokens=2,
)  # fmt: skip


def test_every_operators_gpu_code_runs_on_the_host_and_is_rendered(monkeypatch, tmp_path):
    """All of `benchmarks.gpu` but the gates, which have tests of their own, with small shapes and stubs for what only a
    GPU has."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "environment", lambda: {**ENVIRONMENT})
    monkeypatch.setattr(gpu, "gpu_state", dict)
    for module in gpu.OPERATORS.values():
        monkeypatch.setattr(module, "failures", lambda device: [])
    monkeypatch.setattr(operator, "shapes", lambda: [SMALL, SMALL])
    monkeypatch.setattr(operator, "REQUESTS", (70, 33))
    monkeypatch.setattr(operator, "cuda_times", times_on_the_host)
    monkeypatch.setattr(window_scores, "inputs", functools.partial(window_scores.inputs, keys=700))
    monkeypatch.setattr(window_scores, "cuda_times", times_on_the_host)
    monkeypatch.setattr(attention_received, "SHAPES", {"cuda": ((4, 2, 32), torch.float32, 70)})
    monkeypatch.setattr(attention_received, "cuda_times", times_on_the_host)
    there = SimpleNamespace(flash_colreduce=colreduce_on_the_host)
    monkeypatch.setitem(sys.modules, "flash_colreduce", there)
    monkeypatch.setattr(token_maps, "SHAPES", [(3, (9, 11))])
    monkeypatch.setattr(token_maps, "GRID", (9, 11))
    for name, size in (("8K", (1152, 1024)), ("4K", (800, 1024)), ("2K", (400, 700))):
        monkeypatch.setitem(regions_to_collage.SIZES, name, size)
    boxes = regions_to_collage.PARTS["maps to boxes"]
    monkeypatch.setitem(regions_to_collage.PARTS, "maps to boxes", lambda *given: islice(boxes(*given), 3))
    for module in (regions_to_collage, rows_to_pixel_values, token_maps):
        monkeypatch.setattr(module, "measure", measured_once)
    monkeypatch.setattr(rows_to_pixel_values, "PRIOR", 2)
    monkeypatch.setattr(end_to_end, "LARGE_TOKENS", 400)
    adapter = shared_prefix.model(TINY, "cpu")
    for module in (shared_prefix, end_to_end, measured_memory, smaller_cards):
        monkeypatch.setattr(module, "seven_b", functools.cache(lambda device: adapter))
    for module in (shared_prefix, end_to_end, smaller_cards):
        monkeypatch.setattr(module, "SEVEN_B", TINY)
    monkeypatch.setattr(smaller_cards, "LARGE_TOKENS", 400)
    monkeypatch.setattr(smaller_cards, "RUNS", 1)
    monkeypatch.setattr(end_to_end, "PICTURES", ("8K", "2K"))
    monkeypatch.setattr(end_to_end, "RUNS", 1)
    monkeypatch.setattr(shared_prefix, "RUNS", 1)
    monkeypatch.setattr(measured_memory, "FLOWS", {"published": None, "ours": None})
    # As large as those of `smaller_cards`, whose predictions are then quick.
    monkeypatch.setattr(measured_memory, "SIZES", (400,))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(sys, "argv", ["gpu", "--seconds", "600"])
    code = gpu.main()
    (file,) = tmp_path.glob("*.json")
    operators = json.loads(file.read_text())["operators"]
    assert code == 0, operators
    for name, entry in operators.items():
        assert entry["table"], name
        not_here = ("decode, nvimgcodec", "int4 weights")
        assert not any("skipped" in row for row in entry["table"] if row.get("what") not in not_here), name
    sizes = {row["image_tokens"] for row in operators["end_to_end"]["table"]}
    assert len(operators["end_to_end"]["table"]) == 10 and len(sizes) == 2
    options = [row for row in operators["smaller_cards"]["table"] if "flow" in row]
    assert [row["flow"].removeprefix("ours, ") for row in options] == list(smaller_cards.OPTIONS)[:4]
    for row in (*operators["measured_memory"]["table"], *options):
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.03)
    plain, offloaded, int8, _ = (row["measured"] for row in options)
    assert offloaded <= plain and int8 < plain
    page = file.with_suffix(".md").read_text()
    assert page.count("| HiDe.ask (c) |") == 2 and measured_memory.NOTE in page
    assert {path.name.removeprefix(file.stem) for path in tmp_path.glob("*.png")} == {
        "-latency.png", "-roofline.png", "-end_to_end.png", "-end_to_end-tokens.png"
    }  # fmt: skip


def test_the_gate_of_the_options_notices_lost_keys_and_other_weights(monkeypatch):
    monkeypatch.setattr(smaller_cards, "SMALL", TINY)
    assert list(smaller_cards.failures("cpu")) == []
    quantise = smaller_cards.quantise

    def swapped(model, *how):
        layer = model.get_submodule("model.language_model.layers.1.mlp.down_proj")
        layer.weight.data = layer.weight.data.flip(0)
        quantise(model, *how)

    monkeypatch.setattr(smaller_cards, "quantise", swapped)
    monkeypatch.setattr(kv_cache.DoubleBuffer, "store", lambda *given: None)
    lost, products = list(smaller_cards.failures("cpu"))
    assert lost.error == "other boxes or another answer"
    assert lost.figures == ("keys and values on the host", "int8, keys and values on the host")
    assert str(products).startswith("model.language_model.layers.1.mlp.down_proj, int8: products 1.")
    assert products.figures == ("int8 weights", "int8, keys and values on the host")


def test_flows_that_do_not_fit_have_their_prediction_alone(monkeypatch):
    monkeypatch.setattr(measured_memory, "_room", lambda device: 1.0375e9)
    monkeypatch.setattr(measured_memory, "MARGIN", 1.0)
    monkeypatch.setattr(measured_memory, "FLOWS", {"eager, all layers kept": None, "ours": None})
    rows = {row["flow"]: row for row in measured_memory.whole_table("cpu")}
    ours, kept = rows["ours"], rows["eager, all layers kept"]
    assert ours["measured"] == pytest.approx(ours["predicted"], rel=0.01) and "skipped" not in ours
    assert kept["predicted"] > 0.05e9 and kept["skipped"] == "does not fit into 1.0 GB" and "measured" not in kept
    assert f"predicted {kept['predicted'] / 1e9:7.3f} GB  does not fit" in measured_memory.line(kept)


def test_what_was_measured_before_an_error_is_kept(monkeypatch):
    def breaks(*given):
        raise RuntimeError("CUDA error: no kernel")

    monkeypatch.setattr(measured_memory, "FLOWS", {"published": None, "ours": None})
    real = measured_memory.measure_flow
    monkeypatch.setattr(
        measured_memory, "measure_flow", lambda *given: real(*given) if given[1] == "ours" else breaks()
    )
    ours, published = measured_memory.whole_table("cpu")
    assert "measured" in ours and "RuntimeError: CUDA error: no kernel" in measured_memory.line(published)
    monkeypatch.setattr(end_to_end, "seven_b", lambda device: None)
    monkeypatch.setattr(end_to_end, "Bench", lambda *given: given[3])
    first = {"what": "(a)", "skipped": "no room"}
    monkeypatch.setattr(end_to_end, "PICTURES", ("8K", "2K"))
    large = end_to_end.SIZES["8K"]
    monkeypatch.setattr(end_to_end, "table", lambda size, *given: [first] if size == large else breaks())
    rows = list(end_to_end.gpu_table(60, "cpu"))
    assert rows[0] == first and end_to_end.line(rows[1]) == "2K: RuntimeError: CUDA error: no kernel"


def test_the_gate_of_measured_memory_names_the_flow_that_takes_more(monkeypatch):
    monkeypatch.setattr(measured_memory, "FLOWS", {"ours": None, "published": None})
    real, predicted = measured_memory.predict_flow, {}

    def kept(config, flow, *rest, **how):
        return predicted.setdefault(flow, real(config, flow, *rest, **how))

    monkeypatch.setattr(measured_memory, "predict_flow", kept)
    assert list(measured_memory.failures("cpu")) == []

    def less(config, flow, *rest, **how):
        found = predicted[flow]
        return dataclasses.replace(found, report=dataclasses.replace(found.report, peak=found.report.peak * 9 // 10))

    monkeypatch.setattr(measured_memory, "predict_flow", less)
    first, second = list(measured_memory.failures("cpu"))
    assert [failure.figures for failure in (first, second)] == [("ours",), ("published",)]
    assert "bytes at the peak, predicted" in first.error
    how, end = Settings("float32", attention="sdpa"), time.monotonic() + 60
    given = measured_memory.small_model("cpu", how), [measured_memory.SMALL_WORK], how, end
    rows = {row["flow"]: row for row in measured_memory.compared(*given, withheld=first.figures)}
    assert rows["ours"]["skipped"] == measure.WITHHELD and "measured" in rows["published"]


def test_the_gate_of_whole_questions_notices_boxes_pixels_and_replies(monkeypatch):
    monkeypatch.setattr(end_to_end, "SMALL", TINY)
    monkeypatch.setitem(regions_to_collage.SIZES, "2K", (400, 700))
    assert list(end_to_end.failures("cpu")) == []
    made, reply, rows = method.collages_of_maps, Branch.reply, method.HiDe.attention_rows

    def darker(*given, **how):
        collages, read = made(*given, **how)
        return [one._replace(image=one.image - 1) for one in collages], read

    def third_thing(*given):
        found = rows(*given)
        found.rows[0][-1, 1:4, 14:17] += 9
        return found

    def wrong_with(where, name, broken):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, broken)
            return list(end_to_end.failures("cpu"))

    found = wrong_with(method, "collages_of_maps", darker)
    assert any("HiDe.ask (c): the collage is not that of the references" in str(failure) for failure in found)
    assert not any("box" in failure.error or failure.figures == ("published flow (b)",) for failure in found)
    found = wrong_with(method.HiDe, "attention_rows", third_thing)
    assert any(re.search(r"HiDe.ask \(c\): (no box has the planted|\d boxes, want 2)", str(one)) for one in found)
    (plain, answer) = wrong_with(Branch, "reply", lambda *a, **k: [0, *reply(*a, **k)[1:]])
    assert (plain.case, answer.case) == ("plain answer", "answer")
    assert plain.figures == answer.figures == ("plain and HiDe on one session (c)",)
    (published,) = wrong_with(end_to_end, "search_with_logits", lambda *given: 1 / 0)
    assert published.error.startswith("ZeroDivisionError") and published.figures == ("published flow (b)",)


def test_whole_questions_are_judged_by_a_plain_answer_and_the_published_flow():
    about = {"model": "m", "picture": "8x8", "image_tokens": 4, "stages": {}, "tokens": 1, "peak": 1}

    def rows(alone=1.2, both=1.3, questions=2.1, published=3.0):
        seconds = {"ask (c)": alone, "both (c)": both, "4 (c)": questions, "(a)": 1.0, "(b)": published}
        return [{**about, "what": what, "seconds": spent} for what, spent in seconds.items()]

    assert end_to_end.within_limit(rows())
    for worse in ({"alone": 1.26}, {"both": 1.36, "published": 4.0}, {"questions": 2.3}, {"published": 2.9}):
        assert not end_to_end.within_limit(rows(**worse))
    assert not end_to_end.within_limit([*rows()[:-1], {**about, "what": "(b)", "skipped": "no skimage"}])
