"""What transformers and torch announce to take away is an error in every test, however they say it."""

import logging
import warnings

import pytest
import torch
from torch import nn
from transformers.utils import logging as their_logging
from transformers.utils.deprecation import deprecate_kwarg

from hide.cli.console import quiet


class Renamed(nn.Module):
    @deprecate_kwarg("past_key_values", version="99.0.0", new_name="cache")
    def forward(self, x, cache=None):
        return x


def test_a_renamed_argument_of_a_model_is_an_error():
    model = nn.Sequential(Renamed())
    with pytest.raises(FutureWarning, match="past_key_values"):
        model[0](torch.zeros(1), past_key_values=None)


def test_what_is_only_logged_is_an_error_and_other_lines_of_the_log_are_not():
    logger = their_logging.get_logger("transformers.models.some")
    with pytest.raises(FutureWarning, match="`old` is deprecated"):
        logger.warning_once("`old` is deprecated. Use `new` instead.")
    logger.warning("Setting `pad_token_id` to `eos_token_id`")


@pytest.mark.parametrize("turn", [1, 2])
def test_a_command_in_a_test_before_hushes_none_after_it(turn):
    assert logging.getLogger("transformers").isEnabledFor(logging.WARNING)
    quiet()


@pytest.mark.parametrize("module", ["hide.engine", "test_session", "torch.nn.modules.module", "transformers.trainer"])
def test_a_deprecation_is_an_error_where_we_or_they_call(module):
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("gone soon", DeprecationWarning, "file.py", 1, module=module)


def test_other_libraries_may_deprecate_among_themselves():
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("gone soon", DeprecationWarning, "file.py", 1, module="dateutil.tz")
    assert len(seen) == 1
