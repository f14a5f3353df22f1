"""Attention rows to the pixel_values of their collage, beside how it is usually done, stage by stage.

`python -m benchmarks.rows_to_pixel_values` measures on one CPU core and exits with an error if the whole way takes
longer than its limit: 48 rows and 8 of the prior on a grid of 95 x 170, a decoded 8K picture, a collage of about two
megapixels. `--device cuda` measures on a GPU, with the upload of the picture and its decoding apart. Nothing is timed
before it was checked: both ways must give the same bits.
"""

from __future__ import annotations

import argparse
import functools
import io
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks import regions_to_collage
from benchmarks.measure import WITHHELD, Failure, found_wrong, in_turn, wrong
from benchmarks.regions_to_collage import GRID, MAPS, SIZES, THRESHOLD, WHITE, measure, picture
from hide.images import decode
from hide.models.qwen2_5_vl import LOADER_MIN_TOKENS, token_grid
from hide_kernels import collage_of_maps, pixel_values, resize, token_maps

PRIOR = 8
SIGMA = 3.0
CELL = 28
MIN_TOKENS, MAX_TOKENS = 256, 16384
# What Qwen2.5-VL's processor subtracts and divides by.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LIMIT_MS = {"cpu": 120.0, "cuda": 3.0}
WHOLE, OURS = "rows to pixels", "the operators"
Stage = Callable[[Any], Any]


def attention(seed: int = 0) -> Tensor:
    """(PRIOR + MAPS, rows, columns) float32, each of sum 1: noise, and in each after the prior one of four objects."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: GRID[0], : GRID[1]]
    found = random.uniform(0, 0.1, (PRIOR + MAPS, *GRID))
    for i in range(MAPS):
        row, column = np.array([(12, 30), (34, 140), (55, 75), (80, 110)])[i % 4] + random.normal(0, 0.6, 2)
        spread = random.uniform(3.0, 4.9)
        found[PRIOR + i] += 8 / spread**2 * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * spread**2))
    return torch.from_numpy((found / found.sum((1, 2), keepdims=True)).astype(np.float32))


def failures(device: str) -> Iterator[Failure]:
    """What is wrong on a device: our values beside those of the published steps, bit for bit; without scikit-image,
    which those want, beside ours of the host."""
    rows, source = attention(1), picture(SIZES["2K"])
    want = _run(_published(Image.fromarray(source.numpy())) if find_spec("skimage") else _ours(source), rows)
    error = wrong(
        lambda: _run(_ours(source.to(device)), rows.to(device)),
        lambda got: torch.equal(got.cpu(), want),
        "values beside those of the published steps",
    )
    if error:
        yield Failure("a 2K picture", OURS, error, (WHOLE,))


def gpu_table(seconds: float, device: str = "cuda", withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """All measurements on the GPU, as far as they fit into the time; each is checked before it is timed."""
    parts: dict[str, Callable[[torch.device], Iterable[dict[str, Any]]]] = {
        WHOLE: _whole_rows,
        "upload": _upload_rows,
        "decode": _decode_rows,
    }
    if WHOLE in withheld:
        parts[WHOLE] = lambda device: [{"what": WHOLE, "skipped": WITHHELD}]
    return in_turn({name: functools.partial(part, torch.device(device)) for name, part in parts.items()}, seconds)


def whole_table(device: str) -> list[dict[str, Any]]:
    """The whole way and its stages, ours and the published ones."""
    return list(_whole_rows(torch.device(device)))


def within_limit(rows: list[dict[str, Any]]) -> bool:
    """Whether ours takes at most the limit of the device that it ran on."""
    ours = next(row for row in rows if row.get("implementation") == OURS)
    return ours["median"] <= 1e3 * LIMIT_MS["cpu" if ours["launches"] is None else "cuda"]


def line(row: dict[str, Any]) -> str:
    """One row of a table as text."""
    text = regions_to_collage.line(row)
    if not row.get("bytes", 1):
        # Of stages only the times are kept.
        text = text.replace("  0.00 MB", "")
    return f"{text}  {row['largest']} levels from Pillow, {row['mean']:.3f} on average" if "largest" in row else text


def _ours(source: Tensor) -> dict[str, Stage]:
    """Stages from rows to values, each given what the one before it made."""
    return {
        "token_maps": lambda rows: token_maps([rows], prior_rows=PRIOR, sigma=SIGMA),
        "collage_of_maps": lambda maps: (
            collage_of_maps(source, maps.maps[0], THRESHOLD, valid=maps.valid, fill=WHITE).image
        ),
        "pixel_values": lambda image: pixel_values(image, _sizes(*image.shape[:2]), mean=MEAN, std=STD),
    }


def _published(image: Image.Image) -> dict[str, Stage]:
    import transformers

    made = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    size = {"shortest_edge": MIN_TOKENS * CELL**2, "longest_edge": MAX_TOKENS * CELL**2}
    processor = made(image_mean=list(MEAN), image_std=list(STD))

    def boxes(maps: NDArray[np.float32]) -> regions_to_collage.Boxes:
        return regions_to_collage.published_boxes(torch.from_numpy(maps), image)

    def loaded(shown: Image.Image) -> Image.Image:
        height, width = _sizes(shown.height, shown.width)[0]
        return regions_to_collage.on_white(shown).resize((width, height), Image.Resampling.BICUBIC)

    return {
        "SciPy, map by map": _scipy_maps,
        "scikit-image, map by map": boxes,
        "Pillow's crops": lambda found: regions_to_collage.published_collage(found, image),
        "PNG and base64": regions_to_collage.through_base64,
        "Pillow's resize": loaded,
        "Hugging Face's processor": lambda picture: processor(images=[picture], size=size, return_tensors="pt")[
            "pixel_values"
        ],
    }


def _scipy_maps(rows: Tensor) -> NDArray[np.float32]:
    from scipy.ndimage import gaussian_filter

    maps = []
    for row in rows.cpu().double().numpy():
        smooth = gaussian_filter(row, SIGMA)
        maps.append((smooth - smooth.min()) / (smooth.max() - smooth.min()))
    noise = np.mean(maps[:PRIOR], axis=0)
    own = [np.maximum(one - noise, 0) for one in maps[PRIOR:]]
    return np.stack([one / one.max() for one in own]).astype(np.float32)


def _sizes(height: int, width: int) -> list[tuple[int, int]]:
    """What Qwen's loader resizes a picture to, and then its processor, which wants more tokens."""
    sizes = []
    for least in (LOADER_MIN_TOKENS, MIN_TOKENS):
        rows, columns = token_grid(height, width, CELL, least, MAX_TOKENS)
        height, width = rows * CELL, columns * CELL
        sizes.append((height, width))
    return sizes


def _run(stages: dict[str, Stage], given: Any) -> Any:
    return functools.reduce(lambda made, stage: stage(made), stages.values(), given)


def _whole_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    rows, host = attention(), picture(SIZES["8K"])
    on_device, source = rows.to(device), host.to(device)
    ways = {OURS: (_ours(source), on_device)}
    if find_spec("skimage"):
        ways["published steps"] = (_published(Image.fromarray(host.numpy())), rows)
    *to_collage, to_values = _ours(source).values()
    collage = functools.reduce(lambda made, stage: stage(made), to_collage, on_device)
    want = to_values(collage)
    shape = f"{len(rows)} rows, 8K to {collage.shape[1]}x{collage.shape[0]}"
    # The rows, the collage's pixels from the source, it again written and read, and the values.
    moved = rows.nbytes + 3 * collage.nbytes + want.nbytes
    for name, (stages, given) in ways.items():
        if not torch.equal(_run(stages, given).cpu(), want.cpu()):
            raise AssertionError(f"{WHOLE}, {name}: other values than ours")
        yield measure(WHOLE, shape, name, functools.partial(_run, stages, given), moved, device)._asdict()
        for stage, one in stages.items():
            yield measure("", "", f"  {stage}", functools.partial(one, given), 0, device)._asdict()
            given = one(given)


def _upload_rows(device: torch.device) -> list[dict[str, Any]]:
    host = picture(SIZES["8K"]).pin_memory()
    target = torch.empty_like(host, device=device)
    run = functools.partial(target.copy_, host, non_blocking=True)
    return [measure("upload", "8K", "from pinned memory", run, host.nbytes, device)._asdict()]


def _decode_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """Each decoder that can serve a JPEG on the device, and how far it is from Pillow."""
    size = SIZES["8K"]
    smooth = resize(picture((size[0] // 8, size[1] // 8)), size)
    buffer = io.BytesIO()
    Image.fromarray(smooth.numpy()).save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    want = decode(data)
    for name in ("pillow", "nvimgcodec"):
        run = functools.partial(decode, data, device=device, decoder=name)
        try:
            found = run().cpu()
        except ValueError as error:
            yield {"what": f"decode, {name}", "skipped": str(error)}
            continue
        difference = (found.int() - want.int()).abs()
        row = measure("decode", f"8K JPEG of {len(data) / 1e6:.1f} MB", name, run, want.nbytes, device)._asdict()
        yield {**row, "largest": int(difference.max()), "mean": float(difference.double().mean())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    torch.set_num_threads(1)
    if failed := list(found_wrong(sys.modules[__name__], device)):
        print(*failed, sep="\n")
        return 1
    rows = whole_table(device) if device == "cpu" else list(gpu_table(math.inf))
    for row in rows:
        print(line(row))
    if not within_limit(rows):
        print(f"median above the limit of {LIMIT_MS[device]:.0f} ms")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
