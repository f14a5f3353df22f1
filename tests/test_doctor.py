"""`hide doctor` on machines where things are missing or broken."""

import subprocess
import sys
import textwrap

import pytest
import torch

from hide import doctor
from hide_kernels import native

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in BLOCKED else real(name, *a)
from hide import doctor
code = doctor.main()
print("code", code)
"""


def run_without(*modules):
    script = f"BLOCKED = {set(modules)!r}\n" + textwrap.dedent(BLOCK)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    ).stdout


def test_nothing_but_torch_is_enough_to_be_told_what_is_missing():
    output = run_without(
        "numpy", "scipy", "transformers", "safetensors", "PIL", "matplotlib", "typer", "rich", "triton", "torchao",
        "accelerate",
    )  # fmt: skip
    assert "pip install 'hide-kernels[hide]'" in output and "pip install pillow" in output
    assert "torch: runs" in output
    assert "scipy is not installed" in output and "numpy is not installed" in output
    assert output.rstrip().endswith("code 1")


def test_a_whole_installation_is_healthy_and_names_every_operators_choice():
    findings = doctor.examine()
    assert doctor.healthy(findings)
    operators = [finding for finding in findings if finding.section == "operators"]
    chosen = {finding.name: finding.state.split(":")[0] for finding in operators if ": runs" in finding.state}
    assert chosen == {
        "attention_rows": "triton" if torch.cuda.is_available() else "torch",
        "attention_received": "triton" if torch.cuda.is_available() else "torch",
        "token_maps": "triton" if torch.cuda.is_available() else "scipy",
        "regions": "scipy" if native.missing("cpu") else "cpp",
        "collage": "numpy" if native.missing("cpu") else "cpp",
        "pixel_values": "pillow" if native.missing("cpu") else "cpp",
    }  # fmt: skip
    reasons = [finding.state for finding in operators if finding.state.startswith("triton: ")]
    assert torch.cuda.is_available() or all("no CUDA device is seen" in reason for reason in reasons)


@pytest.mark.parametrize("module, text", [("scipy", "does not import: RuntimeError: operator x does not exist")])
def test_a_broken_package_is_a_finding_with_advice(monkeypatch, module, text):
    real = doctor.importlib.import_module

    def broken(name):
        if name == module:
            raise RuntimeError("operator x does not exist")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    findings = doctor.examine()
    (finding,) = [finding for finding in findings if finding.name == module]
    assert text in finding.state and "reinstall" in finding.advice
    assert not doctor.healthy(findings) and text in doctor.report(findings)


def test_a_torchvision_that_does_not_import_is_to_be_uninstalled(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if name == "torchvision" else None)
    monkeypatch.setattr(doctor, "_broken", lambda module: "RuntimeError: operator torchvision::nms does not exist")
    (finding,) = doctor._torchvision()
    assert "uninstall" in finding.advice and "nms" in finding.state


def test_a_probe_that_fails_is_reported_and_the_others_go_on(monkeypatch):
    def _devices():
        raise OSError("driver fell over")

    monkeypatch.setattr(doctor, "_devices", _devices)
    report = doctor.report(doctor.examine())
    assert "driver fell over" in report and "attention_rows" in report
