"""Forms in which boxes are shown, tables, the gallery, calibration."""

import dataclasses
import json
import math
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hide import PRESETS, HiDe
from hide.cli import app
from hide.cli.evaluate import forms_of_collage
from hide.evaluation import calibrate, data
from hide.evaluation.data import Sample
from hide.evaluation.gallery import failures, frontier, looked_at, save_gallery
from hide.evaluation.runner import answer
from hide.evaluation.scoring import agreement, paired, score_groups, score_methods, strict
from hide.evaluation.tables import agreement_table, group_table, markdown, method_table
from hide.methods.ablations import Masked, OneCrop, Tiles, WithoutPrior
from hide.methods.hide.method import EntityRows, region_boxes
from hide.models.qwen2_5_vl import Qwen25VL
from hide.present.pages import Section
from hide.present.table import ResultTable
from hide.questions import Question
from hide.tiny.model import build
from hide_kernels import token_maps

PIXELS = np.random.default_rng(3).integers(0, 255, (40, 60, 3), dtype=np.uint8)
WHITE = (255, 255, 255)
FORMS = {"plain", "hide", "tiles", "masked", "crop", "true-boxes"}
BOXES = torch.tensor([[5, 4, 15, 10], [40, 20, 60, 40]])


def test_forms_show_the_boxes_and_nothing_else():
    picture = Image.fromarray(PIXELS)
    first, second = PIXELS[4:10, 5:15], PIXELS[20:40, 40:60]
    row = np.asarray(Tiles.draw(picture, BOXES, WHITE))
    assert row.shape == (20, 30, 3) and (row[:, :20] == second).all() and (row[:6, 20:] == first).all()
    assert (row[6:, 20:] == 255).all()
    white = np.asarray(Masked.draw(picture, BOXES, WHITE))
    kept = np.zeros((40, 60), bool)
    kept[4:10, 5:15] = kept[20:40, 40:60] = True
    assert (white[kept] == PIXELS[kept]).all() and (white[~kept] == 255).all()
    assert (np.asarray(OneCrop.draw(picture, BOXES, None)) == PIXELS[4:40, 5:60]).all()
    assert (np.asarray(Tiles.draw(picture, BOXES, None))[6:, 20:] == 0).all(), "no colour is black"
    see_through = Image.fromarray(np.dstack([PIXELS, np.zeros((40, 60), np.uint8)]))
    assert (np.asarray(OneCrop.draw(see_through, BOXES, WHITE)) == 255).all()


@pytest.fixture(scope="module")
def hide():
    return HiDe(Qwen25VL(*build()), PRESETS["tiny"].changed(layers=(2,), max_new_tokens=2))


def test_every_method_is_asked_and_paid_for(hide):
    methods = forms_of_collage(hide)
    for sample in data.scenes(3, sizes=[(280, 196)]):
        record = answer(methods, sample)
        assert record["error"] is None
        assert record["replies"].keys() == record["tokens"].keys() == record["seconds"].keys() == FORMS
        # The masked copy has as many tokens as the picture; the data set's boxes need no search.
        tokens = record["tokens"]
        assert tokens["masked"] == max(tokens.values()) and tokens["true-boxes"] < tokens["hide"]
        assert (
            record["boxes"]["tiles"] == record["boxes"]["hide"]
            and record["boxes"]["true-boxes"] != record["boxes"]["hide"]
        )
        without = answer(methods, dataclasses.replace(sample, boxes=()))
        assert without["replies"].keys() == FORMS - {"true-boxes"}
        alone = answer({"true-boxes": methods["true-boxes"]}, dataclasses.replace(sample, boxes=()))
        assert alone["error"].startswith("ValueError: methods: none")
    (share,) = [shares for name, shares, _ in score_groups([record, without], strict) if name == "all"]
    assert share["true-boxes"].total == 1 and share["plain"].total == 2


def record_of(number, plain, ours, error=None, tokens=500):
    return {
        "id": f"q{number}", "split": "s", "question": "Where is it?", "options": ["left", "right"], "answer": "A",
        "error": error, "replies": {} if error else {"plain": plain, "hide": ours},
        "tokens": {} if error else {"plain": 10, "hide": 30}, "seconds": {} if error else {"plain": 1.0, "hide": 2.0},
        "image_tokens": [tokens], "boxes": {"hide": [[[1, 1, 9, 9]]]}, "details": {"hide": {"entities": ["a<b"]}},
    }  # fmt: skip


RECORDS = [
    record_of(0, "A", "A"), record_of(1, "A", "B"), record_of(2, "B", "A"), record_of(3, "B", "what?", tokens=20_000),
    record_of(4, "", "", "ValueError: <no>"),
]  # fmt: skip


def test_tables_count_what_hide_gains_and_loses():
    ours = score_methods(RECORDS, strict)["hide"]
    assert (ours.share.right, ours.share.total, ours.unreadable, *ours.against_plain[1:3]) == (2, 5, 1, 1, 1)
    table = method_table(RECORDS, strict)
    assert table.rows[1] == ("hide", "40% (12–77)", "+0.0 (-60 to +60)", "+1 −1", "1.000", "1", "30", "2.00")
    assert table.rows[0][2:5] == ("", "", ""), "plain is not compared with itself"
    assert method_table(RECORDS, strict, memory={"hide": 19_149_312}).rows[1][-1] == "19 MB"
    names = [row[0] for row in group_table(RECORDS, strict).rows]
    assert names == ["s", "up to 1,000 image tokens", "above 12,000 image tokens", "size unknown", "all"]


def test_methods_are_compared_with_the_plain_one_only_where_it_was_asked():
    """Every right answer would be one that it lacks."""
    alone = [{**record, "replies": {"hide": "A"}} for record in RECORDS[:2]]
    assert [row[:3] for row in method_table(alone, strict).rows] == [("hide", "100% (34–100)", "not asked")]


def test_where_every_question_failed_the_tables_name_the_methods_that_were_asked():
    for table in (method_table, group_table):
        found = str(table(RECORDS[4:], strict, ["vicrop"]))
        assert "'vicrop'" in found and "'hide'" not in found and "'plain'" not in found


def test_tables_survive_bars_and_brackets():
    table = ResultTable("T", ("a|b", "n"), [("[red]", "<1>")])
    assert "| a\\|b | n |\n| --- | ---: |\n| [red] | <1> |" in markdown("H", "hide eval", [table])
    assert "<td>[red]</td><td class=number>&lt;1&gt;</td>" in table.html()


def test_gallery_shows_the_telling_failures_first(tmp_path):
    assert [record["id"] for record in failures(RECORDS, strict)] == ["q1", "q3", "q4"]

    def image():
        return Image.fromarray(PIXELS)

    def gone():
        raise OSError("gone")

    question = Question("Where is it?", ("left", "right"))
    samples = [Sample(f"q{i}", gone if i == 3 else image, question, "A", "s", ((2, 2, 8, 8),)) for i in range(5)]
    parts = [Section("Side by side", tables=[method_table(RECORDS, strict)]), frontier(RECORDS, strict)]
    page = save_gallery(tmp_path / "r.html", "T & U", parts, RECORDS, samples, strict, {"model": "m"}).read_text()
    assert page.index("q1: Where") < page.index("q3: Where") < page.index("q4: Where") and "q0: Where" not in page
    assert page.count("<img ") == 2 + 3  # right answers over tokens and seconds; q1: boxes, collage, true boxes
    assert page.count("<td>1 box</td>") == 2 and "Right answers over tokens" in page
    for text in ("T &amp; U", "ValueError: &lt;no&gt;", "a&lt;b", "can no longer be read: gone", "no answer read"):
        assert text in page
    assert "$" not in page and 'src="http' not in page


def test_the_gallery_shows_what_each_way_looked_at_once(tmp_path):
    own = record_of(1, "A", "B")
    found = [[[1, 1, 9, 9]]]
    ways = {"hide": found, "tiles": found, "hide@auto": [[[2, 2, 5, 5], [20, 20, 40, 30]]], "vicrop": [[]]}
    ways["true-boxes"] = [[[3, 3, 8, 8]]]
    own |= {"replies": {"plain": "A", **dict.fromkeys(ways, "B")}, "boxes": ways}
    own |= {name: dict.fromkeys(own["replies"], 1.0) for name in ("tokens", "seconds")}
    question = Question("Where is it?", ("left", "right"))
    samples = [Sample("q1", lambda: Image.fromarray(PIXELS), question, "A", "s", ((3, 3, 8, 8),))]
    assert looked_at([own]) == "hide" and looked_at([{"replies": {"plain@auto": "A", "hide@auto": "A"}}]) == "hide@auto"
    page = save_gallery(tmp_path / "r.html", "T", [], [own], samples, strict, {}).read_text()
    # Hide's boxes, which are those of tiles too, their collage, and the true boxes; those on the view.
    assert page.count("<img ") == 4
    assert "<figcaption>hide@auto</figcaption>" in page and "<td>2 boxes</td>" in page and "<td>0 boxes</td>" in page
    # What a method is, once for all of its settings.
    assert page.count("layout-preserving collage of what") == 1


def test_agreement_is_the_part_that_both_get_right_or_both_wrong():
    assert agreement(RECORDS, strict, "plain", "hide") == 0.5 and agreement(RECORDS, strict, "plain", "hide") == 0.5
    assert math.isnan(agreement(RECORDS[4:], strict, "plain", "hide"))
    assert agreement_table(RECORDS, strict).rows == [("plain", "", "50%"), ("hide", "50%", "")]


@pytest.mark.parametrize(
    "gained, lost, p", [(5, 0, 0.0625), (0, 0, 1.0), (1, 1, 1.0), (9, 2, 0.06543), (2, 9, 0.06543)]
)
def test_the_probability_is_mcnemars_exact_one(gained, lost, p):
    """Twice the binomial's tail, at most 1: 2 (1 + 11 + 55) / 2^11."""
    ours = [True] * gained + [None] * lost + [True, False]
    theirs = [False] * gained + [True] * lost + [True, None]
    found = paired(ours, theirs, list(map(str, range(len(ours)))))
    assert (found.gained, found.lost, round(found.p, 5)) == (gained, lost, p)
    assert found.lead.value == pytest.approx((gained - lost) / len(ours))


def test_without_the_noise_prior_maps_are_smoothed_rows(hide):
    rows = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0))
    rows[:2] += rows[2]  # what the fixed words look at as well
    known = EntityRows((rows,), 2, ("a", "b", "c"))
    bare = WithoutPrior(hide.model, hide.preset).maps(known)
    want = token_maps([rows[2:]], prior_rows=0, sigma=hide.settings.sigma)
    assert torch.equal(bare.tokens.maps[0], want.maps[0]) and bare.labels == ("a", "b", "c")
    assert torch.equal(bare.peaks, hide.maps(known).peaks)
    assert not torch.equal(bare.tokens.maps[0], hide.maps(known).tokens.maps[0])


class Planted:
    """A model whose layer 1 alone looks at the true box."""

    class Model:
        num_layers = 3

    model = Model()

    def __init__(self, box):
        self.box = box
        self.maps = HiDe(Qwen25VL.__new__(Qwen25VL), PRESETS["tiny"].changed(layers=None, sigma=0.0)).maps

    def open(self, image):
        return nullcontext(image)

    def attention_rows_by_layer(self, image, entities):
        generator = torch.Generator().manual_seed(0)
        columns, rows = image.width // 28, image.height // 28
        layers = []
        for layer in range(3):
            row = torch.rand(3, rows, columns, generator=generator) * 0.1
            if layer == 1:
                x0, y0, x1, y1 = (edge // 28 for edge in self.box)
                row[2, y0:y1, x0:x1] = 5
            layers.append(EntityRows((row,), 2, ("star",)))
        return tuple(layers)


def test_layer_sweep_finds_the_layer_that_looks():
    box = (28, 28, 84, 56)
    sample = Sample("q", lambda: Image.new("RGB", (280, 196)), Question("Where?"), "", "s", (box,), ("star",))
    scores = calibrate.layer_sweep(Planted(box), [sample])
    assert calibrate.best_layer(scores) == 1 and scores[1].peak == 1
    assert scores[1].inside > 0.7 > 0.1 > scores[0].inside and scores[1].purified > 0.9
    # Two of 70 cells: the attention's share over the area's.
    assert scores[1].times == pytest.approx(scores[1].inside * 35)


def test_cells_inside_are_those_that_a_box_touches():
    inside = calibrate.cells_inside([(28, 0, 57, 28), (0, 55, 1, 56)], (112, 56), (2, 4))
    assert inside.tolist() == [[False, True, True, False], [True, False, False, False]]
    # A picture that was resized: cells are fractions of it.
    assert calibrate.cells_inside([(50, 0, 100, 100)], (100, 100), (1, 2)).tolist() == [[False, True]]


def test_areas_are_those_of_painted_pixels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sets = []
        for _ in range(2):
            corner = rng.integers(0, 30, (int(rng.integers(1, 5)), 2))
            sets.append(torch.tensor(np.concatenate([corner, corner + rng.integers(1, 12, corner.shape)], axis=1)))
        painted = []
        for boxes in sets:
            canvas = np.zeros((50, 50), bool)
            for x0, y0, x1, y1 in boxes.tolist():
                canvas[y0:y1, x0:x1] = True
            painted.append(canvas)
        assert calibrate._covered(*sets) == (painted[0] & painted[1]).sum()


def test_grid_scores_and_the_recommendation():
    truth = torch.tensor([[0, 0, 10, 10]])
    score = calibrate._grid_score(torch.tensor([[0, 5, 10, 15], [50, 50, 60, 60]]), truth, (100, 100))
    assert score == (0.5, 0.25, 20 * 20 / 10_000) and score.value == pytest.approx(0.48)
    assert calibrate._grid_score(torch.zeros(0, 4, dtype=torch.int64), truth, (100, 100)).value == 0
    grid = {(1.0, 0.5): score, (1.0, 0.2): calibrate.GridScore(1.0, 0.1, 0.4), (2.0, 0.2): score}
    assert calibrate.best_setting(grid) == (1.0, 0.2)
    assert calibrate.grid_tables(grid | {(2.0, 0.5): score})[0].rows == [
        ("1", "100.0%", "50.0%"),
        ("2", "50.0%", "50.0%"),
    ]


def test_the_grid_is_what_hide_itself_makes_of_the_rows(hide):
    samples = list(data.scenes(2, sizes=[(280, 196)]))
    grid = calibrate.settings_grid(hide, samples, sigmas=(0.0, 1.0), thresholds=(0.3, 0.7))
    assert len(grid) == 4
    ours = hide.changed(sigma=1.0, threshold=0.3)
    shares = []
    for sample in samples:
        with ours.open(image := sample.image()) as session:
            maps = ours.maps(ours.attention_rows(session, ", ".join(sample.entities)))
            made = ours.zoom(session, maps).collages[0].image
            (again,) = session.crop([region_boxes(maps.by_image[0][0], 0.3, image.size)])
        assert (made is None and again.image is None) or torch.equal(made, again.image)
        shares.append(0 if made is None else made.shape[0] * made.shape[1] / (image.width * image.height))
    assert grid[1.0, 0.3].collage == pytest.approx(np.mean(shares)) and max(shares) > 0


def test_each_view_has_the_grid_of_hide_on_it_and_is_looked_at_once(hide, monkeypatch):
    samples = list(data.scenes(2, sizes=[(420, 336)]))
    opened, real = [], HiDe.open
    monkeypatch.setattr(
        HiDe, "open", lambda self, image: (opened.append(self.preset.run.view_tokens), real(self, image))[1]
    )
    how = {"sigmas": (0.0, 1.0), "thresholds": (0.3, 0.7)}
    found = calibrate.view_sweep(hide, samples, [None, 10**6, 60, "auto"], **how)
    # 180 tokens: of them auto leaves all.
    assert opened == [None, 60] * 2
    assert found[None] == found[10**6] == found["auto"] and found[None].tokens == 180 > 60 >= found[60].tokens
    grid = calibrate.settings_grid(hide.changed(view_tokens=60), samples, **how)
    assert found[60].grid == grid != found[None].grid
    best = calibrate.best_setting(grid)
    assert (found[60].sigma, found[60].threshold) == best
    one, other = (
        calibrate.settings_grid(hide.changed(view_tokens=60), [sample], **how)[best].value for sample in samples
    )
    assert found[60].value == pytest.approx((one + other) / 2) and found[60].error == pytest.approx(
        abs(one - other) / 2
    )


def test_the_smallest_view_within_a_standard_error_of_the_best_is_chosen():
    def view(tokens, value, error):
        return calibrate.ViewScore(tokens, 1.0, 0.5, value, error, {(1.0, 0.5): calibrate.GridScore(0.5, 0.4, 0.1)})

    scores = {
        None: view(4000.0, 0.80, 0.5),
        2000: view(1990.0, 0.90, 0.03),
        1000: view(990.0, 0.87, 0.2),
        500: view(490.0, 0.86, 0.9),
    }
    assert calibrate.best_view(scores) == 1000
    # A picture that is small anyway: the first of those that show the same.
    same = {"whole": view(70.0, 0.8, 0.1), 1000: view(70.0, 0.8, 0.1)}
    assert calibrate.best_view(same) == "whole"
    assert calibrate.view_table(scores).rows[2] == (
        "1000", "990", "1", "0.5", "50.0%", "40.0%", "10.0%", "87.0% ± 20.0%"
    )  # fmt: skip


def test_calibrate_command_recommends_and_keeps_its_answers(tmp_path, small_scenes):
    call = ["calibrate", "--limit", "2", "--answers", "1", "--views", "whole,50,1000", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "calibration.json").read_text())
    best = found["recommended"]
    assert len(found["layers"]) == 6 and len(found["grid"]) == len(calibrate.SIGMAS) * len(calibrate.THRESHOLDS)
    assert found["layers"][best["layers"][0]]["purified"] == max(layer["purified"] for layer in found["layers"])
    assert f"threshold={best['threshold']}" in result.output and "recommended: HiDeConfig(" in result.output
    assert [view["view"] for view in found["views"]] == [None, 50, 1000]
    highest = max(found["views"], key=lambda view: view["value"])
    near = [view for view in found["views"] if view["value"] >= highest["value"] - highest["error"]]
    assert best["view_tokens"] == min(near, key=lambda view: view["tokens"])["view"]
    assert ("--view 50" in result.output) is (best["view_tokens"] == 50)
    assert found["answers"][0]["image_tokens"][0] <= (best["view_tokens"] or 70)
    assert set(found["answers"][0]["replies"]) == FORMS
    for name in ("layers.png", "grid.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 8
    assert "### Recall" in (tmp_path / "summary.md").read_text()
    page = (tmp_path / "report.html").read_text()
    headings = re.findall("<h2>(.*)</h2>", page)
    assert headings == ["Layers", "Views", "Sigma and threshold", "Layout", "Settings"]
    assert page.count("<img ") == 2 and f"threshold={best['threshold']}" in page and "<td>true-boxes</td>" in page
    before = (tmp_path / "answers.jsonl").read_bytes()
    assert CliRunner().invoke(app, call).exit_code == 0 and (tmp_path / "answers.jsonl").read_bytes() == before
    none = tmp_path / "none.json"
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    none.write_text(json.dumps([{"question": "Where is it?", "labels": "A", "image_path": "a.png"}]))
    result = CliRunner().invoke(app, [*call, "--data", f"list:{none}"])
    assert result.exit_code == 1 and "has no boxes" in " ".join(result.output.split())
