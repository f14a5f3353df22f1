"""`hide serve` with the embedded model: what clients send and get, the pool, and the command.

The requests are those that openai 3.57.0, lmms-eval 0.7.3 (`--model openai`) and VLMEvalKit (e8e78f0) send, as recorded;
text and picture are put in. None of the three has to be installed.
"""

import json
import re
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soak
from serve_clients import PATH, PATIENCE, chat, file_of, picture, running, uri
from typer.testing import CliRunner

from hide import PRESETS, HiDe, Plain
from hide.cli import app
from hide.cli import serve as command
from hide.methods.base import NoSettings
from hide.methods.vicrop import ViCrop
from hide.models.loading import load
from hide.questions import LETTER_REQUEST
from hide.serve import app as routes
from hide.serve import server as sockets
from hide.serve.limits import Limits
from hide.serve.local import LocalModel
from hide.session import open_session
from hide.tiny import CHECKPOINT
from hide.tiny.scenes import draw_scene, questions

OPENAI = {
    "Accept-Encoding": "gzip, deflate", "Connection": "keep-alive", "authorization": "Bearer sk-key", "accept": "application/json",
    "content-type": "application/json", "user-agent": "OpenAI/Python 3.57.0", "x-stainless-lang": "python",
    "x-stainless-package-version": "3.57.0", "x-stainless-os": "Linux", "x-stainless-arch": "x64", "x-stainless-runtime": "CPython",
    "x-stainless-runtime-version": "3.11.7", "x-stainless-async": "false", "x-stainless-retry-count": "0",
    "x-stainless-read-timeout": "600",
}  # fmt: skip
REQUESTS = {
    "User-Agent": "python-requests/2.34.2", "Accept-Encoding": "gzip, deflate", "Accept": "*/*", "Connection": "keep-alive",
    "Content-Type": "application/json", "Authorization": "Bearer sk-key",
}  # fmt: skip
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def user(*parts):
    return {"role": "user", "content": list(parts)}


PNG, JPEG, TEXT = "PNG", "JPEG", {"type": "text", "text": "TEXT"}
CLIENTS = {
    "openai": (OPENAI, {"model": "hide", "messages": [user(picture(PNG, detail="high"), TEXT)]}),
    "openai, other order": (OPENAI, {"messages": [SYSTEM, user(TEXT, picture(PNG))], "model": "hide", "temperature": 0}),
    "lmms-eval": (
        OPENAI,
        {"messages": [user(picture(PNG), TEXT)], "model": "hide", "max_tokens": 16, "temperature": 0.0, "top_p": 1.0, "seed": 42,
         "frequency_penalty": 0.0, "presence_penalty": 0.0, "n": 1},
    ),
    "lmms-eval, reasoning model": (
        OPENAI,
        {"messages": [user(picture(PNG), TEXT)], "model": "hide", "max_completion_tokens": 16, "response_format": {"type": "text"}},
    ),
    "VLMEvalKit": (
        REQUESTS,
        {"model": "hide", "messages": [SYSTEM, user(picture(JPEG, detail="low"), TEXT)], "max_tokens": 2048, "temperature": 0,
         "stream": False},
    ),
    "VLMEvalKit, --base-url": (
        REQUESTS,
        {"model": "hide", "messages": [user(picture(JPEG), TEXT)], "max_tokens": 16384, "n": 1, "temperature": 0.0},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter():
    return load(CHECKPOINT)


@pytest.fixture(scope="module")
def ways(adapter):
    hide = HiDe(adapter, PRESETS["tiny"])
    return {
        "plain": Plain(adapter, hide.preset.with_settings(NoSettings())),
        "hide": hide,
        "hide@100": hide.changed(view_tokens=100),
        "vicrop": ViCrop(adapter),
    }


class Scene:
    """A drawn one, a question about it and the right answer."""

    def __init__(self, seed):
        scene = draw_scene(seed, 330, 250, objects=3, object_size=(40, 70))
        self.image = scene.image
        self.png, self.jpeg = file_of(scene.image), file_of(scene.image, "JPEG", quality=75)
        self.asked = questions(scene, np.random.default_rng(seed))[0]


@pytest.fixture(scope="module")
def scenes():
    return [Scene(seed) for seed in range(40, 44)]


@pytest.fixture
def server(ways):
    with running(LocalModel(ways, 10**9)) as server:
        yield server


def filled(body, scene, text):
    """A recorded request about a scene."""
    sent = (
        json.dumps(body)
        .replace('"PNG"', json.dumps(uri(scene.png)))
        .replace('"JPEG"', json.dumps(uri(scene.jpeg, "jpeg")))
    )
    return json.loads(sent.replace('"TEXT"', json.dumps(text)))


@pytest.mark.parametrize("client", CLIENTS)
def test_the_requests_of_clients_are_answered_as_the_method_answers(server, scenes, ways, client):
    headers, body = CLIENTS[client]
    scene = scenes[0]
    status, said = server.post(filled(body, scene, scene.asked.text), **headers)
    assert status == 200, said
    (choice,) = said["choices"]
    assert said["object"] == "chat.completion" and said["model"] == "hide" and said["id"].startswith("chatcmpl-")
    assert (choice["index"], choice["message"]["role"], choice["finish_reason"]) == (0, "assistant", "stop")
    sent = scene.jpeg if client.startswith("VLM") else scene.png
    expected = ways["hide"].ask(sent, scene.asked.text).to_dict()
    assert choice["message"]["content"] == expected["answer"] == scene.asked.answer
    system = [note for note in said["hide"]["notes"] if "system turn was not shown" in note]
    assert bool(system) == any(turn["role"] == "system" for turn in body["messages"])
    for name in ("boxes", "entities", "image_tokens", "question"):
        assert said["hide"][name] == expected[name], name
    assert set(said["hide"]["seconds"]) == set(expected["seconds"])
    assert said["usage"]["total_tokens"] == sum(expected["tokens"].values())


PROMPTS = {
    "lmms-eval, V*Bench": "{}\nA. {}\nB. {}\nAnswer with the option's letter from the given choices directly.",
    "lmms-eval, HR-Bench": "{}\nA. {}\nB. {}\nAnswer the option letter directly.",
    "lmms-eval, MME-RealWorld": "{} The choices are listed below:\n(A) {}\n(B) {}\nSelect the best answer to the above multiple-choice"
    " question based on the image. Respond with only the letter (A, B, C, D, or E) of the correct option.\nThe best answer is:",
    "VLMEvalKit": "Question: {}\nOptions:\nA. {}\nB. {}\nPlease select the correct answer from the options above. \n",
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_benchmarks_get_the_bare_letter_whatever_the_model_says(server, scenes, ways, prompt, monkeypatch):
    scene = scenes[1]
    text = PROMPTS[prompt].format(scene.asked.text, "right or blue", scene.asked.answer)
    for words, content in (("(B) is the answer", "B"), ("I cannot say", "I cannot say")):
        heard = []
        monkeypatch.setattr(
            type(ways["plain"].model), "decode", lambda self, ids, words=words, heard=heard: heard.append(ids) or words
        )
        status, said = server.post(chat(picture(uri(scene.png)), text, model="plain"))
        assert status == 200 and heard
        assert said["choices"][0]["message"]["content"] == content and said["hide"]["answer"] == words
        asked = said["hide"]["question"]
        assert (
            asked == f"{scene.asked.text}\n(A) right or blue\n(B) {scene.asked.answer}" and LETTER_REQUEST not in asked
        )


def test_a_stream_says_the_same(server, scenes):
    body = chat(picture(uri(scenes[0].png)), scenes[0].asked.text)
    whole = server.post(body)[1]
    status, headers, text = server.request(
        "POST", PATH, json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    )
    assert status == 200 and headers.get_content_type() == "text/event-stream"
    *events, last = text.strip().split("\n\n")
    assert last == "data: [DONE]"
    first, ended, usage = (json.loads(event.removeprefix("data: ")) for event in events)
    assert {one["object"] for one in (first, ended, usage)} == {"chat.completion.chunk"}
    assert (
        first["choices"][0]["delta"] == whole["choices"][0]["message"] and first["choices"][0]["finish_reason"] is None
    )
    assert ended["choices"][0]["finish_reason"] == "stop" and ended["hide"]["boxes"] == whole["hide"]["boxes"]
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


def test_every_way_is_a_model_and_answers_as_it_would_alone(server, scenes, ways):
    listed = server.request("GET", "/v1/models")[2]
    assert [one["id"] for one in listed["data"]] == list(ways) and listed["object"] == "list"
    scene = scenes[2]
    for way, method in ways.items():
        said = server.post(chat(picture(uri(scene.png)), scene.asked.text, model=way))[1]
        alone = method.ask(scene.png, scene.asked.text).to_dict()
        for name in ("method", "answer", "boxes", "image_tokens"):
            assert said["hide"][name] == alone[name], (way, name)
        assert said["model"] == way


def test_several_pictures_are_asked_about_in_their_order(server, scenes, ways):
    two = [picture(uri(scene.png)) for scene in scenes[:2]]
    text = scenes[1].asked.text
    said = server.post(chat(two[0], text, two[1], "Look well."))[1]
    alone = ways["hide"].ask([scenes[0].png, scenes[1].png], f"{text}\nLook well.").to_dict()
    assert len(said["hide"]["image_tokens"]) == 2
    assert [said["hide"][name] for name in ("answer", "boxes", "images")] == [
        alone[name] for name in ("answer", "boxes", "images")
    ]
    assert any("all pictures first" in note for note in said["hide"]["notes"])


def test_questions_about_one_picture_share_its_prefill_and_those_about_another_do_not(server, scenes):
    first, second = scenes[:2]
    about = [(first.png, "hide"), (second.png, "hide"), (first.png, "plain"), (first.jpeg, "hide"), (first.png, "hide@100"),
             (first.png, "hide")]  # fmt: skip
    cached = []
    for data, way in about:
        said = server.post(chat(picture(uri(data)), "What is the color of the star?", model=way))[1]
        cached.append(said["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert ("prefix" in said["hide"]["seconds"]) == (cached[-1] == 0)
    assert [bool(tokens) for tokens in cached] == [False, False, True, False, False, True]
    state = server.state()
    assert (state["prefills_total"], state["pool_hits_total"], state["pool_sessions"]) == (4, 2, 4)


def test_two_clients_share_no_picture_though_their_answers_are_the_same(ways, scenes):
    with running(LocalModel(ways, 10**9), keys=["one", "two"]) as server:
        body = chat(picture(uri(scenes[0].png)), scenes[0].asked.text, model="plain")
        said = [server.post(body, Authorization=f"Bearer {key}")[1] for key in ("one", "two", "one")]
        assert server.state()["prefills_total"] == 2
    assert [bool(one["usage"]["prompt_tokens_details"]["cached_tokens"]) for one in said] == [False, False, True]
    assert len({one["choices"][0]["message"]["content"] for one in said}) == 1


def test_good_and_bad_requests_at_once_have_the_answers_that_they_have_alone(ways):
    with running(LocalModel(ways, 10**6), Limits(body_bytes=4 << 20), [soak.KEY]) as server:
        work = soak.Soak(server, pictures=2)
        work.round(30)
        assert (work.wrong, work.sent) == ([], 30)


def test_the_pool_keeps_to_its_budget(ways, scenes):
    with running(LocalModel(ways, 0)) as server:
        for scene in scenes:
            assert server.post(chat(picture(uri(scene.png)), "What is it?", model="plain"))[0] == 200
        assert server.state()["pool_sessions"] == 1


def test_a_reply_is_as_long_as_a_request_allows_and_no_longer_than_the_preset(server, scenes, ways):
    text = "Read out: red blue red blue red blue"
    lengths = {}
    for most in (1, 3, 10**6):
        said = server.post(chat(picture(uri(scenes[0].png)), text, model="plain", max_tokens=most))[1]
        lengths[most] = said["usage"]["completion_tokens"], said["choices"][0]["finish_reason"]
        assert said["hide"]["answer"] == ways["plain"].ask(scenes[0].png, text, max_new_tokens=min(most, 64)).text
    assert lengths[1] == (1, "length") and lengths[10**6][0] <= 64


def test_unknown_fields_are_noted_and_known_ones_without_effect_are_not(server, scenes):
    body = chat(
        picture(uri(scenes[0].png)), "What is it?", model="plain", seed=3, user="me", top_p=0.5, reasoning_effort="high"
    )
    (note,) = server.post(body)[1]["hide"]["notes"]
    assert "'reasoning_effort' is not known" in note


def test_what_cannot_be_read_is_refused_with_its_reason_and_the_session_goes_on(server, scenes):
    good = chat(picture(uri(scenes[0].png)), scenes[0].asked.text)
    assert server.post(good)[0] == 200
    broken = scenes[0].png[: len(scenes[0].png) // 2]
    status, said = server.error(chat(picture(uri(broken)), "What is it?"))
    assert status == 400 and "cannot be read as a picture" in said
    assert server.post(good)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_more_than_the_model_has_positions_for_is_refused_pictures_before_they_are_encoded(
    server, scenes, adapter, monkeypatch
):
    def ask(count, text):
        return chat(*(picture(uri(scene.png)) for scene in scenes[:count]), text, model="plain")

    tokens = server.post(ask(1, "What is it?"))[1]["hide"]["image_tokens"][0]
    monkeypatch.setattr(adapter.model.config.get_text_config(), "max_position_embeddings", tokens + 100)
    status, said = server.error(ask(1, "word " * 200))
    assert status == 400 and f"the model takes {tokens + 100}" in said
    monkeypatch.setattr(adapter, "encode", lambda inputs: pytest.fail("they were encoded"))
    status, said = server.error(ask(2, "What is it?"))
    assert status == 400 and "use fewer or smaller ones" in said
    assert server.post(ask(1, "What is it?"))[1]["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_server_says_how_it_is_while_a_picture_is_encoded(server, scenes, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()

    def slow(*arguments, **options):
        entered.set()
        assert go_on.wait(PATIENCE)
        return open_session(*arguments, **options)

    monkeypatch.setattr("hide.methods.base.open_session", slow)
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(server.post, chat(picture(uri(scenes[0].png)), "What is it?", model="plain"))
        assert entered.wait(PATIENCE)
        threading.Timer(5, go_on.set).start()  # the test ends if it fails
        assert server.request("GET", "/health")[2]["running"] == 1
        assert "hide_running 1\n" in server.request("GET", "/metrics")[2]
        assert not go_on.is_set(), "it waited for the model"
        go_on.set()
        assert asked.result()[0] == 200


def test_where_memory_is_short_the_pool_is_emptied_first_and_what_never_fits_is_413(server, scenes, monkeypatch):
    tried = []

    def short(model, images, *arguments, **options):
        tried.append(images)
        if len(images) > 1 or len(tried) == 2:
            raise MemoryError("the images do not fit into memory")
        return open_session(model, images, *arguments, **options)

    monkeypatch.setattr("hide.methods.base.open_session", short)
    one, two, both = (
        chat(*(picture(uri(scene.png)) for scene in some), "What is it?", model="plain")
        for some in (scenes[:1], scenes[1:2], scenes[:2])
    )
    assert server.post(one)[0] == 200
    assert server.post(two)[0] == 200 and len(tried) == 3 and server.state()["pool_sessions"] == 1
    status, said = server.error(both)
    assert status == 413 and "do not fit" in said
    assert server.post(one)[0] == 200


SAMPLE = re.compile(r'hide_\w+(\{\w+="[^"\n]*"(,\w+="[^"\n]*")*\})? -?[\d.e+]+')


def test_metrics_are_in_prometheus_format_and_count(server, scenes):
    body = chat(picture(uri(scenes[0].png)), scenes[0].asked.text, model="plain")
    assert [server.post(body)[0], server.post(body)[0], server.post({})[0]] == [200, 200, 400]
    status, headers, text = server.request("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert samples and all(map(SAMPLE.fullmatch, samples))
    for wanted in (
        f'hide_requests_total{{path="{PATH}",status="200"}} 2', f'hide_requests_total{{path="{PATH}",status="400"}} 1',
        'hide_answers_total{way="plain"} 2', 'hide_answer_seconds_bucket{le="+Inf"} 2', "hide_answer_seconds_count 2",
        "hide_prefills_total 1", "hide_pool_hits_total 1", "hide_waiting 0", "hide_held_bytes 0",
    ):  # fmt: skip
        assert wanted in samples


# -- the command --------------------------------------------------------------------------------------------------------


def run(*arguments, monkeypatch):
    """Output, and what would have been served: ways, limits, keys, and the address."""
    made, served = [], []

    class Server:
        def __init__(self, *arguments):
            pass

        def run(self, listening):
            (engine, limits, keys), (one,) = made[0], listening
            engine.close()
            served.append((engine.ways, limits, keys, one.getsockname()))
            one.close()

    monkeypatch.setattr(sockets, "make_server", Server)
    monkeypatch.setattr(routes, "make_app", lambda *arguments: made.append(arguments))
    result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    return result, served


def test_the_command_says_where_and_as_what_it_answers(monkeypatch):
    ways = "plain,hide@auto[gate=3],true-boxes"
    result, ((served, limits, keys, (host, port)),) = run(
        str(CHECKPOINT), "--methods", ways, "--max-images", "2", monkeypatch=monkeypatch
    )
    assert result.exit_code == 0, result.output
    assert f"http://127.0.0.1:{port}/v1 answers as plain, hide@auto[gate=3]\n" in result.output
    assert (served, host, limits.images, list(keys)) == (("plain", "hide@auto[gate=3]"), "127.0.0.1", 2, [])


@pytest.mark.parametrize(
    "arguments, said",
    [(["--host", "0.0.0.0"], "--api-key"), (["--host", "::"], "--api-key"), (["--methods", "oracle"], "'oracle'"),
     (["--methods", "true-boxes"], "right boxes"), (["nowhere/model"], "nowhere/model"), (["--host", "no.such.host.", "--api-key", "k"], "cannot be had"),
     (["--host", "0.0.0.0", "--api-key", " "], "an empty one")],
)  # fmt: skip
def test_the_command_refuses_what_it_cannot_serve(arguments, said, monkeypatch):
    result, served = run(*arguments, monkeypatch=monkeypatch)
    assert result.exit_code == 1 and said in result.output and not served


def test_with_a_key_other_addresses_are_served(monkeypatch):
    monkeypatch.setenv("HIDE_API_KEY", "one two")
    result, ((_, _, keys, (host, _)),) = run("--host", "0.0.0.0", "--methods", "plain", monkeypatch=monkeypatch)
    assert result.exit_code == 0 and (host, list(keys)) == ("0.0.0.0", ["one", "two"])


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("hide.models.load", lambda *a, **k: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result, served = run("--port", port, monkeypatch=monkeypatch)
    assert result.exit_code == 1 and f"{port} of 127.0.0.1 cannot be had" in result.output and not served


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_its_extra_the_command_says_what_to_install(missing, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("hide.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 1 and f"{missing}, which is not installed: {command.INSTALL}" in " ".join(
        result.output.split()
    )
