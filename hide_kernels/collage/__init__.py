"""Boxes and an image to a compact image: merge, cut to opaque parts, plan the layout, copy the pixels."""

from hide_kernels.collage.api import Collage, collage, final_boxes
from hide_kernels.collage.boxes import boxes_to_pixels, merge_boxes, opaque_boxes
from hide_kernels.collage.from_maps import collage_of_maps, collages_of_maps
from hide_kernels.collage.layout import Layout, plan_layout, source_boxes

__all__ = [
    "Collage",
    "Layout",
    "boxes_to_pixels",
    "collage",
    "collage_of_maps",
    "collages_of_maps",
    "final_boxes",
    "merge_boxes",
    "opaque_boxes",
    "plan_layout",
    "source_boxes",
]
