"""Verbs, settings and answers that are handed what they do not take: refused on entry by the argument's name, or as
documented; never another answer in silence, and the session goes on as if nothing had been asked."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hide import HiDe, Plain
from hide.cli.loading import LoadOptions, way_names
from hide.evaluation.data import Sample
from hide.evaluation.runner import answer as record_of
from hide.evaluation.store import ResultFile
from hide.methods.base import Answer, Evidence, Method, Preset, Steps, ask_all
from hide.methods.vicrop import ViCrop
from hide.models import load
from hide.present.pages import report_html, save_pictures
from hide.questions import Question
from hide.session import Message, Reply, RunSettings, open_session
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene

RUN = RunSettings(min_tokens=36)
QUESTION = "What is the color of the star?"
IMAGE, OTHER = (draw_scene(seed, 280, 196, objects=3).image for seed in (0, 1))


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def shared(model):
    with open_session(model, IMAGE, RUN) as opened:
        yield opened


@pytest.fixture
def session(shared):
    """After each test it answers as before."""
    want = shared.ask(QUESTION, max_new_tokens=3)
    yield shared
    assert shared.ask(QUESTION, max_new_tokens=3) == want


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[6], [99], [-7], [], 1, "12", [1.0], [None]], ids=repr)
def test_layers_that_the_model_does_not_have_are_refused(session, layers):
    with pytest.raises((ValueError, TypeError), match="^layers: got .*, want .*zero-based"):
        session.attention(session.turn("star"), layers=layers)


def test_queries_before_the_text_or_behind_the_prompt_are_refused_with_the_places_there_are(session):
    turn = session.turn("star")
    first, stop = session.length, turn.input_ids.shape[1]
    for queries in (range(stop, stop + 1), range(first - 1, first + 1), range(stop - 1, stop + 2), range(-1, 0)):
        with pytest.raises(ValueError, match=rf"^queries: got range\(.*, want places from {first} to {stop - 1}"):
            session.attention(turn, layers=[0], queries=queries)


def test_a_turn_that_is_none_or_of_another_prompt_is_refused(session):
    with pytest.raises(TypeError, match="^turn: got str, want a Turn"):
        session.attention("star", layers=[0])
    with (
        session.branch(session.turn("star").input_ids) as branch,
        pytest.raises(ValueError, match="^turn: got another"),
    ):
        branch.attention(session.turn("ring"), layers=[0])


# -- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, -1, 1.5, True, "2", None])
def test_a_bound_on_tokens_that_is_none_is_refused(session, most):
    with pytest.raises((ValueError, TypeError), match=f"^max_new_tokens: got {most!r}, want"):
        session.ask(QUESTION, max_new_tokens=most)
    with pytest.raises((ValueError, TypeError), match=f"^max_new_tokens: got {most!r}, want"):
        session.replies([session.turn(QUESTION).input_ids], max_new_tokens=most)


@pytest.mark.parametrize(
    "text, images, cause",
    [
        ("", (), "text: got nothing"), (None, (), "text: got NoneType"), ("a\ud800", (), "text: got .* surrogate"),
        ("a", IMAGE, "images: got Image, want a list"), ("a", None, "images: got NoneType, want a list"),
        ("a", torch.zeros(9, 9, 3, dtype=torch.uint8), "images: got Tensor, want a list"),
        ("a", ["a.png"], "images: got str, want Pillow"), ("a", [None], "images: got NoneType, want Pillow"),
        ("a", [torch.zeros(9, 9, 3)], "image: got dtype torch.float32"),
        ("a", [torch.zeros(0, 9, 3, dtype=torch.uint8)], r"image: got shape \(0, 9, 3\)"),
    ],
)  # fmt: skip
def test_what_is_no_text_or_no_image_is_refused(session, text, images, cause):
    with pytest.raises((ValueError, TypeError), match=f"^{cause}"):
        session.ask(text, images, max_new_tokens=2)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "HSV"])
def test_further_images_of_any_mode_are_seen_as_the_sessions_own_would_be(session, mode):
    odd = OTHER.convert("RGB").convert(mode)
    (seen,) = session.prepare([odd]).items
    (want,) = session.prepare([odd.convert("RGB")]).items
    assert torch.equal(seen.pixels, want.pixels)


@pytest.mark.parametrize("ids", [(10**6,), (-1,)])
def test_a_reply_of_tokens_that_the_model_does_not_have_is_refused(session, ids):
    with pytest.raises(ValueError, match="ids"):
        session.chat([Message(QUESTION), Reply("x", 0, ids), Message("And?")], max_new_tokens=2)


def test_a_reply_that_holds_an_images_token_is_refused(session):
    with pytest.raises(ValueError, match="^reply: got ids"):
        session.chat([Message(QUESTION), Reply("x", 0, (session.model.image_token,)), Message("?")], max_new_tokens=2)


@pytest.mark.parametrize(
    "messages", ["hello", None, Message("a"), iter([Message("a")])], ids=lambda m: type(m).__name__
)
def test_what_is_no_conversation_is_refused(session, messages):
    with pytest.raises(TypeError, match=f"^messages: got {type(messages).__name__}, want a list"):
        session.chat(messages, max_new_tokens=2)


def test_a_list_of_images_that_changes_later_is_not_what_was_said(session):
    images = [OTHER]
    said = [Message("What is it?", images)]
    said.append(session.chat(said, max_new_tokens=2))
    images[0] = OTHER.rotate(180)
    assert said[0].images == (OTHER,)


# -- branches ---------------------------------------------------------------------------------------------------------


def test_what_is_asked_of_a_branch_behind_a_reply_that_it_keeps_is_as_without_it(session):
    ids = session.turn(QUESTION).input_ids
    with session.branch(ids) as branch:
        want = branch.logits()
    with session.branch(ids) as branch:
        reply = branch.reply(3, keep=True)
        assert session.kept is not None
        assert (branch.logits() - want).abs().max() < 1e-4 and session.kept is None
        assert branch.reply(3, keep=True) == reply
        with torch.no_grad():
            again = session.model.model.get_output_embeddings()(branch.run()[:, -1]).float()
        assert (again - want).abs().max() < 1e-4
    assert session.kept is None, "its keys and values are no longer those of the reply"


def test_a_branch_whose_block_is_over_is_refused(session):
    turn = session.turn(QUESTION)
    with session.branch(turn.input_ids) as branch:
        pass
    calls = (branch.run, branch.logits, lambda: branch.reply(2), lambda: branch.attention(turn, layers=[0]))
    for call in calls:
        with pytest.raises(RuntimeError, match="^branch: its block has been left"):
            call()


@pytest.mark.parametrize(
    "change", [lambda p: p.bool(), lambda p: p.tolist(), lambda p: p * float("nan"), lambda p: p[0]]
)
def test_positions_that_are_none_are_refused(session, change):
    ids = session.turn(QUESTION).input_ids
    behind = session.model.positions(ids, session.inputs)[0][..., session.length :]
    with pytest.raises((ValueError, TypeError), match="^positions: got"), session.branch(ids, positions=change(behind)):
        pass


@pytest.mark.parametrize("change", [lambda i: i.tolist(), lambda i: i.float(), lambda i: i[0], lambda i: i + 10**6])
def test_ids_that_are_none_are_refused(session, change):
    ids = change(session.turn(QUESTION).input_ids)
    with pytest.raises((ValueError, TypeError), match="^ids: got"), session.branch(ids):
        pass


@pytest.mark.parametrize("layers", [[0], 0, "a"])
def test_layers_of_a_run_that_are_no_range_are_refused(session, layers):
    with session.branch(session.turn(QUESTION).input_ids) as branch:
        with pytest.raises(TypeError, match="^layers: got .*, want a range"):
            branch.run(layers=layers)
        branch.run()
        with pytest.raises(ValueError, match="tokens have been sent"):
            branch.run()


# -- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [[[0, 0, 9, 9]], np.array([[0, 0, 9, 9]]), (0, 0, 9, 9), None], ids=repr)
def test_boxes_that_are_no_tensor_are_refused(session, box):
    with pytest.raises(TypeError, match=f"^boxes: got {type(box).__name__} for an image"):
        session.crop([box])


# -- a session that is closed meanwhile -------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["entities", "attention rows", "maps", "boxes and collage", "answer"])
def test_a_session_that_is_closed_between_two_steps_says_so(model, step):
    hide = HiDe(model)
    with hide.open(IMAGE) as session, pytest.raises(RuntimeError, match="^session: it is closed"):
        hide.ask(session, QUESTION, progress=lambda name: session.close() if name == step else None)
    with pytest.raises(RuntimeError, match="^session: it is closed"):
        session.crop([torch.tensor([[0, 0, 9, 9]])])
    assert session.nbytes == 0


# -- methods ----------------------------------------------------------------------------------------------------------


def answering(model, found, **attributes):
    """A method that answers at once, with what `found` returns."""

    def answer(self, session, question, steps):
        with steps("answer"):
            return found()

    return type("Mine", (Method,), {"name": "mine", "summary": "x", "answer": answer, **attributes})(model)


MAPS = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
LABELS = ("<b>star</b>", "&")
PIXELS = torch.zeros(9, 9, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    "found, cause",
    [
        (lambda: None, "its answer is NoneType"), (lambda: "red", "its answer is str"),
        (lambda: Answer(None), "its answer is NoneType, want an Answer with a text"),
        (lambda: Answer("a", (Evidence(), Evidence())), "evidence: got 2, want 1, one per image"),
        (lambda: Answer("a", Evidence()), "evidence: got Evidence, want a tuple"),
        (lambda: Answer("a", (Evidence() for _ in "a")), "evidence: got generator, want a tuple"),
        (lambda: Answer("a", notes="doubt"), "notes: got str, want a tuple"),
        (lambda: Answer("a", details=None), "details: got NoneType, want a mapping"),
        (lambda: Answer("a", details={"x": MAPS}), "details: x: .*Tensor.*; want what JSON holds"),
        (lambda: Answer("a", details={"x": {(1, 2): 3}}), "details: x: keys must be"),
        (lambda: Answer("a", details={1: 2}), "details: got 1, want a name"),
        (lambda: Answer("a", details={"answer": "b"}), "details: got 'answer', want a name"),
        (lambda: Answer("a", details={"model": "b"}), "details: got 'model', want a name"),
        (lambda: Answer("a", (Evidence(torch.tensor([[0, 0, 281, 9]])),)), r"evidence\[0\].boxes\[0\]: got .*<= 280"),
        (lambda: Answer("a", (Evidence(torch.tensor([[5, 5, 5, 9]])),)), r"evidence\[0\].boxes: .*want an area"),
    ],
)  # fmt: skip
def test_an_answer_that_could_not_be_shown_or_written_is_refused_by_the_methods_name(model, shared, found, cause):
    with pytest.raises((ValueError, TypeError), match=f"^mine: {cause}"):
        answering(model, found).ask(shared, QUESTION)
    sample = Sample("1", lambda: IMAGE, Question(QUESTION), "a", "all")
    assert "mine: " in record_of({"mine": answering(model, found)}, sample)["error"], (
        "a failed question, and the next is asked"
    )


@pytest.mark.parametrize(
    "fields, cause",
    [
        ({"maps": MAPS}, "labels: got 0, want 2"), ({"labels": LABELS}, "labels: got 2, want 0"),
        ({"maps": MAPS, "labels": "ab"}, "labels: got 'ab'"), ({"maps": MAPS, "labels": (1, 2)}, "labels: got"),
        ({"maps": MAPS[0]}, "maps: got shape"), ({"maps": MAPS[:, :0]}, "maps: got shape"),
        ({"maps": MAPS.numpy()}, "maps: got ndarray"), ({"threshold": "x"}, "threshold: got"),
        ({"threshold": float("nan")}, "threshold: got nan"), ({"shown": PIXELS}, "shown: got Tensor"),
        ({"boxes": [[0, 0, 9, 9]]}, "boxes: got list"), ({"boxes": MAPS[0]}, "boxes: got dtype"),
    ],
)  # fmt: skip
def test_evidence_that_is_none_is_refused_where_it_is_made(fields, cause):
    with pytest.raises((ValueError, TypeError), match=f"^{cause}"):
        Evidence(**fields)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_cells_of_maps_that_are_no_numbers_are_drawn_as_nothing(model, shared, tmp_path, threshold):
    drawn = {}
    for value in (0.0, float("nan"), float("inf"), -float("inf")):
        maps = MAPS.clone()
        maps[0, 1, 2] = value
        evidence = Evidence(maps=maps, labels=LABELS, threshold=threshold, shown=OTHER.convert("CMYK"))
        found = answering(model, lambda evidence=evidence: Answer("a", (evidence,))).ask(shared, QUESTION)
        save_pictures(found, tmp_path / str(value))
        drawn[value] = (tmp_path / str(value) / "image_0_tokens.png").read_bytes()
        page = report_html(found)
        assert "<b>star</b>" not in page and "&lt;b&gt;star&lt;/b&gt;" in page
        json.dumps(found.to_dict())
        assert drawn[value] == drawn[0.0], value


def test_steps_inside_one_another_or_without_a_text_are_refused_and_the_next_ones_count():
    steps = Steps()
    with pytest.raises(ValueError, match="^step: 'b' begins inside 'a'"), steps("a"), steps("b"):
        pass
    with pytest.raises(TypeError, match="^step: got None, want a text"), steps(None):
        pass
    with steps("c"):
        pass
    assert list(steps.finished()) == ["c"], "a step that fails costs nothing"


def test_a_step_of_a_method_with_the_name_of_an_opening_one_adds_to_it(model):
    class Opening(Plain):
        """Opens a session of its own inside its answer, as one that looks at tiles does."""

        name = "opening"

        def answer(self, session, question, steps):
            with self.open(OTHER, steps=steps) as other:
                return Answer(self.reply(other, question).text)

    found = ask_all([Plain(model), Opening(model)], IMAGE, QUESTION, max_new_tokens=2)
    plain, opening = (one.tokens["prefix"] for one in found)
    assert opening == 2 * plain


def test_no_method_is_refused():
    with pytest.raises(ValueError, match="^methods: got none"):
        ask_all([], IMAGE, QUESTION)


def test_a_method_that_is_badly_made_says_what_it_lacks(model, shared):
    with pytest.raises(ValueError, match="^Mine.needs: got attend, want any of"):
        answering(model, lambda: Answer("a"), needs=frozenset({"attend"}))
    with pytest.raises(TypeError, match="^Mine: it has no name"):
        answering(model, lambda: Answer("a"), name=None).ask(shared, QUESTION)
    with pytest.raises(TypeError, match="^preset: got settings NoSettings, want HiDeConfig"):
        HiDe(model, Plain(model).preset)
    with pytest.raises(TypeError, match="^preset: got HiDeConfig, want a Preset"):
        HiDe(model, HiDe(model).settings)
    with pytest.raises(ValueError, match=r"^layers: got 99"):
        ViCrop(model).changed(layers=(99,))


def test_settings_that_json_does_not_hold_are_written_as_their_text(tmp_path):
    sample = Sample("1", lambda: IMAGE, Question(QUESTION), "a", "all")
    settings = {"mine.folder": tmp_path, "mine.kinds": {1}}
    with ResultFile(tmp_path / "results.jsonl", settings) as results:
        results.append(record_of({}, sample))
    with ResultFile(tmp_path / "results.jsonl", settings) as results:
        assert list(results.records) == ["1"]
    with pytest.raises(ValueError, match=r"mine.kinds: '\{1\}' there, '\{2\}' now"):
        ResultFile(tmp_path / "results.jsonl", {**settings, "mine.kinds": {2}})


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, kind",
    [
        ("sigma", "a", "float"), ("sigma", None, "float"), ("threshold", True, "float"), ("causal", "no", "bool"),
        ("causal", 1, "bool"), ("layers", 14, r"tuple\[int, ...\] \| None"), ("layers", "14", "tuple"),
        ("layers", (1.5,), "tuple"), ("layers", [None], "tuple"), ("fill", "white", "tuple"), ("fill", (1, 2), "tuple"),
        ("search_prompt", None, "str"), ("entity_prompt", 5, r"str \| None"), ("max_entity_tokens", "a", "int"),
        ("max_tokens", 200.0, "int"), ("offload_kv", 3, "bool"), ("letter_request", None, "str"),
        ("max_new_tokens", True, "int"),
    ],
)  # fmt: skip
def test_settings_of_another_type_are_refused_by_name(model, name, value, kind):
    with pytest.raises(TypeError, match=f"^{name}: got .*, want {kind}.*, such as "):
        HiDe(model).changed(**{name: value})


def test_settings_whose_types_are_not_known_take_any_value(model):
    """Such as names that a module imports for type checkers alone."""
    kind = dataclasses.make_dataclass("Own", [("size", "Unknown", 1), ("name", "str", "a")], frozen=True)
    changed = Preset(kind()).changed(size="large", max_tokens=300)
    assert (changed.settings.size, changed.run.max_tokens) == ("large", 300)
    kind = dataclasses.make_dataclass("Own", [("size", Any, 1), ("sizes", Sequence[int], ())], frozen=True)
    assert Preset(kind()).changed(size="large", sizes=[1]).settings == kind("large", [1])


def test_lists_and_ints_become_what_a_setting_holds(model):
    settings = HiDe(model).changed(layers=range(2), threshold=1, fill=[1, 2, 3]).settings
    assert (settings.layers, settings.threshold, settings.fill) == ((0, 1), 1.0, (1, 2, 3))
    assert isinstance(settings.threshold, float) and HiDe(model).changed(layers=[-1]).settings.layers == (-1,)
    assert HiDe(model).changed(layers=None, fill=None).settings.layers is None


@pytest.mark.parametrize(
    "given, cause",
    [
        (["sigma=None"], "sigma: got None, want float"), (["tile=abc"], r"tile: got 'abc', want int \| None"),
        (["layers=3"], "layers: got 3, want tuple"), (["sigma=1", "sigma=2"], "set: got sigma twice"),
    ],
)  # fmt: skip
def test_settings_given_as_text_are_refused_by_name(model, given, cause):
    with pytest.raises((ValueError, TypeError), match=f"^{cause}"):
        LoadOptions(setting=given).methods(["hide", "vicrop"], model)
    with pytest.raises(ValueError, match="^set: got sigma twice"):
        LoadOptions(sigma=1.0, setting=["sigma=2"]).methods(["hide"], model)


@pytest.mark.parametrize("text, unknown", [("plain,,hide", "''"), ("", "''"), ("ALL", "'ALL'")])
def test_method_names_that_are_none_are_shown(text, unknown):
    with pytest.raises(ValueError, match=f"^methods: got {unknown}, want any of plain, hide"):
        way_names(text, "no checkpoint", print)
    assert way_names(" hide, plain ,hide", "no checkpoint", print) == ["hide", "plain"]
    every = way_names("all", "no checkpoint", print)
    assert way_names("all,hide@700,plain", "no checkpoint", print) == [*every, "hide@700"]


def test_a_method_on_a_session_that_is_run_otherwise_says_so(model):
    plain, first, second = Plain(model), HiDe(model), ViCrop(model).changed(max_tokens=256, min_tokens=40)
    notes = [found.notes for found in ask_all([plain, first, second], IMAGE, QUESTION, max_new_tokens=2)]
    assert notes[2][-1] == "run: on a session with min_tokens 36, not 40; max_tokens 16384, not 256"
    assert not any(note.startswith("run:") for note in (*notes[0], *notes[1]))
