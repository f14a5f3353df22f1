"""Lays out the Triton part as a repository of the Hugging Face kernels hub; `make hub` runs it.

The format is edition 5 of `build.toml`, which `kernels` 0.17 reads, as described in its documentation (huggingface.co/
docs/kernels, "Write kernels" and "Kernel requirements"). The sources are copied as they are: modules that travel import
each other relatively, because the hub loads them under a name that says their content.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import importlib.metadata
import inspect
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import hide_kernels
from hide_kernels.backends import OPERATORS

PACKAGE = Path(__file__).parents[1]
FUNCTIONS = ("attention_rows", "attention_received", "token_maps")
# Their folders, and the modules that those import.
TRAVELS = (*FUNCTIONS, "_ops.py", "backends.py", "launch.py", "registry.py")

CARD = """\
---
library_name: kernels
license: {license}
tags:
- kernels
---

# {name}

{functions}

```python
import torch
from kernels import get_kernel

kernel = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
device = "cuda" if torch.cuda.is_available() else "cpu"
query = torch.randn(1, 28, 32, 128, dtype=torch.float16, device=device)  # the chosen rows, after RoPE
key = torch.randn(1, 4, 4000, 128, dtype=torch.float16, device=device)  # the layer's keys, never repeated for GQA
rows, lse = kernel.attention_rows(query, key, key_spans=[(15, 3900)], return_lse=True)  # (1, 32, 3885), mean over heads
maps, image_index, valid = kernel.token_maps([rows[0].view(32, 37, 105)], prior_rows=8, sigma=1.0)
```

`help(kernel.attention_rows)` has shapes, dtypes and errors; `kernel.explain("attention_rows")` says what runs, and why:

{backends}

From hide-kernels {package_version}.
"""


def write_layout(build_toml: Path, folder: Path, repo_id: str) -> list[Path]:
    """Write the repository that `build_toml` describes into `folder`, where a former one goes.

    `torch-ext` is what kernel-builder builds from, `build` what it would make of that and the `kernels` client loads:
    one variant per backend, with the name of its content. Returns the variants' folders.

    Raises `ValueError` for a folder that holds something else.
    """
    if folder.exists():
        # A clone of the repository has CARD.md too, and its history beside it.
        found = {path.name for path in folder.iterdir()}
        if found and not {"CARD.md"} <= found <= {"build.toml", "CARD.md", "torch-ext", "build"}:
            raise ValueError(f"folder: got {folder}, which holds something else, want a new one or a former layout")
        shutil.rmtree(folder)
    general = tomllib.loads(build_toml.read_text(encoding="utf-8"))["general"]
    module = general["name"].replace("-", "_")
    sources = _sources()
    content = hashlib.sha256(b"".join(path.encode() + text for path, text in sources.items())).hexdigest()[:8]
    _write(folder, {"build.toml": build_toml.read_bytes(), "CARD.md": _card(general, repo_id).encode()})
    # kernel-builder makes `_ops.py` by itself.
    _write(folder / "torch-ext" / module, {path: text for path, text in sources.items() if path != "_ops.py"})
    variants = []
    for backend in general["backends"]:
        identifier = f"_{module}_{backend}_{content}"
        digest = {path: base64.b64encode(hashlib.sha256(text).digest()).decode() for path, text in sources.items()}
        metadata = {
            "name": general["name"],
            "id": identifier,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digest},
        }
        variants.append(folder / "build" / f"torch-{backend}")
        _write(variants[-1], sources | {"metadata.json": (json.dumps(metadata, indent=2) + "\n").encode()})
    return variants


def _sources() -> dict[str, bytes]:
    """Path in the kernel -> content, in order of paths."""
    files = [PACKAGE / name for name in TRAVELS if name.endswith(".py")]
    files += [file for name in FUNCTIONS for file in (PACKAGE / name).rglob("*.py")]
    copied = {file.relative_to(PACKAGE).as_posix(): file.read_bytes() for file in files}
    return dict(sorted((copied | {"__init__.py": _init().encode()}).items()))


def _init() -> str:
    """The package's own `__init__.py` without the operators that stay."""
    modules = {name.removesuffix(".py") for name in TRAVELS}
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    kept = [node for node in imports if (node.module or node.names[0].name) in modules]
    public = sorted(alias.name for node in kept if node.module for alias in node.names)
    names = "".join(f'    "{name}",\n' for name in public)
    lines = "\n".join(map(ast.unparse, kept))
    return f'"""{ast.get_docstring(tree)}"""\n\n{lines}\n\n__all__ = [\n{names}]\n'


def _card(general: dict[str, Any], repo_id: str) -> str:
    functions = {name: getattr(hide_kernels, name) for name in FUNCTIONS}
    summaries = {name: (inspect.getdoc(function) or "").splitlines()[0] for name, function in functions.items()}
    candidates = [(name, backend) for name in FUNCTIONS for backend in OPERATORS[name]]
    return CARD.format(
        name=general["name"],
        version=general["version"],
        license=general["license"],
        repo_id=repo_id,
        functions="\n".join(f"- `{name}`: {summary}" for name, summary in summaries.items()),
        backends="\n".join(f"- `{name}`, `{backend.name}`: {backend.summary}" for name, backend in candidates),
        package_version=importlib.metadata.version("hide-kernels"),
    )


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def main() -> int:
    """`make hub`: write the layout and print its variants; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the repository is written")
    parser.add_argument("--repo-id", required=True, help="OWNER/NAME on the hub, for the card")
    parser.add_argument("--build-toml", type=Path, default=Path("build.toml"))
    arguments = parser.parse_args()
    for variant in write_layout(arguments.build_toml, arguments.folder, arguments.repo_id):
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main())
