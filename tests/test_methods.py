"""What a method of one's own gets, and how a package brings one."""

import importlib
import json
import sys

import pytest
import torch
from fake_methods import FakeSession
from typer.testing import CliRunner

import hide.methods
from hide import HiDe, Plain
from hide.cli import app
from hide.cli.loading import way_names
from hide.methods import method_class, method_names
from hide.methods.base import Answer, Evidence, ask_all
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene

OTHERS = '''
"""A package of somebody else's: the half of the image that a word looks at, and what is in it."""

from dataclasses import dataclass

import torch

from hide.images import to_image
from hide.methods.base import Answer, Evidence, Method


@dataclass(frozen=True)
class HalfSettings:
    word: str = "star"


class Half(Method[HalfSettings]):
    name = "half"
    summary = "the image, and its brighter half"
    needs = frozenset({"attention", "crop", "ask"})
    Settings = HalfSettings

    def answer(self, session, question, steps):
        with steps("looking"):
            (rows,) = session.attention(session.turn(self.settings.word), layers=[0])
            heat = rows.mean(0)
            left = heat[:, : heat.shape[1] // 2].sum() > heat[:, heat.shape[1] // 2 :].sum()
            width, height = session.images[0].size
            box = torch.tensor([[0, 0, width // 2, height] if left else [width // 2, 0, width, height]])
            (crop,) = session.crop([box])
        with steps("answer"):
            reply = self.reply(session, question, [crop.image])
        found = Evidence(box, heat[None], (self.settings.word,), shown=to_image(crop.image))
        return Answer(reply.text, (found,), details={"side": "left" if left else "right"})


class NoMethod:
    name = "no-method"
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package as pip installs it: a module, and metadata with entry points."""
    (tmp_path / "others.py").write_text(OTHERS)
    folder = tmp_path / "others-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    points = {"half": "others:Half", "no-method": "others:NoMethod", "gone": "others:Gone", "renamed": "others:Half"}
    lines = [f"{name} = {value}" for name, value in points.items()]
    (folder / "entry_points.txt").write_text("\n".join(["[hide.methods]", *lines]) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    hide.methods._registered.cache_clear()
    yield
    hide.methods._registered.cache_clear()
    sys.modules.pop("others", None)


@pytest.fixture(scope="module")
def plain():
    return Plain.from_pretrained(CHECKPOINT, max_new_tokens=3)


@pytest.fixture(scope="module")
def scene():
    return draw_scene(0, 300, 200, objects=3).image


def test_a_method_of_another_package_has_the_commands_the_report_the_costs_and_the_scores(
    package, scene, small_scenes, tmp_path
):
    assert "half" in method_names() and method_class("half").name == "half"
    scene.save(tmp_path / "a.png")
    call = ["ask", str(tmp_path / "a.png"), "What is the color of the star?", "--method", "half", "--set", "word=ring"]
    result = CliRunner().invoke(app, [*call, "--report", str(tmp_path / "seen"), "--memory"])
    assert result.exit_code == 0, result.output
    for text in ("half answer", "looking", "side", "peak memory"):
        assert text in result.output, text
    document = json.loads((tmp_path / "seen" / "result.json").read_text())
    assert document["method"] == "half" and document["side"] in ("left", "right") and document["labels"] == [["ring"]]
    assert document["tokens"]["looking"] > 0 and document["seconds"]["looking"] > 0
    assert document["peak_bytes"]["looking"] > 10_000_000, "the weights alone have more"
    assert "Side" in (tmp_path / "seen" / "report.html").read_text()
    call = ["eval", "--methods", "plain,half", "--limit", "2", "--out", str(tmp_path / "eval")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0 and "half" in result.output, result.output
    listed = CliRunner().invoke(app, ["methods"]).output
    assert "brighter" in listed and "others" in listed and "subclass" in listed


def test_all_methods_are_those_of_other_packages_too_but_for_those_that_cannot_be_loaded(package):
    left_out = []
    every = way_names("all", "no checkpoint", left_out.append)
    assert "half" in every and not {"no-method", "gone", "renamed"} & set(every)
    assert len(left_out) == 3 and "gone" in left_out[1]


@pytest.mark.parametrize(
    "name, text",
    [
        ("no-method", "is no subclass of hide.methods.base.Method"), ("gone", "cannot be loaded: AttributeError"),
        ("renamed", "with that name"), ("nothing", "want one of plain, hide, vicrop"),
    ],
)  # fmt: skip
def test_what_is_no_method_is_refused_by_name(package, name, text):
    with pytest.raises(ValueError, match=text):
        method_class(name)


def test_every_built_in_method_says_what_it_does_and_what_it_needs():
    for name in hide.methods.BUILT_IN:
        found = method_class(name)
        assert (
            found.name == name
            and found.summary
            and (found.needs <= {"attention", "chat", "crop", "ask"} or name in hide.methods.TRAINED)
        )


def test_methods_share_a_session_and_each_answer_has_the_steps_of_opening_it(plain, scene):
    heard = []
    hide_method = HiDe(plain.model)
    first, second = ask_all([plain, hide_method], scene, "What is the color of the star?", progress=heard.append)
    assert (
        list(first.steps) == ["read and resize", "prefix", "answer"] and first.steps["prefix"] == second.steps["prefix"]
    )
    assert heard[2:5] == ["plain: answer", "hide: entities", "hide: attention rows"], "opening is nobody's"
    with hide_method.open(scene) as session:
        assert plain.ask(session, first.question).text == first.text
    assert first.steps["prefix"].peak is None and "peak_bytes" in first.to_dict()


def test_a_session_that_lacks_a_verb_is_refused_by_name(plain):
    class Remote(FakeSession):
        """As an API that only talks."""

    with pytest.raises(ValueError, match="hide: it needs attention, which Remote does not offer"):
        HiDe(plain.model).ask(Remote(), "What is it?")


def test_states_that_a_session_did_not_keep_are_asked_for_by_layer(plain, scene):
    class Deep(Plain):
        """Looks at a hidden state."""

        taps = (2,)

        def answer(self, session, question, steps):
            with steps("states"):
                norm = float(session.hidden(2).norm())
            return Answer("", details={"norm": norm})

    deep = Deep(plain.model, plain.preset)
    assert deep.ask(scene, "What is it?").details["norm"] > 0
    with plain.open(scene) as session, pytest.raises(ValueError, match="needs the states of layer 2"):
        deep.ask(session, "What is it?")
    assert ask_all([plain, deep], scene, "What is it?")[1].details["norm"] > 0


def test_an_answer_without_evidence_can_be_drawn(plain, scene, tmp_path):
    from hide.present.pages import report_html, save_pictures

    answer = plain.ask(scene, "What is it?")
    assert answer.evidence == () and "nothing was cut out" in report_html(answer)
    assert [path.name for path in save_pictures(answer, tmp_path)] == [
        "image_0_heat.png",
        "image_0_boxes.png",
        "overview.png",
    ]


def test_settings_are_changed_wherever_they_belong(plain):
    other = plain.changed(max_tokens=99, letter_request="Which?")
    assert (other.preset.run.max_tokens, other.preset.answer.letter_request) == (99, "Which?")
    assert plain.preset.run.max_tokens != 99 and other.model is plain.model
    with pytest.raises(ValueError, match="max_tokens"):
        plain.changed(max_tokens=1)
    with pytest.raises(ValueError, match="join_images: got True"):
        plain.changed(join_images=True)


def test_evidence_begins_empty_and_is_nobody_elses():
    first, second = Evidence(), Evidence()
    first.boxes.resize_(1, 4)
    assert second.boxes.shape == (0, 4) and torch.equal(second.maps, torch.zeros(0, 1, 1))
