"""attention_rows over two processes that each hold a part of the heads or of the keys."""

import multiprocessing
import os
import socket
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from hide_kernels import attention_rows

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")


def inputs():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 5, 40, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 4, 90, 40, generator=generator, dtype=torch.float64)
    return query, key, torch.tensor([[3, 20, 39, 41, 89], [0, 1, 2, 80, 88]])


def sharded_heads(rank, group):
    query, key, positions = inputs()
    heads, kv_heads = slice(4 * rank, 4 * rank + 4), slice(2 * rank, 2 * rank + 2)
    own = query[:, heads], key[:, kv_heads]
    shared = {"q_positions": positions, "causal": True, "return_lse": True, "key_spans": [(3, 70)]}
    weights = torch.linspace(-1, 2, 8, dtype=torch.float64)
    for reduction, local in (("mean", "mean"), (weights, weights[heads])):
        for row_reduction in (None, "sum"):
            arguments = {**shared, "row_reduction": row_reduction}
            want = attention_rows(query, key, head_reduction=reduction, **arguments)
            got = attention_rows(*own, head_reduction=local, process_group=group, **arguments)
            assert_close(got.rows, want.rows, rtol=1e-12, atol=1e-15)
            assert_close(got.lse, want.lse[:, heads], rtol=1e-12, atol=0)
            wide = torch.full((*want.rows.shape, 2), 2.0, dtype=torch.float64)
            for out in (torch.full_like(want.rows, 2.0), wide[..., 0]):
                for accumulate in (True, False):
                    out.fill_(2.0)
                    attention_rows(
                        *own, head_reduction=local, process_group=group, out=out, accumulate=accumulate, **arguments
                    )
                    assert_close(out, want.rows + 2 * accumulate, rtol=1e-12, atol=1e-15)
            assert (wide[..., 1] == 2).all()
    for reduction, part in (("none", heads), ("kv_group", kv_heads)):
        want = attention_rows(query, key, head_reduction=reduction).rows[:, part]
        got = attention_rows(*own, head_reduction=reduction, process_group=group).rows
        assert_close(got, want, rtol=1e-12, atol=1e-15)


def sharded_keys(rank, group):
    query, key, positions = inputs()
    first, last = ((0, 37), (37, 90))[rank]
    # The second sample's last keys are padding, all of rank 1's among them for its first rows.
    lens = torch.tensor([90, 60])
    arguments = {"causal": True, "return_lse": True, "head_reduction": "kv_group"}
    local = {"q_positions": positions - first, "kv_lens": lens - first, "process_group": group, "shard": "keys"}
    want = attention_rows(query, key, q_positions=positions, kv_lens=lens, **arguments)
    got = attention_rows(query, key[:, :, first:last], **local, **arguments)
    assert_close(got.lse, want.lse, rtol=1e-12, atol=0)
    assert_close(got.rows, want.rows[..., first:last], rtol=1e-12, atol=1e-15)
    # A row that no rank has a key for.
    nothing = {"kv_lens": torch.zeros(2).int(), "process_group": group, "shard": "keys", "return_lse": True}
    blind = attention_rows(query, key[:, :, first:last], **nothing)
    assert (blind.rows == 0).all() and (blind.lse == -torch.inf).all()
    # Packed: the ranks' parts of each sample.
    packed = attention_rows(
        query.transpose(1, 2).flatten(0, 1), key[:, :, first:last].transpose(1, 2).flatten(0, 1),
        cu_seqlens_q=torch.tensor([0, 5, 10]), cu_seqlens_k=torch.tensor([0, 1, 2]) * (last - first), max_seqlen_q=5,
        max_seqlen_k=last - first, **{**local, "q_positions": local["q_positions"].flatten()}, **arguments,
    )  # fmt: skip
    assert_close(packed.rows.unflatten(0, (2, 5)).transpose(1, 2), got.rows, rtol=1e-12, atol=1e-15)
    # A given lse is the whole one; raw scores need none.
    given = attention_rows(query, key[:, :, first:last], lse=want.lse, **local, **{**arguments, "return_lse": False})
    assert_close(given.rows, got.rows, rtol=1e-12, atol=1e-15)
    raw = attention_rows(query, key[:, :, first:last], softmax=False, process_group=group, shard="keys").rows
    assert torch.equal(raw, attention_rows(query, key[:, :, first:last], softmax=False).rows)


def tensor_parallel_model(rank, group, folder):
    """A Hugging Face model whose heads are spread over the ranks, beside the whole one."""
    from transformers import AutoModelForCausalLM

    from hide_kernels.integrations.transformers import capture_attention

    tokens, found = torch.arange(30)[None], []
    for plan in ({"tp_plan": "auto"}, {}):
        model = AutoModelForCausalLM.from_pretrained(folder, **plan)
        ranks = group if plan else None
        with torch.no_grad(), capture_attention(model, layers=[1], queries=[3, 29], process_group=ranks) as captured:
            model(tokens)
        found.append(captured[1].weights)
    assert model.config.num_attention_heads == 8
    assert_close(*found, rtol=1e-5, atol=1e-7)


def work(rank, port, check):
    torch.set_num_threads(1)
    # What a launcher of several processes sets, and transformers reads.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        check(rank, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def run_on_two_ranks(check):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ranks begin as copies of a process that has imported what they need, once for all of them.
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["hide_kernels.integrations.transformers", "transformers.models.llama.modeling_llama", "torch.distributed"]
    )
    mp.start_processes(work, (port, check), nprocs=2, start_method="forkserver")


@pytest.mark.parametrize("check", [sharded_heads, sharded_keys], ids=lambda check: check.__name__)
def test_two_ranks_give_what_one_gives_with_all_of_it(check):
    run_on_two_ranks(check)


def test_rows_of_a_hugging_face_model_under_tensor_parallelism_are_those_of_the_whole_model(tmp_path):
    pytest.importorskip("accelerate", reason="transformers spreads a model over ranks with accelerate")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).save_pretrained(tmp_path)
    run_on_two_ranks(partial(tensor_parallel_model, folder=tmp_path))
