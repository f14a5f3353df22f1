"""The methods' prompts: a question's own letters are asked for, nothing stays unfilled, a box has the form that is asked for."""

import re

import pytest

from hide.methods.prompts import ZOOM_REFINE_ASK, ZOOM_REFINE_RECHECK, box_text, filled
from hide.questions import Question

FREE = Question("What is {answer} of {box}?")
LETTERED = Question("What is the color?", ("red", "green", "blue"))


@pytest.mark.parametrize("template", [ZOOM_REFINE_ASK, ZOOM_REFINE_RECHECK])
def test_zoom_refine(template):
    lettered, free = filled(template, LETTERED), filled(template, FREE)
    assert "Letter is one of A, B or C." in lettered and "Letter" not in free
    assert not re.search("[{}]", lettered)
    assert (FREE.stem in free) == (LETTERED.text in lettered) == (template is ZOOM_REFINE_ASK)


def test_a_box():
    assert box_text((10, 20, 100, 60), (100, 80)) == "[0.10, 0.25, 1.00, 0.75]"
