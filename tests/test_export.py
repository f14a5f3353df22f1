"""`hide export`: what people train from is what the data set and the method have, and a killed run goes on."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hide.cli.main import app
from hide.evaluation import export
from hide.evaluation.data import READERS, scenes
from hide.evaluation.export import export_here, save
from hide.methods.ablations import TrueBoxes
from hide.methods.base import NoSettings
from hide.methods.hide.method import HiDe
from hide.methods.plain import Plain
from hide.tiny import CHECKPOINT


@pytest.fixture(scope="module")
def hide():
    return HiDe.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def samples():
    # Two questions of one picture size, one with options.
    small = {"sizes": ((196, 168),)}
    return [*scenes(2, **small), *scenes(1, seed=1_000_007, lettered=True, **small)]


@pytest.fixture(scope="module")
def exported(hide, samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return folder, list(export_here(hide, folder, samples))


def test_a_record_has_the_image_what_the_method_showed_and_both_boxes(hide, samples, exported):
    folder, records = exported
    for sample, record in zip(samples, records, strict=True):
        image = sample.image()
        answer = hide.ask(image, sample.question)
        kept = [np.asarray(Image.open(folder / name)) for name in record["pictures"]]
        wanted = [image, *(one for one in answer.shown if one is not None)]
        assert len(kept) == len(wanted) == 2
        assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(kept, wanted, strict=True))
        assert record["boxes"] == [list(box) for box in sample.boxes]
        assert record["found"] == [boxes.tolist() for boxes in answer.boxes]
        assert record["prompt"] == sample.question.prompt and record["answer"] == sample.answer


def test_forms_hold_the_same_pictures_questions_and_answers(exported):
    folder, records = exported
    found = json.loads(save(folder, records, "llava").read_text(encoding="utf-8"))
    chats = [json.loads(line) for line in save(folder, records, "messages").read_text(encoding="utf-8").splitlines()]
    assert [one["id"] for one in found] == [one["id"] for one in chats] == [one["id"] for one in records]
    for record, llava, chat in zip(records, found, chats, strict=True):
        asked, said = llava["conversations"]
        assert asked == {"from": "human", "value": "<image>\n<image>\n" + record["prompt"]}
        assert said == {"from": "gpt", "value": record["answer"]}
        assert llava["image"] == record["pictures"]
        user, assistant = chat["messages"]
        assert [one["image"] for one in user["content"][:-1]] == record["pictures"]
        assert user["content"][-1]["text"] == record["prompt"]
        assert assistant["content"] == [{"type": "text", "text": record["answer"]}]


@pytest.mark.parametrize("form", ["llava", "messages"])
def test_evaluations_read_what_was_exported(samples, exported, form):
    folder, records = exported
    again = list(READERS["list"](save(folder, records, form)))
    for sample, one in zip(samples, again, strict=True):
        assert (one.id, one.question, one.answer) == (sample.id, sample.question, sample.answer)
        image, collage = one.image()
        assert np.array_equal(np.asarray(image), np.asarray(sample.image())) and collage.size != image.size


def test_webdataset_shards_hold_every_sample_once(exported, monkeypatch):
    folder, records = exported
    monkeypatch.setattr(export, "SHARD", 2)
    save(folder, records, "webdataset")
    found = {}
    for shard in sorted((folder / "webdataset").iterdir()):
        with tarfile.open(shard) as tar:
            for entry in tar:
                key, _, kind = entry.name.partition(".")
                found.setdefault(key, {})[kind] = tar.extractfile(entry).read()
    assert len(list((folder / "webdataset").iterdir())) == 2
    assert [json.loads(one["json"])["id"] for one in found.values()] == [record["id"] for record in records]
    for one, record in zip(found.values(), records, strict=True):
        shown = [np.asarray(Image.open(io.BytesIO(one[f"{place}.png"]))) for place in range(len(record["pictures"]))]
        kept = [np.asarray(Image.open(folder / name)) for name in record["pictures"]]
        assert all(np.array_equal(*pair) for pair in zip(shown, kept, strict=True))


def test_plain_shows_nothing_and_the_right_boxes_are_those_of_the_data(hide, samples, tmp_path):
    plain = Plain(hide.model, hide.preset.with_settings(NoSettings()))
    (alone,) = export_here(plain, tmp_path, samples[:1])
    assert len(alone["pictures"]) == 1 and alone["found"] == []
    assert json.loads(save(tmp_path, [alone], "llava").read_text())[0]["image"] == alone["pictures"][0]
    (boxed,) = export_here(TrueBoxes(hide.model, hide.preset), tmp_path, samples[:1])
    assert boxed["found"] == [boxed["boxes"]] and len(boxed["pictures"]) == 2


def test_one_bad_picture_costs_its_own_question_alone(hide, samples, tmp_path):
    def broken():
        raise OSError("image file is truncated")

    records = list(export_here(hide, tmp_path, [replace(samples[0], image=broken), samples[1]]))
    assert records[0]["error"] == "OSError: image file is truncated" and records[1]["error"] is None
    assert [one["id"] for one in json.loads(save(tmp_path, records, "llava").read_text())] == [samples[1].id]
    with pytest.raises(ValueError, match="none of 1 questions could be exported; the first: OSError"):
        save(tmp_path, records[:1], "llava")


def test_a_killed_export_goes_on_and_another_form_asks_nothing(tmp_path, monkeypatch):
    real, asked = export._record, []

    def counting(method, folder, sample, written):
        asked.append(sample.id)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(method, folder, sample, written)

    monkeypatch.setattr(export, "_record", counting)
    command = ["export", "--data", "scenes", "--limit", "3", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code != 0
    assert len(asked) == 3 and not (tmp_path / "llava.json").exists()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert len(asked) == 4 and asked[-1] == asked[-2]
    assert len(json.loads((tmp_path / "llava.json").read_text())) == 3
    other = CliRunner().invoke(app, [*command, "--form", "messages"])
    assert other.exit_code == 0 and len(asked) == 4
    assert len((tmp_path / "messages.jsonl").read_text().splitlines()) == 3
    wrong = CliRunner().invoke(app, [*command, "--form", "coco"])
    assert wrong.exit_code == 1 and "want one of llava, messages, webdataset" in wrong.output
