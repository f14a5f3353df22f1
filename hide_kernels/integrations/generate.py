"""transformers' `generate` while attention is captured: which ways of generating have a row for each new token.

The model's `generate` tells the captures of its thread where it begins and what it has returned, and is held to as many
rows as new tokens; ways whose rows belong to no sequence are refused by name before anything runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from hide_kernels.attention_rows.request import KeySpans
from hide_kernels.integrations.recorder import RowRecorder

# Held while what is open on a model changes, and never while it runs.
changing = threading.Lock()


@dataclass(eq=False)
class ThreadRecorder(RowRecorder):
    """A recorder of what one thread runs, in forwards and in `generate`.

    thread: that opened it. elsewhere: another one ran the layer too. generating: its `generate` is running, with
    `sequences` of each prompt; chunked: prompts come in several forwards.
    """

    thread: int = field(default_factory=threading.get_ident)
    elsewhere: bool = False
    generating: bool = False
    chunked: bool = False
    sequences: int = 1

    @property
    def here(self) -> bool:
        """Whether this is the thread that opened it, whose forwards it records."""
        return self.thread == threading.get_ident()

    def start_forward(self, first: int, queries: int) -> None:
        """A forward of so many queries begins at a position of the sequence: drop what it replaces."""
        # Without a cache each step of `generate` sends the whole sequence again.
        again = self.generating and self.queries == "generated" and first == 0
        if first < self.tokens and not again:
            if self.received is not None and first > 0:
                raise ValueError(
                    f"layer {self.layer}: a forward goes back to position {first} of {self.tokens}: what keys received "
                    "from there on cannot be taken back; capture the whole sequence in one forward"
                )
            self.keep_before(first)
        if self.queries != "generated" or again or queries == 1:
            return
        # Of a prompt that comes in several forwards, only the last one's last query predicts a token.
        if len(self.positions) > 1:
            raise ValueError(f"layer {self.layer}: {queries} queries in a decode step; capture without an assistant")
        self.positions.clear()
        self.pieces.clear()

    def spans_of_sequences(self) -> KeySpans | None:
        """The key spans where each prompt may have become several sequences, which lie one after another."""
        spans: Any = self.key_spans
        if spans and self.sequences > 1 and (not spans[0] or isinstance(spans[0][0], (list, tuple))):
            return [own for own in spans for _ in range(self.sequences)]
        return self.key_spans

    def start_generate(self, sequences: int, chunked: bool) -> None:
        """`generate` begins, with so many sequences of each prompt; `chunked`: prompts come in several forwards."""
        self.forget()
        self.generating, self.chunked, self.sequences = True, chunked, sequences

    def end_generate(self, sequences: int, new: int) -> None:
        """`generate` has returned so many sequences with so many new tokens each; `ValueError` for other rows."""
        self.generating, self.sequences = False, 1
        if self.queries != "generated":
            return
        if self.chunked and len(self.positions) == new + 1:
            # transformers 4.57 decodes the last token of a prompt that came in chunks once more.
            self.keep(range(1, new + 1))
        got = (self.pieces[0].rows.shape[0] if self.pieces else 0, len(self.positions))
        if got != (sequences, new):
            self.forget()
            raise ValueError(
                f"layer {self.layer}: got rows for {got} (sequences, new tokens), want {(sequences, new)}: this way of "
                f"generating cannot be captured; {_INSTEAD}"
            )

    def in_prompt(self, length: int) -> bool:
        """Whether only positions of a prompt of this length are asked for."""
        return isinstance(self.queries, list) and self.received is None and self.queries[-1] < length


# Settings of `generate` with the values that leave its rows to its sequences, and why others do not.
_BEAMS = "what lies in the cache is exchanged between beams"
_DRAFTS = "several drafted tokens go through the model at once, and some are taken back"
_OTHER = "it sends other sequences through the model too"
_UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), _BEAMS),
    "num_beam_groups": ((None, 1), _BEAMS),
    "constraints": ((None,), _BEAMS),
    "force_words_ids": ((None,), _BEAMS),
    "assistant_model": ((None,), _DRAFTS),
    "prompt_lookup_num_tokens": ((None,), _DRAFTS),
    "assistant_early_exit": ((None,), _DRAFTS),
    "use_mtp": ((None, False), _DRAFTS),
    "penalty_alpha": ((None, 0, 0.0), _OTHER),
    "guidance_scale": ((None, 1, 1.0), _OTHER),
    "token_healing": ((None, False), _OTHER),
    "dola_layers": ((None,), "its tokens come from several layers"),
    "custom_generate": ((None,), "what it sends through the model is not known"),
}
_UNSERVED_METHODS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_INSTEAD = "generate first, then capture the rows of the whole sequence in one forward"


class _WatchedGenerate:
    """A model's `generate` while captures are open on it: it tells those of its thread where it begins and ends.

    They are held to as many rows as new tokens. A thread without a capture generates as if there were none.
    """

    def __init__(self, model: Any) -> None:
        """Take the place of `generate`, and of what cannot be captured, until `close`."""
        self.captures: tuple[ThreadRecorder, ...] = ()
        self._model = model
        self._own = {name: getattr(model, name) for name in ("generate", *_UNSERVED_METHODS) if hasattr(model, name)}
        self._before = {name: vars(model)[name] for name in self._own if name in vars(model)}
        vars(model)["generate"] = self
        vars(model).update({name: partial(self._unserved, name) for name in self._own if name != "generate"})

    def close(self) -> None:
        """Put everything back."""
        for name in self._own:
            del vars(self._model)[name]
        vars(self._model).update(self._before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        captures = [capture for capture in self.captures if capture.here]
        if not captures:
            return self._own["generate"](*args, **kwargs)
        model = self._model
        arguments = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        prompt = _prompt_length(model, arguments)
        for capture in captures:
            _check_served(model, arguments, None if capture.in_prompt(prompt) else capture.layer)
            chunked = _setting(model, arguments, "prefill_chunk_size") is not None
            capture.start_generate(_setting(model, arguments, "num_return_sequences") or 1, chunked)
        # A compiled step would not be seen.
        found = self._own["generate"](*args, **{**kwargs, "disable_compile": True})
        sequences = found if isinstance(found, Tensor) else found.sequences
        for capture in captures:
            capture.end_generate(sequences.shape[0], sequences.shape[1] - prompt)
        return found

    def _unserved(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if any(capture.here for capture in self.captures):
            raise ValueError(f"generate: continuous batching packs sequences, so that rows have no place; {_INSTEAD}")
        return self._own[name](*args, **kwargs)


@contextmanager
def watched_generate(model: Any, captures: Sequence[ThreadRecorder]) -> Iterator[None]:
    """Inside, the captures are told of what the model's `generate` does in this thread."""
    if not hasattr(model, "generate"):
        yield
        return
    with changing:
        watch = vars(model).get("generate")
        if not isinstance(watch, _WatchedGenerate):
            watch = _WatchedGenerate(model)
        watch.captures = (*watch.captures, *captures)
    try:
        yield
    finally:
        with changing:
            watch.captures = tuple(one for one in watch.captures if all(one is not ours for ours in captures))
            if not watch.captures:
                watch.close()


def _setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """What `generate` takes: its argument, else the given generation_config's value, else the model's own."""
    if name in arguments:
        return arguments[name]
    found = getattr(arguments.get("generation_config"), name, None)
    return found if found is not None else getattr(getattr(model, "generation_config", None), name, None)


def _prompt_length(model: Any, arguments: Mapping[str, Any]) -> int:
    """How many tokens at the beginning of its sequences `generate` was given."""
    given = arguments.get("inputs") if arguments.get("input_ids") is None else arguments["input_ids"]
    if getattr(model.config, "is_encoder_decoder", False):
        given = arguments.get("decoder_input_ids")
    elif given is None and arguments.get("inputs_embeds") is not None:
        return 0
    return 1 if given is None else int(given.shape[-1])


def _check_served(model: Any, arguments: Mapping[str, Any], layer: int | None) -> None:
    """`ValueError` for a way of generating without rows of its sequences; `None`: only rows of the prompt matter."""
    for name, (off, reason) in _UNSERVED.items():
        value = _setting(model, arguments, name)
        harmless = layer is None and reason in (_BEAMS, _DRAFTS)
        if name == "penalty_alpha" and (_setting(model, arguments, "top_k") or 0) <= 1:
            continue
        if not any(value is one or (type(value) in (int, float) and value == one) for one in off) and not harmless:
            shown = type(value).__name__ if name in ("assistant_model", "custom_generate", "constraints") else value
            raise ValueError(f"generate: rows cannot be captured with {name}={shown}: {reason}; {_INSTEAD}")
    if _setting(model, arguments, "cache_implementation") == "paged":
        raise ValueError(f"generate: rows cannot be captured with cache_implementation='paged'; {_INSTEAD}")
