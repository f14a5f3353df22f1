"""Softmax attention rows of chosen queries over chosen keys, reduced over heads."""

from .api import AttentionRows, attention_rows, attention_rows_workspace

__all__ = ["AttentionRows", "attention_rows", "attention_rows_workspace"]
