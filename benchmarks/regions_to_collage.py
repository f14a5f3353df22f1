"""Time from 48 purified maps to a 2-megapixel collage of an 8K image, on one CPU core.

`python -m benchmarks.regions_to_collage` prints median, p20 and p80 in milliseconds for the whole path and its stages,
and exits with an error if the median is above the limit. The source is decoded before the clock starts.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
from torch import Tensor

from hide_kernels.collage import Collage, boxes_to_pixels, collage
from hide_kernels.regions import regions

GRID = (95, 170)
SIZE = (4320, 7680)
MAPS = 48
THRESHOLD = 0.7
LIMIT_MS = 150.0
STAGES = ("maps -> regions", "regions -> pixel boxes", "pixel boxes -> collage", "total")


def synthetic_maps(seed: int = 0) -> Tensor:
    """(MAPS, rows, columns) float32 with peak 1: one of four objects each, in other rows and columns, over noise."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: GRID[0], : GRID[1]]
    centres = [(12, 30), (34, 140), (55, 75), (80, 110)]
    maps = np.empty((MAPS, *GRID), np.float32)
    for i in range(MAPS):
        row, column = centres[i % len(centres)] + random.normal(0, 0.6, 2)
        spread = random.uniform(2.8, 4.0)
        blob = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * spread**2))
        blob += random.uniform(0, 0.1, GRID)
        maps[i] = (blob - blob.min()) / (blob.max() - blob.min())
    return torch.from_numpy(maps)


def run_once(maps: Tensor, image: Tensor) -> tuple[list[float], int, Collage]:
    """Milliseconds of each stage and of all, the number of regions, and the collage."""
    times = [time.perf_counter()]
    found = regions(maps, THRESHOLD)
    times.append(time.perf_counter())
    filled = torch.arange(found.boxes.shape[1]) < found.counts[:, None]
    boxes = boxes_to_pixels(found.boxes[filled], grid=GRID, size=SIZE)
    times.append(time.perf_counter())
    result = collage(image, boxes, fill=(255, 255, 255))
    times.append(time.perf_counter())
    return [1e3 * seconds for seconds in (*np.diff(times), times[-1] - times[0])], len(boxes), result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=50, help="timed runs, after 3 that are not (default 50)")
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    maps = synthetic_maps()
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8))

    for _ in range(3):
        _, found, result = run_once(maps, image)
    samples = np.array([run_once(maps, image)[0] for _ in range(runs)])
    p20, median, p80 = np.percentile(samples, (20, 50, 80), axis=0)

    assert result.image is not None
    height, width = result.image.shape[:2]
    print(f"{MAPS} maps of {GRID[0]} x {GRID[1]}, threshold {THRESHOLD}: {found} regions, {len(result.boxes)} boxes")
    print(f"source {SIZE[1]} x {SIZE[0]} RGB, collage {width} x {height} RGB = {width * height / 1e6:.2f} megapixels")
    print(f"{runs} runs, 1 thread, milliseconds\n")
    print(f"{'stage':<24}{'median':>9}{'p20':>9}{'p80':>9}")
    for i, stage in enumerate(STAGES):
        print(f"{stage:<24}{median[i]:>9.2f}{p20[i]:>9.2f}{p80[i]:>9.2f}")
    if median[-1] > LIMIT_MS:
        print(f"\nmedian above the limit of {LIMIT_MS:.0f} ms")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
