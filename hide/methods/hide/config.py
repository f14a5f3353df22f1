"""What HiDe can be told, and the values that are known to work for each model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hide.presets import WHITE, Preset, presets_of
from hide_kernels.collage.api import check_look
from hide_kernels.token_maps.api import MAX_SIGMA

# Seven words and a colon: with Qwen's tokenizer the eight tokens whose rows are the noise prior. The blank at the end
# belongs to the first entity's token.
SEARCH_PROMPT = "Please search the images for these objects: "


@dataclass(frozen=True)
class HiDeConfig:
    """HiDe's own settings (arXiv 2510.00054); those of the run and of the answer stand beside them in a `Preset`.

    layers: zero-based decoder layers whose attention is averaged; `None`: all of them.
    sigma: smoothing of the maps, in grid cells (so its extent in pixels depends on the resolution).
    threshold: a cell of a map (peak 1) belongs to a region from this value on.
    entities_from: "model" asks the model for the entities, "rules" takes the question's content words.
    causal: whether an entity's row is blind to later tokens; published HiDe lets it see them.
    include_end_token: whether the row of the token that ends the user's turn counts as an entity's; published: yes.
    include_punctuation: whether tokens without a letter or digit, such as the commas between entities, have maps;
        published: yes.
    alpha_threshold: alpha above it is opaque when boxes over transparency are cut down.
    fill: colour (r, g, b) of a collage's gaps; `None` leaves them transparent: the family's preprocessing then makes of
        them what it makes of any transparency (Qwen and LLaVA white, InternVL black).
    max_entity_tokens: bound on the model's list of entities (published: the same as for answers).
    search_prompt: fixed words before the entities; their rows are the noise prior.
    gate: the plain answer to the session's images is taken where the margin of its first token is at least this, and
        nothing is searched; `None`: HiDe answers every question.
    look_again: on a session whose view is "auto" (`RunSettings.view_tokens`), a collage that would have more than so
        many times the view's tokens at its own resolution is searched once more, and what is found in it is shown.
    entity_prompt: instruction for the model as extractor, with `{question}` in it; `None`:
        `hide.methods.hide.entities.ENTITY_PROMPT`.
    """

    layers: tuple[int, ...] | None
    sigma: float
    threshold: float
    entities_from: Literal["model", "rules"] = "model"
    causal: bool = False
    include_end_token: bool = True
    include_punctuation: bool = True
    alpha_threshold: int = 10
    fill: tuple[int, int, int] | None = WHITE
    max_entity_tokens: int = 256
    search_prompt: str = SEARCH_PROMPT
    entity_prompt: str | None = None
    gate: float | None = None
    look_again: float = 0.3

    def __post_init__(self) -> None:
        if self.layers is not None and not self.layers:
            raise ValueError("layers: got none, want zero-based layer numbers, or None for all layers")
        if not 0 <= self.sigma <= MAX_SIGMA:
            raise ValueError(f"sigma: got {self.sigma}, want 0 to {MAX_SIGMA} cells")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: got {self.threshold}, want above 0 and at most 1")
        if self.entities_from not in ("model", "rules"):
            raise ValueError(f"entities_from: got {self.entities_from!r}, want 'model' or 'rules'")
        check_look(self.fill, "blend", self.alpha_threshold)
        if self.max_entity_tokens < 1:
            raise ValueError(f"max_entity_tokens: got {self.max_entity_tokens}, want at least 1")
        if not self.search_prompt.strip():
            raise ValueError("search_prompt: got nothing, want words whose rows serve as the noise prior")
        for name in ("gate", "look_again"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: got {value}, want 0 or more")
        if self.entity_prompt is not None and "{question}" not in self.entity_prompt:
            raise ValueError("entity_prompt: got a text without {question}, the place where the question goes")


# The published values; layer 14 is the released code's SELECT_LAYER 15, which counts from 1. For Qwen3-VL-8B that code
# selects a layer, which averaging all of them then overrides: both are here. Nothing was published of HiDe on LLaVA:
# layer 14 is ViCrop's for LLaVA-1.5-7B and the middle of LLaVA-OneVision-7B's 28; the rest is Qwen's, but a sigma of 3
# cells would be an eighth of LLaVA-1.5's whole grid. Those of the embedded model are from `hide calibrate` and
# docs/embedded_model.md.
PRESETS: dict[str, Preset[HiDeConfig]] = presets_of(
    {
        "qwen2.5-vl-7b": HiDeConfig(layers=(14,), sigma=3.0, threshold=0.7),
        "qwen3-vl-8b": HiDeConfig(layers=None, sigma=3.0, threshold=0.5),
        "qwen3-vl-8b-layer-18": HiDeConfig(layers=(18,), sigma=3.0, threshold=0.5),
        "internvl3-8b": HiDeConfig(layers=(14,), sigma=1.0, threshold=0.4, include_end_token=False, fill=None),
        "internvl3-8b-two-images": HiDeConfig(
            layers=(14,), sigma=1.0, threshold=0.4, include_end_token=False, fill=None
        ),
        "llava-1.5-7b": HiDeConfig(layers=(14,), sigma=1.0, threshold=0.7, include_end_token=False),
        "llava-onevision-7b": HiDeConfig(layers=(14,), sigma=3.0, threshold=0.7, include_end_token=False),
        "tiny": HiDeConfig(
            layers=(2,),
            sigma=1.0,
            threshold=0.2,
            entities_from="rules",
            include_end_token=False,
            include_punctuation=False,
        ),
    }
)
