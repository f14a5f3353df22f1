"""Softmax attention rows of chosen queries over chosen keys, reduced over heads."""

from hide_kernels.attention_rows.api import AttentionRows, attention_rows, attention_rows_workspace

__all__ = ["AttentionRows", "attention_rows", "attention_rows_workspace"]
