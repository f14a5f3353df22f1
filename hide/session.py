"""One image, one prefill: what many prompts begin with is computed once, and every step is a short branch off it.

HiDe as published runs the vision encoder and the whole model over the same image for each step of each question.
An `ImageSession` holds the keys and values of `[system][user][image ...]`; a branch adds a prompt's other tokens behind
them and is rolled back afterwards. Logits, rows and replies are those of the unshared forward, up to rounding.

Any number of threads may use a session or a pool; who holds what is said in `docs/sessions.md`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hide.decoding import GreedyDecoder
from hide.kv_cache import OffloadedCache, PreallocatedCache
from hide.models.base import Adapter, Features, Pictures, Reply, SearchPrompt
from hide_kernels import rows_to_maps
from hide_kernels.integrations.transformers import capture_attention
from hide_kernels.memory import stage

# Prompts that are answered side by side; more of them are taken in turn.
SIDE_BY_SIDE = 16
# Fewer tokens at once than this do not save memory worth the time.
MIN_CHUNK = 64


def encode(model: Adapter, pictures: Pictures) -> tuple[Pictures, Features]:
    """The pictures without their pixels, which may be larger than their keys and values, and what a `Prefix` needs.

    Raises `MemoryError` with sizes and advice.
    """
    with stage("encode"), _advised(f"encoding images of {' + '.join(map(str, pictures.tokens))} tokens"):
        features = model.encode(pictures)
    return pictures.without_pixels(), features


class Prefix:
    """Tokens that many prompts begin with, sent through the model once.

    length: how many. pictures: those among them, without their pixels.
    """

    def __init__(
        self,
        model: Adapter,
        ids: Tensor,
        pictures: Pictures | None = None,
        *,
        features: Features | None = None,
        prefill_chunk: int = 2048,
        room: int = 256,
        offload: bool = False,
    ) -> None:
        """Encode the pictures and prefill.

        Args:
            model: an adapter of `hide.models`.
            ids: (1, P) int64 tokens.
            pictures: those whose tokens stand in `ids`.
            features: of the pictures, as `encode` gives them: whoever has called it can let go of the pixels before
                the prefill; `None`: they are encoded here.
            prefill_chunk: tokens that go through the decoder at once, so that its activations do not grow with the
                image; halved and tried again where memory is short.
            room: tokens that branches may add before the cache is copied, once, to grow by what they need.
            offload: keys and values lie in host memory, and two layers' at a time on the device. Every forward brings
                them over the bus; replies are decoded by the model's own `generate`.

        Raises:
            ValueError: more than one sequence, pictures without a token, or features of others.
            MemoryError: with sizes and advice.
        """
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
            raise ValueError(f"ids: got shape {tuple(ids.shape)}, want (1, P): a session is one sequence")
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk: got {prefill_chunk}, want at least 1 token")
        _check_tokens(model, ids, pictures)
        if pictures is not None and not all(pictures.tokens):
            raise ValueError(f"pictures: got {pictures.tokens} tokens, want at least one in each")
        self.model = model
        self.ids = ids.cpu()
        self.length = ids.shape[1]
        self.pictures: Pictures | None = None
        self._chunk = prefill_chunk
        kind = OffloadedCache if offload else PreallocatedCache
        self._cache: PreallocatedCache | None = kind(model.num_layers, self.length + room)
        # Held while a branch is open. No re-entrant lock: that of a generator may be left in another thread.
        self._turn = threading.Lock()
        self._branching: int | None = None
        if features is not None and len(features.embeddings) != sum(pictures.tokens if pictures is not None else ()):
            raise ValueError(f"features: got {len(features.embeddings)} tokens, want as many as the pictures have")
        if pictures is not None and features is None:
            pictures, features = encode(model, pictures)
        if pictures is not None:
            self.pictures = pictures.without_pixels()
        with stage("prefill"):
            # No logits are wanted of a prefix, and its features live on as keys and values.
            Branch(self, self.cache, self.ids, self.pictures, features, start=0).run()

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

    @contextmanager
    def branch(self, ids: Tensor, pictures: Pictures | None = None, *, room: int = 0) -> Iterator[Branch]:
        """Go on with one prompt; afterwards, and after any exception, the prefix is as it was.

        Args:
            ids: (1, L) int64, the whole prompt, which begins with the prefix.
            pictures: those behind the prefix.
            room: tokens that will come after the prompt.

        Raises:
            ValueError: a prompt that does not begin with the prefix, or has nothing behind it.
            RuntimeError: the session is closed, or this thread has another branch open; those of other threads are
                waited for.
        """
        self._check(ids, pictures)
        with self._alone() as cache:
            every, features = self.pictures, None
            if pictures is not None:
                pictures, features = encode(self.model, pictures)
                every = pictures if every is None else every + pictures
            try:
                with _advised(f"keys and values of {ids.shape[1] + room} tokens"):
                    cache.reserve(ids.shape[1] + room)
                yield Branch(self, cache, ids.cpu(), every, features, start=self.length)
            finally:
                cache.rewind(self.length)

    @contextmanager
    def _alone(self) -> Iterator[PreallocatedCache]:
        """Inside, keys and values are this thread's; closing the session frees them only behind the block."""
        if self._branching == threading.get_ident():
            raise RuntimeError("session: a branch is open already; leave it before the next one")
        with self._turn:
            cache = self.cache
            self._branching = threading.get_ident()
            try:
                yield cache
            finally:
                self._branching = None

    def _check(self, ids: Tensor, pictures: Pictures | None) -> None:
        if ids.dim() != 2 or ids.shape[0] != 1:
            raise ValueError(f"ids: got shape {tuple(ids.shape)}, want (1, L): a session is one sequence")
        if ids.shape[1] <= self.length or not torch.equal(ids[:, : self.length].cpu(), self.ids):
            raise ValueError(f"ids: got {ids.shape[1]} tokens that do not go on behind the session's {self.length}")
        _check_tokens(self.model, ids[:, self.length :], pictures)

    def reply(
        self, ids: Tensor, pictures: Pictures | None = None, *, max_new_tokens: int, static: bool | None = None
    ) -> list[int]:
        """The tokens of the greedy reply to a prompt; arguments as `branch` and `Branch.reply`."""
        with self.branch(ids, pictures, room=max_new_tokens) as branch:
            return branch.reply(max_new_tokens, static=static)

    def replies(self, prompts: Sequence[Tensor], *, max_new_tokens: int) -> list[list[int]]:
        """The greedy replies to several prompts without further pictures, decoded side by side.

        With `offload` one after another: side by side, each has a copy of the prefix on the device.

        Args:
            prompts: (1, L_i) int64 each, all of which begin with the prefix.

        Raises `ValueError` as `branch`, and side by side for a generation config that only the model's `generate`
        serves.
        """
        if self.cache.offloaded:
            return [self.reply(ids, max_new_tokens=max_new_tokens) for ids in prompts]
        found: list[list[int]] = []
        for first in range(0, len(prompts), SIDE_BY_SIDE):
            with self._alone() as cache, _advised(f"{SIDE_BY_SIDE} replies side by side"):
                found += self._replies(cache, prompts[first : first + SIDE_BY_SIDE], max_new_tokens)
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
            behind = model.positions(ids, self.pictures)[0][..., start:]
            # A padding token's position does not matter: nobody sees it.
            positions.append(torch.nn.functional.pad(behind, (longest - len(suffix), 0)))
        place = torch.cat(positions, dim=-2)
        if longest > 1:
            model.extend(cache, tokens[:, :-1], place[..., :-1], attention_mask=visible[:, :end].long())
        decoder = GreedyDecoder(
            model, cache, [ids[0].tolist() for ids in prompts], tokens[:, -1], place[..., -1:], visible[:, :end]
        )
        return decoder.decode(max_new_tokens)

    def close(self) -> None:
        """Free the memory, that of a branch in another thread when it is left; no more can be opened."""
        self._cache = None

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Branch:
    """One prompt on top of a prefix: `run` sends its tokens through the model, in order."""

    def __init__(
        self,
        prefix: Prefix,
        cache: PreallocatedCache,
        ids: Tensor,
        pictures: Pictures | None,
        features: Features | None,
        *,
        start: int,
    ) -> None:
        """Made by `Prefix.branch`. cache: the prefix's. features: of the images whose tokens come from `start` on."""
        self.ids = ids
        self.at = start
        self._prefix, self._model, self._cache = prefix, prefix.model, cache
        self._positions, self._rope_delta = prefix.model.positions(ids, pictures)
        self._features = features
        image = ids[0, start:] == prefix.model.image_token
        # How many image tokens of the branch come before each of its tokens.
        self._image_tokens = torch.cat([image.new_zeros(1, dtype=torch.int64), image.cumsum(0)])
        self._start = start
        self._ended = False

    def run(self, stop: int | None = None, *, depth: int | None = None, whole: bool = False) -> Tensor:
        """Send the tokens up to `stop` (default: the last) through the decoder.

        Args:
            depth: leave after so many layers; the branch can then not go on.
                whole: in one piece, however long.

        Returns:
            (1, n, hidden) of the last piece, after the decoder's final norm.

        Raises:
            MemoryError: with sizes and advice, when even a small piece does not fit.
        """
        stop = self.ids.shape[1] if stop is None else stop
        if self._ended:
            raise RuntimeError("branch: it left the decoder early and cannot go on; open a new one")
        if not self.at < stop <= self.ids.shape[1]:
            raise ValueError(f"stop: got {stop}, want {self.at + 1} to {self.ids.shape[1]}")
        self._ended = depth is not None
        chunk = stop - self.at if whole else self._prefix._chunk
        while True:
            end = min(stop, self.at + chunk)
            hidden = None
            try:
                hidden = self._piece(end, depth)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self._cache.rewind(self.at)
                if whole or end - self.at <= MIN_CHUNK:
                    raise _advice(f"{end - self.at} tokens behind {self.at}", error) from None
            if hidden is None:
                # Out here, where the error no longer holds what the failed piece had made.
                chunk = max(MIN_CHUNK, (end - self.at) // 2)
                # What fitted once is tried first the next time.
                self._prefix._chunk = chunk
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            self.at = end
            if end == stop:
                return hidden

    def _piece(self, end: int, depth: int | None) -> Tensor:
        features = None
        if self._features is not None:
            first, last = (int(self._image_tokens[at - self._start]) for at in (self.at, end))
            features = self._features.part(first, last)
        return self._model.extend(
            self._cache, self.ids[:, self.at : end], self._positions[..., self.at : end], features, depth=depth
        )

    def logits(self) -> Tensor:
        """(1, V) float32, of the token that comes after the prompt."""
        self._go_back(self.ids.shape[1] - 1)
        with self._model.alone():
            return self._model.model.get_output_embeddings()(self.run()[:, -1]).float()

    def rows(
        self, prompt: SearchPrompt, *, layers: Sequence[int] | None, causal: bool, keep_layers: bool = False
    ) -> list[Tensor]:
        """As `search_rows` of the adapter, of the same prompt: attention rows over each image of the prefix."""
        layers = range(self._model.num_layers) if layers is None else layers
        depth = max(layer % self._model.num_layers for layer in layers) + 1
        with capture_attention(
            self._model.model,
            layers=layers,
            queries=prompt.rows,
            key_spans=[image.span for image in prompt.images],
            causal=causal,
        ) as captured:
            # A row that is not causal sees the tokens of its own piece: all of them must be in it.
            self.run(depth=depth, whole=True)
        rows = torch.stack([result.weights[0] for result in captured.values()])
        return rows_to_maps(rows if keep_layers else rows.mean(0), prompt.images)

    def reply(self, max_new_tokens: int, *, static: bool | None = None) -> list[int]:
        """The tokens of the greedy reply.

        static: decode with fixed shapes, on a GPU as one CUDA graph, instead of by the model's own `generate`; `None`:
            on one GPU, where attention and generation config allow it, nothing captures rows and nothing is offloaded.

        Raises:
            ValueError: `static` where only `generate` serves. MemoryError: with sizes and advice.
        """
        last = self.ids.shape[1] - 1
        self._go_back(last)
        if self.at < last:
            self.run(last)
        if static is None:
            static = self._model.static_decode and not (self._model.captured or self._cache.offloaded)
        try:
            with _advised(f"a reply of {max_new_tokens} tokens behind {self.ids.shape[1]}"):
                self._cache.reserve(self.ids.shape[1] + max_new_tokens)
                if static:
                    return self._decoded(max_new_tokens)
                return self._model.continue_ids(self.ids, self._cache, self._rope_delta, max_new_tokens=max_new_tokens)
        finally:
            # The branch can be asked for something else.
            self._cache.rewind(last)

    def _go_back(self, at: int) -> None:
        """To before the last token, where it has been sent already."""
        if self.at > at:
            self._cache.rewind(at)
            self.at = at

    def _decoded(self, max_new_tokens: int) -> list[int]:
        last = self.ids.shape[1] - 1
        decoder = GreedyDecoder(
            self._model,
            self._cache,
            [self.ids[0].tolist()],
            self.ids[0, -1:],
            self._positions[..., -1:],
            torch.ones(1, last, dtype=torch.bool),
        )
        return decoder.decode(max_new_tokens)[0]


class ImageSession(Prefix):
    """Pictures, encoded and prefilled once, for any number of questions::

    with ImageSession(model, pictures) as session:
        rows = session.search_rows(model.search_prompt("umbrella", session.pictures), layers=(14,), causal=False)
        print(session.ask("What color is the umbrella?", max_new_tokens=20).text)
    """

    pictures: Pictures

    def __init__(
        self,
        model: Adapter,
        pictures: Pictures,
        *,
        features: Features | None = None,
        images: Sequence[Image.Image] = (),
        sources: Sequence[Tensor] = (),
        notes: Sequence[str] = (),
        prefill_chunk: int = 2048,
        room: int = 256,
        offload: bool = False,
    ) -> None:
        """Encode and prefill; as `Prefix`.

        images: what the pictures were made from. sources: their pixels, (H, W, 3 or 4) uint8, which collages are cut
            out of, where the model is. notes: what was left out of them or guessed (`hide.images.picture_notes`).
        """
        ids = model.image_prefix(pictures)
        super().__init__(
            model, ids, pictures, features=features, prefill_chunk=prefill_chunk, room=room, offload=offload
        )
        self.images, self.sources, self.notes = tuple(images), tuple(sources), tuple(notes)

    @property
    def nbytes(self) -> int:
        """Memory of the devices that is held: as a `Prefix`, and the sources."""
        return super().nbytes + sum(source.nbytes for source in self.sources)

    def close(self) -> None:
        """As a `Prefix`; the sources too."""
        super().close()
        self.sources = ()

    def search_rows(
        self, prompt: SearchPrompt, *, layers: Sequence[int] | None, causal: bool, keep_layers: bool = False
    ) -> list[Tensor]:
        """As the adapter's, from the prompt's text tokens alone and only up to the last of `layers`."""
        with self.branch(prompt.input_ids) as branch:
            return branch.rows(prompt, layers=layers, causal=causal, keep_layers=keep_layers)

    def ask(self, text: str, more: Pictures | None = None, *, max_new_tokens: int, static: bool | None = None) -> Reply:
        """Greedy reply to the session's pictures, then `more`, then `text`, as one user turn.

        The reply's `tokens` are those that went through the model for it, the prefix left out.
        """
        every = self.pictures if more is None else self.pictures + more.without_pixels()
        ids = self.model.input_ids(text, every)
        new = self.reply(ids, more, max_new_tokens=max_new_tokens, static=static)
        return Reply(self.model.decode(new), ids.shape[1] - self.length + len(new))


class SessionPool:
    """Sessions of several pictures, least recently used ones closed when they hold more than `budget` bytes.

    Several threads may share a pool. A session that another thread has got from it leaves the pool in the same way, but
    is not closed: its memory is freed when that thread lets go of it. An empty pool is true, as any pool.
    """

    def __init__(self, budget: int) -> None:
        """budget: bytes of keys, values and sources on the devices, in all; the newest session is kept even if it alone
        has more. Sessions with `offload` count for two layers and the sources: the host's memory has no bound here."""
        if budget < 0:
            raise ValueError(f"budget: got {budget}, want bytes, 0 or more")
        self.budget = budget
        # With the threads that have got each.
        self._sessions: dict[object, tuple[ImageSession, set[int]]] = {}
        self._lock = threading.RLock()

    def get(self, key: object, open_session: Callable[[], ImageSession]) -> ImageSession:
        """The session of `key`, made by `open_session` where there is none; other threads wait meanwhile.

        Where memory is too short for it, all others are closed and it is tried once more.
        """
        with self._lock:
            session, users = self._sessions.pop(key, (None, set[int]()))
            if session is None or session.closed:
                session, users = None, set()
                try:
                    session = open_session()
                except MemoryError:
                    if not self._sessions:
                        raise
                if session is None:
                    # Out here, where the error no longer holds what the first try had made.
                    while self._sessions:
                        self._drop_oldest()
                    session = open_session()
            self._sessions[key] = session, {*users, threading.get_ident()}
            while self.nbytes > self.budget and len(self._sessions) > 1:
                self._drop_oldest()
            return session

    @property
    def nbytes(self) -> int:
        """Held by all sessions."""
        with self._lock:
            return sum(session.nbytes for session, _ in self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)

    def __bool__(self) -> bool:
        return True

    def close(self) -> None:
        """Close all, those of other threads too."""
        with self._lock:
            for session, _ in self._sessions.values():
                session.close()
            self._sessions.clear()

    def _drop_oldest(self) -> None:
        session, users = self._sessions.pop(next(iter(self._sessions)))
        if users <= {threading.get_ident()}:
            session.close()


def _check_tokens(model: Adapter, ids: Tensor, pictures: Pictures | None) -> None:
    """Refuses pictures that do not stand in the ids, and places in the ids that no picture fills."""
    places, tokens = int((ids == model.image_token).sum()), sum(pictures.tokens) if pictures is not None else 0
    if places != tokens:
        raise ValueError(f"ids: got {places} image tokens, want {tokens}, as many as the pictures have")


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, PyTorch's CPU allocator or that of pinned memory had no memory left."""
    said = ("you tried to allocate", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)


def _advice(what: str, error: BaseException) -> MemoryError:
    return MemoryError(
        f"{what} do not fit into memory ({' '.join(str(error).split())[:200]}); lower max_tokens, use fewer or smaller "
        "images, a smaller dtype, or close other sessions"
    )


@contextmanager
def _advised(what: str) -> Iterator[None]:
    """Inside, running out of memory is a `MemoryError` that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise _advice(what, error) from None
