"""The bare operator beside SDPA: rows over two spans of keys, and the log-sum-exp over all of them.

python examples/attention_rows_operator.py
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from hide_kernels import attention_rows, explain


def main() -> None:
    """28 heads in 4 groups; eight of 2,048 queries, over two images of 600 and 300 tokens."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 2048, 64) for heads in (28, 4, 4))
    output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)  # as any model does

    chosen = torch.arange(2000, 2008)
    rows, lse = attention_rows(
        query[:, :, chosen],
        key,
        key_spans=[(10, 610), (620, 920)],
        q_positions=chosen,
        causal=True,
        head_reduction="none",
        return_lse=True,
    )
    print(f"output {tuple(output.shape)}, rows {tuple(rows.shape)}, lse {tuple(lse.shape)}")

    whole = attention_rows(query[:, :, chosen], key, q_positions=chosen, causal=True, head_reduction="none").rows
    again = whole @ value.repeat_interleave(7, dim=1)  # a row of weights times the values is what SDPA gives
    print(f"rows @ values - SDPA: at most {float((again - output[:, :, chosen]).abs().max()):.0e}")
    print(f"attention on both images: {float(rows.sum(-1).mean()):.1%} of it")
    print(explain("attention_rows"))


if __name__ == "__main__":
    main()
