"""Any image that a user may hold -> upright RGB or RGBA, as a Pillow image or as a tensor on the model's device."""

from hide.images.decode import decode
from hide.images.read import (
    ImageLike,
    PictureWarning,
    base64_bytes,
    from_base64,
    load_image,
    on_colour,
    picture_notes,
    to_image,
    to_tensor,
    within_aspect,
)

__all__ = [
    "ImageLike",
    "PictureWarning",
    "base64_bytes",
    "decode",
    "from_base64",
    "load_image",
    "on_colour",
    "picture_notes",
    "to_image",
    "to_tensor",
    "within_aspect",
]
