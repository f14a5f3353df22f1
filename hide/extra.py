"""What `hide` needs beside the operators, the extra [hide]: where it is missing, one line says what to install."""

from __future__ import annotations

INSTALL = "pip install 'hide-kernels[hide]'"
MODULES = ("filelock", "jinja2", "matplotlib", "pyarrow", "rich", "safetensors", "tokenizers", "transformers", "typer")


def lacking(error: ImportError) -> str | None:
    """What to say of an import that failed for want of the extra; `None`: it is not that."""
    missing = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or missing not in MODULES:
        return None
    return f"hide needs {missing}, which is not installed: {INSTALL}; python -m hide.doctor says what else is missing"
