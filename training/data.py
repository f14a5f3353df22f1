"""Training batches for the embedded model: pictures, per-token labels, and many short conversations about each picture.

A batch holds pictures of one size. Each picture has several branches: conversations that share the picture but do
not see each other, so that one pass over the picture teaches many questions in the very form in which each is asked
alone. The texts of prompts and replies are those of `hide.methods.prompts` and `hide.tiny.letter_forms`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hide.methods import prompts
from hide.methods.hide.config import SEARCH_PROMPT
from hide.questions import LETTERS, TAGGED_LETTER_REQUEST
from hide.questions import Question as AskedQuestion
from hide.tags import CLOSE_TAG, OPEN_TAG
from hide.tiny.letter_forms import LETTER_FORMS
from hide.tiny.model import MERGE, PATCH
from hide.tiny.scenes import COLORS, KINDS, PLURALS, Question, Scene, draw_scene, more_questions, questions

__all__ = ["IGNORED", "SORTS", "TOKEN_SIDE", "Batch", "Stage", "Text", "make_batch", "prefix_ids", "token_labels"]

TOKEN_SIDE = PATCH * MERGE
IGNORED = -100
SORTS = (
    "form", "attribute", "position", "vertical", "existence", "count", "general", "letter", "box", "collage_word",
    "collage_letter", "first", "recheck",
)  # fmt: skip
"""What a token of a reply is: of its form, the answer to a question of some split, an option's letter, a box's edge;
the same behind a collage; the answers of both turns of Zoom-Refine."""
_MOST_FOR_GRADIENTS = 900  # tokens
_FIRST_SEED = 1 << 40  # evaluation draws from smaller seeds
_MOST_CROP_TOKENS = 260
_LEAST_CROP_TOKENS = 36  # as the preset "tiny" has it
_MARGIN = 0.1  # of Zoom-Refine's crops, in parts of the picture's width and height
# About how many tokens a branch has, by what it asks; for the size of a batch.
_LENGTH = {"search": 16, "box": 36, "collage": 90, "two-turn": 400}


@dataclass(frozen=True)
class Stage:
    """One stretch of the curriculum.

    `sizes` are shares of batches and, of each, the smallest and largest side of a picture in tokens; `objects` the
    range of their number; `tokens` the size of a batch, of each process. A stage with `text=False` trains the vision
    encoder alone. `asks` says how many questions of each kind a picture has, of the splits of `hide.tiny.scenes` and
    "box", "search", "general"; `letters` is the share of questions that have options. `second` are the shares of
    batches with second images: "collage" behind the picture, as HiDe and ViCrop show them, "two-turn" as Zoom-Refine.
    The positions of conversations with one are moved by up to `farthest`, as if the picture before them had been
    larger. A collage has at most `collage_side` tokens a side.
    """

    name: str
    steps: int
    rate: float
    final_rate: float
    sizes: tuple[tuple[float, tuple[int, int]], ...]
    objects: tuple[int, int]
    tokens: int
    asks: tuple[tuple[str, float], ...] = ()
    object_size: tuple[int, int] = (28, 90)
    text: bool = True
    letters: float = 0.0
    second: tuple[tuple[str, float], ...] = ()
    farthest: int = 0
    collage_side: int = 12


@dataclass
class Text:
    """The branches of a batch: B pictures, together L tokens each, E entity words, K second images of Tc tokens each.

    `labels` holds at each token the next one where the loss wants it, else `IGNORED`, and `sorts` what that is, an
    index into `SORTS`; `branch` the number of the conversation, -1 for padding. Conversation k < K shows second image
    k; words behind it name what it shows.
    """

    ids: Tensor  # (B, L) int64
    positions: Tensor  # (3, B, L) int64
    branch: Tensor  # (B, L) int64
    labels: Tensor  # (B, L) int64
    sorts: Tensor  # (B, L) int64
    right_options: Tensor  # (B, L) int64: at the word of a lettered option, whether it is the right one, else IGNORED
    words: Tensor  # (B, E) int64, indices into L
    word_colors: Tensor  # (B, E) int64, or IGNORED
    word_places: Tensor  # (B, E, 2) int64: column and row, in its picture, of the middle of what the word names
    word_boxes: Tensor  # (B, E, 4) int64: the edges of what it names in hundredths of its picture, or IGNORED
    word_cells: Tensor  # (B, E, T + Tc) bool: the tokens of the picture, and of its collage, that its boxes touch
    word_collage: Tensor  # (B, E) int64: the collage that stands before it in its conversation, or -1
    collages: Tensor  # (B, K, h, w, 3) uint8
    collage_tokens: Tensor  # (B, K, Tc) int64, indices into L
    groups: tuple[int, ...]  # lengths, together L: the conversations with a second image, and the others


@dataclass
class Batch:
    """One batch: B pictures of rows x columns tokens, T = rows * columns."""

    images: Tensor  # (B, H, W, 3) uint8
    kinds: Tensor  # (B, T) int64: index into KINDS, len(KINDS) for background, or IGNORED
    colors: Tensor  # (B, T) int64, likewise
    edges: Tensor  # (B, T, 4) float32: of the box of what covers the token, from the token's middle, in tokens; or NaN
    rows: int
    columns: int
    frozen: bool  # too large for gradients of what the pictures alone decide
    text: Text | None = None


def prefix_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens before the first picture's: system message, start of the user's message, start of the picture."""
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    return tokenizer(start)["input_ids"]


def token_labels(scene: Scene, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which kind and color covers each image token, two (rows * columns,) int64 arrays, and where its edges are,
    (rows * columns, 4) float32; see `Batch`."""
    kinds, colors = np.full((rows, columns), len(KINDS)), np.full((rows, columns), len(COLORS))
    edges = np.full((rows, columns, 4), np.nan, np.float32)
    middle = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1) + 0.5
    for thing in scene.objects:
        cover = _cover(thing.box, rows, columns)
        named: tuple[tuple[np.ndarray, str, tuple[str, ...]], ...] = (
            (kinds, thing.kind, KINDS),
            (colors, thing.color, tuple(COLORS)),
        )
        for labels, name, names in named:
            labels[cover >= 0.25] = names.index(name)
            labels[(cover > 0.04) & (cover < 0.25) & (labels == len(names))] = IGNORED
        own = np.asarray(thing.box) / TOKEN_SIDE - np.tile(middle, 2)
        edges[cover >= 0.25] = own[cover >= 0.25]
    return kinds.flatten(), colors.flatten(), edges.reshape(-1, 4)


def _cover(box: tuple[int, int, int, int], rows: int, columns: int) -> np.ndarray:
    """The part (rows, columns) of each token that a box covers, 0 to 1."""

    def overlap(start: int, end: int, count: int) -> np.ndarray:
        edges = np.arange(count) * TOKEN_SIDE
        return np.clip(np.minimum(end, edges + TOKEN_SIDE) - np.maximum(start, edges), 0, None) / TOKEN_SIDE

    return overlap(box[1], box[3], rows)[:, None] * overlap(box[0], box[2], columns)


class _Branches:
    """Collects the branches of one picture."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, scene: Scene, start: int) -> None:
        self.tokenizer, self.scene, self.start = tokenizer, scene, start
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.sorts: list[int] = []
        self.right_options: list[int] = []
        self.branch: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        self.collages: list[int] = []  # the first token of each
        self.entities: list[tuple[int, tuple[int, ...], int]] = []  # (token, objects, collage before it or -1)
        self._number, self._position, self._collage = -1, 0, -1
        kinds = [thing.kind for thing in scene.objects]
        self.objects_of = {
            tokenizer.convert_tokens_to_ids(form): tuple(i for i, own in enumerate(kinds) if own == kind)
            for kind in set(kinds)
            for name in [PLURALS[kind], *[kind] * (kinds.count(kind) == 1)]
            for form in (name, "\u0120" + name)  # byte-level BPE writes a blank so
        }

    def begin(self, shift: int = 0) -> None:
        """A new conversation; `shift` is added to all its positions."""
        self._number, self._position, self._collage = self._number + 1, self.start + shift, -1

    def show(self, grid: tuple[int, int]) -> None:
        """A second image of rows x columns tokens."""
        rows, columns = grid
        self._collage = len(self.collages)
        self.collages.append(len(self.ids) + 1)
        pads = "<|image_pad|>" * (rows * columns)
        ids = self.tokenizer(f"<|vision_start|>{pads}<|vision_end|>")["input_ids"]
        p = self._position
        places = [(p + 1, p + 1 + r, p + 1 + c) for r in range(rows) for c in range(columns)]
        end = p + 1 + max(grid)
        self._append(ids, [(p, p, p), *places, (end, end, end)])
        self._position = end + 1

    def user(self, prompt: str, options: Sequence[str] = (), answer: str = "", stem: str = "") -> None:
        """A user's text; `options` behind its `stem`, of which `answer` is the right one."""
        encoded = self.tokenizer(prompt, return_offsets_mapping=True)
        ids, base = encoded["input_ids"], len(self.ids)
        self.entities += [
            (base + i, self.objects_of[token], self._collage) for i, token in enumerate(ids) if token in self.objects_of
        ]
        self._append(ids)
        place = prompt.index(stem) + len(stem)
        for letter, option in zip(LETTERS, options, strict=False):
            listed = re.compile(rf"{letter}[).] (?={re.escape(option)})").search(prompt, place)
            assert listed is not None, "all forms list the options so"
            place = listed.end()
            token = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > place)
            self.right_options[base + token] = int(option == answer)

    def reply(self, *parts: tuple[str, str], more: bool = False) -> None:
        """The assistant's reply of (text, sort) parts, of which those with the sort "" are not to be learned; with
        `more` another turn of the user's begins behind it.
        """
        self._append(self.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
        text = "".join(part for part, _ in parts)
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids = [*encoded["input_ids"], self.tokenizer.eos_token_id]
        base = len(self.ids)
        self._append(ids)
        ends = np.cumsum([len(part) for part, _ in parts])
        for i, (first, _) in enumerate([*encoded["offset_mapping"], (len(text), 0)]):
            which = int(np.searchsorted(ends, first, side="right"))
            sort = parts[which][1] if which < len(parts) else "form"
            if sort == "box" and not text[first].isdigit():
                sort = "form"
            if sort:
                self.labels[base + i - 1], self.sorts[base + i - 1] = ids[i], SORTS.index(sort)
        if more:
            self._append(self.tokenizer("\n<|im_start|>user\n")["input_ids"])

    def _append(self, ids: Sequence[int], places: Sequence[tuple[int, int, int]] | None = None) -> None:
        if places is None:
            places = [(p, p, p) for p in range(self._position, self._position + len(ids))]
            self._position += len(ids)
        self.ids += ids
        self.positions += places
        self.branch += [self._number] * len(ids)
        for own in (self.labels, self.sorts, self.right_options):
            own += [IGNORED] * len(ids)


def _ask(branches: _Branches, question: Question, rng: np.random.Generator, letters: float, collage: bool) -> None:
    """A question, bare or with one of the requests and forms that there are, and its answer."""
    sort = "collage_word" if collage else question.split
    if rng.random() >= letters:
        request = ("", "", "", f"\n{prompts.SHORT_ANSWER}", f" {prompts.SHORT_PHRASE}")[int(rng.integers(5))]
        branches.user(question.text + request)
        branches.reply((question.answer, sort))
        return
    options = _some_options(question, rng)
    sort = "collage_letter" if collage else "letter"
    letter = (LETTERS[options.index(question.answer)], sort)
    which = int(rng.integers(-2, len(LETTER_FORMS)))
    if which < 0:  # by far the most frequent form
        which = 0
    elif rng.random() < 0.15:
        asked = AskedQuestion(question.text, options).asked(TAGGED_LETTER_REQUEST)
        branches.user(asked, options, question.answer, question.text)
        branches.reply((OPEN_TAG, "form"), letter, (CLOSE_TAG, "form"))
        return
    form = list(LETTER_FORMS.values())[which]
    branches.user(form(question.text, options), options, question.answer, question.text)
    branches.reply(letter)


def _some_options(question: Question, rng: np.random.Generator) -> tuple[str, ...]:
    """Two to five options of a question of the color, else the question's own, in any order."""
    if question.split != "attribute":
        return question.options
    wrong = rng.permutation([color for color in COLORS if color != question.answer])[: int(rng.integers(1, 5))]
    return tuple(str(option) for option in rng.permutation([question.answer, *wrong]))


def _point(branches: _Branches, target: int, rng: np.random.Generator) -> None:
    thing = branches.scene.objects[target]
    request = ("", "", f" {prompts.BOX_REQUEST}")[int(rng.integers(3))]
    branches.user(prompts.where(thing.kind) + request)
    branches.reply((prompts.box_text(thing.box, branches.scene.image.size), "box"))


def _describe(branches: _Branches) -> None:
    """The general prompt's answer is the largest thing."""
    largest = max(branches.scene.objects, key=lambda thing: thing.box[2] - thing.box[0] + thing.box[3] - thing.box[1])
    branches.user(f"{prompts.GENERAL_PROMPT} {prompts.SHORT_PHRASE}")
    branches.reply((f"a {largest.color} {largest.kind}", "general"))


@dataclass(frozen=True)
class _Zoom:
    """A question in Zoom-Refine's two turns: the box that the first reply names, and whether it is the right one."""

    question: Question
    box: tuple[int, int, int, int]
    true: bool

    def crop_box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """What the second turn shows."""
        dx, dy = _MARGIN * size[0], _MARGIN * size[1]
        x0, y0, x1, y1 = self.box
        return (
            max(0, int(x0 - dx)),
            max(0, int(y0 - dy)),
            min(size[0], int(np.ceil(x1 + dx))),
            min(size[1], int(np.ceil(y1 + dy))),
        )

    def crop_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of the crop."""
        x0, y0, x1, y1 = self.crop_box(size)
        height, width = (y1 - y0) / TOKEN_SIDE, (x1 - x0) / TOKEN_SIDE
        scale = max(1.0, (_LEAST_CROP_TOKENS / (height * width)) ** 0.5)
        return max(1, round(height * scale)), max(1, round(width * scale))


def _zoom(scene: Scene, found: Sequence[Question], rng: np.random.Generator) -> _Zoom:
    """One of the questions whose crop is not too large."""
    best: _Zoom | None = None
    for question in found:
        if not question.targets:
            continue
        boxes = np.array([scene.objects[i].box for i in question.targets])
        x0, y0, x1, y1 = (int(edge) for edge in (*boxes[:, :2].min(0), *boxes[:, 2:].max(0)))
        true = bool(rng.random() > 0.15)
        if not true:
            width, height = scene.image.size
            x, y = int(rng.integers(0, width - (x1 - x0) + 1)), int(rng.integers(0, height - (y1 - y0) + 1))
            x0, y0, x1, y1 = x, y, x + x1 - x0, y + y1 - y0
        zoom = _Zoom(question, (x0, y0, x1, y1), true)
        rows, columns = zoom.crop_grid(scene.image.size)
        if rows * columns <= _MOST_CROP_TOKENS:
            return zoom
        best = best or zoom
    assert best is not None, "every scene has a thing whose color can be asked for"
    return best


def _two_turns(
    branches: _Branches, zoom: _Zoom, grid: tuple[int, int], rng: np.random.Generator, letters: float
) -> None:
    question = zoom.question
    lettered = bool(rng.random() < letters)
    options = _some_options(question, rng) if lettered else ()
    right = LETTERS[options.index(question.answer)] if lettered else question.answer
    others = LETTERS[: len(options)] if lettered else question.options
    wrong = bool(rng.random() < 0.35)
    said = str(rng.choice([other for other in others if other != right])) if wrong else right
    asked = AskedQuestion(question.text, options)
    before, behind = prompts.ANSWER_FORM.split("{answer}")
    before_box, behind_box = prompts.BOX_FORM.split("{box}")
    branches.user(prompts.filled(prompts.ZOOM_REFINE_ASK, asked), options, question.answer, question.text)
    branches.reply(
        (before, "form"),
        (said, "" if wrong else "first"),
        (f"{behind}\n{before_box}", "form"),
        (prompts.box_text(zoom.box, branches.scene.image.size), "box" if zoom.true else ""),
        (behind_box, "form"),
        more=True,
    )
    branches.show(grid)
    branches.user(prompts.filled(prompts.ZOOM_REFINE_RECHECK, asked))
    before, behind = prompts.RECHECKED_FORM.split("{answer}")
    branches.reply((before, "form"), (right, "recheck"), (behind, "form"))


def _search_prompts(scene: Scene, rng: np.random.Generator) -> Iterator[str]:
    """Prompts that together name all things, one to three in each."""
    names = [
        f"{thing.color} {thing.kind}" if rng.random() < 0.15 else thing.kind
        for thing in (scene.objects[i] for i in rng.permutation(len(scene.objects)))
    ]
    while names:
        count = int(rng.integers(1, 4))
        yield SEARCH_PROMPT + ", ".join(names[:count])
        names = names[count:]


def _collage(
    scene: Scene, targets: Sequence[int], rng: np.random.Generator, side: int
) -> tuple[np.ndarray, dict[int, tuple[int, int, int, int]]]:
    """The collage (h, w, 3) uint8 that boxes around the targets give, with some that show other things, as HiDe's do;
    and where in it each target's box lies. `side`: its largest, in tokens.
    """
    from hide_kernels.collage import collage

    width, height = scene.image.size
    others = [i for i in range(len(scene.objects)) if i not in targets]
    boxes = [scene.objects[i].box for i in (*targets, *rng.permutation(others)[: int(rng.integers(0, 3))].tolist())]
    largest = (side // 3) * TOKEN_SIDE
    for _ in range(int(rng.integers(0, side // 3))):
        x, y, w, h = rng.integers(0, (width, height, largest, largest))
        boxes.append((x, y, x + w + TOKEN_SIDE, y + h + TOKEN_SIDE))
    limit = side * TOKEN_SIDE
    pixels = torch.from_numpy(np.array(scene.image))
    for kept in range(len(boxes), 0, -1):
        margins = rng.integers(-4, TOKEN_SIDE, (kept, 4)) * (-1, -1, 1, 1)
        loose = np.clip(np.asarray(boxes[:kept]) + margins, 0, (width, height, width, height))
        made = collage(pixels, torch.from_numpy(loose), fill=(255, 255, 255))
        assert made.image is not None and made.layout is not None  # every box has an area
        image, positions = made.image.numpy(), made.layout.positions.numpy()
        if max(image.shape[:2]) <= limit or kept == len(targets):
            break
    places = {}
    for target in targets:
        box = np.asarray(scene.objects[target].box)
        middle = (box[:2] + box[2:]) / 2
        for source, place in zip(made.boxes.numpy(), positions, strict=True):
            if (source[:2] <= middle).all() and (middle < source[2:]).all():
                x0, y0, x1, y1 = (box + np.tile(place[:2] - source[:2], 2)).clip(0, limit - 1).tolist()
                places[target] = (x0, y0, x1, y1)
    return image[:limit, :limit], places


def _pad_collages(collages: list[np.ndarray]) -> np.ndarray:
    sides = [-(-max(c.shape[axis] for c in collages) // TOKEN_SIDE) * TOKEN_SIDE for axis in (0, 1)]
    padded = np.full((len(collages), *sides, 3), 255, np.uint8)
    for target, made in zip(padded, collages, strict=True):
        target[: made.shape[0], : made.shape[1]] = made
    return padded


def _scene(stage: Stage, rng: np.random.Generator, rows: int, columns: int) -> Scene:
    while True:
        # A small picture holds fewer things; to learn what they look like, as many as there is room for.
        count = int(rng.integers(stage.objects[0], stage.objects[1] + 1))
        count = min(count, max(1, rows * columns // (7 if stage.text else 5)))
        kinds = [str(kind) for kind in rng.permutation(KINDS)[:count]]
        if count > 2 and rng.random() < 0.3:  # something to count, and to tell apart from the others
            again = min(int(rng.integers(1, 4)), count - 2)
            kinds[-again:] = [kinds[0]] * again
        try:
            return draw_scene(
                int(rng.integers(_FIRST_SEED, 1 << 62)),
                columns * TOKEN_SIDE,
                rows * TOKEN_SIDE,
                objects=[(kind, str(rng.choice(list(COLORS)))) for kind in kinds],
                clutter=float(rng.uniform(0, 1.2)),
                object_size=stage.object_size,
            )
        except ValueError:  # no room; draw other numbers
            continue


def make_batch(stage: Stage, seed: int, step: int, tokenizer: PreTrainedTokenizerFast, process: int = 0) -> Batch:
    """The batch of one step of one process; the same arguments give the same batch.

    All processes' pictures of a step have the same size, so that none waits for another.
    """
    rng = np.random.default_rng([seed, *stage.name.encode(), step])
    low, high = stage.sizes[_choose(rng, [share for share, _ in stage.sizes])][1]
    rows, columns = (int(side) for side in rng.integers(low, high + 1, 2))
    frozen = rows * columns > _MOST_FOR_GRADIENTS
    seconds = [*stage.second, ("", 1 - sum(share for _, share in stage.second))]
    second = seconds[_choose(rng, [share for _, share in seconds])][0]
    counts = {what: int(wanted + rng.random()) for what, wanted in stage.asks}
    length = sum(number * _LENGTH.get(what, 36) for what, number in counts.items()) + _LENGTH.get(second, 0)
    # Pictures without gradients cost less.
    each = rows * columns * (0.7 if frozen else 1) + length
    count = max(1, int(stage.tokens / each)) if frozen else max(2, int(stage.tokens / each))
    rng = np.random.default_rng([seed, *stage.name.encode(), step, process])
    scenes = [_scene(stage, rng, rows, columns) for _ in range(count)]
    labels = [token_labels(scene, rows, columns) for scene in scenes]
    kinds, colors, edges = (torch.from_numpy(np.stack(part)) for part in zip(*labels, strict=True))
    batch = Batch(
        images=torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])),
        kinds=kinds,
        colors=colors,
        edges=edges,
        rows=rows,
        columns=columns,
        frozen=frozen,
    )
    if stage.text:
        batch.text = _text(batch, stage, scenes, rng, tokenizer, counts, second)
    return batch


def _choose(rng: np.random.Generator, shares: Sequence[float]) -> int:
    return int(rng.choice(len(shares), p=np.asarray(shares) / sum(shares)))


def _text(
    batch: Batch,
    stage: Stage,
    scenes: list[Scene],
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerFast,
    counts: dict[str, int],
    second: str,
) -> Text:
    start = len(prefix_ids(tokenizer)) + max(batch.rows, batch.columns) + 1
    found = [[*questions(scene, rng), *more_questions(scene, rng)] for scene in scenes]
    pixels: list[np.ndarray] = []
    places: list[dict[int, tuple[int, int, int, int]]] = []
    about: list[Question] = []
    zooms: list[_Zoom] = []
    if second == "collage":
        for scene, asked in zip(scenes, found, strict=True):
            able = [question for question in asked if question.split in ("attribute", "position", "vertical")]
            about.append(able[int(rng.integers(len(able)))] if able else asked[0])
            image, where = _collage(scene, about[-1].targets, rng, stage.collage_side)
            pixels.append(image)
            places.append(where)
        collages = _pad_collages(pixels)
    elif second == "two-turn":
        zooms = [
            _zoom(scene, [asked[i] for i in rng.permutation(len(asked))], rng)
            for scene, asked in zip(scenes, found, strict=True)
        ]
        grids = np.array([zoom.crop_grid(scene.image.size) for zoom, scene in zip(zooms, scenes, strict=True)])
        height, width = (int(side) * TOKEN_SIDE for side in np.median(grids, axis=0).clip(max=16))
        for zoom, scene in zip(zooms, scenes, strict=True):
            crop = scene.image.crop(zoom.crop_box(scene.image.size))
            pixels.append(np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC)))
        collages = np.stack(pixels)
    else:
        collages = np.zeros((0, 0, 0, 3), np.uint8)
    grid = (collages.shape[1] // TOKEN_SIDE, collages.shape[2] // TOKEN_SIDE)
    shown = int(bool(second))
    all_branches = []
    for index, (scene, asked) in enumerate(zip(scenes, found, strict=True)):
        branches = _Branches(tokenizer, scene, start)
        if second:
            branches.begin(int(rng.integers(stage.farthest + 1)))
            if second == "collage":
                branches.show(grid)
                _ask(branches, about[index], rng, stage.letters, collage=True)
            else:
                _two_turns(branches, zooms[index], grid, rng, max(stage.letters, 0.5))
        for prompt in list(_search_prompts(scene, rng))[: counts.get("search", 0)]:
            branches.begin()
            branches.user(prompt)
        for _ in range(counts.get("general", 0)):
            branches.begin()
            _describe(branches)
        kinds = [thing.kind for thing in scene.objects]
        single = [i for i in rng.permutation(len(kinds)).tolist() if kinds.count(kinds[i]) == 1]
        for target in single[: counts.get("box", 0)]:
            branches.begin()
            _point(branches, target, rng)
        for split in ("attribute", "position", "vertical", "existence", "count"):
            for question in [one for one in asked if one.split == split][: counts.get(split, 0)]:
                branches.begin()
                _ask(branches, question, rng, stage.letters, collage=False)
        all_branches.append(branches)
    # The long conversation of each picture ends at the same place.
    ends = [b.branch.count(0) if second else 0 for b in all_branches]
    groups = [max(ends), max(len(b.ids) - end for b, end in zip(all_branches, ends, strict=True))]
    groups = [-(-group // 8) * 8 for group in groups if group]
    length = sum(groups)
    most = max(1, max(len(b.entities) for b in all_branches))
    size = len(scenes)
    ids = np.full((size, length), tokenizer.pad_token_id)
    branch, targets, sorts, right_options = (np.full((size, length), fill) for fill in (-1, *[IGNORED] * 3))
    positions = np.zeros((3, size, length), int)
    words, colors = np.zeros((size, most), int), np.full((size, most), IGNORED)
    word_places, word_collage = np.zeros((size, most, 2), int), np.full((size, most), -1)
    word_boxes = np.full((size, most, 4), IGNORED)
    tokens = batch.rows * batch.columns
    cells = np.zeros((size, most, tokens + grid[0] * grid[1]), bool)
    for i, (b, scene, end) in enumerate(zip(all_branches, scenes, ends, strict=True)):
        at = np.arange(len(b.ids))
        if second:
            at[end:] += groups[0] - end
        ids[i, at], branch[i, at], targets[i, at] = b.ids, b.branch, b.labels
        sorts[i, at], right_options[i, at] = b.sorts, b.right_options
        positions[:, i, at] = np.transpose(b.positions)
        for e, (token, objects, collage) in enumerate(b.entities):
            boxes = [scene.objects[which].box for which in objects]
            words[i, e], word_collage[i, e] = at[token], collage
            if collage >= 0:
                boxes = [places[i][which] for which in objects if which in places[i]]
            for box in boxes:
                if collage >= 0:
                    cells[i, e, tokens:] |= _cover(box, *grid).flatten() > 0
                else:
                    cells[i, e, :tokens] |= _cover(box, batch.rows, batch.columns).flatten() > 0
            if len(boxes) == 1:
                x0, y0, x1, y1 = boxes[0]
                colors[i, e] = tuple(COLORS).index(scene.objects[objects[0]].color)
                word_places[i, e] = (x0 + x1) // 2 // TOKEN_SIDE, (y0 + y1) // 2 // TOKEN_SIDE
                if collage < 0:
                    word_boxes[i, e] = np.round(100 * np.asarray(boxes[0]) / np.tile(scene.image.size, 2))
    first = np.array([b.collages for b in all_branches], int).reshape(size, shown, 1)
    return Text(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        branch=torch.from_numpy(branch),
        labels=torch.from_numpy(targets),
        sorts=torch.from_numpy(sorts),
        right_options=torch.from_numpy(right_options),
        words=torch.from_numpy(words),
        word_colors=torch.from_numpy(colors),
        word_places=torch.from_numpy(word_places),
        word_boxes=torch.from_numpy(word_boxes),
        word_cells=torch.from_numpy(cells),
        word_collage=torch.from_numpy(word_collage),
        collages=torch.from_numpy(collages.reshape(size, shown, *collages.shape[1:])),
        collage_tokens=torch.from_numpy(first + np.arange(grid[0] * grid[1])),
        groups=tuple(groups),
    )
