"""What all model families share: prompts, pieces of forwards, attention rows and replies.

A family's adapter says how pictures become tokens, where those lie, and which positions they have; everything else is
here. Models are Hugging Face's own classes, unmodified. Tokenizer, chat template and image processor are loaded one by
one: `AutoProcessor` would need torchvision, which has no CPU build.
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import transformers
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, is_flash_attn_2_available

from hide.config import SEARCH_PROMPT
from hide.decoding import greedy_settings
from hide.engine.chunked_sdpa import continuing, slides
from hide.kv_cache import cache_keyword
from hide.models.checkpoint import PROCESSOR, TEMPLATE, TOKENIZER, one_line, read_config, read_weights, reading
from hide.models.quantised import Weights, check, loading
from hide_kernels import ImageTokens, rows_to_maps
from hide_kernels.integrations.transformers import capture_attention, capturing

# Stands for a turn's text where only what the chat template puts around it matters.
PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"

Method = TypeVar("Method", bound=Callable[..., Any])

# Of each decoder, shared by all adapters around it.
_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_new_lock = threading.Lock()


class Picture(NamedTuple):
    """One preprocessed image.

    pixels: as the family's vision encoder takes them; empty where only prompts and positions matter. layout: what the
    family must know of it besides: patches, tiles, or the size before resizing. grid: (rows, columns) of its map.
    tokens: how many stand for it in a prompt.
    """

    pixels: Tensor
    layout: tuple[int, ...]
    grid: tuple[int, int]
    tokens: int


@dataclass(frozen=True)
class Pictures:
    """Preprocessed images, in the order of the prompt.

    joined: all of them stand in the prompt as one image, their tokens one after another.
    """

    items: tuple[Picture, ...]
    joined: bool = False

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each image's map."""
        return tuple(picture.grid for picture in self.items)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each image."""
        return tuple(picture.tokens for picture in self.items)

    @property
    def places(self) -> tuple[int, ...]:
        """Tokens of each image that the prompt has a place for."""
        return (sum(self.tokens),) if self.joined else self.tokens

    def __add__(self, other: Pictures) -> Pictures:
        return replace(self, items=self.items + other.items)

    def without_pixels(self) -> Pictures:
        """What prompts and positions need; the pixels of many tokens are larger than their keys and values."""
        return replace(
            self, items=tuple(picture._replace(pixels=picture.pixels.new_empty(0)) for picture in self.items)
        )


class Features(NamedTuple):
    """What the vision encoder makes of pictures, in the order of the image tokens.

    embeddings: (tokens, hidden). deepstack: one more such tensor for each early decoder layer that adds them.
    """

    embeddings: Tensor
    deepstack: tuple[Tensor, ...] = ()

    def part(self, first: int, last: int) -> Features:
        """Those of the image tokens from `first` to `last`, half-open."""
        return Features(self.embeddings[first:last], tuple(layer[first:last] for layer in self.deepstack))


class Reply(NamedTuple):
    """What the model said, and how many tokens went through it: the prompt's, images included, and the reply's."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Turn:
    """A tokenised user turn, up to where the reply begins.

    input_ids: (1, L). images: where each image's tokens lie. rows: positions of the text's tokens.
    """

    input_ids: Tensor
    images: tuple[ImageTokens, ...]
    rows: range


@dataclass(frozen=True)
class SearchPrompt(Turn):
    """The search prompt: the rows of its fixed words, the prior, come first.

    prior_rows: how many those are. labels: text of each token after them.
    """

    prior_rows: int
    labels: tuple[str, ...]


class _Places(NamedTuple):
    """Where a rendered prompt's text begins, in characters, and the characters of each of its tokens."""

    text_start: int
    offsets: list[tuple[int, int]]


def run_alone(method: Method) -> Method:
    """A method of an adapter that runs inside `Adapter.alone`."""

    @wraps(method)
    def locked(self: Adapter, *args: Any, **kwargs: Any) -> Any:
        with self.alone():
            return method(self, *args, **kwargs)

    return cast(Method, locked)


class Adapter(ABC):
    """A model with its tokenizer and image processor, for any number of threads: all methods may be called at once.

    What a family gives: the class attributes, `preprocess`, `encode` and `image_tokens`; `positions`, `image_inputs`
    and `placeholders` where they differ.
    """

    family: ClassVar[str]
    """`model_type` of its config."""
    model_class: ClassVar[str]
    """Name of its class in transformers."""
    processors: ClassVar[tuple[str, ...]]
    """Names of its image processor in transformers, the first that is there is taken."""
    image_text: ClassVar[str]
    """The special token that stands for each image token."""
    image_end: ClassVar[str | None] = None
    """The special token behind an image's tokens, if there is one."""
    checkpoints: ClassVar[tuple[str, ...]]
    """Public checkpoints of the class, by their names on the hub."""
    presets: ClassVar[tuple[str, ...]]
    """Names in `hide.PRESETS` of values for the family, the one that is taken by itself first."""
    preset_depth: ClassVar[int]
    """Decoder layers of the model that the presets are for."""
    tested: ClassVar[str] = "random weights"
    """What the tests run it with."""
    published_prior: ClassVar[tuple[int, int] | None] = None
    """The id of `image_end` in the family's own tokenizer, and how many prior rows the published code has there."""
    joins_pictures: ClassVar[bool] = False
    """Whether several pictures may stand as one image (`Pictures.joined`)."""
    notes: tuple[str, ...] = ()
    """Doubts about the checkpoint; they are among the notes of every result."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_processor: Any) -> None:
        """Wrap parts that are loaded already; raises `ValueError` for a tokenizer without a chat template."""
        if tokenizer.chat_template is None:
            raise ValueError("tokenizer: it has no chat template; set tokenizer.chat_template to the model's")
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self.image_processor = image_processor
        self._takes_token_types = "mm_token_type_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        weights: Weights | None = None,
    ) -> Self:
        """As `hide.models.load`; safetensors only, no remote code."""
        target = named_device(device)
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: got {dtype!r}, want auto, float32, bfloat16 or float16")
        if dtype == "auto" and (weights is not None or target.type == "cpu"):
            dtype = "float32" if target.type == "cpu" else "bfloat16"
        config = read_config(path)
        quantised = {}
        if weights is not None:
            check(weights, getattr(torch, dtype), target)
            # Each layer goes to its device by itself and is quantised there: the full weights are never in one place.
            quantised = {
                "quantization_config": loading(getattr(transformers, cls.model_class), config, weights, target),
                "device_map": {"": target},
            }
        # What is small is read first: it may be damaged, and weights take their time.
        with reading(path, "tokenizer", TOKENIZER):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            if tokenizer.chat_template is None:
                tokenizer.chat_template = _legacy_chat_template(path)
        with reading(path, "image processor", PROCESSOR):
            image_processor = cls.processor_class().from_pretrained(path)
        if attn_implementation is None:
            flash = target.type == "cuda" and dtype != "float32" and is_flash_attn_2_available()
            attn_implementation = "flash_attention_2" if flash else "sdpa"
        model, notes = read_weights(
            getattr(transformers, cls.model_class),
            path,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            **quantised,
        )
        with reading(path, "chat template", TEMPLATE):
            adapter = cls(model.to(target), tokenizer, image_processor)
            adapter.check_template()
        with reading(path, "tokenizer", TOKENIZER):
            adapter.check_tokenizer()
        with reading(path, "image processor", PROCESSOR):
            adapter.check_image_processor()
        adapter.notes = notes
        return adapter

    def check_template(self) -> None:
        """`ValueError` for a chat template that does not show one picture's place and a turn's text once each."""
        picture = Picture(torch.empty(0), (), (1, 1), 1)
        if self._render(PLACEHOLDER, Pictures((picture,))).count(PLACEHOLDER) != 1:
            raise ValueError("tokenizer: its chat template does not show the text of a user's turn once")

    def check_tokenizer(self) -> None:
        """`ValueError` for the tokenizer of another model."""
        own, wanted = self._id(self.image_text), self.image_token
        if own != wanted:
            raise ValueError(f"tokenizer: {self.image_text} has id {own}, and the model's image_token_id is {wanted}")

    def check_image_processor(self) -> None:
        """`ValueError` where it cuts other patches than the vision encoder takes, or where its settings are no use."""
        vision = self.model.config.vision_config
        for name, of_model in (("patch_size",) * 2, ("temporal_patch_size",) * 2, ("merge_size", "spatial_merge_size")):
            own, wanted = getattr(self.image_processor, name, None), getattr(vision, of_model, None)
            if None not in (own, wanted) and own != wanted:
                raise ValueError(f"image processor: got {name} {own!r}, and the model's {of_model} is {wanted}")
        # Other settings that are no use show on a picture; the bound is no family's concern for one so small.
        self.preprocess([Image.new("RGB", (56, 56))], min_tokens=1, max_tokens=16384)

    @classmethod
    def processor_class(cls) -> Any:
        """Its image processor's class in this version of transformers."""
        return next(found for name in cls.processors if (found := getattr(transformers, name, None)))

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def max_positions(self) -> int:
        """Tokens that a prompt and its reply may have."""
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of the weights that are not quantised."""
        return self.model.dtype

    @property
    def language_model(self) -> Any:
        """The decoder without its head."""
        return self.model.model.language_model

    @property
    def input_device(self) -> torch.device:
        """Where token ids are embedded."""
        return device_of(self.language_model.get_input_embeddings())

    @property
    def lock(self) -> threading.RLock:
        """Held while the model runs, by the thread that runs it; one for all adapters of a model."""
        with _new_lock:
            return _locks.setdefault(self.language_model, threading.RLock())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the model is this thread's, without gradients and autocast: what its forwards change is theirs.

        Those of this package are all inside; calls of `model` by yourself, beside other threads, want to be as well.
        Others wait: call the model in there, but neither a session nor anything that waits for another thread.
        """
        with self.lock, torch.no_grad(), torch.autocast(self.input_device.type, enabled=False):
            yield

    @property
    def image_token(self) -> int:
        """The id that stands for each image token in a prompt."""
        return self.model.config.image_token_id

    @property
    def static_decode(self) -> bool:
        """Whether replies are decoded with fixed shapes (`hide.decoding`): on one GPU, where attention takes a mask."""
        devices = {parameter.device for parameter in self.model.parameters()}
        return len(devices) == 1 and next(iter(devices)).type == "cuda" and self.greedy_by_steps

    @property
    def captured(self) -> bool:
        """Whether a capture of attention rows, opened by this thread, is open on one of the layers."""
        return capturing(self.model)

    @property
    def greedy_by_steps(self) -> bool:
        """Whether `hide.decoding` gives what `generate` gives: SDPA over all keys, no special settings."""
        config = self.language_model.config
        with self.lock:
            if config._attn_implementation != "sdpa" or slides(config):
                return False
        try:
            greedy_settings(self.model.generation_config)
        except ValueError:
            return False
        return True

    # -- prompts --------------------------------------------------------------------------------------------------

    def input_ids(self, text: str, pictures: Pictures | None = None) -> Tensor:
        """(1, L) ids of one user turn, images first, up to where the reply begins.

        Special tokens that stand in `text` are broken up, so that a question cannot end its turn or add an image.
        """
        return self._prompt(self.escape(text), pictures)

    def escape(self, text: str) -> str:
        """`text` with a blank inside everything that the tokenizer would read as a special token."""
        for token in self.tokenizer.get_added_vocab():
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def search_prompt(
        self, entities: str, pictures: Pictures, *, prompt: str = SEARCH_PROMPT, include_end_token: bool = True
    ) -> SearchPrompt:
        """Images, then `prompt` + `entities`, and where its tokens lie.

        What the chat template puts between the images and the prompt, such as a line break, belongs to the prior.

        Raises `ValueError` if the prompt's fixed words are not tokens of their own before these entities, or if the
        family's own tokenizer does not make as many of them as the published code has.
        """
        turn, places = self._turn(prompt + self.escape(entities), pictures)
        ids = turn.input_ids[0].tolist()
        start = self._images_end(ids)
        fixed = places.text_start + len(prompt.rstrip())
        stop = next((place for place in turn.rows if places.offsets[place][1] > fixed), turn.rows.stop)
        if stop < turn.rows.stop and places.offsets[stop][0] < fixed:
            raise ValueError(
                f"search_prompt: {prompt!r} followed by {entities[:40]!r} does not keep its words as tokens of their "
                "own; end it with punctuation and a blank"
            )
        if prompt == SEARCH_PROMPT and self.published_prior is not None:
            own, want = self.published_prior
            if ids[start - 1] == own and stop - start != want:
                raise ValueError(
                    f"tokenizer: the search prompt has {stop - start} tokens, want {want} with the family's own"
                )
        last = turn.rows.stop
        ended = (
            include_end_token and self.tokenizer.convert_ids_to_tokens(ids[last]) in self.tokenizer.get_added_vocab()
        )
        rows = range(start, last + ended)
        labels = tuple(self.tokenizer.decode([token]).strip() for token in ids[stop : rows.stop])
        return SearchPrompt(turn.input_ids, turn.images, rows, stop - start, labels)

    def turn(self, text: str, pictures: Pictures) -> Turn:
        """One user turn, images first, and where its images and its text lie."""
        return self._turn(self.escape(text), pictures)[0]

    def _turn(self, text: str, pictures: Pictures) -> tuple[Turn, _Places]:
        rendered = self._render(text, pictures)
        before, _, behind = self._render(PLACEHOLDER, pictures).rpartition(PLACEHOLDER)
        start, stop = len(before), len(rendered) - len(behind)
        ids, offsets = self._tokenise(rendered)
        inside = [place for place, (first, end) in enumerate(offsets) if end > start and first < stop]
        if not inside or offsets[inside[-1]][1] > stop:
            raise ValueError(f"text: {text[-40:]!r} melts into the chat template behind it; end it with punctuation")
        rows = range(inside[0], inside[-1] + 1)
        return Turn(ids, self.image_tokens(ids, pictures), rows), _Places(start, offsets)

    def _images_end(self, tokens: list[int]) -> int:
        """One past the last image's last special token, which no text can melt into."""
        return len(tokens) - tokens[::-1].index(self._id(self.image_end or self.image_text))

    def _id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def _prompt(self, text: str, pictures: Pictures | None) -> Tensor:
        return self._tokenise(self._render(text, pictures))[0]

    def _tokenise(self, rendered: str) -> tuple[Tensor, list[tuple[int, int]]]:
        """(1, L) ids of a rendered prompt, and which of its characters each token stands for."""
        with self.lock:
            # It may drop settings of its own first, which it refuses while another thread is in there.
            encoded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        most = self.max_positions
        if len(encoded["input_ids"]) > most:
            raise ValueError(
                f"question: with its images it has {len(encoded['input_ids'])} tokens, and the model takes {most}; "
                "shorten it, or lower max_tokens"
            )
        return torch.tensor([encoded["input_ids"]]), encoded["offset_mapping"]

    def _render(self, text: str, pictures: Pictures | None) -> str:
        places = pictures.places if pictures else ()
        content = [*({"type": "image"} for _ in places), {"type": "text", "text": text}]
        try:
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"tokenizer: its chat template cannot be rendered: {one_line(error)}") from None
        pieces = rendered.split(self.image_text)
        if len(pieces) != len(places) + 1:
            raise ValueError(
                f"tokenizer: its chat template made {len(pieces) - 1} image places for {len(places)} images"
            )
        placed = (self.placeholders(count) + piece for count, piece in zip(places, pieces[1:], strict=True))
        return pieces[0] + "".join(placed)

    def placeholders(self, count: int) -> str:
        """What takes the place that the chat template gives an image of so many tokens."""
        return self.image_text * count

    def image_prefix(self, pictures: Pictures) -> Tensor:
        """(1, P) ids that every user turn begins with that is about these pictures and, behind them, perhaps others."""
        ids = self._prompt(PLACEHOLDER, pictures)
        if pictures.joined:
            return ids[:, : int((ids[0] == self.image_token).nonzero()[-1]) + 1]
        return ids[:, : self._images_end(ids[0].tolist())]

    # -- what a family gives --------------------------------------------------------------------------------------

    @abstractmethod
    def preprocess(self, images: Sequence[Image.Image | Tensor], *, min_tokens: int, max_tokens: int) -> Pictures:
        """Resize and cut each image into what the vision encoder takes, at most `max_tokens` tokens each.

        images: RGB or RGBA; as tensors (H, W, 3 or 4) uint8, where they are.

        Raises `ValueError` for images that the family refuses.
        """

    @abstractmethod
    def encode(self, pictures: Pictures) -> Features:
        """The vision encoder's features, picture by picture, so that its peak is that of the largest."""

    @abstractmethod
    def image_tokens(self, ids: Tensor, pictures: Pictures) -> tuple[ImageTokens, ...]:
        """Where each picture lies in (1, L) ids, and which token shows which cell of its map."""

    def positions(self, ids: Tensor, pictures: Pictures | None) -> tuple[Tensor, Tensor | None]:
        """Positions of (1, L) ids as the decoder takes them, (P, 1, L) or (1, L), and what tokens behind them add to
        their place, where that is not 0."""
        return torch.arange(ids.shape[1])[None], None

    def image_inputs(self, pictures: Pictures) -> dict[str, Tensor]:
        """The pictures as arguments of the model's own forward, on its device."""
        pixels = torch.cat([picture.pixels for picture in pictures.items])
        return {"pixel_values": pixels.to(self.input_device, self.dtype)}

    # -- pieces of a forward, for `hide.session` ------------------------------------------------------------------

    @run_alone
    def extend(
        self,
        cache: Any,
        ids: Tensor,
        positions: Tensor,
        features: Features | None = None,
        *,
        attention_mask: Tensor | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """Send tokens through the decoder behind those in `cache`, which keeps theirs too.

        Args:
            ids: (B, n) int64; features: of the image tokens among them. positions: (P, B, n) or (B, n).
            attention_mask: (B, length with the new tokens), 0 for padding; `None`: there is none.
            depth: only the first so many layers.

        Returns:
            (B, n, hidden) after the final norm.
        """
        decoder = self.language_model
        embed = decoder.get_input_embeddings()
        device = device_of(embed)
        ids = ids.to(device)
        embeddings = embed(ids)
        arguments: dict[str, Any] = {}
        if features is not None and len(features.embeddings):
            image = ids == self.image_token
            embeddings = embeddings.masked_scatter(image[..., None], features.embeddings.to(device, embeddings.dtype))
            if features.deepstack:
                layers = [layer.to(device, embeddings.dtype) for layer in features.deepstack]
                arguments = {"visual_pos_masks": image, "deepstack_visual_embeds": layers}
        arguments[cache_keyword(type(decoder).forward)] = cache
        with first_layers(decoder, depth), continuing(decoder):
            return decoder(
                inputs_embeds=embeddings,
                position_ids=positions.to(device),
                attention_mask=None if attention_mask is None else attention_mask.to(device),
                use_cache=True,
                **arguments,
            ).last_hidden_state

    @run_alone
    def continue_ids(self, ids: Tensor, cache: Any, delta: Tensor | None, *, max_new_tokens: int) -> list[int]:
        """The greedy reply to (1, L) ids whose cache holds all but the last, by the model's own `generate`.

        delta: as `positions` gives it.
        """
        inputs = {"input_ids": ids.to(self.input_device)}
        held = {cache_keyword(type(self.language_model).forward): cache}
        if delta is None:
            return self._greedy(inputs, max_new_tokens, **held)
        base = self.model.model
        before = base.rope_deltas
        # A value of another prompt would be taken for this one's.
        base.rope_deltas = delta.to(inputs["input_ids"].device)
        try:
            return self._greedy(inputs, max_new_tokens, **held)
        finally:
            base.rope_deltas = before

    # -- forwards -------------------------------------------------------------------------------------------------

    def _inputs(self, input_ids: Tensor, pictures: Pictures | None) -> dict[str, Tensor]:
        device = self.input_device
        inputs = {"input_ids": input_ids.to(device), "attention_mask": torch.ones_like(input_ids, device=device)}
        if pictures is not None:
            inputs |= self.image_inputs(pictures)
        if self._takes_token_types:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_token).int()
        return inputs

    @run_alone
    def search_rows(
        self,
        prompt: SearchPrompt,
        pictures: Pictures,
        *,
        layers: Sequence[int] | None,
        causal: bool,
        keep_layers: bool = False,
    ) -> list[Tensor]:
        """Attention rows of the search prompt over each image, averaged over heads and layers.

        Runs the model up to the last of `layers` (zero-based; `None`: all) and no further, without logits.

        Returns:
            Per image (T, rows, columns) float32 on the model's device, T = `len(prompt.rows)`; with `keep_layers`
            (layers, T, rows, columns), not averaged over the layers.
        """
        layers = range(self.num_layers) if layers is None else layers
        with capture_attention(
            self.model,
            layers=layers,
            queries=prompt.rows,
            key_spans=[image.span for image in prompt.images],
            causal=causal,
        ) as captured:
            depth = max(layer % self.num_layers for layer in layers) + 1
            with first_layers(self.language_model, depth):
                self.model.model(**self._inputs(prompt.input_ids, pictures), use_cache=False)
        rows = torch.stack([result.weights[0] for result in captured.values()])
        return rows_to_maps(rows if keep_layers else rows.mean(0), prompt.images)

    def generate(self, text: str, pictures: Pictures | None = None, *, max_new_tokens: int) -> Reply:
        """Greedy reply to one user turn. The checkpoint's repetition penalty and stop tokens stay in force."""
        ids = self.input_ids(text, pictures)
        new = self.generate_ids(ids, pictures, max_new_tokens=max_new_tokens)
        return Reply(self.decode(new), ids.shape[1] + len(new))

    @run_alone
    def generate_ids(self, input_ids: Tensor, pictures: Pictures | None = None, *, max_new_tokens: int) -> list[int]:
        """The tokens of the greedy reply to (1, L) ids."""
        return self._greedy(self._inputs(input_ids, pictures), max_new_tokens)

    def _greedy(self, inputs: dict[str, Tensor], max_new_tokens: int, **more: Any) -> list[int]:
        # As arguments, not as a generation_config: transformers 4.57 puts the checkpoint's values back where a config's
        # equal the library's defaults, and do_sample=False is one.
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        reply = self.model.generate(
            **inputs,
            **more,
            use_cache=True,
            cache_implementation=None,
            return_dict_in_generate=False,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_new_tokens,
        )
        return reply[0, inputs["input_ids"].shape[1] :].tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a reply, without special tokens and surrounding blanks."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def named_device(name: str | None) -> torch.device:
    """The device of a name, `None`: CUDA where there is one, else the CPU; `ValueError` for one that computes nothing
    here."""
    seen = torch.cuda.is_available()
    if name is None:
        name = "cuda" if seen else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cpu" and device.index:
            reason = "there is one CPU"
        elif device.type == "cuda" and not seen:
            reason = f"this PyTorch ({torch.__version__}) sees no CUDA device"
        elif torch.ones(1, device=device).add(1).item() == 2:
            return device
        else:
            reason = "it computes wrong"
    except Exception as error:  # a kind of its own from each device that a build lacks; meta has no values
        reason = one_line(str(error).partition(". ")[0], 160)
    raise ValueError(f"device: got {name!r}, but {reason}; want cuda, cuda:1, cpu, ... that is here")


def device_of(module: Any) -> torch.device:
    """Where a module wants its inputs; accelerate, which brings weights as they are needed, says so in a hook."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


@contextmanager
def first_layers(language_model: Any, depth: int | None) -> Iterator[None]:
    """Inside, the decoder ends after `depth` layers; `None`: after all."""
    if depth is not None:
        # In front of the module's own, which stay where they are: other threads may be looking through the modules.
        vars(language_model)["layers"] = language_model.layers[:depth]
    try:
        yield
    finally:
        vars(language_model).pop("layers", None)


def _legacy_chat_template(path: str | Path) -> str | None:
    """The template of checkpoints that keep it in a file of the processor's, or `None`."""
    import json

    for name in ("chat_template.jinja", "chat_template.json"):
        file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            text = Path(file).read_text(encoding="utf-8")
            return json.loads(text)["chat_template"] if name.endswith(".json") else text
    return None
