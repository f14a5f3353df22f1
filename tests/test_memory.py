"""Peak memory: storages against torch's own allocator events, predictions against measurements, owners against the code."""

import inspect
import json
import time
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from random_models import llm, prompt, qwen2_5_vl, rope
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hide.engine.kv_cache import cache_keyword
from hide_kernels.memory import current_stage, host_memory, predict, profile, stage

KIB = 1024


def allocated_by_torch(run):
    """Peak and end of the bytes that the CPU allocator hands out while `run` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    totals = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(totals), totals[-1]


def step_of_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(65, 257), nn.GELU(), nn.LayerNorm(257), nn.Dropout(0.1), nn.Linear(257, 33))
    optimiser = torch.optim.AdamW(model.parameters())

    def run():
        for _ in range(3):
            with stage("forward"):
                loss = model(torch.randn(101, 65)).square().mean()
            with stage("backward"):
                loss.backward()
            with stage("update"):
                optimiser.step()
                optimiser.zero_grad()

    return run


def attention():
    query, key = torch.randn(1, 6, 117, 32), torch.randn(1, 2, 301, 32)

    def run():
        with stage("fused"):
            F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        with stage("plain"):
            scores = query @ key.repeat_interleave(3, dim=1).transpose(-1, -2)
            scores.div_(32**0.5)
            return torch.softmax(scores.bfloat16(), -1, dtype=torch.float32) @ key.repeat_interleave(3, dim=1)

    return run


def views_and_writes():
    given = torch.randn(301, 129)

    def run():
        part = given[:, 3:].T
        part.mul_(2).add_(part)
        copy = part.contiguous()
        copy[5:, ::3] = 1
        del part
        head, tail = copy.split([40, 86])
        del copy, head
        return torch.addmm(torch.zeros(86, 86), tail, tail.T).relu_()

    return run


def growing_by_cat():
    def run():
        cache = torch.empty(2, 0, 67)
        for _ in range(30):
            cache = torch.cat([cache, torch.ones(2, 5, 67)], dim=1)
        return cache.sum()

    return run


def failing_in_the_middle():
    def run():
        kept = torch.ones(1001)
        try:
            other = kept[:, None].expand(-1, 5).contiguous()
            raise KeyError(other.shape)
        except KeyError:
            kept = kept + 1
        return torch.cat([kept, kept])

    return run


FLOWS = [step_of_training, attention, views_and_writes, growing_by_cat, failing_in_the_middle]


@pytest.mark.parametrize("flow", FLOWS)
def test_the_cpu_peak_is_that_of_torchs_own_allocator_events(flow):
    flow()()  # what torch allocates once only
    peak, end = allocated_by_torch(flow_run := flow())
    del flow_run
    run = flow()
    with profile() as recording:
        run()
    report = recording.report
    # Memory that existed is in the report's figures, and not among the events.
    assert (report.peak - report.start, report.live - report.start) == (peak, end)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_prediction_equals_the_measurement(flow):
    run = flow()
    with profile() as measured:
        run()
    run = flow()
    with predict(rounding=1) as predicted:
        run()
    measured, predicted = measured.report, predicted.report
    assert (predicted.peak, predicted.live, predicted.start) == (measured.peak, measured.live, measured.start)
    assert [(s.name, s.calls, s.peak, s.live) for s in predicted.stages] == [
        (s.name, s.calls, s.peak, s.live) for s in measured.stages
    ]


def test_a_whole_vision_language_model_is_predicted_to_the_byte():
    model, inputs = qwen2_5_vl(), prompt("qwen2_5_vl")

    def run():
        with torch.no_grad(), stage("prefill"):
            name = cache_keyword(type(model).forward)
            cache = model(**inputs)[name]
        with torch.no_grad(), stage("decode"):
            model(input_ids=torch.tensor([[9]]), **{name: cache})

    with profile(model) as measured:
        run()
    with predict(model, rounding=1) as predicted:
        run()
    assert predicted.report.peak == measured.report.peak > measured.report.start
    assert [s.peak for s in predicted.report.stages] == [s.peak for s in measured.report.stages]
    assert model.model.language_model.norm.weight.__class__ is nn.Parameter


def test_a_7b_model_is_predicted_without_its_memory():
    config = transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False, dtype=torch.bfloat16, **rope(),
    )  # fmt: skip
    tokens = 16384
    start = time.perf_counter()
    with predict() as recording:
        with stage("weights"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad(), stage("prefill"):
            out = model(input_ids=torch.randint(0, 1000, (1, tokens)), logits_to_keep=1)
    seconds = time.perf_counter() - start
    attention = 2 * 3584 * 3584 + 2 * 512 * 3584 + 3584 + 2 * 512
    parameters = 2 * 152064 * 3584 + 28 * (attention + 3 * 3584 * 18944 + 2 * 3584) + 3584
    weights, prefill = recording.report.stages
    assert sum(p.numel() for p in model.parameters()) == parameters
    # Weights in bfloat16, the inverse frequencies in float32; every tensor is rounded up to 512 bytes.
    assert 0 <= weights.live - 2 * parameters < 1024 * 28 * 12
    cache = 28 * 2 * 4 * tokens * 128 * 2
    assert (
        sum(layer.keys.nbytes + layer.values.nbytes for layer in out[cache_keyword(type(model).forward)].layers)
        == cache
    )
    # In the last MLP: three activations of 18,944 channels, four of 3,584, cosines and sines; ids and positions.
    above = tokens * 2 * (3 * 18944 + 4 * 3584 + 2 * 128) + 2 * tokens * 8
    assert prefill.peak - weights.live - cache == pytest.approx(above, rel=1e-3)
    assert seconds < 60, "fake tensors compute nothing"


def test_weights_count_once_from_the_start_under_their_names():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    given = torch.zeros(1, 64)
    with profile(model, given, owners=True) as recording:
        model[0].weight[3:].view(-1, 1)
        model(given)
    report = recording.report
    assert report.start == 64 * 64 * 4 + 64 * 4
    assert report.peak == report.start + 2 * 64 * 4
    weight = report.owners[0]
    assert (weight.bytes, weight.count, weight.operator, weight.group) == (16 * KIB, 1, "parameter", "weights")
    assert weight.module == "Sequential.*.weight" and weight.shape == (64, 64)


def test_memory_found_late_counts_from_the_start_and_until_it_is_freed():
    late = [torch.zeros(4 * KIB), torch.zeros(KIB)]
    with profile(owners=True) as recording:
        with stage("before it is used"):
            torch.zeros(2 * KIB)
        late[0].sum()
        late.pop(0)
        with stage("after"):
            torch.zeros(2 * KIB)
    first, last = recording.report.stages
    assert (first.peak, last.peak) == (24 * KIB, 8 * KIB)
    assert recording.report.start == recording.report.timeline[0].groups["before"] == 16 * KIB
    assert [owner.operator for owner in first.owners] == ["before", "aten.zeros.default"]


def test_freed_memory_is_subtracted_and_stages_know_what_lives_at_their_end():
    with profile() as recording:
        with stage("a"):
            kept = torch.ones(KIB)
            torch.ones(8 * KIB)
        with stage("b"):
            kept = kept + torch.ones(2 * KIB)[:KIB]
    a, b = recording.report.stages
    assert (a.peak, a.live) == (36 * KIB, 4 * KIB)
    assert (b.peak, b.live) == (16 * KIB, 4 * KIB)
    assert recording.report.peak_stage == "a" and recording.report.live == 4 * KIB


def test_stages_nest_and_repeat():
    def part(size):
        with stage("part"):
            return torch.ones(size)

    part(1)  # nothing records
    with profile() as recording, stage("all"):
        large = part(3 * KIB)
        large = large[:KIB].clone()
        small = part(KIB)
        with recording.stage("end"):
            del small
            torch.ones(2 * KIB)
    outer, parts, end = recording.report.stages
    assert [s.name for s in (outer, parts, end)] == ["all", "all/part", "all/end"]
    assert (parts.calls, parts.peak, parts.live) == (2, 12 * KIB, 8 * KIB)
    assert (outer.calls, outer.peak) == (1, 16 * KIB) and end.peak == large.nbytes + 8 * KIB


class Doubling(nn.Module):
    def forward(self, x):
        wide = torch.cat([x, x], dim=-1)
        return wide.relu().sum()


def test_owners_name_shape_line_and_module_and_add_up_to_the_peak():
    model = nn.ModuleDict({"blocks": nn.Sequential(Doubling())})
    x = torch.zeros(7, 33)
    with profile(model, x, owners=True) as recording:
        model.blocks(x)
        x.add_(1)
        torch.zeros(3)
    report = recording.report
    lines, first = inspect.getsourcelines(Doubling)
    made = {owner.operator: owner for owner in report.owners}
    for operator, text in (("aten.cat.default", "torch.cat"), ("aten.relu.default", "wide.relu()")):
        owner = made[operator]
        line = first + next(i for i, code in enumerate(lines) if text in code)
        assert owner.line == f"{__file__}:{line} forward"
        assert (owner.shape, owner.dtype, owner.bytes) == ((7, 66), "float32", 7 * 66 * 4)
        assert owner.module == "ModuleDict.blocks.*"
    assert sum(owner.bytes for owner in report.owners) == report.peak


def test_owners_are_those_of_the_peak_and_not_of_earlier_or_later():
    with profile(owners=True) as recording:
        torch.ones(4, KIB)
        a = torch.ones(5, KIB)
        b = torch.ones(3, KIB)
        del a
        c = torch.ones(2, KIB)
        del b
        d = torch.ones(1, KIB)
    assert [owner.shape for owner in recording.report.owners] == [(5, KIB), (3, KIB)]
    assert recording.report.live == c.nbytes + d.nbytes


def test_gradients_are_named_after_the_operator_that_they_belong_to():
    weight = torch.randn(65, 65, requires_grad=True)
    with profile(owners=True) as recording:
        (torch.randn(65, 65) @ weight).sum().backward()
    assert "aten.mm.default in MmBackward0" in {owner.operator for owner in recording.report.owners}


def test_equal_tensors_of_a_line_are_one_row():
    with profile(owners=True) as recording:
        kept = [torch.ones(KIB) for _ in range(50)]
    (owner,) = recording.report.owners
    assert (owner.count, owner.bytes) == (50, sum(t.nbytes for t in kept))


def test_a_report_survives_an_exception():
    with pytest.raises(RuntimeError, match="size mismatch"), profile(owners=True) as recording:
        with stage("fine"):
            kept = torch.ones(KIB)
        with stage("outer"), stage("inner"):
            torch.ones(3, 5) @ kept
    report = recording.report
    assert report.error.startswith("RuntimeError in stage outer/inner: ")
    assert [s.name for s in report.stages] == ["fine", "outer", "outer/inner"]
    assert report.peak == 4 * KIB + 60 and report.owners
    with profile() as again:
        torch.ones(KIB)
    assert again.report.error is None and again.report.peak == 4 * KIB


def test_storages_that_change_size_are_counted_anew():
    with profile() as recording:
        x = torch.ones(KIB)
        with stage("grow"):
            x.resize_(3 * KIB)
        with stage("shrink"):
            x.untyped_storage().resize_(0)
            x.resize_(0)
    grow, shrink = recording.report.stages
    assert (grow.peak, grow.live, shrink.live) == (16 * KIB, 12 * KIB, 0)


@pytest.mark.parametrize("record", [profile, predict], ids=["measured", "predicted"])
def test_what_is_the_hosts_is_not_counted_by_one_memory(record):
    with record(owners=True, **({"rounding": 1} if record is predict else {})) as recording:
        kept = torch.ones(1001, dtype=torch.uint8)
        with host_memory():
            host = torch.ones(70_000) + 1
            with host_memory():
                more = torch.ones(9)
            inner = kept + 1
        # Used, viewed and resized outside it stays the host's; what is made of it is not.
        device = host[:10] * more[0]
        host.resize_(90_000)
        host[:5] = 3
        assert recording.report.live == 1001 + 40
        del host
        assert recording.report.live == 1001 + 40
        del kept, inner
    report = recording.report
    # The number that was written was a tensor for a moment.
    assert (report.live, report.peak, report.start) == (device.nbytes, 1001 + 40 + 4, 0)
    assert sum(owner.bytes for owner in report.owners) == report.peak


def test_memory_of_the_host_is_marked_in_any_code_and_after_an_error():
    with host_memory():
        assert torch.ones(3).sum() == 3
    with profile(device="cpu") as recording:
        with pytest.raises(KeyError), host_memory():
            raise KeyError
        kept = torch.ones(25)
    assert recording.report.live == kept.nbytes


def test_wrapper_subclasses_count_what_is_inside():
    pair = TwoTensor(torch.ones(KIB), torch.ones(KIB))
    with profile(pair) as recording:
        total = pair + pair
    assert recording.report.start == 8 * KIB and recording.report.peak == 16 * KIB
    assert total.a.sum() == 2 * KIB


def test_sparse_tensors_count_indices_and_values():
    with profile() as recording:
        kept = torch.eye(100).to_sparse()
    assert recording.report.live == kept._indices().nbytes + kept._values().nbytes == 100 * (16 + 4)


def test_tensors_that_outlive_the_recording_do_no_harm():
    with profile() as recording:
        kept = torch.ones(KIB)
    report = recording.report
    del kept
    assert recording.report == report and report.live == 4 * KIB


def test_a_prediction_takes_code_written_for_cuda():
    with predict(rounding=1) as recording:
        with torch.device("cuda"):
            model = nn.Linear(KIB, KIB, bias=False)
        with stage("convert"):
            model = model.to(torch.bfloat16).cuda()
        x = torch.ones(3, KIB, device="cuda:1", dtype=torch.bfloat16).to("cuda", non_blocking=True)
        model(x.to(0))
    assert recording.report.stages[0].live == 2 * KIB * KIB
    assert recording.report.stages[0].peak == 6 * KIB * KIB
    assert recording.report.live == 2 * KIB * KIB + x.nbytes


def test_values_that_follow_from_constants_are_known_to_a_prediction():
    lengths = torch.tensor([3, 1, 4])
    with predict(lengths) as recording:
        ends = lengths.cumsum(0).to("cuda")
        mask = torch.arange(8, device="cuda") < ends[1]
        rows = torch.randn(8, 5)
        assert ends.tolist() == [3, 4, 8] and mask.sum().item() == 4
        assert rows[mask].shape == (4, 5) and mask.nonzero().shape == (4, 1)
        assert [part.shape[0] for part in rows.split(lengths.tolist())] == [3, 1, 4]
        assert torch.tensor([ends[0], 1]).tolist() == [3, 1]
        view = ends[1:]
        ends += 1
        assert view.tolist() == [5, 9]
    assert recording.report.error is None and lengths.tolist() == [3, 1, 4]


@pytest.mark.parametrize("unknown", ["nonzero", "item", "tolist", "overwritten"])
def test_what_depends_on_unknown_values_is_refused_with_operator_and_line(unknown):
    operator = "aten.nonzero.default" if unknown == "nonzero" else "aten._local_scalar_dense.default"
    with pytest.raises(ValueError, match=rf"{operator} at {__file__}:\d+ test_what.*before the block"), predict():
        x = torch.randn(2)
        if unknown == "nonzero":
            x.nonzero()
        elif unknown == "overwritten":
            counts = torch.zeros(2)
            view = counts[1:]
            counts.copy_(x)
            view.item()
        else:
            getattr(x[0], unknown)()


def test_modules_on_the_meta_device_stand_for_their_weights():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(KIB, KIB, bias=False), nn.Linear(KIB, KIB, bias=False))
    model[1].weight = nn.Parameter(model[0].weight[:, 1:])
    with predict(model, rounding=1, owners=True) as recording:
        model[1](model[0](torch.randn(2, KIB, device="cuda"))[:, 1:])
    report = recording.report
    assert (report.start, report.live) == (4 * KIB * KIB, 4 * KIB * KIB)
    assert report.peak == report.start + 3 * 8 * KIB


def test_an_operator_without_a_fake_is_refused_by_name():
    with torch.library._scoped_library("hide_test_memory", "DEF") as library:
        library.define("mystery(Tensor x) -> Tensor")
        library.impl("mystery", lambda x: x.clone(), "CPU")
        with pytest.raises(ValueError, match="hide_test_memory.mystery.default at .*register_fake"), predict():
            torch.ops.hide_test_memory.mystery(torch.ones(3))


def test_a_prediction_leaves_real_tensors_as_they_are():
    model = nn.Linear(8, 8)
    before = model.weight.detach().clone()
    with predict(model) as recording:
        model(torch.ones(2, 8)).sum().backward()
        with torch.no_grad():
            model.weight.zero_()
    assert torch.equal(model.weight, before) and model.weight.grad is None
    assert recording.report.start == 2 * 512


def test_a_prediction_tells_of_each_operator_in_its_stage():
    seen = []

    def tell(func, args, kwargs, out):
        shapes = [tuple(one.shape) for one in args if isinstance(one, torch.Tensor)]
        seen.append((current_stage(), func.overloadpacket.__name__, shapes, tuple(out.shape)))

    with predict(operators=tell):
        left, right = torch.empty(2, 3), torch.empty(3, 4)
        with stage("a"), stage("b"):
            left @ right
    assert ("a/b", "mm", [(2, 3), (3, 4)], (2, 4)) in seen and seen[0][0] == "" == current_stage()


def test_rounding_takes_whole_blocks():
    with predict() as recording:
        kept = [torch.ones(129), torch.ones(1)]
    assert recording.report.live == 1024 + 512
    del kept


def test_the_timeline_is_bounded_and_keeps_the_peak():
    def run():
        kept = []
        for i in range(6000):
            kept.append(torch.ones(16))
            if i == 4321:
                torch.ones(100_000)
        with stage("end"):
            torch.ones(8)

    with profile(owners=True, groups=lambda owner: f"rank {len(owner.shape)} of {owner.shape[0]}") as recording:
        run()
    report = recording.report
    assert len(report.timeline) <= 2048
    assert max(sample.live for sample in report.timeline) == report.peak == 4322 * 64 + 400_000
    assert all(sum(sample.groups.values()) == sample.live for sample in report.timeline)
    assert set(report.timeline[-1].groups) == {"rank 1 of 16", "rank 1 of 100000", "rank 1 of 8"}
    assert [sample.step for sample in report.timeline] == sorted(sample.step for sample in report.timeline)


def test_table_and_json_say_what_the_report_says():
    weight = torch.ones(250_000)
    with profile(weight, owners=True) as recording, stage("prefill"), stage("double"):
        weight * 2
    with predict(weight, rounding=1) as predicted, stage("prefill"):
        torch.cat([weight, weight])
    report = recording.report
    table = report.table(predicted.report)
    assert "measured on cpu, MB; 1.00 before" in table
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line}
    assert rows["prefill"] == ["2.00", "1.00", "-", "3.00", "-33.3%"]
    assert rows["double"] == ["2.00", "1.00", "-", "-", "-"]
    assert rows["whole"] == rows["prefill"]
    assert "aten.mul.Tensor, test_memory.py:" in table and "[250000] float32" in table
    parsed = json.loads(report.to_json())
    assert parsed["peak"] == report.peak and parsed["stages"][1]["name"] == "prefill/double"
    assert parsed["owners"][0]["shape"] == [250000]


def test_the_picture_shows_each_group(tmp_path):
    with profile(owners=True) as recording:
        with stage("one"):
            kept = torch.ones(100, KIB)
        with stage("two"):
            kept = kept + torch.ones(100, KIB)
    recording.report.plot(tmp_path / "memory.png")
    colours = Image.open(tmp_path / "memory.png").convert("RGB").getcolors(1 << 20)
    large = [colour for count, colour in colours if count > 10_000 and len(set(colour)) > 1]
    assert len(large) == 2


def test_other_devices_are_not_counted_and_a_note_says_so():
    with profile(device="cpu") as recording:
        torch.ones(KIB, device="meta")
    report = recording.report
    assert report.peak == 0 and report.notes == ("no tensor on cpu, but on meta: name it as device",)
    assert report.notes[0] in report.table()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_measuring_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device: cuda cannot be measured.*predict"), profile(device="cuda"):
        pass


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="modules and tensors, got str in place 1"), profile(nn.ReLU(), "model"):
        pass
    with pytest.raises(ValueError, match="rounding.*got 0"), predict(rounding=0):
        pass
    with pytest.raises(ValueError, match="snapshot.*cpu"), profile(device="cpu", snapshot="x"):
        pass
    with profile() as recording:
        with pytest.raises(ValueError, match="predict: a recording is running"), predict():
            pass
        with pytest.raises(ValueError, match="name: .*got ''"), stage(""):
            pass
        torch.ones(KIB)
    assert recording.report.peak == 4 * KIB


def test_the_allocators_peaks_reach_every_stage_that_runs(monkeypatch):
    now = peak = 0

    def allocate(count):
        nonlocal now, peak
        now += count
        peak = max(peak, now)

    def statistics(device):
        peaks = {"allocated_bytes": peak, "reserved_bytes": 2 * peak, "requested_bytes": peak - 1}
        return {"allocated_bytes.all.current": now} | {f"{name}.all.peak": size for name, size in peaks.items()}

    def reset(device):
        nonlocal peak
        peak = now

    stubs = {"memory_stats": statistics, "reset_peak_memory_stats": reset, "is_available": lambda: True}
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    allocate(1000)
    allocate(-900)
    with profile(device="cuda:0") as recording:
        with stage("a"):
            allocate(50)
            allocate(-50)
            with stage("b"):
                allocate(500)
                allocate(-400)
        with stage("c"):
            allocate(10)
            allocate(-110)
    report = recording.report
    assert [(s.name, s.peak, s.live) for s in report.stages] == [("a", 600, 200), ("a/b", 600, 200), ("c", 210, 100)]
    assert (report.start, report.peak, report.live, report.peak_stage) == (100, 600, 100, "a/b")
    assert (report.reserved, report.requested, report.tracked) == (1200, 599, None)
    with pytest.raises(ValueError, match="no timeline"):
        report.plot("unused.png")


@pytest.mark.gpu
def test_cuda_peaks_are_the_allocators():
    torch.ones(1, device="cuda")
    before = torch.cuda.memory_allocated()
    with profile(device="cuda") as recording:
        with stage("high"):
            kept = torch.ones(3 << 20, device="cuda")
            torch.ones(32 << 20, device="cuda")
        with stage("low"):
            kept = kept + 1
    high, low = recording.report.stages
    assert recording.report.start == before and recording.report.peak_stage == "high"
    assert high.requested - before >= 140 << 20 and 24 << 20 <= low.requested - before < 30 << 20
    assert high.peak >= high.requested and high.reserved >= high.peak and low.live == torch.cuda.memory_allocated()


@pytest.mark.gpu
def test_cuda_prediction_is_within_workspaces_of_the_measurement(tmp_path):
    model = llm().to("cuda", torch.bfloat16)
    ids = torch.randint(20, 500, (1, 3001), device="cuda")

    def run():
        with torch.no_grad(), stage("prefill"):
            model(input_ids=ids)

    run()
    with profile(model, ids, owners=True, snapshot=tmp_path / "history.pickle") as measured:
        run()
    with predict(model, ids) as predicted:
        run()
    assert measured.report.tracked == pytest.approx(predicted.report.peak, rel=0.02)
    new = [report.peak - report.start for report in (measured.report, predicted.report)]
    assert new[0] == pytest.approx(new[1], rel=0.1)
    assert (tmp_path / "history.pickle").stat().st_size > 0


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_run_of_one_allocation_has_a_picture(tmp_path):
    with profile(device="cpu") as recording:
        held = torch.zeros(10)
    recording.report.plot(tmp_path / "memory.png")
    assert recording.report.live == 4 * held.numel() and (tmp_path / "memory.png").stat().st_size
