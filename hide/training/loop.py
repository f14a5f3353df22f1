"""The training loop: AdamW on one CPU or GPU, or on several processes, each with the whole model.

Everything follows from the seed and the number of a step, and nothing from when a run was stopped: on a CPU one that
goes on ends in the same bits. What is needed for that is written beside what was there and then takes its place, every
`SAVE_EVERY` steps, so that a kill costs no more than those. Processes are those of torchrun or `accelerate launch`,
which say by the environment how many there are; gradients are summed over them, so that the batch decides and not its
spread.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hide.training.objectives import Loss
from hide.training.settings import Recipe

T = TypeVar("T")
# Steps.
SAVE_EVERY = 50
TRAINED, STATE, LOG = "trained.safetensors", "state.json", "log.jsonl"


@dataclass(frozen=True)
class Processes:
    """rank: which of `count` this one is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Meet the others that the environment speaks of, if it does."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not dist.is_initialized():
            # One may make labels for hours while another is done with its part.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))
        return cls(dist.get_rank(), count)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def part(self, places: Sequence[int]) -> Sequence[int]:
        """This one's of a batch, which lie side by side."""
        first, last = (len(places) * rank // self.count for rank in (self.rank, self.rank + 1))
        return places[first:last]

    def total(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over all."""
        if self.count > 1:
            flat = torch.cat([one.flatten() for one in tensors])
            dist.all_reduce(flat)
            for one, part in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
                one.copy_(part.view_as(one))


ALONE = Processes()


def fit(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    items: Sequence[T],
    loss: Callable[[Sequence[T], int], Loss],
    recipe: Recipe,
    *,
    group: Callable[[T], Any] = lambda item: item,
    seed: int = 0,
    processes: Processes = ALONE,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda step, steps: None,
    steps: int | None = None,
) -> None:
    """Minimise, or go on, or read what was trained already.

    Args:
        folder: gets `log.jsonl`, a line for each step, and at the end `trained.safetensors`, the parameters by their
            names.
        parameters: float32, by names. items: what there is to learn from.
        group: of an item; those of one group come one after another.
        loss: of items of one group, in an epoch: what they share may be made once.
        facts: what the run is made with, beside recipe, seed and number of items; a folder of others is refused.
        progress: called with the steps that are done and how many there are.
        steps: stop after so many without saving, as a run that is killed.

    Raises `ValueError` for no item, and for a folder of another run.
    """
    if not items:
        raise ValueError(f"{folder.name}: no question is left to learn from; give it more of them, or leave it out")
    own = {**(facts or {}), "recipe": vars(recipe), "seed": seed, "items": len(items)}
    # As a file gives it back.
    run = _Run(folder, parameters, recipe, json.loads(json.dumps(own)), processes)
    per_epoch = math.ceil(len(items) / recipe.batch)
    every = per_epoch * recipe.epochs
    if run.done:
        progress(every, every)
        return
    for step in range(run.step, every if steps is None else min(every, run.step + steps)):
        began = time.perf_counter()
        epoch, at = divmod(step, per_epoch)
        chosen = shuffled(items, group, f"{seed} {epoch}")[at * recipe.batch : (at + 1) * recipe.batch]
        found, count = 0.0, 0
        mine = [items[place] for place in processes.part(chosen)]
        for _, alike in groupby(mine, key=group):
            value, terms = loss(list(alike), epoch)
            if value is not None:
                value.backward()
                found, count = found + float(value.detach()), count + terms
        rate = recipe.rate * scale(step, every, recipe.warm_up)
        mean, norm = run.update(rate, found, count)
        if not math.isfinite(norm):
            raise ValueError(f"{folder.name}: the gradient of step {step} is {norm}; a lower rate may mend it")
        seconds = round(time.perf_counter() - began, 3)
        run.log({"step": step, "epoch": epoch, "loss": mean, "gradient": norm, "rate": rate, "seconds": seconds})
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < every:
            run.save(step + 1)
        progress(step + 1, every)
    if steps is None:
        run.finish()


def shuffled(items: Sequence[T], group: Callable[[T], Any], seed: str) -> list[int]:
    """Places of the items, groups in an order of the seed's, each whole."""
    groups: dict[Any, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(group(item), []).append(place)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    return [place for own in order for place in own]


def trained(folder: Path, parameters: Mapping[str, nn.Parameter], wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a stage that has ended was made with, its parameters read; `None` for one that has not.

    Raises `ValueError` where that is not what is `wanted`, and for a damaged file.
    """
    if not (folder / TRAINED).is_file():
        return None
    with _undamaged(folder), safe_open(folder / TRAINED, framework="pt") as opened, torch.no_grad():
        facts: dict[str, Any] = json.loads(opened.metadata()["facts"])
        check_alike(folder.name, folder, {name: facts.get(name) for name in wanted}, wanted)
        for name, parameter in parameters.items():
            parameter.copy_(opened.get_tensor(name))
    return facts


def check_alike(stage: str, path: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """`ValueError` for a path that was made with something else."""
    different = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    if different:
        changes = "; ".join(f"{name}: {there.get(name)!r} there, {wanted.get(name)!r} now" for name in different)
        raise ValueError(f"{stage}: {path} was made with other settings ({changes}); use another folder")


@contextmanager
def _undamaged(folder: Path) -> Iterator[None]:
    """Inside, what cannot be read is a `ValueError` that says how to go on."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, OSError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder.name}: {folder} is damaged ({reason}); without it the stage begins anew") from None


def scale(step: int, steps: int, warm_up: float) -> float:
    """Part of the highest rate: up in a line, then down in half a cosine."""
    first = math.ceil(warm_up * steps)
    if step < first:
        return (step + 1) / first
    return (1 + math.cos(math.pi * (step - first) / max(1, steps - first))) / 2


class _Run:
    """Parameters and their moments, and where they lie on the disk: all processes read, the first one writes."""

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, nn.Parameter],
        recipe: Recipe,
        facts: Mapping[str, Any],
        processes: Processes,
    ) -> None:
        self.folder, self.parameters, self.facts, self.clip = folder, parameters, dict(facts), recipe.clip
        self.processes, self.first = processes, processes.rank == 0
        self.optimiser = torch.optim.AdamW(parameters.values(), lr=recipe.rate, weight_decay=0.0)
        self.step, self.done = 0, (folder / TRAINED).is_file()
        with _undamaged(folder):
            if self.done:
                with safe_open(folder / TRAINED, framework="pt") as opened:
                    check_alike(folder.name, folder, json.loads(opened.metadata()["facts"]), self.facts)
                self._take(load_file(folder / TRAINED))
                return
            if (folder / STATE).is_file():
                state = json.loads((folder / STATE).read_text(encoding="utf-8"))
                check_alike(folder.name, folder, json.loads(state["facts"]), self.facts)
                self.step = state["step"]
                self._take(load_file(folder / state["file"]))
        if self.first:
            folder.mkdir(parents=True, exist_ok=True)
            # What a killed run did behind its last save is done again.
            lines = [line for line in read_log(folder) if line["step"] < self.step]
            put(folder / LOG, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def update(self, rate: float, found: float, count: int) -> tuple[float, float]:
        """One step down the mean's gradient; the mean, and the gradient's length before it was cut."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        sums = torch.tensor([found, float(count)], device=gradients[0].device)
        self.processes.total([*gradients, sums])
        found, terms = sums.tolist()
        for gradient in gradients:
            gradient /= max(1.0, terms)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.clip))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return found / max(1.0, terms), norm

    def log(self, entry: dict[str, Any]) -> None:
        """One more line."""
        if self.first:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def save(self, step: int) -> None:
        """All that a later run needs; the JSON file comes last and names the tensors'."""
        if not self.first:
            return
        moments = {
            f"{name} {key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimiser.state[parameter].items()
        }
        file = f"state-{step}.safetensors"
        put_tensors(self.folder / file, {**self._values(), **moments})
        put(self.folder / STATE, json.dumps({"step": step, "file": file, "facts": json.dumps(self.facts)}).encode())
        self._forget(file)

    def finish(self) -> None:
        """The parameters alone take the place of the state; behind it all processes go on."""
        if self.first:
            put_tensors(self.folder / TRAINED, self._values(), {"facts": json.dumps(self.facts)})
            (self.folder / STATE).unlink(missing_ok=True)
            self._forget()
        self.processes.wait()

    def _values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().contiguous() for name, parameter in self.parameters.items()}

    def _forget(self, kept: str = "") -> None:
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != kept:
                old.unlink()

    @torch.no_grad()
    def _take(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
            keys = [key for key in tensors if key.startswith(f"{name} ")]
            if keys:
                own = {key.removeprefix(f"{name} "): tensors[key] for key in keys}
                # Counts of steps stay on the host.
                self.optimiser.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in own.items()
                }


@contextmanager
def held(folder: Path, processes: Processes) -> Iterator[None]:
    """Inside, no other run learns in a folder: `ValueError` for a second one. The lock beside it dies with its run."""
    if processes.rank:
        yield
        return
    lock = FileLock(f"{folder}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{folder.name}: another run is learning in {folder}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held, as a result file's
            Path(lock.lock_file).unlink()
        lock.release()


def put(path: Path, content: bytes) -> None:
    """Write a file beside the one that is there, which it then takes the place of."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


def put_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """As `put`; safetensors' own error is an `OSError` here, as for every file that a full disk does not take."""
    new = path.with_name(f"{path.name}.new")
    try:
        save_file(tensors, new, metadata=metadata)
    except SafetensorError as error:
        new.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from None
    new.replace(path)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's log, without one that a kill cut off."""
    found = []
    for line in (folder / LOG).read_text(encoding="utf-8").splitlines() if (folder / LOG).is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def save_picture(folder: Path, stages: Sequence[str]) -> Path:
    """Draw the losses of the stages that there are into `losses.png`: each step's, and their running mean."""
    from matplotlib.figure import Figure

    logs = {stage: log for stage in stages if (log := read_log(folder / stage))}
    figure = Figure(figsize=(4.5 * max(1, len(logs)), 3.5), layout="constrained")
    for axes, (stage, log) in zip(figure.subplots(1, max(1, len(logs)), squeeze=False)[0], logs.items(), strict=False):
        losses = [line["loss"] for line in log]
        mean, means = losses[0], []
        for one in losses:
            mean += 0.05 * (one - mean)
            means.append(mean)
        axes.plot(losses, linewidth=0.5, alpha=0.4)
        axes.plot(means, linewidth=1.2, color="C0")
        axes.set(title=stage, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    figure.savefig(folder / "losses.png", dpi=110)
    return folder / "losses.png"
