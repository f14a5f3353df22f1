"""Operators for attention maps and visual zoom: tensors in, tensors out."""

from hide_kernels.attention_rows import AttentionRows, attention_rows
from hide_kernels.backends import explain

__all__ = ["AttentionRows", "attention_rows", "explain"]
