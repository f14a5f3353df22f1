"""What the source distribution and the wheel built of it hold."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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
