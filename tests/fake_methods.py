"""Methods without a model: they answer at once, with steps and tokens that a test can count."""

import time
from types import SimpleNamespace

from PIL import Image

from hide.engine.usage import count
from hide.methods.base import Answer, Method, NoSettings, Preset
from hide.session import Session


class FakeSession(Session):
    images = (Image.new("RGB", (4, 4)),)
    image_tokens = (50,)

    def chat(self, messages, *, max_new_tokens):
        raise AssertionError("a fake method asks nothing")


class Fake(Method):
    """Always the same reply, `tokens` tokens and `seconds` seconds for it; the session costs 5 tokens."""

    summary = "a stand-in"

    def __init__(self, name="plain", reply="A", *, tokens=10, seconds=0.0, ask=None):
        super().__init__(
            SimpleNamespace(model=SimpleNamespace(device="cpu"), notes=(), family=""), Preset(NoSettings())
        )
        self.name, self.reply_text, self.tokens, self.seconds, self.said = name, reply, tokens, seconds, ask
        self.asked = []

    def open(self, images, *, taps=None, steps=None):
        with steps("prefix"):
            count(5)
        return FakeSession()

    def answer(self, session, question, steps):
        self.asked.append(question)
        with steps("answer"):
            count(self.tokens)
            time.sleep(self.seconds)
            text = self.reply_text if self.said is None else self.said(question)
        return Answer(text)
