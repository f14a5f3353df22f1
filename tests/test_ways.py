"""Ways of answering: methods with settings of their own, side by side in one evaluation."""

import json
import math
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hide import HiDe
from hide.cli import app
from hide.cli.evaluate import _finish
from hide.cli.loading import LoadOptions, way_names, way_of
from hide.evaluation import data, predicted_memory
from hide.evaluation.predicted_memory import Held, held
from hide.evaluation.runner import answer, answers
from hide.methods import method_of
from hide.methods.base import Method
from hide.methods.plain import Plain
from hide.models import load
from hide.present.table import ResultTable
from hide.presets import RunSettings
from hide.profiling.runs import Settings
from hide.tiny import CHECKPOINT

NAMES = ["plain", "plain@50", "hide", "hide@50[gate=0]", "hide@50[sigma=2,threshold=0.5]"]


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT)


@pytest.fixture(scope="module")
def ways(model):
    return dict(zip(NAMES, LoadOptions().methods(NAMES, model), strict=True))


def scenes(count):
    return list(data.scenes(count, sizes=[(280, 196)]))


@pytest.mark.parametrize(
    "text, name, settings",
    [
        ("hide", "hide", {}),
        ("hide@auto", "hide", {"view_tokens": "auto"}),
        ("plain@700", "plain", {"view_tokens": 700}),
        ("hide@whole", "hide", {"view_tokens": None}),
        ("hide[gate=3,layers=(1, 2)]", "hide", {"gate": 3, "layers": (1, 2)}),
        ("hide@auto[gate=None, entities_from=rules]", "hide", {"view_tokens": "auto", "gate": None, "entities_from": "rules"}),
    ],
)  # fmt: skip
def test_a_way_is_a_method_and_settings_of_its_own(text, name, settings):
    assert way_of(text) == (name, settings) and method_of(text) == name


@pytest.mark.parametrize(
    "text, cause",
    [
        ("hide@", "methods: got 'hide@', want NAME"), ("hide[gate=3", "methods: got"), ("hide@half", "view: got 'half'"),
        ("hide[3]", "set: got '3', want NAME=VALUE"), ("hide@50[view_tokens=9]", "set: got view_tokens twice"),
    ],
)  # fmt: skip
def test_what_is_no_way_is_refused(text, cause):
    with pytest.raises(ValueError, match=f"^{re.escape(cause)}"):
        way_of(text)


def test_a_ways_own_settings_go_before_those_of_all(model):
    changed = LoadOptions(view="60", setting=["sigma=3"]).methods(["plain", "hide@whole", "hide[sigma=2]"], model)
    assert [method.preset.run.view_tokens for method in changed] == [60, None, 60]
    assert [method.settings.sigma for method in changed[1:]] == [3.0, 2.0]
    with pytest.raises(ValueError, match="^methods: plain has no sigma; it has min_tokens"):
        LoadOptions().methods(["hide", "plain[sigma=2]"], model)


def test_commas_between_brackets_are_not_between_ways():
    text = "plain, hide@auto[gate=3,sigma=2] ,hide[layers=(1,2)],plain"
    assert way_names(text, "", print) == ["plain", "hide@auto[gate=3,sigma=2]", "hide[layers=(1,2)]"]
    every = way_names("all", "no checkpoint", print)
    assert every[:4] == ["plain", "plain@auto", "hide", "hide@auto"] and {"vicrop", "no-prior"} < set(every)
    assert "q-zoom" not in every, "the checkpoint has no trained branches"


def test_ways_with_one_view_share_a_session_that_each_pays_for(ways, monkeypatch):
    opened, real = [], Method.open
    monkeypatch.setattr(
        Method, "open", lambda self, *a, **k: (opened.append(self.preset.run.view_tokens), real(self, *a, **k))[1]
    )
    (sample,) = scenes(1)
    record = answer(ways, sample)
    assert record["error"] is None and opened == [None, 50]
    assert json.loads(json.dumps(record)) == record and list(record["replies"]) == NAMES
    whole, view = (record["opened"][name] for name in ("plain", "plain@50"))
    assert whole["tokens"] > 70 > view["tokens"] > 30
    for name in NAMES:
        session = view if "@50" in name else whole
        assert record["opened"][name] == session
        assert record["tokens"][name] > session["tokens"] and record["seconds"][name] > session["seconds"] > 0
    # A gate that is always passed is the plain answer, and says so.
    gated, plain = "hide@50[gate=0]", "plain@50"
    assert record["replies"][gated] == record["replies"][plain] and record["tokens"][gated] == record["tokens"][plain]
    assert [note for note in record["notes"] if note.startswith(f"{gated}: gate: the plain answer's margin")]
    assert record["image_tokens"] == [70], "the size is that of what is looked at in most tokens"
    assert record["shown"]["hide"] > 0 == record["shown"]["plain"] == record["shown"][gated]


def test_each_way_answers_as_it_does_alone(ways):
    (sample,) = scenes(1)
    record = answer(ways, sample)
    for name, method in ways.items():
        alone = method.ask(sample.image(), sample.question)
        assert (record["replies"][name], record["tokens"][name]) == (alone.text, sum(alone.tokens.values())), name
        assert record["boxes"].get(name, []) == [boxes.tolist() for boxes in alone.boxes], name


def test_questions_about_one_image_may_share_its_sessions(ways, monkeypatch):
    opened, real = [], Method.open
    monkeypatch.setattr(Method, "open", lambda self, *a, **k: (opened.append(1), real(self, *a, **k))[1])
    both = data.scene_questions(5_300_000, (60, 80), "few")[:2]
    found = answers({name: ways[name] for name in ("plain", "hide")}, both)
    assert [record["id"] for record in found] == [sample.id for sample in both] and len(opened) == 1
    assert found[1]["replies"] == answer({name: ways[name] for name in ("plain", "hide")}, both[1])["replies"]


def test_memory_is_predicted_for_the_view_the_largest_image_and_the_most_that_was_shown(monkeypatch):
    asked = []

    def predicted(config, flow, work, settings, *, owners):
        asked.append((flow, work.image, work.view, work.collage, work.chunk, work.offload, settings.weights))
        if flow == "q-zoom":
            raise ValueError("too many tokens")
        return SimpleNamespace(report=SimpleNamespace(peak=len(asked)))

    monkeypatch.setattr(predicted_memory, "predict_flow", predicted)
    run, config = RunSettings(prefill_chunk=9, offload_kv=True), object()
    small = RunSettings(view_tokens=60, prefill_chunk=9, offload_kv=True)
    known = {
        "plain": Held("plain", config, Settings(), run),
        "hide": Held("ours", config, Settings(), run),
        "tiles": Held("ours", config, Settings(), run),
        "hide@60": Held("ours", config, Settings("float32", "int8"), small),
        "q-zoom": Held("q-zoom", config, Settings(), run),
        "never asked": Held("plain", config, Settings(), run),
        "vicrop": None,
    }
    shown = {"plain": 0, "hide": 40, "tiles": 40, "hide@60": 30, "q-zoom": 5, "vicrop": 3}
    records = [
        {"error": None, "images": [[1000, 700]], "shown": shown},
        {"error": None, "images": [[1120, 702]], "shown": dict.fromkeys(shown, 20)},
        {"error": "no such picture"},
    ]
    assert predicted_memory.predicted_memory(known, records) == {"plain": 1, "hide": 2, "tiles": 2, "hide@60": 3}
    assert [one[:4] for one in asked] == [
        ("plain", (702, 1120), 16384, 20), ("ours", (702, 1120), 16384, 40), ("ours", (702, 1120), 60, 30),
        ("q-zoom", (702, 1120), 16384, 20),
    ]  # fmt: skip
    assert all(one[4:6] == (9, True) for one in asked) and asked[2][6] == "int8"
    several = [{"error": None, "images": [[9, 9], [9, 9]], "shown": shown}]
    assert predicted_memory.predicted_memory(known, several) == predicted_memory.predicted_memory(known, []) == {}


def test_methods_that_the_profiler_knows_are_held_as_they_are(model):
    assert held(Plain(model), "int8") == Held(
        "plain", model.model.config, Settings("float32", "int8"), Plain(model).preset.run
    )
    assert held(HiDe(model)).flow == "ours"
    assert [held(method) for method in LoadOptions().methods(["vicrop", "true-boxes"], model)] == [None, None]


def test_one_evaluation_compares_views_and_settings_and_goes_on(tmp_path, small_scenes, monkeypatch):
    monkeypatch.setattr("hide.evaluation.predicted_memory.predict_flow", lambda *a, **k: SimpleNamespace(
        report=SimpleNamespace(peak=19_000_000)))  # fmt: skip
    names = "plain,hide,hide@50[sigma=2,threshold=0.5]"
    call = ["eval", "--methods", names, "--out", str(tmp_path), "--limit"]
    assert CliRunner().invoke(app, [*call, "1"]).exit_code == 0
    before = (tmp_path / "results.jsonl").read_bytes()
    result = CliRunner().invoke(app, [*call, "2"])
    assert result.exit_code == 0, result.output
    after = (tmp_path / "results.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 3
    settings = json.loads(after.splitlines()[0])["settings"]
    assert settings["hide.sigma"] == 1 and settings["hide@50[sigma=2,threshold=0.5].sigma"] == 2
    summary = (tmp_path / "summary.md").read_text()
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ") for line in summary.splitlines() if line.startswith("| ")
    }
    assert len(rows["hide@50[sigma=2,threshold=0.5]"]) >= 4 and "peak memory" in summary
    assert "### Agreement" in summary and "19 MB" in summary
    page = (tmp_path / "report.html").read_text()
    headings = re.findall("<h2>(.*)</h2>", page)
    assert headings[:4] == ["Side by side", "Accuracy over cost", "Agreement", "Splits and sizes"]
    assert page.count("data:image/png") >= 2 and not re.search(r"\bnan\b", page)
    changed = CliRunner().invoke(app, ["eval", "--methods", "plain,hide@50", "--out", str(tmp_path)])
    assert changed.exit_code == 1 and "other settings" in " ".join(changed.output.split())


def test_a_table_that_a_terminal_has_no_room_for_is_only_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    wide = ResultTable("Matrix", tuple(f"method-{n}" for n in range(12)), [("cell",) * 12])
    small = ResultTable("List", ("method", "right"), [("plain", "cell")])
    _finish(Console(stderr=True), tmp_path, "T", [wide, small], [])
    said = capsys.readouterr().out
    assert "Matrix: too wide for this terminal, see summary.md" in said and said.count("cell") == 1
    assert (tmp_path / "summary.md").read_text().count("| cell") == 13


def test_an_answer_may_be_asked_for_with_settings_of_its_own(tmp_path, small_scenes):
    scenes(1)[0].image().save(tmp_path / "a.png")
    call = ["ask", str(tmp_path / "a.png"), "What is the color of the star?", "--method", "hide@50[threshold=0.5]"]
    result = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (
        document["method"] == "hide"
        and document["image_tokens"][0] <= 50
        and math.isfinite(document["seconds"]["answer"])
    )
