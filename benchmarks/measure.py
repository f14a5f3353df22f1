"""What every benchmark shares: times, memory, the machine, and a result file that says where its figures are from."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hide.texts import named, version

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]
# What stands in a row in place of figures.
NO_TIME, WITHHELD = "no time left", "its check failed"
# Among `Failure.figures`: all.
EVERYTHING = "everything"


class Failure(NamedTuple):
    """What a check found wrong: in which case, by which backend or way, and how wrong it is.

    figures: names, as the module's tables know them, of what rests on it and is therefore not measured.
    """

    case: str
    backend: str
    error: str
    figures: tuple[str, ...] = (EVERYTHING,)

    def __str__(self) -> str:
        return f"{self.case}, {self.backend}: {self.error}"


def found_wrong(module: Any, device: str) -> Iterator[Failure]:
    """What a module's check finds, one after another; if it breaks, that is the last, and all rests on it."""
    try:
        yield from module.failures(device)
    except Exception as error:
        yield Failure("the check itself", device, named(error, 500))


def wrong(run: Callable[[], Any], right: Callable[[Any], bool], what: str) -> str | None:
    """What is wrong with the result of a call, or `None`."""
    try:
        return None if right(run()) else f"wrong {what}"
    except Exception as error:
        return named(error)


def in_turn(parts: Mapping[str, Callable[[], Iterable[dict[str, Any]]]], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of the parts one after another, until the time is used up; a part that breaks takes no other with it."""
    end = time.monotonic() + seconds
    for name, part in parts.items():
        if time.monotonic() > end:
            yield {"what": name, "skipped": NO_TIME}
            continue
        try:
            rows = part()
            for row in rows:
                yield row
                if time.monotonic() > end and not isinstance(rows, list):  # of a list all is there
                    yield {"what": f"the rest of {name}", "skipped": NO_TIME}
                    break
        except Exception as error:
            yield {"what": name, "failed": named(error)}


class OutOfTime(BaseException):
    """No `Exception`, so that none who catches those takes it for a fault of what was running."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Inside, `OutOfTime` is raised after so long, in the main thread, between two steps of Python.

    What Python waits for, one kernel, copy or step of a compiler, is not cut off.
    """

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def count(text: str) -> int:
    """Of a command's option: a whole number from 1 on, else one line of usage."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, want at least 1")
    return int(text)


def alone(module: Any, seconds: float) -> int:
    """One operator as a command: its check, its table and, on a CPU, its limit; the exit code.

    module: as those of `benchmarks.gpu`, with `whole_table(device)`, and if there is a limit `within_limit(rows)` and,
        for where it holds, `ratios(rows)`.
    """
    parser = argparse.ArgumentParser(description=module.__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--save", action="store_true", help="also write a result to benchmarks/results")
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(1)
    if failed := list(found_wrong(module, device)):
        print("checks failed, nothing is reported", *failed, sep="\n  ")
        return 1
    rows = module.whole_table(device) if device == "cpu" else list(module.gpu_table(seconds))
    for row in rows:
        print(module.line(row))
    good = not any("failed" in row for row in rows)
    if good and device == "cpu" and hasattr(module, "within_limit"):
        good = module.within_limit(rows)
        lines = (
            [f"{name}: {ratio:.2f}" for name, ratio in module.ratios(rows).items()] if good else ["a limit is missed"]
        )
        print(*lines, sep="\n")
    if arguments.save:
        name = Path(module.__file__).stem
        print(f"written to {write(name, {'environment': environment(), 'operators': {name: {'table': rows}}})}")
    return int(not good)


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = torch.tensor(samples, dtype=torch.float64).quantile(points)
    return {"median": median.item(), "p20": p20.item(), "p80": p80.item()}


def spread(times: Mapping[str, float], unit: str) -> str:
    """Times as text."""
    dirty = f", dirty L2 {times['dirty median']:.1f}" if "dirty median" in times else ""
    return f"{times['median']:9.1f} {unit} ({times['p20']:.1f} to {times['p80']:.1f}{dirty})"


def interleaved_cpu_times(calls: dict[str, Call], runs: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each call, run in turn so that a busy spell of the machine falls on all of them."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: quantiles(times) for name, times in samples.items()}


def cuda_graph(call: Call) -> torch.cuda.CUDAGraph:
    """`call`, warmed up on a side stream and captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def cuda_times(call: Call, runs: int = 50, capture: bool = True) -> dict[str, float]:
    """Microseconds on the device with a cold L2; of a graph replay, or of eager calls where a call cannot be captured.

    Before each run the L2 is filled by reading other memory, or, for the "dirty" figures, by writing it: then the run
    also pays for writing those lines back. That keeps the stream busy while the run is queued too, so that the events
    do not time the gap before it.
    """
    run = cuda_graph(call).replay if capture else call
    other = torch.zeros(64 << 20, device="cuda")
    total = torch.empty((), device="cuda")
    for _ in range(3):
        run()
    clean = _timed(run, lambda: torch.sum(other, 0, out=total), runs)
    return clean | {f"dirty {point}": time for point, time in _timed(run, other.zero_, runs).items()}


def _timed(run: Call, flush: Call, runs: int) -> dict[str, float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, stop in events:
        flush()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return quantiles([1e3 * start.elapsed_time(stop) for start, stop in events])


def new_memory(call: Call, device: str) -> int:
    """Most bytes that a call has allocated at one time, its result included."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def commit() -> str | None:
    """The commit that the code is of, with "-dirty" behind it where files differ from it.

    Where there is no repository, as in a copy on another machine: what `HIDE_COMMIT` holds.
    """
    described = _output("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    return described or os.environ.get("HIDE_COMMIT") or None


def environment() -> dict[str, Any]:
    """Code, machine and versions; what cannot be found out is `None`."""
    code = commit()
    found: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": code and code.removesuffix("-dirty"),
        "dirty": code and code.endswith("-dirty"),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "flash_attn": version("flash-attn"),
        "cuda": torch.version.cuda,
        "gpu": None,
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "processors": card.multi_processor_count,
            "memory": card.total_memory,
            **gpu_state(),
        }
    return found


def gpu_state() -> dict[str, str]:
    """What nvidia-smi says of the first visible GPU: driver, clocks in MHz, watts, degrees; empty without it."""
    fields = "driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    # Its own numbers of the cards take no notice of CUDA_VISIBLE_DEVICES.
    for card in (f"GPU-{torch.cuda.get_device_properties(0).uuid}", "0"):
        queried = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={card}")
        if queried:
            return dict(zip(fields.split(","), queried.split(", "), strict=False))
    return {}


def write(kind: str, result: dict[str, Any], folder: Path | None = None) -> Path:
    """Writes a result into a folder, `benchmarks/results` by default, and returns its path.

    A result with the same name is replaced, as a whole: whoever is stopped leaves the old one or the new one.
    """
    found = result["environment"]
    machine = found["gpu"]["name"] if found["gpu"] else found["cpu"]
    name = re.sub(r"[^a-z0-9]+", "-", f"{kind} {machine} {(found['git'] or 'unknown')[:8]}".lower()).strip("-")
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    new = path.with_suffix(".part")
    new.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return new.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, cwd=RESULTS.parent)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
