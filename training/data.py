"""Training batches for the embedded model: pictures, per-token labels, and many short conversations about each picture.

A batch holds pictures of one size. Each picture has several branches: conversations that share the picture but do
not see each other, so that one pass over the picture teaches many questions in the very form in which each is asked
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from hide.methods.hide.config import SEARCH_PROMPT
from hide.tiny.model import MERGE, PATCH
from hide.tiny.scenes import COLORS, KINDS, Question, Scene, draw_scene, questions

__all__ = ["IGNORED", "TOKEN_SIDE", "Batch", "BatchStream", "Stage", "Text", "make_batch", "prefix_ids", "token_labels"]

TOKEN_SIDE = PATCH * MERGE
IGNORED = -100
_COLLAGES = 4  # questions with a collage about one picture, at most
_MOST_FOR_GRADIENTS = 900  # tokens
_FIRST_SEED = 1 << 40  # evaluation draws from smaller seeds


@dataclass(frozen=True)
class Stage:
    """One stretch of the curriculum.

    `sides` is the smallest and largest side of a picture in tokens and `image_tokens` the size of a batch; `objects`
    the range of their number. A stage with `text=False` trains the vision encoder alone. The shares are those of
    batches whose pictures are large, of other batches with collages, and of questions asked with lettered options.
    A large batch has two pictures with sides from `large_sides`, in the two forms in which HiDe shows large pictures:
    the search prompt, and questions with a collage each. In other batches a collage's positions are moved by up to
    `farthest`, as if the picture before it had been larger. A collage has at most `collage_side` tokens a side.
    """

    name: str
    steps: int
    rate: float
    final_rate: float
    sides: tuple[int, int]
    objects: tuple[int, int]
    image_tokens: int
    object_size: tuple[int, int] = (28, 70)
    text: bool = True
    max_questions: int = 6
    letters: float = 0.0
    collages: float = 0.0
    large: float = 0.0
    large_sides: tuple[int, int] = (26, 46)
    farthest: int = 0
    collage_side: int = 9


@dataclass
class Text:
    """The branches of a batch: B pictures, together L tokens each, E entity words, K collages of Tc tokens each.

    `labels` holds at each token the next one where the loss wants it, else `IGNORED`; `branch` the number of the
    conversation, -1 for padding. Conversation k < K shows collage k, and its words name what that shows.
    """

    ids: Tensor  # (B, L) int64
    positions: Tensor  # (3, B, L) int64
    branch: Tensor  # (B, L) int64
    labels: Tensor  # (B, L) int64
    right_options: Tensor  # (B, L) int64: at the word of a lettered option, whether it is the right one, else IGNORED
    words: Tensor  # (B, E) int64, indices into L
    word_colors: Tensor  # (B, E) int64, or IGNORED
    word_places: Tensor  # (B, E, 2) int64: column and row, in its picture, of the middle of what the word names
    word_cells: Tensor  # (B, E, T + Tc) bool: the tokens of the picture, and of its collage, that its box touches
    word_collage: Tensor  # (B, E) int64: the collage that its conversation shows, or -1
    collages: Tensor  # (B, K, h, w, 3) uint8
    collage_tokens: Tensor  # (B, K, Tc) int64, indices into L


@dataclass
class Batch:
    """One batch: B pictures of rows x columns tokens, T = rows * columns."""

    images: Tensor  # (B, H, W, 3) uint8
    kinds: Tensor  # (B, T) int64: index into KINDS, len(KINDS) for background, or IGNORED
    colors: Tensor  # (B, T) int64, likewise
    rows: int
    columns: int
    frozen: bool  # too large for gradients of what the pictures alone decide
    text: Text | None = None


def prefix_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens before the first picture's: system message, start of the user's message, start of the picture."""
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    return tokenizer(start)["input_ids"]


def token_labels(scene: Scene, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Which kind and color covers each image token: two (rows * columns,) int64 arrays; see `Batch`."""
    kinds, colors = np.full((rows, columns), len(KINDS)), np.full((rows, columns), len(COLORS))
    for thing in scene.objects:
        cover = _cover(thing.box, rows, columns)
        named: tuple[tuple[np.ndarray, str, tuple[str, ...]], ...] = (
            (kinds, thing.kind, KINDS),
            (colors, thing.color, tuple(COLORS)),
        )
        for labels, name, names in named:
            labels[cover >= 0.25] = names.index(name)
            labels[(cover > 0.04) & (cover < 0.25) & (labels == len(names))] = IGNORED
    return kinds.flatten(), colors.flatten()


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
        self.right_options: list[int] = []
        self.collages: list[int] = []  # the first token of each
        self.branch: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        self.entities: list[tuple[int, int]] = []  # (token, object)
        kinds = [thing.kind for thing in scene.objects]
        self.object_of = {
            tokenizer.convert_tokens_to_ids(form): i
            for i, kind in enumerate(kinds)
            if kinds.count(kind) == 1
            for form in (kind, "\u0120" + kind)  # byte-level BPE writes a blank so
        }

    def ask(self, question: Question, *, letters: bool, collage: tuple[int, int] | None = None, shift: int = 0) -> None:
        """One conversation with a question and its answer to learn."""
        if not letters:
            self.add(question.text, question.answer, collage, shift)
            return
        self.add(question.lettered_text, question.letter, collage, shift)
        for option in question.options:
            (word,) = self.tokenizer(f" {option}")["input_ids"]
            last = len(self.ids) - 1 - self.ids[::-1].index(word)  # the question's text may hold it too
            self.right_options[last] = int(option == question.answer)

    def add(self, prompt: str, answer: str | None, collage: tuple[int, int] | None = None, shift: int = 0) -> None:
        """One conversation: [collage of rows x columns tokens,] prompt, and the answer to learn, if any; `shift` is
        added to all positions.
        """
        position, number = self.start + shift, max(self.branch, default=-1) + 1
        if collage:
            rows, columns = collage
            pads = "<|image_pad|>" * (rows * columns)
            self.collages.append(len(self.ids) + 1)
            self.ids += self.tokenizer(f"<|vision_start|>{pads}<|vision_end|>")["input_ids"]
            self.positions.append((position, position, position))
            self.positions += [
                (position + 1, position + 1 + r, position + 1 + c) for r in range(rows) for c in range(columns)
            ]
            position += 1 + max(collage)
            self.positions.append((position, position, position))
            position += 1
        question = self.tokenizer(prompt)["input_ids"]
        base = len(self.ids)
        self.entities += [
            (base + i, self.object_of[token]) for i, token in enumerate(question) if token in self.object_of
        ]
        text = list(question)
        if answer is not None:
            text += self.tokenizer(f"<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>")["input_ids"]
        self.ids += text
        self.positions += [(p, p, p) for p in range(position, position + len(text))]
        self.branch += [number] * (len(self.ids) - len(self.branch))
        self.labels += [IGNORED] * (len(self.ids) - len(self.labels))
        self.right_options += [IGNORED] * (len(self.ids) - len(self.right_options))
        if answer is not None:
            wanted = len(self.tokenizer(answer)["input_ids"]) + 1
            self.labels[-wanted - 1 : -1] = self.ids[-wanted:]


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
        # A picture of a quarter of the largest area holds fewer things.
        count = int(rng.integers(stage.objects[0], stage.objects[1] + 1))
        count = min(count, max(1, rows * columns // 7))
        try:
            return draw_scene(
                int(rng.integers(_FIRST_SEED, 1 << 62)),
                columns * TOKEN_SIDE,
                rows * TOKEN_SIDE,
                objects=count,
                clutter=float(rng.uniform(0, 1.2)),
                object_size=stage.object_size,
            )
        except ValueError:  # no room; draw other numbers
            continue


def make_batch(stage: Stage, seed: int, step: int, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """The batch of one step; the same arguments give the same batch."""
    rng = np.random.default_rng([seed, *stage.name.encode(), step])
    large = bool(rng.random() < stage.large)
    low, high = stage.large_sides if large else stage.sides
    rows, columns = (int(side) for side in rng.integers(low, high + 1, 2))
    count = max(2, stage.image_tokens // (rows * columns)) if not large else 2
    scenes = [_scene(stage, rng, rows, columns) for _ in range(count)]
    labels = [token_labels(scene, rows, columns) for scene in scenes]
    batch = Batch(
        images=torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])),
        kinds=torch.from_numpy(np.stack([kinds for kinds, _ in labels])),
        colors=torch.from_numpy(np.stack([colors for _, colors in labels])),
        rows=rows,
        columns=columns,
        frozen=rows * columns > _MOST_FOR_GRADIENTS,
    )
    if stage.text:
        batch.text = _text(batch, stage, scenes, rng, tokenizer, large=large)
    return batch


def _text(
    batch: Batch,
    stage: Stage,
    scenes: list[Scene],
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerFast,
    *,
    large: bool,
) -> Text:
    start = len(prefix_ids(tokenizer)) + max(batch.rows, batch.columns) + 1
    with_collages = large or rng.random() < stage.collages
    asked, shown = [], []
    for scene in scenes:
        found = questions(scene, rng)
        by_split = [[q for q in found if q.split == split] for split in ("attribute", "position")]
        asked.append([q for group in by_split for q in ([] if large else group[: stage.max_questions // 2])])
        most = _COLLAGES // 2 if with_collages else 0
        shown.append([q for group in by_split for q in group[-most:] if most])
    # Each picture of a batch has as many collages, all of one size.
    each = max(1, min(map(len, shown))) if with_collages else 0
    pixels, places = [], []
    for scene, about in zip(scenes, shown, strict=True):
        rng.shuffle(about)
        del about[each:]
        about += about[:1] * (each - len(about))
        made = [_collage(scene, q.targets, rng, stage.collage_side) for q in about]
        pixels += [image for image, _ in made]
        places.append([where for _, where in made])
    collages = _pad_collages(pixels) if each else np.zeros((0, 0, 0, 3), np.uint8)
    grid = (collages.shape[1] // TOKEN_SIDE, collages.shape[2] // TOKEN_SIDE)
    all_branches = []
    for index, scene in enumerate(scenes):
        branches = _Branches(tokenizer, scene, start)
        for question in shown[index]:
            shift = 0 if large else int(rng.integers(stage.farthest + 1))
            branches.ask(question, letters=rng.random() < stage.letters, collage=grid, shift=shift)
        for number, prompt in enumerate(_search_prompts(scene, rng)):
            if large or number == 0:
                branches.add(prompt, None)
        for question in asked[index]:
            branches.ask(question, letters=rng.random() < stage.letters)
        all_branches.append(branches)
    length = -(-max(len(b.ids) for b in all_branches) // 8) * 8
    most = max(1, max(len(b.entities) for b in all_branches))
    size = len(scenes)
    ids = np.full((size, length), tokenizer.pad_token_id)
    branch, targets, right_options = (np.full((size, length), fill) for fill in (-1, IGNORED, IGNORED))
    positions = np.zeros((3, size, length), int)
    words, colors = np.zeros((size, most), int), np.full((size, most), IGNORED)
    word_places, word_collage = np.zeros((size, most, 2), int), np.full((size, most), -1)
    tokens = batch.rows * batch.columns
    cells = np.zeros((size, most, tokens + grid[0] * grid[1]), bool)
    for i, (b, scene) in enumerate(zip(all_branches, scenes, strict=True)):
        used = len(b.ids)
        ids[i, :used], branch[i, :used], targets[i, :used] = b.ids, b.branch, b.labels
        right_options[i, :used] = b.right_options
        positions[:, i, :used] = np.transpose(b.positions)
        for e, (token, which) in enumerate(b.entities):
            x0, y0, x1, y1 = box = scene.objects[which].box
            number = b.branch[token]
            if number < each:
                x0, y0, x1, y1 = box = places[i][number][which]
                cells[i, e, tokens:] = _cover(box, *grid).flatten() > 0
                word_collage[i, e] = number
            else:
                cells[i, e, :tokens] = _cover(box, batch.rows, batch.columns).flatten() > 0
            words[i, e], colors[i, e] = token, tuple(COLORS).index(scene.objects[which].color)
            word_places[i, e] = (x0 + x1) // 2 // TOKEN_SIDE, (y0 + y1) // 2 // TOKEN_SIDE
    first = np.array([b.collages for b in all_branches], int).reshape(size, each, 1)
    return Text(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        branch=torch.from_numpy(branch),
        labels=torch.from_numpy(targets),
        right_options=torch.from_numpy(right_options),
        words=torch.from_numpy(words),
        word_colors=torch.from_numpy(colors),
        word_places=torch.from_numpy(word_places),
        word_cells=torch.from_numpy(cells),
        word_collage=torch.from_numpy(word_collage),
        collages=torch.from_numpy(collages.reshape(size, each, *collages.shape[1:])),
        collage_tokens=torch.from_numpy(first + np.arange(grid[0] * grid[1])),
    )


class BatchStream(IterableDataset):
    """The batches of a stage from a given step on, for a data loader with one worker process."""

    def __init__(self, stage: Stage, seed: int, first: int, tokenizer: PreTrainedTokenizerFast) -> None:
        self.stage, self.seed, self.first, self.tokenizer = stage, seed, first, tokenizer

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        for step in range(self.first, self.stage.steps):
            yield make_batch(self.stage, self.seed, step, self.tokenizer)
