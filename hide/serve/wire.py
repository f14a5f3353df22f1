"""The chat-completions format: what a client's bytes ask for, and what it is sent back.

Nothing is decoded, and no picture unpacked, before it is known to be within the bounds.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
import time
import uuid
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from hide.questions import Question
from hide.serve.limits import Limits
from hide.texts import one_line

FORMATS = ("PNG", "JPEG", "WEBP")
_DATA = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)
# Scans that a JPEG may have, each of which goes over the whole picture; encoders make about ten.
_SCANS = 100
# Fields that could ask for another answer than the one greedy reply, with the values that do not.
_OFF: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "temperature": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "stop": (None, [], ""),
    "tools": (None, []),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "response_format": (None, {"type": "text"}),
}
# What changes nothing of a greedy reply.
_WITHOUT_EFFECT = {"top_p", "top_k", "min_p", "seed", "user", "metadata", "store", "service_tier", "tool_choice"}


class Refused(Exception):
    """A request that gets no answer: an HTTP status, and why."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """message: begins with what is wrong. param: the field that is. code: OpenAI's word for it, if it has one."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What OpenAI's clients read."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


@dataclass(frozen=True, eq=False)
class Asked:
    """What a request asks.

    way: how it is to be answered, one of the engine's. pictures: files, at least one. key: the same for requests of one
    client about the same files, and for no others. max_tokens: bound on the reply; `None`: the engine's.
    """

    way: str
    question: Question
    pictures: tuple[bytes, ...]
    key: bytes
    max_tokens: int | None = None
    notes: tuple[str, ...] = ()
    stream: bool = False
    stream_usage: bool = False


@dataclass(frozen=True)
class Answered:
    """What an engine says to it.

    text: the reply. cut: whether it ended because it may not be longer. Tokens: language-model positions of everything
    but the reply, with those that were there from an earlier request (cached_tokens), and of the reply. found: of the
    way, for JSON (`hide.methods.base.Answer.to_dict`).
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    cut: bool = False
    found: Mapping[str, Any] = field(default_factory=dict)


# -- what comes -------------------------------------------------------------------------------------------------------


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Text(_Form):
    type: Literal["text"]
    text: str


class _Url(_Form):
    url: str


class _Image(_Form):
    type: Literal["image_url"]
    image_url: Annotated[_Url, BeforeValidator(lambda given: {"url": given} if isinstance(given, str) else given)]


class _Turn(_Form):
    role: str
    content: Annotated[
        list[Annotated[_Text | _Image, Field(discriminator="type")]],
        FailFast(),
        BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given),
    ]


class _StreamOptions(_Form):
    include_usage: bool | None = None


class _Chat(_Form):
    model: str
    messages: Annotated[list[_Turn], FailFast()]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


def read(body: bytes, ways: Collection[str], limits: Limits, owner: bytes = b"") -> Asked:
    """What a body asks; owner: whose request it is.

    Raises `Refused` for everything that cannot be answered.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > limits.values:
        raise Refused(400, f"body: it has more than {limits.values:,} values")
    try:
        chat = _Chat.model_validate_json(body)
    except ValidationError as error:
        raise _misshapen(error) from None
    if chat.model not in ways:
        known = ", ".join(ways)
        raise Refused(404, f"model: got {_short(chat.model)}, want one of {known}", "model", "model_not_found")
    notes = [*_settings(chat.model_extra or {}), *_system(chat.messages)]
    parts = [part for turn in chat.messages if turn.role == "user" for part in turn.content]
    texts = [part.text for part in parts if isinstance(part, _Text)]
    urls = [part.image_url.url for part in parts if isinstance(part, _Image)]
    worded = [isinstance(part, _Text) for part in parts]
    if worded != sorted(worded):
        notes.append("messages: the model was shown all pictures first, and then the text")
    if not 1 <= len(urls) <= limits.images:
        raise Refused(400, f"messages: got {len(urls)} pictures, want 1 to {limits.images}", "messages")
    if (length := sum(map(len, texts))) > limits.text:
        raise Refused(400, f"messages: got {length:,} characters of text, want at most {limits.text:,}", "messages")
    try:
        question = Question.parse("\n".join(texts))
    except ValueError as error:
        raise Refused(400, str(error), "messages") from None
    for url in urls:
        if not _DATA.match(url):
            raise Refused(
                400,
                f"image_url: got {_short(url)}, want data:image/png;base64,... or jpeg or webp: nothing is fetched, "
                "and no file is opened",
                "messages",
            )
    pictures = tuple(map(_decoded, urls))
    _check_pictures(pictures, limits)
    digests = (hashlib.sha256(one).digest() for one in (owner, *pictures))
    return Asked(
        chat.model,
        question,
        pictures,
        hashlib.sha256(b"".join(digests)).digest(),
        min((most for most in (chat.max_tokens, chat.max_completion_tokens) if most is not None), default=None),
        tuple(notes),
        bool(chat.stream),
        bool(chat.stream_options and chat.stream_options.include_usage),
    )


def _settings(more: Mapping[str, Any]) -> list[str]:
    """Notes about fields that are not known; `Refused` for those that want what there is not."""
    for name, off in _OFF.items():
        if more.get(name) not in off:
            want = json.dumps(off[-1])
            raise Refused(400, f"{name}: got {_short(more[name])}, want {want} or nothing: replies are greedy", name)
    unknown = sorted(name for name in more if name not in _OFF and name not in _WITHOUT_EFFECT)
    if not unknown:
        return []
    return [f"request: {', '.join(map(_short, unknown[:8]))} {'is' if len(unknown) == 1 else 'are'} not known here"]


def _system(turns: Sequence[_Turn]) -> list[str]:
    """Notes about system turns; `Refused` where there is more than one user's turn beside them."""
    roles = [turn.role for turn in turns if turn.role not in ("system", "developer")]
    if roles != ["user"]:
        said = ", ".join(map(_short, roles[:8])) or "none"
        raise Refused(400, f"messages: got turns of {said}; want one user's turn, and no earlier answers", "messages")
    if len(turns) == 1:
        return []
    if any(isinstance(part, _Image) for turn in turns if turn.role != "user" for part in turn.content):
        raise Refused(400, "messages: got a picture in a system turn, want it in the user's", "messages")
    return ["messages: the system turn was not shown to the model, which has the one of its chat template"]


def _decoded(url: str) -> bytes:
    try:
        return base64.b64decode(url[url.index(",") + 1 :], validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters that are not ASCII
        raise Refused(400, f"image_url: it is not base64 ({error})", "messages") from None


def _check_pictures(pictures: Sequence[bytes], limits: Limits) -> None:
    """Refuse by their headers what is no picture, or would unpack to too much."""
    pixels = 0
    for data in pictures:
        try:
            with warnings.catch_warnings():
                # Pillow's bound is the process's, which anybody may have changed.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    pixels += image.width * image.height
                    # A camera's JPEG with a second picture inside is an MPO to Pillow.
                    scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
                    # Whoever unpacks it lets Pillow try all formats, some of which come before these.
                    with Image.open(io.BytesIO(data)) as found:
                        if found.format != image.format:
                            raise UnidentifiedImageError(found.format)
        except Image.DecompressionBombError as error:
            raise Refused(
                413, f"image_url: want at most {limits.pixels:,} pixels in all ({error})", "messages"
            ) from None
        except UnidentifiedImageError:
            raise Refused(400, f"image_url: it is none of {', '.join(FORMATS)}", "messages") from None
        except Exception as error:  # decoders raise what they come across
            raise Refused(400, f"image_url: it cannot be read as a picture: {one_line(error)}", "messages") from None
        if pixels > limits.pixels:
            raise Refused(413, f"image_url: got {pixels:,} pixels, want at most {limits.pixels:,} in all", "messages")
        if scans > _SCANS:
            raise Refused(400, f"image_url: got a JPEG of {scans} scans, want at most {_SCANS}", "messages")


def _misshapen(error: ValidationError) -> Refused:
    """What is wrong first, and where."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    loc = first["loc"]
    # Behind a part's number stands its type, by which pydantic tells the two apart.
    names = [
        one for at, one in enumerate(loc) if not (loc[max(at - 2, 0)] == "content" and isinstance(loc[at - 1], int))
    ]
    place = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in names)[1:]
    return Refused(400, f"{place or 'body'}: {one_line(first['msg'])}", str(names[0]) if names else None)


def _short(value: Any) -> str:
    """A value in a message, of which a client may have sent any amount."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else f"{value[:60]}...")
    return repr(value) if isinstance(value, (int, float)) or value is None else f"a {type(value).__name__}"


# -- what goes back ---------------------------------------------------------------------------------------------------


def completion(asked: Asked, answered: Answered) -> dict[str, Any]:
    """The reply to a request."""
    message = {"role": "assistant", "content": answered.text}
    choice = {"index": 0, "message": message, "finish_reason": _ended(answered), "logprobs": None}
    return {
        **_head(asked, "chat.completion"),
        "choices": [choice],
        "usage": _usage(answered),
        "hide": dict(answered.found),
    }


def chunks(asked: Asked, answered: Answered) -> Iterator[str]:
    """The same as server-sent events: the text, then how it ended, with what was found."""
    head = _head(asked, "chat.completion.chunk")
    said = {"index": 0, "delta": {"role": "assistant", "content": answered.text}, "finish_reason": None}
    ended = {"index": 0, "delta": {}, "finish_reason": _ended(answered)}
    events = [{**head, "choices": [said]}, {**head, "choices": [ended], "hide": dict(answered.found)}]
    if asked.stream_usage:
        events.append({**head, "choices": [], "usage": _usage(answered)})
    for event in events:
        yield f"data: {json.dumps(event)}\n\n"
    yield "data: [DONE]\n\n"


def _head(asked: Asked, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.way}


def _ended(answered: Answered) -> str:
    return "length" if answered.cut else "stop"


def _usage(answered: Answered) -> dict[str, Any]:
    prompt, reply = answered.prompt_tokens, answered.completion_tokens
    cached = {"cached_tokens": answered.cached_tokens}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": reply,
        "total_tokens": prompt + reply,
        "prompt_tokens_details": cached,
    }
