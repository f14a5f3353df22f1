"""`recipes.window_scores` beside SnapKV's own expression and, where it is installed, kvpress's press for it.

Which tokens a layer of Llama-3.1-8B keeps after a prompt of 16,384, from its last 64 queries:
`python -m benchmarks.window_scores`. Exit code 1 if the kept tokens differ, or if ours is slower or takes more than a
quarter of the new memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import WITHHELD, Failure, cuda_times, found_wrong, interleaved_cpu_times, new_memory
from hide_kernels.recipes import window_scores

HEADS, KV_HEADS, DEPTH, WINDOW, KEYS = 32, 8, 128, 64, 16_384
KERNEL_SIZE = 5
KEPT = KEYS // 2


def inputs(device: str, keys: int = KEYS) -> tuple[Tensor, Tensor]:
    """Query (1, 32, 64, 128) and key as a cache of Hugging Face holds it (1, 8, N, 128), in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, WINDOW, DEPTH, generator=generator).to(device, torch.bfloat16)
    return query, torch.randn(1, KV_HEADS, keys, DEPTH, generator=generator).to(device, torch.bfloat16)


def published_expression(query: Tensor, key: Tensor) -> Tensor:
    """SnapKV's scores (arXiv 2404.14469) as the paper writes them, with keys repeated for their heads."""
    window, length = query.shape[2], key.shape[2]
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ repeated.transpose(2, 3) * query.shape[-1] ** -0.5
    hidden = torch.ones(window, length, dtype=torch.bool, device=key.device).triu(length - window + 1)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1, dtype=torch.float32)
    summed = weights[..., :-window].sum(2)
    pooled = torch.nn.functional.avg_pool1d(summed, KERNEL_SIZE, stride=1, padding=KERNEL_SIZE // 2)
    return pooled.unflatten(1, (key.shape[1], -1)).mean(2)


def kvpress_score(query: Tensor, key: Tensor) -> Tensor | None:
    """`SnapKVPress.score` of these tensors, whose projection and rotation are the identity; `None` without kvpress."""
    try:
        from kvpress import SnapKVPress
    except ImportError:
        return None
    heads, depth = query.shape[1], query.shape[3]
    module = SimpleNamespace(
        config=SimpleNamespace(num_attention_heads=heads, num_key_value_heads=key.shape[1]),
        head_dim=depth,
        q_proj=lambda hidden: hidden,
    )
    # The press takes the last rows of hidden states that are longer than its window; it looks at no others.
    hidden = query.transpose(1, 2).flatten(2)
    hidden = torch.cat([hidden[:, :1], hidden], 1)
    rotation = query.new_ones(1, WINDOW + 1, depth), query.new_zeros(1, WINDOW + 1, depth)
    press = SnapKVPress(window_size=WINDOW, kernel_size=KERNEL_SIZE)
    scores = press.score(module, hidden, key, key, None, {"position_embeddings": rotation})
    return scores[..., :-WINDOW]


def variants(query: Tensor, key: Tensor) -> dict[str, Callable[[], Tensor | None]]:
    """The calls that are compared."""
    calls: dict[str, Callable[[], Tensor | None]] = {
        "window_scores": lambda: window_scores(query, key, kernel_size=KERNEL_SIZE),
        "SnapKV's expression": lambda: published_expression(query, key),
    }
    if kvpress_score(query[..., :2], key[:, :, : 2 * WINDOW, :2]) is not None:
        calls["kvpress, SnapKVPress.score"] = lambda: kvpress_score(query, key)
    return calls


def failures(device: str) -> Iterator[Failure]:
    """The correctness gate: the tokens kept are those of SnapKV's expression in float64, but for near ties."""
    query, key = inputs(device, 3_001)
    want = published_expression(query.double(), key.double())
    got = window_scores(query, key, kernel_size=KERNEL_SIZE).double()
    kept = got.topk(1_500, -1).indices
    least = want.topk(1_500, -1).values[..., -1:]
    short = (least - want.gather(-1, kept)).max().item() / least.min().item()
    if not short < 1e-5:
        error = f"a kept token scores {short:.1e} below the least that should be"
        yield Failure("3,001 keys", "window_scores", error, ("window_scores",))


def whole_table(device: str, runs: int = 7) -> list[dict[str, Any]]:
    """Time and new memory of each variant."""
    calls = variants(*inputs(device))
    times = interleaved_cpu_times(calls, runs)
    return [
        {"variant": name, "new_bytes": new_memory(call, device), "milliseconds": times[name]}
        for name, call in calls.items()
    ]


def gpu_table(seconds: float, device: str = "cuda", withheld: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Time and new memory of each variant; takes a second or two."""
    for name, call in variants(*inputs(device)).items():
        if name in withheld:
            yield {"variant": name, "skipped": WITHHELD}
            continue
        # kvpress reads its largest score on the host, which no graph can hold.
        times = cuda_times(call, capture=not name.startswith("kvpress"))
        milliseconds = {point: microseconds / 1e3 for point, microseconds in times.items()}
        yield {"variant": name, "new_bytes": new_memory(call, device), "milliseconds": milliseconds}


def within_limit(table: list[dict[str, Any]]) -> bool:
    """Ours is no slower than any other and takes at most a quarter of their new memory."""
    ours, *others = table
    return all(
        ours["milliseconds"]["median"] <= other["milliseconds"]["median"]
        and 4 * ours["new_bytes"] <= other["new_bytes"]
        for other in others
    )


def line(row: dict[str, Any]) -> str:
    """One row of the table as text."""
    if "skipped" in row:
        return f"{row['variant']:<30} {row['skipped']}"
    times = row["milliseconds"]
    spread = f"{times['median']:9.3f} ms ({times['p20']:.3f} to {times['p80']:.3f})"
    return f"{row['variant']:<30} {spread}  new {row['new_bytes'] / 1e6:.2f} MB"


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    if failed := list(found_wrong(sys.modules[__name__], device)):
        print(*failed, sep="\n")
        return 1
    table = whole_table(device) if device == "cpu" else list(gpu_table(60))
    print(*map(line, table), sep="\n")
    return 0 if within_limit(table) else 1


if __name__ == "__main__":
    sys.exit(main())
