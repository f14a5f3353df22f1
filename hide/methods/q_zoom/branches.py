"""The trained parts of Q-Zoom and SD-RPN checkpoints: a region branch and a gate, beside an unmodified model's decoder.

Both read what enters layer K. The gate makes one probability of the last token's state; of the region branch's last
layer queries and keys alone are used, whose products are the map. Names and fields are those of the released
checkpoints (arXiv 2604.06912, arXiv 2509.16944), whichever transformers wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hide.engine.beside import Beside, Rotation, key_heads, new_layers, number_of, query_heads, rotation, through
from hide.engine.kv_cache import DifferentiableCache
from hide.models.base import Adapter
from hide.models.checkpoint import CONFIG, INDEX, TRAINED, WEIGHTS, find_file, listed, reading
from hide.models.devices import device_of
from hide_kernels import ImageTokens, attention_rows

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava")
"""Those for which there are checkpoints."""
# In checkpoints, and used by nothing: an untrained copy of the output head, and a norm that SD-RPN's code for
# Qwen2.5-VL does not call. LLaVA's norm of that name is used, and then it has a place.
_UNUSED = re.compile(r"twig_head\.|twig_norm\.|.*rotary_emb\.inv_freq$")


class Looked(NamedTuple):
    """(rows, columns) float32: the map before any sigmoid, and that of the sequence's first token in head 0 alone,
    which sinks stand out in."""

    scores: Tensor
    first_token: Tensor


@dataclass(frozen=True, eq=False)
class Branches:
    """What a checkpoint adds to a model.

    layer: K; both branches read what enters it. regions: the region branch's layers. norm: before the last of them;
    only LLaVA's branch has one, and there queries and keys are not rotated. gate, head: the gate's layers, and what
    makes a number of a state; `None` for checkpoints without one. reuse_src_pos: whether the checkpoint asks for crops
    at positions inside their source.
    """

    layer: int
    regions: nn.ModuleList
    norm: nn.Module | None = None
    gate: nn.ModuleList | None = None
    head: nn.Linear | None = None
    reuse_src_pos: bool = False

    def modules(self) -> dict[str, nn.Module]:
        """By the names that they have in a text model of the released layout."""
        named = {
            "twig_layers": self.regions,
            "twig_norm": self.norm,
            "high_res_layers": self.gate,
            "high_res_head": self.head,
        }
        return {name: module for name, module in named.items() if module is not None}

    def folded_query(self, model: Adapter, states: Tensor, positions: Tensor) -> Tensor:
        """(1, Hkv, n, D): queries of the region branch's last layer, the mean over those that share a key.

        Scores are linear in the query, so their mean over all heads is that of these. states: (1, n, hidden), as the
        layers before the last leave them. positions: as the decoder takes them.
        """
        normed, turned = self.entering(model, states, positions)
        queries = query_heads(self.regions[-1], normed, turned)
        shared = queries.shape[1] // self._key_heads
        return queries.unflatten(1, (-1, shared)).mean(2)

    def keys(self, model: Adapter, states: Tensor, positions: Tensor) -> Tensor:
        """(1, Hkv, n, D) keys of the region branch's last layer; arguments as `folded_query`."""
        normed, turned = self.entering(model, states, positions)
        return key_heads(self.regions[-1], normed, turned)

    def entering(self, model: Adapter, states: Tensor, positions: Tensor) -> tuple[Tensor, Rotation | None]:
        """States as the projections of the region branch's last layer take them, and how they are rotated."""
        last: Any = self.regions[-1]
        if self.norm is None:
            return last.input_layernorm(states), rotation(model, states, positions)
        return last.input_layernorm(self.norm(states)), None

    def looked(self, model: Adapter, prompts: Sequence[tuple[Tensor, Tensor]], image: ImageTokens) -> list[Looked]:
        """What the region branch makes of whole prompts about one image, as `Glance` does of one behind a session; with
        gradients. What they share, up to the image's end, goes through the branch once.

        prompts: of each (1, n, hidden), what enters layer K of its tokens, and the positions where those stand.
        """
        layers, end = self.regions[:-1], image.stop
        hidden, positions = prompts[0]
        cache = DifferentiableCache(number_of(layers[-1]) + 1)
        before = through(model, layers, hidden[:, :end], positions[..., :end], cache)
        keys, first = self.of_image(model, before, positions, image)
        of_first = region_scores(first, keys[:, :1])[0, 0].view(image.grid)
        found = []
        for own, places in prompts:
            states = through(model, layers, own[:, end:], places[..., end:], cache)
            query = self.folded_query(model, states[:, -1:], places[..., -1:])
            found.append(Looked(region_scores(query, keys)[0, 0].view(image.grid), of_first))
        return found

    def of_image(self, model: Adapter, states: Tensor, positions: Tensor, image: ImageTokens) -> tuple[Tensor, Tensor]:
        """Keys of the image's cells, and the query of the sequence's first token in head 0; states: as the layers
        before the last leave them, of the tokens from the first to the image's last or further."""
        cells = image.start + image.cells.flatten()
        keys = self.keys(model, states[:, cells.to(states.device)], positions[..., cells.cpu()])
        normed, turned = self.entering(model, states[:, :1], positions[..., :1])
        return keys, query_heads(self.regions[-1], normed, turned)[:, :1]

    def gate_logit(self, model: Adapter, hidden: Tensor, positions: Tensor) -> Tensor:
        """() float32, whose sigmoid is the gate's probability; arguments as `looked`. With gradients."""
        assert self.gate is not None and self.head is not None
        logit: Tensor = self.head(through(model, self.gate, hidden, positions)[:, -1])[0, 0].float()
        return logit

    @property
    def _key_heads(self) -> int:
        attention: Any = self.regions[-1].self_attn
        heads: int = attention.k_proj.out_features // attention.head_dim
        return heads


def region_scores(query: Tensor, keys: Tensor) -> Tensor:
    """(1, n, V) float32, the mean over heads of the scaled products with (1, Hkv, V, D) keys; with gradients."""
    return attention_rows(query, keys, softmax=False).rows


class Glance:
    """What the branches make of a session's image whatever the question: held with the session, used in its branches.

    The gate's part is made when it is first asked, the region branch's when the first question passes the gate.
    """

    def __init__(
        self, model: Adapter, branches: Branches, hidden: Tensor, positions: Tensor, image: ImageTokens, chunk: int
    ) -> None:
        """hidden, positions: (1, P, hidden) what enters layer K of the prefix's tokens, and where those stand. image:
        where the image lies among them. chunk: tokens that go through the layers at once."""
        self._model, self._branches, self._image, self._chunk = model, branches, image, chunk
        self._hidden, self._positions = hidden, positions
        self._gate: Beside | None = None
        self._regions: Beside | None = None
        self._keys = self._first_query = hidden.new_empty(0)

    @property
    def nbytes(self) -> int:
        """Of what is kept beside the session's own states."""
        towers = (one.nbytes for one in (self._gate, self._regions) if one is not None)
        return self._keys.nbytes + sum(towers)

    def gate(self, hidden: Tensor, positions: Tensor) -> Tensor | None:
        """() float32, the gate's probability, from what enters layer K of the question's tokens, (1, n, hidden);
        `None`: the checkpoint has no gate."""
        layers, head = self._branches.gate, self._branches.head
        if layers is None or head is None:
            return None
        if self._gate is None:
            self._gate = Beside(
                self._model, layers, self._hidden, self._positions, chunk=self._chunk, last_row_only=True
            )
        last = self._gate.run(hidden, positions)[:, -1]
        with self._model.alone():
            probability: Tensor = head(last).float().sigmoid()[0, 0]
        return probability

    def scores(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """(rows, columns) float32: the map before any sigmoid; arguments as `gate`."""
        last = self._looked().run(hidden, positions)[:, -1:]
        with self._model.alone():
            query = self._branches.folded_query(self._model, last, positions[..., -1:])
            return region_scores(query, self._keys)[0, 0].view(self._image.grid)

    def first_token_scores(self) -> Tensor:
        """(rows, columns) float32: scores of the sequence's first token in head 0 alone, which sinks stand out in."""
        self._looked()
        with self._model.alone():
            return region_scores(self._first_query, self._keys[:, :1])[0, 0].view(self._image.grid)

    def _looked(self) -> Beside:
        if self._regions is None:
            model, branches, positions = self._model, self._branches, self._positions
            tower = Beside(model, branches.regions[:-1], self._hidden, positions, chunk=self._chunk)
            states, tower.states = tower.states, None
            assert states is not None
            with model.alone():
                self._keys, self._first_query = branches.of_image(model, states, positions, self._image)
            self._regions = tower
        return self._regions


# -- loading ----------------------------------------------------------------------------------------------------------

# Of each text model, with what they were read from.
_attached: WeakKeyDictionary[nn.Module, tuple[str, Branches]] = WeakKeyDictionary()


def branches_of(model: Adapter, source: str | Path | None = None) -> Branches:
    """The branches of a model, read and attached to its text model where they are not yet.

    source: a checkpoint folder, or the name of one that is in the hub's cache; `None`: the model's own, or whatever is
        attached.

    Raises:
        ValueError: a family without branches, a checkpoint without them or with others, weights that are missing or of
            another shape, or other branches than those that are attached.
    """
    if model.family not in FAMILIES:
        raise ValueError(f"model: there are no region branches for {model.family}, only for {', '.join(FAMILIES)}")
    with model.lock:
        there = _attached.get(model.language_model)
        if there is not None and (source is None or _place(source) == there[0]):
            return there[1]
        if there is not None:
            raise ValueError(f"branches: those of {there[0]} are attached to the model; load it anew for {source}")
        place = model.source if source is None else source
        if place is None:
            raise ValueError("model: it has no region branch; name a Q-Zoom or SD-RPN checkpoint (branches=FOLDER)")
        with reading(place, "branches", (*CONFIG, *WEIGHTS)):
            config, tensors = _read(place)
        if not any(name.startswith("twig_layers.") for name in tensors):
            raise ValueError(
                f"model: {place} has no region branch (twig_layers); name a Q-Zoom or SD-RPN checkpoint, or one beside "
                "the model (branches=FOLDER)"
            )
        found = loaded(model, config, tensors, place)
        attach(model, found, _place(place))
        return found


def new_branches(
    model: Adapter, layer: int, depth: int, *, gate_depth: int = 0, reuse_src_pos: bool = False
) -> Branches:
    """Untrained branches on torch's default device. layer: K. depth, gate_depth: layers of each, 0 for no gate.

    Raises `ValueError` for sizes that the model does not take.
    """
    if not 1 <= layer < model.num_layers:
        raise ValueError(f"twig_K: got {layer}, want 1 to {model.num_layers - 1}, with layers of the model behind it")
    if depth < 2:
        raise ValueError(f"twig_T: got {depth}, want at least 2 layers, of the last of which the map is made")
    decoder = model.language_model
    width = decoder.config.hidden_size
    norm = None
    if model.family == "llava":
        norm = type(decoder.norm)(width, eps=decoder.config.rms_norm_eps)
    regions = new_layers(model, depth)
    if not gate_depth:
        return Branches(layer, regions, norm, reuse_src_pos=reuse_src_pos)
    gate = new_layers(model, gate_depth, depth)
    return Branches(layer, regions, norm, gate, nn.Linear(width, 1), reuse_src_pos)


def attach(model: Adapter, branches: Branches, source: str = "") -> None:
    """Let the branches be parts of the model's text model, under their released names. source: where they come from."""
    with model.lock:
        # A new dictionary: other threads may be looking through the old one.
        own = vars(model.language_model)
        own["_modules"] = own["_modules"] | branches.modules()
        _attached[model.language_model] = source, branches


def loaded(model: Adapter, config: Mapping[str, Any], tensors: Mapping[str, Tensor], place: str | Path) -> Branches:
    """Branches on the model's device and in its dtype, with trained values.

    Args:
        config: the checkpoint's config.json; the fields are at its top level.
        tensors: by the names that they have in the text model.
        place: what to call the checkpoint.

    Raises `ValueError`; see `branches_of`.
    """
    if not _flag(config, place, "enable_twig"):
        raise ValueError(f"model: {place}: config.json: enable_twig is {config.get('enable_twig')!r}, want true")
    if (source := _field(config, "roi_source", "qk")) != "qk":
        raise ValueError(f"model: {place}: config.json: roi_source is {source!r}, and only 'qk' was ever trained")
    layer, depth = (_whole(config, place, name) for name in ("twig_K", "twig_T"))
    gate_depth = 0
    if _flag(config, place, "enable_high_res"):
        gate_depth = _whole(config, place, "high_res_T", depth)
        if (own := _whole(config, place, "high_res_K", layer)) != layer:
            raise ValueError(f"model: {place}: config.json: high_res_K is {own}, want twig_K ({layer}), as released")
    if model.family == "llava" and config.get("roi_multi_head") is False:
        raise ValueError(f"model: {place}: config.json: roi_multi_head is false, and no release of LLaVA's has it so")
    reuse = _flag(config, place, "reuse_src_pos")
    with torch.device("meta"):
        made = new_branches(model, layer, depth, gate_depth=gate_depth, reuse_src_pos=reuse)
    holder = nn.Module()
    for name, module in made.modules().items():
        holder.add_module(name, module)
    wanted = holder.state_dict()
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"model: {place} lacks {listed(missing)} of its branches")
    if more := sorted(name for name in tensors.keys() - wanted.keys() if not _UNUSED.match(name)):
        raise ValueError(
            f"model: {place} has {listed(more)} of branches more than its config.json says (twig_T, enable_high_res, "
            "high_res_T)"
        )
    for name, value in wanted.items():
        got, dtype = tensors[name].shape, tensors[name].dtype
        if value.shape != got:
            raise ValueError(
                f"model: {place} has {name} of shape {tuple(got)}, and config.json wants {tuple(value.shape)}"
            )
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"model: {place} has {name} in {dtype}, and branches that are quantised are not read")
    neighbour = model.language_model.layers[layer - 1]
    device = device_of(neighbour)
    holder.load_state_dict({name: tensors[name].to(device, model.dtype) for name in wanted}, assign=True)
    holder.requires_grad_(False)
    # What is no weight, such as the rotary frequencies that every layer had before transformers 5, is the decoder's.
    for one in (*made.regions, *(made.gate or ())):
        for name, buffer in neighbour.named_buffers():
            parent, _, child = name.rpartition(".")
            one.get_submodule(parent)._buffers[child] = buffer
    return made


def _field(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A field of config.json, where null is as none."""
    value = config.get(name)
    return default if value is None else value


def _whole(config: Mapping[str, Any], place: str | Path, name: str, default: int | None = None) -> int:
    value = _field(config, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"model: {place}: config.json: {name} is {value!r}, want a number of layers")
    return value


def _flag(config: Mapping[str, Any], place: str | Path, name: str) -> bool:
    value = _field(config, name, False)
    if not isinstance(value, bool):
        raise ValueError(f"model: {place}: config.json: {name} is {value!r}, want true or false")
    return value


def _place(source: str | Path) -> str:
    """One text for one folder, however it is named."""
    return str(Path(source).resolve() if Path(source).is_dir() else source)


def _read(place: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json, and all tensors of branches by their names in the text model."""
    config = find_file(place, CONFIG[0])
    if config is None:
        there = "" if Path(place).is_dir() else "; it is no folder, and the hub's cache does not have it"
        raise FileNotFoundError(f"{place} has no config.json{there}")
    files = list(_weight_files(place))
    if not files:
        raise FileNotFoundError(f"{place} has no safetensors, and other files are not read")
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no dict)
                if named := TRAINED.search(name):
                    tensors[named[1]] = opened.get_tensor(name)
    return json.loads(config.read_text(encoding="utf-8")), tensors


def _weight_files(place: str | Path) -> Iterator[Path]:
    """Those of a checkpoint, or of its shards, that hold tensors of branches."""
    index = find_file(place, INDEX)
    names = {WEIGHTS[0]}
    if index is not None:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {shard for name, shard in weights.items() if TRAINED.search(name)} or set(weights.values())
    yield from (file for name in sorted(names) if (file := find_file(place, name)) is not None)
