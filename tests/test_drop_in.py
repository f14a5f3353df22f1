"""The released functions' names on our operators: the goldens, a script before and after, InternVL, patched attention."""

import base64
import copy
import io
import re
import sys
import types
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from random_models import V5, prompt, qwen2_5_vl

from benchmarks import drop_in as benchmark
from benchmarks import published_steps
from hide import drop_in
from hide_kernels import AttentionRows
from hide_kernels.integrations.transformers import capture_attention

ROOT = Path(__file__).parents[1]
CASES = sorted((ROOT / "tests" / "data" / "golden").glob("case_*.npz"))


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image;base64," + base64.b64encode(buffer.getvalue()).decode()


def pixels_of(uri):
    assert uri.startswith("data:image;base64,")
    opened = Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))
    assert opened.format == "PNG" and opened.mode == "RGBA"
    return np.asarray(opened)


def given(case):
    """A golden case as the released code holds it."""
    start, end = int(case["text_start"]), int(case["text_end"])
    layers = [[[[None] * start + list(layer)]] for layer in case["attention"]]
    return {
        "inputs": {
            "input_ids": torch.arange(end)[None],
            "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in case["grids"].tolist()]),
        },
        "attention": [None, *layers, None],
        "dicts": {token: f" {token}" for token in range(end)},
        "img_start": case["image_starts"].tolist(),
        "img_end": case["image_ends"].tolist(),
    }


def to_process(of, sigma, **changes):
    arguments = {name: of[name] for name in ("dicts", "attention", "inputs", "img_start", "img_end")}
    end = of["inputs"]["input_ids"].shape[1]
    return {**arguments, "start_k": of["img_end"][-1] + 1, "end_k": end, "sig": sigma, **changes}


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request):
    with np.load(request.param) as archive:
        return dict(archive)


@pytest.fixture(params=[published_steps, drop_in], ids=["plainly", "drop-in"])
def functions(request):
    return request.param


def test_maps_are_those_of_the_goldens_under_their_positions(case, functions):
    of = given(case)
    if functions is published_steps:
        of["attention"] = of["attention"][1:-1]
    found = functions.process(**to_process(of, case["sigma"].item()))
    assert {(image, k) for image, maps in found.items() for k in maps} == set(map(tuple, case["map_keys"].tolist()))
    assert list(found) == list(
        dict.fromkeys(image for image, _ in sorted(case["map_keys"].tolist(), key=lambda x: x[1]))
    )
    for n, (image, k) in enumerate(case["map_keys"].tolist()):
        assert found[image][k].shape == (1, *case["grids"][image])
        np.testing.assert_allclose(found[image][k][0], case[f"map_{n}"], rtol=0, atol=2e-5)


def test_our_rows_objects_give_the_maps_of_the_nested_lists(case):
    of = given(case)
    want = drop_in.process(**to_process(of, case["sigma"].item()))
    layers = {n: AttentionRows(torch.from_numpy(rows)[None], None) for n, rows in enumerate(case["attention"])}
    images = np.concatenate([np.arange(*span) for span in zip(of["img_start"], of["img_end"], strict=True)])
    cut = {n: AttentionRows(of_layer.rows[:, :, images], None) for n, of_layer in layers.items()}
    mean = AttentionRows(torch.from_numpy(case["attention"]).mean(0)[None], None)
    for attention in (layers, cut, mean):
        got = drop_in.process(**to_process(of, case["sigma"].item(), attention=attention))
        assert {image: list(maps) for image, maps in got.items()} == {image: list(maps) for image, maps in want.items()}
        for image, maps in want.items():
            np.testing.assert_array_equal(np.stack(list(got[image].values())), np.stack(list(maps.values())))


@pytest.mark.gpu
def test_rows_and_inputs_on_a_gpu_give_the_boxes_of_the_cpu(case):
    urls = [png(case[f"image_{i}"]) for i in range(len(case["grids"]))]
    arguments = {**given(case), "img_url": urls, "sig": [case["sigma"].item()], "thre": [case["threshold"].item()]}
    want = drop_in.from_img_and_att_get_cropbox(**arguments)
    rows = AttentionRows(torch.from_numpy(case["attention"]).mean(0)[None].cuda(), None)
    inputs = {name: of.cuda() for name, of in arguments["inputs"].items()}
    assert drop_in.from_img_and_att_get_cropbox(**{**arguments, "attention": rows, "inputs": inputs}) == want


def test_boxes_and_collages_are_those_of_the_goldens(case, functions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    urls = [png(case[f"image_{i}"]) for i in range(len(case["grids"]))]
    sigma, threshold = case["sigma"].item(), case["threshold"].item()
    results = functions.from_img_and_att_get_cropbox(**given(case), img_url=urls, sig=[sigma], thre=[threshold, 1])
    assert list(results) == [str(sigma)] and list(results[str(sigma)]) == [str(threshold), "1"]
    merged, crops, words, collages, bounding = results[str(sigma)][str(threshold)]
    tokens = {(i, k, *box) for k, images in merged.items() for i, boxes in images.items() for box in boxes}
    assert tokens == set(map(tuple, case["token_boxes"].tolist()))
    assert list(merged) == sorted(merged) and crops == {k: {} for k in merged}
    after = int(case["text_start"])
    assert "".join(words.values()) == "".join(f" {k}" for k in range(after, 1 + max(merged)))
    assert all(text.endswith(f" {k}") for k, text in words.items())
    final = {(i, *box) for i, boxes in bounding.items() for box in boxes}
    assert final == set(map(tuple, case["final_boxes"].tolist()))
    assert list(bounding) == list(dict.fromkeys(case["final_boxes"][:, 0].astype(int).tolist()))
    assert len(collages) == case["n_compact"]
    for n, uri in enumerate(collages):
        np.testing.assert_array_equal(pixels_of(uri), case[f"compact_{n}"])
    assert not list(tmp_path.iterdir())


def test_a_script_gives_the_same_before_and_after_install_and_is_restored_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(published_steps, "DEBUG", tmp_path)
    with np.load(CASES[15]) as archive:
        case = dict(archive)
    arguments = {
        **given(case),
        "img_url": [png(case["image_0"]), png(case["image_1"])],
        "sig": [2, 0],
        "thre": [0.7, 0.4],
    }
    before = dict(vars(published_steps))
    want = published_steps.from_img_and_att_get_cropbox(**arguments)
    written = list(tmp_path.iterdir())
    assert written
    for path in written:
        path.unlink()
    # The flow stays the script's own: it finds the functions that it calls in its module.
    script = ModuleType("script")
    vars(script).update(vars(published_steps))
    flow = published_steps.from_img_and_att_get_cropbox
    own = types.FunctionType(flow.__code__, vars(script), "own")
    with pytest.raises(ZeroDivisionError), drop_in.installed(published_steps, script) as done:
        assert len(done.replaced) == 12 and not done.left
        for found in (published_steps.from_img_and_att_get_cropbox(**arguments), own(**arguments)):
            for sigma, threshold in ((s, t) for s in want for t in want[s]):
                got, expected = found[sigma][threshold], want[sigma][threshold]
                assert got[:3] == expected[:3] and list(got[4]) == list(expected[4])
                assert all(sorted(got[4][i]) == sorted(expected[4][i]) for i in got[4])
                for one, other in zip(got[3], expected[3], strict=True):
                    np.testing.assert_array_equal(pixels_of(one), pixels_of(other))
        assert not list(tmp_path.iterdir())
        raise ZeroDivisionError
    assert dict(vars(published_steps)) == before and script.process is published_steps.process


def test_the_benchmark_sees_another_box_pixel_and_text():
    pixels = np.zeros((4, 5, 4), np.uint8)
    other = pixels.copy()
    other[2, 2] = 1
    one = [{}, {}, {3: " a"}, [png(pixels)], {0: [[0, 0, 1, 1], [0.5, 0, 1, 1]]}]
    assert benchmark.same(one, [*one[:4], {0: one[4][0][::-1]}])
    assert not benchmark.same(one, [*one[:4], {0: [[0, 0, 1, 1], [0.5, 0, 1, 0.9]]}])
    assert not benchmark.same(one, [*one[:3], [png(other)], one[4]])
    assert not benchmark.same(one, [{}, {}, {3: " b"}, *one[3:]])


def test_install_leaves_functions_that_take_other_arguments_and_names_them():
    def process(dicts, start_k, end_k, attention, inputs, img_start, img_end, sig, debug_dir=None):
        pass

    def find_top_n_attended_regions(att_map, n, threshold=0.5):
        pass

    def from_img_and_att_get_cropbox(model, tokenizer):
        pass

    module = ModuleType("fork")
    vars(module).update(locals())
    done = drop_in.install(module)
    assert done.replaced == ["fork.find_top_n_attended_regions"]
    assert set(done.left) == {"fork.process", "fork.from_img_and_att_get_cropbox"}
    assert done.left["fork.from_img_and_att_get_cropbox"] == "model, tokenizer"
    assert module.find_top_n_attended_regions(att_map=np.eye(3), n=1)[1] == 1
    assert not drop_in.install(module).replaced
    done.restore()
    assert vars(module)["find_top_n_attended_regions"] is find_top_n_attended_regions
    done.restore()
    del module.find_top_n_attended_regions
    with pytest.raises(ValueError, match=r"fork take other arguments than ours: fork.process\(dicts"):
        drop_in.install(published_steps, module)
    assert published_steps.process.__module__ == "benchmarks.published_steps"


def test_regions_come_by_score_and_n_is_ignored():
    attention = np.zeros((4, 40), np.float32)
    attention[1, ::4] = 0.7
    attention[2:, 38:] = 0.9
    want = [[38, 2, 40, 4], *([4 * i, 1, 4 * i + 1, 2] for i in range(10))]
    assert drop_in.find_top_n_attended_regions(attention, 2, 0.7) == (want, 11)
    assert drop_in.find_top_n_attended_regions(attention[None].astype(np.float64), 2, 0.8) == (want[:1], 1)
    checkered = np.zeros((40, 40), np.float32)
    checkered[::2, ::2] = 1
    assert drop_in.find_top_n_attended_regions(checkered, 1)[1] == 400
    assert drop_in.find_top_n_attended_regions(np.full((3, 3), np.nan), 5) == ([], 0)


def test_boxes_merge_where_they_touch_whether_integers_or_floats():
    boxes = [(0, 0, 10, 10), (10, 10, 20, 20), (21, 0, 30, 5)]
    merged = drop_in.merge_overlapping_bboxes(boxes)
    assert sorted(merged) == [[0, 0, 20, 20], [21, 0, 30, 5]] and isinstance(merged[0][0], int)
    halves = drop_in.merge_overlapping_bboxes([[value / 8 for value in box] for box in boxes])
    assert sorted(halves) == [[0, 0, 2.5, 2.5], [2.625, 0, 3.75, 0.625]]
    assert drop_in.merge_overlapping_bboxes([]) == []
    random = np.random.default_rng(3)
    for _ in range(20):
        corners = random.integers(0, 60, (12, 2))
        many = np.concatenate([corners, corners + random.integers(1, 9, (12, 2))], axis=1).tolist()
        assert sorted(drop_in.merge_overlapping_bboxes(many)) == sorted(published_steps.merge_overlapping_bboxes(many))


def test_a_box_over_transparency_is_cut_down_in_any_memory_order():
    image = np.zeros((20, 30, 4), np.uint8)
    image[2:9, 3:10, 3] = 255
    image[4:7, 5:8, 3] = 10
    image[5, 6, 3] = 255
    image[12:15, 20:, 3] = 11
    want = [[3, 2, 10, 8], [20, 12, 28, 14]]
    assert drop_in.decompose_bbox_by_alpha(image, [0, 0, 28, 8], 10) == want[:1]
    for order in (image, np.asfortranarray(image), image[::-1][::-1]):
        assert sorted(drop_in.decompose_bbox_by_alpha(order, (0, 9, 28, 14))) == want[1:]
    assert drop_in.decompose_bbox_by_alpha(image, [0, 16, 30, 20]) == []


@pytest.mark.parametrize("form", ["path", "file", "uri", "pillow"])
def test_a_collage_comes_back_as_its_picture_came(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 1600, 3), np.uint8)
    Image.fromarray(pixels).save("source.png")
    forms = {
        "path": "source.png",
        "file": f"file://{tmp_path}/source.png",
        "uri": png(pixels),
        "pillow": Image.fromarray(pixels),
    }
    boxes = [(0.1, 0.1, 0.2, 0.3), (0.2, 0.3, 0.25, 0.4), (0.6, 0.05, 0.7, 0.15), (0.8, 0.8, 0.9, 0.9)]
    found, shown = drop_in.compact_and_center_with_relative_pos(0, 1, forms[form], boxes)
    made = np.asarray(found) if form == "pillow" else pixels_of(*found)
    assert made.shape == (450, 560, 4) and len(shown) == 3
    assert sorted(shown) == [[0.1, 0.1, 0.25, 0.4], [0.6, 0.05, 0.7, 0.15], [0.8, 0.8, 0.9, 0.9]]
    np.testing.assert_array_equal(made[50:350, :240, :3], pixels[100:400, 160:400])
    assert (made[..., 3] == 255).sum() == 240 * 300 + 160 * 100 * 2 and not made[made[..., 3] == 0].any()
    assert [path.name for path in tmp_path.iterdir()] == ["source.png"]
    drop_in.compact_and_center_with_relative_pos(0, 2, forms[form], boxes, save_to=tmp_path)
    np.testing.assert_array_equal(np.asarray(Image.open("collage_2_0.png")), made)


def test_orientation_data_is_not_applied_as_the_released_loader_does_not_apply_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "held.png", exif=exif)
    _, boxes = drop_in.compact_and_center_with_relative_pos(0, 1, str(tmp_path / "held.png"), [(0, 0, 0.5, 0.3)])
    assert boxes == [[0, 0, 0.5, 0.3]]


def test_where_nothing_is_found_there_is_nothing(tmp_path):
    image = Image.new("RGB", (40, 20))
    assert drop_in.compact_and_center_with_relative_pos(0, 1, image, []) == (None, [])
    assert drop_in.compact_and_center_with_relative_pos(0, 1, image, [(0.5, 0.5, 0.51, 0.51)]) == (None, [])
    clear = Image.new("RGBA", (40, 20))
    assert drop_in.compact_and_center_with_relative_pos(0, 1, clear, [(0, 0, 1, 1)]) == (None, [])
    with np.load(CASES[1]) as archive:
        of = given(dict(archive))
    arguments = {**of, "img_url": [clear], "sig": [0]}
    merged, _, _, collages, bounding = drop_in.from_img_and_att_get_cropbox(**arguments, thre=[0.5])["0"]["0.5"]
    # As released: the boxes of the tokens stay where there is no collage of them.
    assert merged and collages == [] and bounding == {0: [box for own in merged.values() for box in own[0]]}
    *_, collages, bounding = drop_in.from_img_and_att_get_cropbox(**arguments, thre=[1.5])["0"]["1.5"]
    assert collages == [] and bounding == {0: []}
    for tail in (4, 9, 12):
        assert drop_in.process(**to_process(of, 1, end_k=of["img_end"][-1] + tail)) == {}


def tile_case(tokens=range(9, 12)):
    """2 x 1 tiles and a thumbnail: a sink everywhere, a moving block across the seam from word 9 on."""
    random = np.random.default_rng(0)
    start, length = 3, 3 + 3 * 256 + 1 + 9 + 3 + 2
    start_k = start + 3 * 256
    ids = torch.full((1, length), 7)
    ids[0, start_k], ids[0, -2] = 151666, 151645
    places = [None] * start_k
    for k in range(start_k, length):
        picture = random.uniform(0, 0.2, (16, 32))
        picture[1, 1] += 3
        word = k - start_k - 1
        if word >= 9:
            picture[3:5, word + 5 : word + 8] += 1
        row = np.zeros(length, np.float32)
        row[start : start + 512] = np.concatenate([picture[:, :16].ravel(), picture[:, 16:].ravel()])
        row[start + 512 : start_k] = random.uniform(0, 9, 256)
        places.append(row / row.sum())
    return {
        "block_indices": [[0, 0], [1, 0], [-1, -1]], "start_k": start_k, "end_k": length - 2, "attention": [[[places]]],
        "input_ids": ids, "img_url": ["one.png"], "img_start": [start], "img_end": [start_k],
    }  # fmt: skip


@pytest.mark.parametrize("sigma", [0, 1])
def test_tiles_are_one_map_in_which_blocks_cross_the_seam(sigma):
    arguments = tile_case()
    found = drop_in.process_notsave(**arguments, sig=sigma)
    start_k = arguments["start_k"]
    assert list(found) == [0] and list(found[0]) == [start_k + 10, start_k + 11, start_k + 12]
    for word, own in enumerate(found[0].values()):
        assert own.shape == (16, 32) and own.dtype == np.float64 and own.max() == 1 and own[1, 1] < 0.4
        boxes, count = drop_in.find_top_n_attended_regions(own, 100, 0.7)
        assert (boxes, count) == ([[word + 14, 3, word + 17, 5]], 1)


def test_tiles_of_several_pictures_come_flat_or_by_picture():
    one = tile_case()
    start, length = 3, one["input_ids"].shape[1] + 256
    wide = [
        None if row is None else np.insert(row, [start] * 256, 1e-6).astype(np.float32)
        for row in one["attention"][0][0][0]
    ]
    moved = {
        "start_k": one["start_k"] + 256, "end_k": one["end_k"] + 256, "attention": [[[[None] * 256 + wide]]],
        "input_ids": torch.nn.functional.pad(one["input_ids"], (256, 0), value=7), "img_url": ["one.png", "two.png"],
        "img_start": [start], "img_end": [one["start_k"] + 256], "sig": 1,
    }  # fmt: skip
    assert moved["input_ids"].shape[1] == length
    want = drop_in.process_notsave(**one, sig=1)[0]
    flat, nested = [[0, 0], *one["block_indices"]], [[[0, 0]], one["block_indices"]]
    for blocks in (flat, nested):
        found = drop_in.process_notsave(blocks, **moved)
        assert list(found) == [1]
        for own, other in zip(found[1].values(), want.values(), strict=True):
            np.testing.assert_allclose(own, other, atol=1e-6)


def plain_rows(layer_input, attention, positions, cos_sin):
    """Rows by the formula in NumPy, from the input of an attention module and its rotations."""
    weights = {name: value.double().numpy() for name, value in attention.state_dict().items()}
    hidden = layer_input[0].double().numpy()
    cos, sin = (of.double().numpy() for of in cos_sin)
    if cos.ndim == 4:
        # One rotation for each of time, height and width, each for its own sections of the head.
        sections = attention.config.rope_scaling["mrope_section"] * 2
        edges = np.cumsum(sections)[:-1]
        cos, sin = (
            np.concatenate([part[i % 3] for i, part in enumerate(np.split(of, edges, -1))], -1) for of in (cos, sin)
        )
    cos, sin = cos[0], sin[0]

    def heads(name, number):
        flat = hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        split = flat.reshape(len(hidden), number, -1).transpose(1, 0, 2)
        half = split.shape[-1] // 2
        return split * cos + np.concatenate([-split[..., half:], split[..., :half]], -1) * sin

    query, key = heads("q_proj", 4), heads("k_proj", 2).repeat(2, axis=0)
    scores = query[:, positions] @ key.transpose(0, 2, 1) / query.shape[-1] ** 0.5
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return (scores / scores.sum(-1, keepdims=True)).mean(0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_patched_attention_class_returns_rows_that_see_all_keys(implementation):
    model, inputs = qwen2_5_vl(), prompt("qwen2_5_vl")
    model.set_attn_implementation(implementation)
    attention = model.model.language_model.layers[2].self_attn
    cls, original, seen = type(attention), type(attention).forward, {}

    def keep(module, args, kwargs):
        seen.update(kwargs)

    wanted = [27, 20, 21, 30]
    with torch.no_grad(), drop_in.patch_attention(cls, layers=[1, 2]) as done:
        assert done.replaced == [f"{cls.__name__}.forward"]
        hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
        out = model(**inputs, target_indices=torch.tensor(wanted), output_attentions=True)
        hook.remove()
        plain = model(**inputs)
    assert cls.forward is original
    with torch.no_grad():
        assert torch.equal(out.logits, model(**inputs).logits) and torch.equal(out.logits, plain.logits)
    rows_of = list(out.attentions)
    assert len(rows_of) == (2 if V5 else 4)
    if not V5:
        assert rows_of[0] is None and rows_of[3] is None
    ((places,),) = rows_of[-1] if V5 else rows_of[2]
    assert len(places) == 31 and [k for k, row in enumerate(places) if row is not None] == sorted(wanted)
    want = plain_rows(seen["hidden_states"], attention, sorted(wanted), seen["position_embeddings"])
    got = np.stack([places[k] for k in sorted(wanted)])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_patched_rows_go_into_process_as_captured_ones_do():
    model, inputs = qwen2_5_vl(), prompt("qwen2_5_vl", text_tokens=18)
    start, end, length = 6, 18, inputs["input_ids"].shape[1]
    text = range(end + 1, length)
    with torch.no_grad():
        with drop_in.patch_attention(type(model.model.language_model.layers[0].self_attn), layers=[2]):
            nested = model(**inputs, target_indices=text, output_attentions=True).attentions
        with capture_attention(model, layers=[2], queries=text, key_spans=[(start, end)], causal=False) as captured:
            model(**inputs)
    shared = {
        "dicts": {},
        "start_k": end + 1,
        "end_k": length,
        "inputs": inputs,
        "img_start": [start],
        "img_end": [end],
        "sig": 0,
    }
    one, other = (drop_in.process(attention=attention, **shared) for attention in (nested, captured))
    assert list(one[0]) == list(other[0]) and len(one[0]) > 2
    np.testing.assert_allclose(np.stack(list(one[0].values())), np.stack(list(other[0].values())), atol=1e-5)


def test_a_fork_whose_forward_is_slow_gets_the_forward_of_the_class_that_it_was_made_from():
    model, inputs = qwen2_5_vl(), prompt("qwen2_5_vl")
    attention = model.model.language_model.layers[0].self_attn

    class Fork(type(attention)):
        def forward(self, *args, **kwargs):
            raise AssertionError("the fork's own forward ran")

    attention.__class__ = Fork
    with torch.no_grad(), drop_in.patch_attention(Fork, forward=Fork.__base__.forward):
        model(**inputs, target_indices=[20])
    with pytest.raises(AssertionError), torch.no_grad():
        model(**inputs)


def test_a_forward_that_was_inherited_is_inherited_again():
    class Child(type(qwen2_5_vl().model.language_model.layers[0].self_attn)):
        pass

    drop_in.patch_attention(Child).restore()
    assert "forward" not in vars(Child)


def test_the_page_about_existing_code_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "accelerate_hide.md").read_text()
    with np.load(CASES[0]) as archive:
        case = dict(archive)
    urls = [png(case["image_0"]), png(case["image_1"])]
    monkeypatch.setitem(sys.modules, "Get_box", published_steps)
    monkeypatch.chdir(tmp_path)
    model, inputs = qwen2_5_vl(), prompt("qwen2_5_vl")
    before = dict(vars(published_steps))
    names = {**given(case), "img_url": urls}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    exec(blocks[0], names)
    assert names["results"]["3"]["0.7"][3] and dict(vars(published_steps)) == before
    with torch.no_grad():
        exec(blocks[1].replace("[14]", "[1]"), {"model": model, "inputs": inputs, "start_k": 19, "end_k": 31})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def small():
    with np.load(CASES[7]) as archive:
        return given(dict(archive))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attention": []}, ValueError, "attention: got no layer"),
        ({"attention": [None]}, ValueError, "attention: got no layer"),
        ({"attention": "rows"}, TypeError, "attention: got str"),
        ({"attention": [[]]}, ValueError, r"attention\[0\]: want \[batch\]\[0\]\[position\]"),
        ({"attention": [[[[None] * 90]]]}, ValueError, r"attention\[0\]: got no row at position 56"),
        ({"attention": [[[[np.ones(9)] * 90]]]}, ValueError, r"attention\[0\]: got a row of 9 keys"),
        ({"attention": AttentionRows(torch.ones(4, 30, 42), None)}, ValueError, "heads averaged"),
        ({"attention": AttentionRows(torch.ones(1, 3, 42), None)}, ValueError, "got 3 rows, want those of 21"),
        ({"attention": AttentionRows(torch.ones(1, 30, 41), None)}, ValueError, "got 41 keys"),
        ({"img_start": [], "img_end": []}, ValueError, "img_start, img_end, image_grid_thw: got 0, 0 and 1"),
        ({"img_end": [54]}, ValueError, r"img_end\[0\]: got 41 tokens, want 42"),
        ({"sig": -1}, ValueError, "sigma: got -1"),
        ({"sigma": 1}, TypeError, "sigma"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(small, changes, error, message):
    with pytest.raises(error, match=message):
        drop_in.process(**{**to_process(small, 1, start_k=56), **changes})


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("find_top_n_attended_regions", (np.ones((2, 3, 3)), 1), ValueError, r"norm_att: got shape \(2, 3, 3\)"),
        ("find_top_n_attended_regions", (np.ones((3, 3)), 1, "high"), TypeError, "threshold: got str"),
        ("merge_overlapping_bboxes", ([[0, 0, 1]],), ValueError, "bboxes: got int64 of shape"),
        ("merge_overlapping_bboxes", ([[0, 0, 1, 1], [3, 0, 1, 1]],), ValueError, r"bboxes\[1\]: got \[3, 0, 1, 1\]"),
        ("decompose_bbox_by_alpha", (np.ones((3, 3, 3), np.uint8), [0, 0, 1, 1]), ValueError, "image_bgra: got uint8"),
        ("decompose_bbox_by_alpha", (np.ones((3, 3, 4), np.uint8), [0, 0, 4, 1]), ValueError, r"boxes\[0\]"),
        ("compact_and_center_with_relative_pos", (0, 1, 5, []), TypeError, "image: got int"),
        ("compact_and_center_with_relative_pos", (0, 1, "none.png", []), FileNotFoundError, "none.png"),
        ("compact_and_center_with_relative_pos", (0, 1, "", [], 2), ValueError, "n: got 2, want 1"),
        ("compact_and_center_with_relative_pos", (0, 1, Image.new("L", (3, 3)), [(0, 0, 1.5, 1)]), ValueError, "want 0 to 1"),
        ("compact_and_center_with_relative_pos", (0, 1, Image.new("L", (3, 3)), [(0, np.nan, 1, 1)]), ValueError, r"normalized_bboxes\[0\]"),
        ("install", (), TypeError, "modules: got none"),
        ("install", ("Get_box",), TypeError, "modules: got str"),
        ("install", (base64,), ValueError, "base64 has none of process"),
        ("patch_attention", (copy.copy,), TypeError, "attention_class: got <function copy"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(drop_in, name)(*arguments)


def test_smoothings_and_thresholds_may_be_numpy_s(small):
    pictures = {name: small[name] for name in ("inputs", "attention", "dicts", "img_start", "img_end")}
    pictures["img_url"] = [Image.new("RGB", (60, 40))]
    want = drop_in.from_img_and_att_get_cropbox(**pictures, sig=[1, 2], thre=[0.75])
    given = {"sig": np.arange(1, 3), "thre": np.array([0.75], np.float32)}
    found = drop_in.from_img_and_att_get_cropbox(**pictures, **given)
    assert list(found) == ["1", "2"] and list(found["1"]) == ["0.75"]
    assert all(found[sigma]["0.75"][0] == want[sigma]["0.75"][0] for sigma in want)


def test_bad_arguments_of_the_whole_way_are_named(small):
    with pytest.raises(ValueError, match="img_url: got 2 pictures, want 1"):
        drop_in.from_img_and_att_get_cropbox(**small, img_url=["a", "b"], sig=[1], thre=[0.5])
    for changes in ({"sig": 3}, {"thre": 0.5}):
        with pytest.raises(TypeError, match=f"{next(iter(changes))}: got"):
            drop_in.from_img_and_att_get_cropbox(**{**small, "img_url": ["a"], "sig": [1], "thre": [1], **changes})
    with pytest.raises(TypeError, match="debug_dir"):
        drop_in.from_img_and_att_get_cropbox(**small, img_url=["a"], sig=[1], thre=[0.5], debug_dir=".")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_indices": []}, "block_indices: got none"),
        ({"block_indices": [[1, 0]]}, r"block_indices: got \[1, 0\] first"),
        ({"block_indices": [[0, 0], [1, 1], [-1, -1]]}, "want all tiles of 2 x 2"),
        ({"block_indices": [[0, 0, 0]]}, "block_indices: got"),
        ({"img_url": []}, "img_url: got 0 pictures, want 1"),
        ({"start_k": 600}, "start_k: got 600, want at least 771"),
    ],
)
def test_bad_tiles_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        drop_in.process_notsave(**{**tile_case(), "sig": 1, **changes})
