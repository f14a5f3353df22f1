"""The shared prefix: branches leave it as it was, whatever becomes of them; many prompts, short memory, several pictures.

That every branch gives what the unshared forward gives is shown for all families in test_families.py.
"""

import gc

import pytest
import torch
from random_models import randomise

from hide import HiDe, HiDeConfig, Preset
from hide.engine import prefix as engine
from hide.engine.greedy import greedy_settings, prefers_static_decode, supports_static_decode
from hide.engine.kv_cache import PreallocatedCache
from hide.engine.memory_advice import out_of_memory
from hide.engine.prefix import Prefix, encode
from hide.engine.stock import forward_inputs, generate_ids
from hide.methods.base import AnswerSettings
from hide.models.inputs import ImageInput, ImageInputs
from hide.models.qwen2_5_vl import Qwen25VL
from hide.session import ImageSession, RunSettings
from hide.session_pool import SessionPool
from hide.tiny.model import build
from hide.tiny.scenes import draw_scene
from hide_kernels import rows_to_maps
from hide_kernels.integrations.transformers import capture_attention

QUESTION = "What is the color of the star?"
# (width, height) of each picture.
SIZES = [[(400, 300)], [(90, 600)], [(400, 300), (260, 420)]]


@pytest.fixture(scope="module")
def adapter():
    """Grouped heads, and weights that make every token matter; the checkpoint's kind of repetition penalty."""
    model, tokenizer, processor = build()
    randomise(model)
    model.generation_config.repetition_penalty = 1.05
    return Qwen25VL(model, tokenizer, processor)


def preprocessed(adapter, sizes, seed=0):
    scenes = [draw_scene(seed + i, *size, objects=3).image for i, size in enumerate(sizes)]
    return adapter.preprocess(scenes, min_tokens=30, max_tokens=120)


@pytest.fixture(scope="module")
def pictures(adapter, request):
    """Two pictures, or those that a test names."""
    return preprocessed(adapter, getattr(request, "param", SIZES[-1]))


every_size = pytest.mark.parametrize("pictures", SIZES, ids=str, indirect=True)


@pytest.fixture(scope="module")
def collage(adapter):
    return preprocessed(adapter, [(170, 120)], seed=9)


def preset(**changes):
    """Small images, entities by rules, short answers."""
    config = HiDeConfig(layers=(0,), sigma=1, threshold=0.5, entities_from="rules")
    run = RunSettings(min_tokens=30, max_tokens=120)
    return Preset(config, run, AnswerSettings(max_new_tokens=4)).changed(**changes)


def stock_logits(adapter, ids, pictures):
    with torch.no_grad():
        return adapter.model(**forward_inputs(adapter, ids, pictures)).logits[:, -1].float()


def bits(session):
    """Keys and values of the prefix; behind it may be what a reply left."""
    states = [states for layer in session.cache.layers for states in (layer.keys, layer.values)]
    return [each[:, :, : session.length].clone() for each in states]


def test_rows_come_from_no_more_layers_than_are_asked_for(adapter, pictures, monkeypatch):
    session = ImageSession(adapter, pictures)
    turn = session.turn("star")
    ran = []
    for index, layer in enumerate(adapter.language_model.layers):
        monkeypatch.setattr(
            layer, "forward", lambda *a, _i=index, _f=layer.forward, **k: (ran.append(_i), _f(*a, **k))[1]
        )
    session.attention(turn, layers=(2, 0), causal=False)
    assert ran == [0, 1, 2]


@every_size
def test_the_prefix_keeps_its_bits_through_branches_also_failed_ones(adapter, pictures, collage):
    with ImageSession(adapter, pictures) as session:
        before = bits(session)
        session.ask(QUESTION, [draw_scene(9, 170, 120, objects=3).image], max_new_tokens=4)
        session.attention(session.turn("star"), layers=(1,), causal=False)
        ids = adapter.input_ids(QUESTION, pictures)
        for static in (False, True):
            session.reply(ids, max_new_tokens=3, static=static)
        with pytest.raises(KeyError), session.branch(ids) as branch:
            branch.run(session.length + 3)
            raise KeyError
        with pytest.raises(KeyError), session.branch(ids) as branch:
            branch.run(session.length + 3, layers=range(2))
            raise KeyError
        assert all(torch.equal(a, b) for a, b in zip(before, bits(session), strict=True))
        with session.branch(ids) as branch:
            assert (branch.logits() - stock_logits(adapter, ids, pictures)).abs().max() < 1e-4


@every_size
def test_a_branch_longer_than_the_room_makes_the_cache_grow_once_and_stay_right(adapter, pictures, collage):
    with ImageSession(adapter, pictures, room=1) as session:
        every = pictures + collage
        ids = adapter.input_ids(QUESTION, every)
        assert session.reply(ids, collage, max_new_tokens=9) == generate_ids(adapter, ids, every, max_new_tokens=9)
        grown = session.nbytes
        pointers = [layer.keys.data_ptr() for layer in session.cache.layers]
        session.reply(ids, collage, max_new_tokens=9)
        assert session.nbytes == grown and pointers == [layer.keys.data_ptr() for layer in session.cache.layers]


def test_nothing_is_prefilled_or_encoded_twice(adapter, pictures, monkeypatch):
    encoded, sent = [], []
    encode, extend = adapter.encode, engine.extend
    monkeypatch.setattr(adapter, "encode", lambda inputs: (encoded.append(inputs.grids), encode(inputs))[1])
    monkeypatch.setattr(
        engine, "extend", lambda m, cache, ids, *a, **k: (sent.append(ids.shape[1]), extend(m, cache, ids, *a, **k))[1]
    )
    hide = HiDe(adapter, preset())
    with hide.open(draw_scene(3, 300, 260, objects=3).image) as session:
        prefix = session.length
        results = [hide.ask(session, question) for question in (QUESTION, "Is the ring left of the moon?")]
    assert sent[0] == prefix and sum(sent[1:]) < 6 * prefix and max(sent[1:]) < prefix + 60
    assert [len(grids) for grids in encoded] == [1] * (1 + sum(r.shown[0] is not None for r in results))
    assert "prefix" not in results[0].tokens


def test_stale_positions_of_another_prompt_are_not_taken(adapter, pictures):
    ids = adapter.input_ids(QUESTION, pictures)
    want = generate_ids(adapter, ids, pictures, max_new_tokens=6)
    with ImageSession(adapter, pictures) as session:
        adapter.model.model.rope_deltas = torch.tensor([[12345]])
        assert session.reply(ids, max_new_tokens=6, static=False) == want
        assert adapter.model.model.rope_deltas.item() == 12345
    adapter.model.model.rope_deltas = None


def test_ask_is_the_same_with_a_session_and_with_the_picture(adapter):
    hide = HiDe(adapter, preset(max_new_tokens=6))
    image = draw_scene(5, 500, 300, objects=4).image
    with hide.open(image) as session:
        for question in (QUESTION, "Is the ring on the left or right side of the moon?"):
            shared, alone = hide.ask(session, question).to_dict(), hide.ask(image, question).to_dict()
            assert alone["tokens"].pop("prefix") == session.length and alone["tokens"].pop("read and resize") == 0
            for result in (shared, alone):
                result.pop("seconds")
            assert shared == alone
    with pytest.raises(RuntimeError, match="closed"):
        hide.ask(session, QUESTION)
    with pytest.raises(ValueError, match="another model"):
        HiDe(Qwen25VL(*build()), preset()).ask(session, QUESTION)


# Many prompts side by side


def test_replies_side_by_side_are_those_one_by_one(adapter):
    texts = ["List: star", "List: a ring and a moon behind the very small heart, and nothing else", "List: x"]
    prompts = [adapter.input_ids(text) for text in texts]
    prefix = Prefix(adapter, prompts[0][:, :4])
    want = [generate_ids(adapter, ids, max_new_tokens=15) for ids in prompts]
    assert len({tuple(reply) for reply in want}) == 3
    assert prefix.replies(prompts, max_new_tokens=15) == want
    assert prefix.replies(prompts[1:2], max_new_tokens=1) == [want[1][:1]]


def test_each_reply_ends_at_its_own_end_token(adapter, monkeypatch):
    prompts = [adapter.input_ids(text) for text in ("List: star", "List: ring and moon")]
    prefix = Prefix(adapter, prompts[0][:, :4])
    long = prefix.replies(prompts, max_new_tokens=12)
    end = long[0][3]
    monkeypatch.setattr(adapter.model.generation_config, "eos_token_id", [end, adapter.tokenizer.eos_token_id])
    want = [generate_ids(adapter, ids, max_new_tokens=12) for ids in prompts]
    got = prefix.replies(prompts, max_new_tokens=12)
    assert got == want and len(got[0]) == 1 + long[0].index(end)


def test_entities_of_many_questions_are_those_of_each_and_are_remembered(adapter, monkeypatch):
    config = preset(entities_from="model", max_entity_tokens=12)
    questions = [QUESTION, "Is the ring left of the moon?", QUESTION]
    hide = HiDe(adapter, config)
    alone = [HiDe(adapter, config).entities(question) for question in questions]
    assert hide.entities_of(questions) == alone
    monkeypatch.setattr(hide._extract, "_replies", None)
    assert hide.entities_of(questions) == alone


def test_a_generation_config_that_only_generate_serves_is_refused(adapter, monkeypatch):
    monkeypatch.setattr(adapter.model.generation_config, "no_repeat_ngram_size", 2)
    with pytest.raises(ValueError, match="no_repeat_ngram_size"):
        greedy_settings(adapter.model.generation_config)
    assert not supports_static_decode(adapter)
    config = preset(entities_from="model", max_entity_tokens=5)
    assert len(HiDe(adapter, config).entities_of([QUESTION, "Where is the moon?"])) == 2


# Robustness


def failing_above(monkeypatch, most, error):
    extend, sent = engine.extend, []

    def limited(model, cache, ids, *args, **kwargs):
        if ids.shape[1] > most:
            # As on a device: some layers have written already.
            extend(model, cache, ids, *args, **{**kwargs, "layers": kwargs["layers"][:2]})
            raise error
        sent.append(ids.shape[1])
        return extend(model, cache, ids, *args, **kwargs)

    monkeypatch.setattr(engine, "extend", limited)
    return sent


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
    ],
)
def test_out_of_memory_halves_the_chunk_and_the_result_is_the_same(adapter, monkeypatch, error):
    pictures = preprocessed(adapter, [(420, 390)])
    ids = adapter.input_ids(QUESTION, pictures)
    want = stock_logits(adapter, ids, pictures)
    sent = failing_above(monkeypatch, 70, error)
    with ImageSession(adapter, pictures, run=RunSettings(prefill_chunk=300)) as session:
        assert max(sent) <= 70 and sum(sent) == session.length and len(sent) > 1
        with session.branch(ids) as branch:
            assert (branch.logits() - want).abs().max() < 1e-4


def test_out_of_memory_for_good_says_sizes_and_what_to_do(adapter, pictures, monkeypatch):
    failing_above(monkeypatch, 3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"))
    with pytest.raises(MemoryError, match=r"tokens behind 0 do not fit .* 9 GiB\); lower max_tokens"):
        ImageSession(adapter, pictures)
    monkeypatch.undo()
    with ImageSession(adapter, pictures) as session:
        failing_above(monkeypatch, 3, torch.OutOfMemoryError("x"))
        with pytest.raises(MemoryError):
            session.attention(session.turn("star"), layers=(1,), causal=False)
        monkeypatch.undo()
        session.attention(session.turn("star"), layers=(1,), causal=False)


def test_other_errors_of_a_forward_are_not_taken_for_short_memory(adapter, pictures, monkeypatch):
    failing_above(monkeypatch, 3, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        ImageSession(adapter, pictures)


def test_pictures_without_pixels_for_the_encoder_to_fit_say_so(adapter, pictures, monkeypatch):
    def encode(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(adapter, "encode", encode)
    with pytest.raises(MemoryError, match="encoding images of .* do not fit"):
        ImageSession(adapter, pictures)


def test_wrong_prompts_are_named(adapter, pictures, collage):
    session = ImageSession(adapter, pictures)
    ids = adapter.input_ids(QUESTION, pictures)
    for wrong in (ids[:, : session.length], ids[:, 5:], adapter.input_ids(QUESTION)):
        with pytest.raises(ValueError, match="do not go on behind"), session.branch(wrong):
            pass
    with pytest.raises(ValueError, match="one sequence"), session.branch(ids.expand(2, -1)):
        pass
    with session.branch(ids), pytest.raises(RuntimeError, match="open already"), session.branch(ids):
        pass
    with pytest.raises(ValueError, match="one sequence"):
        Prefix(adapter, ids.expand(2, -1))
    with pytest.raises(ValueError, match="at least one in each"):
        empty = ImageInputs((ImageInput(torch.zeros(0, 1176), (1, 0, 4), (0, 2), 0),))
        ImageSession(adapter, empty)
    with pytest.raises(ValueError, match="prefill_chunk"):
        Prefix(adapter, adapter.image_prefix(pictures), pictures, prefill_chunk=0)
    session.close()
    with pytest.raises(RuntimeError, match="closed"), session.branch(ids):
        pass


def test_a_question_beyond_the_models_positions_is_refused_and_the_session_lives(adapter, pictures):
    with ImageSession(adapter, pictures) as session:
        with pytest.raises(ValueError, match="shorten it"):
            session.ask("star " * 40_000, max_new_tokens=2)
        assert session.ask(QUESTION, max_new_tokens=2).tokens > 2


def test_weight_only_quantised_layers_serve_a_session(pictures):
    """Nothing reads a weight by itself: int8 weights that only their own forward can use give the same both ways."""

    class Int8(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
            self.integers = (linear.weight / self.scale).round().to(torch.int8)
            self.bias = linear.bias

        def forward(self, x):
            return torch.nn.functional.linear(x, self.integers.float() * self.scale, self.bias)

    model, tokenizer, processor = build()
    randomise(model)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for owner, name in [(layer.self_attn, "q_proj"), (layer.self_attn, "v_proj"), (layer.mlp, "down_proj")]:
                setattr(owner, name, Int8(getattr(owner, name)))
    adapter = Qwen25VL(model, tokenizer, processor)
    ids = adapter.input_ids(QUESTION, pictures)
    with ImageSession(adapter, pictures) as session, session.branch(ids) as branch:
        assert (branch.logits() - stock_logits(adapter, ids, pictures)).abs().max() < 1e-4


def test_a_model_that_accelerate_moves_layer_by_layer_serves_a_session(adapter, pictures, collage):
    accelerate = pytest.importorskip("accelerate")
    ids = adapter.input_ids(QUESTION, pictures + collage)
    want = generate_ids(adapter, ids, pictures + collage, max_new_tokens=6)
    model, tokenizer, processor = build()
    randomise(model)
    model.generation_config.repetition_penalty = 1.05
    moved = Qwen25VL(accelerate.cpu_offload(model, execution_device=torch.device("cpu")), tokenizer, processor)
    with ImageSession(moved, pictures) as session:
        assert session.reply(ids, collage, max_new_tokens=6) == want


# Several pictures


def test_a_pool_closes_what_was_used_least_recently(adapter):
    sizes = {name: [(224 + 56 * i, 230)] for i, name in enumerate("abc")}
    opened = []

    def opener(name):
        def open_session():
            opened.append(name)
            return ImageSession(adapter, preprocessed(adapter, sizes[name]), room=8)

        return open_session

    one = opener("c")().nbytes
    opened.clear()
    pool = SessionPool(2 * one)
    a = pool.get("a", opener("a"))
    b = pool.get("b", opener("b"))
    assert pool.get("a", opener("a")) is a and opened == ["a", "b"]
    pool.get("c", opener("c"))
    assert b.closed and not a.closed and len(pool) == 2 and pool.nbytes <= 2 * one
    pool.budget = 0
    last = pool.get("b", opener("b"))
    assert len(pool) == 1 and not last.closed and opened == ["a", "b", "c", "b"]
    pool.close()
    assert last.closed and pool.nbytes == 0
    with pytest.raises(ValueError, match="budget"):
        SessionPool(-1)


def test_a_pool_gives_way_where_memory_is_too_short_for_a_new_session(adapter, pictures):
    pool = SessionPool(1 << 40)
    first = pool.get("a", lambda: ImageSession(adapter, pictures))
    tries = []

    def short():
        tries.append(first.closed)
        if not first.closed:
            raise MemoryError
        return ImageSession(adapter, pictures)

    assert not pool.get("b", short).closed and tries == [False, True] and len(pool) == 1


def test_a_closed_session_frees_its_memory(adapter, pictures):
    session = ImageSession(adapter, pictures)
    session.ask(QUESTION, max_new_tokens=2)
    sizes = {tuple(layer._buffers[0].shape) for layer in session.cache.layers}
    session.close()
    gc.collect()
    held = [o for o in gc.get_objects() if type(o) is torch.Tensor and tuple(o.shape) in sizes]
    assert not held and session.nbytes == 0


# The cache itself


def test_the_cache_answers_transformers_questions_about_its_length():
    cache = PreallocatedCache(2, 4)
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    keys = torch.arange(2 * 3 * 5 * 2.0).reshape(2, 3, 5, 2)
    for layer in range(2):
        got, _ = cache.update(keys, -keys, layer)
        assert torch.equal(got, keys)
    assert cache.get_seq_length() == 5 and cache.layers[0].capacity == 256
    cache.layers[0].crop(-2)
    cache.layers[1].crop(3)
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 3]
    cache.layers[0].crop(0)
    got, values = cache.update(keys[:, :, :1] + 100, keys[:, :, :1], 0)
    assert torch.equal(got, torch.cat([keys[:, :, :3], keys[:, :, :1] + 100], 2)) and values.shape == got.shape
    cache.rewind(1)
    assert [layer.get_seq_length() for layer in cache.layers] == [1, 1]


# On a GPU


@pytest.mark.gpu
def test_a_replayed_graph_decodes_what_generate_decodes(pictures, collage):
    model, tokenizer, processor = build()
    randomise(model)
    model.generation_config.repetition_penalty = 1.05
    adapter = Qwen25VL(model.double().cuda(), tokenizer, processor)
    assert prefers_static_decode(adapter)
    ids = adapter.input_ids(QUESTION, pictures + collage)
    want = generate_ids(adapter, ids, pictures + collage, max_new_tokens=21)
    with ImageSession(adapter, pictures) as session:
        for _ in range(2):
            assert session.reply(ids, collage, max_new_tokens=21, static=True) == want
        assert session.reply(ids, collage, max_new_tokens=21, static=False) == want


@pytest.mark.gpu
def test_a_model_spread_over_gpu_and_cpu_serves_a_session(adapter, pictures, collage):
    accelerate = pytest.importorskip("accelerate")
    ids = adapter.input_ids(QUESTION, pictures + collage)
    want = generate_ids(adapter, ids, pictures + collage, max_new_tokens=6)
    model, tokenizer, processor = build()
    randomise(model)
    model.generation_config.repetition_penalty = 1.05
    places = {"model.visual": 0, "model.language_model.embed_tokens": 0, "model.language_model.norm": "cpu", "lm_head": "cpu",
              "model.language_model.rotary_emb": 0}  # fmt: skip
    places |= {f"model.language_model.layers.{i}": 0 if i < 3 else "cpu" for i in range(6)}
    spread = Qwen25VL(accelerate.dispatch_model(model, places), tokenizer, processor)
    assert not prefers_static_decode(spread)
    with ImageSession(spread, pictures) as session:
        assert session.reply(ids, collage, max_new_tokens=6) == want


# Settings, attention and prompts that are not the usual ones


def test_one_branch_answers_any_questions_in_any_order(adapter, pictures):
    ids = adapter.input_ids(QUESTION, pictures)
    want = generate_ids(adapter, ids, pictures, max_new_tokens=5)
    logits = stock_logits(adapter, ids, pictures)
    with ImageSession(adapter, pictures) as session, session.branch(ids) as branch:
        for static in (False, True):
            assert branch.reply(5, static=static) == want
            assert (branch.logits() - logits).abs().max() < 1e-4
            assert branch.reply(5, static=static) == want
            assert (branch.logits() - logits).abs().max() < 1e-4
        # More than the room that the cache began with.
        long = branch.reply(300, static=True)
        assert len(long) == 300 or long[-1] in greedy_settings(adapter.model.generation_config).ends


def test_a_margin_is_of_the_scores_that_the_choice_is_made_by(adapter, pictures):
    """A repetition penalty lowers those of tokens that the prompt has."""
    ids = adapter.input_ids(QUESTION, pictures)
    scores = stock_logits(adapter, ids, pictures)[0]
    seen = ids[0].unique()
    scores[seen] = torch.where(scores[seen] < 0, scores[seen] * 1.05, scores[seen] / 1.05)
    best, second = scores.topk(2).values.tolist()
    with ImageSession(adapter, pictures) as session, session.branch(ids) as branch:
        assert branch.margin is None
        for static in (False, True):
            branch.reply(2, static=static)
            assert branch.margin == pytest.approx(best - second, abs=2e-4)


def test_eager_attention_is_decoded_by_generate_alone(pictures):
    """A mask of True and False would be added to its scores."""
    model, tokenizer, processor = build()
    randomise(model).set_attn_implementation("eager")
    eager = Qwen25VL(model, tokenizer, processor)
    ids = eager.input_ids(QUESTION, pictures)
    assert not supports_static_decode(eager) and not prefers_static_decode(eager)
    with ImageSession(eager, pictures) as session:
        assert session.reply(ids, max_new_tokens=5) == generate_ids(eager, ids, pictures, max_new_tokens=5)
        with pytest.raises(ValueError, match="fixed shapes want SDPA"):
            session.reply(ids, max_new_tokens=5, static=True)
    config = preset(entities_from="model", max_entity_tokens=6)
    questions = [QUESTION, "Where is the moon?"]
    assert HiDe(eager, config).entities_of(questions) == [HiDe(eager, config).entities(q) for q in questions]


@every_size
@pytest.mark.parametrize("chunk", [4096, 37])
def test_layers_with_a_sliding_window_keep_it(pictures, chunk):
    model, tokenizer, processor = build()
    text = model.config.text_config
    text.use_sliding_window, text.sliding_window = True, 40
    text.layer_types = ["full_attention", "sliding_attention"] * 3
    windowed = Qwen25VL(randomise(type(model)(model.config)), tokenizer, processor)
    windowed.model.generation_config = model.generation_config
    ids = windowed.input_ids(QUESTION, pictures)
    assert not supports_static_decode(windowed)
    with ImageSession(windowed, pictures, run=RunSettings(prefill_chunk=chunk)) as session:
        with session.branch(ids) as branch:
            assert (branch.logits() - stock_logits(windowed, ids, pictures)).abs().max() < 1e-4
        assert session.reply(ids, max_new_tokens=5) == generate_ids(windowed, ids, pictures, max_new_tokens=5)


@pytest.mark.parametrize(
    "name, value", [("use_cache", False), ("cache_implementation", "static"), ("return_dict_in_generate", True)]
)
def test_settings_of_a_checkpoint_that_are_not_for_sessions_do_not_reach_them(
    adapter, pictures, monkeypatch, name, value
):
    ids = adapter.input_ids(QUESTION, pictures)
    want = generate_ids(adapter, ids, pictures, max_new_tokens=6)
    monkeypatch.setattr(adapter.model.generation_config, name, value)
    with ImageSession(adapter, pictures) as session:
        assert session.reply(ids, max_new_tokens=6, static=False) == want


@pytest.mark.parametrize(
    "name, value", [("min_new_tokens", 1), ("no_repeat_ngram_size", 1), ("forced_eos_token_id", 0)]
)
def test_small_numbers_are_settings_too(adapter, monkeypatch, name, value):
    monkeypatch.setattr(adapter.model.generation_config, name, value)
    with pytest.raises(ValueError, match=name):
        greedy_settings(adapter.model.generation_config)


def test_pictures_and_their_places_in_the_ids_must_agree(adapter, pictures, collage):
    with ImageSession(adapter, pictures) as session:
        both, plain = adapter.input_ids(QUESTION, pictures + collage), adapter.input_ids(QUESTION, pictures)
        for ids, more in ((both, None), (plain, collage)):
            with pytest.raises(ValueError, match="image tokens, want"), session.branch(ids, more):
                pass
    with pytest.raises(ValueError, match=r"got \d+ image tokens, want 0"):
        Prefix(adapter, plain)


def test_features_of_other_pictures_are_refused(adapter, pictures):
    shown, features = encode(adapter, pictures)
    with ImageSession(adapter, shown, features=features) as session, ImageSession(adapter, pictures) as alone:
        ids = adapter.input_ids("What is it?", pictures)
        assert session.reply(ids, max_new_tokens=4) == alone.reply(ids, max_new_tokens=4)
    for tokens in (1, 2 * len(features.embeddings)):
        with pytest.raises(ValueError, match=f"features: got {tokens} tokens"):
            ImageSession(
                adapter, shown, features=features._replace(embeddings=features.embeddings.new_zeros(tokens, 8))
            )
    with pytest.raises(ValueError, match="features: got"):
        Prefix(adapter, adapter.input_ids("What?"), features=features)


def test_no_pixels_are_held(pictures):
    kept = pictures.without_pixels()
    assert all(picture.pixels.untyped_storage().nbytes() == 0 for picture in kept.items)


def test_what_this_machine_says_when_memory_is_short_is_understood():
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    assert out_of_memory(error.value)


def test_a_cache_that_could_not_grow_serves_on(adapter, pictures, collage, monkeypatch):
    ids = adapter.input_ids(QUESTION, pictures + collage)
    want = generate_ids(adapter, ids, pictures + collage, max_new_tokens=4)
    with ImageSession(adapter, pictures, room=0) as session:
        real, calls = torch.Tensor.new_empty, []

        def short(tensor, *size):
            calls.append(size)
            if len(calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(tensor, *size)

        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "new_empty", short)
            with pytest.raises(MemoryError, match="keys and values of"), session.branch(ids, collage, room=5000):
                pass
        assert session.reply(ids, collage, max_new_tokens=4) == want


def test_more_prompts_than_go_side_by_side_are_all_answered(adapter, monkeypatch):
    monkeypatch.setattr(engine, "MAX_BATCH", 2)
    prompts = [adapter.input_ids(f"List: {word}") for word in ("star", "ring", "a moon")]
    prefix = Prefix(adapter, prompts[0][:, :4])
    assert prefix.replies(prompts, max_new_tokens=5) == [generate_ids(adapter, p, max_new_tokens=5) for p in prompts]
    assert prefix.replies([], max_new_tokens=5) == []


def test_an_extractor_of_the_users_is_not_mixed_up_with_another(adapter):
    for word in ("star", "moon"):
        assert HiDe(adapter, preset(), extractor=lambda text, word=word: word).entities(QUESTION).items == (word,)


def test_a_capture_around_several_branches_holds_the_last_ones_rows(adapter, pictures):
    with ImageSession(adapter, pictures) as session:
        turn = session.turn("star, ring")
        span = [image.span for image in turn.images]
        want = session.attention(turn, layers=(2,), causal=True)
        with capture_attention(adapter.model, layers=[2], queries=turn.rows, key_spans=span) as captured:
            for _ in range(2):
                with session.branch(turn.input_ids) as branch:
                    branch.run()
    got = rows_to_maps(captured[2].weights[0], turn.images)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=0)
