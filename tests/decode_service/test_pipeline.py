"""The pipeline in the engine, on CPU tensors and a GPU that is made up."""

from __future__ import annotations

import json
import random

import pytest
import torch

from common.errors import FailedPrecondition
from decode_service.pipeline.decisions import Mode
from decode_service.pipeline.order import Cut
from decode_service.pipeline.stage_measuring import StageMeasuring
from decode_service.pipeline.step_runner import NoWay
from decode_service.sm.green_manager import GreenManager
from decode_service.sm.partitions import NoPartitions, State
from tests.fakes.gpu import FakeGpu
from tests.support.engine import HandTurnedEngine
from tests.support.models import VOCAB, make_request

STATIC = {"decode_pipeline": "static", "decode_attention_sm": 64, "decode_ffn_sm": 68}


@pytest.fixture
def gpu():
    return FakeGpu()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """What is measured in one test is not known in another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pdserve"


def engine(gpu, **settings):
    return HandTurnedEngine(partitions=GreenManager(gpu, gpu), device="cpu", **settings)


def sequential_engine():
    return HandTurnedEngine(decode_pipeline="disabled", device="cpu")


def requests(count, max_tokens=12):
    draw = random.Random(count)
    return [
        make_request(
            [draw.randrange(VOCAB - 1) for _ in range(draw.randrange(1, 40))],
            max_tokens=max_tokens + index,
            temperature=0.0 if index % 2 else 0.8,
            presence_penalty=0.5 if index % 3 == 0 else 0.0,
            num_logprobs=2 if index % 4 == 0 else None,
            seed=index,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("cut", [cut.value for cut in Cut])
def test_pipelined_steps_give_the_tokens_of_sequential_ones(gpu, cut):
    expected = sequential_engine().run_all(requests(9))
    pipelined = engine(gpu, decode_pipeline_cut=cut, **STATIC)
    assert pipelined.run_all(requests(9)) == expected
    stats = pipelined.pipeline.stats()
    assert stats.num_pipelined_steps > 10
    # The last sequence is alone, and one sequence is not two micro-batches.
    assert (stats.active, stats.fallback_reason) == (False, "SINGLE_SEQUENCE")


def test_statistics_show_what_runs(gpu):
    pipelined = engine(gpu, decode_pipeline_profiling=True, **STATIC)
    for sequence in requests(4, max_tokens=80):
        pipelined.open(sequence, local=True)
    while pipelined.pipeline.stats().num_steps < 40:
        pipelined.turn()
    stats = pipelined.pipeline.stats()
    assert (stats.mode, stats.active, stats.cut, stats.fallback_reason) == (Mode.STATIC, True, "layer", "")
    assert (stats.attention_sm_asked, stats.ffn_sm_asked, stats.attention_sm, stats.ffn_sm) == (64, 68, 64, 68)
    assert stats.num_profiled_steps == 2
    assert min(stats.attention_ms, stats.ffn_ms, stats.attention_stage_p50_ms, stats.ffn_stage_p99_ms) > 0
    # On a CPU the second micro-batch has its input from the start and waits for the first.
    assert stats.attention_queue_depth > 0


def test_a_profile_that_is_not_captured_yet_leaves_the_step_pipelined(gpu, monkeypatch):
    running = engine(gpu, decode_pipeline_profiling=True, **STATIC)
    prepared = []
    monkeypatch.setattr(running.pipeline._runner, "is_ready", lambda way: not way.profiled)
    monkeypatch.setattr(running.pipeline._runner, "prepare", lambda way, *_: prepared.append(way))
    for sequence in requests(4, max_tokens=80):
        running.open(sequence, local=True)
    while running.pipeline.stats().num_steps < 10:
        running.turn()
    stats = running.pipeline.stats()
    assert [(way.profiled, way.arrangement is not None) for way in prepared] == [(True, True)]
    assert (stats.num_pipelined_steps, stats.num_profiled_steps) == (stats.num_steps, 0)


def test_modes_change_between_steps_and_cost_no_token(gpu):
    expected = sequential_engine().run_all(requests(6, max_tokens=30))
    changing = engine(gpu, decode_pipeline="disabled")
    sequences = requests(6, max_tokens=30)
    for sequence in sequences:
        changing.open(sequence, local=True)
    changes = iter(
        [
            {"mode": Mode.STATIC, "attention_sm": 64, "ffn_sm": 68},
            {"cut": Cut.ATTENTION_CORE},
            {"attention_sm": 16, "ffn_sm": 16},
            {"mode": Mode.AUTO},
            {"mode": Mode.STATIC, "attention_sm": 132, "ffn_sm": 132},
            {"mode": Mode.DISABLED},
        ]
    )
    active = []
    for turn in range(2000):
        if turn and turn % 5 == 0 and (change := next(changes, None)):
            done = changing.configure_pipeline(**change)
            changing.turn()
            active.append(done.result(timeout=5).active)
        if not changing.turn() and all(changing.events(one, object)[-1:] for one in sequences):
            if all(len(changing.tokens(one)) == one.request.stopping.max_tokens for one in sequences):
                break
            changing.rest()
    assert [changing.tokens(one) for one in sequences] == expected
    assert active == [True, True, True, False, True, False]


def test_static_that_cannot_be_is_refused_and_changes_nothing(gpu):
    running = engine(gpu, decode_pipeline="auto")
    gpu.split_fails_at = (1,)
    done = running.configure_pipeline(mode=Mode.STATIC, attention_sm=16, ffn_sm=16)
    running.turn()
    with pytest.raises(FailedPrecondition, match="cuGreenCtxCreate") as caught:
        done.result(timeout=5)
    assert (caught.value.reason, caught.value.field) == ("SPLIT_FAILED", "mode")
    assert running.pipeline.stats().mode is Mode.AUTO


@pytest.mark.parametrize("state", [State.NO_CUDA_PYTHON, State.DRIVER_TOO_OLD, State.SPLIT_FAILED])
def test_a_worker_started_static_without_partitions_decodes_sequentially_and_says_why(gpu, state):
    partitions = GreenManager(NoPartitions(state, "so it is"), gpu)
    running = HandTurnedEngine(partitions=partitions, device="cpu", **STATIC)
    running.run_all(requests(3))
    stats = running.pipeline.stats()
    assert (stats.active, stats.num_pipelined_steps, stats.fallback_reason) == (False, 0, state.name)
    assert "so it is" in stats.fallback_detail
    assert state.remedy in stats.fallback_detail


def test_partitions_that_fail_their_check_are_never_run_on(gpu):
    gpu.graphs_forget = True
    running = engine(gpu, **STATIC)
    running.run_all(requests(3))
    stats = running.pipeline.stats()
    assert (stats.num_pipelined_steps, stats.fallback_reason) == (0, "VERIFICATION_FAILED")


def test_a_check_waits_for_what_it_compares_with(gpu, monkeypatch):
    running = engine(gpu, **STATIC)
    prepared, ran = [], []
    runner, is_captured = running.pipeline._runner, False
    compute = runner.run

    def run(way, batch, finish):
        ran.append(way)
        return compute(way, batch, finish)

    monkeypatch.setattr(runner, "is_ready", lambda way: way.in_lanes or is_captured)
    monkeypatch.setattr(runner, "prepare", lambda way, *_: prepared.append(way))
    monkeypatch.setattr(runner, "run", run)
    for sequence in requests(4, max_tokens=80):
        running.open(sequence, local=True)
    while running.pipeline.stats().num_pipelined_steps < 5:
        running.turn()
    assert all(way.in_lanes for way in ran)
    assert {way.in_lanes for way in prepared} == {False}
    is_captured = True
    while running.pipeline.stats().num_pipelined_steps < 10:
        running.turn()
    assert sum(not way.in_lanes for way in ran) == 1


def test_what_is_begun_to_be_captured_goes_on_after_every_step(gpu, monkeypatch):
    running = engine(gpu, **STATIC)
    begun, advanced = [], []
    runner = running.pipeline._runner
    monkeypatch.setattr(runner, "is_ready", lambda way: way.arrangement is None or len(advanced) >= 5)
    monkeypatch.setattr(runner, "prepare", lambda way, *_: begun.append(way))
    monkeypatch.setattr(runner, "advance", lambda: advanced.append(len(begun)))
    for sequence in requests(4, max_tokens=80):
        running.open(sequence, local=True)
    while running.pipeline.stats().num_pipelined_steps < 2:
        running.turn()
    assert len(advanced) >= running.pipeline.stats().num_steps


def test_auto_knows_again_what_it_learned_before_another_mode(gpu):
    running = engine(gpu, decode_pipeline="auto")
    learned = running.pipeline._policy
    running.pipeline.configure(mode=Mode.STATIC, attention_sm=64, ffn_sm=68)
    assert running.pipeline._policy is not learned
    running.pipeline.configure(mode=Mode.AUTO)
    assert running.pipeline._policy is learned


@pytest.mark.parametrize(("fault", "reason"), [("prepare", "CAPTURE_FAILED"), ("run", "REPLAY_FAILED")])
def test_a_pipelined_step_that_fails_is_computed_sequentially(gpu, monkeypatch, fault, reason):
    expected = sequential_engine().run_all(requests(5))
    running = engine(gpu, **STATIC)
    runner = running.pipeline._runner
    compute = runner.run

    def run(way, batch, finish):
        if way.arrangement is not None:
            raise NoWay(reason, "CUDA error: out of memory")
        return compute(way, batch, finish)

    def prepare(way, batch, finish):
        raise NoWay(reason, "CUDA error: out of memory")

    if fault == "prepare":
        monkeypatch.setattr(runner, "is_ready", lambda way: way.arrangement is None)
        monkeypatch.setattr(runner, "prepare", prepare)
    else:
        monkeypatch.setattr(runner, "run", run)
    assert running.run_all(requests(5)) == expected
    stats = running.pipeline.stats()
    assert (stats.active, stats.num_pipelined_steps) == (False, 0)
    assert (stats.fallback_reason, stats.fallback_detail) == (reason, "CUDA error: out of memory")


def test_a_pipelined_step_with_other_bits_is_the_last_one(gpu, monkeypatch):
    running = engine(gpu, **STATIC)
    runner = running.pipeline._runner
    compute = runner.run

    def run(way, batch, finish):
        logits = compute(way, batch, finish)
        if way.arrangement is not None and way.in_lanes:
            logits.view(torch.int32)[-1, 7] ^= 1
        return logits

    monkeypatch.setattr(runner, "run", run)
    running.run_all(requests(4))
    stats = running.pipeline.stats()
    assert (stats.active, stats.fallback_reason, stats.num_pipelined_steps) == (False, "INEXACT", 1)
    assert "layer 64:68" in stats.fallback_detail


def test_a_check_without_memory_is_left_out(gpu, monkeypatch, caplog):
    running = engine(gpu, **STATIC)
    compute = running.pipeline._runner.run

    def run(way, batch, finish):
        if not way.in_lanes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(way, batch, finish)

    monkeypatch.setattr(running.pipeline._runner, "run", run)
    running.run_all(requests(4))
    assert running.pipeline.stats().num_pipelined_steps > 1
    assert "not checked" in caplog.text


def test_what_fell_back_is_tried_again_once_it_is_configured(gpu, monkeypatch):
    running = engine(gpu, **STATIC)
    running.pipeline._fall_back(NoWay("REPLAY_FAILED", "once"))
    running.run_all(requests(3))
    assert running.pipeline.stats().num_pipelined_steps == 0
    running.pipeline.configure(cut=Cut.ATTENTION_CORE)
    running.run_all(requests(3))
    assert running.pipeline.stats().num_pipelined_steps > 0


def test_auto_without_a_calibration_is_sequential_and_says_so(gpu):
    running = engine(gpu, decode_pipeline="auto")
    for sequence in requests(4, max_tokens=40):
        running.open(sequence, local=True)
    while running.pipeline.stats().num_steps < 8:
        running.turn()
    stats = running.pipeline.stats()
    assert (stats.active, stats.fallback_reason) == (False, "NOT_CALIBRATED")


def test_an_idle_worker_calibrates_and_the_next_start_knows(gpu, cache_folder):
    running = engine(gpu, decode_pipeline="auto", max_num_seqs=32, num_blocks=600)
    while not list(cache_folder.glob("*.json")):
        running.turn()
    assert running.pipeline.stats().fallback_reason == "NO_STEPS"
    (kept,) = cache_folder.glob("*.json")
    cells = json.loads(kept.read_text())["cells"]
    assert {cell["num_seqs"] for cell in cells} == {32}
    assert {stage["num_sm"] for stage in cells[0]["stages"]} >= {16, 116}
    assert all(stage[name] > 0 for stage in cells[0]["stages"] for name in ("seconds", "first_s", "last_s"))
    running.check()
    # Whoever comes later is decoded as if nothing had been measured.
    expected = sequential_engine().run_all(requests(3))
    assert running.run_all(requests(3)) == expected
    assert running.pipeline.stats().fallback_reason in ("SINGLE_SEQUENCE", "MEASURING", "SEQUENTIAL_IS_FASTER")
    again = engine(gpu, decode_pipeline="auto", max_num_seqs=32, num_blocks=600)
    assert again.pipeline._calibrating is None


def test_a_worker_with_requests_does_not_calibrate(gpu, cache_folder, monkeypatch):
    running = engine(gpu, decode_pipeline="auto", max_num_seqs=32, num_blocks=600)
    monkeypatch.setattr(running.pipeline, "idle", lambda seconds: pytest.fail("it measures"))
    running.open(requests(1, max_tokens=20)[0], local=False)
    for _ in range(5):
        running.turn()


def test_an_idle_worker_ends_a_capture_before_it_measures(gpu, cache_folder, monkeypatch):
    running = engine(gpu, decode_pipeline="auto", max_num_seqs=32, num_blocks=600)
    runner, slices = running.pipeline._runner, iter(range(3))
    measured = []

    def advance():
        if next(slices, None) is None:
            runner._capture = None

    monkeypatch.setattr(runner, "_capture", object())
    monkeypatch.setattr(runner, "advance", advance)
    monkeypatch.setattr(StageMeasuring, "layers_s", lambda self, cell: measured.append(runner.is_capturing) or 1.0)
    while not measured:
        running.turn()
    assert measured[0] is False


@pytest.mark.parametrize("mode", ["disabled", "static"])
def test_only_auto_calibrates(gpu, cache_folder, mode):
    running = engine(gpu, **{**STATIC, "decode_pipeline": mode, "max_num_seqs": 32})
    for _ in range(50):
        running.turn()
    assert not cache_folder.exists()


def test_a_measurement_that_fails_leaves_steps_sequential_and_says_why(gpu, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    running = engine(gpu, decode_pipeline="auto", max_num_seqs=32, num_blocks=600)
    monkeypatch.setattr(StageMeasuring, "stage", fails)
    for _ in range(20):
        running.turn()
    stats = running.pipeline.stats()
    assert (stats.fallback_reason, stats.fallback_detail) == ("CALIBRATION_FAILED", "CUDA error: out of memory")
