"""Data files as they come: cells of any type, ids, keys, chats, and records that are none."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hide.cli import app
from hide.evaluation import data
from hide.evaluation.data import BadRecord, Sample, distinct
from hide.evaluation.scoring import right_answer, strict
from hide.questions import Question
from hide.tiny.scenes import draw_scene

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
OTHER = 255 - PIXELS
TEXT = "Where is it?\n(A) left\n(B) right"
GOOD = {"question": TEXT, "labels": "B", "image_path": "a.png"}


def png(pixels=PIXELS):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = base64.b64encode(png()).decode()


@pytest.fixture()
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png(OTHER))
    return tmp_path


def listed(folder, *records):
    (folder / "list.json").write_text(json.dumps(records))
    return list(distinct(data.published_list(folder / "list.json")))


def one(folder, record):
    (found,) = listed(folder, record)
    if isinstance(found, BadRecord):
        raise found
    return found


def tsv(folder, *rows, header="index\tquestion\tA\tB\tC\tD\tanswer\tcategory\timage", encoding="utf-8", end="\n"):
    file = folder / "bench.tsv"
    file.write_bytes(end.join([header, *rows, ""]).encode(encoding))
    return list(distinct(data.hr_bench(file)))


def row(*options, index="0", question="What?", answer="A", image=PICTURE):
    return "\t".join([index, question, *options, answer, "c", image])


def same(image, pixels):
    return np.array_equal(np.asarray(image), pixels)


# -- cells are texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("None", "NA", "nan", "null"), ("007", "1.50", "1e3", "8"), ("TRUE", "false", "2024-01-02", "inf"),
        ("N/A", "yes", "no", "-"), ("12,5", "0x10", "+1", "1_000"),
    ],
)  # fmt: skip
def test_tsv_cells_stay_the_texts_that_they_are(folder, options):
    for end, encoding in (("\n", "utf-8"), ("\r\n", "utf-8-sig")):
        (sample,) = tsv(folder, row(*options, index="007", answer="d"), end=end, encoding=encoding)
        assert (sample.question.options, sample.id, sample.answer) == (options, "007", "D")
        assert same(sample.image(), PIXELS)


def test_tsv_quotes_line_breaks_and_large_cells(folder):
    wrapped = '"' + "\n".join(PICTURE[i : i + 76] for i in range(0, len(PICTURE), 76)) + '"'
    large = "word " * 40_000
    first, second = tsv(
        folder,
        row('"a\t""b"""', "x", "", "", question='"What\nis ""it""?"', image=wrapped),
        row("left", "right", "up", "", question=large, image=f"data:image/png;base64,{PICTURE}"),
    )
    assert first.question == Question('What\nis "it"?', ('a "b"', "x"))
    assert second.question.options == ("left", "right", "up") and len(second.question.stem) == len(large) - 1
    assert same(first.image(), PIXELS) and same(second.image(), PIXELS) and first.picture == second.picture


def test_tsv_quotes_that_are_no_cells_own_are_text_and_cost_no_other_row(folder):
    rows = [
        row('"STOP" sign', "x", "", ""),
        row("x", "y", "", "", index="1", question='"Open question'),
        row("x", '5"', "", "", index="2", question='"What\nis it?"'),
        row("x", '"', "", "", index="3", question='"What" is it?'),
        row("x", index="4", question='"What?'),
        row("x", "y", "", "", index="5", question='"What?'),
    ]
    found = tsv(folder, *rows)
    assert [sample.id for sample in found] == list("012345") and isinstance(found.pop(4), BadRecord)
    assert [(sample.question.stem, sample.question.options) for sample in found] == [
        ("What?", ('"STOP" sign', "x")), ('"Open question', ("x", "y")), ("What\nis it?", ("x", '5"')),
        ('"What" is it?', ("x", '"')), ('"What?', ("x", "y")),
    ]  # fmt: skip


def test_a_url_in_a_table_is_refused_as_one(folder):
    (sample,) = tsv(folder, row("x", "y", "", "", image="https://example.org/a.png"))
    with pytest.raises(ValueError, match="URLs are not read"):
        sample.image()


def test_parquet_cells_of_other_types_are_texts(folder):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    base = {"question": "How many?", "answer": "b", "category": None}
    columns = [
        {"index": 5, "A": 7, "B": 12, "C": None, "D": None, "image": {"bytes": png(), "path": None}},
        {"index": 5.5, "A": 1.5, "B": 2.0, "C": float("nan"), "D": None, "image": png()},
        {"index": None, "A": True, "B": False, "C": None, "D": None, "image": {"bytes": None, "path": "a.png"}},
    ]
    found = []
    for record in columns:
        parquet.write_table(pa.Table.from_pylist([{**base, **record}]), folder / "t.parquet")
        found += data.hr_bench(folder / "t.parquet")
    assert [sample.question.options for sample in found] == [("7", "12"), ("1.5", "2.0"), ("true", "false")]
    assert [(sample.id, sample.answer, sample.split) for sample in found] == [
        ("5", "B", "all"), ("5.5", "B", "all"), ("0", "B", "all"),
    ]  # fmt: skip
    assert all(same(sample.image(), PIXELS) for sample in found)


def test_json_numbers_are_the_texts_that_stand_there(folder):
    (folder / "list.json").write_text(
        '[{"question": "How many?", "options": [1, 2.50, true, "1e3"], "labels": 2.50, "image_path": "a.png"}]'
    )
    (sample,) = data.published_list(folder / "list.json")
    assert sample.question.options == ("1", "2.50", "true", "1e3") and sample.answer == "B"


@pytest.mark.parametrize(
    "choices, options",
    [
        (["(A) 12", "(B) 14"], ("12", "14")),
        (["A. red", "B: blue", "C) green"], ("red", "blue", "green")),
        (["（A）红", "（B）蓝"], ("红", "蓝")),
        (["A、红", "B：蓝"], ("红", "蓝")),
        (["[A] red", "【B】 blue"], ("red", "blue")),
        (["a. red", "(b) blue"], ("red", "blue")),
        (["(A). red", "(B).5"], ("red", ".5")),
        (["（B）蓝", "（A）红"], None),
        (["f(x) = 2", "f(x) = 3"], ("f(x) = 2", "f(x) = 3")),
        ([12, None], None),
        (["(B) red", "(A) blue"], None),
        (["(A) red", ""], None),
        ({"b": 3, "a": "(x) red"}, ("(x) red", "3")),
        ({"A": "red", "C": "blue"}, None),
        ({"1": "red", "2": "blue"}, None),
        ("red, blue", None),
    ],
)
def test_choices_lose_their_own_letters_only(folder, choices, options):
    record = {"Text": "What?", "Answer choices": choices, "Ground truth": "B", "Image": "a.png"}
    (folder / "mme.json").write_text(json.dumps([record]))
    (found,) = distinct(data.mme_realworld(folder / "mme.json"))
    if options is None:
        assert isinstance(found, BadRecord)
    else:
        assert (found.question.options, found.answer) == (options, "B")


@pytest.mark.parametrize(
    ("question", "choices", "texts"),
    [
        ("What color is the bag?", ["(A) red", "(B) blue", "(C) The image does not feature it."],
         ("red", "blue", "The image does not feature it.")),
        ("图中的车牌号是多少？", ["(A) 京A1234", "(B) 沪B5678", "(C) 图片中没有"], ("京A1234", "沪B5678", "图片中没有")),
    ],
)  # fmt: skip
def test_the_tables_of_mme_realworld_that_harnesses_read_are_its_questions(folder, question, choices, texts):
    import pyarrow as pa
    from pyarrow import parquet

    # lmms-eval's parquet files, and VLMEvalKit's TSV with the same choices in one cell, both in either language.
    own = {"index": 7, "question": question, "answer": "B", "category": "OCR", "l2-category": "plates"}
    parquet.write_table(
        pa.Table.from_pylist([{**own, "multi-choice options": choices, "bytes": PICTURE}]), folder / "mme.parquet"
    )
    lines = "\n".join(choices)
    cells = {**own, "multi-choice options": f'"{lines}"', "A": choices[0], "image": PICTURE}
    (folder / "mme.tsv").write_text("\t".join(cells) + "\n" + "\t".join(map(str, cells.values())) + "\n", "utf-8")
    for name in ("mme.parquet", "mme.tsv"):
        (found,) = distinct(data.mme_realworld(folder / name))
        assert (found.id, found.question.stem, found.question.options) == ("7", question, texts)
        assert (found.answer, found.split) == ("B", "OCR") and same(found.image(), PIXELS)


def test_an_empty_option_between_others_is_a_bad_record_and_moves_no_letter(folder):
    bad, good = tsv(folder, row("x", " ", "y", ""), row("x", "y", " ", "", index="1"))
    assert isinstance(bad, BadRecord) and "options" in bad.reason and bad.place.startswith("line 2 of ")
    assert good.question.options == ("x", "y")


# -- ids ------------------------------------------------------------------------------------------------------------


def test_ids_are_texts_and_each_is_one_question(folder):
    given = ["7", 7, "7", "", None, [1], True, 1.5, "a", "7#2", "\ud800"]
    found = listed(folder, *({**GOOD, "id": id} for id in given), GOOD)
    ids = [sample.id for sample in found]
    assert ids == ["7", "7#2", "7#3", "3", "4", "5", "6", "1.5", "a", "7#2#2", "10", "11"]
    assert [bool(sample.notes) for sample in found] == [id in ("7#2", "7#3", "7#2#2") for id in ids]
    assert ids == [sample.id for sample in data.published_list(folder / "list.json")]


# -- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, answer",
    [
        ("B", "B"), ("b", "B"), ("(b)", "B"), ("[B]", "B"), ("B.", "B"), ("(B) blue", "B"), ("B) Blue.", "B"), ("b: blue", "B"),
        (" blue ", "B"), ("Light  BLUE", "C"), ("option B", "B"), ("Answer: (b)", "B"), ("D", "D"), ("A", "A"), ("a", "D"),
        ("（B）", "B"), ("Ｂ", "B"), ("'B'", "B"), ("**B**", "B"), ("B,", "B"), ("B：blue", "B"), ("B、blue", "B"), ("B - blue", "B"),
        ("E", None), ("AB", None), ("A, B", None), ("(B) red", None), ("", None), ("1", None), ("green", None), ("b lue", None),
    ],
)  # fmt: skip
def test_a_key_is_a_letter_or_an_options_text_or_refused(key, answer):
    question = Question("What?", ("red", "blue", "light blue", "a"))
    if answer is None:
        with pytest.raises(ValueError, match="answer: got"):
            right_answer(question, key)
    else:
        assert right_answer(question, key) == answer and strict(question, answer, f"({answer})") is True


def test_keys_of_free_questions_keep_their_text_and_have_a_word():
    question = Question("What is written there?")
    assert right_answer(question, " U.S.  Route 1 ") == "U.S. Route 1"
    assert strict(question, right_answer(question, "A"), "A") is True
    with pytest.raises(ValueError, match="want a word"):
        right_answer(question, "?")


def test_every_reader_checks_its_key(folder):
    for key, answer in (("(b) RIGHT", "B"), ("right", "B"), ("Z", None), (["A", "B"], None), ([], None)):
        (folder / "test_questions.jsonl").write_text(
            json.dumps({"image": "a.png", "text": TEXT, "category": "c", "label": key, "question_id": 1})
        )
        record = {"Text": "Where?", "Answer choices": ["left", "right"], "Ground truth": key, "Image": "a.png"}
        (folder / "mme.json").write_text(json.dumps([record]))
        found = [
            *distinct(data.vstar(folder)),
            *distinct(data.mme_realworld(folder / "mme.json")),
            *listed(folder, {**GOOD, "labels": key}),
        ]
        if isinstance(key, str):
            found += tsv(folder, row("left", "right", "", "", answer=key))
        assert [getattr(sample, "answer", None) for sample in found] == [answer] * len(found)
    assert one(folder, {**GOOD, "labels": ["b"]}).answer == "B"


# -- chats ----------------------------------------------------------------------------------------------------------


def chat(*turns, **fields):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **fields}


IMAGE, WORDS, REPLY = {"type": "image"}, {"type": "text", "text": TEXT}, ("assistant", "(B)")
URI = f"data:image/png;base64,{PICTURE}"


@pytest.mark.parametrize(
    "record, pictures",
    [
        (chat(("user", [IMAGE, WORDS]), REPLY, images=["a.png"]), 1),
        (chat(("user", [{"type": "image", "image": "a.png"}, WORDS]), REPLY), 1),
        (chat(("user", [{"type": "image", "path": "a.png"}, WORDS]), REPLY), 1),
        (chat(("user", [{"image": "a.png"}, {"text": TEXT}]), ("assistant", [{"text": "B"}])), 1),
        (chat(("user", [{"type": "image_url", "image_url": {"url": URI}}, WORDS]), REPLY), 1),
        (chat(("user", [{"type": "image", "base64": PICTURE}, WORDS]), REPLY), 1),
        (chat(("system", ""), ("user", TEXT), REPLY, images=["a.png"]), 1),
        (chat(("user", f"<image><image>{TEXT}"), REPLY, images=["a.png", "b.png"]), 2),
        (chat(("user", TEXT), REPLY, images=["a.png", "b.png"]), 2),
        (chat(("user", [{"type": "image", "image": "a.png"}, IMAGE, WORDS]), REPLY, images=["b.png"]), 2),
        ({**GOOD, "image_path": ["a.png", "b.png"]}, 2),
        (
            {
                "conversations": [{"from": "human", "value": f"<image>\n{TEXT}"}, {"from": "gpt", "value": "B"}],
                "image": "a.png",
            },
            1,
        ),
    ],
)
def test_chats_in_parts_and_several_pictures(folder, record, pictures):
    sample = one(folder, record)
    assert (sample.question, sample.answer) == (Question("Where is it?", ("left", "right")), "B")
    image = sample.image()
    if pictures == 1:
        assert same(image, PIXELS)
    else:
        assert len(image) == 2 and same(image[0], PIXELS) and same(image[1], OTHER)


@pytest.mark.parametrize(
    "record, reason",
    [
        (chat(("system", "Answer in French."), ("user", TEXT), REPLY, images=["a.png"]), "turns of system, user"),
        (chat(("user", TEXT), REPLY, ("user", TEXT), REPLY, images=["a.png"]), "turns of user, assistant, user"),
        (chat(("user", TEXT), images=["a.png"]), "turns of user, want"),
        (chat(REPLY, ("user", TEXT), images=["a.png"]), "turns of assistant, user"),
        (chat(("user", f"<image>{TEXT}"), REPLY, images=["a.png", "b.png"]), "2 pictures for 1 places"),
        (chat(("user", f"<image><image>{TEXT}"), REPLY, images=["a.png"]), "1 pictures for 2 places"),
        (chat(("user", TEXT), REPLY, images=[]), "images: got none"),
        (chat(("user", TEXT), REPLY), "images: got none"),
        (chat(("user", [{"type": "video", "video": "v.mp4"}, WORDS]), REPLY), "got a part"),
        (chat(("user", [IMAGE, WORDS]), ("assistant", [IMAGE]), images=["a.png"]), "answer holds a picture"),
        (chat(("user", None), REPLY, images=["a.png"]), "content: got nothing"),
        (chat(("user", [{"type": ["text"]}]), REPLY, images=["a.png"]), "content: got a part"),
        ({**GOOD, "labels": None}, "without 'labels'; it has ['image_path', 'question']$".replace("[", "\\[")),
        ({"messages": "hello", "images": ["a.png"]}, "want a list of turns"),
        ({**GOOD, "question": {"en": TEXT}}, "question: got dict"),
        ({**GOOD, "image_path": 3.5}, None),
        ({**GOOD, "image_path": ""}, "image: got str"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_reason(folder, record, reason):
    if reason is None:  # a number may be a file's name
        assert one(folder, record).picture == "3.5"
        return
    with pytest.raises(ValueError, match=f"data: record 1 of .*list.json: .*{reason}"):
        one(folder, record)


# -- bad records cost themselves ------------------------------------------------------------------------------------


def test_iteration_goes_on_behind_a_bad_record(folder):
    (folder / "list.json").write_text(json.dumps([GOOD, 3, None, {**GOOD, "labels": "Z", "id": "z"}, {}, GOOD]))
    samples, bad, good = data.published_list(folder / "list.json"), [], []
    while True:
        try:
            good.append(next(samples))
        except StopIteration:
            break
        except BadRecord as error:
            bad.append(error)
    assert [sample.id for sample in good] == ["0", "5"] and [error.id for error in bad] == ["1", "2", "z", "4"]
    assert [error.place.split(" of ")[0] for error in bad] == ["record 2", "record 3", "record 4", "record 5"]
    assert "want an object with fields, got str '3'" in bad[0].reason and "without 'question'" in bad[3].reason


def test_broken_lines_and_rows_are_bad_records_with_their_place(folder):
    line = json.dumps(
        {"image": "a.png", "text": TEXT, "category": "c\u2028d", "label": "B"}, ensure_ascii=False
    ).encode()
    lines = [line, line[:20], b"\xff\xfe{", b"", b"[" * 100_000, line.replace(b"a.png", b"../a.png"), line[:-1]]
    (folder / "test_questions.jsonl").write_bytes(b"\n".join(lines))
    found = list(distinct(data.vstar(folder)))
    assert [isinstance(sample, Sample) for sample in found] == [True, False, False, False, True, False]
    assert found[0].split == "c d"
    assert [bad.place.split(" of ")[0] for bad in found if isinstance(bad, BadRecord)] == [
        "line 2", "line 3", "line 5", "line 7",
    ]  # fmt: skip
    good = row("x", "y", "", "")
    file = folder / "bench.tsv"
    header = "index\tquestion\tA\tB\tC\tD\tanswer\tcategory\timage"
    latin = row("x", "y", "", "", question="nave")
    rows = [header, good, "1\tonly", f"{good}\textra", latin, row("x", "y", "", "", image="!!"), good]
    file.write_bytes("\n".join(rows).encode().replace(b"nave", b"na\xefve"))
    found = list(distinct(data.hr_bench(file)))
    assert [isinstance(sample, Sample) for sample in found] == [True, False, False, False, False, True]
    reasons = ["2 cells, want 9", "10 cells, want 9", "surrogate", "not base64"]
    for number, (bad, reason) in enumerate(zip(found[1:5], reasons, strict=True), 3):
        assert bad.place == f"line {number} of {file}" and reason in bad.reason


def test_targets_that_cannot_be_read_cost_their_question(folder):
    (folder / "a.json").write_text('{"bbox": [[1, 2, 3]]}')
    (folder / "b.json").write_text('{"bbox": [[1, 2, 3, 4]], "target_object": "cat"}')
    record = {"text": TEXT, "category": "c", "label": "B"}
    (folder / "test_questions.jsonl").write_text(
        "\n".join(json.dumps({**record, "image": name}) for name in ("a.png", "b.png"))
    )
    bad, good = distinct(data.vstar(folder))
    assert isinstance(bad, BadRecord) and "a.json cannot be read" in bad.reason
    assert good.entities == ("cat",) and good.boxes == ((1, 2, 4, 6),)


@pytest.mark.parametrize(
    "reader, name, content, text",
    [
        (data.vstar, "", None, "test_questions.jsonl is not a file"),
        (data.published_list, "m.json", None, "m.json is not a file"),
        (data.mme_realworld, "m.json", b"{", "m.json: it is not JSON"),
        (data.mme_realworld, "m.json", b"[" * 100_000, "m.json: it is not JSON"),
        (data.published_list, "m.json", b"\xff\xfe[", "m.json: .*utf-8"),
        (data.mme_realworld, "m.json", b"{}", "want a list"),
        (data.hr_bench, "m.csv", b"x", "neither .tsv nor .parquet"),
        (data.hr_bench, "m.tsv", b"", "lacks the columns question, A, B, answer, image"),
        (data.hr_bench, "m.tsv", b"question\tA\tB\n", "lacks the columns answer, image"),
        (data.hr_bench, "m.tsv", b"question\tA\tB\tA\tanswer\timage\n", "two columns of the same name"),
        (data.hr_bench, "m.parquet", b"PAR1", "m.parquet is no parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_before_anything_is_asked(tmp_path, reader, name, content, text):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"data: .*{text}"):
        reader(tmp_path / name)


# -- commands -------------------------------------------------------------------------------------------------------


def invoke(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def test_the_command_tells_bad_records_from_failed_and_wrong_ones(tmp_path):
    draw_scene(0, 200, 150, objects=3).image.save(tmp_path / "a.png")
    draw_scene(1, 150, 200, objects=3).image.save(tmp_path / "b.png")
    both = chat(("user", f"<image><image>{TEXT}"), REPLY, images=["a.png", "b.png"])
    records = [{**GOOD, "labels": "Z"}, GOOD, both, {**GOOD, "image_path": "no.png"}, "text"]
    (tmp_path / "list.json").write_text(json.dumps(records))
    call = ("eval", "--data", f"list:{tmp_path / 'list.json'}", "--methods", "all", "--out", tmp_path / "o")
    code, said = invoke(*call)
    assert code == 0 and "3 questions, 1 failed" in said and "Bad records: 2, not asked and not counted" in said
    lines = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()[1:]]
    by_id = {line["id"]: line for line in lines}
    assert by_id.keys() == {"0", "1", "2", "3", "4"}
    assert by_id["0"]["place"] == f"record 1 of {tmp_path / 'list.json'}" and "'Z'" in by_id["0"]["error"]
    assert "place" not in by_id["3"] and "no.png is not a file" in by_id["3"]["error"]
    assert len(by_id["2"]["images"]) == len(by_id["2"]["boxes"]["hide"]) == 2 and "tiles" in by_id["2"]["replies"]
    for name in ("summary.md", "report.html"):
        text = (tmp_path / "o" / name).read_text()
        assert "Bad records: 2" in text and "record 5 of" in text
    # A key that is mended makes a question of the record; nothing else is asked again.
    (tmp_path / "list.json").write_text(json.dumps([GOOD, *records[1:]]))
    code, said = invoke(*call)
    assert code == 0 and "4 questions, 1 failed" in said and "Bad records: 1" in said
    assert len((tmp_path / "o" / "results.jsonl").read_text().splitlines()) == 7


def test_a_question_that_cannot_be_measured_does_not_end_a_calibration(tmp_path):
    record = {"text": TEXT, "category": "c", "label": "B"}
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.json").write_text('{"bbox": [[20, 20, 60, 60]], "target_object": ["star"]}')
    draw_scene(0, 200, 150, objects=3).image.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    lines = [{**record, "image": "b.png"}, {**record, "image": "a.png"}, {**record, "image": "c.png", "label": "Z"}]
    (tmp_path / "test_questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, said = invoke("calibrate", "--data", f"vstar:{tmp_path}", "--answers", 3, "--out", tmp_path / "o")
    assert code == 0 and "could not be measured: 1 of 2" in said and "Bad records: 1" in said
    found = json.loads((tmp_path / "o" / "calibration.json").read_text())
    assert found["failed"].keys() == {"0"} and "b.png" in found["failed"]["0"] and len(found["answers"]) == 3


STARTS = [
    ["eval", "--out", "OUT"],
    ["calibrate", "--out", "OUT"],
    ["profile", "--out", "OUT"],
    ["attend", "PICTURE", "Where?", "--out", "OUT"],
    ["ask", "PICTURE", "Where?", "--out", "OUT"],
    ["ask", "PICTURE", "Where?", "--report", "OUT"],
]


@pytest.mark.parametrize("start", STARTS, ids=" ".join)
def test_a_folder_that_cannot_be_written_is_noticed_before_a_model_is_loaded(folder, monkeypatch, start):
    def load(*arguments, **keywords):
        raise AssertionError("a model is loaded")

    for name in ("hide.cli.loading.ModelOptions.load", "hide.cli.profile._profile"):
        monkeypatch.setattr(name, load)
    (folder / "file").write_text("")
    (folder / "taken").mkdir()
    for name in ("results.jsonl", "calibration.json", "profile.json", "attention.png", "result.json"):
        (folder / "taken" / name).mkdir()
    before = sorted(folder.rglob("*"))
    for out in ("file", "file/below", "new/../file/x", "taken", "n" * 300, "new/" + "n" * 300):
        words = {"OUT": folder / out, "PICTURE": folder / "a.png"}
        code, said = invoke(*(words.get(word, word) for word in start))
        assert code == 1 and start[-2].strip("-") + ": " in said and "cannot be written" in said, said
        assert sorted(folder.rglob("*")) == before, "something is left behind"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["eval", "--limit", "-1"], "limit: got -1, want at least 1"),
        (["eval", "--limit", "0"], "limit: got 0, want at least 1"),
        (["eval", "--data", "list:wrong.json"], "wrong.json is not a file"),
        (["eval", "--data", "hr-bench:other.json"], "neither .tsv nor .parquet"),
        (["eval", "--data", "mme-realworld:other.json"], "none of the 1 records of mme-realworld:other.json"),
        (["eval", "--data", "list:empty.json"], "holds no question"),
        (["eval", "--scorer", "x"], "scorer"),
        (["eval", "--methods", "x"], "methods"),
        (["eval", "--layer", "77"], "want 0 to 5"),
        (["eval", "--corrupt-entities", "x"], "corrupt_entities"),
        (["eval", "--ray", "auto", "--actors", "0"], "actors: got 0"),
        (["calibrate", "--limit", "0"], "limit: got 0, want at least 1"),
        (["calibrate", "--answers", "-1"], "answers: got -1, want at least 0"),
        (["calibrate", "--views", "whole,small"], "view: got 'small', want a number of tokens, or auto"),
        (["calibrate", "--data", "list:wrong.json"], "wrong.json is not a file"),
        (["entities", "--data", "wrong.jsonl"], "wrong.jsonl is not a file"),
        (["profile", "--tokens", "-1"], "image: got -1"),
        (["profile", "--chunk", "0"], "chunk: got 0"),
        (["profile", "--flow", "x"], "flow"),
        (["attend", "a.png", "Where?", "--tokens", "0"], "tokens: got 0, want at least 1"),
        (["attend", "no.png", "Where?"], "no.png is not a file"),
        (["ask", "no.png", "Where?"], "no.png is not a file"),
        (["ask", "a.png", "Where?", "--option", "one"], "options"),
    ],
)
def test_a_failed_start_is_one_line_and_leaves_nothing(folder, monkeypatch, arguments, text):
    monkeypatch.chdir(folder)
    (folder / "other.json").write_text(json.dumps([GOOD]))
    (folder / "empty.json").write_text("[]")
    before = sorted(folder.rglob("*"))
    code, said = invoke(*arguments, *(["--out", "new/out"] if arguments[0] != "entities" else []))
    assert code == 1 and text in said and "Traceback" not in said, said
    assert sorted(folder.rglob("*")) == before
