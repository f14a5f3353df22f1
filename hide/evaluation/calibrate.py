"""Settings of HiDe for a model, from a data set whose questions come with the boxes of what they ask about.

Four experiments: which layer's attention lies in the boxes; how small a view of the picture still finds them; what
smoothing and threshold keep of the boxes and of the rest of the picture; and whether answers get better by the form in
which the boxes are shown (`hide.evaluation.runner` with the methods of `hide.methods.ablations`). A fifth is for
Q-Zoom's training: which heads look at what is asked about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hide.evaluation.data import Sample
from hide.methods.hide.entities import Entities
from hide.methods.hide.method import HiDe, region_boxes
from hide.methods.q_zoom.method import QZoom, prompt_of
from hide.models.base import Adapter
from hide.present.pages import Section, embedded, render
from hide.present.table import ResultTable
from hide.session import open_session
from hide.training.heads import HeadScore, Rows, head_scores
from hide.training.labels import head_maps, prompt_rows
from hide.training.settings import settings_for
from hide_kernels.collage import merge_boxes, plan_layout

SIGMAS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


class LayerScore(NamedTuple):
    """Means over questions, of the means over entity tokens, of what lies in the true boxes.

    inside: part of the row over the image. times: that, over the boxes' part of the area. purified: part of the
    purified map. peak: how often the purified map has its peak there.
    """

    inside: float
    times: float
    purified: float
    peak: float


class GridScore(NamedTuple):
    """Means over questions for one sigma and one threshold.

    recall: part of the true boxes' area that the found boxes cover. precision: part of the found boxes' area that lies
    in true ones; 0 where none was found. collage: the collage's area over the picture's.
    """

    recall: float
    precision: float
    collage: float

    @property
    def value(self) -> float:
        """Recall times the part of the picture that is left away: what is recommended has the highest."""
        return self.recall * (1 - self.collage)


Failed = Callable[[Sample, Exception], None]
"""Called with a question that could not be measured."""

Grid = Mapping[tuple[float, float], GridScore]
"""(sigma, threshold) -> score."""

View = int | str | None
"""As `RunSettings.view_tokens`; `None`: the whole image."""


class ViewScore(NamedTuple):
    """What is found on one view.

    tokens: of the image, mean over questions. sigma, threshold: the best of `grid`. value: mean over questions of
    `GridScore.value` with these; error: its standard error. grid: of all sigmas and thresholds.
    """

    tokens: float
    sigma: float
    threshold: float
    value: float
    error: float
    grid: Grid


def layer_sweep(
    hide: HiDe,
    samples: Iterable[Sample],
    *,
    progress: Callable[[], None] = lambda: None,
    failed: Failed | None = None,
) -> list[LayerScore]:
    """Where each layer's attention lies; one forward per question for all layers.

    The maps are smoothed as its settings say. Entities are the data set's own where it has them. Samples have boxes.
    With `failed`, a question that raises is left out; if all do, that is a `ValueError`.
    """

    def measure(sample: Sample) -> list[LayerScore]:
        image, scores = _picture(sample), []
        with hide.open(image) as session:
            by_layer = hide.attention_rows_by_layer(session, _entities(hide, sample))
        for rows in by_layer:
            inside = _targets(sample, image, rows.rows[0]).to(rows.rows[0].device)
            tokens = rows.rows[0][rows.prior_rows :]
            share = float((tokens * inside).sum((1, 2)).div(tokens.sum((1, 2)).clamp(min=1e-30)).mean())
            maps = hide.maps(rows).by_image[0][0]
            part = (maps * inside).sum((1, 2)) / maps.sum((1, 2))
            at_peak = inside.flatten()[maps.flatten(1).argmax(1)].float()
            purified, peak = (float(values.mean()) if len(maps) else 0.0 for values in (part, at_peak))
            scores.append(LayerScore(share, share / float(inside.float().mean()), purified, peak))
        return scores

    found = _each(samples, measure, progress, failed)
    return [LayerScore(*map(fmean, zip(*of_layer, strict=True))) for of_layer in zip(*found, strict=True)]


def head_sweep(
    model: Adapter,
    samples: Iterable[Sample],
    *,
    request: str = "",
    progress: Callable[[], None] = lambda: None,
    failed: Failed | None = None,
) -> list[HeadScore]:
    """Where each head looks while the model reads the question, and while it writes the reply.

    The image has as many tokens as when labels are made. request: what questions are followed by. `failed` as for
    `layer_sweep`.
    """
    settings, (preset, _) = settings_for(model), QZoom.preset_for(model)
    kinds: tuple[Rows, ...] = ("reply", "question")

    def measure(sample: Sample) -> list[tuple[Rows, Tensor, Tensor]]:
        image, found = _picture(sample), list[tuple[Rows, Tensor, Tensor]]()
        text = prompt_of(preset, sample.question)
        with open_session(model, image, settings.run(settings.label_tokens)) as session:
            for rows in kinds:
                most = settings.max_new_tokens
                ids, places, _ = prompt_rows(session, text, sample.question, rows, request, most)
                by_layer = head_maps(session, ids, places, range(model.num_layers))
                maps = torch.stack([by_layer[layer] for layer in sorted(by_layer)]).cpu()
                found.append((rows, maps, _targets(sample, image, maps)))
        return found

    return head_scores([one for of_sample in _each(samples, measure, progress, failed) for one in of_sample])


def settings_grid(
    hide: HiDe,
    samples: Iterable[Sample],
    *,
    sigmas: Sequence[float] = SIGMAS,
    thresholds: Sequence[float] = THRESHOLDS,
    progress: Callable[[], None] = lambda: None,
    failed: Failed | None = None,
) -> Grid:
    """What each sigma and threshold keep, with the layers and the view of its settings; one forward per question serves
    all. `failed` as for `layer_sweep`."""
    view = hide.preset.run.view_tokens
    found = view_sweep(hide, samples, [view], sigmas=sigmas, thresholds=thresholds, progress=progress, failed=failed)
    return found[view].grid


def view_sweep(
    hide: HiDe,
    samples: Iterable[Sample],
    views: Sequence[View],
    *,
    sigmas: Sequence[float] = SIGMAS,
    thresholds: Sequence[float] = THRESHOLDS,
    progress: Callable[[], None] = lambda: None,
    failed: Failed | None = None,
) -> dict[View, ViewScore]:
    """What is found on each view, with the sigma and threshold that are best on it: sigma counts the view's cells.

    One forward per question and view, and none for a view that shows a picture as a larger one does.
    """
    settings = [(sigma, threshold) for sigma in sigmas for threshold in thresholds]

    def measure(sample: Sample) -> dict[View, tuple[int, dict[tuple[float, float], GridScore]]]:
        image, scores = _picture(sample), {}
        runs = {view: hide.changed(view_tokens=view) for view in views}
        budget = {view: own.preset.run.view(*image.size) for view, own in runs.items()}
        tokens, found = 0, dict[tuple[float, float], GridScore]()
        for view in sorted(views, key=budget.__getitem__, reverse=True):
            if not found or budget[view] < tokens:
                tokens, found = _measured(runs[view], sample, image, settings)
            scores[view] = tokens, found
        return scores

    measured = _each(samples, measure, progress, failed)
    return {view: _view_score([of_question[view] for of_question in measured]) for view in views}


def _measured(
    hide: HiDe, sample: Sample, image: Image.Image, settings: Sequence[tuple[float, float]]
) -> tuple[int, dict[tuple[float, float], GridScore]]:
    """Tokens of what is looked at, and what each sigma and threshold keep of it."""
    with hide.open(image) as session:
        rows, (tokens,) = hide.attention_rows(session, _entities(hide, sample)), session.image_tokens
    truth, scores, maps = torch.tensor(sample.boxes), {}, dict[float, Tensor]()
    for sigma, threshold in settings:
        if sigma not in maps:
            maps[sigma] = hide.changed(sigma=sigma).maps(rows).by_image[0][0]
        boxes = merge_boxes(region_boxes(maps[sigma], threshold, image.size))
        scores[sigma, threshold] = _grid_score(boxes, truth, image.size)
    return tokens, scores


def _view_score(measured: Sequence[tuple[int, dict[tuple[float, float], GridScore]]]) -> ViewScore:
    every = [scores for _, scores in measured]
    grid = {
        setting: GridScore(*map(fmean, zip(*(scores[setting] for scores in every), strict=True)))
        for setting in every[0]
    }
    best = best_setting(grid)
    values = [scores[best].value for scores in every]
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return ViewScore(fmean(tokens for tokens, _ in measured), *best, fmean(values), error, grid)


def best_view(scores: Mapping[View, ViewScore]) -> View:
    """The view of the fewest tokens whose value is within one standard error of the highest; of equal ones the first
    (the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3)."""
    highest = max(scores.values(), key=lambda score: score.value)
    near = [view for view, score in scores.items() if score.value >= highest.value - highest.error]
    return min(near, key=lambda view: scores[view].tokens)


def best_layer(scores: Sequence[LayerScore]) -> int:
    """The layer whose purified maps lie in the true boxes with the largest part."""
    return max(range(len(scores)), key=lambda layer: scores[layer].purified)


def best_setting(grid: Grid) -> tuple[float, float]:
    """(sigma, threshold) with the highest value; of equal ones the first."""
    return max(grid, key=lambda setting: grid[setting].value)


def cells_inside(boxes: Iterable[tuple[int, int, int, int]], size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(rows, columns) bool: the cells of a grid over a picture that any of the boxes touches.

    boxes: half-open pixels x0, y0, x1, y1. size: (width, height) of the picture. grid: (rows, columns).
    """
    rows, columns = grid
    x, y = torch.arange(columns), torch.arange(rows)[:, None]
    inside = torch.zeros(grid, dtype=torch.bool)
    for box in boxes:
        x0, x1 = (edge / size[0] * columns for edge in (box[0], box[2]))
        y0, y1 = (edge / size[1] * rows for edge in (box[1], box[3]))
        inside |= (x < x1) & (x + 1 > x0) & (y < y1) & (y + 1 > y0)
    return inside


def _targets(sample: Sample, image: Image.Image, maps: Tensor) -> Tensor:
    """(rows, columns) bool: the cells of maps that a sample's boxes touch; `ValueError` where there is none."""
    inside = cells_inside(sample.boxes, image.size, _grid_of(maps))
    if not inside.any():
        raise ValueError(f"boxes: got {list(sample.boxes)}, none of which is in the picture of {image.size}")
    return inside


def layer_table(scores: Sequence[LayerScore]) -> ResultTable:
    """One line per layer."""
    rows = [
        (str(layer), f"{score.inside:.1%}", f"{score.times:.1f}", f"{score.purified:.1%}", f"{score.peak:.1%}")
        for layer, score in enumerate(scores)
    ]
    header = ("layer", "of the row in the boxes", "times their area", "of the purified map", "peaks in the boxes")
    return ResultTable("Attention inside the true boxes, by layer", header, rows)


def view_table(scores: Mapping[View, ViewScore]) -> ResultTable:
    """One line per view, each with its best sigma and threshold."""
    rows = []
    for view, score in scores.items():
        kept = score.grid[score.sigma, score.threshold]
        shares = (f"{share:.1%}" for share in kept)
        value = f"{score.value:.1%} ± {score.error:.1%}"
        rows.append(
            (view_name(view), f"{score.tokens:,.0f}", f"{score.sigma:g}", f"{score.threshold:g}", *shares, value)
        )
    header = ("view", "tokens", "sigma", "threshold", "recall", "precision", "collage", "value, standard error")
    return ResultTable("What is found on each view", header, rows)


def view_name(view: View) -> str:
    """What tables and commands call a view."""
    return "whole" if view is None else str(view)


def grid_tables(grid: Grid) -> list[ResultTable]:
    """Recall, precision, collage area and value: sigma down, threshold across."""
    sigmas, thresholds = _axes(grid)
    return [
        ResultTable(
            title,
            ("sigma", *(f"threshold {threshold:g}" for threshold in thresholds)),
            [(f"{sigma:g}", *(f"{value(grid[sigma, threshold]):.1%}" for threshold in thresholds)) for sigma in sigmas],
        )
        for title, value in _GRID_PARTS
    ]


_GRID_PARTS: tuple[tuple[str, Callable[[GridScore], float]], ...] = (
    ("Recall: part of the true boxes that is kept", lambda score: score.recall),
    ("Precision: part of the found boxes that is true", lambda score: score.precision),
    ("Collage area over the picture's", lambda score: score.collage),
    ("Recall times the area that is left away", lambda score: score.value),
)


def save_pictures(directory: Path, layers: Sequence[LayerScore], grid: Grid) -> list[Path]:
    """Draw `layers.png` and `grid.png`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(max(6, 0.3 * len(layers) + 3), 4), layout="constrained")
    axes = figure.subplots()
    for name, values in (
        ("of the row", [score.inside for score in layers]),
        ("of the purified map", [score.purified for score in layers]),
        ("peaks", [score.peak for score in layers]),
    ):
        axes.plot(values, marker="o", label=name)
    axes.axvline(best_layer(layers), color="0.7", zorder=0)
    axes.set(xlabel="layer", ylabel="part inside the true boxes", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    axes.grid(alpha=0.3)
    paths = [directory / "layers.png", directory / "grid.png"]
    figure.savefig(paths[0], dpi=110)

    sigmas, thresholds = _axes(grid)
    figure = Figure(figsize=(13, 7), layout="constrained")
    best = best_setting(grid)
    for panel, (title, value) in zip(figure.subplots(2, 2).flat, _GRID_PARTS, strict=True):
        table = np.array([[value(grid[sigma, threshold]) for threshold in thresholds] for sigma in sigmas])
        panel.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        panel.set_title(title, fontsize=10)
        panel.set_xticks(range(len(thresholds)), [f"{threshold:g}" for threshold in thresholds])
        panel.set_yticks(range(len(sigmas)), [f"{sigma:g}" for sigma in sigmas])
        panel.set(xlabel="threshold", ylabel="sigma, cells")
        for row, column in np.ndindex(table.shape):
            chosen = (sigmas[row], thresholds[column]) == best
            panel.text(
                column, row, f"{table[row, column]:.2f}", ha="center", va="center", fontsize=8,
                color="white" if table[row, column] < 0.6 else "black", weight="bold" if chosen else "normal",
                bbox={"boxstyle": "round", "fill": False, "edgecolor": "red"} if chosen else None,
            )  # fmt: skip
    figure.savefig(paths[1], dpi=110)
    return paths


def sections(
    layers: Sequence[LayerScore],
    views: Mapping[View, ViewScore],
    grid: Grid,
    pictures: Sequence[Path],
    forms: Sequence[ResultTable],
    failed: Sequence[ResultTable],
) -> list[Section]:
    """The experiments as parts of a page.

    pictures: of `save_pictures`. forms: the answers by the form in which the boxes are shown. failed: questions that
    could not be measured.
    """
    by_layer, by_setting = (embedded(Image.open(picture).convert("RGB"), "PNG") for picture in pictures)
    found = [
        Section(
            "Layers",
            "How much of each layer's attention lies in the true boxes, before and after purifying. The line marks the "
            "best layer.",
            [layer_table(layers)],
            [(by_layer, "Attention in the true boxes by layer; the table has the figures", "")],
        ),
        Section(
            "Views",
            "What is found on a view of the image, with the sigma and threshold that are best on it. The view with the "
            "fewest tokens within a standard error of the best is taken.",
            [view_table(views)],
        ),
        Section(
            "Sigma and threshold",
            f"On the view that is taken, {view_name(best_view(views))}. What is framed is recommended.",
            grid_tables(grid),
            [(by_setting, "Recall, precision, collage and value; the tables have the figures", "")],
            wide=True,
        ),
    ]
    if forms:
        about = "The same boxes as a layout-preserving collage (hide), in a row, in the whole image, and as one crop."
        found.append(Section("Layout", about, forms))
    return [*found, *([Section("Failed", tables=failed)] if failed else [])]


def save_page(
    path: Path, title: str, parts: Sequence[Section], view: View, recommended: str, settings: Mapping[str, Any]
) -> Path:
    """Write the page and return its path; settings: of the run, shown last."""
    look = "" if view is None else f", view_tokens={view!r}"
    page = render(
        "calibration.html", title=title, recommended=f"{recommended}{look}", sections=parts, settings=settings
    )
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def to_dict(layers: Sequence[LayerScore], views: Mapping[View, ViewScore], grid: Grid) -> dict[str, Any]:
    """The experiments for JSON; grid: of the view that was chosen."""
    return {
        "layers": [score._asdict() for score in layers],
        "views": [
            {
                "view": view,
                **{name: value for name, value in score._asdict().items() if name != "grid"},
                **score.grid[score.sigma, score.threshold]._asdict(),
            }
            for view, score in views.items()
        ],
        "grid": [
            {"sigma": sigma, "threshold": threshold, **score._asdict(), "value": score.value}
            for (sigma, threshold), score in grid.items()
        ],
    }


def _axes(grid: Grid) -> tuple[list[float], list[float]]:
    return sorted({sigma for sigma, _ in grid}), sorted({threshold for _, threshold in grid})


T = TypeVar("T")


def _each(
    samples: Iterable[Sample],
    measure: Callable[[Sample], T],
    progress: Callable[[], None],
    failed: Failed | None,
) -> list[T]:
    found, last = [], ""
    for sample in samples:
        try:
            found.append(measure(sample))
        except Exception as error:  # whatever one question does, the others are measured
            if failed is None:
                raise
            failed(sample, error)
            last = f"; the last, {sample.id}: {type(error).__name__}: {error}"
        progress()
    if not found:
        raise ValueError(f"data: no question could be measured{last}")
    return found


def _picture(sample: Sample) -> Image.Image:
    picture = sample.image()
    if isinstance(picture, tuple):
        raise ValueError(f"image: got {len(picture)} pictures, want one: layers are measured in the boxes of one")
    return picture


def _entities(hide: HiDe, sample: Sample) -> Entities:
    return Entities(sample.entities) if sample.entities else hide.entities(sample.question)


def _grid_of(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _grid_score(boxes: Tensor, truth: Tensor, size: tuple[int, int]) -> GridScore:
    if not len(boxes):
        return GridScore(0.0, 0.0, 0.0)
    height, width = plan_layout(boxes).size
    both = _covered(boxes, truth)
    return GridScore(both / _covered(truth, truth), both / _covered(boxes, boxes), height * width / (size[0] * size[1]))


def _covered(some: Tensor, others: Tensor) -> int:
    """Pixels that lie in a box of each set: counted on the grid that all edges together draw."""
    xs, ys = (torch.cat([some[:, axis::2], others[:, axis::2]]).unique() for axis in (0, 1))
    cells = torch.ones(len(ys) - 1, len(xs) - 1, dtype=torch.bool)
    for boxes in (some, others):
        own = torch.zeros_like(cells)
        for x0, y0, x1, y1 in boxes.tolist():
            own |= ((ys[:-1] >= y0) & (ys[1:] <= y1))[:, None] & ((xs[:-1] >= x0) & (xs[1:] <= x1))
        cells &= own
    return int((cells * ys.diff()[:, None] * xs.diff()).sum())
