"""Does a model get better by training on decoupled pictures? `python -m benchmarks.decoupled_training --out decoupled`.

Copies of the embedded model are trained on, on the same questions in the same order for the same number of steps: one
sees the images alone, the other behind each image the collage that HiDe made of it before (arXiv 2510.00054). The
vision encoder stays as it was. All of them, and the model as it was, are then asked unseen questions, plainly and with
HiDe. Images are seen in views of `VIEW` tokens, in which things are small and plain answers often wrong; collages are
cut from the images themselves.

The parts, each of which goes on where it was stopped: `pictures/` is made by `hide.evaluation.export`, and what is
trained on is read from its `messages.jsonl`, as other trainers would; `train/ARM-SEED/` has losses and checkpoint;
`answers/` the replies. At the end the tables and the picture of losses are written. `--runs images-0 decoupled-0`
does a part of the training and asking.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import DynamicCache

from benchmarks.frontier import Run, hide_way, plain_way, record_all
from benchmarks.measure import count as positive
from hide.engine.kv_cache import cache_keyword
from hide.evaluation.data import Sample, scene_questions
from hide.evaluation.export import export_here, save
from hide.evaluation.runner import evaluate
from hide.evaluation.scoring import difference, share, strict, verdict
from hide.evaluation.store import ResultFile
from hide.evaluation.tables import markdown
from hide.methods.base import NoSettings
from hide.methods.hide.method import HiDe
from hide.methods.plain import Plain
from hide.models import load
from hide.models.base import Adapter
from hide.models.checkpoint import CONFIG
from hide.output import check_folder
from hide.present.table import ResultTable
from hide.presets import RunSettings
from hide.session import preprocess
from hide.tiny import CHECKPOINT
from hide.training.loop import TRAINED, fit, save_picture
from hide.training.objectives import Loss, together
from hide.training.settings import Recipe

ARMS, SEEDS = ("images", "decoupled"), (0, 1, 2)
BEFORE = "as it was"
VIEW = 400
TOKENS = (1560, 2050)
# A step is one image, with up to `EACH` questions about it; there are IMAGES * epochs, 2,000.
IMAGES, EACH, RECIPE = 500, 3, Recipe(1e-4, 1, epochs=4)
# Of these the whole image is asked about too.
QUESTIONS, WHOLE = 500, 120
WAYS = (plain_way(VIEW), hide_way(VIEW), plain_way(None), hide_way(None))
# `benchmarks.frontier` begins at 4,000,000 and 5,000,000.
_TRAINING_SEED, _UNSEEN_SEED = 6_000_000, 6_500_000


class Example(NamedTuple):
    """An image, and of each question about it the text, the answer and the collage that HiDe made."""

    image: Path
    asked: tuple[tuple[str, str, Path], ...]


def samples(first: int, images: int | None = None, each: int | None = None) -> Iterator[Sample]:
    """Questions about scenes from a seed on, at most `each` about one."""
    seeds = count(first) if images is None else range(first, first + images)
    return (one for seed in seeds for one in scene_questions(seed, TOKENS, "2k")[:each])


def make_pictures(folder: Path, images: int) -> list[Example]:
    """Export images with HiDe's collages, and read them again."""
    hide = HiDe.from_pretrained(CHECKPOINT, view_tokens=VIEW)
    settings = {**hide.preset.to_dict(), "model": "embedded", "data": f"{images} images from seed {_TRAINING_SEED}"}
    with ResultFile(folder / "results.jsonl", settings) as results:
        evaluate(partial(export_here, hide, folder), samples(_TRAINING_SEED, images, EACH), results, progress=_tell)
        save(folder, list(results.records.values()), "messages")
    return read_examples(folder / "messages.jsonl")


def read_examples(path: Path) -> list[Example]:
    """By image; questions of which HiDe showed nothing more than the image are left out."""
    lines = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    found: dict[str, list[tuple[str, str, Path]]] = {}
    for user, assistant in lines:
        *pictures, text = user["content"]
        if len(pictures) == 2:
            image, collage = (picture["image"] for picture in pictures)
            said = assistant["content"][0]["text"]
            found.setdefault(image, []).append((text["text"], said, path.parent / collage))
    return [Example(path.parent / image, tuple(asked)) for image, asked in found.items()]


def _tell(record: dict[str, Any]) -> None:
    print(record["id"], record["error"] or "", file=sys.stderr, flush=True)


# -- training ---------------------------------------------------------------------------------------------------------


def answer_loss(model: Adapter, example: Example, run: RunSettings, *, decoupled: bool) -> Loss:
    """Cross entropy of the answers to all questions about an image, each behind the image, its collage where
    `decoupled`, and the question. The image goes through the model once, and gradients of all answers through it.
    """
    image = preprocess(model, [_rgb(example.image)], run, VIEW)
    collages = [preprocess(model, [_rgb(path)], run) if decoupled else None for *_, path in example.asked]
    with model.alone():
        vision = model.encode(image).embeddings
        shown = [model.encode(collage).embeddings for collage in collages if collage is not None]
    turns, replies, places = [], [], []
    for (prompt, answer, _), collage in zip(example.asked, collages, strict=True):
        inputs = image if collage is None else image + collage
        turns.append(model.turn(prompt, inputs))
        replies.append(model.reply_ids(answer))
        places.append(model.positions(torch.cat([turns[-1].input_ids, replies[-1]], 1), inputs)[0])
    shared = turns[0].images[0].stop
    first = turns[0].input_ids[:, :shared]
    decoder, embed = model.language_model, model.language_model.get_input_embeddings()
    cache = DynamicCache()
    kept = {cache_keyword(type(decoder).forward): cache, "use_cache": True}

    def embedded(ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return embed(ids).masked_scatter((ids == model.image_token)[..., None], features)

    decoder(inputs_embeds=embedded(first, vision), position_ids=places[0][..., :shared], **kept)
    cache.batch_repeat_interleave(len(turns))
    # Padding stands behind the answers, which do not see it. Each token is predicted from the one before.
    rest = [torch.cat([turn.input_ids, reply], 1)[0, shared:-1] for turn, reply in zip(turns, replies, strict=True)]
    length = max(map(len, rest))
    ids = torch.stack([F.pad(own, (0, length - len(own))) for own in rest])
    at = [F.pad(own[..., shared:-1], (0, length - len(one))) for own, one in zip(places, rest, strict=True)]
    states = decoder(
        inputs_embeds=embedded(ids, torch.cat([*shown, vision[:0]])),
        position_ids=torch.cat(at, dim=-2),
        **kept,
    ).last_hidden_state
    wanted = [own[len(one) - reply.shape[1] : len(one)] for own, one, reply in zip(states, rest, replies, strict=True)]
    logits = model.model.get_output_embeddings()(torch.cat(wanted)).float()
    target = torch.cat([reply[0] for reply in replies])
    return Loss(F.cross_entropy(logits, target, reduction="sum"), len(target))


def train(folder: Path, examples: Sequence[Example], arm: str, seed: int, recipe: Recipe) -> Path:
    """Train a copy of the embedded model, or go on; its checkpoint."""
    checkpoint = folder / "checkpoint"
    if (checkpoint / CONFIG[0]).is_file():
        return checkpoint
    model = load(CHECKPOINT, dtype="float32")
    run = HiDe.preset_for(model)[0].run
    parameters = {
        name: one.requires_grad_(True) for name, one in model.model.named_parameters() if "visual" not in name
    }

    def loss(images: Sequence[Example], epoch: int) -> Loss:
        return together(answer_loss(model, example, run, decoupled=arm == "decoupled") for example in images)

    def progress(step: int, steps: int) -> None:
        if step % 50 == 0 or step == steps:
            print(f"{folder.name}: {step} of {steps} steps", file=sys.stderr, flush=True)

    fit(folder, parameters, examples, loss, recipe, seed=seed, facts={"arm": arm}, progress=progress)
    new = folder / "checkpoint.new"
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(CHECKPOINT, new)
    model.model.to(torch.bfloat16).save_pretrained(new)
    # Its own config names the preset, which save_pretrained may not keep.
    shutil.copyfile(CHECKPOINT / CONFIG[0], new / CONFIG[0])
    new.rename(checkpoint)
    (folder / TRAINED).unlink()  # the checkpoint has them, in half the room
    return checkpoint


def _rgb(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


# -- asking -----------------------------------------------------------------------------------------------------------


def ask(checkpoint: str | Path, path: Path, questions: int, whole: int) -> list[dict[str, Any]]:
    """Replies to unseen questions, plainly and with HiDe, on the view and, to the first of them, on the whole image."""
    hide = HiDe.from_pretrained(checkpoint)
    runs = []
    for view in (VIEW, None):
        own = HiDe(hide.model, hide.preset.changed(view_tokens=view))
        plain = Plain(hide.model, own.preset.with_settings(NoSettings()))
        runs.append(Run(view, {plain_way(view): plain, hide_way(view): own}))
    settings = {**hide.preset.to_dict(), "data": f"from seed {_UNSEEN_SEED}", "view": VIEW}
    with ResultFile(path, settings) as results:
        chosen = list(islice(samples(_UNSEEN_SEED), questions))
        both, alone = iter(chosen[:whole]), iter(chosen[whole:])
        return [*record_all(runs, both, results), *record_all(runs[:1], alone, results)]


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(answers: dict[str, list[dict[str, Any]]]) -> list[ResultTable]:
    """Right answers of every model, their means over seeds, and how far these are apart, where all arms have as many.

    answers: by `BEFORE` and "ARM-SEED".
    """
    models = {arm: [name for name in answers if name.rpartition("-")[0] == arm] for arm in ARMS}
    models[BEFORE] = [BEFORE] * len(models[ARMS[0]])

    def judged(names: Sequence[str], way: str) -> tuple[list[bool | None], list[str]]:
        own = [one for name in names for one in answers[name] if way in one["replies"]]
        return [verdict(one, way, strict) for one in own], [one["picture"] for one in own]

    def right(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(str(share(judged(names, way)[0])) for way in WAYS)

    found = [ResultTable("Right answers", ("model", *WAYS), [(name, *right([name])) for name in answers])]
    if not models[ARMS[0]] or len({len(own) for own in models.values()}) > 1:
        return found

    def apart(one: str, way: str, other: str, than: str) -> tuple[str, str]:
        # Every seed with its like: the difference of the means. The interval resamples images, with all seeds' answers.
        (ours, groups), (theirs, _) = judged(models[one], way), judged(models[other], than)
        return f"{way}, {one}, above {than}, {other}", str(difference(ours, theirs, groups))

    rows = []
    for plain, zoomed in (WAYS[:2], WAYS[2:]):
        rows += [apart(arm, way, BEFORE, way) for way in (plain, zoomed) for arm in ARMS]
        rows += [apart(ARMS[1], way, ARMS[0], way) for way in (plain, zoomed)]
        rows += [apart(arm, zoomed, arm, plain) for arm in (BEFORE, *ARMS)]
    means = [(arm, *(f"{share(judged(own, way)[0]).value:.1%}" for way in WAYS)) for arm, own in models.items()]
    found.append(ResultTable("Means over seeds", ("trained on", *WAYS), means))
    found.append(ResultTable("Points apart, with 95 % intervals", ("what", "points"), rows))
    return found


# -- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    names = [f"{arm}-{seed}" for seed in SEEDS for arm in ARMS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("decoupled"), help="everything; goes on there")
    parser.add_argument("--images", type=positive, default=IMAGES, help=f"to train on, {RECIPE.epochs} times")
    parser.add_argument("--questions", type=positive, default=QUESTIONS, help="that are asked on the view")
    parser.add_argument("--whole", type=positive, default=WHOLE, help="of which on the whole image too")
    parser.add_argument("--runs", nargs="+", choices=[BEFORE, *names], default=[BEFORE, *names], help="all, or some")
    parser.add_argument("--rate", type=float, default=RECIPE.rate, help="the highest of AdamW")
    parser.add_argument("--threads", type=positive, default=1, help="default 1: steady beside other work")
    found = parser.parse_args(arguments)
    torch.set_num_threads(found.threads)
    out, recipe = found.out, Recipe(found.rate, RECIPE.batch, RECIPE.epochs)
    check_folder(out, ("pictures", "train", "answers", "decoupled.md", "losses.png"))
    examples = make_pictures(out / "pictures", found.images)
    for name in found.runs:
        checkpoint: str | Path = CHECKPOINT
        if name != BEFORE:
            arm, _, seed = name.rpartition("-")
            checkpoint = train(out / "train" / name, examples, arm, int(seed), recipe)
        ask(checkpoint, out / "answers" / f"{name}.jsonl", found.questions, found.whole)
    there = [name for name in (BEFORE, *names) if (out / "answers" / f"{name}.jsonl").is_file()]
    answers = {name: _answers(out / "answers" / f"{name}.jsonl") for name in there}
    command = shlex.join(
        ["python", "-m", "benchmarks.decoupled_training", *(sys.argv[1:] if arguments is None else arguments)]
    )
    made = tables(answers)
    (out / "decoupled.md").write_text(markdown("Training on decoupled pictures", command, made), encoding="utf-8")
    save_picture(out / "train", [name for name in there if name != BEFORE])
    for table in made:
        print(table.markdown())
    return 0


def _answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


if __name__ == "__main__":
    sys.exit(main())
