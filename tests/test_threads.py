"""Several threads at one model: each gets what it would have got alone, nobody waits for ever, nothing stays changed."""

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from random_models import qwen2_5_vl, randomise

from hide import PRESETS, HiDe, Plain
from hide.engine.stock import attention, generate_ids
from hide.methods.attend import attend
from hide.methods.base import NoSettings
from hide.models.qwen2_5_vl import Qwen25VL
from hide.session_pool import SessionPool
from hide.tiny.model import build
from hide.tiny.scenes import draw_scene
from hide_kernels.integrations.transformers import capture_attention, capturing, decoder_attention

QUESTIONS = ["What is the color of the star?", "Is the ring on the left?", "What color is the moon?"]
# Long enough for the slowest machine; reached only where a thread waits for ever.
PATIENCE = 120


@pytest.fixture(autouse=True)
def threads_that_change_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def adapter():
    model, tokenizer, processor = build()
    return Qwen25VL(randomise(model), tokenizer, processor)


@pytest.fixture(scope="module")
def images():
    return [draw_scene(seed, *size, objects=3).image for seed, size in enumerate([(280, 196), (200, 300), (400, 90)])]


def hide_of(adapter):
    return HiDe(adapter, PRESETS["tiny"].changed(max_new_tokens=3, max_entity_tokens=6))


def plain_of(hide):
    return Plain(hide.model, hide.preset.with_settings(NoSettings()))


def asked(hide, session, question):
    """What two methods say on one session, in one form that can be compared."""
    plain, answer = (method.ask(session, question) for method in (plain_of(hide), hide))
    found = [(one.boxes.tolist(), one.labels, one.maps.sum().item()) for one in answer.evidence]
    return plain.text, answer.text, answer.details, found


def said(hide, image, question):
    """The same of a picture that is opened for it."""
    with hide.open(image) as session:
        return asked(hide, session, question)


def at_once(*calls):
    """The results of calls that run in a thread each, all begun before any goes on."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(run, call) for call in calls]]


def elsewhere(call):
    """The result of a call in another thread."""
    return at_once(call)[0]


def test_questions_from_several_threads_are_answered_as_one_after_the_other(adapter, images, monkeypatch):
    monkeypatch.setattr("hide.methods.hide.extract.MEMO", 1)
    want = [said(hide_of(adapter), *given) for given in zip(images, QUESTIONS, strict=True)]
    layers = list(adapter.language_model.layers)
    # One HiDe for two threads, and another around another adapter of the same model.
    one, other = hide_of(adapter), hide_of(Qwen25VL(adapter.model, adapter.tokenizer, adapter.image_processor))

    def asking(hide, index):
        return lambda: [said(hide, images[index], QUESTIONS[index]) for _ in range(3)]

    got = at_once(asking(one, 0), asking(one, 1), asking(other, 2))
    assert got == [[answer] * 3 for answer in want]
    assert list(adapter.language_model.layers) == layers


def test_every_step_can_run_beside_every_other(adapter, images):
    image, question = images[0], QUESTIONS[0]
    pictures = adapter.preprocess([image], min_tokens=4, max_tokens=60)
    turn = adapter.turn("star, ring", pictures)

    def rows(hide):
        with hide.open(image) as session:
            return [of_image.tolist() for of_image in hide.attention_rows(session, "star, ring").rows]

    def calls(hide):
        return [
            lambda: rows(hide),
            lambda: plain_of(hide).ask(image, question).text,
            lambda: attend(adapter, image, question, layers=[1, 3], new_tokens=3).maps.tolist(),
            lambda: attention(adapter, turn, pictures, layers=[0])[0].tolist(),
            lambda: hide.entities_of(QUESTIONS),
        ]

    want = [call() for call in calls(hide_of(adapter))]
    for _ in range(2):
        assert at_once(*calls(hide_of(adapter))) == want


def test_one_session_serves_several_threads(adapter, images):
    hide = hide_of(adapter)
    with hide.open(images[0]) as session:
        want = [asked(hide, session, question) for question in QUESTIONS]
        hide = hide_of(adapter)
        got = at_once(*(lambda question=question: asked(hide, session, question) for question in QUESTIONS))
    assert got == want


def test_a_branch_that_is_open_keeps_other_threads_waiting_and_its_own_from_another(adapter, images):
    hide = hide_of(adapter)
    with hide.open(images[0]) as session:
        ids = adapter.input_ids(QUESTIONS[0], session.inputs)
        want = session.reply(ids, max_new_tokens=4)
        with ThreadPoolExecutor(1) as pool:
            with session.branch(ids) as branch:
                first = branch.logits()
                waiting = pool.submit(session.reply, ids, max_new_tokens=4)
                with pytest.raises(RuntimeError, match="open already"), session.branch(ids):
                    pass
                # The model itself is free meanwhile: another session is served.
                assert elsewhere(lambda: plain_of(hide).ask(images[1], QUESTIONS[1]).text)
                assert not waiting.done()
                torch.testing.assert_close(branch.logits(), first, atol=1e-4, rtol=0)
            assert waiting.result(PATIENCE) == want


def test_a_session_that_is_closed_in_another_thread_serves_its_open_branch_to_the_end(adapter, images):
    session = hide_of(adapter).open(images[0])
    ids = adapter.input_ids(QUESTIONS[0], session.inputs)
    want = session.reply(ids, max_new_tokens=4)
    with session.branch(ids) as branch:
        elsewhere(session.close)
        assert branch.reply(4) == want
    with pytest.raises(RuntimeError, match="closed"):
        session.reply(ids, max_new_tokens=4)


def test_after_an_exception_in_one_thread_the_others_go_on(adapter, images, monkeypatch):
    want = said(hide_of(adapter), images[0], QUESTIONS[0])
    layer = adapter.language_model.layers[2]
    forward, culprit = layer.forward, threading.Event()

    def fails_once(*args, **kwargs):
        if not culprit.is_set():
            culprit.set()
            raise ZeroDivisionError
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", fails_once)
    with pytest.raises(ZeroDivisionError):
        elsewhere(lambda: hide_of(adapter).ask(images[1], QUESTIONS[1]))
    assert elsewhere(lambda: said(hide_of(adapter), images[0], QUESTIONS[0])) == want


def test_a_lock_for_calls_of_the_model_by_hand_is_the_same_for_all_adapters_and_does_not_outlive_the_model():
    model, tokenizer, processor = build()
    one, other = (Qwen25VL(model, tokenizer, processor) for _ in range(2))
    assert one.lock is other.lock
    with one.alone():
        assert not elsewhere(partial(other.lock.acquire, blocking=False))
    gone = weakref.ref(model)
    del model, one, other
    gc.collect()
    assert gone() is None


# Captures


def test_captures_of_two_threads_overlap_and_each_records_its_own():
    model = qwen2_5_vl()
    configs = {layer: module.config for layer, module in decoder_attention(model).items()}
    ids = [torch.randint(8, 500, (1, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def alone(tokens):
        with torch.no_grad(), capture_attention(model, layers=[1]) as captured:
            model(input_ids=tokens)
        return captured[1].weights

    want = [alone(tokens) for tokens in ids]
    opened, closed = threading.Event(), threading.Event()

    def beside():
        with torch.no_grad(), capture_attention(model, layers=[1, 2]) as captured:
            opened.set()
            assert closed.wait(PATIENCE)
            model(input_ids=ids[1])
        return captured[1].weights

    with ThreadPoolExecutor(1) as pool:
        with torch.no_grad(), capture_attention(model, layers=[1]) as mine:
            model(input_ids=ids[0])
            future = pool.submit(beside)
            assert opened.wait(PATIENCE)
            # Nobody's: a forward in a thread without a capture, to the same bits.
            logits = elsewhere(lambda: torch.no_grad()(model)(input_ids=ids[2]).logits)
        # The first to be opened is the first to be left.
        closed.set()
        assert torch.equal(future.result(PATIENCE), want[1])
    assert torch.equal(mine[1].weights, want[0])
    assert all(module.config is configs[layer] for layer, module in decoder_attention(model).items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids[2]).logits, logits)


def test_a_capture_that_is_held_open_changes_nothing_for_others_and_keeps_nobody_waiting(adapter, images):
    want = said(hide_of(adapter), images[0], QUESTIONS[0])
    pictures = adapter.preprocess([images[1]], min_tokens=4, max_tokens=60)
    ids = adapter.input_ids(QUESTIONS[1], pictures)
    with capture_attention(adapter.model, layers=[0, 3]) as captured:
        assert capturing(adapter.model) and not elsewhere(lambda: capturing(adapter.model))
        assert elsewhere(lambda: said(hide_of(adapter), images[0], QUESTIONS[0])) == want
        assert not captured
        generate_ids(adapter, ids, pictures, max_new_tokens=1)
    assert captured[3].weights.shape[-1] == ids.shape[1]


def test_rows_of_a_model_that_another_thread_runs_are_refused_with_the_reason():
    model = qwen2_5_vl()
    with (
        pytest.raises(ValueError, match="open the block in the thread that runs the model"),
        capture_attention(model, layers=[1]),
    ):
        elsewhere(lambda: torch.no_grad()(model)(input_ids=torch.arange(8, 20)[None]))


# The pool


def test_threads_that_want_one_picture_open_it_once(adapter, images):
    hide, opened = hide_of(adapter), []

    def open_it():
        opened.append(1)
        return hide.open(images[0])

    pool = SessionPool(1 << 40)
    sessions = at_once(*[lambda: pool.get("a", open_it)] * 3)
    assert sessions == [sessions[0]] * 3 and len(opened) == 1


def test_a_pool_without_room_answers_every_thread(adapter, images):
    hide = hide_of(adapter)
    want = [said(hide, *given) for given in zip(images, QUESTIONS, strict=True)]
    hide, pool = hide_of(adapter), SessionPool(0)

    def serving(index):
        def serve():
            session = pool.get(index, lambda: hide.open(images[index]))
            return asked(hide, session, QUESTIONS[index])

        return lambda: [serve() for _ in range(3)]

    assert at_once(*map(serving, range(3))) == [[answer] * 3 for answer in want]
    assert len(pool) == 1


def test_a_pool_lets_go_of_what_others_use_and_closes_what_is_its_own_threads(adapter, images):
    hide, pool = hide_of(adapter), SessionPool(0)
    ours = pool.get("ours", lambda: hide.open(images[0]))
    theirs = elsewhere(lambda: pool.get("theirs", lambda: hide.open(images[1])))
    assert len(pool) == 1 and not ours.closed, "another thread's get does not close it"
    assert hide.ask(ours, QUESTIONS[0]).text
    pool.get("new", lambda: hide.open(images[2]))
    assert len(pool) == 1 and not theirs.closed
    held = weakref.ref(theirs.cache)
    del theirs
    gc.collect()
    assert held() is None, "its memory is free when nobody has it"
    last = pool.get("newer", lambda: hide.open(images[0]))
    pool.close()
    assert last.closed


def test_an_empty_pool_is_true():
    pool = SessionPool(1 << 40)
    assert pool and len(pool) == 0
    assert (pool or None) is pool
