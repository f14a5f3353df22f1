"""What the source distribution and the wheel built of it hold."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).parents[1]
FOLDERS = ("csrc", "hide", "hide_kernels", "training")
FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")


def build(kind, source, folder):
    """Build as pip does, without anything compiled."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    environment = os.environ | {"HIDE_KERNELS_BUILD": "none"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(names in the source distribution, names in the wheel)."""
    checkout, unpacked, out = (tmp_path_factory.mktemp(name) for name in ("checkout", "unpacked", "out"))
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, ignore=unwanted)
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    with tarfile.open(build("sdist", checkout, out)) as sdist:
        sdist.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    with zipfile.ZipFile(build("wheel", source, out)) as wheel:
        names = wheel.namelist()
    return {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}, set(names)


def test_the_training_code_is_in_the_source_distribution_and_not_in_the_wheel(built):
    sdist, wheel = built
    training = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("training/*.py")}
    assert "training/train.py" in training and training <= sdist
    assert {name.partition("/")[0].partition("-")[0] for name in wheel} == {"hide", "hide_kernels"}


def test_every_module_and_what_is_no_python_of_the_packages_is_in_the_wheel(built):
    files = [path for name in ("hide", "hide_kernels") for path in (ROOT / name).rglob("*") if path.is_file()]
    ours = {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".pyc", ".so")}
    assert "hide/present/templates/style.css" in ours and ours - built[1] == set()


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("ar") is None, reason="g++ is not installed")
@pytest.mark.parametrize("there", [True, False], ids=["with its runtime", "without it"])
def test_a_cuda_compiler_without_its_static_runtime_costs_the_cuda_part_alone(there, monkeypatch, tmp_path, capsys):
    """With a stand-in for nvcc, whose folder has the library or not."""
    (tmp_path / "lib").mkdir()
    if there:
        (tmp_path / "none.cpp").touch()
        subprocess.run(["g++", "-c", "-o", tmp_path / "none.o", tmp_path / "none.cpp"], check=True)
        subprocess.run(["ar", "rc", tmp_path / "lib/libcudart_static.a", tmp_path / "none.o"], check=True)
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho compute_90\necho '#$ LIBRARIES=  \"-L{tmp_path}/lib\"' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(setuptools, "setup", lambda **settings: None)
    Build = runpy.run_path(str(ROOT / "setup.py"))["Build"]
    build, extension = Build(setuptools.Distribution()), setuptools.Extension("one", ["one.cpp"])
    build.build_temp = str(tmp_path / "temp")
    monkeypatch.setattr(Build, "spawn", lambda self, command: None)
    build._configure(extension, "")
    assert ("torch_cpu" in extension.libraries, "cudart_static" in extension.libraries) == (True, there)
    assert [name for name, _ in extension.define_macros] == (["HIDE_CUDA"] if there else [])
    assert bool(extension.extra_objects) is there
    assert ("the CUDA part is not built: the CUDA runtime cannot be linked" in capsys.readouterr().err) is not there
    if not there:
        with pytest.raises(OSError, match="cannot be linked"):
            build._configure(extension, "cuda")
