"""An image to a vision encoder's input: Pillow's resize, normalisation, patches."""

from hide_kernels.pixel_values.api import pixel_values, resize

__all__ = ["pixel_values", "resize"]
