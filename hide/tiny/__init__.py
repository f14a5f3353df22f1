"""The embedded model: a very small vision-language model, trained on drawn scenes, to see the methods work without a
download.

`scenes` draws pictures with known content and asks about them, `letter_forms` puts their options in the forms of data
sets, `model` builds, saves and loads the model. `training`, a folder of the repository, made it; `hide.evaluation` says
how good it is. Import the submodules: this package itself loads nothing, so that drawing needs no torch.
"""

from pathlib import Path

__all__ = ["CHECKPOINT"]

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The folder of the trained model that ships with the package."""
