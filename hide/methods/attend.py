"""Attention maps per token, with no method in between: what each word of a prompt and of its reply looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hide.engine import stock
from hide.images import ImageLike, load_image, on_colour
from hide.models.base import Adapter
from hide_kernels import maps_to_pixels, rows_to_maps
from hide_kernels.integrations.transformers import capture_attention

PANEL_SIDE = 480
PANELS_IN_A_ROW = 5


@dataclass(frozen=True)
class TokenAttention:
    """Attention over the image, the model's own (causal), averaged over heads and layers.

    image: the picture. tokens: text of each token, those of the prompt first. prompt_tokens: how many those are. maps:
    (T, h, w) float32 on the CPU; each sums to the share of its attention that goes to the image. A map of the reply is
    that of the query from which its token was predicted. layers: zero-based. reply: the whole reply.
    """

    image: Image.Image
    tokens: tuple[str, ...]
    prompt_tokens: int
    maps: Tensor
    layers: tuple[int, ...]
    reply: str

    def save(self, directory: str | Path) -> list[Path]:
        """Write `attention.png`, a panel per token on one scale, and `attention.npz` with `maps`, `tokens`,
        `prompt_tokens` and `layers`; returns their paths."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / "attention.png", directory / "attention.npz"]
        self._draw(paths[0])
        np.savez_compressed(
            paths[1],
            maps=self.maps.numpy(),
            tokens=np.array(self.tokens),
            prompt_tokens=self.prompt_tokens,
            layers=np.array(self.layers),
        )
        return paths

    def _draw(self, path: Path) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        small = on_colour(self.image)
        small.thumbnail((PANEL_SIDE, PANEL_SIDE), Image.Resampling.LANCZOS)
        grey = np.asarray(small.convert("L").convert("RGB"), dtype=np.float32) / 255
        # Attention sinks, a few cells with most of the mass, would leave everything else black.
        top = max(float(np.quantile(self.maps.numpy(), 0.998)), 1e-12)
        columns = min(PANELS_IN_A_ROW, len(self.tokens) + 1)
        rows = math.ceil((len(self.tokens) + 1) / columns)
        height = 3.2 * small.height / small.width + 0.35
        figure = Figure(figsize=(3.2 * columns + 0.9, min(height * rows, 300)), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        axes[0].imshow(small)
        axes[0].set_title("the picture", fontsize=10)
        heat = maps_to_pixels(self.maps, (small.height, small.width)).numpy() / top
        for index, (axis, token) in enumerate(zip(axes[1:], self.tokens, strict=False)):
            strength = np.clip(heat[index], 0, 1)[..., None]
            weight = 0.15 + 0.75 * strength
            axis.imshow(grey * (1 - weight) + colormaps["inferno"](strength[..., 0])[..., :3] * weight)
            of_reply = index >= self.prompt_tokens
            title = f"{'reply: ' if of_reply else ''}{_visible(token)}   {self.maps[index].sum():.1%}"
            axis.set_title(title, fontsize=10, color="tab:red" if of_reply else "black")
        bar = figure.colorbar(ScalarMappable(Normalize(0, top), "inferno"), ax=list(axes), shrink=0.6, aspect=30)
        bar.set_label("attention of a cell (one scale for all panels)")
        figure.savefig(path, dpi=80)


def attend(
    model: Adapter,
    image: ImageLike,
    text: str,
    *,
    layers: Sequence[int],
    new_tokens: int = 8,
    min_tokens: int = 4,
    max_tokens: int = 16384,
) -> TokenAttention:
    """Ask `model` about a picture and keep what each token of the text and of the greedy reply attends to.

    One `generate` with the model's own attention implementation; no attention matrix is made.

    Args:
        layers: zero-based decoder layers to average over.
        new_tokens: at most so many tokens of reply, at least 1.
        min_tokens, max_tokens: image tokens that the picture is resized to lie between.

    Raises:
        ValueError: for an empty text, no layer or one that the model does not have, or `new_tokens` below 1.
    """
    if not text.strip():
        raise ValueError("text: got nothing, want words to look for in the picture")
    if new_tokens < 1:
        raise ValueError(f"new_tokens: got {new_tokens}, want at least 1")
    picture = load_image(image)
    inputs = model.preprocess([picture], min_tokens=min_tokens, max_tokens=max_tokens)
    turn = model.turn(text, inputs)
    spans = [found.span for found in turn.images]
    with (
        capture_attention(model.model, layers=layers, queries=turn.rows, key_spans=spans) as asked,
        capture_attention(model.model, layers=layers, queries="generated", key_spans=spans) as replied,
    ):
        reply = stock.generate_ids(model, turn.input_ids, inputs, max_new_tokens=new_tokens)
    rows = torch.stack([torch.cat([asked[layer].weights[0], replied[layer].weights[0]]) for layer in asked]).mean(0)
    ids = [*turn.input_ids[0, turn.rows.start : turn.rows.stop].tolist(), *reply]
    return TokenAttention(
        image=picture,
        tokens=tuple(model.tokenizer.decode([token]) for token in ids),
        prompt_tokens=len(turn.rows),
        maps=rows_to_maps(rows.cpu(), turn.images)[0],
        layers=tuple(sorted(asked)),
        reply=model.decode(reply),
    )


def _visible(token: str) -> str:
    """A token's text with blanks and line breaks made visible where they are all there is."""
    return (token.strip() or repr(token)).replace("$", r"\$")
