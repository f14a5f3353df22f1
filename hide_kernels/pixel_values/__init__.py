"""An image to a vision encoder's input: Pillow's resize, normalisation, patches; and files to images."""

from hide_kernels.pixel_values.api import pixel_values, resize
from hide_kernels.pixel_values.decode import decode

__all__ = ["decode", "pixel_values", "resize"]
