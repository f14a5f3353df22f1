"""A session's verbs on every family, against the unshared forward: chat, branches by layers and positions, hidden
states, rows of any token. That a plain branch is the unshared forward is shown in test_families.py."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image

from hide.engine import prefix as engine
from hide.engine import stock
from hide.engine.decoder import extend
from hide.engine.kv_cache import PreallocatedCache
from hide.engine.usage import counted
from hide.session import ImageSession, Message, Reply, RunSettings, Session, open_session

RUN = RunSettings(min_tokens=16, max_tokens=80)
FIRST, SECOND = "Where is the star? Then name its box.", "Look at this crop as well. What is it?"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGE, CROP = picture(230, 170), picture(90, 120, seed=1)


@pytest.fixture
def session(model):
    with open_session(model, IMAGE, RUN, taps=range(model.num_layers + 1)) as opened:
        yield opened


def logits(model, ids, inputs):
    """The model's own forward."""
    with torch.no_grad():
        return model.model(**stock.forward_inputs(model, ids, inputs)).logits[:, -1].float()


def everything(model, *images):
    return model.preprocess(list(images), min_tokens=RUN.min_tokens, max_tokens=RUN.max_tokens)


# -- chat -------------------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_as_the_unshared_forward_would(model, session):
    """With what the last turn left in the cache, and from the prefix alone."""
    messages = [Message(FIRST), session.chat([Message(FIRST)], max_new_tokens=6)]
    messages.append(Message(SECOND, [CROP]))
    turn = session.turn(messages)
    want = stock.generate_ids(model, turn.input_ids, everything(model, IMAGE, CROP), max_new_tokens=6)
    went_on = session.chat(messages, max_new_tokens=6)
    assert list(went_on.ids) == want
    session.ask("Something else?", max_new_tokens=2)
    anew = session.chat(messages, max_new_tokens=6)
    assert list(anew.ids) == want and anew.text == went_on.text == model.decode(want)
    assert (
        anew.tokens - went_on.tokens
        == len(messages[1].ids) - 1 + session.turn(FIRST).input_ids.shape[1] - session.length
    )
    third = [*messages, went_on, Message("Is it red?")]
    # Another image of as many tokens is another conversation, though its prompt has the same ids.
    other = session.chat([*messages[:2], Message(SECOND, [CROP.rotate(180)]), went_on, third[-1]], max_new_tokens=2)
    assert other.tokens > session.chat(messages, max_new_tokens=6).tokens
    whole = session.turn(third).input_ids
    want = stock.generate_ids(model, whole, everything(model, IMAGE, CROP), max_new_tokens=5)
    assert list(session.chat(third, max_new_tokens=5).ids) == want


def test_going_on_sends_only_what_is_new_and_another_prompt_in_between_costs_no_more_than_time(
    model, session, monkeypatch
):
    sent, real = [], engine.extend
    monkeypatch.setattr(
        engine, "extend", lambda m, c, ids, *a, **k: (sent.append(ids.shape[1]), real(m, c, ids, *a, **k))[1]
    )
    messages = [Message(FIRST), session.chat([Message(FIRST)], max_new_tokens=5), Message(SECOND)]
    whole = session.turn(messages).input_ids.shape[1]
    sent.clear()
    with counted() as usage:
        first = session.chat(messages, max_new_tokens=4)
    new = whole - session.turn(FIRST).input_ids.shape[1] - len(messages[1].ids) + 1
    assert sum(sent) < new and usage.tokens == first.tokens == new + len(first.ids)
    session.ask("Something else?", max_new_tokens=2)
    sent.clear()
    assert session.chat(messages, max_new_tokens=4).ids == first.ids
    assert sum(sent) == whole - session.length - 1


def lead(model, ids, inputs):
    """How far the best score lies above the second, behind the checkpoint's repetition penalty, from one forward."""
    scores, seen = logits(model, ids, inputs)[0], ids[0].unique()
    penalty = model.model.generation_config.repetition_penalty
    scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    best, second = scores.topk(2).values.tolist()
    return best - second


def test_a_replys_margin_is_the_lead_of_its_first_token_in_the_unshared_forward(model, session):
    want = lead(model, session.turn([Message(FIRST, [CROP])]).input_ids, everything(model, IMAGE, CROP))
    assert want > 1e-3
    for static in (False, True):
        said = session.ask(FIRST, [CROP], max_new_tokens=3, static=static)
        assert said.margin == pytest.approx(want, abs=2e-4)
        # Behind a reply that was kept, and of one token alone.
        messages = [Message(FIRST, [CROP]), said, Message(SECOND)]
        later = session.chat(messages, max_new_tokens=1, static=static)
        of_whole = lead(model, session.turn(messages).input_ids, everything(model, IMAGE, CROP))
        assert later.margin == pytest.approx(of_whole, abs=2e-4)


def test_a_reply_that_is_a_text_stands_in_the_prompt_as_the_template_has_it(model, session):
    messages = [Message(FIRST), Reply("a ring"), Message(SECOND)]
    turn = session.turn(messages)
    rendered = model.tokenizer.decode(turn.input_ids[0])
    first, reply, second = rendered.index("Where is"), rendered.index("a ring"), rendered.index("Look at")
    assert first < reply < second
    labels = turn.labels[turn.rows.start - turn.images_end : turn.rows.stop - turn.images_end]
    assert "".join("".join(labels).split()) == "".join(SECOND.split())
    for (start, stop), label in zip(turn.offsets, labels, strict=True):
        assert SECOND[max(start, 0) : stop].strip() in label


@pytest.mark.parametrize(
    "messages", [[], [Reply("yes")], [Message("a"), Message("b")], [Message("a"), Reply("b")]], ids=len
)
def test_conversations_that_do_not_alternate_are_refused(session, messages):
    with pytest.raises(ValueError, match="messages: want a Message"):
        session.chat(messages, max_new_tokens=2)


# -- branches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4096, 7])
def test_a_branch_stops_at_a_layer_and_goes_on(model, chunk):
    run = RunSettings(min_tokens=16, max_tokens=80, prefill_chunk=chunk)
    with open_session(model, IMAGE, run) as session:
        more = everything(model, CROP)
        ids = model.input_ids(SECOND, session.inputs + more)
        want = logits(model, ids, everything(model, IMAGE, CROP))
        last = model.num_layers
        for cuts in ([1], [1, 2, last - 1]):
            with session.branch(ids, more) as branch:
                for start, stop in zip([0, *cuts], [*cuts, last], strict=True):
                    hidden = branch.run(layers=range(start, stop))
                    assert stop == last or hidden.shape[1] == ids.shape[1] - session.length
                with torch.no_grad():
                    got = model.model.get_output_embeddings()(hidden[:, -1]).float()
                assert (got - want).abs().max() < 1e-4
        with session.branch(ids, more) as branch:
            branch.run(layers=range(1))
            with pytest.raises(ValueError, match=r"want range\(1, 2 to"):
                branch.run(layers=range(2))
            with pytest.raises(ValueError, match="where layer 0 ended"):
                branch.run(ids.shape[1] - 1)
            assert (branch.logits() - want).abs().max() < 1e-4, "whatever else is asked begins anew"


def test_positions_of_the_caller_are_those_of_an_unshared_forward(model, session):
    ids = model.input_ids(FIRST, session.inputs)
    own, _ = model.positions(ids, session.inputs)
    behind = own[..., session.length :]
    with session.branch(ids, positions=behind) as branch:
        assert (branch.logits() - logits(model, ids, everything(model, IMAGE))).abs().max() < 1e-4
        assert branch.reply(5) == stock.generate_ids(model, ids, everything(model, IMAGE), max_new_tokens=5)
    moved = behind + 3.25
    features = model.encode(everything(model, IMAGE))
    cache = PreallocatedCache(model.num_layers, ids.shape[1])
    whole = torch.cat([own[..., : session.length].to(moved.dtype), moved], -1)
    want, _ = extend(model, cache, ids, whole, features)
    with session.branch(ids, positions=moved) as branch:
        torch.testing.assert_close(branch.run(), want[:, session.length :], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="positions: got shape"), session.branch(ids, positions=behind[..., 1:]):
        pass


def test_replies_go_on_from_the_positions_of_the_caller(model, session):
    """Each new token one further than the last, on all axes; by fixed shapes and, where it can, by `generate`."""
    ids = model.input_ids(FIRST, session.inputs)
    own, delta = model.positions(ids, session.inputs)
    moved = own[..., session.length :] + 40
    with session.branch(ids, positions=moved) as branch:
        replies = [branch.reply(6, static=static) for static in ((True, False) if delta is not None else (True,))]
    longer = torch.cat([ids, torch.tensor([replies[0][:-1]])], 1)
    places = torch.cat([moved, moved[..., -1:] + torch.arange(1, len(replies[0]))], -1)
    with session.branch(longer, positions=places) as branch, torch.no_grad():
        states = branch.run(whole=True)[0, -len(replies[0]) :]
        scores = model.model.get_output_embeddings()(states).float()
    penalised = seen_before(scores, longer[0], len(replies[0]), model.model.generation_config.repetition_penalty)
    assert penalised.argmax(-1).tolist() == replies[0] and all(reply == replies[0] for reply in replies)


def seen_before(scores, ids, new, penalty):
    """The checkpoint's repetition penalty on the scores behind each of the last `new` prompts."""
    found = scores.clone()
    for row in range(new):
        seen = ids[: len(ids) - new + 1 + row].unique()
        own = found[row, seen]
        found[row, seen] = torch.where(own < 0, own * penalty, own / penalty)
    return found


def test_a_branch_takes_the_features_of_images_that_are_encoded_already(model, session):
    more = everything(model, CROP)
    ids, features = model.input_ids(SECOND, session.inputs + more), model.encode(more)
    with session.branch(ids, more) as branch:
        want = branch.logits()
    with session.branch(ids, more.without_pixels(), features=features) as branch:
        assert torch.equal(branch.logits(), want)
    with (
        pytest.raises(ValueError, match=r"features: got \d+ tokens, want as many"),
        session.branch(ids, more, features=features.part(1, len(features.embeddings))),
    ):
        pass


def test_what_is_made_once_is_held_until_the_session_is_closed(model):
    made = []

    def make():
        made.append(torch.zeros(1000))
        return made[-1]

    with open_session(model, IMAGE, RUN) as session:
        before = session.nbytes
        assert session.once("zeros", make) is session.once("zeros", make) is made[0] and len(made) == 1
        assert session.nbytes == before + 4000
    assert session.nbytes == 0

    class Remote(Session):
        """Any engine's."""

    assert Remote().once("one", lambda: 1) == 1


def test_a_failure_within_the_layers_leaves_the_branch_as_it_was(model, session, monkeypatch):
    ids = model.input_ids(FIRST, session.inputs)
    want = logits(model, ids, everything(model, IMAGE))
    real = engine.extend

    def failing(*arguments, **keywords):
        real(*arguments, **keywords)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with session.branch(ids) as branch:
        branch.run(layers=range(1))
        with monkeypatch.context() as patched:
            patched.setattr(engine, "extend", failing)
            with pytest.raises(MemoryError):
                branch.run()
        with torch.no_grad():
            got = model.model.get_output_embeddings()(branch.run()[:, -1]).float()
        assert (got - want).abs().max() < 1e-4


# -- hidden states and rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4096, 9])
def test_hidden_states_are_what_enters_each_layer_of_the_unshared_forward(model, chunk):
    run = RunSettings(min_tokens=16, max_tokens=80, prefill_chunk=chunk)
    layers = [*model.language_model.layers, model.language_model.norm]
    entered, hooks = {}, []
    for index, layer in enumerate(layers):

        def keep(module, arguments, keywords, index=index):
            entered[index] = (arguments[0] if arguments else keywords["hidden_states"]).clone()

        hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        inputs = everything(model, IMAGE)
        logits(model, model.image_prefix(inputs), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    want = dict(entered)
    taps = (0, 1, model.num_layers)
    with open_session(model, IMAGE, run, taps=taps) as session:
        assert session.taps == taps
        for layer in taps:
            torch.testing.assert_close(session.hidden(layer), want[layer], atol=2e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="layer: got 2, want one of the taps"):
            session.hidden(2)
    with pytest.raises(RuntimeError, match="session: it is closed"):
        session.hidden(0)
    with pytest.raises(ValueError, match="taps: got 99"):
        open_session(model, IMAGE, run, taps=[99])


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_any_token_and_turn_are_those_of_the_unshared_forward(model, session, causal):
    turns = {
        "a text": session.turn(FIRST),
        "a conversation": session.turn([Message(FIRST), Reply("a ring"), Message(SECOND, [CROP])]),
    }
    for name, turn in turns.items():
        inputs = everything(model, IMAGE, *([CROP] if turn.more is not None else []))
        length = turn.input_ids.shape[1]
        for queries in (None, range(length - 1, length), range(session.length, session.length + 2)):
            arguments = {"layers": (0, -1), "causal": causal, "queries": queries}
            got = session.attention(turn, **arguments)
            want = stock.attention(model, turn, inputs, **arguments)
            assert len(got) == len(want) == len(turn.images), name
            for mine, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=0)


# -- what a session offers --------------------------------------------------------------------------------------------


def test_a_session_offers_what_its_class_has_and_names_what_it_lacks(session):
    assert session.verbs == {"attention", "chat", "crop", "ask", "branch", "hidden"}

    class Remote(Session):
        def chat(self, messages, *, max_new_tokens):
            return Reply(messages[-1].text.upper())

    remote = Remote()
    assert remote.verbs == {"chat", "ask", "crop"} and remote.ask("yes", max_new_tokens=1).text == "YES"
    for call in (lambda: remote.turn("x"), lambda: remote.branch(torch.zeros(1, 1)), lambda: remote.hidden(0)):
        with pytest.raises(ValueError, match="Remote has no .*; it offers ask, chat, crop"):
            call()


def test_crops_are_cut_from_the_original_at_full_size(session):
    box = torch.tensor([[10, 20, 60, 50]])
    (crop,) = session.crop([box])
    assert np.array_equal(crop.image.numpy(), np.asarray(IMAGE)[20:50, 10:60])
    with pytest.raises(ValueError, match="boxes: got 2 tensors, want 1"):
        session.crop([box, box])
    assert isinstance(session, ImageSession)


def test_crops_of_transparent_images_are_whole_boxes_unless_they_are_asked_to_shrink(model):
    image = IMAGE.convert("RGBA")
    image.putalpha(0)
    image.paste(IMAGE.crop((30, 40, 40, 45)), (30, 40))
    box = torch.tensor([[10, 20, 60, 50]])
    with open_session(model, image, RUN) as session:
        (whole,), (part,) = session.crop([box]), session.crop([box], alpha_threshold=10)
    want = np.full((30, 50, 3), 255)
    want[20:25, 20:30] = np.asarray(IMAGE)[40:45, 30:40]
    assert np.array_equal(whole.image.numpy(), want) and torch.equal(whole.boxes, box)
    assert part.boxes.tolist() == [[30, 40, 40, 45]]
