"""The report: what its page says and shows, that it needs nothing else, and that a browser can show it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hide.cli import app
from hide.images import to_tensor
from hide.methods.base import Answer, Evidence, Step
from hide.methods.hide.config import PRESETS
from hide.present import draw
from hide.present.pages import report_html, save_pictures, save_report
from hide.questions import Question
from hide.tiny.scenes import draw_scene
from hide_kernels import collage, regions
from hide_kernels.collage import boxes_to_pixels, plan_layout

CONFIG = PRESETS["qwen2.5-vl-7b"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "img", "br"}


def planted(grid, *spots):
    """A map with rectangles (row, column, rows, columns, value) on nothing."""
    heat = torch.zeros(grid)
    for row, column, rows, columns, value in spots:
        heat[row : row + rows, column : column + columns] = value
    return heat


def result_of(images, tokens, *, question="Where is it?", plain="left", answer="right", notes=(), options=None):
    """A result with boxes and collages as the method makes them; `tokens`: per image (label, map) pairs."""
    evidence, counts = [], iter(range(700 + len(images), 800))
    for image, own in zip(images, tokens, strict=True):
        pixels = torch.zeros(0, 4, dtype=torch.int64)
        if own:
            found = regions(torch.stack([heat for _, heat in own]), CONFIG.settings.threshold)
            used = torch.arange(found.boxes.shape[1]) < found.counts[:, None]
            pixels = boxes_to_pixels(found.boxes[used], grid=tuple(own[0][1].shape), size=(image.height, image.width))
        made = collage(to_tensor(image), pixels, fill=(255, 255, 255))
        shown = None if made.image is None else Image.fromarray(made.image.numpy())
        evidence.append(
            Evidence(
                made.boxes,
                torch.stack([heat for _, heat in own]) if own else torch.zeros(0, 1, 1),
                tuple(label for label, _ in own),
                CONFIG.settings.threshold,
                shown,
                None if shown is None else next(counts),
            )
        )
    common = {
        "question": Question.parse(question, options),
        "images": tuple(images),
        "image_tokens": tuple(700 + index for index in range(len(images))),
    }
    steps = {"read and resize": Step(0.25, 0), "attention rows": Step(0.5, 720), "answer": Step(1.25, 905)}
    details = {"entities": list(dict.fromkeys(label for own in tokens for label, _ in own))}
    made = Answer(answer, tuple(evidence), tuple(notes), details, method="hide", steps=steps, **common)
    return made, None if plain is None else Answer(plain, method="plain", **common)


def page_of(result, model=""):
    return report_html(result[0], plain=result[1], settings=CONFIG.to_dict(), model=model)


def colourful(width, height, seed=0):
    cells = np.random.default_rng(seed).integers(60, 200, (-(-height // 20), -(-width // 20), 3), dtype=np.uint8)
    return Image.fromarray(cells.repeat(20, axis=0).repeat(20, axis=1)[:height, :width])


@pytest.fixture(scope="module")
def usual():
    """Three boxes whose order from left to right is not that from above: 1 right, 2 left, 3 in the middle."""
    grid = (16, 16)
    tokens = [
        ("umbrella", planted(grid, (1, 11, 2, 3, 1.0), (5, 1, 2, 2, 0.7))),
        (" red", planted(grid, (10, 6, 2, 3, 1.0), (0, 0, 1, 4, 0.4))),
    ]
    return result_of(
        [colourful(320, 320)],
        [tokens],
        question="Which colour has it?",
        options=["red", "blue"],
        plain="(B)",
        answer="It is red.",
        notes=["maps: 3 cells are near the threshold"],
    )


@pytest.fixture(scope="module")
def saved(usual, tmp_path_factory):
    """The folder with its pictures, and their paths as they were returned."""
    folder = tmp_path_factory.mktemp("pictures")
    return folder, save_pictures(usual[0], folder, plain=usual[1])


class Page(HTMLParser):
    """Elements with their attributes, the text of the page, and the text of each `h1`, `code` and `li`."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.inside, self._open = [], "", {}, []
        self.feed(html)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += f" {data}"
        for tag in set(self._open):
            self.inside[tag][-1] += data

    def images(self, word):
        """Decoded pictures whose alternative text has `word` in it."""
        return [decoded(attrs["src"]) for tag, attrs in self.elements if tag == "img" and word in attrs["alt"]]

    @property
    def words(self):
        return " ".join(self.text.split())


def decoded(source):
    kind, data = re.fullmatch(r"data:image/(jpeg|png);base64,(.*)", source).groups()
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    picture.load()
    assert picture.format.lower() == kind
    return picture


def test_page_tells_question_answers_tokens_boxes_times_notes_and_settings(usual):
    page = Page(page_of(usual, model="some/model"))
    assert page.inside["h1"] == ["Which colour has it?"]
    assert [item.strip() for item in page.inside["li"]] == [
        "(A) redhide answer",
        "(B) blueplain answer",
        "umbrella",
        "red",
        "maps: 3 cells are near the threshold",
    ]
    assert page.inside["code"] == ["umbrella", "red"]
    for text in (
        "from the picture alone (B) Option B.",
        "hide answer: from the picture and what was cut out of it It is red. Option A.",
        "some/model",
        "320 x 320 pixels, 700 image tokens, maps of 16 x 16 cells",
        "3 boxes",
        "160 of 320 columns are kept, in 3 runs. 120 of 320 rows are kept, in 3 runs.",
        "160 x 120 pixels, 701 image tokens: 18.8% of the picture's area",
        "read and resize 0.250 12%",
        "attention rows 0.500 25% 720",
        "total 2.000 1625",
        "threshold 0.7",
        "layers 14",
        "sigma 3.0",
        f"torch {torch.__version__.partition('+')[0]}",
    ):
        assert text in page.words, text
    # Number, size, place in the picture, place in the collage: worked out by hand from the planted cells.
    for row in ("1 60 x 40 220, 20 100, 0", "2 40 x 40 20, 100 0, 40", "3 60 x 40 120, 200 40, 80"):
        assert row in page.words, row


def test_text_of_users_and_models_stays_text():
    nasty = """<script>alert("1")</script> 'q' & </title> ${title} <img src=x onerror=alert(1)>"""
    label = '"><b onmouseover="x()">'
    made = result_of(
        [colourful(100, 80)],
        [[(label, planted((4, 5), (1, 1, 1, 1, 1.0)))]],
        question=nasty,
        options=[f"{nasty} a", f"{nasty} b"],
        plain=f"{nasty} p",
        answer=f"{nasty} h",
        notes=[f"{nasty} n"],
    )
    page = Page(page_of(made, model=f"{nasty} m"))
    assert page.inside["h1"] == [nasty]
    for end in "abphnm":
        assert f"{nasty} {end}" in page.text
    assert page.inside["code"] == [label]
    assert any(label in attrs["alt"] for tag, attrs in page.elements if tag == "img")
    for tag, attrs in page.elements:
        assert tag not in ("script", "b", "iframe", "link", "object"), tag
        assert not any(name.startswith("on") for name in attrs)


def test_page_refers_to_nothing_outside_and_its_pictures_are_whole(usual):
    html = page_of(usual)
    page = Page(html)
    sizes = []
    for tag, attrs in page.elements:
        assert not {"href", "srcset", "background", "action", "data"} & set(attrs)
        if "src" in attrs:
            picture = decoded(attrs["src"])
            assert tag == "img" and picture.size == (int(attrs["width"]), int(attrs["height"]))
            assert len(attrs["alt"]) > 10
            sizes.append(picture.size)
    assert len(sizes) == 2 + 2 + 1 + 2, "picture and heat, two tokens, the scale, boxes and collage"
    markup = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link", markup)


def test_panels_share_one_scale_with_the_colour_bar():
    grid = (8, 12)
    tokens = [
        ("strong", planted(grid, (0, 0, 4, 6, 0.5), (5, 8, 2, 2, 1.0))),
        ("weak", planted(grid, (4, 6, 4, 6, 0.5), (0, 0, 2, 6, 0.25))),
    ]
    page = Page(page_of(result_of([Image.new("RGB", (480, 320), (128, 128, 128))], [tokens])))
    (strong,), (weak,) = page.images("'strong'"), page.images("'weak'")
    (bar,) = page.images("Colour scale")

    def colour(picture, x, y):
        spot = picture.convert("RGB").crop((x - 6, y - 6, x + 7, y + 7))
        return np.asarray(spot, np.float64).mean(axis=(0, 1))

    def from_bar(value):
        return np.asarray(bar.convert("RGB"), np.float64)[4, round(value * (bar.width - 1))]

    assert np.abs(colour(strong, 120, 80) - colour(weak, 360, 240)).max() < 4
    for picture, x, y, value in (
        (strong, 120, 80, 0.5),
        (weak, 360, 240, 0.5),
        (weak, 120, 40, 0.25),
        (weak, 60, 280, 0),
    ):
        assert np.abs(colour(picture, x, y) - from_bar(value)).max() < 5, value
    assert np.abs(from_bar(0.5) - from_bar(0.25)).max() > 40


def test_outlines_run_along_the_edges_of_the_cells_that_reach_the_threshold():
    image = Image.new("RGB", (300, 200), (40, 40, 40))
    heat = planted((10, 15), (3, 4, 2, 5, 0.7), (3, 9, 2, 1, 0.69)).numpy()
    shown = np.asarray(draw.heat_picture(image, heat, 0.7))
    ys, xs = np.nonzero((shown == 255).all(axis=2))
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (80 - 2, 60 - 2, 180 + 2, 100 + 2)
    inside = shown[62:98, 82:178]
    assert not (inside == 255).all(axis=2).any(), "only the edge is drawn"
    assert not (np.asarray(draw.heat_picture(image, heat, None)) == 255).all(axis=2).any()


def find(canvas, tag):
    """Where a picture occurs in another, pixel by pixel: the one place."""
    pixels, wanted = np.asarray(canvas.convert("RGB")), np.asarray(tag)
    height, width = wanted.shape[:2]
    corners = (pixels[: -height + 1, : -width + 1] == wanted[0, 0]).all(axis=2)
    found = [
        (x, y) for y, x in np.argwhere(corners).tolist() if (pixels[y : y + height, x : x + width] == wanted).all()
    ]
    assert len(found) == 1, f"{len(found)} places"
    return found[0]


def test_a_box_has_the_same_number_on_the_picture_and_in_the_collage(usual, saved):
    layout = plan_layout(usual[0].boxes[0])
    for name, boxes, full in (
        ("boxes", usual[0].boxes[0], (320, 320)),
        ("layout", layout.positions, usual[0].shown[0].size),
    ):
        with Image.open(saved[0] / f"image_0_{name}.png") as canvas:
            scale = (canvas.width - 2 * draw.MARGIN) / full[0]
            assert scale == pytest.approx((canvas.height - 2 * draw.MARGIN) / full[1], abs=0.02)
            drawn = boxes.double().numpy() * scale + draw.MARGIN
            for number in range(3):
                tag = draw._tag(number)
                x, y = find(canvas, tag)
                gaps = [
                    max(x0 - x - tag.width, x - x1, y0 - y - tag.height, y - y1) for x0, y0, x1, y1 in drawn.tolist()
                ]
                assert 0 <= gaps.pop(number) <= 4, "it stands at its own box"
                assert min(gaps) > 4, "and at no other"


def test_picture_shows_what_is_copied_deleted_and_left_blank_and_strips_show_what_is_kept(usual, saved):
    source = np.asarray(usual[0].images[0], np.int64)
    with Image.open(saved[0] / "image_0_boxes.png") as opened:
        canvas = np.asarray(opened.convert("RGB"), np.int64)
    m = draw.MARGIN
    columns, rows, boxed = np.zeros(320, bool), np.zeros(320, bool), np.zeros((320, 320), bool)
    for x0, y0, x1, y1 in ((220, 20, 280, 60), (20, 100, 60, 140), (120, 200, 180, 240)):
        columns[x0:x1], rows[y0:y1], boxed[y0:y1, x0:x1] = True, True, True
    shown = canvas[m : m + 320, m : m + 320]
    assert (shown[boxed] == source[boxed]).all()
    # Tags and outlines cover little; the median sees past them.
    gap = rows[:, None] & columns & ~boxed
    deleted = ~(rows[:, None] & columns)
    assert np.median(shown[gap].mean(axis=1) - source[gap].mean(axis=1)) > 60
    assert np.median(shown[deleted].mean(axis=1) / source[deleted].mean(axis=1)) < 0.5
    blue = (canvas[..., 2] - canvas[..., 0]) > 60
    strip = draw.EDGE + draw.STRIP // 2
    assert (blue[strip, m : m + 320] == columns).all() and (blue[m : m + 320, strip] == rows).all()

    with Image.open(saved[0] / "image_0_layout.png") as opened:
        layout = np.asarray(opened.convert("RGB"), np.int64)
    across = layout[strip, m:-m]
    changes = np.flatnonzero((across[1:] != across[:-1]).any(axis=1)) + 1
    assert changes.tolist() == [round(40 * 560 / 160), round(100 * 560 / 160)], "kept runs of 40, 60, 60 columns"
    assert ((across[:, 2] - across[:, 0]) > 60).all()


def test_pictures_are_saved_and_the_collage_is_the_one_that_the_model_gets(usual, saved):
    folder, paths = saved
    names = {"heat", "tokens", "boxes", "layout", "shown"}
    assert {path.name for path in paths} == {"overview.png", *(f"image_0_{name}.png" for name in names)}
    for path in paths:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 20, f"{path.name} shows nothing"
    with Image.open(folder / "image_0_shown.png") as picture:
        assert picture.tobytes() == usual[0].shown[0].tobytes()


def transparent():
    pixels = np.full((120, 200, 4), 90, np.uint8)
    pixels[..., 3] = 0
    pixels[10:50, 10:90, 3] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "images, tokens, words, collages",
    [
        pytest.param(
            [colourful(200, 120)],
            [[]],
            ["There is no map of this picture", "hide answer: from the picture alone"],
            0,
            id="no map",
        ),
        pytest.param(
            [transparent()],
            [[("x", planted((6, 10), (4, 7, 1, 2, 1.0)))]],
            ["nothing was cut out of this picture", "hide answer: from the picture alone", "on white"],
            0,
            id="map, but nothing opaque in it",
        ),
        pytest.param(
            [transparent(), colourful(90, 300)],
            [[("x", planted((6, 10), (1, 1, 2, 2, 1.0)))], [("y", planted((10, 3), (4, 1, 1, 1, 1.0)))]],
            ["Picture 1 of 2", "Picture 2 of 2", "30 x 30 pixels, 703 image tokens"],
            2,
            id="two pictures, one of them transparent",
        ),
        pytest.param(
            [colourful(6000, 25)],
            [[("x", planted((1, 200), (0, 3, 1, 1, 1.0), (0, 190, 1, 2, 1.0)))]],
            ["thicker than it is", "90 x 25 pixels"],
            1,
            id="thin picture",
        ),
        pytest.param(
            [colourful(40, 3000)],
            [[("x", planted((100, 2), (3, 0, 60, 1, 1.0)))]],
            ["20 x 1800 pixels", "Drawn at 42%, thicker than it is"],
            1,
            id="thin collage",
        ),
        pytest.param(
            [colourful(400, 300)],
            [[(f"t{i}", planted((15, 20), (i // 20 * 4, i % 20, 1, 1, 1.0))) for i in range(30)]],
            ["The first 24 of 30 maps are shown", "t23", "30 maps"],
            1,
            id="many tokens",
        ),
        pytest.param(
            [colourful(400, 300)],
            [[("x", planted((15, 20), *((i // 10 * 2, i % 10 * 2, 1, 1, 1.0) for i in range(60))))]],
            ["60 boxes", "The first 24 of 60 are listed"],
            1,
            id="many boxes",
        ),
    ],
)
def test_odd_results_have_a_report_too(images, tokens, words, collages, tmp_path):
    made = result_of(images, tokens, question="Was? " + "Ärger über 猫 " * 400, plain=None, answer=" ")
    page = Page(save_report(made[0], tmp_path / "new", plain=made[1]).read_text(encoding="utf-8"))
    for text in (*words, "Empty.", "None."):
        assert text in page.words, text
    assert page.inside["h1"] == [made[0].question.stem] and "Plain answer" not in page.words
    labels = [label for own in tokens for label, _ in own[: draw.MAX_PANELS]]
    assert page.inside.get("code", []) == labels and len(page.images("Map of")) == len(labels)
    assert len(page.images("What was shown")) == collages
    written = {path.name for path in save_pictures(made[0], tmp_path, plain=made[1])}
    assert sum(name.endswith("layout.png") for name in written) == collages
    assert sum(name.endswith("tokens.png") for name in written) == sum(bool(own) for own in tokens)


def test_page_of_an_8k_picture_stays_below_5_mb():
    picture = colourful(1920, 1080).resize((7680, 4320))
    speckled = Image.fromarray(
        np.asarray(picture) ^ np.random.default_rng(0).integers(0, 32, (4320, 7680, 1), np.uint8)
    )
    tokens = [(f"t{i}", torch.rand(95, 170, generator=torch.Generator().manual_seed(i)) * 0.71) for i in range(30)]
    assert len(page_of(result_of([speckled], [tokens]))) < 5e6


@pytest.mark.parametrize(
    "given, with_pictures",
    [
        (["--report", "seen"], {"seen"}),
        (["--report", "seen", "--out", "pictures"], {"seen", "pictures"}),
        ([], {"hide-out"}),
    ],
)
def test_ask_writes_the_report_next_to_the_pictures(given, with_pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_scene(0, 120, 90, objects=1).image.save("scene.png")
    question = "What is the color of the star?"
    result = CliRunner().invoke(app, ["ask", "scene.png", question, "--threshold", "0.625", *given])
    assert result.exit_code == 0, result.output
    assert {path.parent.name for path in tmp_path.glob("*/image_0_heat.png")} == with_pictures
    assert {path.parent.name for path in tmp_path.glob("*/result.json")} == with_pictures
    assert [path.parent.name for path in tmp_path.glob("**/*.html")] == given[1:2]
    if given:
        assert "seen/report.html" in result.output
        page = Page(Path("seen/report.html").read_text(encoding="utf-8"))
        document = json.loads(Path("seen/result.json").read_text())
        assert page.inside["h1"] == [question] and document["answer"].strip() in page.text
        assert "threshold 0.625" in page.words and "embedded" in page.words


def chromium(tmp_path, *arguments):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2400", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout.decode()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_chromium_shows_every_picture_without_sideways_scrolling(tmp_path):
    image = Image.new("RGB", (600, 400), (0, 150, 60))
    tokens = [("word" * 90, planted((20, 30), (2, 3, 5, 6, 1.0), (12, 20, 4, 4, 0.8)))]
    made = result_of([image], [tokens], question="x" * 3000, answer="<script>document.title = 'run'</script>")
    path = save_report(made[0], tmp_path, plain=made[1])
    chromium(tmp_path, f"--screenshot={tmp_path / 'shot.png'}", path.as_uri())
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.width == 1200
        pixels = np.asarray(shot.convert("RGB"), np.int64)
    shown = (np.abs(pixels - (0, 150, 60)).max(axis=2) < 12).sum()
    assert shown > 150_000, "the picture covers about half the width"
    hot = draw.coloured(np.ones(1, np.float32), float(np.asarray(image.convert("L"))[0, 0]) / 255)[0].astype(int)
    assert (np.abs(pixels - hot).max(axis=2) < 20).sum() > 2_000, "the peak is seen in its colour"

    # The probe stands before the policy that forbids scripts; the page's own text comes after it.
    probe = """<script>addEventListener("load", () => { const all = [...document.images];
        document.body.dataset.whole = all.filter(i => i.complete && i.naturalWidth == i.getAttribute("width")).length;
        document.body.dataset.width = document.documentElement.scrollWidth; })</script>"""
    html = path.read_text(encoding="utf-8")
    copy = tmp_path / "probe.html"
    copy.write_text(html.replace("<head>", f"<head>{probe}", 1), encoding="utf-8")
    dom = chromium(tmp_path, "--dump-dom", copy.as_uri())
    body = re.search(r'<body data-whole="(\d+)" data-width="(\d+)">', dom)
    assert body, dom[-300:]
    assert int(body[1]) == len([tag for tag, _ in Page(html).elements if tag == "img"]) == 6
    assert int(body[2]) <= 1200
    assert "<title>run" not in dom


def test_a_figure_says_whether_maps_are_parts_of_their_peaks_or_probabilities(monkeypatch):
    said = []
    monkeypatch.setattr(draw, "_panels", lambda pictures, titles, scale, **more: said.append(scale))
    for top in (1.0, 0.4):
        draw.maps_figure(Image.new("RGB", (60, 40)), np.full((1, 4, 6), top, np.float32), ["star"], 0.3)
    assert said == ["part of the map's own peak; outlined from 0.3 on", "the map's values; outlined from 0.3 on"]
