"""Targets of the Makefile where little is there: no build folder yet, blanks in the path, no network."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
# In place of the environment's Python: says what it is called with, an argument a line, and makes what pip would.
STUB = """#!/bin/sh
printf '%s\\n' "$@" >>"$CALLS"
mkdir -p dist build/wheels 2>/dev/null
touch dist/one-1-py3-none-any.whl
"""


@pytest.mark.skipif(not shutil.which("make") or os.name == "nt", reason="needs make and a shell")
@pytest.mark.parametrize("target, said", [("wheels", "{}/build/wheels/one-1-py3-none-any"), ("hub", "build/hub")])
def test_a_target_works_from_a_path_with_blanks_without_a_build_folder(tmp_path, target, said):
    root, calls = tmp_path / "a folder with blanks", tmp_path / "calls"
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        (root / name).write_text("" if name != "Makefile" else MAKEFILE.read_text())
        os.utime(root / name, (0, 0))
    (root / ".venv/.installed").touch()
    done = subprocess.run(
        ["make", target], cwd=root, env=os.environ | {"CALLS": str(calls)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert said.format(root) in calls.read_text().splitlines()
