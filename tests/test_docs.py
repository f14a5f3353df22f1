"""Every piece of Python in the README and the docs runs, on small models and pictures in place of the named ones."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_models import llm, prompt, qwen2_5_vl

from hide import methods
from hide.cli import app
from hide.models.qwen2_5_vl import Qwen25VL
from hide.tiny import CHECKPOINT
from hide.tiny.model import build
from hide.tiny.scenes import draw_scene

ROOT = Path(__file__).parents[1]
# Pages whose code other tests run, or that show a piece of a larger whole.
ELSEWHERE = {"model_families.md", "memory_profiler.md", "accelerate_hide.md", "serving.md", "server.md"}
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.name not in ELSEWHERE]
STAND_INS = {
    '"Qwen/Qwen2.5-VL-7B-Instruct"': f'"{CHECKPOINT}", max_new_tokens=4',
    '"cuda"': '"cpu"',
    "[14]": "[1]",
}


def blocks(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for named, there in STAND_INS.items():
            code = code.replace(named, there)
        yield code


def names_that_a_reader_has(page):
    """What the page's sentences have introduced before its code."""
    generator = torch.Generator().manual_seed(0)
    names = {
        "query": torch.randn(1, 4, 3, 32, generator=generator), "key": torch.randn(1, 2, 889, 32, generator=generator),
        "questions": ["What is the color of the star?", "Is the ring on the left or right side of the moon?"],
        "image": draw_scene(0, 300, 200, objects=2).image, "crop": draw_scene(1, 90, 90, objects=1).image,
        "inputs": {"input_ids": torch.randint(20, 500, (1, 950), generator=generator)}, "model": llm(),
    }  # fmt: skip
    adapter = Qwen25VL(*build())
    names["processor"] = adapter.image_processor
    if page.name == "attention_maps.md":
        names |= {"model": qwen2_5_vl(), "inputs": prompt("qwen2_5_vl"), "height": 60, "width": 80}
    if page.name == "sessions.md":
        from hide import PRESETS, HiDe

        names |= {"model": adapter, "hide": HiDe(adapter, PRESETS["tiny"])}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    found = list(blocks(page))
    if not found:
        pytest.skip("no Python on this page")
    monkeypatch.chdir(tmp_path)
    draw_scene(2, 420, 300, objects=3).image.save("street.jpg")
    Image.new("RGB", (30, 30)).save("scan.png")
    names = names_that_a_reader_has(page)
    for code in found:
        exec(compile(code, page.name, "exec"), names)


def test_the_method_of_the_page_is_taken_by_the_commands_once_its_package_is_installed(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "methods.md").read_text()
    (module,) = (
        code for code in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if "peak_crop.py" in code
    )
    (entry,) = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(module.splitlines()) + len(entry.splitlines()) < 60
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "peak_crop.py").write_text(module)
    (tmp_path / "my_package-1.dist-info").mkdir()
    (tmp_path / "my_package-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my-package\nVersion: 1\n"
    )
    group, (name, value) = re.search(r'entry-points\."(.*)"', entry)[1], re.search(r'(\S+) = "(.*)"', entry).groups()
    (tmp_path / "my_package-1.dist-info" / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    scene = draw_scene(7, 420, 300, objects=3)
    scene.image.save(tmp_path / "scene.png")
    thing = scene.objects[0]
    methods._registered.cache_clear()
    try:
        app(
            ["ask", str(tmp_path / "scene.png"), f"What is the color of the {thing.kind}?", "--method", name, "--set", "share=0.2",
             "--out", str(tmp_path / "out")],
            standalone_mode=False,
        )  # fmt: skip
    finally:
        methods._registered.cache_clear()
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    x0, y0, x1, y1 = found["boxes"][0][0]
    assert found["method"] == name and found["answer"] == found["plain_answer"] == thing.color
    assert (x1 - x0, y1 - y0) == (84, 60) and found["shown"] == [[84, 60]]
    middle = ((thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2)
    assert x0 <= middle[0] < x1 and y0 <= middle[1] < y1


EVERY = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def resolves(dotted):
    """Whether a dotted name is a module, or something in one."""
    names = dotted.split(".")
    for length in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:length]))
        except ImportError:
            continue
        for name in names[length:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.name)
def test_every_name_file_and_page_that_is_spoken_of_is_there(page):
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    dotted = set(re.findall(r"\b(?:hide|hide_kernels|benchmarks|training)(?:\.\w+)+", prose))
    dotted = {name for name in dotted if not re.search(r"\.(?:md|py|json|jsonl|jpg|png|html|so)$", name)}
    assert not {name for name in dotted if not resolves(name)}
    files = set(
        re.findall(r"\b(?:hide|hide_kernels|tests|benchmarks|examples|training|docs|csrc)/[\w./-]+\.\w+", prose)
    )
    assert not {name for name in files if "NAME" not in name and not (ROOT / name).exists()}
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    assert not {link for link in links if link and not (page.parent / link).exists()}
