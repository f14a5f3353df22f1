"""Every piece of Python in the README and the docs runs, on small models and pictures in place of the named ones."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_models import llm, prompt, qwen2_5_vl

from hide.models.qwen2_5_vl import Qwen25VL
from hide.tiny import CHECKPOINT
from hide.tiny.model import build
from hide.tiny.scenes import draw_scene

ROOT = Path(__file__).parents[1]
# Pages whose code other tests run, or that show a piece of a larger whole.
ELSEWHERE = {"model_families.md", "memory_profiler.md", "accelerate_hide.md", "serving.md"}
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.name not in ELSEWHERE]
STAND_INS = {
    '"Qwen/Qwen2.5-VL-7B-Instruct"': f'"{CHECKPOINT}", max_new_tokens=4, max_entity_tokens=4',
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
