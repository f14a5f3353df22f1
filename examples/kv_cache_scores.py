"""Which keys of a long prompt are worth keeping: SnapKV-like scores, summed over layers in one buffer.

python examples/kv_cache_scores.py
"""

import torch

from hide_kernels import attention_rows
from hide_kernels.recipes import window_scores


def main() -> None:
    """The last 32 of 4,096 tokens score all keys before them, in three layers."""
    torch.manual_seed(0)
    window, tokens, layers = 32, 4096, 3
    needle, direction = range(1000, 1004), torch.randn(1, 4, 1, 64)  # four keys that the window's queries agree with
    scores = torch.zeros(1, 4, tokens - window)
    for _ in range(layers):
        key = torch.randn(1, 4, tokens, 64)
        key[:, :, needle] += direction
        query = torch.randn(1, 28, window, 64) + direction.repeat_interleave(7, dim=1)
        attention_rows(
            query,
            key,
            key_spans=[(0, tokens - window)],
            q_positions=torch.arange(tokens - window, tokens),
            causal=True,
            head_reduction="kv_group",  # each key/value head keeps its own keys
            row_reduction="sum",
            out=scores,
            accumulate=True,  # no memory per layer
        )
    kept = scores.topk(4, dim=-1).indices[0].sort().values
    print("kept by key/value head:", kept.tolist())
    print("the recipe, of the last layer alone:", tuple(window_scores(query, key, kernel_size=7).shape))


if __name__ == "__main__":
    main()
