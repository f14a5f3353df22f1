"""The namespace in which this copy of the package registers its operators: the name that it was imported by.

Copies that the kernels hub loads beside the installed package have other names, so nothing is registered twice.
kernel-builder makes a module with this name and these two members for every build, and looks for their use.
"""

import torch

_NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` as `torch.library` wants it."""
    return f"{_NAMESPACE}::{op_name}"
