"""Every script of examples/ runs, in seconds, and prints what is true."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from hide.methods import base
from hide.models import loading
from hide.tiny import CHECKPOINT

EXAMPLES = Path(__file__).parents[1] / "examples"
# Of the scene, as it was drawn.
TRIANGLE, CIRCLE = (993, 346, 1042, 390), (1099, 598, 1173, 672)


@pytest.fixture(scope="module")
def embedded():
    return loading.load(CHECKPOINT)


@pytest.fixture
def output(embedded, monkeypatch, capsys, tmp_path):
    """Runs a script as it would run by itself, but for the model, which all of them share."""
    import hide.models

    def run(name, *arguments):
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        for module in (base, hide.models):
            monkeypatch.setattr(module, "load", lambda path, **options: embedded)
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(path), run_name="__main__")
        assert not list(tmp_path.iterdir()), "files go into a folder that was given"
        return capsys.readouterr().out

    return run


def boxes_of(text):
    return [tuple(map(int, found)) for found in re.findall(r"\[(\d+), (\d+), (\d+), (\d+)\]", text)]


def holds(box, thing):
    return box[0] <= thing[0] + 15 and box[1] <= thing[1] + 15 and box[2] >= thing[2] - 15 and box[3] >= thing[3] - 15


def test_every_example_is_short_says_how_to_run_it_and_is_tested():
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert scripts
    for path in scripts:
        text = path.read_text()
        assert len(text.splitlines()) < 40, path.name
        assert f"python examples/{path.name}" in text.split('"""')[1], path.name
        assert f'output("{path.stem}"' in Path(__file__).read_text(), path.name


def test_captured_rows_are_those_of_output_attentions(output):
    said = output("capture_rows")
    rows, matrices = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+) bytes", said))
    assert rows == 4 * 512 * 4 and matrices == 4 * 8 * 512 * 512 * 4
    assert "each sums to 1.0000" in said and float(re.search(r"difference (\S+)", said)[1]) < 1e-6


def test_fastv_answers_right_with_a_twentieth_of_the_image_behind_a_layer(output):
    said = re.findall(r"(\d+) of (\d+) tokens behind layer 1: green, ids", output("fastv"))
    (whole, tokens), (half, _), (few, _) = (tuple(map(int, line)) for line in said)
    image = 500
    assert (whole, half, few) == (tokens, tokens - image // 2, tokens - image + image // 20)


def test_the_operators_rows_times_the_values_are_what_sdpa_gives(output):
    said = output("attention_rows_operator")
    assert float(re.search(r"at most (\S+)", said)[1]) < 1e-5
    # Random keys get what they are of the 2,004 that a row sees, on average.
    assert abs(float(re.search(r"both images: ([\d.]+)%", said)[1]) - 100 * 900 / 2004.5) < 0.5
    assert re.search(r"^ +torch +runs", said, re.MULTILINE)


def test_the_keys_that_are_kept_are_those_that_the_queries_agree_with(output):
    said = output("kv_cache_scores")
    assert f"kept by key/value head: {[[1000, 1001, 1002, 1003]] * 4}" in said


def test_hide_finds_both_things_and_answers_right_where_the_plain_answer_is_wrong(output, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    said = output("ask_hide", folder)
    assert "plain: left; hide: right" in said and "['circle', 'triangle']" in said
    boxes = boxes_of(said)
    assert len(boxes) == 2 and holds(boxes[0], TRIANGLE) and holds(boxes[1], CIRCLE)
    assert "hide" in (folder / "report.html").read_text()


def test_questions_behind_one_prefix_cost_a_few_tokens_each(output):
    said = output("many_questions_one_session")
    (prefix,) = map(int, re.findall(r"prefix: (\d+) tokens", said))
    asked = re.findall(r"\? (\w+) \((\d+) tokens\)", said)
    assert [answer for answer, _ in asked] == ["green", "blue", "left"]
    assert prefix > 1900 and all(0 < int(tokens) < 150 for _, tokens in asked)


def test_a_conversation_goes_on_with_a_second_image_and_the_reply_is_about_that(output):
    said = output("chat_with_a_second_image")
    assert (
        "heart: green," in said and "moon, drawn blue: blue," in said and "without the second image: blue" not in said
    )
    tokens, of_image = map(int, re.search(r"blue, (\d+) tokens, (\d+) of them image", said).groups())
    assert of_image == 36 and of_image < tokens < of_image + 30


def test_a_method_of_ones_own_shows_the_cell_with_the_heart(output):
    drawn, plain, peak = output("own_method").splitlines()
    thing = tuple(map(int, re.search(r"green', 'heart', \((\d+), (\d+), (\d+), (\d+)\)", drawn).groups()))
    assert plain.startswith("plain: green []") and peak.startswith("peak: green [[[")
    ((x0, y0, x1, y1),) = boxes_of(peak)
    assert (
        (x1 - x0, y1 - y0) == (88, 70) and x0 <= (thing[0] + thing[2]) / 2 < x1 and y0 <= (thing[1] + thing[3]) / 2 < y1
    )


def test_ones_own_questions_are_scored_and_kept(output, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    said = output("evaluate_own_data", folder)
    right = {method: int(share) for method, share in re.findall(r"\| (plain|hide) \| (\d+)%", said)}
    assert right["hide"] == 100 >= right["plain"] > 50
    assert len((folder / "results.jsonl").read_text().splitlines()) == 6


def test_memory_is_that_of_two_matrices(output):
    said = output("memory_of_a_block")
    peak = float(re.search(r"whole +([\d.]+)", said)[1])
    assert 2 * 33.55 < peak < 2 * 33.55 + 3 and "memory_of_a_block.py" in said
    assert abs(float(re.search(r"([\d.]+) GB in attention", said)[1]) - 2 * 8 * 16384**2 * 4 / 1e9) < 0.2
