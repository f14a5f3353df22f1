"""The repository for the kernels hub: what the hub's own client reads, loads and runs, beside the installed package."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hide_kernels
from hide_kernels.integrations.kernels_hub import write_layout

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hide_kernels.__file__).parent
CLIENT = ROOT / "build/kernels"  # made by `make test`
# Packages that the hub does not promise: only for backends of token_maps, which refuse where they are missing.
OPTIONAL = {"token_maps/cupy.py": {"cupy", "cupyx", "cucim"}, "token_maps/reference.py": {"numpy", "scipy"}}

needs_client = pytest.mark.skipif(
    not (CLIENT.exists() or importlib.util.find_spec("kernels")), reason="kernels is not installed: make build/kernels"
)


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_layout(ROOT / "build.toml", folder, "you/hide-kernels")
    return folder


def run(script, *arguments, **environment):
    """Runs in a fresh process that sees the client and this checkout, and no GPU."""
    path = os.pathsep.join([str(ROOT), str(CLIENT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


READ = """
import json, sys
from pathlib import Path
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from kernels.validate import default_metadata_validators
from kernels.variants import get_variants_local

folder = Path(sys.argv[1])
found = {"backends": [str(backend) for backend in Build.open(folder).general.backends], "ids": {}}
for variant in get_variants_local(folder / "build"):
    path = folder / "build" / variant.variant_str
    metadata = Metadata.read_from_file(path / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, path))
    for validator in default_metadata_validators():
        validator.validate_metadata(metadata=metadata, variant=variant.variant_str)
    found["ids"][variant.variant_str] = [metadata.id, metadata.name.python_name, metadata.version, metadata.license]
"""

CARD = """
import re

code, = re.findall(r"^```python\\n(.*?)^```", (folder / "CARD.md").read_text(), re.DOTALL | re.MULTILINE)
assert 'get_kernel("you/hide-kernels", version=0, ' in code
names = {}
exec(code, names)
found["card"] = [list(names["rows"].shape), list(names["lse"].shape), bool(names["valid"].all())]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def seen_by_the_client(layout):
    # The client's own way to have a local folder stand in for what the hub would send.
    return run(READ + CARD, layout, LOCAL_KERNELS=f"you/hide-kernels={layout}")


@needs_client
def test_the_client_reads_and_accepts_every_file_of_the_format(seen_by_the_client):
    found = seen_by_the_client
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["backends"] == ["cpu", "cuda"]
    assert sorted(found["ids"]) == ["torch-cpu", "torch-cuda"]
    for backend in found["backends"]:
        identifier, *described = found["ids"][f"torch-{backend}"]
        assert identifier.startswith(f"_hide_kernels_{backend}_") and identifier.isidentifier()
        assert described == ["hide_kernels", 0, project["license"].lower()]


COMPARE = """
import json, sys
from pathlib import Path
import torch
from kernels import get_local_kernel

folder, order, backend = sys.argv[1:]
if order == "package first":
    import hide_kernels
if backend == "triton":
    # Half of the interpreter's time goes into checks whose outcome it drops.
    from dataclasses import replace
    from triton.runtime.interpreter import interpreter_builder
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
kernel = get_local_kernel(Path(folder))
import hide_kernels

assert kernel is not hide_kernels and Path(kernel.__file__).is_relative_to(folder)
torch.manual_seed(0)
query, key = torch.randn(1, 2, 5, 40), torch.randn(1, 1, 163, 40)
weights = torch.rand(2)
answers = []
for module in (kernel, hide_kernels):
    answer = []
    for arguments in (
        {},
        {"key_spans": [(3, 70), (90, 151)], "head_reduction": "none", "softcap": 20.0},
        {"causal": True, "q_positions": torch.tensor([0, 30, 31, 100, 162]), "head_reduction": weights},
    ):
        answer += module.attention_rows(query, key, **arguments, return_lse=True, backend=backend)
    leaf = query.clone().requires_grad_()
    rows = module.attention_rows(leaf, key, backend=backend).rows  # through torch.library
    rows.square().sum().backward()
    answer += [rows.detach(), leaf.grad]
    if backend == "torch":  # once: torch's compiler takes seconds
        compiled = torch.compile(module.attention_rows, backend="eager", fullgraph=True)
        answer.append(compiled(query, key, backend="torch").rows)
    maps = module.token_maps(
        [rows.detach()[0][:, :161].reshape(5, 7, 23)], prior_rows=2, sigma=1.5,
        backend="scipy" if backend == "torch" else backend,
    )
    answers.append([*answer, *maps.maps, maps.image_index, maps.valid])
ours, theirs = answers
assert all(answer.abs().sum() > 0 for answer in ours if answer.is_floating_point())
print(json.dumps({
    "equal": [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)],
    "operators": sorted(name for name in torch.ops if "hide_kernels" in name),
    "loaded as": kernel.__name__,
}))
"""


@needs_client
@pytest.mark.parametrize("order, backend", [("package first", "torch"), ("kernel first", "triton")])
def test_beside_the_package_the_kernel_gives_the_same_bits_from_operators_of_its_own(layout, order, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    found = run(COMPARE, layout, order, backend, TRITON_INTERPRET="1" if backend == "triton" else "0")
    assert found["equal"] == [True] * len(found["equal"]) and len(found["equal"]) >= 10 + (backend == "torch")
    assert found["operators"] == sorted([found["loaded as"], "hide_kernels"])


ALONE = """
import json, sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hide_kernels", "hide"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from kernels import get_local_kernel

before = set(sys.modules)
kernel = get_local_kernel(Path(sys.argv[1]))
news = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
news = {name for name in news if not name.startswith("_sysconfigdata")}  # the standard library's, named by platform
other = get_local_kernel(Path(sys.argv[2]))
query, key = torch.randn(1, 2, 3, 32), torch.randn(1, 2, 50, 32)
rows = kernel.attention_rows(query, key).rows
print(json.dumps({
    "imported": sorted(news), "id": kernel.__name__, "other": other.__name__,
    "right": torch.allclose(rows[0], (query[0] @ key[0].mT / 32**0.5).softmax(-1).mean(0), atol=1e-6),
    "same": torch.equal(other.attention_rows(query, key).rows, rows),
}))
"""


@needs_client
def test_alone_it_imports_only_torch_and_two_builds_live_in_one_process(layout):
    found = run(ALONE, layout, layout / "build/torch-cuda")
    assert found["imported"] == [found["id"]]
    assert found["right"] and found["same"] and found["id"] != found["other"]


def imports(file):
    """Absolute names (top level) and relative names (dots and all) that a file imports anywhere."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or alias.name) for alias in node.names)


@pytest.mark.parametrize("variant", ["torch-cpu", "torch-cuda"])
def test_every_import_is_relative_or_of_what_the_hub_promises(layout, variant):
    folder = layout / "build" / variant
    seen = set()
    for file in folder.rglob("*.py"):
        path = file.relative_to(folder).as_posix()
        allowed = set(sys.stdlib_module_names) | {"torch", "triton"} | OPTIONAL.get(path, set())
        for level, name in imports(file):
            if level == 0:
                assert name.partition(".")[0] in allowed, f"{path} imports {name}"
                continue
            target = file.parents[level - 1].joinpath(*name.split("."))
            # The compiled kernels stay at home, and backends.py says so where they are asked for.
            if (path, name) != ("backends.py", "native"):
                assert target.with_suffix(".py").exists() or (target / "__init__.py").exists(), f"{path} imports {name}"
            seen.add(name)
    assert {"_ops", "attention_rows.dispatch", "triton_kernels"} <= seen


def test_the_sources_are_the_packages_own_and_their_content_is_their_name(layout, tmp_path):
    for variant in ("build/torch-cpu", "build/torch-cuda", "torch-ext/hide_kernels"):
        files = [file for file in (layout / variant).rglob("*.py") if file != layout / variant / "__init__.py"]
        assert len(files) > 15
        for file in files:
            assert file.read_bytes() == (PACKAGE / file.relative_to(layout / variant)).read_bytes()
    assert not (layout / "torch-ext/hide_kernels/_ops.py").exists()
    write_layout(ROOT / "build.toml", tmp_path / "again", "you/hide-kernels")
    name = "build/torch-cpu/metadata.json"
    assert (tmp_path / "again" / name).read_bytes() == (layout / name).read_bytes()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="folder: got .* want a new one"):
        write_layout(ROOT / "build.toml", tmp_path, "you/hide-kernels")
    assert (tmp_path / "notes").read_text() == "mine"
    write_layout(ROOT / "build.toml", tmp_path / "new", "you/hide-kernels")
    write_layout(ROOT / "build.toml", tmp_path / "new", "me/hide-kernels")
    assert "me/hide-kernels" in (tmp_path / "new" / "CARD.md").read_text()
    (tmp_path / "new/.git").mkdir()  # a clone of the repository on the hub
    with pytest.raises(ValueError, match="folder: got .* want a new one"):
        write_layout(ROOT / "build.toml", tmp_path / "new", "me/hide-kernels")
    assert (tmp_path / "new/.git").exists()


def test_another_content_has_another_name(layout, tmp_path, monkeypatch):
    from hide_kernels.integrations import kernels_hub

    changed = kernels_hub._sources() | {"launch.py": b"# changed\n"}
    monkeypatch.setattr(kernels_hub, "_sources", lambda: changed)
    write_layout(ROOT / "build.toml", tmp_path / "changed", "you/hide-kernels")
    name = "build/torch-cpu/metadata.json"
    ids = [json.loads((folder / name).read_text())["id"] for folder in (tmp_path / "changed", layout)]
    assert ids[0] != ids[1]


@needs_client
def test_the_code_of_the_card_runs(seen_by_the_client):
    assert seen_by_the_client["card"] == [[1, 32, 3885], [1, 28, 32], True]
