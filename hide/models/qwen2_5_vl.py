"""Qwen2.5-VL: prompts, image preprocessing, the image-token grid, attention rows and replies.

The model is Hugging Face's own class, unmodified. Tokenizer, chat template and image processor are loaded one by one:
`AutoProcessor` would need torchvision, which has no CPU build.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration
from transformers.utils import cached_file, is_flash_attn_2_available

from hide.config import SEARCH_PROMPT
from hide.decoding import greedy_settings
from hide.images import on_colour
from hide_kernels import ImageTokens, rows_to_maps
from hide_kernels.integrations.image_spans import image_spans
from hide_kernels.integrations.transformers import capture_attention_rows

IMAGE_TOKEN, VISION_END = "<|image_pad|>", "<|vision_end|>"
# The loader that the published code uses resizes to at least this many tokens before the processor does it again.
LOADER_MIN_TOKENS = 4
# Stands for a turn's text where only what the chat template puts around it matters.
PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"
MAX_ASPECT = 200
# Ids of Qwen's own vocabulary; smaller ones are other tokenizers.
QWEN_VISION_END = 151653
QWEN_PRIOR_ROWS = 8


@dataclass(frozen=True)
class Pictures:
    """Preprocessed images: `pixel_values` (patches, 3 * 2 * 14 * 14), `image_grid_thw` (images, 3) in patches, and
    `grids`, the (rows, columns) of image tokens of each."""

    pixel_values: Tensor
    image_grid_thw: Tensor
    grids: tuple[tuple[int, int], ...]

    def __add__(self, other: Pictures) -> Pictures:
        return Pictures(
            torch.cat([self.pixel_values, other.pixel_values]),
            torch.cat([self.image_grid_thw, other.image_grid_thw]),
            self.grids + other.grids,
        )

    def without_pixels(self) -> Pictures:
        """What prompts and positions need; the pixels of many tokens are larger than their keys and values."""
        return Pictures(self.pixel_values[:0], self.image_grid_thw, self.grids)


class Features(NamedTuple):
    """What the vision encoder makes of pictures: `embeddings` (tokens, hidden), in the order of the image tokens."""

    embeddings: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.embeddings.nbytes

    def part(self, first: int, last: int) -> Features:
        """Those of the image tokens from `first` to `last`, half-open."""
        return Features(self.embeddings[first:last])


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


class Qwen25VL:
    """A Qwen2.5-VL model with its tokenizer and image processor."""

    family = "qwen2_5_vl"
    cell = 28

    def __init__(
        self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, image_processor: Any
    ) -> None:
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
    ) -> Qwen25VL:
        """As `hide.models.load`; safetensors only, no remote code."""
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if target.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: got {device!r}, but this PyTorch ({torch.__version__}) sees no CUDA device")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: got {dtype!r}, want auto, float32, bfloat16 or float16")
        if dtype == "auto" and target.type == "cpu":
            dtype = "float32"
        if attn_implementation is None:
            flash = target.type == "cuda" and dtype != "float32" and is_flash_attn_2_available()
            attn_implementation = "flash_attention_2" if flash else "sdpa"
        model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _legacy_chat_template(path)
        # transformers 5 calls the class without torchvision "...Pil"; version 4 has only the plain name.
        processor = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
        return cls(model.to(target), tokenizer, processor.from_pretrained(path))

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    @property
    def language_model(self) -> Any:
        """The decoder without its head."""
        return self.model.model.language_model

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
    def greedy_by_steps(self) -> bool:
        """Whether `hide.decoding` gives what `generate` gives: attention that takes a mask, no special settings."""
        if "flash" in self.model.config.get_text_config()._attn_implementation:
            return False
        try:
            greedy_settings(self.model.generation_config)
        except ValueError:
            return False
        return True

    # -- images ---------------------------------------------------------------------------------------------------

    def preprocess(self, images: Sequence[Image.Image], *, min_tokens: int, max_tokens: int) -> Pictures:
        """Resize and cut into patches, as the published code does: Pillow bicubic to multiples of 28 pixels, and where
        that gives fewer than `min_tokens` tokens once more to at least as many; transparency becomes white.

        Raises `ValueError` for images more than 200 times as long as wide.
        """
        resized = []
        for image in images:
            height, width = token_grid(image.height, image.width, self.cell, LOADER_MIN_TOKENS, max_tokens)
            resized.append(on_colour(image).resize((width * self.cell, height * self.cell), Image.Resampling.BICUBIC))
        size = {"shortest_edge": min_tokens * self.cell**2, "longest_edge": max_tokens * self.cell**2}
        batch = self.image_processor(images=resized, size=size, return_tensors="pt")
        merge = self.image_processor.merge_size
        grids = tuple((rows // merge, columns // merge) for _, rows, columns in batch["image_grid_thw"].tolist())
        return Pictures(batch["pixel_values"], batch["image_grid_thw"], grids)

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

        Raises `ValueError` if the prompt's fixed words are not tokens of their own before these entities.
        """
        text = prompt + self.escape(entities)
        turn = self._turn(text, pictures)
        ids = turn.input_ids[0].tolist()
        prior = self._tokens(prompt.rstrip())[0].tolist()
        if ids[turn.rows.start : turn.rows.start + len(prior)] != prior:
            raise ValueError(
                f"search_prompt: {prompt!r} followed by {entities[:40]!r} does not keep its words as tokens of their "
                "own; end it with punctuation and a blank"
            )
        qwen = self.tokenizer.convert_tokens_to_ids(VISION_END) == QWEN_VISION_END
        if prompt == SEARCH_PROMPT and qwen and len(prior) != QWEN_PRIOR_ROWS:
            raise ValueError(
                f"tokenizer: the search prompt has {len(prior)} tokens, want {QWEN_PRIOR_ROWS} with Qwen's"
            )
        rows = range(turn.rows.start, turn.rows.stop + 1) if include_end_token else turn.rows
        labels = tuple(self.tokenizer.decode([token]).strip() for token in ids[rows.start + len(prior) : rows.stop])
        return SearchPrompt(turn.input_ids, turn.images, rows, len(prior), labels)

    def turn(self, text: str, pictures: Pictures) -> Turn:
        """One user turn, images first, and where its images and its text lie."""
        return self._turn(self.escape(text), pictures)

    def _turn(self, text: str, pictures: Pictures) -> Turn:
        ids = self._prompt(text, pictures)
        tokens = ids[0].tolist()
        tail = self._tokens(self._render(PLACEHOLDER, pictures).rpartition(PLACEHOLDER)[2])[0].tolist()
        if tokens[-len(tail) :] != tail:
            raise ValueError(f"text: {text[-40:]!r} melts into the chat template behind it; end it with punctuation")
        # The last special token of the last image opens the text.
        start = len(tokens) - tokens[::-1].index(self.tokenizer.convert_tokens_to_ids(VISION_END))
        images = image_spans(self.model, ids, image_grid_thw=pictures.image_grid_thw)[0]
        return Turn(ids, tuple(images), range(start, len(tokens) - len(tail)))

    def _prompt(self, text: str, pictures: Pictures | None) -> Tensor:
        ids = self._tokens(self._render(text, pictures))
        most = self.model.config.get_text_config().max_position_embeddings
        if ids.shape[1] > most:
            raise ValueError(
                f"question: with its images it has {ids.shape[1]} tokens, and the model takes {most}; shorten it, or "
                "lower max_tokens"
            )
        return ids

    def _render(self, text: str, pictures: Pictures | None) -> str:
        grids = pictures.grids if pictures else ()
        content = [*({"type": "image"} for _ in grids), {"type": "text", "text": text}]
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pieces = rendered.split(IMAGE_TOKEN)
        if len(pieces) != len(grids) + 1:
            raise ValueError(
                f"tokenizer: its chat template made {len(pieces) - 1} image places for {len(grids)} images"
            )
        counts = [rows * columns for rows, columns in grids]
        return pieces[0] + "".join(IMAGE_TOKEN * count + piece for count, piece in zip(counts, pieces[1:], strict=True))

    def _tokens(self, text: str) -> Tensor:
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]

    def image_prefix(self, pictures: Pictures) -> Tensor:
        """(1, P) ids that every user turn about these pictures begins with: up to the last image's end.

        The end is a special token, so no text can melt into it.
        """
        ids = self._prompt(PLACEHOLDER, pictures)
        end = ids[0].tolist()[::-1].index(self.tokenizer.convert_tokens_to_ids(VISION_END))
        return ids[:, : ids.shape[1] - end]

    # -- pieces of a forward, for `hide.session` ------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pictures: Pictures) -> Features:
        """The vision encoder's features, picture by picture, so that its peak is that of the largest."""
        visual = self.model.model.visual
        found = []
        patches = pictures.image_grid_thw.prod(-1).tolist()
        for pixels, grid in zip(pictures.pixel_values.split(patches), pictures.image_grid_thw, strict=True):
            features = self.model.model.get_image_features(
                pixels.to(visual.device, self.dtype), grid[None].to(visual.device)
            )
            # Transformers 4 returns one tensor per picture, 5 an output object that holds them.
            found += list(getattr(features, "pooler_output", features))
        return Features(torch.cat(found))

    def positions(self, ids: Tensor, pictures: Pictures | None) -> tuple[Tensor, Tensor]:
        """Positions of (1, L) ids as the decoder takes them, (4, 1, L): place in the text, then mRoPE's three; and what
        tokens behind them add to their place."""
        text = torch.arange(ids.shape[1])[None]
        arguments: dict[str, Any] = {}
        if pictures is not None:
            arguments["image_grid_thw"] = pictures.image_grid_thw.cpu()
            if self._takes_token_types:
                arguments["mm_token_type_ids"] = (ids == self.image_token).int()
        elif self._takes_token_types:
            arguments["mm_token_type_ids"] = torch.zeros_like(ids, dtype=torch.int32)
        places, delta = self.model.model.get_rope_index(ids, **arguments)
        return torch.cat([text[None], places]), delta

    @torch.no_grad()
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
            ids: (B, n) int64; features: of the image tokens among them. positions: (4, B, n).
            attention_mask: (B, length with the new tokens), 0 for padding; `None`: there is none.
            depth: only the first so many layers.

        Returns:
            (B, n, hidden) after the final norm.
        """
        decoder = self.language_model
        embed = decoder.get_input_embeddings()
        device = embed.weight.device
        ids = ids.to(device)
        embeddings = embed(ids)
        if features is not None and len(features.embeddings):
            image = (ids == self.image_token)[..., None]
            embeddings = embeddings.masked_scatter(image, features.embeddings.to(device, embeddings.dtype))
        with _first_layers(decoder, self.num_layers if depth is None else depth):
            return decoder(
                inputs_embeds=embeddings,
                position_ids=positions.to(device),
                attention_mask=None if attention_mask is None else attention_mask.to(device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state

    @torch.no_grad()
    def continue_ids(self, ids: Tensor, cache: Any, delta: Tensor, *, max_new_tokens: int) -> list[int]:
        """The greedy reply to (1, L) ids whose cache holds all but the last, by the model's own `generate`.

        delta: as `positions` gives it.
        """
        base = self.model.model
        before = getattr(base, "rope_deltas", None)
        # A value of another prompt would be taken for this one's.
        base.rope_deltas = delta.to(self.model.device)
        try:
            return self._greedy({"input_ids": ids.to(self.model.device)}, max_new_tokens, past_key_values=cache)
        finally:
            base.rope_deltas = before

    # -- forwards -------------------------------------------------------------------------------------------------

    def _inputs(self, input_ids: Tensor, pictures: Pictures | None) -> dict[str, Tensor]:
        device = self.model.device
        inputs = {"input_ids": input_ids.to(device), "attention_mask": torch.ones_like(input_ids, device=device)}
        if pictures is not None:
            inputs["pixel_values"] = pictures.pixel_values.to(device, self.dtype)
            inputs["image_grid_thw"] = pictures.image_grid_thw.to(device)
        if self._takes_token_types:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        return inputs

    @torch.no_grad()
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
        with capture_attention_rows(
            self.model,
            layers=layers,
            rows=prompt.rows,
            key_spans=[image.span for image in prompt.images],
            causal=causal,
        ) as captured:
            depth = max(layer % self.num_layers for layer in layers) + 1
            with _first_layers(self.model.model.language_model, depth):
                self.model.model(**self._inputs(prompt.input_ids, pictures), use_cache=False)
        rows = torch.stack([result.rows[0] for result in captured.values()])
        return rows_to_maps(rows if keep_layers else rows.mean(0), prompt.images)

    def generate(self, text: str, pictures: Pictures | None = None, *, max_new_tokens: int) -> Reply:
        """Greedy reply to one user turn. The checkpoint's repetition penalty and stop tokens stay in force."""
        ids = self.input_ids(text, pictures)
        new = self.generate_ids(ids, pictures, max_new_tokens=max_new_tokens)
        return Reply(self.decode(new), ids.shape[1] + len(new))

    @torch.no_grad()
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


def token_grid(height: int, width: int, cell: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """(rows, columns) of cells that an image is resized to: nearest multiples, shrunk or grown into the token budget.

    Raises `ValueError` for images more than 200 times as long as wide.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"image: got {width} x {height} pixels, want at most {MAX_ASPECT} times as long as wide")
    rows, columns = max(1, round(height / cell)), max(1, round(width / cell))
    if rows * columns > max_tokens:
        shrink = math.sqrt(height * width / (max_tokens * cell**2))
        rows, columns = max(1, math.floor(height / shrink / cell)), max(1, math.floor(width / shrink / cell))
        rows, columns = min(rows, max_tokens // columns or 1), min(columns, max_tokens // rows or 1)
    elif rows * columns < min_tokens:
        grow = math.sqrt(min_tokens * cell**2 / (height * width))
        rows, columns = math.ceil(height * grow / cell), math.ceil(width * grow / cell)
    # Rounding may carry a picture beyond what the processor accepts.
    return min(rows, MAX_ASPECT * columns), min(columns, MAX_ASPECT * rows)


@contextmanager
def _first_layers(language_model: Any, depth: int) -> Iterator[None]:
    """Inside, the decoder ends after `depth` layers."""
    layers = language_model.layers
    language_model.layers = layers[:depth]
    try:
        yield
    finally:
        language_model.layers = layers


def _legacy_chat_template(path: str | Path) -> str | None:
    """The template of checkpoints that keep it in a file of the processor's, or `None`."""
    import json

    for name in ("chat_template.jinja", "chat_template.json"):
        file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            text = Path(file).read_text(encoding="utf-8")
            return json.loads(text)["chat_template"] if name.endswith(".json") else text
    return None
