"""Keys and values on the host: the same bits as on the device, however late copies and kernels are."""

import gc
import sys
from collections import defaultdict
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import hide.engine.kv_cache
from hide import HiDe, HiDeConfig, Preset
from hide.engine.kv_cache import CopyStream, HostLayer, OffloadedCache, PreallocatedCache
from hide.engine.prefix import Prefix
from hide.engine.stock import generate_ids
from hide.methods.base import AnswerSettings
from hide.session import ImageSession, RunSettings
from hide.session_pool import SessionPool
from hide_kernels.memory import predict, profile, stage

QUESTION = "What is the color of the star?"
OFFLOADED = RunSettings(offload_kv=True)


@pytest.fixture(scope="module", params=FAMILIES)
def adapter(request):
    made = FAMILIES[request.param]()
    # Random weights may well end a reply at once.
    made.model.generation_config.eos_token_id = None
    return made


@pytest.fixture(scope="module")
def qwen():
    made = FAMILIES["qwen2_5_vl"]()
    made.model.generation_config.eos_token_id = None
    return made


def preprocessed(adapter, sizes, seed=0):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    return adapter.preprocess(images, min_tokens=30, max_tokens=120)


def bits(session):
    """Of all keys and values, when copies to the host have come."""
    for buffers in getattr(session.cache, "_double_buffers", {}).values():
        buffers.copies.finish()
    return [states.clone() for layer in session.cache.layers for states in (layer.keys, layer.values)]


def everything(adapter, pictures, collage, chunk, offload, room=256):
    """Logits, rows and replies of one session, in an order that leaves copies behind which nobody asks for."""
    found = []
    run = RunSettings(prefill_chunk=chunk, offload_kv=offload)
    with ImageSession(adapter, pictures, run=run, room=room) as session:
        found += bits(session)
        turn = session.turn("star, ring")
        plain, more = adapter.input_ids(QUESTION, pictures), adapter.input_ids(QUESTION, pictures + collage)
        for layers in ((0,), (1, 3), (0, 2)):
            # They leave the decoder early; the next one begins at its first layer again.
            found += session.attention(turn, layers=layers, causal=False)
        with session.branch(more, collage) as branch:
            found.append(branch.logits())
            found.append(torch.tensor(branch.reply(6, static=False)))
            found.append(branch.logits())
        with session.branch(more, collage) as branch:
            # Layers that others left out: their tokens come behind those of the prefix all the same.
            for layers in (range(1), range(1, 3), range(3, adapter.num_layers)):
                found.append(branch.run(layers=layers)[:, -1])
        with pytest.raises(KeyError), session.branch(plain) as branch:
            branch.run(session.length + 2)
            raise KeyError
        found.append(torch.tensor(session.reply(plain, max_new_tokens=5, static=False)))
        found += session.attention(turn, layers=None)
        found += [torch.tensor(reply) for reply in session.replies([plain, plain[:, :-1]], max_new_tokens=4)]
        found += bits(session)
    return found


def assert_same_bits(got, want):
    assert len(got) == len(want)
    for place, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(mine, theirs), place


@pytest.mark.parametrize("chunk", [4096, 37])
def test_logits_rows_and_replies_have_the_bits_of_the_cache_on_the_device(adapter, chunk):
    pictures, collage = preprocessed(adapter, [(263, 421)]), preprocessed(adapter, [(170, 121)], seed=9)
    want = everything(adapter, pictures, collage, chunk, offload=False)
    assert_same_bits(everything(adapter, pictures, collage, chunk, offload=True), want)


# -- streams, simulated -----------------------------------------------------------------------------------------------


class Machine(TorchDispatchMode):
    """A device, a copy engine and a host that only wait for each other where they are told to.

    A copy is made when somebody waits for it and not before; until then its destination is poison. Every access to a
    cache's memory is kept with a vector clock: two of which one writes, and that no wait brings into an order, are a
    race, whoever may have been first here.
    """

    def __init__(self, without=None):
        super().__init__()
        self.without, self.who, self.races = without, "compute", []
        self.clocks = {who: defaultdict(int) for who in ("compute", "copies", "host")}
        self.kept, self.accesses, self.late = {}, defaultdict(list), []

    def keep(self, buffer):
        """Follow a new buffer; it stays, so that nothing else comes to its place. Memory comes with others' bytes."""
        self.kept[buffer.untyped_storage().data_ptr()] = buffer
        return buffer.fill_(torch.nan)

    @contextmanager
    def acting(self, who):
        before, self.who = self.who, who
        try:
            yield
        finally:
            self.who = before

    def wait(self, who, whom):
        if sys._getframe(2).f_code.co_name == self.without:
            return
        for other, time in self.clocks[whom].items():
            self.clocks[who][other] = max(self.clocks[who][other], time)
        if whom == "copies":
            with self.acting(None):
                for to, source in self.late:
                    to.copy_(source)
            self.late.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if self.who is not None and not view:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if isinstance(value, torch.Tensor):
                    self.access(value, argument.alias_info is not None and argument.alias_info.is_write)
        return func(*args, **(kwargs or {}))

    def access(self, tensor, writes):
        buffer = self.kept.get(tensor.untyped_storage().data_ptr())
        if buffer is None or not tensor.numel():
            return
        size = buffer.permute(2, 0, 1, 3)[0].numel()
        start = tensor.storage_offset() // size
        end = (
            tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        ) // size + 1
        mine = self.clocks[self.who]
        # Whatever is asked for comes after all that the host has done and waited for.
        for other, time in self.clocks["host"].items():
            mine[other] = max(mine[other], time)
        mine[self.who] += 1
        place = tensor.untyped_storage().data_ptr()
        for first, last, who, time, wrote in self.accesses[place]:
            if who != self.who and (writes or wrote) and first < end and start < last and mine[who] < time:
                self.races.append((who, "wrote" if wrote else "read", self.who, "writes" if writes else "reads"))
        # What everybody knows of is in order with all that comes.
        known = [all(clock[a[2]] >= a[3] for clock in self.clocks.values()) for a in self.accesses[place]]
        self.accesses[place] = [a for a, old in zip(self.accesses[place], known, strict=True) if not old]
        self.accesses[place].append((start, end, self.who, mine[self.who], writes))


@pytest.fixture
def machine(monkeypatch):
    def make(without=None):
        simulated = Machine(without)

        class Copies(CopyStream):
            def wait_for_compute(self):
                simulated.wait("copies", "compute")

            def let_compute_wait(self):
                simulated.wait("compute", "copies")

            def finish(self):
                simulated.wait("host", "copies")

            def copy(self, to, source):
                for part in (to, source):
                    assert part.is_contiguous(), "anything else takes memory and makes the host wait"
                with simulated.acting("copies"):
                    simulated.access(source, False)
                    simulated.access(to, True)
                with simulated.acting(None):
                    to.fill_(torch.nan)
                simulated.late.append((to, source))

        make_room, grow = hide.engine.kv_cache._token_by_token, HostLayer.reserve

        def followed(like, capacity, device, **kwargs):
            return simulated.keep(make_room(like, capacity, device, **kwargs))

        def reserve(layer, capacity):
            with simulated.acting("host"):
                grow(layer, capacity)

        monkeypatch.setattr(hide.engine.kv_cache, "CopyStream", Copies)
        monkeypatch.setattr(hide.engine.kv_cache, "_token_by_token", followed)
        monkeypatch.setattr(HostLayer, "reserve", reserve)
        return simulated

    return make


def forwards(cache, layers=5):
    """A decoder's use of a cache: pieces, early exits, tokens one by one, going back, growing. Sums of what it read."""
    generator = torch.Generator().manual_seed(0)
    seen = []

    def forward(tokens, depth=layers):
        for layer in range(depth):
            # Whole numbers: their sums are exact.
            new = torch.randint(-99, 99, (2, 1, 2, tokens, 4), generator=generator).float()
            keys, values = cache.update(*new, layer)
            seen.append((keys.sum((2, 3)) + 2 * values.cumsum(2).sum((2, 3))).tolist())

    for tokens in (7, 5):
        forward(tokens)
    for depth in range(1, layers + 1):
        forward(3, depth)
        cache.rewind(12)
        forward(1)
        forward(1, depth)
        cache.rewind(12)
    forward(300)
    cache.rewind(4)
    cache.reserve(700)
    forward(2)
    return seen


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_nothing_races_and_every_copy_has_come_when_it_is_read(machine, layers):
    want = forwards(PreallocatedCache(layers, 16), layers)
    with machine() as simulated:
        got = forwards(OffloadedCache(layers, 16), layers)
    assert got == want and simulated.races == []


@pytest.mark.parametrize("caller", ["take", "fetch", "store", "_reserve"])
def test_no_wait_is_there_for_nothing(machine, caller):
    with machine(without=caller) as simulated:
        forwards(OffloadedCache(5, 16))
    assert simulated.races


@pytest.mark.parametrize("chunk, room", [(4096, 256), (37, 1)])
def test_a_session_without_races_gives_the_same_bits(qwen, machine, chunk, room):
    pictures, collage = preprocessed(qwen, [(400, 300)]), preprocessed(qwen, [(170, 121)], seed=9)
    want = everything(qwen, pictures, collage, chunk, offload=False, room=room)
    with machine() as simulated:
        got = everything(qwen, pictures, collage, chunk, offload=True, room=room)
    assert simulated.races == []
    assert_same_bits(got, want)


# -- the cache and its session ----------------------------------------------------------------------------------------


def test_two_layers_lie_on_the_device_and_all_on_the_host(qwen):
    pictures = preprocessed(qwen, [(400, 300)])
    with ImageSession(qwen, pictures) as session, ImageSession(qwen, pictures, run=OFFLOADED) as offloaded:
        whole, layers = session.nbytes, qwen.num_layers
        assert offloaded.nbytes * layers == 2 * whole and offloaded.cache.host_nbytes == whole
        pool = SessionPool(whole)
        for name in range(5):
            pool.get(name, lambda: ImageSession(qwen, pictures, run=OFFLOADED))
        assert len(pool) == layers // 2 == 2
        pool.close()
    assert offloaded.nbytes == 0


def test_the_cache_goes_back_and_grows_as_transformers_asks():
    cache = OffloadedCache(2, 4)
    assert cache.get_seq_length() == 0 and cache.nbytes == cache.host_nbytes == 0
    keys = torch.arange(2 * 3 * 5 * 2.0).reshape(2, 3, 5, 2)
    for layer in range(2):
        got, _ = cache.update(keys, -keys, layer)
        assert torch.equal(got, keys)
    assert cache.get_seq_length() == 5 and cache.layers[0].capacity == 256
    cache.layers[0].crop(-2)
    cache.layers[1].crop(3)
    got, values = cache.update(keys[:, :, :1] + 100, keys[:, :, :1], 0)
    assert torch.equal(got, torch.cat([keys[:, :, :3], keys[:, :, :1] + 100], 2)) and values.shape == got.shape
    cache.rewind(1)
    assert [layer.get_seq_length() for layer in cache.layers] == [1, 1]


def test_layers_of_other_shapes_have_pairs_of_their_own():
    """So have layers on other devices, which are told apart in the same way."""
    plain, offloaded = PreallocatedCache(4, 8), OffloadedCache(4, 8)
    for tokens in (3, 1, 9):
        for layer, heads in enumerate((2, 1, 1, 2)):
            new = torch.randn(2, 1, heads, tokens, 4)
            assert_same_bits(offloaded.update(*new, layer), plain.update(*new, layer))
    assert len(offloaded._double_buffers) == 2 and offloaded.nbytes == plain.nbytes


@pytest.mark.parametrize("fails_at", range(1, 20, 3))
def test_where_memory_is_too_short_to_grow_the_old_buffers_stay_in_force(qwen, monkeypatch, fails_at):
    pictures, collage = preprocessed(qwen, [(400, 300)]), preprocessed(qwen, [(170, 121)], seed=9)
    ids = qwen.input_ids(QUESTION, pictures + collage)
    want = generate_ids(qwen, ids, pictures + collage, max_new_tokens=4)
    with ImageSession(qwen, pictures, run=OFFLOADED, room=0) as session:
        real, calls = hide.engine.kv_cache._token_by_token, []

        def short(*args, **kwargs):
            calls.append(args)
            if len(calls) == fails_at:
                raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
            return real(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(hide.engine.kv_cache, "_token_by_token", short)
            # Two for each of the layers and four for the pairs.
            if fails_at <= 2 * qwen.num_layers + 4:
                with pytest.raises(MemoryError, match="keys and values of"), session.branch(ids, collage, room=5000):
                    pass
        assert session.reply(ids, collage, max_new_tokens=4) == want


def test_a_prefill_that_does_not_fit_goes_on_in_smaller_pieces(qwen, monkeypatch):
    pictures = preprocessed(qwen, [(400, 300)])
    ids = qwen.input_ids(QUESTION, pictures)
    want = generate_ids(qwen, ids, pictures, max_new_tokens=5)
    real = OffloadedCache.update

    def short(cache, key, value, layer, *args, **kwargs):
        if key.shape[2] > 70 and layer == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(cache, key, value, layer, *args, **kwargs)

    monkeypatch.setattr(OffloadedCache, "update", short)
    with ImageSession(qwen, pictures, run=OFFLOADED) as session:
        assert session.reply(ids, max_new_tokens=5) == want


def test_fixed_shapes_are_refused_and_taken_by_nobody_who_did_not_ask(qwen, monkeypatch):
    pictures = preprocessed(qwen, [(400, 300)])
    ids = qwen.input_ids(QUESTION, pictures)
    monkeypatch.setattr("hide.engine.prefix.prefers_static_decode", lambda model: True)
    with ImageSession(qwen, pictures, run=OFFLOADED) as session:
        with pytest.raises(ValueError, match="keys and values are in host memory"):
            session.reply(ids, max_new_tokens=4, static=True)
        assert session.reply(ids, max_new_tokens=4) == generate_ids(qwen, ids, pictures, max_new_tokens=4)
        with pytest.raises(ValueError, match="one after another"):
            session.cache.copy_for(2, 999)


def test_prompts_are_answered_one_after_another(qwen):
    prompts = [qwen.input_ids(f"List: {word}") for word in ("star", "ring", "a moon")]
    with Prefix(qwen, prompts[0][:, :4], offload=True) as prefix:
        want = [generate_ids(qwen, ids, max_new_tokens=5) for ids in prompts]
        assert prefix.replies(prompts, max_new_tokens=5) == want


def test_the_pipeline_answers_the_same(qwen):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (300, 260, 3), dtype=np.uint8))
    results = []
    for offload_kv in (False, True):
        config = HiDeConfig(layers=(1,), sigma=1, threshold=0.5, entities_from="rules")
        run = RunSettings(min_tokens=30, max_tokens=120, offload_kv=offload_kv)
        hide_ = HiDe(qwen, Preset(config, run, AnswerSettings(max_new_tokens=6)))
        with hide_.open(image) as session:
            assert session.cache.offloaded == offload_kv
            results.append(hide_.ask(session, QUESTION).to_dict())
            results[-1].pop("seconds")
    assert results[0] == results[1]


# -- what is counted --------------------------------------------------------------------------------------------------


def test_a_prediction_of_an_offloaded_session_is_the_measurement_to_the_byte(qwen):
    text = qwen.model.config.get_text_config()
    heads = text.num_key_value_heads
    channels = text.hidden_size // text.num_attention_heads
    ids = torch.randint(20, 500, (1, 300))

    def run(offload):
        with stage("prefill"):
            prefix = Prefix(qwen, ids[:, :250], prefill_chunk=64, room=90, offload=offload)
        with prefix, stage("next token"), prefix.branch(ids) as branch:
            branch.logits()

    live = {}
    for offload in (False, True):
        with profile(qwen.model) as measured:
            run(offload)
        with predict(qwen.model, rounding=1) as predicted:
            run(offload)
        stages = [[(stage.name, stage.peak, stage.live) for stage in r.report.stages] for r in (measured, predicted)]
        assert stages[0] == stages[1] and measured.report.peak == predicted.report.peak
        live[offload] = measured.report.stages[0].live
    layer = 2 * heads * channels * 4 * (250 + 90)
    assert live[False] - live[True] == (qwen.num_layers - 2) * layer


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("late", ["nothing", "copies", "kernels"])
@pytest.mark.parametrize("chunk, room", [(4096, 256), (37, 1)])
def test_on_a_gpu_logits_rows_and_replies_are_the_same_whoever_is_late(monkeypatch, late, chunk, room):
    adapter = FAMILIES["qwen2_5_vl"]()
    adapter.model.generation_config.eos_token_id = None
    adapter.model.double().cuda()
    pictures, collage = preprocessed(adapter, [(400, 300)]), preprocessed(adapter, [(170, 121)], seed=9)
    want = everything(adapter, pictures, collage, chunk, offload=False, room=room)
    copy, update = CopyStream.copy, OffloadedCache.update

    def late_copy(stream, to, source):
        with torch.cuda.stream(stream._stream):
            torch.cuda._sleep(300_000)
        copy(stream, to, source)

    def late_kernels(cache, *args, **kwargs):
        found = update(cache, *args, **kwargs)
        # The layer's attention, which reads what was found, comes behind it.
        torch.cuda._sleep(1_000_000)
        return found

    if late == "copies":
        monkeypatch.setattr(CopyStream, "copy", late_copy)
    elif late == "kernels":
        monkeypatch.setattr(OffloadedCache, "update", late_kernels)
    got = everything(adapter, pictures, collage, chunk, offload=True, room=room)
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        # Tokens lie in another order, and kernels may sum in another.
        torch.testing.assert_close(mine.cpu(), theirs.cpu(), atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
def test_on_a_gpu_two_layers_are_held_and_the_host_has_pinned_memory():
    adapter = FAMILIES["qwen2_5_vl"]()
    adapter.model.cuda()
    pictures = preprocessed(adapter, [(400, 300)])
    with ImageSession(adapter, pictures, run=OFFLOADED, room=20_000) as session:
        assert all(buffer.is_pinned() for layer in session.cache.layers for buffer in layer._buffers)
        before, held = torch.cuda.memory_allocated(), session.nbytes
        session.close()
        gc.collect()
        assert before - torch.cuda.memory_allocated() == pytest.approx(held, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("other", ["cpu", 1])
def test_a_model_spread_over_devices_serves_an_offloaded_session(qwen, other):
    accelerate = pytest.importorskip("accelerate")
    if other == torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    pictures, collage = preprocessed(qwen, [(400, 300)]), preprocessed(qwen, [(170, 121)], seed=9)
    ids = qwen.input_ids(QUESTION, pictures + collage)
    want = generate_ids(qwen, ids, pictures + collage, max_new_tokens=6)
    spread = FAMILIES["qwen2_5_vl"]()
    spread.model.generation_config.eos_token_id = None
    places = {"model.visual": 0, "model.language_model.embed_tokens": 0, "model.language_model.norm": other,
              "lm_head": other, "model.language_model.rotary_emb": 0}  # fmt: skip
    places |= {f"model.language_model.layers.{i}": 0 if i < 2 else other for i in range(4)}
    accelerate.dispatch_model(spread.model, places)
    with ImageSession(spread, pictures, run=OFFLOADED) as session:
        assert session.reply(ids, collage, max_new_tokens=6) == want
        assert len(session.cache._double_buffers) == (1 if other == "cpu" else 2), (
            "accelerate computes on a GPU where it can"
        )
