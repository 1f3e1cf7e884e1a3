"""The batch on the device: its kernels in the interpreter, or compiled where there is a GPU, in float32."""

import random
import threading

import pytest
import torch

from common.transport.messages import AttemptKey, ChunkHeader
from decode_service.events import Completed, Token
from tests.support.engine import HandTurnedEngine
from tests.support.models import VOCAB, make_request

pytest.importorskip("triton")

from common.kernels.operations import KernelOperations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARAMS = (
    {},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "seed": 3 << 40},
    {"temperature": 1.0, "seed": 1, "presence_penalty": 0.5, "num_logprobs": 2},
    {"min_tokens": 4, "ignore_eos": False, "logit_bias": {VOCAB - 1: 20.0}},
)


def kernels(config, device, *, deterministic):
    return KernelOperations(config, device)


def device_engine(**settings):
    engine = HandTurnedEngine(choose=kernels, device=DEVICE, dtype="float32", **settings)
    assert engine.runner.max_in_flight > 1
    return engine


def in_flight_until_told(engine):
    """No step's tokens come back before the event that this returns."""
    told, launch = threading.Event(), engine.runner.launch

    def held(decoding):
        step = launch(decoding)
        step.wait = told.wait
        return step

    engine.runner.launch = held
    return told


def requests(count, *, max_tokens, longest):
    draw = random.Random(count)
    return [
        make_request(
            [draw.randrange(VOCAB - 1) for _ in range(draw.randrange(1, longest))],
            max_tokens=max_tokens + index,
            **PARAMS[index % len(PARAMS)],
        )
        for index in range(count)
    ]


def test_tokens_are_those_of_the_host_runner_however_requests_are_drawn():
    on_device, on_host = device_engine(), HandTurnedEngine()
    sequences, others = (requests(5, max_tokens=2, longest=20) for _ in range(2))
    assert on_device.run_all(sequences) == on_host.run_all(others)
    scored, expected = on_device.events(sequences[3], Token)[1:], on_host.events(others[3], Token)[1:]
    for token, other in zip(scored, expected, strict=True):
        assert (token.logprob.token_id, token.logprob.rank) == (token.token_id, other.logprob.rank)
        assert token.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
        assert [top.token_id for top in token.logprob.top] == [top.token_id for top in other.logprob.top]
    on_device.check()


def test_preempted_sequences_go_on_where_they_were():
    params = [{}, {"temperature": 0.9, "seed": 5}]
    prompts = [list(range(8)), list(range(40, 48))]

    def made():
        return [make_request(ids, max_tokens=11, **p) for ids, p in zip(prompts, params, strict=True)]

    calm = HandTurnedEngine(block_size=8).run_all(made())
    tight = device_engine(num_blocks=4, block_size=8)
    assert tight.run_all(made()) == calm
    assert tight.scheduler.num_preemptions > 0


def test_chunks_of_kv_go_one_a_turn_so_that_tokens_wait_for_one_at_most():
    engine, answers, num_answered = device_engine(), [], []
    for number in range(3):
        header = ChunkHeader(number, AttemptKey(1, 1), 0, 1, 0, 1, 8, checksum=0)
        payload = torch.zeros(8, dtype=torch.uint8, device=DEVICE)
        engine.chunk_landed(1, header, payload, lambda *verdict: answers.append(verdict))
    for _ in range(3):
        engine.turn()
        num_answered.append(len(answers))
    assert num_answered == [1, 2, 3]


def test_steps_beyond_a_stop_token_leave_nothing_behind():
    engine = device_engine()
    expected = engine.run_all([make_request([5, 6, 7], max_tokens=8)])[0]
    stopping = make_request([5, 6, 7], max_tokens=8)
    stopping.stop_token_ids = frozenset([expected[3]])
    tokens = engine.run_all([stopping])[0]
    assert tokens == expected[: expected.index(expected[3]) + 1]
    assert engine.events(stopping, Completed)[0].stop_token_id == expected[3]
    while engine.num_in_flight:
        engine.turn()
    assert engine.scheduler.pool.num_held == 0


def test_a_sequence_that_is_closed_in_flight_gives_its_row_and_blocks_back():
    engine = device_engine()
    leaving, staying = make_request([1, 2, 3], max_tokens=40), make_request([4, 5], max_tokens=6)
    expected = engine.run_all([make_request([4, 5], max_tokens=6)])[0]
    engine.open(leaving, local=True)
    engine.open(staying, local=True)
    while len(engine.tokens(leaving)) < 3:
        engine.turn()
    engine.close(leaving)
    while not engine.events(staying, Completed):
        engine.turn()
    assert engine.tokens(staying) == expected
    engine.check()
    assert engine.scheduler.pool.num_held == 0


def test_a_device_that_hangs_shows_in_a_step_counter_that_stands_still():
    engine, sequence = device_engine(), make_request([1, 2, 3], max_tokens=6)
    answers = in_flight_until_told(engine)
    engine.open(sequence, local=True)
    while engine.num_in_flight < engine.runner.max_in_flight:
        engine.turn()
    counter = engine.step_counter
    for _ in range(3):
        engine.turn()
    assert engine.step_counter == counter
    answers.set()
    while not engine.events(sequence, Completed):
        engine.turn()
    assert engine.step_counter > counter


def test_tokens_of_a_sequence_that_left_in_flight_count_as_nobodys():
    engine, sequence = device_engine(), make_request([1, 2, 3], max_tokens=6)
    answers = in_flight_until_told(engine)
    engine.open(sequence, local=True)
    while engine.num_in_flight < engine.runner.max_in_flight:
        engine.turn()
    engine.close(sequence)
    answers.set()
    while engine.num_in_flight:
        engine.turn()
    assert engine.pipeline.stats().total_tokens == 0


def test_warming_up_runs_every_batch_size_and_leaves_no_trace():
    engine, sizes = device_engine(max_num_seqs=4), []
    warm_up = engine.pipeline.warm_up

    def recorded(batch, finish):
        sizes.append(batch.num_seqs)
        warm_up(batch, finish)

    engine.pipeline.warm_up = recorded
    with torch.inference_mode():
        engine.runner.warm_up()
    assert sizes == [4, 2, 1]
    assert not any(layer.any() for layer in engine._cache.layers)
    assert engine.runner._rows.kv_len_S.tolist() == [0] * 4
