"""Maps to boxes and scores: threshold, connected components."""

from hide_kernels.regions.api import Regions, regions

__all__ = ["Regions", "regions"]
