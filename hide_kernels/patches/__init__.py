"""A picture to what a vision encoder eats: Pillow's resize, normalisation, patches; and files to pictures."""

from hide_kernels.patches.api import pixel_values, resize

__all__ = ["pixel_values", "resize"]
