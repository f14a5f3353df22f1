"""Right answers over the share of questions with wrong entities: what two answers of each question make of it."""

import itertools
import json
import sys
from statistics import fmean

import pytest
from PIL import Image

from benchmarks import wrong_entities
from benchmarks.wrong_entities import absorbed_table, curves, expected, way, ways_of
from hide import HiDe
from hide.evaluation.data import scenes
from hide.evaluation.runner import answer
from hide.evaluation.scoring import share
from hide.methods.ablations import WithoutPrior
from hide.tiny import CHECKPOINT

KINDS = ("", "drop", "wrong", "add")


def test_the_expected_share_is_the_mean_over_all_ways_to_corrupt_questions():
    clean, corrupted = [True, True, False, None, True], [False, True, None, True, False]
    for part in (0.25, 0.5):
        every = 0.0
        for chosen in itertools.product((False, True), repeat=5):
            probability = part ** sum(chosen) * (1 - part) ** (5 - sum(chosen))
            said = (b if wrong else a for a, b, wrong in zip(clean, corrupted, chosen, strict=True))
            every += probability * fmean(one is True for one in said)
        found = expected(clean, corrupted, part)
        assert found.value == pytest.approx(every) and found.low < every < found.high
    # At the ends nothing is left to chance: the shares of the tables.
    assert expected(clean, corrupted, 0.0)[2:] == pytest.approx(share(clean)[2:])
    assert expected(clean, corrupted, 1.0)[2:] == pytest.approx(share(corrupted)[2:])


def record(number, right=(), regions=True, **entities):
    """right: ways that answer rightly; all others are wrong."""
    names = [f"plain{view}" for view in wrong_entities.VIEWS]
    names += [way(name, view, how) for name in wrong_entities.METHODS for view in wrong_entities.VIEWS for how in KINDS]
    found = {name: entities.get(name.partition(", ")[2] or "clean", ["star"]) for name in names}
    return {
        "id": str(number), "split": "s", "question": "What  color?", "options": [], "answer": "red", "error": None,
        "picture": "", "notes": [], "tokens": {}, "seconds": {},
        "replies": {name: "red" if name in right else "blue" for name in names},
        "boxes": {name: [[[0, 0, 4, 4]]] if regions else [[]] for name in names},
        "details": {
            name: {"entities": own, "signals": {"without_map": 1, "peaks": [9.0, 3.0, 2.0, 1.0]}}
            for name, own in found.items()
        },
    }  # fmt: skip


def test_curves_run_from_the_clean_answers_to_the_corrupted_ones():
    records = [record(0, ["hide", "hide, add"]), record(1, ["hide", "hide, drop"]), record(2, ["hide@auto, drop"])]
    found = curves(records)
    assert [round(one.value, 3) for one in found["hide, drop"]] == [0.667, 0.583, 0.5, 0.417, 0.333]
    assert [one.value for one in found["hide@auto, drop"]] == pytest.approx([0, 1 / 12, 1 / 6, 1 / 4, 1 / 3])
    assert all(one.value == 0 for one in found["no-prior, wrong"])


def test_what_absorbs_errors_is_counted():
    records = [record(0, ["hide"], regions=False, drop=["What color?"]), record(1, ["hide", "hide, drop"])]
    rows = {row[0]: row[1:] for row in absorbed_table(records).rows}
    assert rows["hide"] == ("100%", "", "", "+100.0", "25%", "0%", "50%")
    assert rows["hide, drop"] == ("50%", "-50.0 (-100 to +0)", "1.000", "+50.0 (+0 to +100)", "25%", "50%", "50%")
    assert rows["no-prior, drop"][3] == "", "it is not compared with itself"


def test_each_question_is_asked_with_the_same_error_in_every_way():
    hide = HiDe.from_pretrained(CHECKPOINT, max_new_tokens=2)
    ways = ways_of(hide, "scenes")
    assert len(ways) == 2 * (1 + 2 * 4) and isinstance(ways["no-prior@auto, add"], WithoutPrior)
    (sample,) = scenes(1, sizes=[(280, 196)])
    found = answer(ways, sample)
    assert found["error"] is None
    entities = {name: own["entities"] for name, own in found["details"].items() if "entities" in own}
    for how in KINDS:
        told = {tuple(entities[way(name, view, how)]) for name in ("hide", "no-prior") for view in ("", "@auto")}
        assert len(told) == 1, how
    clean, added = entities["hide"], entities["hide, add"]
    assert added[:-1] == clean and entities["hide, wrong"] != clean != entities["hide, drop"]
    absorbed_table([found])


def test_the_command_goes_on_and_writes_json_tables_and_a_picture(monkeypatch, tmp_path, small_scenes):
    asked = []

    def ask(ways, samples):
        for sample in samples:
            asked.append(sample.id)
            yield record(0, ["hide"]) | {"id": sample.id, "question": sample.question.stem, "picture": sample.picture}

    monkeypatch.setattr(wrong_entities, "ask_here", ask)
    monkeypatch.setattr(wrong_entities, "ways_of", lambda hide, data: {})
    for limit in ("2", "3"):
        monkeypatch.setattr(sys, "argv", ["wrong_entities", "--limit", limit, "--out", str(tmp_path)])
        assert wrong_entities.main() == 0
    assert len(asked) == 3
    document = json.loads((tmp_path / "curves.json").read_text())
    assert document["questions"] == 3 and len(document["curves"]["hide@auto, wrong"]) == len(document["shares"])
    page = (tmp_path / "wrong-entities.md").read_text()
    assert "--limit 3" in page and "| hide, drop |" in page and "no region" in page and "nan" not in page
    with Image.open(tmp_path / "wrong-entities.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
