"""The first runs on a machine with a card, as far as one without a card can try them: what is carried, and the script."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from benchmarks import carry, gpu
from hide_kernels import attention_rows
from hide_kernels.integrations.transformers import capture_attention
from hide_kernels.launch import Launch, _hash_in_order
from hide_kernels.testing.cases import CASES, RECEIVED_CASES
from hide_kernels.testing.offline import planned, planned_maps

ROOT = Path(__file__).parents[1]
# In place of Python and compute-sanitizer: says how it is called, an argument a line, and what it has been given.
STUB = """#!/bin/sh
{ echo "CALL $(basename "$0")"; printf '%s\\n' "$@"; echo "CACHE $TRITON_CACHE_DIR"; echo "COMMIT $HIDE_COMMIT"
  echo "PATH $PYTHONPATH"; } >>"$CALLS"
echo "said by $2"
case "$*" in *"$SLOW"*) sleep 60 ;; esac
exit ${CODE:-0}
"""

needs_shell = pytest.mark.skipif(os.name == "nt" or not shutil.which("timeout"), reason="needs a shell and timeout")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the script beside stubs of what it calls; a function that runs it, and returns what ran and its calls."""
    root, tools = tmp_path / "a checkout", tmp_path / "tools"
    for folder in (root / "benchmarks", root / "hide_kernels", tools):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/first_card.sh", root / "benchmarks")
    for name in ("python3", "compute-sanitizer"):
        (tools / name).write_text(STUB)
        (tools / name).chmod(0o755)

    def run(*arguments, **variables):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        say = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHON", "HIDE_COMMIT")}
        say |= {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "SLOW": "nothing", **variables}
        done = subprocess.run(
            [root / "benchmarks/first_card.sh", *arguments],
            cwd=tmp_path, env=say, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        calls = calls.read_text() if calls.exists() else ""
        return done, [call.splitlines() for call in calls.split("CALL ")[1:]]

    run.root = root
    return run


@needs_shell
def test_the_script_uses_what_was_carried_and_keeps_what_each_command_said(checkout, tmp_path):
    card = checkout.root / "build/card"
    (card / "wheels").mkdir(parents=True)
    (card / "commit").write_text("0123abc\n")
    for name in ("_csrc.abi3.so", "wheels/torchao-1-py3-none-any.whl"):
        (card / name).touch()
    done, calls = checkout("check", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (checkout.root / "hide_kernels/_csrc.abi3.so").is_file()
    install, look, tests, memory, races = calls
    assert install[1:4] == ["-m", "pip", "install"] and f"{card}/wheels/torchao-1-py3-none-any.whl" in install
    assert look[1:5] == ["-m", "benchmarks.carry", "--check", str(card)]
    assert tests[1:5] == ["-m", "pytest", "-m", "gpu"]
    for call in calls[1:]:
        assert f"CACHE {card}/triton" in call and "COMMIT 0123abc" in call
        assert f"PATH {checkout.root}:{checkout.root}/build/packages" in call
    assert [call[:3] for call in (memory, races)] == [
        ["compute-sanitizer", "--tool", tool] for tool in ("memcheck", "racecheck")
    ]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"tests.log", "memcheck.log", "racecheck.log"}
    assert "said by pytest" in (tmp_path / "out/tests.log").read_text()
    done, (*_, figures) = checkout("figures", tmp_path / "out")
    assert figures[1:6] == ["-m", "benchmarks.gpu", "--seconds", "500", "--out"] and figures[6] == str(tmp_path / "out")


@needs_shell
def test_without_anything_carried_it_runs_and_says_so_and_a_failure_is_an_exit_code(checkout, tmp_path):
    done, calls = checkout("check", tmp_path / "out")
    assert done.returncode == 0 and "nothing was carried" in done.stdout and len(calls) == 3
    done, calls = checkout("check", tmp_path / "out", CODE="3")
    assert done.returncode == 1 and len(calls) == 3, "what comes behind a failure runs all the same"
    for wrong in ((), ("check",), ("figure", "out")):
        done, calls = checkout(*wrong)
        assert done.returncode == 64 and done.stderr.startswith("usage") and not calls


@needs_shell
def test_a_run_that_is_killed_leaves_what_was_said(checkout, tmp_path):
    tools = tmp_path / "tools"
    say = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "SLOW": "pytest"}
    script, log = checkout.root / "benchmarks/first_card.sh", tmp_path / "out/tests.log"
    running = subprocess.Popen(
        [script, "check", tmp_path / "out"], env=say, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end and not (log.exists() and "said by" in log.read_text()):
            time.sleep(0.05)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert "said by pytest" in log.read_text()


def script():
    return (ROOT / "benchmarks/first_card.sh").read_text()


def test_each_run_ends_within_ten_minutes():
    """The bounds of its commands, each of which may take ten seconds more to end."""
    text = script()
    look = [int(seconds) for seconds in re.findall(r"\btimeout (\d+)", text)]
    check, figures = re.split(r"\nelse\n", text.split("if [[ $run == check ]]")[1])
    limits = [[int(seconds) for seconds in re.findall(r"\blimited (\d+)", part)] for part in (check, figures)]
    assert sum(look) + 10 + limits[0][0] + 10 + 2 * (limits[0][1] + 10) < 600
    (end,) = limits[1]
    assert int(re.search(r"--seconds (\d+)", figures)[1]) < end and sum(look) + end + 20 < 620


def test_the_tests_and_commands_that_the_script_names_exist(request, monkeypatch, capsys):
    names = re.findall(r'^    "(tests/.*)"$', script(), re.MULTILINE)
    assert len(names) == 7
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "7 tests collected" in done.stdout, done.stdout
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        sys, "argv", ["gpu", *re.search(r"benchmarks\.gpu (--.*) \"\$out\"", script())[1].split(), "out"]
    )
    assert gpu.main() == 2


# What is carried.


@pytest.fixture
def one_kernel(monkeypatch):
    """Of all that is carried one small kernel."""
    (launch,) = planned(carry.CAPABILITY, rows=1, heads=2, kv_heads=1, depth=32, length=64, softmax=False)
    monkeypatch.setattr(carry, "wanted", lambda tests: [launch])
    monkeypatch.setattr(carry, "planned", lambda capability: [launch])
    monkeypatch.setattr(carry, "planned_maps", lambda *given, **how: [])
    monkeypatch.setattr(carry, "which", lambda name: None)
    monkeypatch.setattr(carry, "ProcessPoolExecutor", InThisProcess)
    for name in ("TRITON_CACHE_DIR", "TRITON_STORE_BINARY_ONLY"):
        monkeypatch.setenv(name, "")


class InThisProcess:
    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    map = staticmethod(map)


def test_a_kernel_that_is_carried_is_found_by_the_triton_it_was_made_for_alone(
    one_kernel, monkeypatch, tmp_path, capsys
):
    """The wheel: this Triton with another compiled part, as for another Python."""
    import triton

    wheel, here = tmp_path / "triton.whl", Path(triton.__file__).parent
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        for file in here.rglob("*.py"):
            archive.write(file, f"triton/{file.relative_to(here)}")
        archive.writestr("triton/_C/libtriton.so", b"of another Python")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["carry", str(tmp_path / "card"), *arguments])
        code = carry.main()
        return code, capsys.readouterr().out.splitlines()[-1]

    code, said = run("--wheel", str(wheel))
    assert code == 0 and "finds 1 of 1 kernels" in said
    kinds = {path.suffix for path in (tmp_path / "card/triton").glob("*/*")}
    assert ".cubin" in kinds and not kinds & {".ttir", ".ptx"}, kinds
    theirs = (tmp_path / "card/triton.txt").read_text().strip()
    assert re.fullmatch(r"[0-9a-f]{12}", theirs) and theirs != carry.own_hash()
    shutil.copytree(tmp_path / "card", tmp_path / "again")
    code, said = run("--check")
    assert code == 1 and f"Triton {carry.own_hash()} finds 0 of 1" in said and said.endswith(f"made for {theirs}")
    # From another folder, as on another machine.
    monkeypatch.setattr(sys, "argv", ["carry", str(tmp_path / "again"), "--check", "--wheel", str(wheel)])
    assert carry.main() == 0


def test_a_kernel_has_the_same_hash_whichever_is_launched_first(monkeypatch):
    """Triton 3.6 hashes a function otherwise before its callees have a hash than after."""
    kernels = [launch.kernel for launch in (*planned((9, 0)), *planned_maps((9, 9)))]
    want = [kernel.cache_key for kernel in kernels]
    modules = {kernel.fn.__module__ for kernel in kernels}
    functions = [f for name in modules for f in vars(sys.modules[name]).values() if isinstance(f, JITFunction)]
    for first in (kernels, kernels[::-1]):
        for function in functions:
            monkeypatch.setattr(function, "hash", None)
            monkeypatch.setattr(function, "used_global_vals", {})
        monkeypatch.setattr("hide_kernels.launch._hash_in_order", _hash_in_order.__wrapped__)
        for kernel in first:
            assert Launch(kernel, (1, 1, 1), {}).kernel.cache_key
        assert [kernel.cache_key for kernel in kernels] == want


def test_what_is_carried_are_the_variants_of_the_checks_and_each_once(monkeypatch):
    """Of the checks' cases alone: the tables' shapes take a minute."""
    monkeypatch.setattr(carry, "benchmark_calls", lambda: carry.case_calls((torch.bfloat16,), (torch.bfloat16,)))
    monkeypatch.setattr(carry, "CASES", CASES[:6])
    monkeypatch.setattr(carry, "SERVING_CASES", [])
    monkeypatch.setattr(carry, "RECEIVED_CASES", RECEIVED_CASES[:3])
    monkeypatch.setattr(carry, "RECEIVED_SERVING_CASES", [])
    found = carry.variants(few := carry.wanted.__wrapped__(False), carry.CAPABILITY)
    assert len(set(found)) == len(few) and {name for name, _ in found} >= {
        "partial_lse", "reduce_rows", "scan_rows", "receive", "join_heads",
    }  # fmt: skip
    more = carry.variants(carry.wanted.__wrapped__(True), carry.CAPABILITY)
    assert set(found) < set(more)
    noted = []
    with carry.noted(noted):
        carry.benchmark_calls()
    assert set(carry.variants(noted, carry.CAPABILITY)) == set(found)


def test_what_is_carried_is_what_the_card_itself_would_plan():
    """Options of a launch that the card has and the CPU has not, such as an early start, are of another variant."""
    query = torch.zeros(1, 28, 32, 128, dtype=torch.bfloat16)
    key = torch.zeros(1, 3_000, 4, 128, dtype=torch.bfloat16).transpose(1, 2)
    noted = []
    with carry.noted(noted):
        attention_rows(query, key)
    want = carry.variants(planned(carry.CAPABILITY, length=3_000), carry.CAPABILITY)
    assert carry.variants(noted, carry.CAPABILITY) == want


def test_a_folder_that_lacks_a_kernel_of_the_anchor_is_not_called_good_where_it_is_made(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(carry, "fill", lambda *_: None)
    monkeypatch.setattr(carry, "check", lambda folder: (2, 1))
    for arguments, code in (([], 1), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", ["carry", str(tmp_path), *arguments])
        assert carry.main() == code
        assert "finds 1 of 2 kernels" in capsys.readouterr().out


def test_the_first_pass_of_captures_is_carried_for_attention_that_keeps_no_log_sum_exp():
    """On the CPU PyTorch's attention keeps it, on a card cuDNN's does not."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model, noted = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **heads)).eval(), []
    with carry.noted(noted), torch.no_grad(), capture_attention(model, layers=[0], queries=[5, 9]):
        model(input_ids=torch.arange(20, 40)[None])
    assert [name for name, _ in carry.variants(noted, carry.CAPABILITY)] == ["partial_lse", "reduce_rows"]
