"""What is decided on a small view: its size, whether the plain answer will do, whether collages are searched again."""

import json

import pytest
import torch
from families import FAMILIES
from typer.testing import CliRunner

from hide import HiDe, Plain, Preset
from hide.cli import app
from hide.images import to_tensor
from hide.methods.base import AnswerSettings, NoSettings
from hide.methods.hide.config import HiDeConfig
from hide.methods.hide.signals import Signals, collage_part, looks_again, peak_over_mean, settles
from hide.presets import RunSettings
from hide.session import ImageSession
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene
from hide_kernels.collage import collage, plan_layout

QUESTION = "Is the star on the left or right side of the ring?"
SIZE = (1120, 840)
AUTO = {"view_tokens": "auto", "auto_view": (4.0, 0.5)}
CONFIG = HiDeConfig(layers=(0,), sigma=1.0, threshold=0.5)


@pytest.fixture(scope="module")
def hide():
    return HiDe.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def image():
    return draw_scene(5, *SIZE, objects=[("star", "red"), ("ring", "blue")], object_size=(60, 110)).image


# -- the view's size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, size, want",
    [
        ({}, (7680, 4320), 16384),
        ({"view_tokens": 700}, (7680, 4320), 700),
        ({"view_tokens": 70_000}, (7680, 4320), 16384),
        # 4,000 tokens, then 16,384 of 42,318.
        ({"view_tokens": "auto", "auto_view": (20.0, 0.5)}, (2800, 1120), 1265),
        ({"view_tokens": "auto", "auto_view": (20.0, 0.5)}, (7680, 4320), 2560),
        ({"view_tokens": "auto", "auto_view": (0.3, 1.0)}, (2800, 1120), 1200),
        # No fewer than every image has at least, no more than the budget.
        ({"view_tokens": "auto", "auto_view": (1.0, 0.5)}, (2800, 1120), 256),
        ({"view_tokens": "auto", "auto_view": (9.0, 1.0)}, (7680, 4320), 16384),
    ],
)
def test_the_rule_counts_the_tokens_of_the_whole_image(settings, size, want):
    assert RunSettings(**settings).view(*size) == want


def test_each_image_has_the_view_of_its_own_size_and_crops_have_no_more_tokens(hide, image):
    run = hide.changed(**AUTO).preset.run
    half = image.crop((0, 0, 560, 840))
    with hide.changed(**AUTO).open([image, half]) as session:
        assert all(
            0.8 * run.view(*own.size) < tokens <= run.view(*own.size)
            for own, tokens in zip((image, half), session.image_tokens, strict=True)
        )
        assert session.image_tokens[0] > 1.3 * session.image_tokens[1]
        (crop,) = session.prepare([image]).tokens
        assert crop <= session.image_tokens[0]


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"view_tokens": "small"}, "view_tokens: got 'small', want a number of tokens, 'auto', or None"),
        ({"auto_view": (17.0,)}, "auto_view: got"),
        ({"auto_view": (0.0, 0.5)}, "a factor and an exponent above 0"),
        ({"gate": -1.0}, "gate: got -1.0, want 0 or more"),
        ({"look_again": float("nan")}, "look_again: got nan"),
    ],
)
def test_settings_that_say_nothing_are_refused(hide, changes, error):
    with pytest.raises((ValueError, TypeError), match=error.replace("(", r"\(")):
        hide.changed(**changes)


@pytest.mark.parametrize("given", [(17, 0.5), [17, 0.5], (17.0, 0.5)])
def test_a_factor_may_be_a_whole_number(hide, given):
    changed = hide.changed(auto_view=given)
    assert changed.preset.run.auto_view == (17.0, 0.5) and type(changed.preset.run.auto_view[0]) is float
    with pytest.raises(TypeError, match="look_again: got"):
        hide.changed(look_again=given)


# -- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "margin, gate, taken",
    [(3.0, 3.0, True), (2.9, 3.0, False), (9.0, None, False), (None, 0.0, False), (0.0, 0.0, True)],
)
def test_the_gate_takes_the_plain_answer_from_its_margin_on(margin, gate, taken):
    config = HiDeConfig(layers=(0,), sigma=1.0, threshold=0.5, gate=gate)
    assert settles(Signals(plain_margin=margin), config) is taken


@pytest.mark.parametrize(
    "view, part, limit, again",
    [
        ("auto", 0.51, 0.5, True),
        ("auto", 0.5, 0.5, False),
        ("auto", None, 0.0, False),
        (700, 9.0, 0.5, False),
        (None, 9.0, 0.5, False),
    ],
)
def test_collages_are_searched_again_where_the_view_is_chosen_and_they_are_large_beside_it(view, part, limit, again):
    config = HiDeConfig(layers=(0,), sigma=1.0, threshold=0.5, look_again=limit)
    assert looks_again(Signals(collage=part), config, RunSettings(view_tokens=view)) is again


def test_signals_are_of_the_rows_and_of_the_collages_pixels():
    rows = [torch.zeros(2, 4, 5), torch.zeros(2, 2, 2)]
    rows[0][0, 1, 2], rows[0][1], rows[1][0] = 5.0, 1.0, 1.0
    rows[1][1] = torch.tensor([[1.0, 1.0], [1.0, 5.0]])
    assert peak_over_mean(rows).tolist() == [20.0, 2.5]
    source = torch.zeros(560, 560, 3, dtype=torch.uint8)
    made = collage(source, torch.tensor([[0, 0, 56, 28], [100, 0, 156, 28]]))
    none = collage(source, torch.zeros(0, 4, dtype=torch.int64))
    assert collage_part([made, none], (10, 6)) == pytest.approx(4 / 16)
    said = Signals(peaks=(2.0, float("nan")), margin=float("inf"), without_map=0, second_look=False).to_dict()
    assert said == {"peaks": [2.0, None], "without_map": 0, "second_look": False}


# -- answers ----------------------------------------------------------------------------------------------------------


def test_the_gate_asks_plainly_first_and_hide_where_that_is_unsure(hide, image):
    small = hide.changed(**AUTO)
    with small.open(image) as session:
        plain = Plain(small.model, small.preset.with_settings(NoSettings())).ask(session, QUESTION)
        ungated = small.ask(session, QUESTION)
        margin = plain.details["signals"]["margin"]
        taken = small.changed(gate=margin - 0.01).ask(session, QUESTION)
        searched = small.changed(gate=margin + 0.01).ask(session, QUESTION)
    assert taken.text == plain.text and taken.evidence == () and set(taken.steps) == {"gate"}
    assert taken.details == {"signals": {"plain_margin": margin}}
    assert any("nothing was searched" in note for note in taken.notes)
    assert searched.text == ungated.text and torch.equal(searched.boxes[0], ungated.boxes[0])
    assert searched.details["signals"] == {"plain_margin": margin, **ungated.details["signals"]}
    assert searched.tokens["gate"] == plain.tokens["answer"]


def test_a_second_look_shows_what_is_found_inside_the_collage_in_pixels_of_the_image(hide, image, monkeypatch):
    """Two regions of the view, far apart; in the collage of both one cell has its peak, across the seam another."""
    asked = []

    def planted(session, turn, **_):
        asked.append(turn)
        found = []
        for number, shown in enumerate(turn.images):
            rows = torch.zeros(len(turn.rows), *shown.grid)
            if len(turn.images) == 1:
                rows[-1, 1:3, 1:3] = rows[-1, 1:3, -3:-1] = 1.0
            elif number == 1:
                rows[-1, 0, 0] = rows[-1, -1, rows.shape[2] // 2 - 1 : rows.shape[2] // 2 + 1] = 1.0
            found.append(rows)
        return found

    monkeypatch.setattr(ImageSession, "attention", planted)
    method = hide.changed(**AUTO, look_again=0.0, sigma=0.0, threshold=0.5)
    with method.open(image) as session:
        once = method.changed(look_again=10.0).ask(session, "What is the color of the star?")
        again = method.ask(session, "What is the color of the star?")
    assert [len(turn.images) for turn in asked] == [1, 1, 2]
    assert (once.details["signals"]["second_look"], again.details["signals"]["second_look"]) == (False, True)
    first = once.boxes[0]
    assert len(first) == 2 and first[0, 2] < first[1, 0]
    (left, right), grid = first.tolist(), asked[-1].images[1].grid
    width, height = right[2] - right[0] + left[2] - left[0], left[3] - left[1]
    seam, (rows, columns) = left[2] - left[0], grid
    cell = (width / columns, height / rows)
    low, high = int((columns // 2 - 1) * cell[0]), int((columns // 2 + 1) * cell[0])
    top = left[1] + int((rows - 1) * cell[1])
    want = [
        [left[0], left[1], left[0] + int(cell[0]), left[1] + int(cell[1])],
        [left[0] + low, top, left[2], left[3]],
        [right[0], top, right[0] + high - seam, right[3]],
    ]
    assert again.boxes[0].tolist() == want
    assert torch.equal(to_tensor(again.shown[0]), collage(to_tensor(image), torch.tensor(want), fill=(255,) * 3).image)


def test_a_second_look_that_finds_nothing_leaves_the_first(hide, image, monkeypatch):
    real = ImageSession.attention

    def blind(session, turn, **how):
        return [torch.zeros_like(rows) if len(turn.images) > 1 else rows for rows in real(session, turn, **how)]

    monkeypatch.setattr(ImageSession, "attention", blind)
    method = hide.changed(**AUTO)
    with method.open(image) as session:
        once, again = (method.changed(look_again=limit).ask(session, QUESTION) for limit in (10.0, 0.0))
    assert again.details["signals"]["second_look"] and len(once.boxes[0])
    assert torch.equal(once.boxes[0], again.boxes[0]) and once.text == again.text


@pytest.mark.parametrize("family, joined", [*((family, False) for family in FAMILIES), ("internvl", True)])
def test_every_family_looks_again(family, joined, image):
    adapter = FAMILIES[family]()
    run = RunSettings(min_tokens=60, max_tokens=300, join_images=joined, view_tokens="auto", auto_view=(0.1, 1.0))
    preset = Preset(
        HiDeConfig(layers=(1,), sigma=1.0, threshold=0.6, look_again=0.0), run, AnswerSettings(max_new_tokens=2)
    )
    answer = HiDe(adapter, preset, extractor=lambda question: "star, ring").ask(image, QUESTION)
    assert answer.details["signals"]["second_look"] and answer.tokens["second look"] > 0
    whole = HiDe(adapter, preset.changed(look_again=1e9), extractor=lambda question: "star, ring").ask(image, QUESTION)
    kept = plan_layout(whole.boxes[0])
    assert len(answer.boxes[0])
    for x0, y0, x1, y1 in answer.boxes[0].tolist():
        assert any(first <= x0 < x1 <= last for first, last in kept.columns.tolist())
        assert any(first <= y0 < y1 <= last for first, last in kept.rows.tolist())


def test_the_command_takes_auto_and_a_gate(image, tmp_path):
    image.save(tmp_path / "image.png")
    call = ["ask", str(tmp_path / "image.png"), QUESTION, "--json", "--out", str(tmp_path / "out")]
    call += ["--view", "auto", "--set", "auto_view=(4.0, 0.5)"]
    done = CliRunner().invoke(app, [*call, "--set", "gate=0"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["image_tokens"][0] <= 139 and found["boxes"] == [] and found["answer"] == found["plain_answer"]
    assert set(found["signals"]) == {"plain_margin"}
    said = CliRunner().invoke(
        app, [*[one for one in call if one != "--json"], "--report", str(tmp_path / "page"), "--no-plain"]
    )
    assert "peaks" in said.output and "{" not in said.output
    assert "<li>without_map 0</li>" in (tmp_path / "page" / "report.html").read_text()
    done = CliRunner().invoke(app, [*call[:-2], "--view", "few"])
    assert done.exit_code == 1 and "view: got 'few', want a number of tokens, or auto" in " ".join(done.output.split())
