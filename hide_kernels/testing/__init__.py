"""Oracles, tolerances and cases to test implementations against; shipped so that others can use them.

`cases` holds calls of `attention_rows` and `attention_received` of every kind and `map_cases` of `token_maps`,
`interpreter` runs Triton kernels on the CPU, `offline` compiles them for cards that are not there.
"""

from hide_kernels.testing.rows import (
    eager_attention_rows,
    error_budget,
    poisoned_empty,
    textbook_attention_received,
    textbook_attention_rows,
)

__all__ = [
    "eager_attention_rows",
    "error_budget",
    "poisoned_empty",
    "textbook_attention_received",
    "textbook_attention_rows",
]
