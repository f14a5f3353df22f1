"""Targets of the Makefile where little is there (no build folder yet, blanks in the path, no network), and the locks."""

import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MAKEFILE = ROOT / "Makefile"
LOCKS = sorted(ROOT.glob("requirements/*.txt"), key=lambda path: path.stem)
LOCKS.remove(ROOT / "requirements/overrides.txt")
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
# In place of the environment's Python: says what it is called with, an argument a line, and makes what pip would.
STUB = """#!/bin/sh
printf '%s\\n' "$@" >>"$CALLS"
mkdir -p dist build/wheels 2>/dev/null
touch dist/one-1-py3-none-any.whl
"""


needs_make = pytest.mark.skipif(not shutil.which("make") or os.name == "nt", reason="needs make and a shell")


@needs_make
@pytest.mark.parametrize("target, said", [("wheels", "{}/build/wheels/one-1-py3-none-any"), ("hub", "build/hub")])
def test_a_target_works_from_a_path_with_blanks_without_a_build_folder(tmp_path, target, said):
    root, calls = tmp_path / "a folder with blanks", tmp_path / "calls"
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    (root / "requirements").mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "requirements/test.txt", "requirements/triton.txt"):
        (root / name).write_text("" if name != "Makefile" else MAKEFILE.read_text())
        os.utime(root / name, (0, 0))
    (root / ".venv/.installed").touch()
    done = subprocess.run(
        ["make", target], cwd=root, env=os.environ | {"CALLS": str(calls)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert said.format(root) in calls.read_text().splitlines()


# In place of Python: makes an environment with itself in it, and says which packages the installed torch needs.
INSTALLER = """#!/bin/sh
printf '%s\n' "$*" >>"$CALLS"
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip show torch") printf 'Name: torch\nRequires: filelock, %s\nRequired-by: accelerate\n' "$TORCH_NEEDS" ;;
esac
"""


@needs_make
@pytest.mark.parametrize("needs, own", [("sympy", False), ("nvidia-cublas, triton", True)])
def test_install_follows_the_lock_after_torch_and_leaves_a_cuda_torchs_triton_alone(tmp_path, needs, own):
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(INSTALLER)
    python.chmod(0o755)
    (tmp_path / "requirements").mkdir()
    for name in ("pyproject.toml", "setup.py", "requirements/test.txt", "requirements/triton.txt"):
        (tmp_path / name).touch()
    shutil.copy(MAKEFILE, tmp_path)
    say = os.environ | {"CALLS": str(calls), "TORCH_NEEDS": needs}
    command = ["make", "install", f"PYTHON={python}", "TORCH=torch==1"]
    subprocess.run(command, cwd=tmp_path, env=say, check=True, capture_output=True, timeout=60)
    done = calls.read_text().splitlines()
    lock, triton = (f"--no-deps --requirement requirements/{name}.txt" for name in ("test", "triton"))
    torch = "-m pip install --quiet --constraint requirements/test.txt torch==1"
    (place,) = (place for place, call in enumerate(done) if lock in call)
    assert done.index(torch) < place
    assert any(triton in call for call in done) is not own
    assert done[-1] == "-m pip check"
    calls.unlink()
    subprocess.run(command, cwd=tmp_path, env=say, check=True, capture_output=True, timeout=60)
    assert not calls.exists(), "nothing changed, so nothing is installed"
    os.utime(tmp_path / "requirements/test.txt")
    subprocess.run(command, cwd=tmp_path, env=say, check=True, capture_output=True, timeout=60)
    assert lock in calls.read_text(), "a new lock is installed"


def variable(name):
    """What make puts for a variable of the Makefile."""
    lines = ["include Makefile", f"print: ; @echo $({name})", ""]
    command = ["make", "--no-print-directory", "--file=-", "print"]
    return subprocess.check_output(command, input="\n".join(lines), cwd=ROOT, text=True, timeout=60).split()


def requirements(path):
    """The requirements in a lock, one a line; `via` says in comments where each comes from."""
    lines = (line.split(" #")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked(*names):
    """Versions by name in locks together."""
    found = (one for name in names for one in requirements(ROOT / f"requirements/{name}.txt"))
    return {canonicalize_name(one.name): next(iter(one.specifier)).version for one in found}


def ranges(*extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(
        map(Requirement, sum((project["optional-dependencies"][name] for name in extras), project["dependencies"]))
    )


@needs_make
def test_every_lock_is_one_that_make_upgrade_writes():
    assert {path.stem for path in LOCKS} == {"triton", *variable("LOCKS")}


@needs_make
@pytest.mark.parametrize("lock", [path.stem for path in LOCKS if path.stem != "triton"])
def test_make_upgrade_resolves_what_the_commands_need_too(lock):
    command = ["make", "--dry-run", "--old-file=build/uv", "--old-file=resolve-triton", f"resolve-{lock}"]
    plan = subprocess.check_output(command, cwd=ROOT, text=True, timeout=60)
    assert " pyproject.toml --extra hide " in plan


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_one_exact_version_of_each_and_no_trace_of_where_it_was_made(lock):
    text, found = lock.read_text(), requirements(lock)
    assert found
    for one in found:
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(one.specifier)) and not one.url, f"{one}: not an exact version"
    for python in ("3.11", "3.12", "3.13"):
        linux = {"python_version": python, "python_full_version": f"{python}.1"} | LINUX
        names = [canonicalize_name(one.name) for one in found if not one.marker or one.marker.evaluate(linux)]
        assert len(names) == len(set(names)), f"Python {python}: a package stands there twice"
    # No option, index, file or folder but those of this repository.
    assert not re.search(r"^\s*-|://|@|--(find-links|index|trusted)|(^|\s)[~/]", text, re.MULTILINE)
    paths = re.findall(r"-r (\S+)|\((\S+)\)", text)
    assert all((ROOT / (one or other)).is_file() for one, other in paths), paths


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_torch_and_cuda_stand_in_no_lock(lock):
    names = {canonicalize_name(one.name) for one in requirements(lock)}
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-")) or name in ("torch", "torchaudio")]
    assert ("triton" in names) == (lock.stem == "triton"), "a CUDA build of torch brings its own, which stays"


@pytest.mark.parametrize(
    "names, extras",
    [
        (("test", "triton"), ("hide", "test", "ray", "quant", "serve")),
        (("kvpress",), ("hide", "peers")),
        (("real",), ("hide", "peers")),
        (("vllm",), ("hide",)),
        (("lmms-eval",), ("hide",)),
    ],
)
def test_a_lock_holds_what_the_project_asks_for_in_its_ranges(names, extras):
    versions = locked(*names)
    for one in ranges(*extras):
        if one.name == "torch":
            continue
        assert one.specifier.contains(versions[canonicalize_name(one.name)]), f"{one}: {versions[one.name]} is locked"


def test_the_ranges_and_the_makefile_agree_about_torch():
    (torch,) = (one for one in ranges() if one.name == "torch")
    (pinned,) = re.findall(r"^TORCH \?= torch==(\S+)$", MAKEFILE.read_text(), re.MULTILINE)
    assert torch.specifier.contains(pinned)


@pytest.mark.parametrize("lock", [path for path in LOCKS if path.stem != "triton"], ids=lambda path: path.stem)
def test_a_lock_holds_what_installs_builds_and_what_torch_needs(lock):
    versions = locked(lock.stem)
    theirs = [Requirement(one) for one in metadata.requires("torch") or () if "extra ==" not in one]
    build = [Requirement(one) for one in ("pip", "setuptools>=77", "wheel", "pytest", "hypothesis")]
    for one in [*theirs, *build]:
        if not one.name.startswith(("nvidia-", "cuda-", "triton")):
            assert one.specifier.contains(versions[canonicalize_name(one.name)]), one


@pytest.mark.parametrize(
    "lock, wanted",
    [
        ("kvpress", "transformers<5.3"),
        ("real", "transformers<5.3"),
        ("vllm", "transformers<5.20"),
        ("lmms-eval", "filelock<4"),
    ],
)
def test_a_lock_of_its_own_has_what_the_main_one_cannot(lock, wanted):
    one = Requirement(wanted)
    assert one.specifier.contains(locked(lock)[one.name])
    assert not one.specifier.contains(locked("test")[one.name]), f"{lock} resolves with the rest: one lock would do"


@needs_make
def test_every_list_of_tests_names_files_that_exist():
    for name in variable("NEWEST_TESTS") + variable("CARD_TESTS"):  # the former holds MODEL_TESTS
        assert (ROOT / f"tests/test_{name}.py").is_file(), name


@needs_make
def test_the_newest_lane_lays_todays_anew_over_the_locked_and_names_it_from_every_folder():
    plan = subprocess.check_output(
        ["make", "--dry-run", "--old-file=.venv/.installed", "test-newest"],
        cwd=ROOT,
        # The tests run inside of make too, which would say that it enters a directory.
        env={name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")},
        text=True,
        timeout=60,
    ).splitlines()
    lay, *_, run = plan
    assert lay.startswith("rm -rf build/newest && ") and not re.search(r"==|--no-deps", lay)
    assert all(f" {name}" in lay for name in ("transformers", "triton", "numpy", "pillow", "datasets", "ray"))
    assert run.startswith(f'PYTHONPATH="{ROOT}/build/newest" '), "a worker's working folder may be another"
