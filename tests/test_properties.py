"""What holds for every input, shown on random ones: 50 for each property, 480 with HYPOTHESIS_PROFILE=many."""

import io
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from test_collage import noise, tensor
from test_regions import assert_equal_to_scikit_image

from hide import PRESETS, HiDe
from hide.images import load_image
from hide.methods.hide.entities import MAX_ENTITIES, MAX_LENGTH, entities_by_rules, parse_entities
from hide.models.qwen2_5_vl import Qwen25VL
from hide.questions import LETTER_REQUEST, LETTERS, Question
from hide.tiny.model import build
from hide_kernels import attention_received, attention_rows, pixel_values, resize, token_maps
from hide_kernels.attention_received import torch_blocked as received_blocked
from hide_kernels.attention_rows import torch_blocked
from hide_kernels.collage import boxes as boxes_module
from hide_kernels.collage import collage, merge_boxes, plan_layout
from hide_kernels.testing import eager_attention_rows

seeds = st.integers(0, 2**32 - 1)


# Pictures

sides = st.integers(1, 9)


@st.composite
def arrays(draw):
    """A picture as an array, and the RGB or RGBA bytes that it shows."""
    channels = draw(st.sampled_from([None, 1, 3, 4]))
    shape = (draw(sides), draw(sides), *([channels] if channels else []))
    shown = np.random.default_rng(draw(seeds)).integers(0, 256, shape, dtype=np.uint8)
    kind = draw(st.sampled_from(["uint8", "float16", "float32", "float64", "bool"]))
    if kind == "bool":
        array = shown > 127
        shown = array * np.uint8(255)
    else:
        array = shown if kind == "uint8" else (shown / 255).astype(kind)
    shown = shown if channels else shown[..., None]
    return array, shown.repeat(3, 2) if shown.shape[2] == 1 else shown


@given(arrays(), st.booleans())
def test_an_array_or_tensor_shows_its_values(pair, as_tensor):
    array, shown = pair
    image = load_image(torch.from_numpy(array) if as_tensor else array)
    assert image.mode == ("RGBA" if shown.shape[2] == 4 else "RGB")
    np.testing.assert_array_equal(np.asarray(image), shown)


@given(st.sampled_from(["1", "L", "P", "LA", "RGB", "RGBA", "I;16"]), sides, sides, seeds, st.integers(1, 8))
def test_a_stored_picture_is_the_picture_in_memory_however_it_was_held(mode, width, height, seed, orientation):
    random = np.random.default_rng(seed)
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 2**16, (height, width), dtype=np.uint16))
    else:
        image = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8)).convert(mode)
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture")
        path.write_bytes(buffer.getvalue())
        read = load_image(path)
    assert read.size == ((height, width) if orientation >= 5 else (width, height))
    held = load_image(image)
    assert read.mode == held.mode and read.tobytes() == held.tobytes()


def stored(kind, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(buffer, kind, **options, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
    return buffer.getvalue()


FILES = [
    stored("PNG"), stored("JPEG"), stored("GIF"), stored("BMP"), stored("WEBP"), stored("AVIF"), stored("TIFF"),
    stored("TIFF", compression="tiff_lzw"), stored("JPEG", progressive=True),
]  # fmt: skip


@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), max_size=5),
    st.floats(0, 1),
)
def test_a_damaged_file_is_read_or_refused_by_name(data, changes, end):
    for place, content in changes:
        at = int(place * len(data))
        data = data[:at] + content + data[at + len(content) :]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "picture")
        path.write_bytes(data[: round(end * len(data))])
        try:
            assert load_image(path).mode in ("RGB", "RGBA")
        except ValueError as error:
            assert str(error).startswith(f"image: {path} ")


# Questions and entities

# Pieces that have a meaning somewhere, among any text.
pieces = st.sampled_from(
    [
        "(A) ", "(B) ", "A. ", "B) ", "C: ", "\n", "\r\n", "\u2028", "\x1c", " ", "?", ".", "!", ":", ",", "answer", "reply", "letter",
        "Respond with the letter", LETTER_REQUEST, "The best answer is:", "the ", "star", "Question: ", "<FINAL_OUTPUT>",
        "</FINAL_OUTPUT>", "</final_output>", "<FINAL_", "- ", "* ", "1. ", "[", "{", '"', "'", "“", "'s", "<|im_end|>", "\0", "İ",
    ]
)  # fmt: skip
texts = st.lists(pieces | st.text(max_size=6), max_size=25).map("".join) | st.text()
options = st.none() | st.lists(texts, max_size=27)


def parsed(text, given_options=None):
    """`None` where it is refused, which must be with the name of the argument."""
    try:
        return Question.parse(text, given_options)
    except ValueError as error:
        assert str(error).startswith(("question: ", "options: "))
        return None


@given(texts, options)
@example("Which?\n(A) x\n(A) y\n(B) z", None)
@example("Which?\n(A) x\n(B) y\n(A) z\n(B) w", None)
@example("Which?\n(A) x", ["y\n(C) z", "w"])
def test_a_question_is_refused_or_its_prompt_means_the_same_question(text, given_options):
    question = parsed(text, given_options)
    if question is not None:
        assert Question.parse(question.prompt) == question
        assert all(question.letter(f"({letter})") == letter for letter in LETTERS[: len(question.options)])


@given(texts, st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=26) | st.none(), texts)
def test_any_reply_names_one_option_or_none(text, given_options, reply):
    question = parsed(text, given_options)
    if question is not None:
        assert question.letter(reply) in {None, *LETTERS[: len(question.options)]}


@given(texts | st.text(alphabet=st.characters()), texts)
def test_entities_of_any_reply_are_unique_worded_bounded_and_without_tags(reply, request):
    items = parse_entities(reply, request).items
    assert len(items) == len(set(items)) <= MAX_ENTITIES
    for item in items:
        assert any(character.isalnum() or character == "_" for character in item) and len(item) <= MAX_LENGTH
        assert "final_output>" not in item.lower() and not {",", ";", "\n"} & set(item)
        item.encode()


words = st.text("abcdefghijklmnopqrstuvwxyzäß星", min_size=2, max_size=9).filter(lambda word: word not in ("an", "the"))
names = st.lists(st.lists(words, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=MAX_ENTITIES, unique=True)


@given(names, st.sampled_from([", ", ",", ";", "\n", "\n- ", '", "', "., the "]), texts, st.booleans())
def test_no_entity_of_a_tagged_reply_is_lost_or_moved(items, between, before, closed):
    before = before.replace("\n", " ") + "\n" if "<" not in before else ""
    reply = f"{before}<FINAL_OUTPUT>{between.join(items)}{'</FINAL_OUTPUT> Done.' if closed else ''}"
    assert parse_entities(reply).items == tuple(items)


@given(texts)
def test_entities_by_rules_are_unique_bounded_and_made_of_the_questions_words(text):
    question = parsed(text)
    if question is not None:
        items = entities_by_rules(question).items
        assert len(items) == len(set(items)) <= MAX_ENTITIES
        for item in items:
            assert 0 < len(item) <= MAX_LENGTH
            assert all(word in question.text.lower() for word in item.split(" "))


# Maps, regions

naughty = [0.0, -0.0, 1.0, 0.5, np.nan, np.inf, -np.inf, 1e-45, 1e-30, 3.4e38, -3.4e38, 1e30, 0.7]


@st.composite
def attention(draw):
    """Rows of one to three images in one dtype, and how many of them are the prior."""
    dtype = draw(st.sampled_from([np.float32, np.float64, np.float16]))
    special = [*naughty, 1e300, -1.7e308, 5e-324] if dtype == np.float64 else naughty
    elements = st.sampled_from(special) | st.floats(-2, 2, width=16)
    length = draw(st.integers(0, 5))
    images = []
    for _ in range(draw(st.integers(1, 3))):
        shape = (length, draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        with np.errstate(over="ignore"):
            values = draw(npst.arrays(np.float64, shape, elements=elements)).astype(dtype)
        images.append(torch.from_numpy(values))
    return images, draw(st.integers(0, length))


@given(attention(), st.sampled_from([0, 0.3, 1, 3.0, 50]))
def test_maps_of_any_rows_reach_from_zero_to_exactly_one_or_are_zeros_and_not_valid(rows, sigma):
    images, prior_rows = rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = token_maps(images, prior_rows=prior_rows, sigma=sigma)
    for index, maps in enumerate(found.maps):
        for one, valid in zip(maps, found.valid & (found.image_index == index), strict=True):
            assert one.max() == (1.0 if valid else 0.0)
            assert one.min() == 0


@given(attention(), st.sampled_from([0, 1]), st.integers(-20, 20))
def test_maps_do_not_depend_on_the_scale_of_the_rows(rows, sigma, power):
    images, prior_rows = rows
    # Within these bounds float64 scales by a power of two without rounding.
    images = [image.double().clamp(-1e30, 1e30) for image in images]
    images = [image.masked_fill(image.abs() < 1e-30, 0) for image in images]
    first = token_maps(images, prior_rows=prior_rows, sigma=sigma)
    again = token_maps([image * 2.0**power for image in images], prior_rows=prior_rows, sigma=sigma)
    assert torch.equal(first.valid, again.valid) and torch.equal(first.image_index, again.image_index)
    for one, other in zip(first.maps, again.maps, strict=True):
        assert torch.equal(one, other)


@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(0, 3), st.integers(1, 8), st.integers(1, 8)),
        elements=st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0, np.nan, -1.0]) | st.floats(0, 1, width=32),
    ),
    st.sampled_from([0.25, 0.5, 0.7, 1.0, -0.5]),
)
def test_regions_of_any_map_are_those_of_scikit_image(maps, threshold):
    assert_equal_to_scikit_image(maps, threshold)


# Boxes, layout, collage


def boxes_within(limit, smallest=0, **kwargs):
    @st.composite
    def box(draw):
        x0, y0 = draw(st.integers(0, limit - smallest)), draw(st.integers(0, limit - smallest))
        x1, y1 = (draw(st.integers(start + smallest, min(start + limit // 3, limit))) for start in (x0, y0))
        return x0, y0, x1, y1

    return st.lists(box(), **kwargs)


def apart(a, b):
    return a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def naive_merge(boxes):
    """Join the first pair that is not apart and start over, until there is none."""
    left = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
    while True:
        pairs = ((i, j) for i in range(len(left)) for j in range(i) if not apart(left[i], left[j]))
        pair = next(pairs, None)
        if pair is None:
            return sorted(left, key=lambda box: (box[1], box[0]))
        a, b = left.pop(pair[0]), left.pop(pair[1])
        left.append((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))


@given(boxes_within(40, max_size=24), st.sampled_from([1, 3, 256]))
def test_merging_equals_a_restarted_scan_whatever_the_order_and_the_block(boxes, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes_module, "BLOCK", block)
        got = merge_boxes(tensor(boxes))
        assert [tuple(box) for box in got.tolist()] == naive_merge(boxes)
        assert torch.equal(got, merge_boxes(tensor(boxes[::-1])))
        assert torch.equal(got, merge_boxes(got))


@given(st.integers(1, 1500), st.integers(50, 3000), st.integers(0, 40), seeds)
def test_many_boxes_merge_into_boxes_apart_that_lose_none(count, extent, largest, seed):
    random = np.random.default_rng(seed)
    corners = random.integers(0, extent, (count, 2))
    boxes = np.concatenate([corners, corners + random.integers(1, largest + 2, (count, 2))], axis=1)
    merged = merge_boxes(torch.from_numpy(boxes)).numpy()
    beside = ((merged[:, None, 2:] < merged[None, :, :2]) | (merged[None, :, 2:] < merged[:, None, :2])).any(2)
    assert (beside | np.eye(len(merged), dtype=bool)).all()
    inside = (merged[None, :, :2] <= boxes[:, None, :2]).all(2) & (boxes[:, None, 2:] <= merged[None, :, 2:]).all(2)
    assert (inside.sum(axis=1) == 1).all()
    first, last = (
        np.where(inside[..., None], boxes[:, None, part], fill)
        for part, fill in ((slice(0, 2), 2**40), (slice(2, 4), -1))
    )
    np.testing.assert_array_equal(np.concatenate([first.min(axis=0), last.max(axis=0)], axis=1), merged)


def kept(intervals):
    return [at for start, stop in intervals.tolist() for at in range(start, stop)]


def covered(boxes, height, width):
    mask = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


some_boxes = boxes_within(30, smallest=1, min_size=1, max_size=8)


@given(some_boxes)
def test_the_layout_keeps_exactly_the_covered_rows_and_columns(boxes):
    layout, mask = plan_layout(tensor(boxes)), covered(boxes, 30, 30)
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    assert kept(layout.columns) == columns.tolist()
    assert kept(layout.rows) == rows.tolist()
    assert layout.size == (len(rows), len(columns))
    for runs in (layout.columns, layout.rows):
        assert (runs[1:, 0] > runs[:-1, 1]).all()
    for (x0, y0, x1, y1), position in zip(boxes, layout.positions.tolist(), strict=True):
        left, top = columns.tolist().index(x0), rows.tolist().index(y0)
        assert position == [left, top, left + x1 - x0, top + y1 - y0]


@given(some_boxes)
def test_the_layout_keeps_left_left_and_above_above_and_draws_no_pixel_twice(boxes):
    merged = merge_boxes(tensor(boxes))
    layout = plan_layout(merged)
    source, placed = merged.numpy(), layout.positions.numpy()
    for edge in (0, 1):
        for other in (edge, edge + 2):
            before = source[:, other, None] <= source[None, :, edge]
            assert (before == (placed[:, other, None] <= placed[None, :, edge])).all()
    drawn = np.zeros(layout.size, int)
    for x0, y0, x1, y1 in placed.tolist():
        drawn[y0:y1, x0:x1] += 1
    assert drawn.max() == 1
    assert drawn.any(axis=0).all() and drawn.any(axis=1).all()
    assert drawn.sum() == covered(source.tolist(), 30, 30).sum()


@given(some_boxes)
def test_a_layout_that_is_laid_out_again_does_not_move(boxes):
    first = plan_layout(tensor(boxes))
    again = plan_layout(first.positions)
    assert again.size == first.size
    assert torch.equal(again.positions, first.positions)
    assert again.columns.tolist() == [[0, first.size[1]]]
    assert again.rows.tolist() == [[0, first.size[0]]]


@given(boxes_within(24, smallest=1, min_size=1, max_size=6), st.sampled_from([3, 4]), seeds)
def test_the_collage_is_the_source_without_the_uncovered_rows_and_columns(boxes, channels, seed):
    image = noise(24, 24, channels, seed)
    if channels == 4:
        image[..., 3] = 11 + image[..., 3] % 200
    got = collage(image, tensor(boxes))
    mask = covered(got.boxes.tolist(), 24, 24)
    assert (mask >= covered(boxes, 24, 24)).all()
    want = np.zeros((24, 24, 4), np.uint8)
    want[..., 3] = 255
    want[..., :channels] = image.numpy()
    want[~mask] = 0
    np.testing.assert_array_equal(got.image.numpy(), want[mask.any(axis=1)][:, mask.any(axis=0)])
    assert torch.equal(got.boxes, merge_boxes(tensor(boxes)))
    assert torch.equal(got.layout.positions, plan_layout(got.boxes).positions)


@given(seeds, st.sampled_from([3, 4]), *[st.integers(1, 70)] * 4, st.booleans())
def test_any_picture_resized_to_any_size_has_pillows_bits(seed, channels, height, width, rows, columns, hard):
    image = noise(height, width, channels, seed)
    if hard:
        image = (image > 127).byte() * 255
    assert torch.equal(resize(image, (rows, columns)), resize(image, (rows, columns), backend="pillow"))


@given(seeds, st.sampled_from([3, 4]), sides, sides, st.lists(st.tuples(sides, sides), min_size=1, max_size=2))
def test_any_patches_hold_the_values_that_numpy_puts_there(seed, channels, patch, merge, cells):
    sizes = [(rows * patch * merge, columns * patch * merge) for rows, columns in cells]
    settings = {"mean": (0.1, 0.2, 0.3), "std": (1, 2, 3), "patch": patch, "merge": merge, "temporal": 1 + seed % 3}
    image = noise(7 + seed % 50, 57, channels, seed)
    want = pixel_values(image, sizes, **settings, backend="pillow")
    assert torch.equal(pixel_values(image, sizes, **settings), want)


edges = st.integers(-2, 14) | st.sampled_from([-(2**63), 2**63 - 1, 2**31, 2**40])


@given(st.lists(st.tuples(edges, edges, edges, edges), max_size=5), st.sampled_from([3, 4]), seeds)
def test_any_boxes_give_a_collage_of_their_opaque_pixels_or_the_first_wrong_one_is_named(boxes, channels, seed):
    image = noise(10, 12, channels, seed)
    right = [0 <= x0 <= x1 <= 12 and 0 <= y0 <= y1 <= 10 for x0, y0, x1, y1 in boxes]
    if not all(right):
        with pytest.raises(ValueError, match=rf"^boxes\[{right.index(False)}\]: got .*x1 <= 12"):
            collage(image, tensor(boxes), alpha_threshold=100)
        return
    got = collage(image, tensor(boxes), alpha_threshold=100)
    wanted = covered(boxes, 10, 12)
    if channels == 4:
        wanted &= image[..., 3].numpy() > 100
    assert (covered(got.boxes.tolist(), 10, 12) >= wanted).all()
    assert (got.image is None) == (got.layout is None) == (len(got.boxes) == 0)


# Attention rows


@st.composite
def calls(draw):
    """Query, key, arguments of `attention_rows`, and the visible keys (B, 1, R, N) as a mask."""
    batch, kv_heads, groups, rows = (draw(st.integers(low, 3)) for low in (1, 1, 1, 0))
    depth, length = draw(st.integers(1, 9)), draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(draw(seeds))
    query = torch.randn(batch, kv_heads * groups, rows, depth, generator=generator, dtype=torch.float64) * 3
    key = torch.randn(batch, kv_heads, length, depth, generator=generator, dtype=torch.float64)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    keys = torch.arange(length)
    visible = torch.ones(batch, rows, length, dtype=torch.bool)
    arguments = {}
    if draw(st.booleans()):
        arguments["q_positions"] = positions = integers(-2, length + 3, batch, rows)
        if draw(st.booleans()):
            arguments["causal"] = True
            visible &= keys <= positions[..., None]
        if draw(st.booleans()):
            arguments["window"] = window = draw(st.integers(1, 8))
            visible &= keys > positions[..., None] - window
    for name in ("kv_starts", "kv_lens"):
        if draw(st.booleans()):
            arguments[name] = bounds = integers(-1, length + 3, batch)
            hidden = keys < bounds[:, None, None] if name == "kv_starts" else keys >= bounds[:, None, None]
            visible &= ~hidden
    if draw(st.booleans()):
        arguments["softcap"] = draw(st.floats(0.1, 10))
    if draw(st.booleans()):
        arguments["scale"] = draw(st.floats(-2, 2))
    spans = st.lists(
        st.lists(st.integers(0, length), min_size=2, max_size=2).map(lambda ends: tuple(sorted(ends))), max_size=3
    )
    arguments["key_spans"] = draw(st.none() | spans | st.lists(spans, min_size=batch, max_size=batch))
    arguments["head_reduction"] = draw(st.sampled_from(["mean", "none", "kv_group"]))
    arguments["row_reduction"] = draw(st.sampled_from([None, "sum", "mean"] if rows else [None, "sum"]))
    return query, key, arguments, visible


def columns_of(rows, key_spans):
    """The columns of the spans one after another, per sample, padded with zeros."""
    if key_spans is None:
        return rows
    nested = key_spans if key_spans and isinstance(key_spans[0], list) else [key_spans] * len(rows)
    picked = [
        torch.cat([row[..., a:b] for a, b in spans] or [row[..., :0]], -1)
        for row, spans in zip(rows, nested, strict=True)
    ]
    width = max(row.shape[-1] for row in picked)
    return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[-1])) for row in picked])


@given(calls(), st.sampled_from([1, 7, 1 << 22]))
def test_attention_rows_of_any_call_equal_the_textbook_expression(call, block):
    query, key, arguments, visible = call
    oracle = {name: arguments[name] for name in ("scale", "softcap") if name in arguments}
    want, want_lse = eager_attention_rows(query, key, visible[:, None], **oracle)
    # Keys that no row sees may hold anything.
    key = key.masked_fill(~visible.any(1)[:, None, :, None] if query.shape[2] else torch.tensor(False), torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_blocked, "BLOCK_ELEMENTS", block)
        rows, lse = attention_rows(query, key, return_lse=True, **arguments)
    groups = query.shape[1] // key.shape[1]
    want = {"none": want, "mean": want.mean(1), "kv_group": want.unflatten(1, (-1, groups)).mean(2)}[
        arguments["head_reduction"]
    ]
    want = columns_of(want, arguments["key_spans"])
    if arguments["row_reduction"]:
        want = getattr(want, arguments["row_reduction"])(-2)
    torch.testing.assert_close(rows, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@given(calls(), st.sampled_from(["sum", "mean", "max"]), st.sampled_from([1, 50, 1 << 19]), st.booleans())
def test_attention_received_of_any_call_is_the_columns_of_the_textbook_matrix(call, reduction, block, given_lse):
    query, key, arguments, visible = call
    del arguments["row_reduction"]
    oracle = {name: arguments[name] for name in ("scale", "softcap") if name in arguments}
    matrix, want_lse = eager_attention_rows(query, key, visible[:, None], **oracle)
    key = key.masked_fill(~visible.any(1)[:, None, :, None] if query.shape[2] else torch.tensor(False), torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(received_blocked, "BLOCK_ELEMENTS", block)
        patch.setattr(received_blocked, "QUERIES_AT_LEAST", 1)
        lse = want_lse if given_lse else None
        received, lse = attention_received(query, key, reduction=reduction, lse=lse, return_lse=True, **arguments)
    want = matrix.amax(2) if reduction == "max" and query.shape[2] else matrix.sum(2)
    if reduction == "mean":
        want = want / visible.sum(1).clamp(min=1)[:, None]
    groups = query.shape[1] // key.shape[1]
    want = {"none": want, "mean": want.mean(1), "kv_group": want.unflatten(1, (-1, groups)).mean(2)}[
        arguments["head_reduction"]
    ]
    torch.testing.assert_close(received, columns_of(want, arguments["key_spans"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


# All together


@pytest.fixture(scope="module")
def hide():
    config = PRESETS["tiny"].changed(min_tokens=4, max_tokens=30, max_new_tokens=1)
    return HiDe(Qwen25VL(*build()), config, extractor=lambda text: replies.text)


replies = SimpleNamespace(text="")


# A whole question takes a tenth of a second: of 480 examples it gets 80.
@settings(max_examples=max(50, settings.default.max_examples // 6))
@given(
    st.integers(1, 60), st.integers(1, 60), st.sampled_from(["L", "RGB", "RGBA", "P", "F", "CMYK"]), seeds, texts, texts
)
def test_any_picture_question_and_entity_reply_is_answered_or_refused_by_name(
    hide, width, height, mode, seed, text, reply
):
    image = Image.fromarray(noise(height, width, 4, seed).numpy()).convert(mode)
    replies.text = reply
    if parsed(text) is None:
        return
    result = hide.ask(image, text)
    assert result.question == Question.parse(text) and result.details["entities"]
    (boxes,), (shown,) = result.boxes, result.shown
    assert (shown is None) == (len(boxes) == 0)
    for x0, y0, x1, y1 in boxes.tolist():
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
