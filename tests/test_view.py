"""A session that looks at images in few tokens and cuts out of them at full resolution."""

import dataclasses

import pytest
import torch
from PIL import Image

from hide import HiDe, open_session
from hide.images import to_tensor
from hide.methods.hide.method import region_boxes
from hide.presets import RunSettings
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene
from hide_kernels.collage import collage

QUESTION = "Is the star on the left or right side of the ring?"
SIZE = (1120, 840)


@pytest.fixture(scope="module")
def hide():
    return HiDe.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def image():
    return draw_scene(5, *SIZE, objects=[("star", "red"), ("ring", "blue")], object_size=(60, 110)).image


@pytest.mark.parametrize("view", [48, 130])
def test_a_view_gives_the_maps_of_the_image_resized_by_hand_and_crops_of_the_image_itself(hide, image, view):
    run = hide.preset.run
    with hide.changed(view_tokens=view).open(image) as session:
        (rows, columns), (tokens,) = session.inputs.grids[0], session.image_tokens
        assert tokens == rows * columns <= view
        maps = hide.maps(hide.attention_rows(session, "star, ring"))
        zoom = hide.zoom(session, maps)
    by_hand = image.resize((28 * columns, 28 * rows), Image.Resampling.BICUBIC)
    with open_session(hide.model, by_hand, run) as session:
        assert session.image_tokens == (tokens,)
        again = hide.maps(hide.attention_rows(session, "star, ring"))
    assert all(map(torch.equal, maps.tokens.maps, again.tokens.maps)) and maps.labels == again.labels
    boxes = region_boxes(maps.by_image[0][0], hide.settings.threshold, SIZE)
    assert len(boxes)
    want = collage(to_tensor(image), boxes, fill=hide.settings.fill)
    assert torch.equal(zoom.collages[0].image, want.image) and torch.equal(zoom.collages[0].boxes, want.boxes)


def test_an_image_that_exif_turns_is_looked_at_and_cut_upright(hide, image, tmp_path):
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    small = hide.changed(view_tokens=130)
    upright, found = (small.ask(one, QUESTION) for one in (image, tmp_path / "turned.png"))
    assert torch.equal(found.boxes[0], upright.boxes[0]) and len(found.boxes[0])
    assert found.images[0].size == SIZE and torch.equal(to_tensor(found.shown[0]), to_tensor(upright.shown[0]))


def test_collages_of_a_view_keep_to_the_opaque_parts_of_the_image(hide, image):
    clear = image.convert("RGBA")
    alpha = Image.new("L", SIZE, 0)
    alpha.paste(255, (0, 0, 700, 840))
    clear.putalpha(alpha)
    with hide.changed(view_tokens=130).open(clear) as session:
        maps = hide.maps(hide.attention_rows(session, "star, ring"))
        # Every cell, those that are transparent too.
        whole = dataclasses.replace(maps, tokens=maps.tokens._replace(maps=(torch.ones_like(maps.tokens.maps[0]),)))
        made = hide.zoom(session, whole).collages[0]
    assert made.boxes.tolist() == [[0, 0, 700, 840]]
    assert torch.equal(made.image, to_tensor(image)[:, :700])


def test_collages_have_the_budget_of_the_run_and_not_that_of_the_view(hide, image):
    small = hide.changed(view_tokens=48, max_tokens=400)
    answer = small.ask(image, QUESTION)
    with small.open(image) as session:
        assert session.image_tokens[0] <= 48
        assert session.prepare([image]).tokens[0] > 48
    assert answer.image_tokens[0] <= 48 and answer.boxes[0].numel()
    assert answer.boxes[0][:, 2].max() <= SIZE[0] and answer.boxes[0].max() > 28 * 8


def test_without_a_view_or_with_one_that_is_larger_nothing_changes(hide, image):
    whole = hide.ask(image, QUESTION)
    for changed in (hide.changed(view_tokens=10**6), hide.changed(view_tokens=None)):
        answer = changed.ask(image, QUESTION)
        assert (answer.text, answer.image_tokens) == (whole.text, whole.image_tokens)
        assert torch.equal(answer.boxes[0], whole.boxes[0])


@pytest.mark.parametrize("view, error", [(0, ValueError), (-5, ValueError), (True, TypeError), (2.5, TypeError)])
def test_a_view_of_no_tokens_is_refused(view, error):
    with pytest.raises(error, match="view_tokens"):
        RunSettings(view_tokens=view)
