"""Settings that every test shares."""

import functools
import gc
import logging
import os
import re
import warnings

# Before numpy and torch are loaded, and for the processes that tests start. Small models gain nothing from threads,
# parallel test processes would fight over the cores, and sums would depend on how many there are.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

# Both try the same examples every time; "many" is what `make fuzz` runs.
settings.register_profile("few", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("many", deadline=None, derandomize=True, max_examples=480, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


class DeprecationsLogged(logging.Handler):
    """Turns what transformers only logs as deprecated into a warning, which pyproject.toml makes an error."""

    def emit(self, record):
        if re.search(r"deprecat|will be removed", record.getMessage(), re.IGNORECASE):
            warnings.warn(record.getMessage(), FutureWarning, stacklevel=2)


logging.getLogger("transformers").addHandler(DeprecationsLogged(logging.WARNING))


# Imports of a whole suite leave no garbage that is worth looking for.
gc.disable()


def pytest_collection_finish():
    # What was imported stays: without this every collection of garbage, many of them asked for, looks through it.
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()


def pytest_runtest_setup(item):
    logging.getLogger("transformers").setLevel(logging.WARNING)  # a test before may have run a command, which hushes it


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def small_scenes(monkeypatch):
    """The scenes that commands draw by themselves are small: of the usual ones the first takes seconds to encode."""
    from hide.evaluation import data

    monkeypatch.setattr(data, "scenes", functools.partial(data.scenes, sizes=[(280, 196)]))
