"""Attention rows to purified maps: smooth, normalise, subtract the noise prior."""

from .api import TokenMaps, token_maps

__all__ = ["TokenMaps", "token_maps"]
