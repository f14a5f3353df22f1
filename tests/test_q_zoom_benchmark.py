"""Q-Zoom's benchmark: operations and tokens on paper against what runs, its check, and the page's figures."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import end_to_end, q_zoom
from benchmarks.shared_prefix import model
from hide.models.inputs import ImageInput, ImageInputs

PAGE = Path(__file__).parents[1] / "docs" / "q_zoom.md"
TINY = end_to_end.SMALL._replace(
    text={**end_to_end.SMALL.text, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
    vision={"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "fullatt_block_indexes": [1]},
    answer_tokens=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def adapter():
    return model(TINY, "cpu", torch.float32)


def sizes_of(adapter):
    text = adapter.model.config.text_config
    return q_zoom.Sizes(
        text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.num_key_value_heads,
        text.hidden_size // text.num_attention_heads, text.intermediate_size, text.vocab_size,
        adapter.model.config.vision_config,
    )  # fmt: skip


def test_operations_of_the_decoder_are_those_that_run(adapter):
    own, rows = sizes_of(adapter), 37
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        adapter.model(input_ids=torch.full((1, rows), 100), logits_to_keep=1)
    by_operator = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in by_operator.items() if "attention" not in name)
    attention = 4 * own.layers * own.heads * own.depth * rows * (rows + 1) / 2
    assert q_zoom.operations([q_zoom.Part(rows, 0, own.layers)], own) - attention == products
    behind = q_zoom.operations([q_zoom.Part(20, 17, own.layers)], own) - q_zoom.operations([], own)
    whole, before = (q_zoom.operations([q_zoom.Part(n, 0, own.layers)], own) for n in (rows, 17))
    assert behind == whole - before, "a piece behind a prefix is what it adds"
    kinds = (q_zoom.operations([q_zoom.Part(rows, 0, 1, kind)], own) - q_zoom.operations([], own) for kind in "qk")
    assert [kind / rows for kind in kinds] == [
        2 * projection.weight.numel()
        for projection in (
            adapter.language_model.layers[0].self_attn.q_proj,
            adapter.language_model.layers[0].self_attn.k_proj,
        )
    ]


def test_operations_of_the_vision_encoder_are_those_that_run(adapter):
    own, grid = sizes_of(adapter), (8, 12)
    patch = own.vision.in_channels * own.vision.temporal_patch_size * own.vision.patch_size**2
    image = ImageInput(torch.zeros(4 * 96, patch), (1, 16, 24), grid, 96)
    with FlopCounterMode(display=False) as counter:
        adapter.encode(ImageInputs((image,)))
    by_operator = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in by_operator.items() if "attention" not in name)
    # One layer of windows of 64 patches, one over all 384.
    attention = 4 * own.vision.hidden_size * 384 * (64 + 384)
    assert q_zoom.vision_operations(96, own) - attention == products


def test_its_check_notices_other_replies_and_other_work(monkeypatch):
    monkeypatch.setattr(q_zoom, "MID", TINY)
    assert list(q_zoom.failures("cpu")) == []
    real = q_zoom.Bench.anew
    monkeypatch.setattr(q_zoom.Bench, "anew", lambda *given: [*real(*given)[1:], "?"])
    monkeypatch.setattr(q_zoom, "token_layers", lambda found: 0)
    found = [str(failure) for failure in q_zoom.failures("cpu")]
    assert (
        found[0].startswith("replies, zoom path")
        and [one.partition(",")[0] for one in found[1:]] == ["tokens through layers"] * 2
    )


def test_seconds_are_judged_by_the_work(monkeypatch):
    def rows(direct, zoom, five):
        seconds = dict(zip(q_zoom.TIMED, (1.0, direct, zoom, 2.5, five, 12.5), strict=True))
        return [
            {"what": name, "model": "m", "tokens": 1024, "seconds": own, "over_plain": own, "over_anew": own / 2.5}
            for name, own in seconds.items()
        ]

    assert q_zoom.within_limit(rows(1.1, 2.2, 5.0)) and "of plain" in q_zoom.line(rows(1.1, 2.0, 5.0)[0])
    assert not q_zoom.within_limit(rows(1.6, 2.2, 5.0)) and not q_zoom.within_limit(rows(1.1, 3.0, 5.0))
    (first, *_) = q_zoom.measured("cpu", 1, (16,), TINY)
    assert first["what"] == "plain answer" and first["over_plain"] == 1


def test_the_page_has_the_predicted_figures():
    assert q_zoom.table(q_zoom.predicted()) in PAGE.read_text(encoding="utf-8")
