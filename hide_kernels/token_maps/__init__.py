"""Attention rows to purified maps: smooth, normalise, subtract the noise prior."""

from hide_kernels.token_maps.api import TokenMaps, token_maps

__all__ = ["TokenMaps", "token_maps"]
