"""Where the peak memory of PyTorch code is and which lines hold it: measured, and predicted without running it.

python examples/memory_of_a_block.py
"""

import torch
from torch import nn

from hide_kernels.memory import predict, profile, stage


def block(model: nn.Module, size: int) -> None:
    """Two stages of very different size."""
    with torch.no_grad(), stage("attention"):
        query = torch.randn(8, size, 64)
        weights = torch.softmax(query @ query.mT, dim=-1)
        values = (weights @ query).mean(0)
        del weights
    with torch.no_grad(), stage("head"):
        model(values)


def main() -> None:
    """The matrix of 8 heads and 1,024 tokens is 33.6 MB; softmax holds two of them."""
    model = nn.Linear(64, 1000)
    with profile(model, owners=True) as measured:
        block(model, 1024)
    with predict(model, owners=True) as predicted:
        block(model, 16384)  # 256 times the matrix; no memory is taken
    print(measured.report.table())
    print(f"at 16,384 tokens, predicted: {predicted.report.peak / 1e9:.1f} GB in {predicted.report.peak_stage}")


if __name__ == "__main__":
    main()
