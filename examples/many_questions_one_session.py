"""Many questions about one image: it is encoded and prefilled once, each question is a short branch behind it.

python examples/many_questions_one_session.py
"""

from pathlib import Path

from hide import HiDe
from hide.tiny import CHECKPOINT

SCENE = Path(__file__).parents[1] / "hide" / "examples" / "scene.jpg"
QUESTIONS = (
    "What is the color of the heart?",
    "What is the color of the circle?",
    "Is the heart on the left or right side of the circle?",
)


def main() -> None:
    """Tokens are those that went through the language model."""
    hide = HiDe.from_pretrained(CHECKPOINT)
    with hide.open(SCENE) as session:
        print(f"prefix: {session.length} tokens, {session.nbytes / 1e6:.1f} MB held")
        for question in QUESTIONS:
            answer = hide.ask(session, question)
            print(f"{question} {answer.text} ({sum(answer.tokens.values())} tokens)")


if __name__ == "__main__":
    main()
