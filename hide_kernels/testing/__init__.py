"""Oracles and tolerances to test attention-row implementations against; shipped so that others can use them."""

from hide_kernels.testing.rows import eager_attention_rows, error_budget, poisoned_empty

__all__ = ["eager_attention_rows", "error_budget", "poisoned_empty"]
