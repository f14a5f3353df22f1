"""Pictures with known content, and questions about them whose answers are true by construction.

A scene is a muted, cluttered background with a few objects in saturated colors. All lengths are absolute pixels, so
a small scene looks like a cut-out of a large one. Everything follows from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from hide.questions import LETTERS
from hide.questions import Question as AskedQuestion

__all__ = [
    "COLORS",
    "KINDS",
    "NUMBERS",
    "PLURALS",
    "Question",
    "Scene",
    "SceneObject",
    "draw_scene",
    "large_scene",
    "more_questions",
    "questions",
]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (255, 135, 10),
    "yellow": (250, 225, 30),
    "green": (30, 160, 50),
    "cyan": (30, 205, 220),
    "blue": (35, 70, 220),
    "purple": (125, 35, 180),
    "pink": (255, 105, 180),
}

_SUPERSAMPLING = 4
_GAP = 8  # pixels that stay free between two objects


def _turn(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def _regular(corners: int, inner: float = 1.0) -> np.ndarray:
    """Corners on the unit circle, the first one on top; with `inner`, every second one lies on a circle of that
    radius.
    """
    count = corners if inner == 1.0 else 2 * corners
    angles = np.arange(count) * (2 * math.pi / count) - math.pi / 2
    radius = np.where(np.arange(count) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 17, y / 17], axis=1)


def _cross() -> np.ndarray:
    a, b = 0.95, 0.3
    corners = [
        (-b, -a),
        (b, -a),
        (b, -b),
        (a, -b),
        (a, b),
        (b, b),
        (b, a),
        (-b, a),
        (-b, b),
        (-a, b),
        (-a, -b),
        (-b, -b),
    ]
    return np.array(corners)


_POLYGONS: dict[str, np.ndarray] = {
    "square": np.array([(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]),
    "triangle": _regular(3),
    "star": _regular(5, 0.42),
    "cross": _cross(),
    "heart": _heart(),
    "diamond": np.array([(0, -1), (0.62, 0), (0, 1), (-0.62, 0)]),
    "arrow": np.array([(-0.95, -0.25), (0.1, -0.25), (0.1, -0.75), (0.95, 0), (0.1, 0.75), (0.1, 0.25), (-0.95, 0.25)]),
}
KINDS: tuple[str, ...] = ("circle", "ring", "moon", *_POLYGONS)
PLURALS = {kind: f"{kind}es" if kind.endswith("s") else f"{kind}s" for kind in KINDS}
NUMBERS = ("one", "two", "three", "four")


@dataclass(frozen=True)
class SceneObject:
    """One object: its kind, the name of its color, and its tight half-open box (x0, y0, x1, y1) in pixels."""

    kind: str
    color: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """An RGB picture and the objects in it, in the order in which they were drawn."""

    image: Image.Image
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Question:
    """A question with its one-word answer; `targets` are the indices of the scene's objects that it is about.

    `split` is "attribute" (the color of an object) or "position" (left or right of another), or one of
    `more_questions`. `options` holds the answer and the wrong ones, in the order of the letters A, B, ...
    """

    text: str
    answer: str
    split: str
    options: tuple[str, ...]
    targets: tuple[int, ...]
    entities: tuple[str, ...]

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return LETTERS[self.options.index(self.answer)]

    @property
    def lettered_text(self) -> str:
        """The question with its options as a list of letters, and the request to answer with a letter."""
        return AskedQuestion(self.text, self.options).prompt


def _shape_mask(kind: str, size: int, angle: float) -> Image.Image:
    """The anti-aliased coverage (mode L, size x size) of one object."""
    side = size * _SUPERSAMPLING
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    center = side / 2

    def ellipse(x: float, y: float, radius: float, fill: int) -> None:
        cx, cy, r = center * (1 + x), center * (1 + y), center * radius
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)

    if kind in _POLYGONS:
        points = (_turn(_POLYGONS[kind], angle) * 0.97 + 1) * center
        draw.polygon([tuple(point) for point in points.tolist()], fill=255)
    else:
        ellipse(0, 0, 0.97, 255)
        if kind == "ring":
            ellipse(0, 0, 0.52, 0)
        elif kind == "moon":
            ellipse(0.45 * math.cos(angle), 0.45 * math.sin(angle), 0.78, 0)
    return mask.reduce(_SUPERSAMPLING)


def _muted(rng: np.random.Generator) -> tuple[int, int, int]:
    level = rng.uniform(45, 215)
    return tuple(int(c) for c in np.clip(level + rng.normal(0, 9, 3), 0, 255))  # type: ignore[return-value]


def _distractor(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    """One muted thing: a block, a facade of windows, a line, an ellipse, a polygon, or an arc; it may stick out of
    the picture.
    """
    size = float(np.exp(rng.uniform(math.log(15), math.log(320))))
    x, y = rng.uniform(-size / 2, width + size / 2), rng.uniform(-size / 2, height + size / 2)
    w, h = size * rng.uniform(0.4, 1.2, 2)
    box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    fill, what = _muted(rng), rng.integers(6)
    if what == 0:
        draw.rectangle(box, fill=fill)
    elif what == 1:
        draw.rectangle(box, fill=fill)
        pane, step, inner = _muted(rng), rng.uniform(14, 40), rng.uniform(0.35, 0.7)
        for px in np.arange(box[0] + step * 0.3, box[2] - step * inner, step):
            for py in np.arange(box[1] + step * 0.3, box[3] - step * inner, step):
                draw.rectangle((px, py, px + step * inner, py + step * inner), fill=pane)
    elif what == 2:
        angle, length = rng.uniform(0, math.pi), size * rng.uniform(1, 3)
        dx, dy = length / 2 * math.cos(angle), length / 2 * math.sin(angle)
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=fill, width=int(rng.integers(1, 9)))
    elif what == 3:
        draw.ellipse(box, fill=fill)
    elif what == 4:
        angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 7))))
        draw.polygon([(x + w / 2 * math.cos(a), y + h / 2 * math.sin(a)) for a in angles], fill=fill)
    else:
        start = rng.uniform(0, 360)
        draw.arc(box, start, start + rng.uniform(60, 320), fill=fill, width=int(rng.integers(2, 8)))


def _background(rng: np.random.Generator, width: int, height: int, clutter: float) -> Image.Image:
    rough = 96
    low = np.asarray(_muted(rng)) + rng.normal(0, 18, (height // rough + 3, width // rough + 3, 1))
    low = low + rng.normal(0, 5, (*low.shape[:2], 3))
    picture = Image.fromarray(np.clip(low, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.poisson(clutter * width * height / 5000)):
        _distractor(draw, rng, width, height)
    if clutter > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(0.8))
    return picture


def _add_grain(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Fine noise, one random tile repeated: noise for every pixel would take longer than all the rest."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    tile = rng.normal(0, 4, (min(256, height), min(256, width), 1)).round().astype(np.int16)
    grain = np.tile(tile, (-(-height // tile.shape[0]), -(-width // tile.shape[1]), 1))[:height, :width]
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def _choose(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Kinds differ as long as there are enough of them, so that "the star" is one star."""
    rounds = -(-count // len(KINDS))
    kinds = [kind for _ in range(rounds) for kind in rng.permutation(KINDS)][:count]
    return [(str(kind), str(rng.choice(list(COLORS)))) for kind in kinds]


def _place(
    rng: np.random.Generator, width: int, height: int, sizes: tuple[int, int], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int]:
    """Size and top-left corner (size, x, y) of an object that stays `_GAP` away from the others."""
    largest = min(sizes[1], width, height)
    for attempt in range(400):
        # Smaller and smaller: a crowded picture has room only for the smallest.
        size = int(rng.integers(sizes[0], max(sizes[0], round(largest - (largest - sizes[0]) * attempt / 400)) + 1))
        if size > min(width, height):
            break
        x, y = int(rng.integers(0, width - size + 1)), int(rng.integers(0, height - size + 1))
        apart = (x + size + _GAP <= a or c + _GAP <= x or y + size + _GAP <= b or d + _GAP <= y for a, b, c, d in taken)
        if all(apart):
            return size, x, y
    raise ValueError(
        f"objects: no room for {len(taken) + 1} objects of at least {sizes[0]} pixels in {width} x {height} pixels"
    )


def draw_scene(
    seed: int,
    width: int,
    height: int,
    *,
    objects: int | Sequence[tuple[str, str]] = 6,
    clutter: float = 1.0,
    object_size: tuple[int, int] = (30, 110),
) -> Scene:
    """Draw one picture.

    Args:
        seed: decides everything that the other arguments leave open.
        width, height: of the picture, in pixels.
        objects: how many, or their (kind, color) names. Up to ten drawn by number are all of different kinds.
        clutter: density of muted things in the background; 0 is none, 1 a busy picture.
        object_size: smallest and largest side of the square in which an object is drawn, in pixels.

    Raises:
        ValueError: an unknown kind or color, or no room for all objects.
    """
    rng = np.random.default_rng(seed)
    names = _choose(rng, objects) if isinstance(objects, int) else list(objects)
    for kind, color in names:
        if kind not in KINDS or color not in COLORS:
            raise ValueError(f"objects: ({kind!r}, {color!r}) is not a kind of {KINDS} in a color of {tuple(COLORS)}")
    picture = _background(rng, width, height, clutter)
    drawn: list[SceneObject] = []
    taken: list[tuple[int, int, int, int]] = []
    for kind, color in names:
        size, x, y = _place(rng, width, height, object_size, taken)
        taken.append((x, y, x + size, y + size))
        mask = _shape_mask(kind, size, rng.uniform(-0.2, 0.2))
        tint = tuple(int(c) for c in np.clip(np.asarray(COLORS[color]) + rng.integers(-12, 13, 3), 0, 255))
        picture.paste(tint, (x, y), mask)
        rows, columns = np.nonzero(np.asarray(mask) > 127)
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        box = (x + int(left), y + int(top), x + int(right), y + int(bottom))
        drawn.append(SceneObject(kind, color, box))
    return Scene(_add_grain(picture, rng), tuple(drawn))


def large_scene(seed: int, tokens: tuple[int, int]) -> Scene:
    """A cluttered picture with a number of image tokens of 28 x 28 pixels in a range; with at most one thing for each
    ten tokens, as small ones have no room for more."""
    rng = np.random.default_rng(seed)
    wanted, aspect = rng.uniform(*tokens), rng.uniform(0.8, 1.7)
    width, height = (math.ceil(28 * (wanted * ratio) ** 0.5) for ratio in (aspect, 1 / aspect))
    objects = min(int(rng.integers(5, 11)), max(2, int(wanted / 10)))
    return draw_scene(seed, width, height, objects=objects, object_size=(30, 90))


def questions(scene: Scene, rng: np.random.Generator, *, positions: int | None = None) -> list[Question]:
    """All color questions and some position questions about objects that are the only ones of their kind, in random
    order.

    Args:
        scene: what to ask about.
        rng: orders the questions and options and chooses the pairs.
        positions: at most so many position questions; by default as many as there are objects of one kind only.
    """
    kinds = [thing.kind for thing in scene.objects]
    single = [i for i, kind in enumerate(kinds) if kinds.count(kind) == 1]
    asked = []
    for i in single:
        color = scene.objects[i].color
        wrong = rng.choice([name for name in COLORS if name != color], 3, replace=False)
        options = tuple(str(option) for option in rng.permutation([color, *wrong]))
        asked.append(Question(f"What is the color of the {kinds[i]}?", color, "attribute", options, (i,), (kinds[i],)))
    # Only pairs with a clear gap between their columns: "left" must be beyond dispute.
    pairs = [(i, j) for i in single for j in single if i != j and _side(scene.objects[i], scene.objects[j])]
    limit = len(single) if positions is None else positions
    for index in rng.permutation(len(pairs))[:limit]:
        i, j = pairs[index]
        text = f"Is the {kinds[i]} on the left or right side of the {kinds[j]}?"
        options = tuple(str(option) for option in rng.permutation(["left", "right"]))
        answer = _side(scene.objects[i], scene.objects[j])
        asked.append(Question(text, answer, "position", options, (i, j), (kinds[i], kinds[j])))
    return [asked[index] for index in rng.permutation(len(asked))]


def more_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions of further kinds, in random order.

    By `split`: "vertical", whether an object is above or below another, as many as there are objects of one kind only;
    "existence", whether there is a thing of some kind, as often yes as no; "count", how many there are of a kind, one
    to four.
    """
    kinds = [thing.kind for thing in scene.objects]
    single = [i for i, kind in enumerate(kinds) if kinds.count(kind) == 1]

    def ask(text: str, answer: str, split: str, options: Sequence[str], targets: Sequence[int]) -> Question:
        shuffled = tuple(str(option) for option in rng.permutation(options))
        return Question(text, answer, split, shuffled, tuple(targets), tuple(kinds[i] for i in targets))

    pairs = [(i, j) for i in single for j in single if i != j and _level(scene.objects[i], scene.objects[j])]
    asked = [
        ask(
            f"Is the {kinds[i]} above or below the {kinds[j]}?",
            _level(scene.objects[i], scene.objects[j]),
            "vertical",
            ("above", "below"),
            (i, j),
        )
        for i, j in (pairs[index] for index in rng.permutation(len(pairs))[: len(single)])
    ]
    present = list(dict.fromkeys(kinds))
    absent = [kind for kind in KINDS if kind not in kinds]
    each = min(len(present), len(absent))
    for kind in [*rng.permutation(present)[:each], *rng.permutation(absent)[:each]]:
        there = [i for i, own in enumerate(kinds) if own == kind]
        article = "an" if kind[0] in "aeiou" else "a"
        asked.append(
            ask(f"Is there {article} {kind}?", "yes" if there else "no", "existence", ("yes", "no"), there[:1])
        )
    for kind in present:
        there = [i for i, own in enumerate(kinds) if own == kind]
        if len(there) <= len(NUMBERS):
            asked.append(ask(f"How many {PLURALS[kind]} are there?", NUMBERS[len(there) - 1], "count", NUMBERS, there))
    return [asked[index] for index in rng.permutation(len(asked))]


def _level(thing: SceneObject, other: SceneObject) -> str:
    """As `_side`, with rows for columns."""
    if thing.box[3] + _GAP <= other.box[1]:
        return "above"
    return "below" if other.box[3] + _GAP <= thing.box[1] else ""


def _side(thing: SceneObject, other: SceneObject) -> str:
    """On which side of the other a thing is; empty if their columns are less than a gap apart."""
    if thing.box[2] + _GAP <= other.box[0]:
        return "left"
    return "right" if other.box[2] + _GAP <= thing.box[0] else ""
