"""The kernels of csrc without a GPU: by real threads against naive definitions, compiled for every architecture, and
what becomes of a call where the extension is missing."""

import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernel_resources
from hide import doctor
from hide_kernels import explain, geometry, native, regions

DRIVER = Path(__file__).parent / "csrc" / "driver.cpp"
needs_extension = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_blocks_of_real_threads_do_what_the_definitions_say(tmp_path):
    program = tmp_path / "driver"
    build = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", str(DRIVER), "-o", str(program)]
    subprocess.run(build, check=True)
    run = subprocess.run([program, "3"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_threads_that_launch_one_kernel_with_much_and_little_shared_memory_disturb_nobody(tmp_path):
    program, source = tmp_path / "launches", DRIVER.with_name("launches.cpp")
    build = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-pthread", f"-I{DRIVER.parent / 'runtime'}"]
    subprocess.run([*build, str(source), "-o", str(program)], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_every_kernel_compiles_without_stack_and_spills_and_stands_in_the_table():
    """A sample; all that the table has, of three generations, where sources or compiler are not those of the table."""
    table = kernel_resources.TABLE.read_text()
    architectures = (90,) if kernel_resources.made_of() in table else (80, 90, 100)
    found = kernel_resources.compile_kernels(architectures)
    assert len(found) == len(architectures) * 11
    for one in found:
        assert one.stack == one.spills == one.static_shared == 0
        assert one.registers * geometry.MAX_THREADS <= 65536 / 2
    assert sorted(set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))) == sorted({one.kernel for one in found})
    if len(architectures) == 1:
        column = 2 + kernel_resources.ARCHITECTURES.index(90)
        rows = {line.split("`")[1]: line.split("|") for line in table.splitlines() if line.startswith("| `")}
        assert all(int(rows[one.kernel][column]) == one.registers for one in found)


def test_the_device_code_is_one_text_that_includes_nothing():
    source = native.device_source()
    assert source.count("struct SerialBlock") == 1
    assert re.findall(r"#include (.*)", source) == ["<math.h>", "<string.h>"]
    # The two that remain are for the host only.
    assert re.search(r"#else\n#include <math.h>\n#include <string.h>\n.*\n#endif", source)


def test_a_block_holds_maps_of_about_300_cells_a_side_on_sm_86_and_450_on_sm_90(monkeypatch):
    device = torch.device("cpu")
    for limit, side in ((99 * 1024, 298), (227 * 1024, 450)):
        monkeypatch.setattr(geometry, "shared_limit", lambda device, limit=limit: limit)
        assert geometry.regions_block(device, 1, side, side) is not None
        assert geometry.regions_block(device, 1, side + 8, side + 8) is None


def test_launches_on_a_device_have_a_thread_for_every_item_and_no_more_than_compiled_for(monkeypatch):
    monkeypatch.setattr(geometry, "shared_limit", lambda device: 227 * 1024)
    cuda = torch.device("cuda")
    assert geometry.regions_block(cuda, 100, 128, 128) == (100, 512, 4 * (1 + 64 * 64 + 64 * 8))
    assert geometry.regions_block(cuda, 9999, 95, 170).blocks == geometry.MAX_BLOCKS
    assert geometry.regions_block(cuda, 3, 3, 3) == (3, 32, 4 * (1 + 4 + 2))
    blocks, threads, _ = geometry.regions_step(cuda, 3, 1001, 999)
    assert blocks * threads >= 3 * 501 * 63 > (blocks - 1) * threads
    assert geometry.collage_rows(cuda, 10, 1410, 1446) == (1410, 512, 16 * 11)
    assert geometry.collage_rows(cuda, 4000, 1410, 1446) is None
    assert geometry.resize(cuda, 1446, 1400, 1456, 14) == (1400, 512, 0)
    assert geometry.resize(torch.device("cpu"), 1446, 1400, 1456, 14) == (1, 1, 3 * (16 * 1446 + 14 * 1456))
    launches = [geometry.layout_boxes(cuda), geometry.regions_finish(cuda, 5), geometry.regions_step(cuda, 9, 9, 9)]
    assert all(launch.threads <= geometry.MAX_THREADS for launch in launches)


@needs_extension
def test_a_kernel_that_does_not_exist_and_a_missing_argument_are_refused():
    with pytest.raises(ValueError, match="no kernel is called regions_sideways"):
        native.launch("regions_sideways", geometry.Geometry(1, 1), [torch.zeros(1)])
    with pytest.raises(IndexError):
        native.launch("regions_finish", geometry.Geometry(1, 1), [torch.zeros(1)])


@pytest.mark.parametrize("reason", ["the extension is not built", "the extension does not load: undefined symbol"])
def test_without_the_extension_everything_runs_and_the_doctor_says_what_to_install(monkeypatch, reason):
    monkeypatch.setattr(native, "extension", lambda: (None, reason))
    explanation = explain("regions", maps=torch.ones(1, 3, 3))
    assert explanation.chosen == "scipy" and f"cpp      {reason}" in str(explanation)
    assert regions(torch.ones(1, 3, 3), 0.5).counts.tolist() == [1]
    with pytest.raises(ValueError, match=f"backend 'cpp' cannot serve this call of regions: {reason}"):
        regions(torch.ones(1, 3, 3), 0.5, backend="cpp")
    (finding,) = [finding for finding in doctor.examine() if finding.section == "extension"]
    assert reason in finding.state and "C++17 compiler" in finding.advice


def test_an_extension_that_does_not_load_is_a_reason_and_no_crash(monkeypatch):
    def broken(name):
        raise ImportError("_csrc.abi3.so: undefined symbol: torch_library_impl")

    monkeypatch.setattr(native.importlib, "import_module", broken)
    module, reason = native.extension.__wrapped__()
    assert module is None and "does not load: _csrc.abi3.so: undefined symbol" in reason


def test_cupys_kernels_get_all_shared_memory_once_per_device_whatever_a_call_needs(monkeypatch):
    """With a stand-in for CuPy: two devices, and calls that need little, much and little again."""
    given, launched = [], []

    class Kernel:
        def __setattr__(self, name, value):
            given.append((name, value))

        def __call__(self, blocks, threads, arguments, shared_mem):
            launched.append(shared_mem)

    module = SimpleNamespace(get_function=lambda name: Kernel())
    here = SimpleNamespace(Device=lambda index: nullcontext(), ExternalStream=lambda stream, index: nullcontext())
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=here))
    monkeypatch.setattr(native, "_cupy_module", lambda: module)
    monkeypatch.setattr(native, "shared_limit", lambda device: 99_000 + device.index)
    native._cupy_function.cache_clear()
    for index in (0, 1, 0):
        tensor = SimpleNamespace(device=torch.device("cuda", index), data_ptr=lambda: 0)
        for shared in (100, 60_000, 200):
            native._launch_cupy("resize", geometry.Geometry(1, 32, shared), [tensor], (), (), 0)
    native._cupy_function.cache_clear()
    assert given == [("max_dynamic_shared_size_bytes", 99_000), ("max_dynamic_shared_size_bytes", 99_001)]
    assert launched == [100, 60_000, 200] * 3


def test_without_a_cuda_part_cupy_launches_the_kernels(monkeypatch):
    host_only = type("Module", (), {"cuda": 0})
    monkeypatch.setattr(native, "extension", lambda: (host_only, ""))
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    assert native.missing("cpu") is None
    assert native.missing("cuda") == "the extension has no CUDA part, and cupy is not installed"
    monkeypatch.setattr(native, "find_spec", lambda name: object())
    assert native.missing("cuda") is None
