"""Prompts computed beside the decode steps: their first tokens come whenever the device has them."""

import itertools
from collections import deque

import pytest
import torch

pytest.importorskip("triton")

from common.engine.prefill_step import FirstToken
from common.errors import DeadlineExceeded, Internal, PdserveError
from common.transport.messages import AttemptKey, Commit, TransferStatus
from decode_service.events import Completed, Reserved, Token
from decode_service.reservations import State, Verdict
from tests.support.imitation import ImitatedEngine, RememberedStep, token_at
from tests.support.models import make_request

BLOCK, CHUNK = 4, 8


@pytest.fixture
def engine(monkeypatch):
    with torch.inference_mode():
        yield ImitatedEngine(
            monkeypatch, num_blocks=60, block_size=BLOCK, max_num_seqs=8, max_batch_tokens=CHUNK, context_length=80
        )


def prompt(num_tokens=6, *, seed=1, **request):
    token_ids = [token_at(seed, position) for position in range(num_tokens)]
    return make_request(token_ids, seed=seed, temperature=1.0, **request)


def opened(engine, num_tokens=6, **request):
    """All that may be launched of this prompt has been."""
    sequence = prompt(num_tokens, **request)
    engine.open(sequence, local=True)
    settle(engine)
    return sequence


def settle(engine):
    while engine.turn():
        pass


def land(engine, steps):
    step = engine.land(steps)
    settle(engine)
    return step


def events(engine, sequence, kind):
    return [event for event in engine.happened.get(sequence, []) if isinstance(event, kind)]


def tokens(engine, sequence):
    return [event.token_id for event in events(engine, sequence, Token)]


def expected(sequence, count):
    first = sequence.request.num_prompt_tokens
    return [token_at(sequence.request.sampling.seed, position) for position in range(first, first + count)]


def running(engine, **request):
    sequence = opened(engine, **request)
    land(engine, engine.kept.prefills)
    return sequence


def test_decode_steps_go_on_while_a_first_token_is_on_its_way(engine):
    before = running(engine, max_tokens=30)
    opened(engine, seed=2)
    land(engine, engine.kept.decodes)
    assert len(engine.kept.prefills) == 1
    for count in range(3, 9):
        land(engine, engine.kept.decodes)
        assert tokens(engine, before) == expected(before, count)
        assert len(engine.kept.decodes) == 2


def test_a_sequence_joins_the_batch_when_its_first_token_lands(engine):
    sequence = opened(engine)
    assert not engine.kept.decodes
    land(engine, engine.kept.prefills)
    assert tokens(engine, sequence) == expected(sequence, 1)
    assert len(engine.kept.decodes) == 2


def test_a_prompt_that_waits_for_its_first_token_is_launched_once_and_holds_up_no_other(engine):
    opened(engine, seed=1)
    opened(engine, seed=2)
    chunks = [step.chunks for step, _ in engine.kept.prefills]
    assert [[chunk.end for chunk in step] for step in chunks] == [[6], [6]]


def test_an_engine_that_can_only_wait_for_first_tokens_shows_no_life(engine):
    opened(engine)
    assert not engine.has_work()
    assert engine.waits_for_device()
    counter = engine.step_counter
    engine.turn()
    assert engine.step_counter == counter
    land(engine, engine.kept.prefills)
    assert engine.step_counter > counter


def test_chunks_run_two_steps_ahead_of_the_device(engine):
    opened(engine, num_tokens=50)
    assert len(engine.kept.prefills) == 2
    land(engine, engine.kept.prefills)
    assert [step.chunks[0].start for step, _ in engine.kept.prefills] == [CHUNK, 2 * CHUNK]


def test_closing_frees_the_blocks_at_once_and_the_late_token_is_nobodys(engine):
    sequence = opened(engine)
    engine.close(sequence)
    engine.turn()
    assert engine.scheduler.pool.num_held == 0
    land(engine, engine.kept.prefills)
    assert not tokens(engine, sequence)
    engine.check()


def test_blocks_of_a_prompt_that_was_closed_on_its_way_serve_the_next(engine):
    closed = opened(engine, num_tokens=8, max_tokens=60)
    engine.close(closed)
    following = opened(engine, num_tokens=8, seed=2, max_tokens=60)
    assert not {*closed.block_table} & {*following.block_table}
    while not events(engine, following, Completed):
        land(engine, engine.kept.prefills)
        land(engine, engine.kept.decodes)
    assert tokens(engine, following) == expected(following, 60)
    assert not tokens(engine, closed)


def test_a_deadline_does_not_wait_for_the_first_token(engine):
    sequence = opened(engine, deadline_s=1010.0)
    engine._clock.advance(11)
    settle(engine)
    assert isinstance(engine.happened[sequence][-1], DeadlineExceeded)
    assert engine.scheduler.pool.num_held == 0
    land(engine, engine.kept.prefills)
    assert not tokens(engine, sequence)


def test_who_comes_while_first_tokens_are_on_their_way_is_reserved_at_once(engine):
    opened(engine)
    remote = prompt(seed=2)
    engine.open(remote, local=False)
    settle(engine)
    assert events(engine, remote, Reserved)


def test_a_retry_computes_the_prompt_again_and_the_first_attempts_token_does_not_count(engine):
    sequence = opened(engine, num_tokens=8)
    engine.retry(sequence, 1, local=True)
    settle(engine)
    assert [event.attempt for event in events(engine, sequence, Reserved)] == [1, 2]
    land(engine, engine.kept.prefills)
    assert not tokens(engine, sequence)
    land(engine, engine.kept.prefills)
    assert tokens(engine, sequence) == expected(sequence, 1)
    engine.check()


def test_a_retry_that_turns_remote_does_not_join_by_the_local_token(engine):
    sequence = opened(engine, num_tokens=8)
    engine.retry(sequence, 1, local=False)
    settle(engine)
    land(engine, engine.kept.prefills)
    assert engine._reservation_of[sequence].state is State.FILLING
    answers = []
    key = events(engine, sequence, Reserved)[-1].reservation, 2
    engine.attempt_begun(1, AttemptKey(*key))
    commit = Commit(key=AttemptKey(*key), num_bytes=0, first_token_id=expected(sequence, 1)[0])
    engine.commit_received(1, commit, lambda status, *_: answers.append(status))
    settle(engine)
    assert answers == [TransferStatus.OK]
    assert tokens(engine, sequence) == expected(sequence, 1)


def test_bad_logits_of_one_prompt_leave_the_others_of_its_step(engine, monkeypatch):
    monkeypatch.setattr(engine.scheduler, "max_batch_tokens", 64)
    good, bad = prompt(seed=1), prompt(seed=2)
    engine.open(good, local=True)
    engine.open(bad, local=True)
    settle(engine)
    ((step, _),) = engine.kept.prefills
    step.first_tokens[bad] = Internal("not finite")
    land(engine, engine.kept.prefills)
    assert tokens(engine, good) == expected(good, 1)
    assert isinstance(engine.happened[bad][-1], PdserveError)
    engine.check()


def test_what_comes_with_the_first_token_is_put_out_with_it(engine):
    sequence = opened(engine)
    ((step, _),) = engine.kept.prefills
    (token_id,) = expected(sequence, 1)
    step.first_tokens[sequence] = FirstToken(token_id, "logprob", ("prompt",))
    land(engine, engine.kept.prefills)
    [token] = events(engine, sequence, Token)
    assert token[:3] == (token_id, "logprob", ("prompt",))


def test_the_time_of_a_local_prefill_is_that_of_its_steps_on_the_device(engine):
    before = running(engine, max_tokens=40)
    sequence = opened(engine, num_tokens=2 * CHUNK, seed=2, max_tokens=1)
    for steps, seconds in [("decodes", 0.01), ("decodes", 0.01), ("prefills", 0.05), ("decodes", 0.01)]:
        engine._clock.advance(seconds)
        land(engine, getattr(engine.kept, steps))
    engine._clock.advance(0.05)
    land(engine, engine.kept.prefills)
    (completed,) = events(engine, sequence, Completed)
    assert completed.kv_path is Verdict.LOCAL
    assert completed.local_prefill_ms == pytest.approx(100)
    assert not events(engine, before, Completed)


class Timeline:
    """A device: steps take their time one after the other, and their tokens land in that order."""

    DECODE_S, CHUNK_S = 0.008, 0.05

    def __init__(self, engine) -> None:
        self._engine = engine
        self._free_s = engine._clock()
        self._steps: deque = deque()
        engine._reader = self
        # By sequence, when its tokens came.
        self.arrivals: dict = {}

    def watch(self, step, on_ready):
        seconds = self.CHUNK_S if isinstance(step, RememberedStep) else self.DECODE_S
        self._free_s = max(self._free_s, self._engine._clock()) + seconds
        self._steps.append((self._free_s, on_ready))

    def land(self):
        """Takes time to the end of the oldest step; whether the device had another one behind it."""
        end_s, on_ready = self._steps.popleft()
        self._engine._clock.now_s = end_s
        had_next = bool(self._steps)
        known = {sequence: len(tokens(self._engine, sequence)) for sequence in self._engine.happened}
        on_ready()
        settle(self._engine)
        for sequence in self._engine.happened:
            if len(tokens(self._engine, sequence)) > known.get(sequence, 0):
                self.arrivals.setdefault(sequence, []).append(end_s)
        return had_next

    def largest_gap_s(self, sequence):
        times = self.arrivals[sequence]
        return max(after - before for before, after in itertools.pairwise(times))


@pytest.mark.parametrize("num_running", [0, 1, 3])
def test_no_tokens_wait_for_two_chunks_and_the_device_for_nothing(engine, num_running):
    timeline = Timeline(engine)
    most_s = timeline.CHUNK_S + 4 * timeline.DECODE_S
    sequences = []
    for seed in range(num_running):
        sequences.append(opened(engine, seed=seed, max_tokens=60))
        timeline.land()
    for seed in (10, 11, 12):
        sequences.append(prompt(5 * CHUNK - 3, seed=seed, max_tokens=12))
        engine.open(sequences[-1], local=True)
    settle(engine)
    while not all(tokens(engine, sequence) for sequence in sequences):
        had_next = timeline.land()
        assert had_next or tokens(engine, sequences[-1]), "the device had nothing to do"
    while not all(events(engine, sequence, Completed) for sequence in sequences[num_running:]):
        timeline.land()
    for sequence in sequences:
        assert tokens(engine, sequence) == expected(sequence, len(tokens(engine, sequence)))
        assert timeline.largest_gap_s(sequence) <= most_s
