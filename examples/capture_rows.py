"""Attention rows of any Hugging Face decoder, without the attention matrix and without a change to the model.

python examples/capture_rows.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hide_kernels.integrations.transformers import capture_attention


def main() -> None:
    """A random Llama with grouped heads reads 512 tokens; what do the last four look at?"""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 1000, (1, 512))
    with torch.no_grad(), capture_attention(model, layers=[2], queries=range(508, 512)) as attention:
        model(ids)
    weights = attention[2].weights  # (batch, queries, keys), float32, mean over heads
    print(f"rows: {tuple(weights.shape)}, {weights.nbytes:,} bytes; each sums to {float(weights.sum(-1).mean()):.4f}")

    model.set_attn_implementation("eager")  # the usual way: the whole matrix of every layer
    with torch.no_grad():
        matrices = model(ids, output_attentions=True).attentions
    error = float((matrices[2].mean(1)[:, 508:] - weights).abs().max())
    print(f"output_attentions: {sum(one.nbytes for one in matrices):,} bytes; largest difference {error:.0e}")


if __name__ == "__main__":
    main()
