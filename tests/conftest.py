"""Settings that every test shares."""

import os

# Before numpy and torch are loaded, and for the processes that tests start. Small models gain nothing from threads,
# parallel test processes would fight over the cores, and sums would depend on how many there are.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

# Both try the same examples every time; "many" is what `make fuzz` runs.
settings.register_profile("few", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("many", deadline=None, derandomize=True, max_examples=600, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


def pytest_collection_modifyitems(items):
    import pytest

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
