"""The question as it is: the model's own answer to the images, what every other method is compared with."""

from __future__ import annotations

from typing import ClassVar

from hide.methods.base import Answer, Method, NoSettings, Steps
from hide.methods.hide.signals import Signals
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
        signals = Signals(margin=reply.margin).to_dict()
        return Answer(reply.text, details={"signals": signals} if signals else {})
