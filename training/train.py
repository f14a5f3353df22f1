"""Train the embedded model: `make train`, or `python -m training.train --output DIRECTORY`.

First the vision encoder alone learns what covers each image token; then the whole model answers several questions
about each picture, on pictures that grow. Linear heads, dropped at the end, keep teaching what lies where: one per
image token, and one at each entity word, which makes the word itself fetch what it names.

Each of the processes draws its own batch and works with one thread, and they average their gradients: two of them made
the shipped weights. Everything follows from the seed and the number of processes. The directory holds the losses as
JSON lines and as a picture; a run that is started again with it goes on where it stopped, to the same weights bit by
bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hide.tiny import model as tiny
from hide.tiny.scenes import COLORS, KINDS
from training.batched import encode_images, image_positions, image_to_patches, run_text
from training.data import IGNORED, SORTS, TOKEN_SIDE, Batch, Stage, Text, make_batch, prefix_ids

__all__ = ["STAGES", "Heads", "losses", "main", "train"]

# Pictures of 16 to 100 tokens, of about 600, and of up to 2,100, which take no gradients.
_SMALL, _MIDDLE, _LARGE = (4, 10), (10, 27), (28, 46)
_WORDS = (("attribute", 2.0), ("position", 1.0), ("vertical", 0.5), ("existence", 0.5), ("count", 0.3))
_ALL = (*_WORDS, ("box", 2.0), ("search", 1.0), ("general", 0.2))
_SECOND = (("collage", 0.35), ("two-turn", 0.3))
_POINT = (("attribute", 1.0), *_WORDS[1:], ("box", 5.0), ("search", 1.0), ("general", 0.2))
STAGES: tuple[Stage, ...] = (
    Stage("vision", 500, 3e-3, 2e-4, ((1.0, (4, 8)),), (2, 6), 1200, text=False),
    Stage("few", 1200, 7e-4, 5e-4, ((1.0, (4, 7)),), (2, 4), 2000, _ALL),
    Stage("more", 2200, 6e-4, 4e-4, ((1.0, _SMALL),), (2, 7), 2500, _ALL, letters=0.4, second=_SECOND, farthest=40),
    Stage(
        "many",
        1300,
        5e-4,
        3e-4,
        ((0.5, _SMALL), (0.35, _MIDDLE), (0.15, _LARGE)),
        (3, 9),
        3000,
        _ALL,
        letters=0.4,
        second=_SECOND,
        farthest=60,
    ),
    Stage(
        "all",
        800,
        3e-4,
        1e-5,
        ((0.4, _SMALL), (0.3, _MIDDLE), (0.3, _LARGE)),
        (3, 10),
        3000,
        _ALL,
        letters=0.4,
        second=_SECOND,
        farthest=75,
    ),
    # In larger pictures a box takes edges to a hundredth, which come last.
    Stage(
        "point",
        1900,
        4e-4,
        1e-5,
        ((0.1, _SMALL), (0.7, (14, 27)), (0.2, _LARGE)),
        (3, 10),
        3000,
        _POINT,
        letters=0.4,
        second=(("collage", 0.25), ("two-turn", 0.25)),
        farthest=75,
    ),
)
_DENSE_WEIGHT, _EDGE_WEIGHT, _WORD_WEIGHT, _PLACE_WEIGHT, _SPOT_WEIGHT = 1.0, 1.0, 0.5, 0.4, 10.0
# Tokens of a reply's form are many and easy; of a box's four edges each counts for less than an answer.
_FORM_WEIGHT, _BOX_WEIGHT = 0.1, 0.5
# Edges near the right one are nearly right: the loss wants a bell of so many hundredths.
_EDGE_SIGMA = 1.0
# Image tokens learn their own place behind this layer, so that later ones can look it up.
_PLACE_LAYER, _PLACES = 1, 48
# At these layers, words are taught to put at least this part of their attention on what they name: at the first by what
# it looks like, at the second to read its color and place.
_LOOK_LAYERS, _LOOK_PART, _LOOK_WEIGHT = (0, 2), 0.5, 0.2
# Behind these layers, a word is to know the color and place of what it names, and the word of a lettered option whether
# it is the right one.
_WORD_LAYER, _OPTION_LAYER = 3, 4
# Of the layers' matrices, whose steps Muon makes orthogonal; the rest is AdamW's.
_MUON_RATE = 5.0
_SAVE_EVERY, _LOG_EVERY, _WARM_UP = 100, 10, 40


class Heads(nn.Module):
    """The linear heads that only training uses: what covers an image token, how far its edges are and where the token
    lies, and where in the picture the edges are; the color, place and box of what a word names; whether a lettered
    option is the right one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, len(KINDS) + 1 + len(COLORS) + 1)
        self.edges = nn.Linear(width, 4)
        self.spot = nn.Linear(width, 4)
        self.place = nn.Linear(width, 2 * _PLACES)
        self.word = nn.Linear(width, len(COLORS) + 2 * _PLACES)
        self.box = nn.Linear(width, 4 * len(tiny.COORDINATES))
        self.option = nn.Linear(width, 2)


@dataclass
class Step:
    """The loss to minimise and what to log of one batch."""

    loss: Tensor
    log: dict[str, float]


def _dense_loss(heads: Heads, features: Tensor, batch: Batch) -> Step:
    kind, color = heads.dense(features).float().split([len(KINDS) + 1, len(COLORS) + 1], dim=-1)
    log, total = {}, torch.zeros(())
    for name, logits, labels, names in (("kind", kind, batch.kinds, KINDS), ("color", color, batch.colors, COLORS)):
        weight = torch.ones(len(names) + 1)
        weight[-1] = 0.15  # most tokens are background
        total = total + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight, ignore_index=IGNORED)
        on_object = (labels != IGNORED) & (labels != len(names))
        log[name] = (logits.argmax(-1) == labels)[on_object].float().mean().item()
    known = ~batch.edges.isnan()
    off = F.smooth_l1_loss(heads.edges(features).float()[known], batch.edges[known], beta=0.5)
    log["edge"] = off.item()
    total = total + _EDGE_WEIGHT * off
    log["dense_loss"] = total.item()
    return Step(total, log)


def _attention_bias(branch: Tensor, prefix: int) -> Tensor:
    """(B, 1, S, S): causal; a branch sees all of the prefix, and of the rest only itself."""
    batch, length = branch.shape
    total = prefix + length
    allowed = torch.ones(total, total, dtype=torch.bool).tril().repeat(batch, 1, 1)
    allowed[:, prefix:, prefix:] &= branch[:, :, None] == branch[:, None, :]
    return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))[:, None]


def _unit(states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:])


def _place_loss(logits: Tensor, places: Tensor) -> tuple[Tensor, float]:
    """Cross entropy of column and row (..., 2 * _PLACES) against places (..., 2) int64 in tokens, and the accuracy."""
    guess = logits.float().unflatten(-1, (2, _PLACES))
    wanted = places.clamp(max=_PLACES - 1)
    right = (guess.argmax(-1) == wanted).float().mean().item()
    return F.cross_entropy(guess.reshape(-1, _PLACES), wanted.reshape(-1)), right


def _near(likely: Tensor, right: Tensor) -> Tensor:
    """Cross entropy of log probabilities (..., hundredths) against a bell around the right ones (...)."""
    place = torch.arange(likely.shape[-1])
    bell = torch.softmax(-((place - right[..., None]) ** 2) / (2 * _EDGE_SIGMA**2), dim=-1)
    return -(bell * likely).sum(-1)


def _answer_losses(model: Any, tokenizer: Any, hidden: Tensor, text: Text) -> Step:
    """Cross entropy of what is to be said, and per sort how often the likeliest token is right: of boxes, the mean
    distance of edges in hundredths.
    """
    wanted = text.labels != IGNORED
    logits, labels, sorts = model.lm_head(hidden[wanted]).float(), text.labels[wanted], text.sorts[wanted]
    weight = torch.ones(len(SORTS))
    weight[SORTS.index("form")], weight[SORTS.index("box")] = _FORM_WEIGHT, _BOX_WEIGHT
    likely = F.log_softmax(logits, dim=-1)
    loss = -likely.gather(1, labels[:, None])[:, 0]
    edge = sorts == SORTS.index("box")
    guess = logits.argmax(-1)
    log = {}
    if edge.any():
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(tiny.COORDINATES)))
        right = (labels[edge][:, None] == ids).float() @ torch.arange(len(ids)).float()
        loss = loss.masked_scatter(edge, _near(likely[edge][:, ids], right))
        off = (logits[edge][:, ids].argmax(-1) - right).abs()
        log["box_off"], log["box_near"] = off.mean().item(), (off <= 2).float().mean().item()
    answer = (loss * weight[sorts]).sum() / weight[sorts].sum()
    log["answer_loss"] = answer.item()
    for index, name in enumerate(SORTS):
        own = sorts == index
        if name != "box" and own.any():
            log[name] = (guess == labels)[own].float().mean().item()
    return Step(answer, log)


def _text_losses(
    model: Any,
    heads: Heads,
    tokenizer: Any,
    batch: Batch,
    text: Text,
    features: Tensor,
    row_layers: tuple[int, ...],
    look_weight: float,
) -> Step:
    size = len(text.ids)
    before = prefix_ids(tokenizer)
    embed = model.get_input_embeddings()
    fixed = embed(torch.tensor([*before, model.config.vision_end_token_id])).expand(size, -1, -1)
    branches = embed(text.ids)
    collages, (rows, columns) = text.collages.shape[1], (side // TOKEN_SIDE for side in text.collages.shape[2:4])
    if collages:
        shown = encode_images(model, image_to_patches(text.collages.flatten(0, 1)), rows, columns)
        at = text.collage_tokens.flatten(1)[..., None].expand(-1, -1, branches.shape[-1])
        branches = branches.scatter(1, at, shown.to(branches.dtype).reshape(at.shape))
    first, tokens = len(before), batch.rows * batch.columns
    prefix = first + tokens + 1
    embeddings = torch.cat([fixed[:, :first], features.to(fixed.dtype), fixed[:, first:], branches], dim=1)
    places = image_positions(batch.rows, batch.columns)
    grid = torch.cat([torch.zeros(1, tokens, dtype=torch.long), places]) + first
    last = torch.full((3, 1), first + max(batch.rows, batch.columns))
    shared = torch.cat([torch.arange(first).expand(3, -1), grid, last], dim=1)
    out = run_text(
        model,
        embeddings,
        torch.cat([shared[:, None].expand(-1, size, -1), text.positions], dim=2),
        _attention_bias(text.branch, prefix),
        frozen=prefix if batch.frozen else 0,
        groups=text.groups,
        row_indices=text.words + prefix,
        row_layers=tuple(sorted({*(_LOOK_LAYERS if look_weight else ()), *row_layers})),
        state_layers=(_PLACE_LAYER, _WORD_LAYER, _OPTION_LAYER),
    )
    answers = _answer_losses(model, tokenizer, out.hidden[:, prefix:], text)
    log = answers.log
    lettered = text.right_options != IGNORED
    option = torch.zeros(())
    if lettered.any():
        logits, labels = (
            heads.option(_unit(out.states[_OPTION_LAYER][:, prefix:][lettered])).float(),
            text.right_options[lettered],
        )
        option = F.cross_entropy(logits, labels)
        log["option"] = (logits.argmax(-1) == labels).float().mean().item()

    # Frozen image tokens cannot learn their place: the head alone would learn to make up for it.
    learning = [] if batch.frozen else [(out.states[_PLACE_LAYER][:, first : first + tokens], places)]
    if collages:
        at = (text.collage_tokens + prefix).flatten(1)[..., None].expand(-1, -1, out.hidden.shape[-1])
        learning.append((out.states[_PLACE_LAYER].gather(1, at), image_positions(rows, columns).repeat(1, collages)))
    image_place = torch.zeros(())
    if learning:
        states = _unit(torch.cat([chosen for chosen, _ in learning], dim=1))
        own = torch.cat([chosen.flip(0).T for _, chosen in learning]).expand(size, -1, -1)
        image_place, log["image_place"] = _place_loss(heads.place(states), own)

    # Linear, so that a word that looks at all tokens of a thing reads the mean of what they know.
    spot = torch.zeros(())
    known = ~batch.edges.isnan().any(-1)
    if not batch.frozen and known.any():
        own = batch.edges + (places.flip(0).T + 0.5).repeat(1, 2)
        wanted = (own / torch.tensor([batch.columns, batch.rows] * 2))[known]
        states = _unit(out.states[_PLACE_LAYER][:, first : first + tokens][known])
        spot = F.smooth_l1_loss(heads.spot(states).float(), wanted, beta=0.02)
        log["spot"] = spot.item()

    # At the word itself: what it names has which color, and lies where?
    states = _unit(out.states[_WORD_LAYER][:, prefix:])
    read = text.word_colors != IGNORED
    word_color = word_place = word_box = torch.zeros(())
    if read.any():
        picked = states.gather(1, text.words[..., None].expand(-1, -1, states.shape[-1]))[read]
        color, place = heads.word(picked).float().split([len(COLORS), 2 * _PLACES], dim=-1)
        word_color = F.cross_entropy(color, text.word_colors[read])
        log["word_color"] = (color.argmax(-1) == text.word_colors[read]).float().mean().item()
        word_place, log["word_place"] = _place_loss(place, text.word_places[read])
        pointed = text.word_boxes[read][:, 0] != IGNORED
        if pointed.any():
            edges = F.log_softmax(heads.box(picked[pointed]).float().unflatten(-1, (4, -1)), dim=-1)
            word_box = _near(edges, text.word_boxes[read][pointed]).mean()
            log["word_box"] = word_box.item()

    valid = text.word_cells.any(-1)
    look = torch.zeros(())
    if out.rows and valid.any():
        cells, plain = text.word_cells[valid], text.word_collage[valid] < 0
        on_images = {layer: row[valid][:, first : first + tokens] for layer, row in out.rows.items()}
        if collages:
            picture = torch.arange(size)[:, None].expand(text.words.shape)[valid]
            at = text.collage_tokens[picture, text.word_collage[valid].clamp(min=0)] + prefix
            on_images = {
                layer: torch.cat([on_images[layer], row[valid].gather(1, at)], dim=-1)
                for layer, row in out.rows.items()
            }
        if look_weight:
            on_object = torch.stack([(on_images[layer] * cells).sum(-1) for layer in _LOOK_LAYERS])
            look = F.relu(math.log(_LOOK_PART) - (on_object + 1e-6).log()).mean()
            log["look_loss"] = look.item()
        for layer in row_layers:
            on_picture, in_picture = on_images[layer][plain, :tokens], cells[plain, :tokens]
            log[f"inside_{layer}"] = ((on_picture * in_picture).sum(-1) / on_picture.sum(-1)).mean().item()
    taught = _WORD_WEIGHT * (word_color + option) + _PLACE_WEIGHT * (
        image_place + _SPOT_WEIGHT * spot + word_place + word_box
    )
    return Step(answers.loss + taught + look_weight * look, log)


def losses(
    model: Any,
    heads: Heads,
    tokenizer: Any,
    batch: Batch,
    *,
    row_layers: tuple[int, ...] = (),
    look_weight: float = _LOOK_WEIGHT,
) -> Step:
    """Loss and accuracies of one batch; `row_layers` are the layers whose attention shares to log, and with a
    `look_weight` of 0 attention is not taught."""
    with torch.autocast("cpu", torch.bfloat16):
        patches = image_to_patches(batch.images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not batch.frozen):
            features = encode_images(model, patches, batch.rows, batch.columns)
        dense = _dense_loss(heads, features, batch)
        if batch.text is None:
            return dense
        answers = _text_losses(model, heads, tokenizer, batch, batch.text, features, row_layers, look_weight)
    return Step(answers.loss + _DENSE_WEIGHT * dense.loss, {**dense.log, **answers.log})


def _rate(stage: Stage, step: int) -> float:
    done = step / stage.steps
    return min(1.0, (step + 1) / _WARM_UP) * (
        stage.final_rate + (stage.rate - stage.final_rate) * (1 + math.cos(math.pi * done)) / 2
    )


class _Run:
    """Model, heads and optimisers, and their files in the output directory."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.model: Any
        self.model, self.tokenizer, self.processor = tiny.build(seed)
        torch.manual_seed(seed)
        self.heads = Heads(self.model.config.text_config.hidden_size)
        self.modules = nn.ModuleDict({"model": self.model, "heads": self.heads})
        named = dict(self.modules.named_parameters())
        hidden = [
            name
            for name, parameter in named.items()
            if parameter.dim() == 2 and (".layers." in name or ".blocks." in name)
        ]
        others = [name for name in named if name not in hidden]
        self.muon = torch.optim.Muon(
            [named[name] for name in hidden], lr=1e-3, weight_decay=0.03, adjust_lr_fn="match_rms_adamw"
        )
        groups = [
            {"params": [named[name] for name in others if named[name].dim() >= 2], "weight_decay": 0.03},
            {"params": [named[name] for name in others if named[name].dim() < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)
        self.named = named
        self.stage, self.step = 0, 0
        if (directory / "state.json").is_file():
            self._load()

    def update(self, rate: float, processes: int, *, text: bool) -> float:
        """Average the processes' gradients and make one step; the norm of the gradients."""
        if text:
            # What this batch does not use, another process's may.
            for parameter in self.named.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.named.values() if parameter.grad is not None]
        if processes > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            flat /= processes
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer, faster in ((self.muon, _MUON_RATE), (self.adam, 1.0)):
            for group in optimizer.param_groups:
                group["lr"] = rate * faster
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def _states(self) -> dict[str, dict[str, Any]]:
        return {
            name: state
            for name, parameter in self.named.items()
            for optimizer in (self.muon, self.adam)
            if (state := optimizer.state.get(parameter))
        }

    def save(self) -> None:
        """Write all that a later run needs to go on; the JSON file comes last and names the tensors' file."""
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in self.named.items()}
        for name, state in self._states().items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        file = f"state-{self.stage}-{self.step}.safetensors"
        save_file(tensors, self.directory / file)
        new = self.directory / "state.json.new"
        new.write_text(json.dumps({"stage": self.stage, "step": self.step, "file": file}), encoding="utf-8")
        new.replace(self.directory / "state.json")
        for old in self.directory.glob("state-*.safetensors"):
            if old.name != file:
                old.unlink()
        tiny.save(self.directory / "checkpoint", self.model, self.tokenizer, self.processor)

    def _load(self) -> None:
        state = json.loads((self.directory / "state.json").read_text(encoding="utf-8"))
        self.stage, self.step = state["stage"], state["step"]
        tensors = load_file(self.directory / state["file"])
        muon = {parameter for group in self.muon.param_groups for parameter in group["params"]}
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                prefix = f"optimizer.{name}."
                own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                if own:
                    (self.muon if parameter in muon else self.adam).state[parameter] = own

    def log(self, entry: dict[str, Any]) -> None:
        """Add a line to the log."""
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(" ".join(f"{key}={value}" for key, value in entry.items()), flush=True)


def _work(
    process: int,
    directory: Path,
    seed: int,
    processes: int,
    stages: tuple[Stage, ...],
    look_weight: float,
    steps: int | None,
) -> None:
    """One process's part of a run."""
    torch.set_num_threads(1)
    if processes > 1:
        meeting = directory / f"meeting-{os.getppid()}"
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting.absolute()}", rank=process, world_size=processes
        )
    parent = torch.multiprocessing.parent_process()
    run = _Run(directory, seed)
    all_layers = tuple(range(run.model.config.text_config.num_hidden_layers))
    done = 0
    while run.stage < len(stages):
        stage = stages[run.stage]
        while run.step < stage.steps:
            # Workers outlive a parent that is killed, and would write into the files of the next run.
            if done == steps or not (parent is None or parent.is_alive()):
                return
            began = time.perf_counter()
            logged = process == 0 and run.step % _LOG_EVERY == 0
            batch = make_batch(stage, seed, run.step, run.tokenizer, process)
            drawn = time.perf_counter()
            layers = all_layers if stage.text and logged else ()
            step = losses(run.model, run.heads, run.tokenizer, batch, row_layers=layers, look_weight=look_weight)
            step.loss.backward()
            norm = run.update(_rate(stage, run.step), processes, text=stage.text)
            if logged:
                run.log(
                    {
                        "stage": stage.name,
                        "step": run.step,
                        "grid": [batch.rows, batch.columns, len(batch.images)],
                        "loss": round(step.loss.item(), 4),
                        "gradient": round(norm, 3),
                        "drawing": round(drawn - began, 3),
                        "seconds": round(time.perf_counter() - began, 3),
                        **{key: round(value, 4) for key, value in step.log.items()},
                    }
                )
            run.step, done = run.step + 1, done + 1
            if process == 0 and run.step % _SAVE_EVERY == 0:
                run.save()
        run.stage, run.step = run.stage + 1, 0
        if process == 0:
            run.save()
            plot(directory)


def train(
    directory: str | Path,
    *,
    seed: int = 0,
    processes: int = 2,
    stages: tuple[Stage, ...] = STAGES,
    look_weight: float = _LOOK_WEIGHT,
    steps: int | None = None,
) -> None:
    """Run, or go on with, all stages; writes `checkpoint/`, `log.jsonl` and `curves.png` into the directory.

    processes: how many batches make a step, each in a process of its own with one thread. look_weight: of the loss on
    the attention itself; 0: none. steps: stop after so many without saving, as a run that is killed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arguments = (directory, seed, processes, stages, look_weight, steps)
    if processes == 1:
        _work(0, *arguments)
    else:
        torch.multiprocessing.spawn(_work, arguments, nprocs=processes)
        for meeting in directory.glob("meeting-*"):
            meeting.unlink()


def plot(directory: Path) -> None:
    """Draw the log's losses and accuracies over the steps into `curves.png`."""
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(10, 7))
    for axes, names in zip(
        figure.subplots(2, 1),
        (("loss", "dense_loss", "answer_loss"), ("kind", "color", "attribute", "position", "letter", "word_color")),
        strict=True,
    ):
        for name in names:
            points = [(i * _LOG_EVERY, entry[name]) for i, entry in enumerate(entries) if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=0.8)
        axes.legend()
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(directory / "curves.png", dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for the state, the log and the checkpoint"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="batches to a step, each on a core of its own")
    parser.add_argument("--no-attention-loss", action="store_true", help="do not teach words where to look")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--until", choices=names, default=names[-1], help="the last stage, for a short run to compare")
    arguments = parser.parse_args()
    stages = STAGES[: names.index(arguments.until) + 1]
    look_weight = 0.0 if arguments.no_attention_loss else _LOOK_WEIGHT
    train(
        arguments.output,
        seed=arguments.seed,
        processes=arguments.processes,
        stages=stages,
        look_weight=look_weight,
    )


if __name__ == "__main__":
    main()
