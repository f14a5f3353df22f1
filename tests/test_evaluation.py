"""Data set readers on hand-made files, scorers, and runs that are killed."""

import base64
import io
import json
import multiprocessing
import os
import random
import signal
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
from fake_methods import Fake
from PIL import Image

from hide.evaluation import data
from hide.evaluation.data import Sample, read_data
from hide.evaluation.runner import answer, ask_here, evaluate
from hide.evaluation.scoring import compat, score_groups, score_methods, share, strict
from hide.evaluation.store import ResultFile, blank_record
from hide.questions import Question

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
LETTERED = "Where is it?\n(A) left\n(B) right\nAnswer with the option's letter from the given choices directly."


@pytest.fixture()
def picture(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def encoded():
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def same_picture(sample):
    return np.array_equal(np.asarray(sample.image()), PIXELS)


def test_vstar_folders_with_boxes_and_targets(tmp_path):
    folder = tmp_path / "relative_position"
    folder.mkdir()
    Image.fromarray(PIXELS).save(folder / "sa_1.png")
    (folder / "sa_1.json").write_text(
        json.dumps({"target_object": ["cat", "dog"], "bbox": [[1, 2, 3, 4], [5, 0, 2, 2]]})
    )
    record = {
        "image": "relative_position/sa_1.png",
        "text": LETTERED,
        "category": "relative_position",
        "label": "B",
        "question_id": 7,
    }
    (tmp_path / "test_questions.jsonl").write_text(json.dumps(record) + "\n\n")
    (sample,) = data.vstar(tmp_path)
    assert (sample.id, sample.answer, sample.split) == ("7", "B", "relative_position")
    assert sample.question == Question("Where is it?", ("left", "right"))
    assert sample.boxes == ((1, 2, 4, 6), (5, 0, 7, 2)) and sample.entities == ("cat", "dog")
    assert same_picture(sample)


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_hr_bench_tables_with_base64_pictures(tmp_path, kind):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {
        "index": 3,
        "question": "Where is it?",
        "A": "left",
        "B": "right",
        "C": "up",
        "D": "down",
        "answer": "C",
        "category": "single",
        "image": encoded(),
    }
    file = tmp_path / f"hr.{kind}"
    if kind == "tsv":
        file.write_text("\t".join(row) + "\n" + "\t".join(map(str, row.values())) + "\n")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    (sample,) = data.hr_bench(file)
    assert (sample.id, sample.answer, sample.split) == ("3", "C", "single")
    assert sample.question == Question("Where is it?", ("left", "right", "up", "down"))
    assert same_picture(sample)


def test_mme_realworld_and_the_published_lists(tmp_path, picture):
    record = {
        "Question_id": "q1",
        "Text": "Where is it?",
        "Answer choices": ["(A) left", "(B) right"],
        "Ground truth": "A",
        "Image": "a.png",
        "Category": "OCR",
    }
    (tmp_path / "mme.json").write_text(json.dumps([record]))
    (sample,) = data.mme_realworld(tmp_path / "mme.json")
    assert (sample.id, sample.answer, sample.split, sample.question.options) == ("q1", "A", "OCR", ("left", "right"))
    assert same_picture(sample)
    messages = [{"role": "user", "content": f"<image>{LETTERED}"}, {"role": "assistant", "content": "(B)"}]
    records = [
        {"id": 5, "question": LETTERED, "labels": "A", "image_path": "a.png", "category": "x"},
        {"messages": messages, "images": ["a.png"]},
    ]
    (tmp_path / "list.json").write_text(json.dumps(records))
    first, second = data.published_list(tmp_path / "list.json")
    assert (first.id, first.answer, first.split) == ("5", "A", "x") and (second.id, second.answer) == ("1", "B")
    assert first.question == second.question == Question("Where is it?", ("left", "right"))
    assert same_picture(first) and same_picture(second)


def test_scenes_of_a_number_of_tokens_have_about_so_many():
    for sample in islice(read_data("scenes:600", 4), 4):
        width, height = sample.image().size
        assert 500 <= width / 28 * height / 28 <= 720
        assert sample.boxes and sample.question.text
    assert [one.id for one in read_data("scenes:600", 2)] == [one.id for one in read_data("scenes:600", 2)]
    for wrong in ("scenes:", "scenes:x", "scenes:-5", "scenes:0", "scene", "hr-bench"):
        with pytest.raises(ValueError, match="want scenes, scenes:TOKENS, or FORMAT:PATH"):
            read_data(wrong, 1)


def test_small_scenes_have_room_for_what_is_drawn_on_them():
    for tokens in (40, 70):
        assert len(list(read_data(f"scenes:{tokens}", 12))) == 12


def test_scenes_are_questions_with_true_boxes_and_repeatable():
    first, again = (list(data.scenes(4, sizes=[(500, 400)], lettered=True)) for _ in range(2))
    assert [(s.id, s.question, s.answer) for s in first] == [(s.id, s.question, s.answer) for s in again]
    for sample in first:
        assert sample.image().size == (500, 400) and len(sample.boxes) == len(sample.entities) >= 1
        assert sample.question.letter(sample.answer) == sample.answer
    assert [s.split for s in first] == ["attribute", "position"] * 2


@pytest.mark.parametrize(
    "reply, strictly, published",
    [
        ("B", True, True),
        ("b", True, True),
        ("(B)", True, False),
        ("The answer is B.", True, False),
        ("A", False, False),
        ("", None, False),
        ("I see b", None, True),
        ("<FINAL_OUTPUT>B</FINAL_OUTPUT>", True, True),
        ("I say A <FINAL_OUTPUT> B </FINAL_OUTPUT>", True, True),
        ("B <FINAL_OUTPUT>A</FINAL_OUTPUT>", False, False),
    ],
)
def test_strict_and_published_scoring_of_letters(reply, strictly, published):
    question = Question.parse(LETTERED)
    assert strict(question, "B", reply) is strictly
    assert compat(question, "B", reply) is published


def test_free_answers_are_compared_without_case_and_articles():
    question = Question.parse("What color is it?")
    assert strict(question, "red", "Red.") is True and strict(question, "red", "the RED") is True
    assert strict(question, "A", "a") is True and strict(question, "A", "the B") is False
    assert strict(question, "red", "red and blue") is False and strict(question, "red", " ... ") is None


def test_the_interval_is_wilsons():
    found = share([True] * 8 + [False, None])
    assert (found.right, found.total, found.value) == (8, 10, 0.8)
    z, n, p = 1.959964, 10, 0.8
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert found.low == pytest.approx((centre - half) / (1 + z**2 / n), abs=1e-6)
    assert found.high == pytest.approx((centre + half) / (1 + z**2 / n), abs=1e-6)
    assert share([True] * 5).high == 1 and share([False] * 5).low == 0 and str(share([])) == "none"


def sample(number, fail=False):
    def image():
        if fail:
            raise ValueError("no such picture")
        return Image.fromarray(PIXELS)

    return Sample(f"q{number}", image, Question.parse(LETTERED), "B", "odd" if number % 2 else "even")


def fakes(seconds=0.0):
    """Plain always says A, HiDe always B; and what was asked of it."""
    hide = Fake("hide", "B", tokens=140, seconds=seconds)
    return {"plain": Fake("plain", "A", tokens=10), "hide": hide}, hide.asked


def run(methods, samples, results, **keywords):
    evaluate(partial(ask_here, methods), samples, results, **keywords)


def test_a_failing_question_is_recorded_and_only_retried_on_demand(tmp_path):
    path = tmp_path / "r.jsonl"
    with ResultFile(path, {"model": "m"}) as results:
        run(fakes()[0], [sample(0), sample(1, fail=True), sample(2)], results)
        assert results.records["q1"]["error"] == "ValueError: no such picture"
    with ResultFile(path, {"model": "m"}) as results:
        methods, asked = fakes()
        run(methods, [sample(0), sample(1), sample(2)], results)
        assert asked == []
        records = list(results.records.values())
        table = list(score_groups(records, strict))
        assert [(name, of["plain"].right, of["hide"].right, of["hide"].total, failed) for name, of, failed in table] == [
            ("even", 0, 2, 2, 0), ("odd", 0, 0, 1, 1), ("up to 100 image tokens", 0, 2, 2, 0), ("size unknown", 0, 0, 1, 1),
            ("all", 0, 2, 3, 1),
        ]  # fmt: skip
        plain, ours = score_methods(records, strict).values()
        assert (plain.share.right, plain.tokens, plain.against_plain.gained) == (0, 5 + 10, 0)
        assert (ours.share.right, ours.tokens, *ours.against_plain[1:]) == (2, 5 + 140, 2, 0, 0.5)
        assert 0 < plain.seconds < 0.1 and 0 < ours.seconds < 0.1
        run(methods, [sample(0), sample(1), sample(2)], results, retry_failed=True)
        assert len(asked) == 1 and results.records["q1"]["error"] is None


def test_other_settings_a_second_run_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    with ResultFile(path, {"sigma": 1}) as results:
        with pytest.raises(ValueError, match="another run is writing"):
            ResultFile(path, {"sigma": 1})
        with pytest.raises(ValueError, match="another run is writing"):
            ResultFile(path, {"sigma": 1})  # the one that was refused has freed nothing
        results.append(blank_record(sample(0), ""))
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="sigma: 1 there, 2 now"):
        ResultFile(path, {"sigma": 2})
    for foreign, text in (
        ("hello\n", "not a result file"),
        ('{"settings": 3}\n', "not a result file"),
        ('{"settings": {}}\n{"id": "q1"}\n', "line 2 of .*x is no record"),
        ('{"settings": {}}\nnull\n', "line 2 of .*x is no record"),
    ):
        (tmp_path / "x").write_text(foreign)
        with pytest.raises(ValueError, match=text):
            ResultFile(tmp_path / "x", {})
        assert (tmp_path / "x").read_text() == foreign


def test_a_run_without_a_result_leaves_no_file_and_blocks_no_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "r.jsonl"
    with ResultFile(path, {"sigma": 1}):
        assert path.is_file()
    assert list(tmp_path.iterdir()) == []
    path.parent.mkdir(parents=True)
    path.write_text('{"settings": {"sigma": 1}}\n{"id": "q')  # killed before its first answer
    with ResultFile(path, {"sigma": 2}) as results:
        results.append(blank_record(sample(0), ""))
    assert json.loads(path.read_text().splitlines()[0]) == {"settings": {"sigma": 2}}


def test_a_result_is_never_taken_for_another_question(tmp_path):
    first = replace(sample(0), picture="a.png")
    others = [
        replace(first, question=Question("Where is she?", first.question.options)),
        replace(first, question=Question(first.question.stem, ("right", "left"))),
        replace(first, picture="b.png"),
    ]
    for number, other in enumerate(others):
        (methods, asked), seen = fakes(), []
        with ResultFile(tmp_path / str(number), {}) as results:
            run(methods, [first], results)
            run(methods, [first], results)
            assert len(asked) == 1
            run(methods, [other], results, progress=seen.append)
        assert asked == [first.question, other.question] and "another question before" in seen[0]["notes"][0]
        assert (seen[0]["question"], seen[0]["picture"]) == (other.question.stem, other.picture)
    with ResultFile(tmp_path / "key", {}) as results:
        methods, asked = fakes()
        run(methods, [first], results)
        run(methods, [replace(first, answer="A", split="new")], results)
        record = results.records["q0"]
    assert len(asked) == 1, "the reply is the same, whatever is right"
    assert (record["answer"], record["split"], record["replies"]) == ("A", "new", {"plain": "A", "hide": "B"})
    assert json.loads((tmp_path / "key").read_text().splitlines()[-1]) == record


def test_results_of_before_pictures_were_recorded_are_still_read(tmp_path):
    path, (methods, asked) = tmp_path / "r.jsonl", fakes()
    old = {name: value for name, value in answer(methods, sample(0)).items() if name not in ("picture", "notes")}
    path.write_text('{"settings": {}}\n' + json.dumps(old) + "\n")
    with ResultFile(path, {}) as results:
        run(methods, [replace(sample(0), picture="a.png")], results)
    assert len(asked) == 1 and path.read_text().count("\n") == 2


def test_samples_with_one_id_are_asked_each(tmp_path):
    samples = [replace(sample(number), id=id) for number, id in enumerate(["1", 1, "1#2", "x"])]
    with ResultFile(tmp_path / "r.jsonl", {}) as results:
        for _ in range(2):
            (methods, asked), seen = fakes(), []
            run(methods, samples, results, progress=seen.append)
            assert [record["id"] for record in seen] == ["1", "1#2", "1#2#2", "x"]
        assert asked == [] and "'1' stands there more than once" in seen[1]["notes"][0]


def run_until_killed(path):
    with ResultFile(path, {}) as results:
        run(fakes(0.002)[0], (sample(number) for number in range(120)), results)


def test_runs_killed_at_random_points_lose_nothing_and_ask_nothing_twice(tmp_path):
    path, rng = tmp_path / "r.jsonl", random.Random(0)
    fork = multiprocessing.get_context("fork")
    kills = 0
    while True:
        process = fork.Process(target=run_until_killed, args=(path,))
        process.start()
        process.join(rng.uniform(0.02, 0.12))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        if kills == 3:  # what a kill in the middle of a write leaves behind
            with path.open("ab") as file:
                file.write(b'{"id": "q1')
    assert kills >= 3 and process.exitcode == 0
    assert list(tmp_path.iterdir()) == [path], "the last run takes the lock of the killed ones away"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines[1:]] == [f"q{number}" for number in range(120)]


def test_a_real_question_leaves_a_record_that_json_can_hold():
    from hide import PRESETS, HiDe, Plain
    from hide.models.qwen2_5_vl import Qwen25VL
    from hide.tiny.model import build

    (one,) = data.scenes(1, sizes=[(200, 150)], lettered=True)
    model = Qwen25VL(*build())
    record = answer({"plain": Plain(model, PRESETS["tiny"]), "hide": HiDe(model, PRESETS["tiny"])}, one)
    assert record["error"] is None and json.loads(json.dumps(record)) == record
    assert record["id"] == one.id and len(record["boxes"]["hide"]) == 1 and record["details"]["hide"]["entities"]
    assert record["replies"].keys() == record["tokens"].keys() == record["seconds"].keys() == {"plain", "hide"}
    assert record["tokens"]["hide"] > record["tokens"]["plain"] > record["image_tokens"][0]


def test_the_command_goes_on_where_it_was_and_prints_shares_by_split(tmp_path):
    from typer.testing import CliRunner

    from hide.cli import app
    from hide.tiny.scenes import draw_scene

    draw_scene(0, 200, 150, objects=3).image.save(tmp_path / "a.png")
    records = [
        {"id": i, "question": LETTERED, "labels": "B", "image_path": "a.png", "category": "xy"[i % 2]} for i in range(3)
    ]
    records.append({**records[0], "id": 3, "image_path": "missing.png"})
    (tmp_path / "list.json").write_text(json.dumps(records))
    call = ["eval", "--data", f"list:{tmp_path / 'list.json'}", "--out", str(tmp_path / "out"), "--limit"]
    assert CliRunner().invoke(app, [*call, "2"]).exit_code == 0
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    result = CliRunner().invoke(app, [*call, "9"])
    assert result.exit_code == 0, result.output
    after = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 5 and b"missing.png is not a file" in after
    assert "4 questions" in result.output and "failed" in result.output
    for wrong, text in (
        (["--data", "vstar"], "FORMAT"),
        (["--scorer", "x"], "scorer"),
        (["--sigma", "2"], "other settings"),
        (["--dtype", "bfloat16"], "dtype: None there, 'bfloat16' now"),
        (["--offload-kv"], "offload_kv: False there, True now"),
    ):
        result = CliRunner().invoke(app, [*call, "9", *wrong])
        said = " ".join(result.output.split())
        assert result.exit_code == 1 and text in said and "Traceback" not in said
