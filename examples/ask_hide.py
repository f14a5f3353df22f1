"""HiDe on the embedded model: the plain answer is wrong, the collage makes it right.

python examples/ask_hide.py [FOLDER for the pictures]
"""

import sys
from pathlib import Path

from hide import HiDe, Plain
from hide.methods.base import ask_all
from hide.present.pages import save_report
from hide.tiny import CHECKPOINT

SCENE = Path(__file__).parents[1] / "hide" / "examples" / "scene.jpg"


def main(folder: str | None = None) -> None:
    """Two methods on one session: the image goes through the model once."""
    hide = HiDe.from_pretrained(CHECKPOINT)
    question = "Is the circle on the left or right side of the triangle?"
    plain, answer = ask_all([Plain(hide.model), hide], SCENE, question)
    print(f"plain: {plain.text}; hide: {answer.text}")
    print("looked for:", answer.details["entities"])
    print("boxes:", answer.boxes[0].tolist())
    print("tokens:", answer.tokens)
    if folder is not None:
        print("report:", save_report(answer, folder, plain=plain, settings=hide.preset.to_dict()))


if __name__ == "__main__":
    main(*sys.argv[1:2])
