"""The frontier of accuracy over cost: what is asked once, counted for each way, gone on with, and replayed."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from PIL import Image
from region_branches import save, with_branches

from benchmarks import frontier, frontier_tuning
from benchmarks.frontier import ALWAYS, AUTO, GATED, NEVER, SMALLER, Size
from benchmarks.frontier_tuning import Outcome
from hide import HiDe
from hide.evaluation.scoring import difference
from hide.methods.base import Method
from hide.methods.q_zoom.method import QZoom
from hide.tiny import CHECKPOINT

UNSURE = {"margin": 1.0, "peaks": [900.0, 80.0], "collage": 0.6}
SURE = {"margin": 6.0, "peaks": [900.0, 700.0], "collage": 0.1}


@pytest.fixture(scope="module")
def hide():
    return HiDe.from_pretrained(CHECKPOINT)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(frontier, "SIZES", {"few": Size((120, 140), 9, 5_300_000, 4_300_000)})


def record(number, size="4k", **ways):
    """ways: name -> (reply, tokens without the session's, signals); sessions of "hide" have 1,000 tokens, of others
    their view's."""
    opened = {"hide": 1000, "hide 200": 200, "hide 400": 400, AUTO: 300}
    own = {way.replace("_", " "): said for way, said in ways.items()}
    sessions = {"plain": "hide", "plain 200": "hide 200", "plain 400": "hide 400"}
    cost = {way: opened[sessions.get(way, way if way in opened else AUTO)] + said[1] for way, said in own.items()}
    return {
        "id": f"{size}-{number}",
        "split": size,
        "picture": f"{size}-{number // 2}",
        "question": "What color?",
        "options": [],
        "answer": "red",
        "error": None,
        "images": [[1120, 700]],
        "replies": {way: said[0] for way, said in own.items()},
        "tokens": cost,
        "seconds": {way: float(tokens) for way, tokens in cost.items()},
        "opened": {session: {"tokens": tokens, "seconds": float(tokens)} for session, tokens in opened.items()},
        "details": {way: {"signals": said[2]} if len(said) > 2 else {} for way, said in own.items()},
        "shown": dict.fromkeys(own, 40),
    }


def test_a_difference_is_of_pairs_and_its_interval_of_groups():
    ours, theirs = [True, True, None, False] * 5, [False, True, True, False] * 5
    assert difference(ours, theirs, [str(number) for number in range(20)]).value == 0
    lead = difference([True] * 12, [False, True, True] * 4, [str(number // 3) for number in range(12)])
    # Every group leads by a third: resampling has nothing to say.
    assert lead.value == pytest.approx(1 / 3) and math.isnan(lead.low) and str(lead) == "+33.3"
    apart = difference([True] * 6 + [False] * 6, [False] * 6 + [True] * 6, [str(number // 6) for number in range(12)])
    alone = difference([True] * 6 + [False] * 6, [False] * 6 + [True] * 6, [str(number) for number in range(12)])
    assert apart.low == -1 < alone.low < 0 < alone.high < apart.high == 1
    one = difference([True], [False], ["a"])
    assert one.value == 1 and math.isnan(one.low) and str(one) == "+100.0" and str(difference([], [], [])) == "none"


def test_all_ways_on_one_view_share_a_session_per_image_that_each_pays_for(hide, small, monkeypatch):
    opened, real = [], Method.open
    monkeypatch.setattr(
        Method, "open", lambda self, *a, **k: (opened.append(self.preset.run.view_tokens), real(self, *a, **k))[1]
    )
    samples = list(frontier.scene_samples("few", 2))
    assert len({sample.picture for sample in samples}) == 1 and samples[0].split == "few"
    runs = frontier.runs_of(hide, [60, 5000], gate=0.0)
    records = frontier.ask_image(runs, samples)
    # 5,000 tokens show what the whole image shows.
    assert opened == [None, 60, "auto", "auto"]
    for own in records:
        assert own["error"] is None
        assert list(own["replies"]) == [
            "plain",
            "hide",
            "plain 60",
            "hide 60",
            "plain auto",
            AUTO,
            ALWAYS,
            NEVER,
            SMALLER,
            GATED,
        ]
        assert own["opened"]["hide"]["tokens"] > 2 * own["opened"]["hide 60"]["tokens"]
        for way, session in (("plain", "hide"), ("plain 60", "hide 60"), (NEVER, AUTO), (GATED, SMALLER)):
            assert own["opened"][way] == own["opened"][session]
            assert own["tokens"][way] > own["opened"][session]["tokens"]
            assert own["seconds"][way] > own["opened"][session]["seconds"] > 0
        # A gate that every plain answer passes.
        assert (
            own["replies"][GATED] == own["replies"]["plain auto"]
            and own["tokens"][GATED] == own["tokens"]["plain auto"]
        )
        assert own["details"]["plain 60"]["signals"]["margin"] >= 0 and own["details"][NEVER]["signals"]["peaks"]
        assert own["shown"]["plain"] == 0 < own["shown"]["hide"]


def test_seeds_for_tuning_are_others_and_more_questions_begin_with_the_same(small):
    three, five = (list(frontier.scene_samples("few", number)) for number in (3, 5))
    assert [one.id for one in three] == [one.id for one in five[:3]]
    assert [one.question.text for one in three] == [one.question.text for one in five[:3]]
    assert not {one.id for one in five} & {one.id for one in frontier.scene_samples("few", 5, tuning=True)}


def test_the_command_draws_tables_and_goes_on_where_it_was(hide, small, monkeypatch, tmp_path, capsys):
    asked = []

    def answered(runs, samples):
        asked.extend(samples)
        chosen = dict.fromkeys(("plain auto", AUTO, ALWAYS, NEVER, SMALLER, GATED), ("red", 30, SURE))
        fixed = {
            "plain": ("blue", 0),
            "hide": ("red", 90),
            "plain 200": ("red", 5, SURE),
            "hide 200": ("red", 60, SURE),
        }
        about = [{"id": own.id, "picture": own.picture, "split": own.split} for own in samples]
        return [record(0, **fixed, **chosen) | own for own in about]

    monkeypatch.setattr(frontier, "ask_image", answered)
    monkeypatch.setattr(frontier.HiDe, "from_pretrained", lambda path: hide)
    monkeypatch.setattr(frontier, "predicted_memory", lambda ways, records: {"plain": 81_000_000})

    def run(*more):
        monkeypatch.setattr(
            sys, "argv", ["frontier", "--sizes", "few", "--views", "200", "--out", str(tmp_path), *more]
        )
        return frontier.main()

    assert run("--questions", "2") == 0
    assert run("--questions", "3") == 0 and len(asked) == 3
    page = (tmp_path / "frontier.md").read_text()
    assert "--questions 3" in page and "few: 3 questions about" in page and "| 81 MB |" in page
    assert "| hide 200 |" in page and "nan" not in page
    with Image.open(tmp_path / "frontier.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    with pytest.raises(ValueError, match="was made with other settings"):
        run("--gate", "1")
    monkeypatch.setattr(sys, "argv", ["frontier_tuning", str(tmp_path)])
    capsys.readouterr()
    assert frontier_tuning.main() == 0
    said = capsys.readouterr().out
    assert all(f"### {family}:" in said for family in ("as it is", "fixed views", "gates", "second looks"))


def test_an_image_that_fails_costs_its_own_questions(hide, small):
    def broken():
        raise OSError("gone")

    sample = dataclasses.replace(next(frontier.scene_samples("few", 1)), image=broken)
    (failed,) = frontier.ask_image(frontier.runs_of(hide, [], 1.0), [sample])
    assert failed["error"] == "OSError: gone" and failed["id"] == sample.id
    good = record(0, plain=("red", 0), hide=("red", 50))
    table = frontier.size_table("4k", [good, failed | {"picture": "p"}], {})
    assert table.title == "4k: 1 questions about 2 images, 1 failed" and len(table.rows) == 2


def test_tables_have_costs_as_parts_of_the_plain_answers():
    records = [
        record(0, plain=("blue", 0), hide=("red", 100), hide_200=("red", 50)),
        record(1, plain=("red", 0), hide=("red", 100), hide_200=("blue", 50)),
    ]
    found = frontier.points(records)
    assert found["hide 200"].tokens == 250 and found["hide 200"].token_part == 0.25 == found["hide 200"].second_part
    assert found["hide"].share.right == 2 and found["plain"].share.right == 1
    rows = {row[0]: row for row in frontier.size_table("4k", records, {}).rows}
    assert rows["hide"][2].startswith("+50.0") and rows["plain"][2] == "" and rows["hide 200"][3].startswith("-50.0")
    small = [record(0, "2k", plain=("red", 0), hide=("red", 100))]
    together = {row[0]: row for row in frontier.together_table({"4k": records, "2k": small}).rows}
    # Where the view is no smaller, the whole image: (0.5 + 1) / 2 right, (0.25 + 1.1) / 2 of the tokens.
    assert together["hide 200"] == ("hide 200", "75.0%", "0.675", "0.675")


# -- Q-Zoom -----------------------------------------------------------------------------------------------------------


def test_q_zoom_is_asked_at_each_budget_with_and_without_training(small, tmp_path):
    trained = QZoom.from_pretrained(
        save(tmp_path, with_branches("qwen2_5_vl"), prefix="model."), min_tokens=50, max_new_tokens=2
    )
    untrained = frontier.without_training(tmp_path, trained.preset)
    assert untrained.branches.layer == trained.branches.layer and len(untrained.branches.gate) == 3
    weights = [method.branches.regions[0].mlp.up_proj.weight for method in (trained, untrained)]
    assert weights[0].shape == weights[1].shape and not torch.equal(*weights)
    runs = frontier.zoom_runs(trained, untrained, [40, 5000])
    (record,) = frontier.ask_image(runs, list(frontier.scene_samples("few", 1)))
    assert record["error"] is None
    assert list(record["replies"]) == ["q-zoom 40", "q-zoom 40, gate open", "q-zoom 40, untrained"]
    assert record["opened"]["q-zoom 40"]["tokens"] < 70 and 0 < record["details"]["q-zoom 40, gate open"]["gate"] < 1
    (_, opened), (other,) = (list(run.ways.values()) for run in runs[:2])
    assert opened.preset.run.max_tokens == 40 and opened.settings.gate_threshold == 0 == other.settings.gate_threshold


def zoomed(number, plain, gate, answer="red", **ways):
    own = record(
        number, **{"plain": ("red", 0), "plain 200": plain, "hide 200": ("red", 50), "q-zoom 200": (answer, 20)}, **ways
    )
    own["replies"]["q-zoom 200, gate open"] = "red"
    own["details"] |= {"q-zoom 200, gate open": {"gate": gate}, "q-zoom 200": {"zoomed": gate > 0.1}}
    own["tokens"]["q-zoom 200, gate open"] = own["seconds"]["q-zoom 200, gate open"] = 1.0
    return own


def test_the_gates_area_is_how_often_a_wrong_answer_has_the_higher_probability():
    assert frontier.area([0.9, 0.4], [0.4, 0.1]) == 7 / 8 and math.isnan(frontier.area([], [0.5]))
    records = [
        zoomed(0, ("blue", 5), 0.9),
        zoomed(1, ("red", 5), 0.05),
        zoomed(2, ("blue", 5), 0.4),
        zoomed(3, ("red", 5), 0.6),
    ]
    (row,) = frontier.gate_table("4k", records).rows
    assert row == ("200", "0.750", "2", "2", "75.0%")


def test_what_is_saved_is_read_off_at_the_best_plain_accuracy():
    records = [zoomed(0, ("blue", 5), 0.9), zoomed(1, ("red", 5), 0.05)]
    rows = {row[0]: row for row in frontier.saved_table({"4k": records}).rows}
    # Plain: 1,000 tokens, always right; HiDe's view 250, Q-Zoom 320: as right.
    assert rows["4k, hide"][1:] == ("100.0%", "1000.00", "hide 200", "4.00", "4.00", "hide 200, 100.0%", "+0.0")
    assert rows["4k, q-zoom"][3:6] == ("q-zoom 200", "3.12", "3.12")
    worse = [zoomed(0, ("blue", 5), 0.9, "blue"), zoomed(1, ("red", 5), 0.05)]
    assert frontier.saved_table({"4k": worse}).rows[1][3:] == ("none", "", "", "q-zoom 200, 50.0%", "-50.0")


# -- replayed ---------------------------------------------------------------------------------------------------------


def replayed(signals, plain=("red", 0)):
    return record(
        0,
        plain=plain,
        hide=("red", 100),
        plain_200=("blue", 20, signals),
        hide_200=("blue", 60, signals),
        plain_400=("red", 20, signals),
        hide_400=("red", 60, signals),
    )


def test_a_gate_pays_for_the_plain_answer_and_opens_one_session():
    gate = frontier_tuning.gated(200, 3.0)
    assert gate(replayed(SURE)) == Outcome(False, 0.22, 0.22)
    assert gate(replayed(UNSURE)) == Outcome(False, pytest.approx(0.28), pytest.approx(0.28))
    assert frontier_tuning.gated(400, 3.0)(replayed(UNSURE)).right
    assert frontier_tuning.gated(9000, math.inf)(replayed(SURE)) == Outcome(True, 1.1, 1.1)


def test_a_ladder_pays_for_both_sessions():
    for name, least in (("margin", 3.0), ("peaks", 100.0)):
        climbs = frontier_tuning.ladder(200, 400, name, least)
        assert climbs(replayed(SURE)) == Outcome(False, 0.26, 0.26)
        assert climbs(replayed(UNSURE)) == Outcome(True, pytest.approx(0.72), pytest.approx(0.72))


def test_a_second_look_is_where_the_collage_is_large():
    def looked(signals):
        return record(0, **{"plain": ("red", 0), ALWAYS: ("red", 40), NEVER: ("blue", 90, signals)})

    policy = frontier_tuning.second_look(0.5)
    assert policy(looked(UNSURE)) == Outcome(True, 0.34, 0.34)
    assert policy(looked(SURE)) == Outcome(False, 0.39, 0.39)


def test_a_rule_takes_the_recorded_view_that_is_nearest_in_proportion():
    own = replayed(SURE)  # 1,000 tokens
    for factor, exponent, way in (
        (0.2, 1.0, "hide 200"),
        (8.9, 0.5, "hide 200"),
        (9.0, 0.5, "hide 400"),
        (3.0, 1.0, "hide"),
    ):
        assert frontier_tuning.by_size(factor, exponent)(own) == frontier_tuning.outcome(own, way)
    assert frontier_tuning.fixed(400)(own).tokens == 0.46 and frontier_tuning.fixed(9000)(own).tokens == 1.1


def test_sizes_count_alike_and_what_another_beats_is_left_out():
    records = [replayed(SURE), replayed(SURE), {**replayed(SURE, plain=("red", 1000)), "split": "2k"}]
    found = frontier_tuning.score("hide 200", frontier_tuning.fixed(200), records)
    assert found.tokens == pytest.approx((0.26 + 0.13) / 2) and found.by_size == {"4k": (0, 0.26), "2k": (0, 0.13)}

    def scored(name, right, tokens):
        return frontier_tuning.Score(name, right, tokens, 0.0, {})

    tried = [
        scored("a", 0.5, 0.1),
        scored("b", 0.4, 0.2),
        scored("c", 0.9, 0.3),
        scored("d", 0.8, 0.3),
        scored("e", 0.9, 0.5),
    ]
    assert [one.name for one in frontier_tuning.undominated(tried)] == ["a", "c"]


def test_of_a_question_that_was_asked_twice_the_last_record_counts(tmp_path):
    lines = [
        {"settings": {}},
        replayed(UNSURE) | {"error": "x"},
        replayed(SURE),
        {**replayed(SURE), "id": "b", "error": "y"},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (kept,) = frontier_tuning.read(tmp_path)
    assert kept["details"]["hide 200"]["signals"] == SURE
    assert (
        frontier_tuning.signal(kept, "hide 200", "peaks") == 700 and frontier_tuning.signal(kept, "hide", "margin") < 0
    )
