"""What all model families share: the model with its prompts, and what a family says of its images.

A family's adapter says how images become tokens, where those lie, and which positions they have. It knows no method and
no engine. Models are Hugging Face's own classes, unmodified.
"""

from __future__ import annotations

import inspect
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hide.models.checkpoint import listed
from hide.models.devices import device_of
from hide.models.inputs import Features, ImageInput, ImageInputs
from hide.models.prompts import PLACEHOLDER, ChatPrompts

Method = TypeVar("Method", bound=Callable[..., Any])

# Of each decoder, shared by all adapters around it.
_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_new_lock = threading.Lock()


def run_alone(method: Method) -> Method:
    """A method of an adapter that runs inside `Adapter.alone`."""

    @wraps(method)
    def locked(self: Adapter, *args: Any, **kwargs: Any) -> Any:
        with self.alone():
            return method(self, *args, **kwargs)

    return cast(Method, locked)


class Adapter(ChatPrompts):
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
    checkpoints: ClassVar[tuple[str, ...]]
    """Public checkpoints of the class, by their names on the hub."""
    tested: ClassVar[str] = "random weights"
    """What the tests run it with."""
    joins_images: ClassVar[bool] = False
    """Whether several images may stand in a prompt as one (`ImageInputs.joined`)."""
    max_aspect: ClassVar[int] = 200
    """How many times as long as wide an image may be."""
    source: str | Path | None = None
    """The folder or hub name that it was loaded from."""
    left_out: tuple[str, ...] = ()
    """Names of weights of the checkpoint that have no place in the model."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_processor: Any) -> None:
        """Wrap parts that are loaded already; raises `ValueError` for a tokenizer without a chat template."""
        if tokenizer.chat_template is None:
            raise ValueError("tokenizer: it has no chat template; set tokenizer.chat_template to the model's")
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self.image_processor = image_processor
        self._takes_token_types = "mm_token_type_ids" in inspect.signature(model.forward).parameters

    def check_template(self) -> None:
        """`ValueError` for a chat template that does not show one image's place and a turn's text once each."""
        image = ImageInput(torch.empty(0), (), (1, 1), 1)
        if self._render([(PLACEHOLDER, ImageInputs((image,)))])[0].count(PLACEHOLDER) != 1:
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
        # Other settings that are no use show on a image; the bound is no family's concern for one so small.
        self.preprocess([Image.new("RGB", (56, 56))], min_tokens=1, max_tokens=16384)

    @classmethod
    def processor_class(cls) -> Any:
        """Its image processor's class in this version of transformers."""
        return next(found for name in cls.processors if (found := getattr(transformers, name, None)))

    @property
    def notes(self) -> tuple[str, ...]:
        """Doubts about the checkpoint; they are among the notes of every result."""
        if not self.left_out:
            return ()
        names = listed(self.left_out)
        return (f"model: the checkpoint has {names} for which the model has no place; they were left out",)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def max_positions(self) -> int:
        """Tokens that a prompt and its reply may have."""
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a reply."""
        ends = self.model.generation_config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or ())

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

    # -- what a family gives --------------------------------------------------------------------------------------

    def box_extent(self, image: ImageInput) -> tuple[int, int] | None:
        """How many units across and down the boxes span that the family writes of an image; `None`: it writes parts of
        the width and height, from 0 to 1."""
        return None

    @abstractmethod
    def preprocess(self, images: Sequence[Image.Image | Tensor], *, min_tokens: int, max_tokens: int) -> ImageInputs:
        """Resize and cut each image into what the vision encoder takes, at most `max_tokens` tokens each.

        images: RGB or RGBA; as tensors (H, W, 3 or 4) uint8, where they are.

        Raises `ValueError` for images that the family refuses.
        """

    @abstractmethod
    def encode(self, images: ImageInputs) -> Features:
        """The vision encoder's features, image by image, so that its peak is that of the largest."""

    def positions(self, ids: Tensor, images: ImageInputs | None) -> tuple[Tensor, Tensor | None]:
        """Positions of (1, L) ids as the decoder takes them, (P, 1, L) or (1, L), and what tokens behind them add to
        their place, where that is not 0."""
        return torch.arange(ids.shape[1])[None], None

    def image_inputs(self, images: ImageInputs) -> dict[str, Tensor]:
        """The images as arguments of the model's own forward, on its device."""
        pixels = torch.cat([item.pixels for item in images.items])
        return {"pixel_values": pixels.to(self.input_device, self.dtype)}
