"""The question as it is: the model's own answer to the images, what every other method is compared with."""

from __future__ import annotations

from typing import ClassVar

from hide.methods.base import Answer, Method, NoSettings, Steps
from hide.questions import Question
from hide.session import Session


class Plain(Method[NoSettings]):
    """The images and the question."""

    name: ClassVar[str] = "plain"
    summary: ClassVar[str] = "the image alone"

    def answer(self, session: Session, question: Question, steps: Steps) -> Answer:
        """See `Method`."""
        with steps("answer"):
            reply = self.reply(session, question)
        return Answer(
            reply.text, details={"signals": {} if reply.margin is None else {"margin": round(reply.margin, 4)}}
        )
