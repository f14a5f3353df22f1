"""Evaluation on Ray with two actors on this machine, one of which is killed in the middle."""

import functools
import os
import signal
import sys
import time

import fake_methods
import pytest
from PIL import Image

from hide.evaluation import on_ray, runner
from hide.evaluation.data import Sample
from hide.evaluation.on_ray import ask_on_ray
from hide.evaluation.store import ResultFile, blank_record
from hide.questions import Question

ray = pytest.importorskip("ray")


def load(folder):
    """A stand-in for methods on a model: it says who it is, and dies where the question tells it to."""

    def ask(question):
        time.sleep(0.05)
        (folder / f"worker-{os.getpid()}").touch()
        if question.stem == "die?" or (question.stem == "die once?" and not (folder / "died").exists()):
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if question.stem == "fail?":
            raise ValueError("no")
        return str(os.getpid())

    return ask


def answer(ask, sample):
    """In the place of the runner's, which imports a model's packages: each actor that is started would take seconds."""
    try:
        return {**blank_record(sample, ""), "replies": {"plain": ask(sample.question)}, "error": None}
    except ValueError as error:
        return blank_record(sample, f"{type(error).__name__}: {error}")


@pytest.fixture
def light_actors(monkeypatch):
    monkeypatch.setattr(on_ray, "answer", answer)
    # Workers import neither this module nor what was put into that one: both are sent with what is in them.
    for module in (sys.modules[__name__], on_ray):
        ray.cloudpickle.register_pickle_by_value(module)
    yield
    for module in (sys.modules[__name__], on_ray):
        ray.cloudpickle.unregister_pickle_by_value(module)


def sample(number, stem="what?"):
    return Sample(f"q{number}", functools.partial(Image.new, "RGB", (4, 4)), Question(stem), "a", "s")


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
def test_a_killed_actor_is_replaced_and_every_question_is_answered_once(light_actors, tmp_path, monkeypatch):
    monkeypatch.setattr("hide.evaluation.on_ray.RETRIES", 1)
    samples = [sample(i, {7: "die once?", 9: "fail?", 11: "die?"}.get(i, "what?")) for i in range(24)]
    with ResultFile(tmp_path / "r.jsonl", {}) as results:
        ask = functools.partial(ask_on_ray, functools.partial(load, tmp_path), actors=2)
        seen = []
        runner.evaluate(ask, samples, results, progress=seen.append)
        assert sorted(record["id"] for record in seen) == sorted(one.id for one in samples)
        records = results.records
    assert records["q7"]["error"] is None and records["q9"]["error"] == "ValueError: no"
    assert "Actor" in records["q11"]["error"], "a question that kills every actor fails, and the others go on"
    assert sum(record["error"] is None for record in records.values()) == 22
    # Two at first, one in the place of each that died: once, and twice for the question that always kills.
    assert len(list(tmp_path.glob("worker-*"))) >= 4
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 25


def test_an_actor_answers_as_the_runner_does_and_says_who_it_is():
    ways = {"plain": fake_methods.Fake("plain", "no"), "hide@auto": fake_methods.Fake("hide", "yes", tokens=3)}
    record = on_ray._Answerer(lambda: ways).answer(sample(1))
    assert record.pop("worker") == os.getpid()
    want = runner.answer(ways, sample(1))
    assert record.pop("seconds").keys() == want.pop("seconds").keys() == ways.keys()
    assert record.pop("opened").keys() == want.pop("opened").keys() == ways.keys()
    assert record == want and record["replies"] == {"plain": "no", "hide@auto": "yes"}


def test_what_ray_cannot_give_is_said(tmp_path):
    with pytest.raises(ValueError, match="ray: no cluster at 'auto'"):
        list(ask_on_ray(functools.partial(load, tmp_path), [], address="auto"))
