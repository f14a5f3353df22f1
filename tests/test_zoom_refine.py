"""Zoom-Refine: what is read in replies, what is cut out, and that two turns on one prefill are the conversation itself."""

import json

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image

from hide.engine import stock
from hide.evaluation.published_scores import main as published_main
from hide.evaluation.published_scores import published_baseline, published_scores
from hide.methods import method_class
from hide.methods.ablations import RandomBox
from hide.methods.base import Preset
from hide.methods.prompts import filled
from hide.methods.zoom_refine.method import ZoomRefine, ZoomRefineSettings, crop_box
from hide.methods.zoom_refine.parse import (
    answer_in,
    box_in,
    published_box,
    published_first_letter,
    published_letter,
    published_rechecked,
)
from hide.presets import AnswerSettings, RunSettings
from hide.questions import Question
from hide.session import Message, Reply

OPTIONS = ("red", "green", "blue", "a red car")
QUESTION = Question("What color is the ball?", OPTIONS)
# Reply -> what the published code reads, what ours does.
LETTERS = {
    "**Answer: [B]**": ("B", "B"),
    "Answer: (c)": ("C", "C"),
    "**Answer:** B": (None, "B"),
    "Answer: **B**": (None, "B"),
    "B": (None, None),
    "Answer: a red car": ("A", "D"),
    "Answer： B": ("B", "B"),
    "Answer: B\nRechecked Answer: [C]": ("C", "B"),
    "Answer: green": (None, "B"),
    "Answer: [E]": ("E", None),
    "Answer: A. No, wait.\nAnswer: [B]": ("B", "B"),
    "I cannot tell.": (None, None),
}
RECHECKED = {
    "**Rechecked Answer: [B]**": ("B", "B"),
    "Rechecked Answer: (d)": ("D", "D"),
    "Rechecked Answer: Because it is blue": ("B", "C"),
    "**Rechecked Answer:** B": (None, "B"),
    "Answer: [B]": (None, None),
    "Rechecked Answer: [A]\nSorry. Rechecked Answer: [C]": ("A", "C"),
}
BOXES = {
    "**Bounding box: [0.1, 0.2, 0.5, 0.6]**": ((0.1, 0.2, 0.5, 0.6),) * 2,
    "bbox: [0.1,0.2,0.5,0.6]": ((0.1, 0.2, 0.5, 0.6),) * 2,
    "Bounding box: [0, 0, 1, 1] or rather Bounding box: [0.5, 0.5, 1, 1]": ((0.5, 0.5, 1.0, 1.0),) * 2,
    "Bounding box: [120, 340, 560, 780]": (None, (0.12, 0.17, 0.56, 0.39)),
    "Bounding box: [0, 0, 500, 500]": ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 0.25)),
    "Bounding box: [[0.1, 0.2, 0.5, 0.6]]": (None, (0.1, 0.2, 0.5, 0.6)),
    "Bounding box: (0.1, 0.2, 0.5, 0.6)": (None, (0.1, 0.2, 0.5, 0.6)),
    "Bounding box: [-0.1, 0.2, 0.5, 0.6]": (None, (0.0, 0.2, 0.5, 0.6)),
    "Bounding box: [0.1 0.2 0.5 0.6]": (None, (0.1, 0.2, 0.5, 0.6)),
    "Bounding box of the ball: [0.1, 0.2, 0.5, 0.6]": (None, (0.1, 0.2, 0.5, 0.6)),
    "**Bounding box:** **[0.1, 0.2, 0.5, 0.6]**": (None, (0.1, 0.2, 0.5, 0.6)),
    "It is at [0.1, 0.2, 0.5, 0.6].": (None, (0.1, 0.2, 0.5, 0.6)),
    "Bounding box: [10%, 20%, 50%, 60%]": (None, (0.1, 0.2, 0.5, 0.6)),
    "Bounding box: [0.5, 0.6, 0.1, 0.2]": (None, (0.1, 0.2, 0.5, 0.6)),
    '```json\n[{"bbox_2d": [100, 400, 300, 800], "label": "ball"}]\n```': (None, (0.1, 0.2, 0.3, 0.4)),
    "Bounding box: [0.1, 0.2, 1.02, 0.9]": ((0.1, 0.2, 1.0, 0.9),) * 2,
    f"Bounding box of the ball, which {'truly ' * 12}lies here: [0.1, 0.2, 0.55, 0.65]": (None, (0.1, 0.2, 0.55, 0.65)),
    f"Bounding box: none. {'I see nothing of it. ' * 9}1, 2, 3, 4": (None, None),
    "Bounding box: [0.5, 0.2, 0.5, 0.6]": (None, None),
    "Bounding box: [0.1, 0.2, 0.5]": (None, None),
    "Bounding box: none": (None, None),
}


@pytest.mark.parametrize("reply, published, ours", [(reply, *both) for reply, both in LETTERS.items()])
def test_answers_in_first_replies(reply, published, ours):
    assert published_letter(reply) == published
    found = answer_in(reply, OPTIONS)
    assert (found and found.letter) == ours


@pytest.mark.parametrize("reply, published, ours", [(reply, *both) for reply, both in RECHECKED.items()])
def test_answers_in_second_replies(reply, published, ours):
    assert published_rechecked(reply) == published
    found = answer_in(reply, OPTIONS, rechecked=True)
    assert (found and found.letter) == ours


@pytest.mark.parametrize("reply, published, ours", [(reply, *both) for reply, both in BOXES.items()])
def test_boxes_in_replies(reply, published, ours):
    assert published_box(reply) == (published and pytest.approx(published))
    assert box_in(reply, (1000, 2000)) == (ours and pytest.approx(ours))


def test_larger_numbers_are_no_box_of_a_family_that_writes_parts():
    assert box_in("Bounding box: [120, 340, 560, 780]") is None
    assert box_in("Bounding box: [0.1, 0.2, 0.5, 0.6]") == (0.1, 0.2, 0.5, 0.6)


@pytest.mark.parametrize(
    "text",
    ["[1 ", "[1 2 3", "bbox", "0", "0.", "answer", "answer: ", "Rechecked ", "[1" + " " * 400, "bbox" + " " * 400],
)
def test_long_replies_are_read_in_time_linear_in_their_length(text):
    """A model that repeats itself; a pattern that backtracks would take hours."""
    reply = text + text[-1] * 50_000 + text * (50_000 // len(text)) + "y"
    for read in (box_in, published_box, published_letter, published_rechecked):
        assert read(reply) is None
    assert answer_in(reply, OPTIONS) is answer_in(reply, OPTIONS, rechecked=True) is None


def test_numbers_of_a_box_may_stand_on_lines_of_their_own():
    lines = '{"bbox_2d": [\n            100,\n            400,\n            300,\n            800\n]}'
    assert box_in(lines, (1000, 2000)) == box_in(lines.replace("bbox_2d", "box"), (1000, 2000)) == (0.1, 0.2, 0.3, 0.4)


def test_a_side_that_clamping_closes_is_opened_by_a_millionth_as_published():
    assert published_box("bbox [0.2, 0.3, 0.4, 0.30000000001]") == (0.2, 0.3, 0.4, 0.30000000001)
    assert published_box("bbox [1.0, 0.3, 2.0, 0.4]") is None


def test_free_questions_are_answered_in_words():
    assert answer_in("**Answer: [dark red]**\n**Bounding box: [0, 0, 1, 1]**", ()).text == "dark red"
    assert answer_in("Answer: two dogs", ()).text == "two dogs"
    assert answer_in("Answer:\n", ()) is None


@pytest.mark.parametrize(
    "box, size, want",
    [
        ((0.45, 0.45, 0.55, 0.55), (1000, 500), (349, 174, 651, 326)),
        ((0.0, 0.9, 0.05, 1.0), (1000, 500), (0, 400, 151, 500)),
        ((0.0, 0.0, 1.0, 1.0), (7, 5), (0, 0, 7, 5)),
        ((0.999, 0.999, 1.0, 1.0), (3, 3), (2, 2, 3, 3)),
    ],
)
def test_the_margin_is_a_tenth_of_the_image_on_every_side(box, size, want):
    x0, y0, x1, y1 = crop_box(box, size, 0.1)
    assert all(abs(got - wanted) <= 1 for got, wanted in zip((x0, y0, x1, y1), want, strict=True))
    assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]


class Talk:
    """A session whose model says what it is told to."""

    def __init__(self, session, monkeypatch, *replies):
        self.said, self.replies = [], list(replies)
        monkeypatch.setattr(session, "chat", self.chat)

    def chat(self, messages, *, max_new_tokens):
        self.said.append(messages)
        return Reply(self.replies.pop(0), 0, (), tuple(9 for _ in messages[-1].images))


@pytest.fixture(scope="module")
def adapter():
    return FAMILIES["qwen2_5_vl"]()


@pytest.fixture
def method(adapter):
    return ZoomRefine(adapter, Preset(ZoomRefineSettings(), RunSettings(min_tokens=4, max_tokens=200)))


@pytest.fixture
def session(method):
    pixels = torch.arange(224 * 336 * 3, dtype=torch.int64).remainder(251).to(torch.uint8).view(224, 336, 3)
    with method.open(Image.fromarray(pixels.numpy())) as opened:
        yield opened


def test_the_second_turn_goes_on_behind_the_first_and_shows_the_box(method, session, monkeypatch):
    talk = Talk(session, monkeypatch, "Answer: [A]\nBounding box: [0.5, 0.5, 0.75, 0.75]", "Rechecked Answer: [B]")
    answer = method.ask(session, QUESTION)
    assert answer.text == answer.letter == "B" and answer.notes == ()
    x0, y0, x1, y1 = crop_box((0.5, 0.5, 0.75, 0.75), (336, 224), 0.1)
    assert answer.boxes[0].tolist() == [[x0, y0, x1, y1]]
    assert torch.equal(talk.said[1][2].images[0], session.pixels[0][y0:y1, x0:x1])
    assert [message.text for message in talk.said[1][::2]] == [
        filled(text, QUESTION) for text in (method.settings.ask, method.settings.recheck)
    ]
    assert answer.details["first_answer"] == "A" and answer.details["rechecked_answer"] == "B"
    assert list(answer.steps) == ["answer and box", "crop", "recheck"] and answer.evidence[0].shown_tokens == 9


def test_what_a_reply_lacks_is_a_note_and_the_answer_that_there_is(method, session, monkeypatch):
    Talk(session, monkeypatch, "Answer: [C]")
    answer = method.ask(session, QUESTION)
    assert answer.letter == "C" and answer.notes == ("box: the reply names none, so the first answer stands",)
    Talk(session, monkeypatch, "Answer: [C] Bounding box: [0, 0, 1, 1]", "I am not sure.")
    answer = method.ask(session, QUESTION)
    assert answer.letter == "C" and "whole image" in answer.notes[0] and "recheck" in answer.notes[1]
    Talk(session, monkeypatch, "It might be green. [0.1, 0.1, 0.2, 0.2]", "It is green indeed.")
    answer = method.ask(session, QUESTION)
    assert answer.letter == "B" and "first answer" in answer.notes[0]


def test_as_published_a_header_in_bold_is_not_read(method, session, monkeypatch):
    replies = "**Answer:** B\nBounding box: [0.1, 0.1, 0.4, 0.4]", "**Rechecked Answer:** C"
    Talk(session, monkeypatch, *replies)
    assert method.ask(session, QUESTION).letter == "C"
    Talk(session, monkeypatch, *replies)
    published = method.changed(compat=True).ask(session, QUESTION)
    assert published.details["first_answer"] is None and published.details["rechecked_answer"] is None


@pytest.fixture
def logits(monkeypatch):
    """Watches a model: what its head gave for each new token since it was last asked, (N, vocabulary) float32."""

    def watch(adapter):
        head, seen = adapter.model.get_output_embeddings(), []
        forward = head.forward

        def kept(hidden):
            found = forward(hidden)
            seen.append(found[..., -1, :].float().flatten())
            return found

        monkeypatch.setattr(head, "forward", kept)

        def since():
            taken = torch.stack(seen)
            seen.clear()
            return taken

        return since

    return watch


@pytest.mark.parametrize("family", FAMILIES)
def test_both_turns_are_those_of_the_unshared_conversation(family, monkeypatch, logits):
    """Logits and tokens of the stock model with the whole conversation, on random weights: the box is put in."""
    adapter = FAMILIES[family]()
    since = logits(adapter)
    few = Preset(ZoomRefineSettings(), RunSettings(min_tokens=4, max_tokens=700), AnswerSettings(max_new_tokens=5))
    method = ZoomRefine(adapter, few)
    monkeypatch.setattr(method, "read_box", lambda reply, session: (0.2, 0.3, 0.6, 0.7))
    image = Image.effect_mandelbrot((336, 224), (-2, -1.2, 1, 1.2), 40).convert("RGB")
    run = few.run
    with method.open(image) as session:
        answer = method.ask(session, QUESTION)
        shared = since()
        crop = answer.evidence[0].shown
        budget = {"min_tokens": run.min_tokens, "max_tokens": run.max_tokens}
        whole, inputs = (adapter.preprocess(shown, **budget) for shown in ([image], [image, crop]))
        said = [Message(filled(method.settings.ask, QUESTION))]
        first = stock.generate_ids(adapter, session.turn(said).input_ids, whole, max_new_tokens=5)
        said += [Reply("", 0, tuple(first)), Message(filled(method.settings.recheck, QUESTION), [crop])]
        second = stock.generate_ids(adapter, session.turn(said).input_ids, inputs, max_new_tokens=5)
    assert answer.details["first_reply"] == adapter.decode(first)
    assert answer.details["second_reply"] == adapter.decode(second)
    unshared = since()
    assert len(shared) == len(first) + len(second)
    torch.testing.assert_close(shared, unshared, atol=1e-4, rtol=0)


def test_what_is_transparent_is_cut_out_too(method, monkeypatch):
    image = Image.new("RGBA", (300, 200))
    image.paste((255, 0, 0, 255), (100, 100, 110, 110))
    with method.open(image) as session:
        for box, side in (("[0.6, 0.6, 0.8, 0.8]", 0), ("[0.2, 0.4, 0.5, 0.7]", 100)):
            Talk(session, monkeypatch, f"Answer: [A]\nBounding box: {box}", "Rechecked Answer: [B]")
            answer = method.ask(session, QUESTION)
            x0, y0, x1, y1 = answer.boxes[0][0].tolist()
            shown = np.asarray(answer.evidence[0].shown)
            assert shown.shape == (y1 - y0, x1 - x0, 3) and answer.letter == "B"
            assert int((shown == (255, 0, 0)).all(-1).sum()) == side


def test_a_crop_of_few_pixels_is_enlarged_with_a_note(method, monkeypatch):
    with method.open(Image.new("RGB", (90, 60), "red")) as small:
        Talk(small, monkeypatch, "Answer: [A]\nBounding box: [0.5, 0.5, 0.51, 0.51]", "Rechecked Answer: [A]")
        answer = method.ask(small, QUESTION)
    assert answer.evidence[0].shown.size == (19, 13)
    assert answer.notes == ("crop: it has 19 x 13 pixels, which are enlarged to the least the model takes",)


def test_a_box_moved_to_a_random_place_has_its_size_and_follows_from_the_reply(adapter, method, session):
    moved = RandomBox(adapter, method.preset)
    replies = [f"Answer: [A]\nBounding box: [0.1, 0.2, 0.{width}, 0.9]" for width in (35, 35, 45, 95)]
    boxes = [moved.read_box(reply, session) for reply in replies]
    assert boxes[0] == boxes[1] and boxes[0][:2] != boxes[2][:2]
    for box, width in zip(boxes, (0.25, 0.25, 0.35, 0.85), strict=True):
        assert (box[2] - box[0], box[3] - box[1]) == pytest.approx((width, 0.7))
        assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
    assert moved.read_box("Answer: [A]", session) is None


def recorded(answer, reply, first=None, rechecked=None, **more):
    details = {"zoom-refine": {"first_answer": first, "rechecked_answer": rechecked}}
    record = {"question": QUESTION.text, "options": list(OPTIONS), "answer": answer, "error": None}
    return record | {"replies": {"zoom-refine": reply}, "details": details} | more


def test_the_published_scorer_leaves_out_what_it_cannot_read_and_the_strict_one_does_not():
    scores = published_scores(
        [
            recorded("A", "A", "B", "A"),
            recorded("A", "B", "A", "B"),
            recorded("C", "C", "C"),
            recorded("D", "D", None, "D"),  # right, and left out all the same
            recorded("A", "I cannot tell."),
            recorded("A", "", error="OutOfMemoryError", replies={}, details={}),
            recorded("red", "red", "red", options=[]),
            {"place": "line 3", "error": "it is not JSON"},
        ]
    )
    shares = [(one.right, one.total) for one in scores[:4]]
    assert shares == [(3, 6), (2, 3), (1, 2), (2, 3)] and scores.left_out == 3
    with pytest.raises(ValueError, match="no lettered question"):
        published_scores([recorded("A", "A", "A", replies={"plain": "A"})])


def test_the_published_scorer_of_plain_answers_takes_any_first_letter_from_a_to_e():
    said = {"B": "B", "(c)": "C", "The answer is B": "E", "I think B": "B", "Only x or y.": None, "It": None}
    said |= {"Error: none": "E"}
    for reply, letter in said.items():
        assert published_first_letter(reply) == letter, reply
    records = [recorded("B", "", replies={"plain": reply}) for reply in said]
    records += [recorded("E", "", error="OutOfMemoryError", replies={}), recorded("F", "", replies={"plain": "F"})]
    share = published_baseline(records)
    assert (share.right, share.total) == (3, 6), "a failure is an E, and what has none is left out"


def test_the_published_scores_of_a_results_file_are_one_command(tmp_path, monkeypatch, capsys):
    lines = [{"settings": {}}, recorded("A", "B", "B", id="1"), recorded("A", "A", "B", "A", id="1")]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"id": "2", ')
    monkeypatch.setattr("sys.argv", ["published_scores", str(tmp_path / "results.jsonl")])
    assert published_main() == 0
    printed = capsys.readouterr().out
    assert "0 questions that the published scorer leaves out" in printed
    assert "| published: rechecked, else first | 100% (21–100) | 1 of 1 |" in printed
    assert "| published: first | 0% (0–79) | 0 of 1 |" in printed and "plain" not in printed
    (tmp_path / "both.jsonl").write_text(
        "".join(
            json.dumps(line) + "\n"
            for line in (lines[0], recorded("A", "B", "B", id="1", replies={"plain": "A", "zoom-refine": "B"}))
        )
    )
    monkeypatch.setattr("sys.argv", ["published_scores", str(tmp_path / "both.jsonl")])
    assert published_main() == 0
    assert "| published: plain, the first letter from A to E | 100% (21–100) | 1 of 1 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["published_scores", str(tmp_path / "none.jsonl")])
    assert published_main() == 1 and "none.jsonl" in capsys.readouterr().err


def test_it_is_a_method_like_others():
    assert method_class("zoom-refine") is ZoomRefine
    with pytest.raises(ValueError, match="margin"):
        ZoomRefineSettings(margin=1.5)
    with pytest.raises(ValueError, match="ask"):
        ZoomRefineSettings(ask="Where?")
