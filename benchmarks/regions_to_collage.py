"""Maps to boxes, boxes to a collage, and the whole way, beside how it is usually done.

`python -m benchmarks.regions_to_collage` measures on one CPU core and exits with an error if the whole way, 48 maps to
a 2-megapixel collage of a decoded 8K picture, takes longer than its limit; `--quick` measures that alone. `--device
cuda` measures on a GPU, where launches and synchronisations are counted too. Nothing is timed before it was checked.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import math
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import WITHHELD, Failure, in_turn, wrong
from hide_kernels import collage, collage_of_maps, explain, regions
from hide_kernels.collage import boxes_to_pixels, plan_layout

GRID = (95, 170)
SIZES = {"2K": (1152, 2048), "4K": (2160, 3840), "8K": (4320, 7680)}
MAPS = 48
THRESHOLD = 0.7
WHITE = (255, 255, 255)
LIMIT_MS = 60.0
Boxes = list[list[int]]


class Row(NamedTuple):
    """One line of a table. Times in microseconds; launches and syncs `None` on the CPU.

    bytes: what has to be read and written at least, inputs and results once.
    """

    what: str
    shape: str
    implementation: str
    median: float
    p20: float
    p80: float
    bytes: int
    launches: int | None
    syncs: int | None


class Way(NamedTuple):
    """One implementation: a call that gives what can be checked, the call that is timed, and whether that is to be."""

    name: str
    run: Callable[[], Any]
    timed: Callable[[], Any]
    withheld: bool


def synthetic_maps(number: int = MAPS, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    """(number, rows, columns) float32 with peak 1: one of four objects each, in other rows and columns, over noise."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    centres = np.array([(12, 30), (34, 140), (55, 75), (80, 110)]) * np.array(grid) / GRID
    maps = np.empty((number, *grid), np.float32)
    for i in range(number):
        row, column = centres[i % len(centres)] + random.normal(0, 0.6, 2)
        spread = random.uniform(2.8, 4.0) * grid[0] / GRID[0]
        blob = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * spread**2))
        blob += random.uniform(0, 0.1, grid)
        maps[i] = (blob - blob.min()) / (blob.max() - blob.min())
    return torch.from_numpy(maps)


def picture(size: tuple[int, int]) -> Tensor:
    """(height, width, 3) uint8 of noise."""
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))


def failures(device: str) -> Iterator[Failure]:
    """What is wrong on a device: every implementation beside the reference, on the maps and pictures of the tables."""
    for maps in (synthetic_maps(3, (37, 53)), synthetic_maps()):
        found = regions(maps, THRESHOLD, backend="scipy")
        want = _per_map(found.boxes, found.counts)
        given = maps.to(device)
        for name, run in _region_finders(given).items():
            if error := wrong(run, want.__eq__, "boxes"):
                way = ("collage_of_maps",) if name == explain("regions", maps=given).chosen else ()
                yield Failure(f"boxes of {len(maps)} maps", name, error, (f"maps to boxes, {name}", *way))


def gpu_table(seconds: float, device: str = "cuda", withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """All measurements on the GPU, as far as they fit into the time; each is checked before it is timed."""
    return in_turn(
        {name: functools.partial(part, torch.device(device), withheld) for name, part in PARTS.items()}, seconds
    )


def whole_table(device: str) -> list[dict[str, Any]]:
    """The whole way alone."""
    return list(_whole_rows(torch.device(device)))


def within_limit(rows: list[dict[str, Any]]) -> bool:
    """Whether ours takes at most `LIMIT_MS`."""
    ours = next(row for row in rows if row.get("implementation") == "collage_of_maps")
    return ours.get("median", math.inf) <= 1e3 * LIMIT_MS


def line(row: dict[str, Any]) -> str:
    """One row of a table as text."""
    if "median" not in row:
        names = (row[name] for name in ("what", "shape", "implementation") if row.get(name))
        return f"{', '.join(names)}: {row.get('failed') or row['skipped']}"
    spread = f"{row['median']:>12.1f} us ({row['p20']:.1f} to {row['p80']:.1f})"
    counts = "" if row["launches"] is None else f"  {row['launches']} launches, {row['syncs']} syncs"
    what = f"{row['what']:<17}{row['shape']:<36}{row['implementation']:<40}"
    return f"{what}{spread}  {row['bytes'] / 1e6:.2f} MB{counts}"


def _rows(
    what: str, shape: str, ways: Iterable[Way], right: Callable[[Any], bool], moved: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Each way, timed if what it gives is right."""
    for name, run, timed, withheld in ways:
        about = {"what": what, "shape": shape, "implementation": name}
        if withheld:
            yield {**about, "skipped": WITHHELD}
        elif error := wrong(run, right, "result"):
            # That others cannot run, or find other boxes, is a result.
            yield {**about, "failed" if name in OURS else "skipped": error}
        else:
            yield measure(what, shape, name, timed, moved, device)._asdict()


def _regions_rows(device: torch.device, withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    for number in (8, 48, 100, 400):
        for grid in ((64, 64), (95, 170), (128, 128), (200, 200)):
            maps = synthetic_maps(number, grid).to(device)
            found = regions(maps, THRESHOLD, backend="scipy")
            want = _per_map(found.boxes, found.counts)
            moved = maps.nbytes + sum(part.nbytes for part in found)
            ways = [
                Way(
                    name,
                    run,
                    functools.partial(regions, maps, THRESHOLD, backend=name) if name in OURS else run,
                    f"maps to boxes, {name}" in withheld,
                )
                for name, run in _region_finders(maps).items()
            ]
            yield from _rows("maps to boxes", f"{number} x {grid[0]}x{grid[1]}", ways, want.__eq__, moved, device)


OURS = ("cuda", "cpp", "cupy", "scipy", "numpy", "collage_of_maps")


def _region_finders(maps: Tensor) -> dict[str, Callable[[], list[Boxes]]]:
    """Ways to the boxes of each map, largest score first: our backends, and what is usually done."""

    def ours(backend: str) -> list[Boxes]:
        found = regions(maps, THRESHOLD, backend=backend)
        return _per_map(found.boxes, found.counts)

    candidates = explain("regions", maps=maps).candidates
    ways: dict[str, Callable[[], list[Boxes]]] = {
        backend.name: functools.partial(ours, backend.name) for backend, reason in candidates if reason is None
    }
    if find_spec("skimage"):
        ways["scikit-image, map by map"] = functools.partial(_scikit_image, maps)
    if maps.is_cuda and find_spec("cupy") and find_spec("cucim"):
        ways["CuPy label in 3-D + regionprops_table"] = functools.partial(_cucim_table, maps)
        ways["cuCIM, map by map"] = functools.partial(_cucim_loop, maps)
    return ways


def _per_map(boxes: Tensor, counts: Tensor) -> list[Boxes]:
    return [own[:count] for own, count in zip(boxes.tolist(), counts.tolist(), strict=True)]


def _by_score(found: list[tuple[float, list[int]]]) -> Boxes:
    return [box for _, box in sorted(found, key=lambda item: -item[0])]


def _scikit_image(maps: Tensor) -> list[Boxes]:
    from skimage import measure

    boxes = []
    for array in maps.cpu().numpy():
        labels = measure.label(array >= np.float32(THRESHOLD), connectivity=2)
        own = []
        for region in measure.regionprops(labels):
            y0, x0, y1, x1 = region.bbox
            own.append((float(array[labels == region.label].sum()), [x0, y0, x1, y1]))
        boxes.append(_by_score(own))
    return boxes


def _cucim_table(maps: Tensor) -> list[Boxes]:
    import cupy
    from cucim.skimage import measure
    from cupyx.scipy import ndimage

    array = cupy.from_dlpack(maps)
    structure = cupy.zeros((3, 3, 3), bool)
    structure[1] = True
    labels, _ = ndimage.label(array >= np.float32(THRESHOLD), structure)
    table = measure.regionprops_table(labels, array, properties=("bbox", "area", "mean_intensity"))
    columns = [cupy.asnumpy(table[name]) for name in ("bbox-0", "bbox-2", "bbox-1", "bbox-5", "bbox-4")]
    scores = cupy.asnumpy(table["area"] * table["mean_intensity"])
    own: list[list[tuple[float, list[int]]]] = [[] for _ in maps]
    for score, index, *box in zip(scores.tolist(), *(column.tolist() for column in columns), strict=True):
        own[index].append((score, box))
    return [_by_score(found) for found in own]


def _cucim_loop(maps: Tensor) -> list[Boxes]:
    import cupy
    from cucim.skimage import measure

    boxes = []
    for array in cupy.from_dlpack(maps):
        labels = measure.label(array >= np.float32(THRESHOLD), connectivity=2)
        table = measure.regionprops_table(labels, array, properties=("bbox", "area", "mean_intensity"))
        columns = [cupy.asnumpy(table[f"bbox-{i}"]).tolist() for i in (1, 0, 3, 2)]
        scores = cupy.asnumpy(table["area"] * table["mean_intensity"]).tolist()
        boxes.append(_by_score([(score, list(box)) for score, *box in zip(scores, *columns, strict=True)]))
    return boxes


def _pixel_boxes(maps: Tensor, size: tuple[int, int]) -> Tensor:
    found = regions(maps, THRESHOLD)
    used = torch.arange(found.boxes.shape[1], device=maps.device) < found.counts[:, None]
    return boxes_to_pixels(found.boxes[used], grid=GRID, size=size)


def _collage_rows(device: torch.device, withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    for name, size in SIZES.items():
        host = picture(size)
        boxes = _pixel_boxes(synthetic_maps(), size).to(device)
        want = collage(host, boxes.cpu(), fill=WHITE, backend="numpy").image
        assert want is not None
        planar = host.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        for order, source in (("", host.to(device)), (", channels first", planar.to(device))):
            calls = {
                backend.name: functools.partial(collage, source, boxes, fill=WHITE, backend=backend.name)
                for backend, reason in explain("collage", image=source).candidates
                if reason is None
            }
            shape = f"{name}{order} to {want.shape[1]}x{want.shape[0]}"
            yield from _rows(
                "boxes to collage",
                shape,
                [Way(backend, run, run, False) for backend, run in calls.items()],
                lambda made, want=want: made.image is not None and torch.equal(made.image.cpu(), want),
                2 * want.nbytes,
                device,
            )


def _whole_rows(device: torch.device, withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    maps, host = synthetic_maps(), picture(SIZES["8K"])
    want = collage(host, _pixel_boxes(maps, SIZES["8K"]), fill=WHITE, backend="numpy").image
    assert want is not None
    on_device, source = maps.to(device), host.to(device)
    shape = f"{MAPS} x {GRID[0]}x{GRID[1]}, 8K to {want.shape[1]}x{want.shape[0]}"
    moved = maps.nbytes + 2 * want.nbytes

    def ours() -> Tensor | None:
        return collage_of_maps(source, on_device, THRESHOLD, fill=WHITE).image

    decoded = Image.fromarray(host.numpy())

    def published(files: bool) -> Tensor:
        return torch.from_numpy(np.array(_published(on_device, decoded, files)))

    ways: dict[str, Callable[[], Tensor | None]] = {"collage_of_maps": ours}
    if find_spec("skimage"):
        ways["published steps, no files"] = functools.partial(published, False)
        ways["published steps, PNGs and base64"] = functools.partial(published, True)
    yield from _rows(
        "maps to collage",
        shape,
        [Way(name, run, run, name in withheld) for name, run in ways.items()],
        lambda made: made is not None and torch.equal(made.cpu(), want),
        moved,
        device,
    )


def _published(maps: Tensor, image: Image.Image, files: bool) -> Image.Image:
    """The steps of the published code, one region, pair of boxes and crop at a time.

    With `files`, also its three debugging PNGs and the collage as a base64 PNG.
    """
    left = published_boxes(maps, image)
    shown = published_collage(left, image)
    if files:
        masked = Image.new("RGBA", image.size)
        for box in left:
            masked.paste(image.crop(tuple(box)), tuple(box[:2]))
        centred = Image.new("RGBA", image.size)
        centred.paste(shown, ((image.width - shown.width) // 2, (image.height - shown.height) // 2))
        with tempfile.TemporaryDirectory() as folder:
            for i, debug in enumerate((masked, centred, shown)):
                debug.save(Path(folder, f"{i}.png"))
        shown = through_base64(shown)
    return on_white(shown)


def published_boxes(maps: Tensor, image: Image.Image) -> Boxes:
    """Boxes in pixels, merged a pair at a time."""
    cells = [box for own in _scikit_image(maps) for box in own]
    left = boxes_to_pixels(torch.tensor(cells), grid=GRID, size=(image.height, image.width)).tolist()
    pair: tuple[int, int] | None = (0, 0)
    while pair is not None:
        pair = next(((i, j) for i in range(len(left)) for j in range(i) if _touch(left[i], left[j])), None)
        if pair is not None:
            a, b = left.pop(pair[0]), left.pop(pair[1])
            left.append([*map(min, a[:2], b[:2]), *map(max, a[2:], b[2:])])
    return left


def published_collage(boxes: Boxes, image: Image.Image) -> Image.Image:
    """RGBA, a crop at a time."""
    layout = plan_layout(torch.tensor(boxes))
    shown = Image.new("RGBA", (layout.size[1], layout.size[0]))
    for box, position in zip(boxes, layout.positions.tolist(), strict=True):
        shown.paste(image.crop(tuple(box)).convert("RGBA"), tuple(position[:2]))
    return shown


def through_base64(image: Image.Image) -> Image.Image:
    """The picture as a base64 PNG, and back."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Image.open(io.BytesIO(base64.b64decode(base64.b64encode(buffer.getvalue()))))


def on_white(image: Image.Image) -> Image.Image:
    """RGBA to RGB."""
    white = Image.new("RGB", image.size, WHITE)
    white.paste(image, mask=image.getchannel("A"))
    return white


def _touch(a: list[int], b: list[int]) -> bool:
    return not (a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1])


def measure(what: str, shape: str, name: str, run: Callable[[], Any], moved: int, device: torch.device) -> Row:
    """Time until the results are there, of 3 to 50 runs; on a GPU the device is idle before the clock starts."""
    samples: list[float] = []
    while len(samples) < 3 or (len(samples) < 50 and sum(samples) < 1e6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append(1e6 * (time.perf_counter() - start))
    p20, median, p80 = np.percentile(samples, (20, 50, 80)).tolist()
    launches, syncs = _count(run) if device.type == "cuda" else (None, None)
    return Row(what, shape, name, median, p20, p80, moved, launches, syncs)


def _count(run: Callable[[], Any]) -> tuple[int, int]:
    """Kernels launched, and calls that make the host wait; copies to the host wait too."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
    calls = {event.key: event.count for event in profile.key_averages()}
    launches = sum(count for name, count in calls.items() if "LaunchKernel" in name)
    syncs = sum(count for name, count in calls.items() if "Synchronize" in name)
    # The profiler itself waits once at its end.
    return launches, syncs - 1


PARTS: dict[str, Callable[..., Iterable[dict[str, Any]]]] = {
    "maps to collage": _whole_rows,
    "boxes to collage": _collage_rows,
    "maps to boxes": _regions_rows,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="only the whole way, which has a limit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = [_whole_rows] if arguments.quick else PARTS.values()
    rows = [row for part in parts for row in part(torch.device(arguments.device))]
    for row in rows:
        print(line(row))
    if not within_limit(rows):
        print(f"median above the limit of {LIMIT_MS:.0f} ms")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
