"""A conversation whose second turn shows another image: it goes on behind the first reply, which is not sent again.

python examples/chat_with_a_second_image.py
"""

from hide import open_session
from hide.models import load
from hide.session import Message, RunSettings
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene


def main() -> None:
    """The moon is in the second image alone."""
    wide, close = draw_scene(5, 700, 560, objects=4), draw_scene(6, 168, 168, objects=1)
    (moon,) = close.objects
    assert moon.kind == "moon" and "moon" not in {thing.kind for thing in wide.objects}
    with open_session(load(CHECKPOINT), wide.image, RunSettings(min_tokens=36)) as session:
        asked = Message("What is the color of the heart?")
        first = session.chat([asked], max_new_tokens=8)
        print(f"heart: {first.text}, {first.tokens} tokens behind an image of {session.image_tokens[0]}")

        question = "What is the color of the moon?"
        second = session.chat([asked, first, Message(question, [close.image])], max_new_tokens=8)
        print(
            f"moon, drawn {moon.color}: {second.text}, {second.tokens} tokens, {second.image_tokens[0]} of them image"
        )
        print(f"without the second image: {session.ask(question, max_new_tokens=8).text}")


if __name__ == "__main__":
    main()
