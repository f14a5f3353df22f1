"""Nothing here warns: by what name a cache is given, and whole questions with every warning an error."""

import functools
import logging
import warnings

import pytest

from hide import HiDe, Plain
from hide.engine.kv_cache import cache_keyword
from hide.methods.attend import attend
from hide.methods.base import NoSettings
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene

QUESTION = "What is the color of the star?"


def test_a_cache_is_given_by_the_name_in_the_signature():
    def old(self, input_ids=None, past_key_values=None, **kwargs): ...

    def new(self, input_ids=None, cache=None, **kwargs): ...

    @functools.wraps(new)
    def renaming(*args, **kwargs): ...

    assert [cache_keyword(forward) for forward in (old, new, renaming)] == ["past_key_values", "cache", "cache"]


@pytest.mark.parametrize("static", [False, True], ids=["generate", "fixed shapes"])
def test_a_question_warns_of_nothing(static, caplog, monkeypatch):
    image = draw_scene(0, 280, 196, objects=3).image
    # Said once and for all otherwise.
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    from transformers.utils.logging import warning_once

    warning_once.cache_clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        hide = HiDe.from_pretrained(CHECKPOINT, preset="tiny")
        monkeypatch.setattr("hide.engine.prefix.prefers_static_decode", lambda model: static)
        plain = Plain(hide.model, hide.preset.with_settings(NoSettings()))
        with hide.open(image) as session:
            assert hide.ask(session, QUESTION).text and plain.ask(session, QUESTION).text
            assert hide.entities_of([QUESTION, "Is the ring on the left?"])
            assert session.reply(hide.model.input_ids(QUESTION, session.inputs), max_new_tokens=2, static=static)
            attend(hide.model, image, QUESTION, layers=[1], new_tokens=2)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
