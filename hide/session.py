"""The verbs that methods are written in: what can be asked of images that a model has seen.

A method looks (`attention`, `hidden`), cuts out (`crop`), speaks (`ask`, `chat`), or goes its own way (`branch`).
`ImageSession` offers all of them on a local model, with one prefill for everything. Other engines subclass `Session`
with the verbs that they have.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor

from hide.engine.prefix import Branch, Kept, KeptGoneError, Prefix, Reply, check_turn, encode
from hide.engine.usage import count
from hide.images import ImageLike, decode, load_image, picture_notes, to_image, to_tensor, within_aspect
from hide.models.base import Adapter
from hide.models.inputs import Features, ImageInputs
from hide.models.prompts import Turn
from hide.presets import WHITE, RunSettings, check_count
from hide_kernels.collage import Collage, collage
from hide_kernels.collage.api import check_image

__all__ = [
    "VERBS",
    "Branch",
    "ImageSession",
    "Message",
    "Reply",
    "RunSettings",
    "Session",
    "Turn",
    "listed",
    "open_session",
]

VERBS = ("attention", "chat", "crop", "ask", "branch", "hidden")
"""What a session may offer; a remote engine has the first four, or some of them."""
# Positions that are left for a question and its reply where images would fill them all.
QUESTION_ROOM = 1024

Step = Callable[[str], AbstractContextManager[Any]]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Message:
    """A user's turn of a conversation: images, Pillow's or (H, W, 3 or 4) uint8 tensors, then text. The session's own
    images stand before those of the first."""

    text: str
    images: Sequence[Image.Image | Tensor] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"text: got {type(self.text).__name__}, want a string")
        if not isinstance(self.images, (list, tuple)):
            raise TypeError(f"images: got {type(self.images).__name__}, want a list of images, which may be empty")
        for image in self.images:
            if not isinstance(image, (Image.Image, Tensor)):
                raise TypeError(f"images: got {type(image).__name__}, want Pillow images or (H, W, 3 or 4) tensors")
        # A list that its owner changes afterwards would change what was said.
        object.__setattr__(self, "images", tuple(self.images))


class Session:
    """Images, and what can be asked of them; what an engine lacks is a `ValueError` that names it.

    images: as they were read. notes: what was left out of them or guessed (`hide.images.picture_notes`). image_tokens:
    how many tokens stand for each. max_aspect: how many times as long as wide an image may be.
    """

    images: tuple[Image.Image, ...] = ()
    notes: tuple[str, ...] = ()
    image_tokens: tuple[int, ...] = ()
    max_aspect: int = 200

    @property
    def pixels(self) -> tuple[Tensor, ...]:
        """Those of the images, (H, W, 3 or 4) uint8, where the engine is."""
        return tuple(map(to_tensor, self.images))

    @property
    def verbs(self) -> frozenset[str]:
        """Which of `VERBS` this kind of session offers."""
        offered = {verb for verb in VERBS if getattr(type(self), verb) is not getattr(Session, verb)}
        return frozenset(offered | {"crop"} | ({"ask"} if "chat" in offered else set()))

    def turn(self, said: str | Sequence[Message | Reply]) -> Turn:
        """A text, or a conversation that ends with a user's turn, as `attention` and `branch` take it.

        Special tokens that stand in a text are broken up: it cannot end its turn or add an image.

        Raises `ValueError` for a conversation that does not alternate, or that is longer than the model takes.
        """
        raise self._lacks("attention")

    def attention(
        self,
        turn: Turn,
        *,
        layers: Sequence[int] | None,
        causal: bool = True,
        queries: range | None = None,
        keep_layers: bool = False,
    ) -> list[Tensor]:
        """Attention rows of a turn's tokens over each image, averaged over heads and layers.

        The prompt goes through the model up to the last of `layers` and no further, without logits.

        Args:
            turn: as `turn` gives it.
            layers: zero-based; `None`: all.
            causal: whether a row is blind to later tokens.
            queries: places of tokens of the prompt behind the session's images; `None`: those of the last turn's text
                (`Turn.rows`). `range(L - 1, L)` is the token that the reply is predicted from.
            keep_layers: do not average over the layers.

        Returns:
            Per image (T, rows, columns) float32 where the model is, of the T queries; with `keep_layers`
            (layers, T, rows, columns). Softmax over all keys: a map sums to what the image gets of the attention.
        """
        raise self._lacks("attention")

    def chat(self, messages: Sequence[Message | Reply], *, max_new_tokens: int) -> Reply:
        """The greedy reply to a conversation: users' turns, and the replies to all but the last.

        A conversation that goes on behind the last reply, with the same image objects in `messages`, costs no more than
        what is new in it.
        """
        raise self._lacks("chat")

    def ask(self, text: str, images: Sequence[Image.Image | Tensor] = (), *, max_new_tokens: int) -> Reply:
        """The greedy reply to the session's images, then `images`, then `text`, as one user's turn."""
        return self.chat([Message(text, images)], max_new_tokens=max_new_tokens)

    def crop(
        self, boxes: Sequence[Tensor], *, fill: tuple[int, int, int] | None = WHITE, alpha_threshold: int | None = None
    ) -> list[Collage]:
        """What lies in boxes, at full resolution, one picture per image: of several boxes a layout-preserving collage.

        boxes: per image (K, 4) int64 pixels x0, y0, x1, y1 half-open; those that touch are merged. fill,
        alpha_threshold: as `hide_kernels.collage`; boxes are cut down to what is opaque only where that is asked for.
        """
        if len(boxes) != len(self.images):
            raise ValueError(f"boxes: got {len(boxes)} tensors, want {len(self.images)}, one per image")
        for own in boxes:
            if not isinstance(own, Tensor):
                raise TypeError(f"boxes: got {type(own).__name__} for an image, want a (K, 4) tensor of int64")
        return [
            collage(image, own.cpu(), fill=fill, alpha_threshold=alpha_threshold)
            for image, own in zip(self.pixels, boxes, strict=True)
        ]

    def branch(self, ids: Tensor, *args: Any, **kwargs: Any) -> AbstractContextManager[Branch]:
        """See `hide.engine.prefix.Prefix.branch`: prompts through the model layer by layer."""
        raise self._lacks("branch")

    def hidden(self, layer: int) -> Tensor:
        """See `hide.engine.prefix.Prefix.hidden`: states that enter a layer, of the tokens up to the text.

        `turn(...).images[i].span` says which of them are those of image i.
        """
        raise self._lacks("hidden")

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made when it is first asked for and held until the session is closed: what a method
        computes of the images whatever the question.

        Threads that ask at once may each make one, and get the same; inside an open branch there is one.
        """
        held: dict[Hashable, Any] = vars(self).setdefault("_held", {})
        if key not in held:
            held.setdefault(key, make())
        found: T = held[key]
        return found

    def close(self) -> None:
        """Free what is held; no more can be asked."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lacks(self, verb: str) -> ValueError:
        return ValueError(f"session: {type(self).__name__} has no {verb}; it offers {', '.join(sorted(self.verbs))}")


class _Conversation(NamedTuple):
    """What was said last: messages and reply, the images of each user's turn, and what the prefix has kept of it."""

    said: tuple[Message | Reply, ...]
    inputs: tuple[ImageInputs | None, ...]
    kept: Kept | None


class ImageSession(Prefix, Session):
    """Images, encoded and prefilled once, for any number of questions, from any number of threads::

    with open_session(model, "street.jpg") as session:
        rows = session.attention(session.turn("umbrella"), layers=[14])
        print(session.ask("What color is the umbrella?", max_new_tokens=20).text)
    """

    inputs: ImageInputs

    def __init__(
        self,
        model: Adapter,
        inputs: ImageInputs,
        *,
        features: Features | None = None,
        images: Sequence[Image.Image] = (),
        pixels: Sequence[Tensor] = (),
        notes: Sequence[str] = (),
        run: RunSettings | None = None,
        room: int = 256,
        taps: Sequence[int] = (),
    ) -> None:
        """Encode and prefill; as `Prefix`.

        images: what the inputs were made from. pixels: theirs, which crops are cut out of, where the model is. notes:
            about how they were read. taps: decoder layers whose inputs are kept for `hidden`.
        """
        self.run = run or RunSettings()
        super().__init__(
            model,
            model.image_prefix(inputs),
            inputs,
            features=features,
            prefill_chunk=self.run.prefill_chunk,
            room=room,
            offload=self.run.offload_kv,
            taps=taps,
        )
        count(self.length)
        self.images, self._pixels, self.notes = tuple(images), tuple(pixels), tuple(notes)
        self.image_tokens, self.max_aspect = inputs.tokens, model.max_aspect
        self._conversation: _Conversation | None = None
        self._held: dict[Hashable, Any] = {}

    @property
    def pixels(self) -> tuple[Tensor, ...]:
        """See `Session`; `RuntimeError` after `close`."""
        # Taken first: another thread may close the session between the two.
        pixels, _ = self._pixels, self.cache
        return pixels or super().pixels

    @property
    def nbytes(self) -> int:
        """Memory of the devices that is held: as a `Prefix`, the images' pixels, and what `once` holds, where it has
        `nbytes`."""
        held = [*self._pixels, *self._held.values()]
        return super().nbytes + sum(getattr(one, "nbytes", 0) for one in held)

    def close(self) -> None:
        """As a `Prefix`; the pixels and what `once` holds too."""
        super().close()
        self._pixels, self._conversation, self._held = (), None, {}

    def turn(self, said: str | Sequence[Message | Reply]) -> Turn:
        """See `Session`."""
        messages = [Message(said)] if isinstance(said, str) else said
        return self._turn(messages, [])[0]

    def attention(
        self,
        turn: Turn,
        *,
        layers: Sequence[int] | None,
        causal: bool = True,
        queries: range | None = None,
        keep_layers: bool = False,
    ) -> list[Tensor]:
        """See `Session`."""
        check_turn(turn)
        with self.branch(turn.input_ids, turn.more) as branch:
            return branch.attention(turn, layers=layers, causal=causal, queries=queries, keep_layers=keep_layers)

    def chat(self, messages: Sequence[Message | Reply], *, max_new_tokens: int, static: bool | None = None) -> Reply:
        """See `Session`; static: as `hide.engine.prefix.Branch.reply`."""
        _alternating(messages)
        last, messages = self._conversation, tuple(messages)
        if last is not None and last.kept is not None and last.kept is self.kept and _goes_on(last.said, messages):
            turn, inputs = self._turn(messages, last.inputs)
            there = last.kept.ids.shape[1]
            if torch.equal(turn.input_ids[:, :there], last.kept.ids):
                try:
                    return self._reply(messages, turn, inputs, last.kept, max_new_tokens, static)
                except KeptGoneError:
                    pass  # another thread's prompt came in between
        turn, inputs = self._turn(messages, [])
        return self._reply(messages, turn, inputs, None, max_new_tokens, static)

    def ask(
        self,
        text: str,
        images: Sequence[Image.Image | Tensor] = (),
        *,
        max_new_tokens: int,
        static: bool | None = None,
    ) -> Reply:
        """See `Session`; static: as `hide.engine.prefix.Branch.reply`."""
        return self.chat([Message(text, images)], max_new_tokens=max_new_tokens, static=static)

    def prepare(self, images: Sequence[Image.Image | Tensor], behind: int = 0) -> ImageInputs:
        """Further images as the vision encoder takes them, in no more tokens than the model has positions for.

        behind: tokens of the conversation behind the session's images.
        """
        pixels = [image if isinstance(image, Tensor) else to_tensor(load_image(image)) for image in images]
        for image in pixels:
            check_image(image)
        free = (self.model.max_positions - self.length - behind - QUESTION_ROOM) // len(pixels)
        budget = max(self.image_tokens) if self.run.view_tokens == "auto" else self.run.max_tokens
        most = max(self.run.min_tokens, min(budget, free))
        return preprocess(self.model, [within_aspect(image, self.max_aspect) for image in pixels], self.run, most)

    def _turn(
        self, messages: Sequence[Message | Reply], known: Sequence[ImageInputs | None]
    ) -> tuple[Turn, tuple[ImageInputs | None, ...]]:
        """The conversation as a turn, whose `more` are the images of the messages behind the `known` ones; and the
        images of each message, without pixels."""
        users, replies = _alternating(messages)
        every, more = list(known), None
        for user in users[len(known) :]:
            own = None
            if user.images:
                own = self.prepare(user.images, sum(sum(given.tokens) for given in every[1:] if given))
                more = own if more is None else more + own
            first = not every
            every.append(self.inputs + own.without_pixels() if first and own else self.inputs if first else own)
        turn = self.model.conversation(
            [(user.text, inputs) for user, inputs in zip(users, every, strict=True)],
            [reply.ids if len(reply.ids) else reply.text for reply in replies],
        )
        return replace(turn, more=more), tuple(given and given.without_pixels() for given in every)

    def _reply(
        self,
        messages: tuple[Message | Reply, ...],
        turn: Turn,
        inputs: tuple[ImageInputs | None, ...],
        behind: Kept | None,
        max_new_tokens: int,
        static: bool | None,
    ) -> Reply:
        check_count("max_new_tokens", max_new_tokens)
        with self.branch(turn.input_ids, turn.more, room=max_new_tokens, behind=behind) as branch:
            new = branch.reply(max_new_tokens=max_new_tokens, static=static, keep=True)
        there = self.length if behind is None else behind.ids.shape[1]
        own = turn.more.tokens if turn.more is not None else ()
        newest = len(messages[-1].images) if isinstance(messages[-1], Message) else 0
        tokens = turn.input_ids.shape[1] - there + len(new)
        reply = Reply(self.model.decode(new), tokens, tuple(new), own[len(own) - newest :], branch.margin)
        self._conversation = _Conversation((*messages, reply), inputs, self.kept)
        return reply


def open_session(
    model: Adapter,
    images: ImageLike | Sequence[ImageLike],
    run: RunSettings | None = None,
    *,
    taps: Sequence[int] = (),
    step: Step = lambda name: nullcontext(),
) -> ImageSession:
    """Read, encode and prefill images. Close the session, or use it in a `with` block, to free what it holds.

    Args:
        images: one or several, whatever `hide.images.load_image` reads.
        taps: decoder layers whose inputs are kept for `ImageSession.hidden`.
        step: called with the name of each step, for a context manager around it.

    Raises `ValueError` for images of more tokens than the model has positions for, before they are encoded.
    """
    run = run or RunSettings()
    run.check(model)
    device = model.model.device
    read: list[Image.Image] = []
    pixels: list[Tensor] = []
    with step("read and resize"), picture_notes() as notes:
        for image in listed(images):
            source = _decoded(image, run, device)
            read.append(load_image(image) if source is None else to_image(source))
            pixels.append(to_tensor(read[-1], device) if source is None else source)
        inputs = _views(model, pixels, run)
        if (tokens := sum(inputs.tokens)) > model.max_positions:
            raise ValueError(
                f"image: together they have {tokens} tokens, and the model takes {model.max_positions}; use fewer or "
                "smaller ones, or lower max_tokens"
            )
    with step("prefix"):
        # The encoder's input is let go of before the prefill.
        inputs, features = encode(model, inputs)
        return ImageSession(
            model, inputs, features=features, images=read, pixels=pixels, notes=notes, run=run, taps=taps
        )


def _views(model: Adapter, images: Sequence[Tensor], run: RunSettings) -> ImageInputs:
    """What a session looks at of its own images, each with a budget of its own."""
    first, *others = (preprocess(model, [one], run, run.view(one.shape[1], one.shape[0])) for one in images)
    return sum(others, first)


def preprocess(
    model: Adapter, images: Sequence[Image.Image | Tensor], run: RunSettings, max_tokens: int | None = None
) -> ImageInputs:
    """What the vision encoder takes, within the run's budget, or in `max_tokens` tokens per image at most."""
    most = run.max_tokens if max_tokens is None else max_tokens
    least = min(run.min_tokens, most)
    return replace(model.preprocess(images, min_tokens=least, max_tokens=most), joined=run.join_images)


def listed(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    """One image or several, as several; `ValueError` for none."""
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("image: got an empty list, want at least one picture")
        return images
    return [images]  # type: ignore[list-item]


def _decoded(image: ImageLike, run: RunSettings, device: torch.device) -> Tensor | None:
    """The pixels of a file that is decoded on the device; `None` where the settings or the file want Pillow."""
    if run.decoder == "pillow" or not isinstance(image, (str, Path)):
        return None
    try:
        return decode(image, device=device, decoder=run.decoder)
    except (ValueError, OSError):
        return None


def _alternating(messages: Sequence[Message | Reply]) -> tuple[list[Message], list[Reply]]:
    """The user's turns and the replies between them; `TypeError` or `ValueError` where they do not alternate."""
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"messages: got {type(messages).__name__}, want a list of Message and Reply")
    users = [message for message in messages[::2] if isinstance(message, Message)]
    replies = [reply for reply in messages[1::2] if isinstance(reply, Reply)]
    if not messages or len(users) != len(replies) + 1 or len(users) + len(replies) != len(messages):
        raise ValueError("messages: want a Message, and behind it any number of a Reply and a Message in turn")
    return users, replies


def _goes_on(said: tuple[Message | Reply, ...], messages: tuple[Message | Reply, ...]) -> bool:
    """Whether a conversation begins with what was said: the same texts and replies, and the same objects for images, of
    which equal tokens say nothing."""
    return len(messages) > len(said) and all(_same(old, new) for old, new in zip(said, messages, strict=False))


def _same(old: Message | Reply, new: Message | Reply) -> bool:
    if isinstance(old, Reply) or isinstance(new, Reply):
        return old == new
    images = len(old.images) == len(new.images) and all(a is b for a, b in zip(old.images, new.images, strict=True))
    return old.text == new.text and images
