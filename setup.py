"""Builds the optional extension; everything else that setuptools needs to know stands in pyproject.toml.

Its host part needs a C++17 compiler, its CUDA part nvcc and a CUDA build of PyTorch as well. What is missing is left
out, and the package then runs on PyTorch and SciPy; `hide doctor` says what was built.

HIDE_KERNELS_BUILD=none leaves out both, =host the CUDA part; then, and with =cuda, a failure to build is an error.
TORCH_CUDA_ARCH_LIST ("8.0;9.0") chooses the GPU architectures.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
# A wheel without anything compiled is one for every platform.
PURE = os.environ.get("HIDE_KERNELS_BUILD") == "none"
RUNTIME = ["cudart_static", "dl", "rt", "pthread"]
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0"


def nvcc() -> str | None:
    """The CUDA compiler that PyTorch would use."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None) or shutil.which("nvcc")


class Build(build_ext):
    """Adds the CUDA part if it can, and gives up without failing unless it was asked for by name."""

    def run(self) -> None:
        wanted = os.environ.get("HIDE_KERNELS_BUILD", "")
        if wanted not in ("", "none", "host", "cuda"):
            raise ValueError(f"HIDE_KERNELS_BUILD: got {wanted!r}, want none, host or cuda")
        if wanted == "none":
            self.extensions = []
        for extension in self.extensions:
            try:
                self._configure(extension, wanted)
                extension.optional = not wanted
            except Exception as error:
                if wanted:
                    raise
                print(f"hide_kernels: the extension is not built: {error}", file=sys.stderr)
                self.extensions = []
        super().run()

    def _configure(self, extension: Extension, wanted: str) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        extension.include_dirs += include_paths()
        extension.library_dirs += library_paths()
        extension.libraries.append("torch_cpu")
        if wanted == "cuda" or (not wanted and torch.version.cuda and nvcc()):
            try:
                runtime = self._runtime()
                extension.extra_objects.append(self._kernels())
            except Exception as error:
                if wanted:
                    raise
                print(f"hide_kernels: the CUDA part is not built: {error}", file=sys.stderr)
            else:
                extension.define_macros.append(("HIDE_CUDA", None))
                # The static runtime: PyTorch's own may be of another version.
                extension.library_dirs += runtime
                extension.libraries += RUNTIME

    def _runtime(self) -> list[str]:
        """Where nvcc, which may be a wrapper anywhere, links the CUDA runtime from."""
        command = [nvcc() or "nvcc", "--dryrun", "-c", str(CSRC / "kernels.cu")]
        plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        libraries = next(line for line in plan.splitlines() if "LIBRARIES=" in line)
        folders = re.findall(r'-L"?([^"\s]+)', libraries)
        # Tried now: if it first failed with the extension, the host part would be lost too.
        with tempfile.TemporaryDirectory() as made:
            link = [*shlex.split(os.environ.get("CXX", "c++")), "-shared", "-o", f"{made}/tried.so"]
            link += [*(f"-L{folder}" for folder in folders), *(f"-l{name}" for name in RUNTIME)]
            tried = subprocess.run(link, capture_output=True, text=True)
        if tried.returncode:
            raise OSError(f"the CUDA runtime cannot be linked: {tried.stderr.strip()}")
        return folders

    def _kernels(self) -> str:
        """Compiles the kernels for every architecture, and for later ones as PTX of the newest."""
        compiler = nvcc()
        if compiler is None:
            raise OSError("nvcc is not found; put it on PATH or set CUDA_HOME")
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(" ", ";").split(";")
        names = [name.removesuffix("+PTX").replace(".", "") for name in asked if name]
        known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        names = [name for name in names if f"compute_{name.rstrip('a')}" in known]
        if not names:
            raise OSError(f"nvcc knows none of the architectures asked for, only {' '.join(known)}")
        codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
        codes.append(f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}")
        target = Path(self.build_temp, "kernels.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-std=c++17", "-O3", "-Xcompiler=-fPIC", *codes, "-c", str(CSRC / "kernels.cu")]
        self.spawn([*command, "-o", str(target)])
        return str(target)


setup(
    # Folders of data are packages too, or setuptools warns of each. The sources travel with the package: CuPy
    # compiles them where the extension has no CUDA part.
    packages=[*find_namespace_packages(include=["hide*"], exclude=["*__pycache__*"]), "hide_kernels.csrc"],
    package_dir={"hide_kernels.csrc": "csrc"},
    package_data={"hide_kernels.csrc": ["*"]},
    ext_modules=[]
    if PURE
    else [
        Extension(
            "hide_kernels._csrc",
            [str(CSRC / "binding.cpp")],
            depends=[str(path) for path in sorted(CSRC.iterdir())],
            # Python 3.11 and PyTorch 2.11 are the oldest that the build runs on.
            define_macros=[("Py_LIMITED_API", "0x030b0000"), ("TORCH_TARGET_VERSION", "0x020b000000000000")],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={} if PURE else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
