"""How much attention each key receives from all queries, without the attention matrix."""

from .api import AttentionReceived, attention_received

__all__ = ["AttentionReceived", "attention_received"]
