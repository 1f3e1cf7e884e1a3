"""Pipelined steps on a real GPU: the same bits as one stage after the other, whatever the streams do meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch

from common.engine.kv_cache import KvCache
from common.engine.sliced_capture import SlicedCapture
from common.model.batch import ForwardBatch
from decode_service.pipeline import step_runner
from decode_service.pipeline.decisions import Mode
from decode_service.pipeline.execution import each_stage, run_pipelined, untimed
from decode_service.pipeline.order import Cut, Lane, order
from decode_service.sm.green_manager import GreenManager
from tests.support.device import needs_gpus
from tests.support.engine import HandTurnedEngine
from tests.support.models import VOCAB, make_request

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.driver")

pytestmark = needs_gpus()

DEVICE = torch.device("cuda", 0)
CUDA = {"device": "cuda:0", "dtype": "bfloat16", "gpu_memory_fraction": 0.2, "max_num_seqs": 64, "num_blocks": 800}


@pytest.fixture
def partitions():
    with GreenManager.of(DEVICE) as manager:
        yield manager


@pytest.fixture
def engine():
    return HandTurnedEngine(**CUDA)


@pytest.fixture
def captured(partitions):
    """Engines with graphs. A test may leave one in the middle of a capture, during which others cannot use the GPU."""
    engines = []

    def make(**settings):
        engines.append(HandTurnedEngine(captured=True, partitions=partitions, **{**CUDA, **settings}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.pipeline.close()


def streams_of(pair):
    return {Lane.ATTENTION: pair.attention, Lane.FFN: pair.ffn}


def decode_batch(cache: KvCache, num_seqs: int, context: int) -> ForwardBatch:
    """Sequences on blocks of their own, full of noise."""
    for layer in cache.layers:
        layer.normal_()
    width = -(-context // cache.block_size)
    table_SP = torch.randperm(num_seqs * width, device=DEVICE).view(num_seqs, width).int()
    last = context - 1
    return ForwardBatch(
        token_ids_T=torch.randint(VOCAB, (num_seqs,), device=DEVICE, dtype=torch.int32),
        positions_T=torch.full((num_seqs,), last, device=DEVICE, dtype=torch.int32),
        slot_mapping_T=table_SP[:, last // cache.block_size] * cache.block_size + last % cache.block_size,
        query_starts=None,
        query_start_S1=None,
        kv_lens=None,
        kv_len_S=torch.full((num_seqs,), context, device=DEVICE, dtype=torch.int32),
        block_table_SP=table_SP,
        logit_rows=None,
    )


@contextlib.contextmanager
def delayed(stage):
    """Before and after a stage, for up to about a tenth of a millisecond."""
    torch.cuda._sleep(random.randrange(200_000))
    yield
    torch.cuda._sleep(random.randrange(200_000))


@pytest.mark.parametrize("around", [untimed, delayed])
@pytest.mark.parametrize("cut", Cut)
@pytest.mark.parametrize("attention_sm", [16, 64, 112, None])
def test_lanes_of_their_own_give_the_bits_of_one_stream(engine, partitions, cut, attention_sm, around):
    num_sms = partitions.num_sms
    split = (attention_sm, num_sms - attention_sm) if attention_sm else (num_sms, num_sms)
    pair = partitions.allocate(*split)
    model, cache = engine.parts.model, engine.parts.cache
    steps = order(cut, model.config.num_layers, 2)
    batch = decode_batch(cache, 40, 200)
    with torch.inference_mode():
        expected = run_pipelined(model, cache, batch, steps, attention_sm=pair.attention_sm)
        for _ in range(20 if around is delayed else 5):
            options = {"streams": streams_of(pair), "attention_sm": pair.attention_sm, "around": around}
            assert torch.equal(run_pipelined(model, cache, batch, steps, **options), expected)


@pytest.mark.parametrize("cut", Cut)
def test_a_graph_captured_in_slices_gives_the_bits_of_one_stream(engine, partitions, cut):
    pair = partitions.allocate(64, partitions.num_sms - 64)
    model, cache = engine.parts.model, engine.parts.cache
    steps, batch = order(cut, model.config.num_layers, 2), decode_batch(cache, 40, 200)
    pool = torch.cuda.graph_pool_handle()
    options = {"streams": streams_of(pair), "attention_sm": pair.attention_sm}
    with torch.inference_mode():
        expected = run_pipelined(model, cache, batch, steps, attention_sm=pair.attention_sm)
        run_pipelined(model, cache, batch, steps, **options)
        torch.cuda.synchronize()
        stages = each_stage(model, cache, batch, steps, finish=lambda *_: None, around=untimed, **options)
        capture, num_slices = SlicedCapture(stages, pool, torch.cuda.Stream()), 0
        while (done := capture.advance(0.0002)) is None:
            num_slices += 1
            # What a server does between two slices.
            model.forward(batch, cache)
        graph, logits = done
        for _ in range(100):
            logits.fill_(float("nan"))
            graph.replay()
            assert torch.equal(logits, expected)
    assert num_slices > 1


def scripted_tokens(captured, partitions, script_seed: int, monkeypatch, *, in_one_stream: bool) -> tuple[list, list]:
    """Tokens of every request, and all KV at the end: sequences join and leave, splits and cuts change.

    A step's tokens are awaited before the next, and graphs captured at once, so that each run has the same steps.
    """
    monkeypatch.setattr(step_runner, "SLICE_S", 60.0)
    if in_one_stream:
        enqueued = each_stage
        monkeypatch.setattr(
            step_runner, "each_stage", lambda *args, streams, **options: enqueued(*args, streams=None, **options)
        )
    draw = random.Random(script_seed)
    engine = captured(decode_pipeline="static")
    num_sms, live, every = partitions.num_sms, [], []
    while engine.pipeline.stats().num_pipelined_steps < 500:
        if len(live) < 40 and draw.random() < 0.4:
            prompt = [draw.randrange(VOCAB - 1) for _ in range(draw.randrange(1, 60))]
            sequence = make_request(prompt, max_tokens=400, temperature=draw.choice([0.0, 1.0]), seed=len(every))
            engine.open(sequence, local=True)
            live.append(sequence)
            every.append(sequence)
        elif len(live) > 4 and draw.random() < 0.15:
            engine.close(live.pop(draw.randrange(len(live))))
        if draw.random() < 0.03:
            attention_sm, cut = draw.choice(partitions.splits), draw.choice(list(Cut))
            split = {"attention_sm": attention_sm, "ffn_sm": num_sms - attention_sm}
            engine.pipeline.configure(mode=Mode.STATIC, cut=cut, **split)
        engine.turn()
        engine.settle()
    kv = [layer.clone() for layer in engine.parts.cache.layers]
    return [engine.tokens(sequence) for sequence in every], kv


def test_five_hundred_steps_with_joins_leaves_and_rebalances_give_the_bits_of_one_stream(
    captured, partitions, monkeypatch
):
    tokens, kv = scripted_tokens(captured, partitions, 1, monkeypatch, in_one_stream=False)
    expected_tokens, expected_kv = scripted_tokens(captured, partitions, 1, monkeypatch, in_one_stream=True)
    assert tokens == expected_tokens
    assert all(map(torch.equal, kv, expected_kv))


def test_greedy_tokens_of_the_bundled_model_are_those_of_sequential_steps(captured):
    from common.config import TINY_MODEL
    from common.tokenization import Tokenizer

    tokenizer = Tokenizer.load(TINY_MODEL)
    prompts = [tokenizer.encode(text) for text in ("Return a list of", "The for statement is", "Raised when", "An")]
    settings = {"model": TINY_MODEL, "load_format": "auto", "dtype": "float32"}

    def tokens(**more):
        running = captured(**settings, **more)
        return running.run_all([make_request(prompt, max_tokens=100, temperature=0.0) for prompt in prompts * 4])

    expected = tokens(decode_pipeline="disabled")
    for cut in Cut:
        static = {"decode_pipeline": "static", "decode_attention_sm": 64, "decode_ffn_sm": 68}
        assert tokens(decode_pipeline_cut=cut.value, **static) == expected


def test_graphs_of_arrangements_keep_within_their_budget(captured, monkeypatch):
    engine = captured(
        decode_pipeline="static",
        decode_attention_sm=64,
        decode_ffn_sm=68,
        decode_pipeline_graphs_gib=0.0,
    )
    # Graphs of a model this small take no memory that could be seen.
    free_bytes = itertools.count(1 << 30, -(1 << 20))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free_bytes), 1 << 30))
    sequences = [make_request(range(index, index + 9), max_tokens=400) for index in range(40)]
    before = engine.pipeline.num_graphs
    for first in range(0, 40, 10):
        for sequence in sequences[first : first + 10]:
            engine.open(sequence, local=True)
        start = engine.pipeline.stats().num_pipelined_steps
        while engine.pipeline.stats().num_pipelined_steps < start + 5:
            engine.turn()
    # A step and what it is compared with stay, whatever they take.
    assert engine.pipeline.num_graphs == before + 2


def test_an_idle_worker_measures_its_stages(captured, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    running = captured(max_num_seqs=32)
    while running.pipeline.stats().fallback_reason == "NOT_CALIBRATED":
        running.turn()
    stats = running.pipeline.stats()
    assert stats.fallback_reason == "NO_STEPS", stats.fallback_detail
    (kept,) = (tmp_path / "pdserve").glob("*.json")
    (cell,) = json.loads(kept.read_text())["cells"]
    assert (cell["num_seqs"], cell["context"]) == (32, 256)
    assert 0 < cell["sequential_s"] < 0.1
    assert all(stage[name] > 0 for stage in cell["stages"] for name in ("seconds", "first_s", "last_s"))


def test_profiles_of_captured_steps_have_the_order_of_the_lanes(captured):
    engine = captured(
        decode_pipeline="static",
        decode_attention_sm=64,
        decode_ffn_sm=68,
        decode_pipeline_profiling=True,
    )
    for index in range(32):
        engine.open(make_request(range(index, index + 9), max_tokens=400), local=True)
    while engine.pipeline.stats().num_profiled_steps < 3:
        engine.turn()
    stats = engine.pipeline.stats()
    assert 0 < stats.attention_stage_p50_ms < stats.attention_ms
    assert 0 < stats.attention_occupancy < 1
    assert 0 < stats.ffn_occupancy < 1


def run_steps(cut, *, under=(), **environment):
    command = [*under, sys.executable, "-m", "tests.support.pipelined_steps", cut.value]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 pipelined steps" in done.stdout
    return done.stdout + done.stderr


@pytest.mark.parametrize("cut", Cut)
def test_the_stream_sanitizer_of_pytorch_finds_no_race(cut):
    # It would raise.
    run_steps(cut, TORCH_CUDA_SANITIZER="1")


# Without errors that calls return: cuda-python asks the driver for functions that a later one has.
MEMCHECK = ["compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9"]


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("cut", Cut)
def test_memcheck_finds_nothing(cut):
    # Memory is asked of CUDA anew each time, so that every access beyond a tensor is one beyond an allocation.
    said = run_steps(cut, under=MEMCHECK, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert "ERROR SUMMARY: 0 errors" in said
