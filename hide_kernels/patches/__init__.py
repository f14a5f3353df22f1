"""A picture to what a vision encoder eats: Pillow's resize, normalisation, patches; and files to pictures."""

from hide_kernels.patches.api import pixel_values, resize
from hide_kernels.patches.decode import decode

__all__ = ["decode", "pixel_values", "resize"]
