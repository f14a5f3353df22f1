"""Operators for attention maps and visual zoom: tensors in, tensors out."""

from . import registry  # noqa: F401 (registers the operators)
from .attention_received import AttentionReceived, attention_received
from .attention_rows import AttentionRows, attention_rows, attention_rows_workspace
from .backends import explain
from .collage import Collage, Layout, collage, collage_of_maps
from .image_tokens import ImageTokens, maps_to_pixels, rows_to_maps
from .pixel_values import pixel_values, resize
from .regions import Regions, regions
from .token_maps import TokenMaps, token_maps

__all__ = [
    "AttentionReceived",
    "AttentionRows",
    "Collage",
    "ImageTokens",
    "Layout",
    "Regions",
    "TokenMaps",
    "attention_received",
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
