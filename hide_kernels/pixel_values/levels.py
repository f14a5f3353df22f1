"""What each of the 256 levels of a channel becomes: the arithmetic of Hugging Face's image processors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def normalised_values(mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """(3, 256): what each value of each channel becomes; scaled in float64, normalised in float32."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
