"""Greedy decoding with fixed shapes: one CUDA graph replays every step; several sequences go on side by side.

`model.generate` launches each kernel of each step from Python and waits for each token. Here a step reads and writes
only tensors that stay where they are, so that a GPU replays it as one graph; on a CPU the same step runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from hide.engine.chunked_sdpa import slides
from hide.engine.decoder import Decoded, margins
from hide.engine.kv_cache import PreallocatedCache, cache_keyword
from hide.models.base import Adapter

# Steps between two looks at the tokens on a GPU; what was decoded behind an end is cut off.
_STEPS_PER_READ = 8
# Settings that change greedy decoding, with the values that leave it as it is; the others are for `generate`.
_OFF: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "remove_invalid_values": (None, False),
    "sequence_bias": (None, {}),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "watermarking_config": (None,),
}


class GreedySettings(NamedTuple):
    """`ends`: tokens that end a reply. `repetition_penalty`: divides positive logits of tokens seen before."""

    ends: frozenset[int]
    repetition_penalty: float


def greedy_settings(config: GenerationConfig) -> GreedySettings:
    """What a checkpoint asks of greedy decoding; `ValueError` for what only `generate` does."""
    asked = [name for name, off in _OFF.items() if getattr(config, name, None) not in off]
    if asked:
        raise ValueError(f"generation_config: {', '.join(asked)} are not served here; use the model's generate")
    ends = config.eos_token_id
    return GreedySettings(
        frozenset([ends] if isinstance(ends, int) else ends or ()), float(config.repetition_penalty or 1.0)
    )


def supports_static_decode(model: Adapter) -> bool:
    """Whether `GreedyDecoder` gives what `generate` gives: SDPA over all keys, no special settings."""
    config = model.language_model.config
    with model.lock:
        if config._attn_implementation != "sdpa" or slides(config):
            return False
    try:
        greedy_settings(model.model.generation_config)
    except ValueError:
        return False
    return True


def prefers_static_decode(model: Adapter) -> bool:
    """Whether replies are decoded with fixed shapes unless something speaks against it: on one GPU."""
    devices = {parameter.device for parameter in model.model.parameters()}
    return len(devices) == 1 and next(iter(devices)).type == "cuda" and supports_static_decode(model)


class GreedyDecoder:
    """Goes on with B sequences whose tokens, all but the last of each, are in a cache."""

    def __init__(
        self,
        adapter: Adapter,
        cache: PreallocatedCache,
        prompts: Sequence[Sequence[int]],
        last: Tensor,
        positions: Tensor,
        visible: Tensor,
    ) -> None:
        """Prepare the tensors of a step.

        Args:
            adapter: of `hide.models`.
            cache: of B sequences, padded on the left to one length.
            prompts: the tokens of each, without padding, for the repetition penalty.
            last: (B,) int64, the last token of each, which is not in the cache yet.
            positions: (P, B, 1) or (B, 1) int64 of that token, as the decoder takes them.
            visible: (B, length) bool, the tokens in the cache that are no padding.

        Raises `ValueError` for a model or a generation config that only `generate` serves.
        """
        if not supports_static_decode(adapter):
            greedy_settings(adapter.model.generation_config)
            raise ValueError("attention: fixed shapes want SDPA over all keys; use the model's generate (static=False)")
        self._adapter, self._cache = adapter, cache
        self.settings = greedy_settings(adapter.model.generation_config)
        device = adapter.input_device
        batch, length = visible.shape
        capacity = cache.layers[0].capacity
        self.room = capacity - length
        self._slot = torch.tensor([length], device=device)
        self._token = last.to(device)[:, None].clone()
        self._positions = positions.to(device).clone()
        self._visible = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self._visible[:, :length] = visible.to(device)
        self._replies = torch.zeros(batch, self.room, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        vocabulary = adapter.model.config.get_text_config().vocab_size
        self._seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
        self._margins = torch.zeros(batch, device=device)
        for row, prompt in enumerate(prompts):
            self._seen[row, torch.tensor(sorted(set(prompt)), device=device)] = True

    def decode(self, max_new_tokens: int) -> list[Decoded]:
        """The new tokens of each sequence, its end token included, as `generate` gives them."""
        if not 0 < max_new_tokens <= self.room:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, want 1 to {self.room}, the room in the cache")
        with self._adapter.alone():
            return self._decoded(max_new_tokens)

    def _decoded(self, max_new_tokens: int) -> list[Decoded]:
        self._cache.set_slot(self._slot)
        try:
            done, often = 1, 1
            advance: Callable[[], None] = self._advance
            if self._token.is_cuda:
                often, advance = _STEPS_PER_READ, self._first_step(capture=max_new_tokens > 1)
            else:
                self._advance(first=True)
            while done < max_new_tokens and not self._ended(done):
                for _ in range(min(often, max_new_tokens - done)):
                    advance()
                    done += 1
            replies = map(self._cut, self._replies[:, :done].tolist())
            return [Decoded(*pair) for pair in zip(replies, self._margins.tolist(), strict=True)]
        finally:
            self._cache.set_slot(None)

    def _ended(self, done: int) -> bool:
        return all(self._cut(reply)[-1] in self.settings.ends for reply in self._replies[:, :done].tolist())

    def _first_step(self, capture: bool) -> Callable[[], None]:
        """Run one step, and record the next ones as a graph; what replays it."""
        # The first step allocates workspaces; capturing needs them to be there, on a stream of its own.
        with torch.cuda.device(self._token.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._advance(first=True)
            torch.cuda.current_stream().wait_stream(stream)
            if not capture:
                return self._advance
            graph = torch.cuda.CUDAGraph()
            # What other threads do on the device meanwhile is none of the graph's business, and no error.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._advance()
        replay: Callable[[], None] = graph.replay
        return replay

    def _advance(self, first: bool = False) -> None:
        language_model = self._adapter.language_model
        self._visible.index_fill_(1, self._slot, True)
        hidden = language_model(
            inputs_embeds=language_model.get_input_embeddings()(self._token),
            # Four dimensions are taken as they are; anything less would be built anew for the cache's length.
            attention_mask=self._visible[:, None, None],
            position_ids=self._positions,
            use_cache=True,
            **{cache_keyword(type(language_model).forward): self._cache},
        ).last_hidden_state
        logits = self._adapter.model.get_output_embeddings()(hidden[:, -1]).float()
        penalty = self.settings.repetition_penalty
        if penalty != 1:
            self._seen.scatter_(1, self._token, True)
            logits = torch.where(self._seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        if first:
            self._margins.copy_(margins(logits))
        self._token.copy_(logits.argmax(-1, keepdim=True))
        self._replies.index_copy_(1, self._step, self._token)
        for counter in (self._slot, self._step, self._positions):
            counter.add_(1)

    def _cut(self, reply: list[int]) -> list[int]:
        """Up to the first end token."""
        end = next((i + 1 for i, token in enumerate(reply) if token in self.settings.ends), len(reply))
        return reply[:end]
