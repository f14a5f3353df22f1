"""Chat prompts: what a tokenizer's template makes of turns with images, and where images and text lie in it."""

from __future__ import annotations

import operator
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError
from torch import Tensor

from hide.models.inputs import ImageInputs
from hide.questions import check_unicode
from hide.texts import one_line
from hide_kernels import ImageTokens

# Stands for a turn's text where only what the chat template puts around it matters.
PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Turn:
    """A tokenised prompt that ends with a user's turn, up to where the reply begins.

    input_ids: (1, L) int64. images: where each image's tokens lie. images_end: place of the first token behind the last
    image and its special tokens. labels: the text of each token from there on. rows: places of the tokens of the last
    turn's text. offsets: the characters of that text, half-open, that each of `rows` stands for; below 0 or beyond the
    text where a token also holds some of the template's. ended: whether a special token follows directly. more: the
    images that are not in the session's prefix, with their pixels.
    """

    input_ids: Tensor
    images: tuple[ImageTokens, ...]
    images_end: int
    labels: tuple[str, ...]
    rows: range
    offsets: tuple[tuple[int, int], ...]
    ended: bool
    more: ImageInputs | None = None


class ChatPrompts(ABC):
    """The prompts of a model: a part of `hide.models.Adapter`, which gives the attributes."""

    image_text: ClassVar[str]
    """The special token that stands for each image token."""
    image_end: ClassVar[str | None] = None
    """The special token behind an image's tokens, if there is one."""
    tokenizer: Any

    @property
    @abstractmethod
    def lock(self) -> threading.RLock:
        """Of the model."""

    @property
    @abstractmethod
    def max_positions(self) -> int:
        """Tokens that a prompt and its reply may have."""

    @property
    @abstractmethod
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a reply."""

    @abstractmethod
    def image_tokens(self, ids: Tensor, images: ImageInputs) -> tuple[ImageTokens, ...]:
        """Where each image lies in (1, L) ids, and which token shows which cell of its map."""

    def placeholders(self, count: int) -> str:
        """What takes the place that the chat template gives an image of so many tokens."""
        return self.image_text * count

    def escape(self, text: str) -> str:
        """`text` with a blank inside everything that the tokenizer would read as a special token.

        Raises `TypeError` for what is no string, `ValueError` for one that is not Unicode.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: got {type(text).__name__}, want a string")
        check_unicode("text", text)
        for token in self.tokenizer.get_added_vocab():
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def input_ids(self, text: str, images: ImageInputs | None = None) -> Tensor:
        """(1, L) ids of one user turn, images first, up to where the reply begins.

        Special tokens that stand in `text` are broken up, so that a question cannot end its turn or add an image.
        """
        return self._checked(self._tokenise(self._render([(self.escape(text), images)])[0])[0])

    def turn(self, text: str, images: ImageInputs) -> Turn:
        """One user turn, images first, and where its images and its text lie."""
        return self.conversation([(text, images)], ())

    def conversation(
        self, turns: Sequence[tuple[str, ImageInputs | None]], replies: Sequence[str | Sequence[int]]
    ) -> Turn:
        """Several turns up to where the next reply begins.

        Args:
            turns: of the user; in each the images come first. `images` of the result are all of them.
            replies: between the turns: tokens as they were generated, of which one that ends the reply is dropped, as
                the template has its own; or a text, which is tokenised.

        Raises `ValueError` for a text that cannot be told from the template around it.
        """
        if len(replies) != len(turns) - 1:
            raise ValueError(f"turns: got {len(turns)} with {len(replies)} replies, want one reply between two turns")
        if not turns[-1][0]:
            raise ValueError("text: got nothing, want a character at least")
        escaped = [(self.escape(text), images) for text, images in turns]
        rendered = self._render(escaped)[-1]
        # Before a reply stands what stood there when it was generated; templates may end it otherwise afterwards.
        before = [self._render(escaped[: number + 1])[-1] for number in range(len(replies))]
        head, _, behind = self._render([*escaped[:-1], (PLACEHOLDER, escaped[-1][1])])[-1].rpartition(PLACEHOLDER)
        start, stop = len(head), len(rendered) - len(behind)
        tokens: list[int] = []
        for part, reply in zip(before, replies, strict=True):
            tokens += self._tokenise(part)[0] + self._reply_tokens(reply)
        last, offsets = self._tokenise(rendered)
        inside = [place for place, (first, end) in enumerate(offsets) if end > start and first < stop]
        if not inside or offsets[inside[-1]][1] > stop:
            raise ValueError(
                f"text: {turns[-1][0][-40:]!r} melts into the chat template behind it; end it with punctuation"
            )
        rows = range(len(tokens) + inside[0], len(tokens) + inside[-1] + 1)
        ids = self._checked(tokens + last)
        shown = [images for _, images in turns if images is not None]
        images = sum(shown[1:], shown[0]) if shown else ImageInputs(())
        everything = tokens + last
        images_end = self._images_end(everything) if shown else 0
        following = self.tokenizer.convert_ids_to_tokens(everything[rows.stop : rows.stop + 1])
        return Turn(
            ids,
            self.image_tokens(ids, images) if shown else (),
            images_end,
            tuple(self.tokenizer.decode([token]) for token in everything[images_end:]),
            rows,
            tuple((first - start, end - start) for first, end in offsets[inside[0] : inside[-1] + 1]),
            bool(following) and following[0] in self.tokenizer.get_added_vocab(),
        )

    def image_prefix(self, images: ImageInputs) -> Tensor:
        """(1, P) ids that every prompt begins with that is about these images and, behind them, perhaps others."""
        ids = self._checked(self._tokenise(self._render([(PLACEHOLDER, images)])[0])[0])
        if images.joined:
            return ids[:, : int((ids[0] == self._id(self.image_text)).nonzero()[-1]) + 1]
        return ids[:, : self._images_end(ids[0].tolist())]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a reply, without special tokens and surrounding blanks."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def reply_ids(self, text: str) -> Tensor:
        """(1, n) ids of a reply as the model generates it, with the one that ends it."""
        end = self.tokenizer.eos_token_id
        return torch.tensor([[*self._reply_tokens(text), end if end in self.end_tokens else min(self.end_tokens)]])

    def _reply_tokens(self, reply: str | Sequence[int]) -> list[int]:
        if isinstance(reply, str):
            return self._tokenise(self.escape(reply))[0]
        tokens = [operator.index(token) for token in reply]
        if any(token < 0 for token in tokens) or self._id(self.image_text) in tokens:
            raise ValueError(f"reply: got ids {tokens[:8]} of text and images, want tokens of a text")
        return tokens[:-1] if tokens and tokens[-1] in self.end_tokens else tokens

    def _images_end(self, tokens: list[int]) -> int:
        """One past the last image's last special token, which no text can melt into."""
        return len(tokens) - tokens[::-1].index(self._id(self.image_end or self.image_text))

    def _id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def _checked(self, tokens: list[int]) -> Tensor:
        """(1, L) ids, if the model has positions for them."""
        if len(tokens) > self.max_positions:
            raise ValueError(
                f"question: with its images it has {len(tokens)} tokens, and the model takes {self.max_positions}; "
                "shorten it, or lower max_tokens"
            )
        return torch.tensor([tokens])

    def _tokenise(self, rendered: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a rendered prompt, and which of its characters each token stands for."""
        with self.lock:
            # It may drop settings of its own first, which it refuses while another thread is in there.
            encoded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _render(self, turns: Sequence[tuple[str, ImageInputs | None]]) -> list[str]:
        """The chat template's text for each turn, from behind the reply before it to where its own begins."""
        marks = [f"{PLACEHOLDER}{number}{PLACEHOLDER}" for number in range(len(turns) - 1)]
        messages: list[dict[str, Any]] = []
        for number, (text, images) in enumerate(turns):
            if number:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": marks[number - 1]}]})
            places = images.places if images else ()
            content = [*({"type": "image"} for _ in places), {"type": "text", "text": text}]
            messages.append({"role": "user", "content": content})
        try:
            rest = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"tokenizer: its chat template cannot be rendered: {one_line(error)}") from None
        parts = []
        for mark in marks:
            part, found, rest = rest.partition(mark)
            if not found:
                raise ValueError("tokenizer: its chat template does not show the replies of a conversation")
            parts.append(part)
        return [self._placed(part, images) for part, (_, images) in zip([*parts, rest], turns, strict=True)]

    def _placed(self, rendered: str, images: ImageInputs | None) -> str:
        """A rendered turn with as many image tokens in each image's place as it has."""
        places = images.places if images else ()
        pieces = rendered.split(self.image_text)
        if len(pieces) != len(places) + 1:
            raise ValueError(
                f"tokenizer: its chat template made {len(pieces) - 1} image places for {len(places)} images"
            )
        placed = (self.placeholders(count) + piece for count, piece in zip(places, pieces[1:], strict=True))
        return pieces[0] + "".join(placed)
