"""One prefill for many prompts: what they begin with is computed once, and every step is a short branch off it.

A `Prefix` holds the keys and values of tokens such as `[system][user][image ...]`; a branch adds a prompt's other
tokens behind them and is rolled back afterwards. Logits, hidden states, rows and replies are those of the unshared
forward, up to rounding.

Any number of threads may use a prefix; who holds what is said in `docs/sessions.md`.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor

from hide.engine.decoder import Decoded, continue_ids, extend
from hide.engine.greedy import GreedyDecoder, prefers_static_decode
from hide.engine.kv_cache import OffloadedCache, PreallocatedCache
from hide.engine.memory_advice import advice, advised, out_of_memory
from hide.engine.usage import count
from hide.models.base import Adapter
from hide.models.inputs import Features, ImageInputs
from hide.models.prompts import Turn
from hide.presets import check_count
from hide_kernels import rows_to_maps
from hide_kernels.integrations.transformers import capture_attention, capturing
from hide_kernels.memory import stage

# Prompts that are answered in one batch; of more there are several.
MAX_BATCH = 16
# Fewer tokens at once than this do not save memory worth the time.
MIN_CHUNK = 64


class Reply(NamedTuple):
    """What the model said.

    tokens: how many went through it for that: the prompt's behind what was there already, images included, and the
    reply's. ids: the reply's tokens, with the one that ended it; empty where an engine does not give them.
    image_tokens: of each image of the message that it replies to, those of the session left out. margin: how far the
    score of its first token lies above the second best, as a difference of log-probabilities; `None` where an engine
    does not give it.
    """

    text: str
    tokens: int = 0
    ids: tuple[int, ...] = ()
    image_tokens: tuple[int, ...] = ()
    margin: float | None = None


class Kept(NamedTuple):
    """A prompt and its reply whose keys and values a prefix has kept behind its own.

    ids: (1, L) those that are in the cache: all but the reply's last. inputs: the images in them, without pixels.
    """

    ids: Tensor
    inputs: ImageInputs | None


class KeptGoneError(RuntimeError):
    """What was kept has made way for another prompt."""


def encode(model: Adapter, inputs: ImageInputs) -> tuple[ImageInputs, Features]:
    """The inputs without their pixels, which may be larger than their keys and values, and what a `Prefix` needs.

    Raises `MemoryError` with sizes and advice.
    """
    with stage("encode"), advised(f"encoding images of {' + '.join(map(str, inputs.tokens))} tokens"):
        features = model.encode(inputs)
    return inputs.without_pixels(), features


class Prefix:
    """Tokens that many prompts begin with, sent through the model once.

    length: how many. inputs: the images among them, without their pixels.
    """

    def __init__(
        self,
        model: Adapter,
        ids: Tensor,
        inputs: ImageInputs | None = None,
        *,
        features: Features | None = None,
        prefill_chunk: int = 2048,
        room: int = 256,
        offload: bool = False,
        taps: Sequence[int] = (),
    ) -> None:
        """Encode the images and prefill.

        Args:
            model: an adapter of `hide.models`.
            ids: (1, P) int64 tokens.
            inputs: the images whose tokens stand in `ids`.
            features: of the images, as `encode` gives them: whoever has called it can let go of the pixels before
                the prefill; `None`: they are encoded here.
            prefill_chunk: tokens that go through the decoder at once, so that its activations do not grow with the
                image; halved and tried again where memory is short.
            room: tokens that branches may add before the cache is copied, once, to grow by what they need.
            offload: keys and values lie in host memory, and two layers' at a time on the device. Every forward brings
                them over the bus; replies are decoded by the model's own `generate`.
            taps: decoder layers, zero-based, whose inputs are kept for `hidden`.

        Raises:
            ValueError: more than one sequence, images without a token, features of others, or a tap that is no layer.
            MemoryError: with sizes and advice.
        """
        _check_ids(model, ids)
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk: got {prefill_chunk}, want at least 1 token")
        _check_tokens(model, ids, inputs)
        if inputs is not None and not all(inputs.tokens):
            raise ValueError(f"inputs: got {inputs.tokens} tokens, want at least one in each")
        self.model = model
        self.ids = ids.cpu()
        self.length = ids.shape[1]
        self.inputs: ImageInputs | None = None
        self._chunk = prefill_chunk
        kind = OffloadedCache if offload else PreallocatedCache
        self._cache: PreallocatedCache | None = kind(model.num_layers, self.length + room)
        # Held while a branch is open. No re-entrant lock: that of a generator may be left in another thread.
        self._one_branch = threading.Lock()
        self._branching: int | None = None
        self._kept: Kept | None = None
        for tap in taps:
            if not 0 <= tap <= model.num_layers:
                raise ValueError(f"taps: got {tap}, want layers 0 to {model.num_layers}")
        _check_features(inputs, features)
        if inputs is not None and features is None:
            inputs, features = encode(model, inputs)
        if inputs is not None:
            self.inputs = inputs.without_pixels()
        with stage("prefill"):
            # No logits are wanted of a prefix, and its features live on as keys and values.
            branch = Branch(self, self.cache, self.ids, self.inputs, features, start=0, taps=tuple(taps))
            branch.run()
        self._hidden = {tap: torch.cat(states, 1) for tap, states in branch.tapped.items()}

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._cache is None

    @property
    def nbytes(self) -> int:
        """Memory of the devices that is held: keys and values, with `offload` the buffers of two layers."""
        return self._cache.nbytes if self._cache is not None else 0

    @property
    def cache(self) -> PreallocatedCache:
        """Keys and values; `RuntimeError` after `close`."""
        if self._cache is None:
            raise RuntimeError("session: it is closed; open a new one")
        return self._cache

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose inputs `hidden` gives."""
        return tuple(self._hidden)

    def hidden(self, layer: int) -> Tensor:
        """(1, P, hidden) states of the prefix's tokens that enter a decoder layer, zero-based; `num_layers`: that enter
        the final norm. Raises `ValueError` for a layer that is not among the `taps`.
        """
        _ = self.cache  # RuntimeError where the session is closed
        if layer not in self._hidden:
            raise ValueError(f"layer: got {layer}, want one of the taps that the prefill kept: {sorted(self._hidden)}")
        return self._hidden[layer]

    @contextmanager
    def branch(
        self,
        ids: Tensor,
        inputs: ImageInputs | None = None,
        *,
        features: Features | None = None,
        positions: Tensor | None = None,
        room: int = 0,
        behind: Kept | None = None,
    ) -> Iterator[Branch]:
        """Go on with one prompt; afterwards, and after any exception, the prefix is as it was.

        Args:
            ids: (1, L) int64, the whole prompt, which begins with the prefix.
            inputs: the images behind the prefix, or behind what was kept.
            features: of their tokens, where the caller has encoded them, or a part of them; `None`: they are encoded
                here.
            positions: of the tokens behind the prefix as the decoder takes them, (P, 1, n) or (1, n), integers or
                fractions; `None`: those of the family.
            room: tokens that will come after the prompt.
            behind: `kept`; the prompt begins with its tokens, which are not sent again.

        Raises:
            ValueError: a prompt that does not begin with the prefix, has nothing behind it, or positions of another
                number of tokens.
            KeptGoneError: what is `behind` is no longer there.
            RuntimeError: the session is closed, or this thread has another branch open; those of other threads are
                waited for.
        """
        self._check(ids, inputs, behind)
        _check_features(inputs, features)
        with self._alone(behind) as cache:
            every = self.inputs if behind is None else behind.inputs
            start = self.length if behind is None else behind.ids.shape[1]
            if inputs is not None:
                if features is None:
                    inputs, features = encode(self.model, inputs)
                every = inputs if every is None else every + inputs
            branch = None
            try:
                with advised(f"keys and values of {ids.shape[1] + room} tokens"):
                    cache.reserve(ids.shape[1] + room)
                count(ids.shape[1] - start)
                branch = Branch(self, cache, ids.cpu(), every, features, start=start, positions=positions)
                yield branch
            finally:
                if branch is not None:
                    branch.left = True
                cache.rewind(self.length if self._kept is None else self._kept.ids.shape[1])

    @contextmanager
    def _alone(self, behind: Kept | None = None) -> Iterator[PreallocatedCache]:
        """Inside, keys and values are this thread's; closing the session frees them only behind the block."""
        if self._branching == threading.get_ident():
            raise RuntimeError("session: a branch is open already; leave it before the next one")
        with self._one_branch:
            cache = self.cache
            if behind is not None and behind is not self._kept:
                raise KeptGoneError("session: what was kept is gone; send the whole conversation")
            if behind is None:
                cache.rewind(self.length)
            self._kept = None
            self._branching = threading.get_ident()
            try:
                yield cache
            finally:
                self._branching = None

    def _check(self, ids: Tensor, inputs: ImageInputs | None, behind: Kept | None = None) -> None:
        _check_ids(self.model, ids)
        before = self.ids if behind is None else behind.ids
        length = before.shape[1]
        if ids.shape[1] <= length or not torch.equal(ids[:, :length].cpu(), before):
            raise ValueError(f"ids: got {ids.shape[1]} tokens that do not go on behind the session's {length}")
        _check_tokens(self.model, ids[:, length:], inputs)

    def reply(
        self,
        ids: Tensor,
        inputs: ImageInputs | None = None,
        *,
        max_new_tokens: int,
        static: bool | None = None,
        behind: Kept | None = None,
        keep: bool = False,
    ) -> list[int]:
        """The tokens of the greedy reply to a prompt; arguments as `branch` and `Branch.reply`."""
        check_count("max_new_tokens", max_new_tokens)
        with self.branch(ids, inputs, room=max_new_tokens, behind=behind) as branch:
            return branch.reply(max_new_tokens=max_new_tokens, static=static, keep=keep)

    @property
    def kept(self) -> Kept | None:
        """What a reply left behind the prefix to go on from, until the next branch."""
        return self._kept

    def replies(self, prompts: Sequence[Tensor], *, max_new_tokens: int) -> list[list[int]]:
        """The greedy replies to several prompts without further images, decoded as one batch.

        With `offload` one after another: in a batch, each has a copy of the prefix on the device.

        Args:
            prompts: (1, L_i) int64 each, all of which begin with the prefix.

        Raises `ValueError` as `branch`, and in a batch for a generation config that only the model's `generate`
        serves.
        """
        check_count("max_new_tokens", max_new_tokens)
        if self.cache.offloaded:
            return [self.reply(ids, max_new_tokens=max_new_tokens) for ids in prompts]
        found: list[list[int]] = []
        for first in range(0, len(prompts), MAX_BATCH):
            with self._alone() as cache, advised(f"{MAX_BATCH} replies in one batch"):
                found += self._replies(cache, prompts[first : first + MAX_BATCH], max_new_tokens)
        return found

    def _replies(self, own: PreallocatedCache, prompts: Sequence[Tensor], max_new_tokens: int) -> list[list[int]]:
        for ids in prompts:
            self._check(ids, None)
        suffixes = [ids[0, self.length :] for ids in prompts]
        longest = max(len(suffix) for suffix in suffixes)
        model, start = self.model, self.length
        end = start + longest - 1
        cache = own.copy_for(len(prompts), end + max_new_tokens)
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        visible = torch.zeros(len(prompts), start + longest, dtype=torch.bool)
        visible[:, :start] = True
        positions = []
        for row, (ids, suffix) in enumerate(zip(prompts, suffixes, strict=True)):
            tokens[row, longest - len(suffix) :] = suffix
            visible[row, -len(suffix) :] = True
            behind = model.positions(ids, self.inputs)[0][..., start:]
            # A padding token's position does not matter: nobody sees it.
            positions.append(torch.nn.functional.pad(behind, (longest - len(suffix), 0)))
        place = torch.cat(positions, dim=-2)
        if longest > 1:
            extend(model, cache, tokens[:, :-1], place[..., :-1], attention_mask=visible[:, :end].long())
        decoder = GreedyDecoder(
            model, cache, [ids[0].tolist() for ids in prompts], tokens[:, -1], place[..., -1:], visible[:, :end]
        )
        replies = [reply.tokens for reply in decoder.decode(max_new_tokens)]
        count(sum(map(len, suffixes)) + sum(map(len, replies)))
        return replies

    def close(self) -> None:
        """Free the memory, that of a branch in another thread when it is left; no more can be opened."""
        self._cache = None
        self._hidden = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Branch:
    """One prompt on top of a prefix: `run` sends its tokens through the model, in order."""

    def __init__(
        self,
        prefix: Prefix,
        cache: PreallocatedCache,
        ids: Tensor,
        inputs: ImageInputs | None,
        features: Features | None,
        *,
        start: int,
        positions: Tensor | None = None,
        taps: tuple[int, ...] = (),
    ) -> None:
        """Made by `Prefix.branch`.

        cache: the prefix's. features: of the images whose tokens come from `start` on. positions: of the prompt's
        tokens, as the decoder takes them. tapped: per tap what entered that layer, in the pieces that were sent. left:
        whether its block is over. margin: of the last reply, as `Reply` has it.
        """
        self.ids = ids
        self.margin: float | None = None
        self.at = start
        self.left = False
        self.tapped: dict[int, list[Tensor]] = {tap: [] for tap in taps}
        self._prefix, self._model, self._cache = prefix, prefix.model, cache
        self._inputs = inputs
        self.positions, self._rope_delta = prefix.model.positions(ids, inputs)
        self._own_positions = positions is not None
        if positions is not None:
            self._take_positions(positions, start)
        self._features = features
        image = ids[0, start:] == prefix.model.image_token
        # How many image tokens of the branch come before each of its tokens.
        self._image_tokens = torch.cat([image.new_zeros(1, dtype=torch.int64), image.cumsum(0)])
        self._start = start
        # Where an incomplete run stopped: the next layer, and what enters it, of all tokens from `at` on.
        self._layer, self._states = 0, torch.empty(0)

    def run(self, stop: int | None = None, *, layers: range | None = None, whole: bool = False) -> Tensor:
        """Send the tokens up to `stop` (default: the last) through the decoder, or through some of its layers.

        A run that ends before the last layer can be followed by one of the same tokens that begins where it ended, and
        so on. Whatever else is asked of the branch instead begins anew behind the tokens that went through all layers.

        Args:
            layers: without a step, from where the run before ended, or 0; `None`: all that are left.
            whole: in one piece, however long.

        Returns:
            After the last layer (1, n, hidden) of the last piece, after the decoder's final norm; else of all the
            tokens, what enters the next layer.

        Raises:
            ValueError: tokens or layers that are not the next ones.
            MemoryError: with sizes and advice, when even a small piece does not fit.
        """
        self._begin()
        depth = self._model.num_layers
        layers = range(self._layer, depth) if layers is None else layers
        if not isinstance(layers, range):
            raise TypeError(f"layers: got {layers!r}, want a range, or None for all that are left")
        if layers.step != 1 or layers.start != self._layer or not layers.start < layers.stop <= depth:
            raise ValueError(f"layers: got {layers}, want range({self._layer}, {self._layer + 1} to {depth})")
        if self._layer:
            there = self.at + self._states.shape[1]
            stop = there if stop is None else stop
            if stop != there:
                raise ValueError(f"stop: got {stop}, want {there}, where layer {self._layer - 1} ended")
        stop = self.ids.shape[1] if stop is None else stop
        if self.at == self.ids.shape[1]:
            raise ValueError(f"stop: got {stop}, but all {self.at} tokens have been sent; open another branch")
        if not self.at < stop <= self.ids.shape[1]:
            raise ValueError(f"stop: got {stop}, want {self.at + 1} to {self.ids.shape[1]}")
        chunk = stop - self.at if whole else self._prefix._chunk
        try:
            found = self._run(stop, layers, chunk, whole)
        except BaseException:
            self._cache.rewind(self.at, layers)
            raise
        if layers.stop == depth:
            self.at, self._layer, self._states = stop, 0, torch.empty(0)
            return found[-1]
        self._layer, self._states = layers.stop, torch.cat(found, 1)
        return self._states

    def _run(self, stop: int, layers: range, chunk: int, whole: bool) -> list[Tensor]:
        """What came out, piece by piece; behind the last layer of the last piece alone."""
        at, found = self.at, list[Tensor]()
        last = layers.stop == self._model.num_layers
        while at < stop:
            end = min(stop, at + chunk)
            hidden = None
            if last:
                # Only the last piece's is wanted: the one before is let go of first.
                found.clear()
            try:
                hidden, tapped = self._piece(at, end, layers)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self._cache.rewind(at, layers)
                if whole or end - at <= MIN_CHUNK:
                    raise advice(f"{end - at} tokens behind {at}", error) from None
            if hidden is None:
                # Out here, where the error no longer holds what the failed piece had made.
                chunk = max(MIN_CHUNK, (end - at) // 2)
                # What fitted once is tried first the next time.
                self._prefix._chunk = chunk
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            for tap, states in tapped.items():
                self.tapped[tap].append(states)
            found.append(hidden)
            at = end
            if last and not self._layer:
                self.at = end
        return found

    def _piece(self, at: int, end: int, layers: range) -> tuple[Tensor, dict[int, Tensor]]:
        features = None
        if self._features is not None:
            first, last = (int(self._image_tokens[place - self._start]) for place in (at, end))
            features = self._features.part(first, last)
        return extend(
            self._model,
            self._cache,
            self.ids[:, at:end],
            self.positions[..., at:end],
            features,
            layers=layers,
            hidden=self._states[:, at - self.at : end - self.at] if self._layer else None,
            taps=tuple(self.tapped),
        )

    def logits(self) -> Tensor:
        """(1, V) float32, of the token that comes after the prompt."""
        self._go_back(self.ids.shape[1] - 1)
        with self._model.alone():
            return self._model.model.get_output_embeddings()(self.run()[:, -1]).float()

    def attention(
        self,
        turn: Turn,
        *,
        layers: Sequence[int] | None,
        causal: bool = True,
        queries: range | None = None,
        keep_layers: bool = False,
    ) -> list[Tensor]:
        """As `hide.session.ImageSession.attention`, of the turn that is this branch's prompt."""
        chosen = layer_indices(self._model, layers)
        check_turn(turn)
        if not torch.equal(turn.input_ids.cpu(), self.ids):
            raise ValueError("turn: got another prompt than the branch's, want the one that it was opened with")
        rows_of = turn.rows if queries is None else queries
        if any(not self._start <= place < self.ids.shape[1] for place in rows_of):
            raise ValueError(
                f"queries: got {queries}, want places from {self._start} to {self.ids.shape[1] - 1}, those of the "
                "prompt's tokens behind what the session holds"
            )
        self._go_back(self._start)
        with capture_attention(
            self._model.model,
            layers=chosen,
            queries=rows_of,
            key_spans=[image.span for image in turn.images],
            causal=causal,
        ) as captured:
            # A row that is not causal sees the tokens of its own piece: all of them must be in it.
            self.run(layers=range(max(chosen) + 1), whole=True)
        rows = torch.stack([result.weights[0] for result in captured.values()])
        return rows_to_maps(rows if keep_layers else rows.mean(0), turn.images)

    def reply(self, max_new_tokens: int, *, static: bool | None = None, keep: bool = False) -> list[int]:
        """The tokens of the greedy reply.

        keep: leave keys and values of prompt and reply where they are, so that a longer conversation goes on behind
            them (`Prefix.kept`).

        static: decode with fixed shapes, on a GPU as one CUDA graph, instead of by the model's own `generate`; `None`:
            on one GPU, where attention and generation config allow it, nothing captures rows and nothing is offloaded;
            and where `generate` would not go on from the positions that were given.

        Raises:
            ValueError: `static` where only `generate` serves. MemoryError: with sizes and advice.
        """
        check_count("max_new_tokens", max_new_tokens)
        last = self.ids.shape[1] - 1
        self._go_back(last)
        if self.at < last:
            self.run(last)
        if static is None:
            able = prefers_static_decode(self._model) and not (capturing(self._model.model) or self._cache.offloaded)
            static = able or (self._own_positions and self._rope_delta is None)
        try:
            with advised(f"a reply of {max_new_tokens} tokens behind {self.ids.shape[1]}"):
                self._cache.reserve(self.ids.shape[1] + max_new_tokens)
                if static:
                    reply, self.margin = self._decoded(max_new_tokens)
                else:
                    reply, self.margin = continue_ids(
                        self._model, self.ids, self._cache, self._rope_delta, max_new_tokens=max_new_tokens
                    )
        except BaseException:
            self._cache.rewind(last)
            raise
        count(len(reply))
        if keep:
            ids = torch.cat([self.ids, torch.tensor([reply[:-1]], dtype=self.ids.dtype)], 1)
            self._cache.set_length(ids.shape[1])
            self._prefix._kept = Kept(ids, self._inputs)
        else:
            # The branch can be asked for something else.
            self._cache.rewind(last)
        return reply

    def _begin(self) -> None:
        """Before anything is sent: a reply that was kept makes way. `RuntimeError` behind the branch's block."""
        if self.left:
            raise RuntimeError("branch: its block has been left; open a new one")
        if self._prefix._kept is not None:
            self._prefix._kept = None
            self._cache.rewind(self.at)

    def _go_back(self, at: int) -> None:
        """To before the last token, where it has been sent already; what went through some layers is forgotten."""
        self._begin()
        if self._layer or self.at > at:
            self.at = min(self.at, at)
            self._cache.rewind(self.at)
            self._layer, self._states = 0, torch.empty(0)

    def _take_positions(self, positions: Tensor, start: int) -> None:
        """The caller's positions in place of the family's, for the tokens from `start` on and those of the reply."""
        own = self.positions[..., start:]
        if not isinstance(positions, Tensor) or positions.dtype in (torch.bool, torch.complex64, torch.complex128):
            kind = getattr(positions, "dtype", type(positions).__name__)
            raise TypeError(f"positions: got {kind}, want a tensor of integers or floats")
        if positions.shape != own.shape:
            raise ValueError(
                f"positions: got shape {tuple(positions.shape)}, want {tuple(own.shape)}, those of the tokens behind "
                f"the first {start}"
            )
        given = positions.cpu()
        if not bool(torch.isfinite(given).all()):
            raise ValueError("positions: got NaN or inf among them, want numbers")
        self.positions = torch.cat([self.positions[..., :start].to(given.dtype), given], dim=-1)
        if self._rope_delta is not None:
            # Replies go on one behind the last token, on the three axes of images; before them may be one of the text.
            following = given[-3:, ..., -1].max() + 1 - self.ids.shape[1]
            self._rope_delta = torch.full_like(self._rope_delta, 0, dtype=given.dtype) + following

    def _decoded(self, max_new_tokens: int) -> Decoded:
        last = self.ids.shape[1] - 1
        decoder = GreedyDecoder(
            self._model,
            self._cache,
            [self.ids[0].tolist()],
            self.ids[0, -1:],
            self.positions[..., -1:],
            torch.ones(1, last, dtype=torch.bool),
        )
        return decoder.decode(max_new_tokens)[0]


def check_turn(turn: Turn) -> None:
    """`TypeError` for what is none, such as a text."""
    if not isinstance(turn, Turn):
        raise TypeError(f"turn: got {type(turn).__name__}, want a Turn, as a session's `turn` gives it")


def layer_indices(model: Adapter, layers: Sequence[int] | None) -> list[int]:
    """Layers counted from the front, -1 being the last; `None`: all.

    Raises `TypeError` or `ValueError` for none, and for what is no layer of the model.
    """
    depth = model.num_layers
    try:
        chosen = [operator.index(layer) for layer in (range(depth) if layers is None else layers)]
    except TypeError:
        raise TypeError(f"layers: got {layers!r}, want zero-based layer numbers, or None for all") from None
    for layer in chosen:
        if not -depth <= layer < depth:
            raise ValueError(f"layers: got {layer}, want 0 to {depth - 1}, zero-based")
    if not chosen:
        raise ValueError(f"layers: got none, want some of 0 to {depth - 1}, zero-based, or None for all")
    return [layer % depth for layer in chosen]


def _check_ids(model: Adapter, ids: Tensor) -> None:
    """Refuses what is no sequence of the model's tokens: on a GPU one beyond its embeddings ends the process."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: got {getattr(ids, 'dtype', type(ids).__name__)}, want a tensor of int64")
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"ids: got shape {tuple(ids.shape)}, want (1, L): a session is one sequence")
    tokens = model.model.config.get_text_config().vocab_size
    if not 0 <= int(ids.min()) <= int(ids.max()) < tokens:
        raise ValueError(f"ids: got {int(ids.min())} to {int(ids.max())}, want 0 to {tokens - 1}, the model's tokens")


def _check_tokens(model: Adapter, ids: Tensor, inputs: ImageInputs | None) -> None:
    """Refuses images that do not stand in the ids, and places in the ids that no picture fills."""
    places, tokens = int((ids == model.image_token).sum()), sum(inputs.tokens) if inputs is not None else 0
    if places != tokens:
        raise ValueError(f"ids: got {places} image tokens, want {tokens}, as many as the images have")


def _check_features(inputs: ImageInputs | None, features: Features | None) -> None:
    """Refuses features of other images."""
    if features is not None and len(features.embeddings) != sum(inputs.tokens if inputs is not None else ()):
        raise ValueError(f"features: got {len(features.embeddings)} tokens, want as many as the images have")
