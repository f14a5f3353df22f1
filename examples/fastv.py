"""FastV (arXiv 2403.06764): behind a layer, the image tokens that the prompt's last token looks at least are dropped.

python examples/fastv.py
"""

from hide.engine.stock import generate_ids
from hide.models import load
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene
from hide_kernels.integrations.dropping import drop_tokens
from hide_kernels.integrations.transformers import capture_attention


def main() -> None:
    """What is said of a picture with all of its tokens, with half, and with few of them behind layer 1."""
    model, layer = load(CHECKPOINT), 1
    inputs = model.preprocess([draw_scene(5, 700, 560, objects=4).image], min_tokens=4, max_tokens=16384)
    turn = model.turn("What is the color of the heart?", inputs)
    (image,), tokens = turn.images, turn.input_ids.shape[1]
    of_image = range(image.start, image.stop)
    for count in (len(of_image), len(of_image) // 2, len(of_image) // 20):
        kept = []

        def choose(layer, captured, count=count, kept=kept):
            best = captured[layer].weights[0, 0].topk(count).indices + image.start
            kept += sorted({*range(tokens)} - {*of_image} | {*best.tolist()})

        with (
            capture_attention(
                model.model, layers=[layer], queries=[tokens - 1], key_spans=[image.span], on_layer=choose
            ),
            drop_tokens(model.model, behind=layer, keep=lambda kept=kept: kept),
        ):
            reply = generate_ids(model, turn.input_ids, inputs, max_new_tokens=8)
        print(f"{len(kept)} of {tokens} tokens behind layer {layer}: {model.decode(reply)}, ids {reply}")


if __name__ == "__main__":
    main()
