"""A method of one's own, asked beside the plain answer: a crop where the question's words look most.

python examples/own_method.py
"""

import torch

from hide import Answer, Evidence, Method, Plain
from hide.methods.base import Steps, ask_all
from hide.models import load
from hide.questions import Question
from hide.session import Session
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene


class Peak(Method):
    """Eight times eight cells, of which the best is shown enlarged."""

    name, summary, needs = "peak", "the image, and one cell of it", frozenset({"attention", "crop", "ask"})

    def answer(self, session: Session, question: Question, steps: Steps) -> Answer:
        with steps("look"):
            (maps,) = session.attention(session.turn(question.stem), layers=[2])
            y, x = divmod(int(torch.nn.functional.adaptive_avg_pool2d(maps.mean(0)[None], 8).argmax()), 8)
            width, height = (length / 8 for length in session.images[0].size)
            box = torch.tensor([[x * width, y * height, (x + 1) * width, (y + 1) * height]]).long()
        with steps("answer"):
            reply = self.reply(session, question, [crop.image for crop in session.crop([box])])
        return Answer(reply.text, (Evidence(box, maps.mean(0)[None], ("question",)),))


if __name__ == "__main__":
    scene = draw_scene(5, 700, 560, objects=4)
    print("drawn:", *((thing.color, thing.kind, thing.box) for thing in scene.objects if thing.kind == "heart"))
    model = load(CHECKPOINT)
    for answer in ask_all([Plain(model), Peak(model)], scene.image, "What is the color of the heart?"):
        print(f"{answer.method}: {answer.text}", [box.tolist() for box in answer.boxes], answer.tokens)
