"""Train the embedded model: `python -m training.train --output DIRECTORY`.

First the vision encoder alone learns which kind and color covers each image token; then the whole model answers
several questions about each picture, on pictures that grow. Linear heads, dropped at the end, keep teaching what
lies where: one per image token, and one at each entity word, which makes the word itself fetch what it names. The
run is seeded, writes its losses as JSON lines and as a picture, and goes on where it stopped when it is started
again with the same directory.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hide.tiny import model as tiny
from hide.tiny.scenes import COLORS, KINDS
from training.batched import encode_images, image_positions, image_to_patches, run_text
from training.data import IGNORED, TOKEN_SIDE, Batch, BatchStream, Stage, Text, prefix_ids

__all__ = ["STAGES", "Heads", "losses", "main", "train"]

STAGES = (
    Stage("vision", 300, 1.5e-3, 1.2e-3, (4, 7), (2, 5), 4500, text=False),
    Stage("few", 350, 1.2e-3, 1e-3, (4, 6), (2, 4), 1600),
    Stage("more", 300, 1.2e-3, 8e-4, (5, 10), (3, 8), 1800, collages=0.15),
    Stage("many", 300, 8e-4, 6e-4, (6, 16), (4, 9), 1800, collages=0.3, letters=0.2, large=0.12, large_sides=(18, 30)),
    Stage("all", 730, 6e-4, 3e-5, (4, 20), (3, 10), 1800, (28, 100), collages=0.35, letters=0.3, large=0.35),
    Stage("far", 250, 5e-4, 3e-5, (4, 8), (3, 8), 1100, (28, 100), collages=0.9, letters=0.3, large=0.12, farthest=75),
    Stage(
        "place",
        560,
        8e-4,
        3e-5,
        (4, 9),
        (3, 9),
        700,
        (28, 100),
        max_questions=2,
        collages=1.0,
        letters=0.2,
        large=0.25,
        large_sides=(18, 46),
        farthest=75,
    ),
    Stage(
        "wide",
        250,
        6e-4,
        2e-5,
        (6, 16),
        (3, 9),
        700,
        (28, 100),
        max_questions=2,
        collages=1.0,
        letters=0.1,
        large=0.3,
        large_sides=(24, 46),
        farthest=60,
        collage_side=18,
    ),
)
_DENSE_WEIGHT, _WORD_WEIGHT, _PLACE_WEIGHT = 0.5, 0.3, 0.4
# Image tokens learn their own place behind this layer, so that later ones can look it up.
_PLACE_LAYER, _PLACES = 1, 48
# At these layers, words are taught to put at least this part of their attention on what they name: at the first by what
# it looks like, at the second to read its color and place.
_LOOK_LAYERS, _LOOK_PART, _LOOK_WEIGHT = (0, 2), 0.5, 0.2
# Behind this layer, the word of a lettered option is to know whether it is the right one.
_OPTION_LAYER = 4
_SAVE_EVERY, _LOG_EVERY, _WARM_UP = 100, 10, 40


class Heads(nn.Module):
    """The linear heads that only training uses: what covers an image token and where it lies; the same of what a word
    names; whether a lettered option is the right one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, len(KINDS) + 1 + len(COLORS) + 1)
        self.place = nn.Linear(width, 2 * _PLACES)
        self.word = nn.Linear(width, len(COLORS) + 2 * _PLACES)
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


def _text_losses(
    model: Any, heads: Heads, tokenizer: Any, batch: Batch, text: Text, features: Tensor, row_layers: tuple[int, ...]
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
        row_indices=text.words + prefix,
        row_layers=(*_LOOK_LAYERS, *row_layers),
        state_layers=(_PLACE_LAYER, _OPTION_LAYER),
    )
    hidden = out.hidden[:, prefix:]

    wanted = text.labels != IGNORED
    logits, labels = model.lm_head(hidden[wanted]).float(), text.labels[wanted]
    answer = F.cross_entropy(logits, labels)
    words = labels != tokenizer.eos_token_id
    right = logits.argmax(-1)[words] == labels[words]
    sides = torch.isin(labels[words], torch.tensor(tokenizer.convert_tokens_to_ids(["left", "right"])))
    letters = torch.isin(labels[words], torch.tensor(tokenizer.convert_tokens_to_ids(list("ABCD"))))
    in_collage = ((text.branch < collages)[wanted])[words]
    log = {"answer_loss": answer.item()}
    for name, chosen in (("attribute", ~sides & ~letters), ("position", sides), ("letter", letters)):
        for form, where in ((name, chosen & ~in_collage), (f"collage_{name}", chosen & in_collage)):
            if where.any():
                log[form] = right[where].float().mean().item()
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
        at = (text.collage_tokens + prefix).flatten(1)[..., None].expand(-1, -1, hidden.shape[-1])
        learning.append((out.states[_PLACE_LAYER].gather(1, at), image_positions(rows, columns).repeat(1, collages)))
    image_place = torch.zeros(())
    if learning:
        states = _unit(torch.cat([chosen for chosen, _ in learning], dim=1))
        own = torch.cat([chosen.flip(0).T for _, chosen in learning]).expand(size, -1, -1)
        image_place, log["image_place"] = _place_loss(heads.place(states), own)

    # At the word itself: what it names has which color, and lies where? In a large picture it need only be found.
    valid = text.word_colors != IGNORED
    cells = text.word_cells[valid]
    plain = text.word_collage[valid] < 0
    picked = hidden.gather(1, text.words[..., None].expand(-1, -1, hidden.shape[-1]))[valid]
    read = ~plain | (not batch.frozen)
    color, place = heads.word(picked[read]).float().split([len(COLORS), 2 * _PLACES], dim=-1)
    word_color = F.cross_entropy(color, text.word_colors[valid][read])
    log["word_color"] = (color.argmax(-1) == text.word_colors[valid][read]).float().mean().item()
    word_place, log["word_place"] = _place_loss(place, text.word_places[valid][read])
    on_images = {layer: row[valid][:, first : first + tokens] for layer, row in out.rows.items()}
    if collages:
        picture = torch.arange(size)[:, None].expand(text.words.shape)[valid]
        at = text.collage_tokens[picture, text.word_collage[valid].clamp(min=0)] + prefix
        on_images = {
            layer: torch.cat([on_images[layer], row[valid].gather(1, at)], dim=-1) for layer, row in out.rows.items()
        }
    on_object = torch.stack([(on_images[layer] * cells).sum(-1) for layer in _LOOK_LAYERS])
    look = F.relu(math.log(_LOOK_PART) - (on_object + 1e-6).log()).mean()
    log["look_loss"] = look.item()
    for layer in row_layers:
        on_picture, in_picture = on_images[layer][plain, :tokens], cells[plain, :tokens]
        share = (on_picture * in_picture).sum(-1) / on_picture.sum(-1)
        log[f"inside_{layer}"] = share.mean().item()
        log[f"times_{layer}"] = (share / in_picture.float().mean(-1)).mean().item()
    if (~plain).any():
        log["inside_collage"] = on_object[-1, ~plain].mean().item()
    taught = _WORD_WEIGHT * (word_color + option) + _PLACE_WEIGHT * (image_place + word_place) + _LOOK_WEIGHT * look
    return Step(answer + taught, log)


def losses(model: Any, heads: Heads, tokenizer: Any, batch: Batch, *, row_layers: tuple[int, ...] = ()) -> Step:
    """Loss and accuracies of one batch; `row_layers` are the layers whose attention shares to log."""
    with torch.autocast("cpu", torch.bfloat16):
        patches = image_to_patches(batch.images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not batch.frozen):
            features = encode_images(model, patches, batch.rows, batch.columns)
        dense = _dense_loss(heads, features, batch)
        if batch.text is None:
            return dense
        answers = _text_losses(model, heads, tokenizer, batch, batch.text, features, row_layers)
    return Step(answers.loss + _DENSE_WEIGHT * dense.loss, {**dense.log, **answers.log})


def _rate(stage: Stage, step: int) -> float:
    done = step / stage.steps
    return min(1.0, (step + 1) / _WARM_UP) * (
        stage.final_rate + (stage.rate - stage.final_rate) * (1 + math.cos(math.pi * done)) / 2
    )


class _Run:
    """Model, heads and optimiser, and their files in the output directory."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.model: Any
        self.model, self.tokenizer, self.processor = tiny.build(seed)
        torch.manual_seed(seed)
        self.heads = Heads(self.model.config.text_config.hidden_size)
        self.modules = nn.ModuleDict({"model": self.model, "heads": self.heads})
        named = dict(self.modules.named_parameters())
        decayed = [p for p in named.values() if p.dim() >= 2]
        plain = [p for p in named.values() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.03}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in named.items()}
        self.stage, self.step = 0, 0
        if (directory / "state.json").is_file():
            self._load()

    def save(self) -> None:
        """Write all that a later run needs to go on; the JSON file comes last and names the tensors' file."""
        tensors = {f"parameter.{name}": parameter.detach() for parameter, name in self.names.items()}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer.{self.names[parameter]}.{key}"] = value
        file = f"state-{self.stage}-{self.step}.safetensors"
        save_file(tensors, self.directory / file)
        (self.directory / "state.json").write_text(
            json.dumps({"stage": self.stage, "step": self.step, "file": file}), encoding="utf-8"
        )
        for old in self.directory.glob("state-*.safetensors"):
            if old.name != file:
                old.unlink()
        tiny.save(self.directory / "checkpoint", self.model, self.tokenizer, self.processor)

    def _load(self) -> None:
        state = json.loads((self.directory / "state.json").read_text(encoding="utf-8"))
        self.stage, self.step = state["stage"], state["step"]
        tensors = load_file(self.directory / state["file"])
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{name}.{key}" in tensors]
                if keys:
                    self.optimizer.state[parameter] = {key: tensors[f"optimizer.{name}.{key}"] for key in keys}

    def batches(self, stage: Stage, seed: int) -> Iterator[Batch]:
        stream = BatchStream(stage, seed, self.step, self.tokenizer)
        return iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=4))


def train(directory: str | Path, *, seed: int = 0, threads: int = 2, stages: tuple[Stage, ...] = STAGES) -> None:
    """Run, or go on with, all stages; writes `checkpoint/`, `log.jsonl` and `curves.png` into the directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    run = _Run(directory, seed)
    all_layers = tuple(range(run.model.config.text_config.num_hidden_layers))
    with (directory / "log.jsonl").open("a", encoding="utf-8") as log:
        while run.stage < len(stages):
            stage = stages[run.stage]
            for batch in run.batches(stage, seed):
                began = time.perf_counter()
                logged = run.step % _LOG_EVERY == 0
                layers = all_layers if stage.text and logged else ()
                step = losses(run.model, run.heads, run.tokenizer, batch, row_layers=layers)
                for group in run.optimizer.param_groups:
                    group["lr"] = _rate(stage, run.step)
                run.optimizer.zero_grad(set_to_none=True)
                step.loss.backward()
                norm = nn.utils.clip_grad_norm_(run.modules.parameters(), 1.0)
                run.optimizer.step()
                if logged:
                    entry = {
                        "stage": stage.name,
                        "step": run.step,
                        "grid": [batch.rows, batch.columns, len(batch.images)],
                        "loss": round(step.loss.item(), 4),
                        "gradient": round(norm.item(), 3),
                        "seconds": round(time.perf_counter() - began, 3),
                        **{key: round(value, 4) for key, value in step.log.items()},
                    }
                    log.write(json.dumps(entry) + "\n")
                    log.flush()
                    print(" ".join(f"{key}={value}" for key, value in entry.items()), flush=True)
                run.step += 1
                if run.step % _SAVE_EVERY == 0:
                    run.save()
            run.stage, run.step = run.stage + 1, 0
            run.save()
            plot(directory)


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
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    train(arguments.output, seed=arguments.seed, threads=arguments.threads)


if __name__ == "__main__":
    main()
