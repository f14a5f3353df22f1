"""Operators for attention maps and visual zoom: tensors in, tensors out."""

import hide_kernels.registry  # noqa: F401 (registers the operators)
from hide_kernels.attention_rows import AttentionRows, attention_rows, attention_rows_workspace
from hide_kernels.backends import explain
from hide_kernels.collage import Collage, Layout, collage, collage_of_maps
from hide_kernels.image_tokens import ImageTokens, maps_to_pixels, rows_to_maps
from hide_kernels.patches import pixel_values, resize
from hide_kernels.regions import Regions, regions
from hide_kernels.token_maps import TokenMaps, token_maps

__all__ = [
    "AttentionRows",
    "Collage",
    "ImageTokens",
    "Layout",
    "Regions",
    "TokenMaps",
    "attention_rows",
    "attention_rows_workspace",
    "collage",
    "collage_of_maps",
    "explain",
    "maps_to_pixels",
    "pixel_values",
    "regions",
    "resize",
    "rows_to_maps",
    "token_maps",
]
