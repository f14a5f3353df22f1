"""What this machine has, which implementation each operator would use and why, and what to install for more.

`hide doctor`, or `python -m hide.doctor` where nothing but torch is installed. Every probe is guarded: a broken package
is a finding, not a crash.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hide.extra import INSTALL, MODULES
from hide.texts import named, version


class Finding(NamedTuple):
    """One line of the examination. `advice` says what to do about it; empty where there is nothing to do."""

    section: str
    name: str
    state: str
    advice: str = ""


# Module, distribution names, what it is for, whether the package needs it.
PACKAGES = (
    ("torch", ("torch",), "tensors", True),
    ("numpy", ("numpy",), "arrays", True),
    ("scipy", ("scipy",), "maps and regions on the CPU", True),
    ("PIL", ("pillow",), "pictures", True),
    ("transformers", ("transformers",), "models; extra [hide]", True),
    ("tokenizers", ("tokenizers",), "texts; extra [hide]", True),
    ("safetensors", ("safetensors",), "weights; extra [hide]", True),
    ("typer", ("typer",), "the command line; extra [hide]", True),
    ("rich", ("rich",), "the command line; extra [hide]", True),
    ("matplotlib", ("matplotlib",), "figures; extra [hide]", True),
    ("jinja2", ("jinja2",), "pages; extra [hide]", True),
    ("filelock", ("filelock",), "result files; extra [hide]", True),
    ("pyarrow", ("pyarrow",), "data sets in parquet; extra [hide]", True),
    ("triton", ("triton", "pytorch-triton"), "GPU kernels; comes with a CUDA build of PyTorch", False),
    ("flash_attn", ("flash-attn",), "FlashAttention in the model itself; extra [flash]", False),
    ("torchao", ("torchao",), "int8 and int4 weights; extra [quant]", False),
    ("accelerate", ("accelerate",), "loads those layer by layer; extra [quant]", False),
    ("fastapi", ("fastapi",), "answers over HTTP; extra [serve]", False),
    ("uvicorn", ("uvicorn",), "answers over HTTP; extra [serve]", False),
    ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "image work on the GPU; extra [cuda12] or [cuda13]", False),
    ("cucim", ("cucim-cu13", "cucim-cu12", "cucim"), "image work on the GPU; extra [cuda12] or [cuda13]", False),
)


def examine() -> list[Finding]:
    """All findings, in the order in which they are worth reading. Never raises."""
    findings = [Finding("machine", "Python", f"{platform.python_version()} on {platform.platform()}")]
    for probe in (_memory, _packages, _torchvision, _devices, _extension, _operators):
        try:
            findings += probe()
        except Exception as error:
            findings.append(Finding("machine", probe.__name__.strip("_"), f"cannot be examined: {named(error, 160)}"))
    return findings


def report(findings: list[Finding]) -> str:
    """Findings as plain text, one section after another."""
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += [*([""] if lines else []), section]
        lines.append(f"  {finding.name:<16} {finding.state}")
        if finding.advice:
            lines.append(f"  {'':<16} -> {finding.advice}")
    return "\n".join(lines)


def _memory() -> list[Finding]:
    found = [Finding("machine", "CPU", f"{os.cpu_count()} cores")]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        found.append(Finding("machine", "memory", f"{gib:.1f} GiB"))
    return found


def _packages() -> list[Finding]:
    found = []
    for module, distributions, purpose, needed in PACKAGES:
        advice = ""
        installed = next((name for name in distributions if version(name)), distributions[0])
        if importlib.util.find_spec(module) is None:
            state = f"not installed ({purpose})"
            advice = (INSTALL if module in MODULES else f"pip install {distributions[0]}") if needed else ""
        else:
            state = version(installed) or "version unknown"
            broken = _broken(module)
            if broken:
                state, advice = f"{state}, does not import: {broken}", "reinstall it, or uninstall it"
        found.append(Finding("packages", installed, state, advice))
    return found


def _torchvision() -> list[Finding]:
    if importlib.util.find_spec("torchvision") is None:
        return []
    broken = _broken("torchvision")
    state = f"{version('torchvision')}, {'does not import: ' + broken if broken else 'imports'}"
    advice = "uninstall it: it is not needed, and while it is broken transformers cannot load models" if broken else ""
    return [Finding("packages", "torchvision", state, advice)]


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return [
                Finding("devices", "CUDA", "this PyTorch is a CPU build", "with an NVIDIA GPU: install a CUDA build")
            ]
        return [
            Finding("devices", "CUDA", f"built for {torch.version.cuda}, but no device is seen", "check nvidia-smi")
        ]
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        state = (
            f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
        found.append(Finding("devices", f"cuda:{index}", state))
    return found


def _extension() -> list[Finding]:
    native = importlib.import_module("hide_kernels.native")
    module, reason = native.extension()
    if module is None:
        return [Finding("extension", "host part", f"{reason}: PyTorch and SciPy are used instead", native.BUILD)]
    found = [Finding("extension", "host part", "built, loads")]
    if module.cuda:
        return [*found, Finding("extension", "CUDA part", "built, loads")]
    if importlib.util.find_spec("cupy"):
        return [*found, Finding("extension", "CUDA part", "not built: CuPy compiles the kernels at first use")]
    advice = "with an NVIDIA GPU: install nvcc and a CUDA build of PyTorch, then reinstall; or install CuPy"
    return [*found, Finding("extension", "CUDA part", "not built", advice)]


def _operators() -> list[Finding]:
    backends = _backends()
    found = []
    for operator in backends.OPERATORS:
        explanation = backends.explain(operator)
        for candidate, reason in explanation.candidates:
            verdict = reason or ("runs" if candidate.name == explanation.chosen else "can be asked for")
            found.append(Finding("operators", operator, f"{candidate.name}: {verdict} ({candidate.summary})"))
    return found


def _backends() -> Any:
    """`hide_kernels.backends`, also where the package around it lacks what it imports."""
    try:
        return importlib.import_module("hide_kernels.backends")
    except ImportError:
        package = importlib.util.find_spec("hide_kernels")
        if package is None or not package.submodule_search_locations:
            raise
        file = Path(package.submodule_search_locations[0]) / "backends.py"
        spec = importlib.util.spec_from_file_location("_hide_kernels_backends", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module


def _broken(module: str) -> str:
    """Why a module does not import; empty where it does."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return named(error, 160)
    return ""


def healthy(findings: list[Finding]) -> bool:
    """Whether everything that the package needs is there and imports."""
    needed = {"torchvision", *(name for _, names, _, need in PACKAGES if need for name in names)}
    return not any(finding.advice and finding.name in needed for finding in findings)


def main(echo: Callable[[str], None] = print) -> int:
    """Print the report; 0 if healthy, 1 if something that is needed is missing or broken."""
    findings = examine()
    echo(report(findings))
    return 0 if healthy(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
