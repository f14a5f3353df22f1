"""`hide serve` and those who mean it ill, or have lost patience: the real server on loopback, a model of few lines."""

import base64
import hmac
import json
import re
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image
from serve_clients import DOT, PATH, FakeModel, chat, file_of, head, picture, running, until, uri, words

from hide.serve import wire
from hide.serve.engine import Line
from hide.serve.limits import Limits
from hide.serve.wire import Refused

SHORT = 0.3
GOOD = chat(picture(), "What is it?")


@pytest.fixture(scope="module")
def server():
    with running(FakeModel()) as server:
        yield server


@pytest.fixture(autouse=True)
def the_server_answers_afterwards(request):
    yield
    if "server" in request.fixturenames:
        status, said = request.getfixturevalue("server").post(GOOD)
        assert status == 200 and said["choices"][0]["message"]["content"] == "What is it?"


# -- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:{}/x.png", "https://127.0.0.1:{}/", "HTTP://LOCALHOST:{}/x", "file:///etc/passwd", "/etc/passwd",
     "data:text/plain;base64,aGk=", "data:image/svg+xml;base64,PHN2Zy8+", "data:image/png,aGk=", "", " " + DOT],
)  # fmt: skip
def test_nothing_is_fetched_and_no_file_is_opened(server, url, monkeypatch):
    opened = []
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a))
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        status, said = server.error(chat(picture(url.format(elsewhere.getsockname()[1])), "What?"))
        elsewhere.settimeout(0.05)
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert status == 400 and "nothing is fetched" in said and not opened


def png_of(width, height):
    """A PNG of few bytes that says it is of this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("size", [(8001, 8000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_head(server, size, monkeypatch):
    # Whoever raises Pillow's own bound in the same process does not raise ours.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(Image.Image, "load", lambda *a: pytest.fail("it was unpacked"))
    status, said = server.error(chat(picture(uri(png_of(*size))), "What?"))
    assert (status, "pixels" in said) == (413, True)


def test_the_pixels_of_all_pictures_count(server):
    status, said = server.error(chat(*[picture(uri(png_of(8000, 4100)))] * 2, "What?"))
    assert status == 413 and "65,600,000 pixels" in said
    with_room = chat(*[picture(uri(png_of(8000, 3900)))] * 2, "What?")
    assert server.post(with_room)[0] == 200


def test_a_jpeg_of_thousands_of_scans_is_refused(server):
    plain = file_of(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    assert server.post(chat(picture(uri(plain, "jpeg")), "What?"))[0] == 200
    scan = plain[plain.index(b"\xff\xda") : -2]
    status, said = server.error(chat(picture(uri(plain[:-2] + 500 * scan + plain[-2:], "jpeg")), "What?"))
    assert status == 400 and "scans" in said
    two = file_of(Image.new("RGB", (16, 16)), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    assert server.post(chat(picture(uri(two, "jpeg")), "What?"))[0] == 200
    first = two.index(b"\xff\xda")
    many = two[:first] + 500 * two[first : two.index(b"\xff\xd9", first)] + two[first:]
    status, said = server.error(chat(picture(uri(many, "jpeg")), "What?"))
    assert status == 400 and "scans" in said


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(20), b"\x89PNG\r\n\x1a\n", b"BM" + bytes(60)])
def test_what_is_no_picture_of_the_three_kinds_is_refused(server, data):
    assert server.error(chat(picture(uri(data)), "What?"))[0] == 400


def test_a_webp_that_is_also_of_another_format_is_refused(server):
    # A Kodak Photo CD says so at byte 2048, and is tried first.
    def webp(at):
        exif = b"Exif\0\0" + b" " * at + b"PCD_" + bytes(3000)
        return file_of(Image.new("RGB", (4, 4)), "WEBP", exif=exif)

    place = 2048 - webp(0).index(b"PCD_")
    assert server.post(chat(picture(uri(webp(place + 1), "webp")), "What?"))[0] == 200
    status, said = server.error(chat(picture(uri(webp(place), "webp")), "What?"))
    assert status == 400 and "none of PNG, JPEG, WEBP" in said


def test_pictures_are_counted_before_any_is_decoded(server, monkeypatch):
    decoded = []
    monkeypatch.setattr(wire.base64, "b64decode", lambda *a, **k: decoded.append(a))
    status, said = server.error(chat(*[picture()] * 9, "What?"))
    assert status == 400 and "got 9 pictures" in said and not decoded


@pytest.mark.parametrize(
    "changes, param",
    [({"n": 2}, "n"), ({"temperature": 0.1}, "temperature"), ({"best_of": 3}, "best_of"), ({"logprobs": True}, "logprobs"),
     ({"stop": ["."]}, "stop"), ({"tools": [{"type": "function"}]}, "tools"), ({"presence_penalty": 1}, "presence_penalty"),
     ({"response_format": {"type": "json_object"}}, "response_format"), ({"logit_bias": {"5": 100}}, "logit_bias"),
     ({"modalities": ["audio"]}, "modalities"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "16"}, "max_tokens"),
     ({"max_tokens": 1.5}, "max_tokens"), ({"max_completion_tokens": -1}, "max_completion_tokens"),
     ({"stream": "yes"}, "stream"), ({"model": 5}, "model"), ({"messages": []}, "messages"), ({"messages": {}}, "messages"),
     ({"messages": [5]}, "messages"), ({"messages": [{"role": "user"}]}, "messages"), ({"messages": None}, "messages")],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_by_the_name_of_its_field(server, changes, param):
    status, said = server.post({**GOOD, **changes})
    assert status == 400 and said["error"]["param"] == param and said["error"]["message"].startswith(param), said


@pytest.mark.parametrize(
    "content, said",
    [("hello", "got 0 pictures"), ([picture()], "question: got ''"), ([words("no picture")], "got 0 pictures"),
     ([picture(), words("?!")], "at least one word"), ([{"type": "text"}, picture()], "messages[0].content[0].text: "),
     ([{"type": "input_audio", "input_audio": {}}], "messages[0].content[0]: "), ([words("w " * 9000), picture()], "18,000 ch"),
     ([{"type": "image_url", "image_url": {"url": 5}}], "messages[0].content[0].image_url.url: "),
     ([picture("data:image/png;base64,????"), words("What?")], "not base64"),
     ([picture("data:image/png;base64,äöü"), words("What?")], "not base64"),
     ([picture(DOT[:-3]), words("What?")], "not base64"), (5, "messages[0].content: ")],
)  # fmt: skip
def test_content_that_cannot_be_right_is_refused_with_the_reason(server, content, said):
    status, message = server.error({"model": "hide", "messages": [{"role": "user", "content": content}]})
    assert status == 400 and said in message


def test_earlier_answers_are_refused_and_not_dropped(server):
    turn = GOOD["messages"][0]
    for messages in (
        [turn, turn],
        [turn, {"role": "assistant", "content": "red"}, turn],
        [{"role": "tool", "content": ""}],
    ):
        status, said = server.error({"model": "hide", "messages": messages})
        assert status == 400 and "one user's turn" in said


def test_an_unknown_model_is_404_with_those_that_there_are(server):
    status, said = server.post({**GOOD, "model": "q-zoom[branches=/etc]"})
    assert status == 404 and said["error"]["code"] == "model_not_found" and "hide, plain" in said["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b'{"model": "hide"', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100_000, b'{"a":' * 50_000,
     b'{"model": "hide", "messages": [' + b"{}," * 90_000 + b"{}]}", b'{"messages":[' + b"[]," * 10**6 + b"[]]}",
     b'{"model": "hide", "messages": ' + b"9" * 10_000 + b"}", b'{"max_tokens": NaN}', b"model=hide&messages=x"],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_deep_wide_and_broken_json_is_refused_quickly(server, body):
    start = time.perf_counter()
    assert server.error(body)[0] == 400
    assert time.perf_counter() - start < 5


# -- how it arrives ---------------------------------------------------------------------------------------------------


def received(client):
    """All that a connection sends until it is closed; a reset ends it too."""
    pieces = []
    try:
        while piece := client.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def reply_on(client):
    """One reply on a connection that stays open."""
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += client.recv(65536)
    length = int(re.search(rb"content-length: (\d+)", reply)[1])
    while len(reply.partition(b"\r\n\r\n")[2]) < length:
        reply += client.recv(65536)
    return reply


def status_of(reply):
    return int(re.match(rb"HTTP/1.1 (\d+)", reply)[1]) if reply else None


@pytest.mark.parametrize("claim", [2**40, (64 << 20) + 1, 10**30])
def test_a_body_that_claims_to_be_too_large_is_refused_before_it_comes(server, claim):
    with server.connected(head(claim)) as client:
        assert status_of(client.recv(4096)) == (413 if claim < 10**20 else 400)


def test_a_body_without_a_length_is_refused_once_it_is_too_large():
    model = FakeModel()
    with running(model, Limits(body_bytes=100_000)) as server:
        chunked = f"POST {PATH} HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        piece = b"10000\r\n" + b"A" * 65536 + b"\r\n"
        with server.connected(chunked, piece, piece) as client:
            assert status_of(client.recv(4096)) == 413
        assert server.post({**GOOD, "pad": "A" * 90_000})[0] == 200
    assert len(model.asked) == 1


def test_a_client_that_sends_far_too_much_can_read_why(server):
    status, said = server.error(b"A" * (65 << 20))
    assert status == 413 and "67,108,864 bytes" in said


def test_a_slow_body_ends():
    with running(FakeModel(), Limits(body_seconds=SHORT)) as server:
        with server.connected(head(1000), b'{"model"') as client:
            assert status_of(client.recv(4096)) == 408
        assert server.post(GOOD)[0] == 200


@pytest.mark.parametrize("start", [b"", b"POST /v1/chat", head(10)[:-2]], ids=["silent", "line", "head"])
def test_a_slow_head_ends(start):
    with running(FakeModel(), Limits(head_seconds=SHORT)) as server, server.connected(start) as client:
        begin = time.perf_counter()
        reply = received(client)
        assert time.perf_counter() - begin > SHORT / 2
        assert status_of(reply) == (408 if start else None)
        until(lambda: not server.server.server_state.connections)


def test_the_head_of_a_later_request_ends_too_however_its_bytes_drip_in():
    body = json.dumps(GOOD).encode()
    with running(FakeModel(), Limits(head_seconds=SHORT)) as server, server.connected(head(len(body)) + body) as client:
        assert status_of(reply_on(client)) == 200
        dripping = threading.Event()

        def drip():
            while not dripping.wait(SHORT / 10):
                try:
                    client.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        client.sendall(b"GET /")
        assert status_of(received(client)) in (408, None)
        dripping.set()
        thread.join()


def test_a_body_that_goes_on_behind_its_refusal_ends():
    with running(FakeModel(), Limits(head_seconds=SHORT, body_bytes=1000)) as server:
        chunked = f"POST {PATH} HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        with server.connected(chunked) as client:
            try:
                for _ in range(2000):
                    client.sendall(b"400\r\n" + b"A" * 1024 + b"\r\n")
                    time.sleep(0.005)
                pytest.fail("it was listened to for ever")
            except OSError:
                pass
        assert server.post(GOOD)[0] == 200


def test_an_answer_that_nobody_reads_ends():
    model = FakeModel(lambda asked: "a" * 20_000_000)
    body = json.dumps(GOOD).encode()
    with running(model, Limits(head_seconds=SHORT)) as server, server.connected(head(len(body)) + body):
        until(lambda: model.asked)
        until(lambda: not server.server.server_state.connections)


def test_two_hundred_half_open_connections_delay_no_good_request():
    limits = Limits(heads=100, bodies=50, head_seconds=30, body_seconds=30)
    with running(FakeModel(), limits) as server:
        opened = []
        try:
            for number in range(200):
                opened.append(socket.create_connection(("127.0.0.1", server.port)))
                opened[-1].sendall(head(1000) + b"{" if number % 2 else b"POST /v1/chat/completions HTTP/1.1\r\nHost:")
            until(lambda: len(server.server.server_state.connections) >= 100)
            took = []
            for _ in range(10):
                start = time.perf_counter()
                assert server.post(GOOD)[0] == 200
                took.append(time.perf_counter() - start)
            assert sorted(took)[5] < 1
            # Those who were there first have made room.
            until(lambda: len(server.server.server_state.connections) <= 150)
            opened[1].settimeout(10)
            assert status_of(opened[1].recv(4096)) == 408
        finally:
            for client in opened:
                client.close()


def test_stalled_bodies_take_no_place_in_line_and_make_room_for_what_arrives():
    limits = Limits(waiting=2, bodies=4, body_seconds=30, body_bytes=400_000, all_body_bytes=1_000_000)
    with running(FakeModel(), limits) as server:
        stalled = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        try:
            for client in stalled:
                client.sendall(head(300_000) + b" " * 200_000)
            time.sleep(0.1)
            assert server.post({**GOOD, "pad": "A" * 300_000})[0] == 200
            assert status_of(stalled[0].recv(4096)) == 408
            stalled[3].settimeout(0.1)
            with pytest.raises(TimeoutError):
                stalled[3].recv(4096)
        finally:
            for client in stalled:
                client.close()
        model_held = until(lambda: re.search(r"hide_held_bytes 0\n", server.request("GET", "/metrics")[2]))
        assert model_held


# -- who waits --------------------------------------------------------------------------------------------------------


def test_a_full_line_is_429_and_whoever_is_in_it_is_answered():
    model = FakeModel()
    with running(model, Limits(waiting=3)) as server, ThreadPoolExecutor(8) as clients:
        model.gate.clear()
        first = clients.submit(server.post, GOOD)
        until(lambda: model.steps)
        others = [clients.submit(server.post, chat(picture(), f"Who is {n}?")) for n in range(3)]
        until(lambda: server.state()["waiting"] == 3)
        status, headers, said = server.request("POST", PATH, json.dumps(GOOD).encode())
        assert status == 429 and headers["Retry-After"] == "1" and said["error"]["code"] == "rate_limit_exceeded"
        assert server.request("GET", "/health")[0] == 200
        model.gate.set()
        assert [one.result()[0] for one in (first, *others)] == [200] * 4
    assert len(model.asked) == 4


def test_clients_that_leave_the_line_are_not_computed_and_the_running_one_stops_at_its_next_step():
    model = FakeModel()
    with running(model) as server, ThreadPoolExecutor(1) as clients:
        model.gate.clear()
        bodies = [json.dumps(chat(picture(), f"Who is {n}?")).encode() for n in range(4)]
        leaving = [socket.create_connection(("127.0.0.1", server.port)) for _ in bodies]
        for number, (client, body) in enumerate(zip(leaving, bodies, strict=True)):
            client.sendall(head(len(body)) + body)
            until(lambda number=number: len(model.asked) + server.state()["waiting"] == number + 1)
        stays = clients.submit(server.post, GOOD)
        until(lambda: server.state()["waiting"] == 4)
        for client in leaving:
            client.close()
        until(lambda: server.state()["waiting"] == 1)
        model.gate.set()
        assert stays.result()[0] == 200
        assert model.steps == [("Who is 0?", "look"), ("What is it?", "look"), ("What is it?", "answer")]
        counted = server.request("GET", "/metrics")[2]
        assert f'hide_requests_total{{path="{PATH}",status="499"}} 4\n' in counted


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(server):
    with server.connected(head(5000), b"{"):
        until(lambda: "hide_held_bytes 1\n" in server.request("GET", "/metrics")[2])
    until(lambda: "hide_held_bytes 0\n" in server.request("GET", "/metrics")[2])


def test_a_request_that_breaks_the_model_is_500_without_its_reason_and_the_next_one_is_answered():
    def say(asked):
        if "break" in asked.question.stem:
            raise SystemExit("secret")
        return "fine"

    with running(FakeModel(say)) as server:
        status, said = server.post(chat(picture(), "break it"))
        assert status == 500 and said["error"]["type"] == "server_error" and "secret" not in json.dumps(said)
        assert server.post(GOOD)[1]["choices"][0]["message"]["content"] == "fine"
        assert 'status="500"} 1\n' in server.request("GET", "/metrics")[2]
        server.engine.close()
        assert server.request("GET", "/health")[0] == 503
        assert server.post(GOOD)[0] == 503


class Waiting:
    """A job, as far as a line knows it."""

    def __init__(self, key):
        self.asked = SimpleNamespace(key=key)


def asked_about(*keys):
    return list(map(Waiting, keys))


def left_in_order(line, count):
    return "".join(line.next().asked.key for _ in range(count))


def test_the_line_is_grouped_by_picture_and_nobody_waits_too_long():
    line = Line(Limits(in_a_row=3))
    for job in asked_about(*"abacba"):
        line.join(job)
    assert left_in_order(line, 6) == "aaabbc"
    for job in asked_about(*"cccccccab"):
        line.join(job)
    assert left_in_order(line, 9) == "ccabccccc"


def test_a_line_lets_go_of_who_leaves_and_ends_for_who_waits():
    line = Line(replace(Limits(), waiting=2))
    first, second, third = asked_about(*"aab")
    line.join(first)
    line.join(second)
    with pytest.raises(Refused, match="2 requests wait already"):
        line.join(third)
    line.leave(first)
    line.leave(first)
    line.join(third)
    assert line.next() is second and line.close() == [third] and line.next() is None
    with pytest.raises(Refused, match="shutting down"):
        line.join(first)


# -- who asks ---------------------------------------------------------------------------------------------------------


PATHS = [("POST", PATH), ("GET", PATH), ("GET", "/v1/models"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/"),
         ("GET", "/docs"), ("GET", "/openapi.json"), ("OPTIONS", PATH), ("POST", "/v1/completions")]  # fmt: skip


@pytest.fixture(scope="module")
def locked():
    model = FakeModel()
    with running(model, keys=("first key", "second")) as server:
        yield server
    assert not model.asked or all(asked.key for asked in model.asked)


@pytest.mark.parametrize("method, path", PATHS)
@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", "first key", "Basic second", "Bearer second\xff"]
)
def test_every_path_wants_a_key(locked, method, path, given):
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    status, said_headers, said = locked.request(method, path, b"{}", headers)
    assert (status, said["error"]["code"]) == (401, "invalid_api_key") and said_headers["WWW-Authenticate"] == "Bearer"


def test_without_a_key_a_body_is_not_read(locked):
    with locked.connected(head(50 << 20)) as client:
        assert status_of(client.recv(4096)) == 401


def test_keys_are_compared_in_constant_time_with_all_of_them(locked, monkeypatch):
    compared, real = [], hmac.compare_digest

    def counting(one, other):
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for key, status in (("first key", 200), ("second", 200), ("third", 401), ("f" * 5000, 401)):
        compared.clear()
        assert locked.request("GET", "/health", headers={"Authorization": f"bearer {key}"})[0] == status
        # Digests: neither their number nor their length depends on what was sent.
        assert [(len(one), len(other)) for one, other in compared] == [(32, 32)] * 2


def test_pictures_of_two_keys_are_two(locked):
    model = locked.engine._model
    for key in ("first key", "second", "first key"):
        assert locked.post(GOOD, Authorization=f"Bearer {key}")[0] == 200
    one, two, three = (asked.key for asked in model.asked[-3:])
    assert one == three != two


def test_web_pages_are_not_answered(server):
    """Of any page that is open in a browser on this machine: it can send a form here, or name itself 127.0.0.1."""
    for origin in ("https://example.org", f"http://127.0.0.1:{server.port}", "null"):
        status, said = server.error(GOOD, Origin=origin)
        assert status == 403 and "web page" in said


def test_paths_and_methods_that_are_not_there_are_refused_in_the_same_form(server):
    for method, path, wanted in (("GET", "/docs", 404), ("GET", "/../etc/passwd", 404), ("DELETE", PATH, 405)):
        status, _, said = server.request(method, path)
        assert status == wanted and "/v1/chat/completions" in said["error"]["message"]


def test_what_is_no_http_ends(server):
    for junk in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: " + b"a" * 100_000,
        b"\r\n" * 50_000,
    ):
        with server.connected(junk) as client:
            client.shutdown(socket.SHUT_WR)
            assert status_of(received(client)) in (400, None)


def test_a_picture_is_the_bytes_that_were_sent(server):
    data = file_of(Image.new("RGB", (5, 5), "red"))
    assert server.post(chat(picture(uri(data)), "What?"))[0] == 200
    assert server.engine._model.asked[-1].pictures == (data,) == (base64.b64decode(uri(data).split(",")[1]),)
