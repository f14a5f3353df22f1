"""What every CUDA kernel takes on every architecture: registers, stack, static shared memory. Needs nvcc, no GPU.

`python -m benchmarks.kernel_resources` rewrites docs/kernel_resources.md.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hide_kernels.native import SOURCES

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TABLE = Path(__file__).parents[1] / "docs" / "kernel_resources.md"


class Resources(NamedTuple):
    """Of one kernel on one architecture; bytes but for registers, which are per thread."""

    kernel: str
    architecture: int
    registers: int
    stack: int
    spills: int
    static_shared: int


def compile_kernels(architectures: Sequence[int]) -> list[Resources]:
    """Compile all kernels and read what the assembler says of them, warnings being errors."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v", "-Werror=all-warnings"]
            command += ["-cubin", "-o", str(Path(folder, "kernels.cubin")), str(SOURCES / "kernels.cu")]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"sm_{architecture}: {run.stderr}")
            found += [_resources(text, architecture) for text in run.stderr.split("Compiling entry function")[1:]]
    return sorted(found)


def made_of() -> str:
    """The compiler's version and a hash of the sources, as the page states what its figures are of. Needs nvcc."""
    version = re.search(r"release [\d.]+, V([\d.]+)", subprocess.check_output(["nvcc", "--version"], text=True))
    assert version is not None
    digest = hashlib.sha256()
    for file in sorted(SOURCES.glob("*")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"nvcc {version[1]} of sources `{digest.hexdigest()[:12]}`"


def _resources(text: str, architecture: int) -> Resources:
    def number(pattern: str) -> int:
        return sum(int(value) for value in re.findall(pattern, text))

    name = re.match(r" '(\w+)'", text)
    assert name is not None
    return Resources(
        name[1],
        architecture,
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes stack"),
        number(r"(\d+) bytes spill"),
        number(r"(\d+) bytes smem"),
    )


def main() -> int:
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH")
        return 1
    found = compile_kernels(ARCHITECTURES)
    by_kernel: dict[str, list[Resources]] = {}
    for one in found:
        by_kernel.setdefault(one.kernel, []).append(one)
    lines = [
        "# Kernel resources",
        "",
        f"Registers per thread, as `ptxas` says: {made_of()}; made by `python -m benchmarks.kernel_resources`.",
        f"Stack, spills and static shared memory: {sum(sum(one[3:]) for one in found)} bytes in all of them. Dynamic "
        "shared memory stands in hide_kernels/geometry.py.",
        "",
        "| kernel | " + " | ".join(f"sm_{architecture}" for architecture in ARCHITECTURES) + " |",
        "|---" * (1 + len(ARCHITECTURES)) + "|",
    ]
    lines += [
        f"| `{name}` | " + " | ".join(str(one.registers) for one in own) + " |" for name, own in by_kernel.items()
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
