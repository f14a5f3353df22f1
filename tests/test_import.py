"""Importing the packages: nothing optional is needed, nothing heavy is loaded before its time, nothing is said."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hide
import hide_kernels
from hide import doctor
from hide.extra import INSTALL, MODULES

OPTIONAL = (
    "triton cupy cupyx cucim torchao flash_attn ray datasets kernels kvpress accelerate skimage fastapi uvicorn".split()
)
HEAVY = [*OPTIONAL, "transformers", "matplotlib", "scipy", "torchvision", "pandas"]
NEED_TRITON = {
    "hide_kernels.attention_received.triton_kernels",
    "hide_kernels.attention_received.triton_launch",
    "hide_kernels.attention_rows.triton_kernels",
    "hide_kernels.attention_rows.triton_launch",
    "hide_kernels.testing.interpreter",
    "hide_kernels.testing.offline",
    "hide_kernels.token_maps.triton_kernels",
    "hide_kernels.token_maps.triton_launch",
}
NEED_SERVE = {"hide.serve.app": "fastapi", "hide.serve.server": "uvicorn"}

NO_NETWORK = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(refuse)
"""


def without(packages):
    """As on a machine where they are not installed: not found by imports nor by those who look first."""
    return f"""
class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {packages} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


WITHOUT_OPTIONAL = without(OPTIONAL)
# Installed with its dependencies alone, without the extra of the commands, torch being as it is.
CORE_ALONE = without([*OPTIONAL, *MODULES, "huggingface_hub", "markupsafe"])
NEXT = "-- the next script --"


def run(*scripts):
    """What each script prints in one fresh process without GPU and network, which says nothing else."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"\nprint({NEXT!r})\n".join((NO_NETWORK, *scripts))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr + done.stdout
    before, *printed = done.stdout.split(f"{NEXT}\n")
    assert before == ""
    return printed


LAZY = """
import json

def loaded(names):
    return [name for name in names if name in sys.modules]

found = {}
import hide
found["hide"] = loaded([*HEAVY, "torch", "numpy"])
from hide import cli
found["hide --help"] = loaded([*HEAVY, "torch", "numpy"])
import hide_kernels
[getattr(hide_kernels, name) for name in hide_kernels.__all__]
found["hide_kernels"] = loaded(HEAVY)
hide.PRESETS, hide.HiDeConfig, hide.Preset
found["settings"] = loaded(HEAVY)
import torch
found["device"] = torch.cuda.is_initialized()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def whole():
    """What `LAZY` and `SAID` print where everything is installed."""
    return run(f"HEAVY = {HEAVY}\n{LAZY}", SAID)


def test_what_is_heavy_is_loaded_by_those_who_use_it(whole):
    found = json.loads(whole[0])
    assert found == {"hide": [], "hide --help": [], "hide_kernels": [], "settings": [], "device": False}


SAID = """
import logging
import hide.models.base
logging.getLogger("torchao").warning("Failed to load /x/torchao/_C_mxfp8.so: Could not load this library")
for name in ("torchao", "torch.utils._pytree", "transformers.modeling_utils"):
    heard = []
    logger = logging.getLogger(name)
    handler = logging.Handler()
    handler.emit = heard.append
    logger.addHandler(handler)
    logger.propagate = False
    logger.warning("a weight is missing")
    print(len(heard))
"""


def test_nothing_is_said_while_models_are_loaded_and_what_matters_is_heard(whole):
    assert whole[1].split() == ["1", "1", "1"]


COMPUTE = """
import torch
from hide_kernels import attention_rows, collage, regions, token_maps

def compute():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 5, 32, generator=generator), torch.randn(1, 2, 143, 32, generator=generator)
    rows = attention_rows(query, key, key_spans=[(4, 130)]).rows[0]
    maps = token_maps([rows.view(5, 9, 14)], prior_rows=2, sigma=1.0)
    found = regions(maps.maps[0], 0.4)
    image = torch.randint(0, 256, (90, 140, 3), dtype=torch.uint8, generator=generator)
    picture = collage(image, 10 * found.boxes[0, : found.counts[0]].long())
    tensors = [rows, *maps.maps, maps.image_index, maps.valid, *found, *picture[:2]]
    return [[list(tensor.shape), tensor.double().sum().item()] for tensor in tensors]
"""

PUBLIC = """
import json
import hide, hide_kernels

names = [getattr(package, name) for package in (hide_kernels, hide) for name in package.__all__]
print(json.dumps([len(names), compute()]))
"""


@pytest.fixture(scope="module")
def bare():
    """What `PUBLIC`, `COMMANDS` and `EACH_ALONE` print where nothing optional is installed."""
    return run("\n".join((WITHOUT_OPTIONAL, COMPUTE, PUBLIC)), COMMANDS, EACH_ALONE)


def test_without_anything_optional_the_public_names_are_there_and_compute_the_same(bare):
    names, computed = json.loads(bare[0])
    assert names == len(hide_kernels.__all__) + len(hide.__all__)
    here = {}
    exec(COMPUTE, here)
    assert computed == here["compute"]()
    assert all(total for _, total in computed[:2])


def test_the_extra_of_the_commands_is_what_the_project_says():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w-]+", one)[0] for one in project["optional-dependencies"]["hide"]]
    assert sorted(names) == sorted(MODULES) and not set(names) & {one.split(">")[0] for one in project["dependencies"]}
    needed = {module for module, _, _, needed in doctor.PACKAGES if needed}
    assert needed == {*MODULES, "torch", "numpy", "scipy", "PIL"}


OPERATORS = """
import importlib, json, pkgutil
import hide_kernels

outcomes = {}
for module in pkgutil.walk_packages(hide_kernels.__path__, "hide_kernels."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        outcomes[module.name] = str(error)
names = [getattr(hide_kernels, name) for name in hide_kernels.__all__]
print(json.dumps([len(names), outcomes, compute()]))
"""


@pytest.fixture(scope="module")
def core():
    """What `HIDE` and `OPERATORS` print where there is the core alone."""
    return run(f"{CORE_ALONE}\n{HIDE}", COMPUTE + OPERATORS)


def test_the_operators_need_torch_numpy_scipy_and_pillow_alone(core):
    names, failed, computed = json.loads(core[1])
    assert names == len(hide_kernels.__all__)
    for capture in ("transformers", "vision", "h2o", "kvpress"):
        said = failed.pop(f"hide_kernels.integrations.{capture}")
        assert said == f"hide_kernels.integrations.transformers needs transformers: {INSTALL}"
    assert failed == dict.fromkeys(NEED_TRITON, "No module named 'triton'")
    here = {}
    exec(COMPUTE, here)
    assert computed == here["compute"]()


HIDE = """
import runpy
import hide

hide.HiDeConfig  # needs nothing
try:
    hide.HiDe
except ImportError as error:
    print(error)
for command in (["--help"], ["models"]):
    sys.argv[1:] = command
    try:
        runpy.run_module("hide", run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""


LACKING = f", which is not installed: {INSTALL}; python -m hide.doctor says what else is missing"


def test_without_its_extra_hide_says_in_one_line_what_to_install(core):
    package, *commands = core[0].splitlines()
    assert package.startswith("hide needs ") and package.endswith(LACKING)
    assert commands == [f"hide needs typer{LACKING}"] * 2, "nothing else is said"


def test_without_transformers_hide_has_its_help_and_says_in_one_line_what_to_install():
    package, *commands = run(without(["transformers"]) + HIDE)[0].splitlines()
    said = ["0", f"hide needs transformers{LACKING}"]
    assert package.startswith("hide needs ") and package.endswith(LACKING)
    assert [line for line in commands if line in said] == said


COMMANDS = """
from hide.cli import app

for command in ("--help", "doctor"):
    try:
        app([command])
    except SystemExit as end:
        assert not end.code, (command, end.code)
"""


def test_without_anything_optional_the_command_line_answers(bare):
    output = " ".join(bare[1].split())
    for text in ("Say what this machine has", "triton not installed"):
        assert text in output


EACH_ALONE = """
import gc, importlib, json, pkgutil
import hide, hide_kernels

def outcome(name):
    try:
        importlib.import_module(name)
        return "imported"
    except BaseException as error:
        return str(error)

packages = [(package.__path__, package.__name__ + ".") for package in (hide_kernels, hide)]
names = [module.name for package in packages for module in pkgutil.walk_packages(*package)]
# What others wrote is slow to import: it is loaded once. Ours is forgotten before each module, which starts from there.
for name in names:
    outcome(name)
gc.freeze()
outcomes = {}
for name in names:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] in ("hide", "hide_kernels")]:
        del sys.modules[loaded]
    outcomes[name] = outcome(name)
print(json.dumps(outcomes))
"""


def test_without_anything_optional_every_other_module_can_be_the_first_to_be_imported(bare):
    outcomes = json.loads(bare[2].splitlines()[-1])
    failed = {name: outcome for name, outcome in outcomes.items() if outcome != "imported"}
    press = "hide_kernels.integrations.kvpress"
    assert failed.pop(press) == f"{press} needs kvpress: pip install kvpress"
    needed = {**dict.fromkeys(NEED_TRITON, "triton"), **NEED_SERVE}
    assert failed == {name: f"No module named {package!r}" for name, package in needed.items()}
    assert len(outcomes) > 100
