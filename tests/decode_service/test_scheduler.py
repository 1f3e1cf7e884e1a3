"""Policy on a fake clock: who gets blocks, who waits, who is preempted, who may write."""

import re

import pytest

from common.blocks import BlockPool
from common.clock import FakeClock
from common.engine.prefix import PrefixCache
from common.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from common.params import SamplingParams, StoppingParams
from common.sequence import Request, Sequence
from common.transport.messages import AttemptKey, ChunkHeader, Commit, TransferStatus
from decode_service.reservations import State, Verdict
from decode_service.scheduler import DecodeScheduler

BLOCK = 4


def make_scheduler(*, num_blocks=16, max_num_seqs=8, **settings) -> DecodeScheduler:
    pool = BlockPool(num_blocks, BLOCK)
    defaults = {"max_batch_tokens": 64, "max_waiting": 8, "reservation_wait_s": 30.0}
    defaults |= {"context_length": 2048, "clock": FakeClock()}
    return DecodeScheduler(pool, PrefixCache(pool, "model"), max_num_seqs, **{**defaults, **settings})


def make_sequence(num_tokens=8, *, max_tokens=8, first=0, deadline_s=float("inf"), prompt=None) -> Sequence:
    request = Request(
        request_id=f"r{first}",
        token_ids=tuple(range(first, first + num_tokens)),
        num_prompt_tokens=prompt or num_tokens,
        sampling=SamplingParams(),
        stopping=StoppingParams(max_tokens=max_tokens),
        deadline_s=deadline_s,
    )
    return Sequence(request, frozenset())


def run(scheduler, sequence, *, local=False):
    """Opens, reserves and commits: the reservation decodes from here on."""
    reservation = scheduler.open(sequence, local=local)
    assert scheduler.schedule().reserved == [reservation]
    scheduler.commit(reservation, 7)
    return reservation


def decode_steps(scheduler, count):
    """Steps until `count` are done; returns everything preempted on the way."""
    preempted = []
    for _ in range(count):
        plan = scheduler.schedule()
        preempted += plan.preempted
        scheduler.launched(plan.decoding)
        for reservation in plan.decoding:
            scheduler.advance(reservation, 7)
    return preempted


def test_a_reservation_holds_the_prompt_plus_one_block():
    scheduler = make_scheduler()
    reservation = scheduler.open(make_sequence(9), local=False)
    scheduler.schedule()
    assert len(reservation.sequence.block_table) == 4
    assert reservation.attempt == 1
    scheduler.check()


def test_reservations_are_all_or_nothing_and_first_come_first_served():
    scheduler = make_scheduler(num_blocks=8)
    scheduler.open(make_sequence(16, first=0), local=False)
    big = scheduler.open(make_sequence(16, first=100), local=False)
    small = scheduler.open(make_sequence(1, first=200), local=False)
    scheduler.schedule()
    assert (big.state, small.state) == (State.WAITING, State.WAITING), "the small one does not overtake"
    assert big.sequence.block_table == []
    scheduler.check()


@pytest.mark.promise(7)
def test_a_reservation_that_waits_too_long_is_told_so():
    scheduler = make_scheduler(num_blocks=8)
    scheduler.open(make_sequence(16, first=0), local=False)
    waiting = scheduler.open(make_sequence(16, first=100), local=False)
    scheduler.schedule()
    scheduler.clock.advance(31)
    ((failed, error),) = scheduler.schedule().failed
    assert failed is waiting
    assert isinstance(error, ResourceExhausted)
    assert error.retry_after_s is not None


def test_a_deadline_ends_a_sequence_in_any_state():
    scheduler = make_scheduler()
    running = run(scheduler, make_sequence(deadline_s=1010.0))
    filling = scheduler.open(make_sequence(first=50, deadline_s=1010.0), local=False)
    scheduler.schedule()
    scheduler.clock.advance(11)
    failed = scheduler.schedule().failed
    assert [reservation for reservation, _ in failed] == [running, filling]
    assert all(isinstance(error, DeadlineExceeded) for _, error in failed)
    assert scheduler.pool.num_held == 0


def test_one_block_a_running_sequence_stays_free():
    scheduler = make_scheduler(num_blocks=6)
    run(scheduler, make_sequence(8))
    waiting = scheduler.open(make_sequence(8, first=50), local=False)
    scheduler.schedule()
    assert waiting.state is State.WAITING, "three free blocks, but one is the running sequence's watermark"


def test_the_youngest_running_sequence_is_preempted_and_nothing_in_flight():
    scheduler = make_scheduler(num_blocks=8)
    old = run(scheduler, make_sequence(4, first=0, max_tokens=20))
    young = run(scheduler, make_sequence(4, first=50, max_tokens=20))
    in_flight = scheduler.open(make_sequence(4, first=90), local=False)
    scheduler.schedule()
    preempted = decode_steps(scheduler, 9)
    assert preempted == [young]
    assert (old.state, young.state, in_flight.state) == (State.RUNNING, State.LOST, State.FILLING)
    assert young.sequence.block_table == []
    assert young.kv_path is Verdict.RECOMPUTED
    scheduler.check()


def test_a_preempted_sequence_comes_back_with_the_next_attempt():
    scheduler = make_scheduler(num_blocks=6)
    old = run(scheduler, make_sequence(4, first=0, max_tokens=20))
    young = run(scheduler, make_sequence(4, first=50, max_tokens=20))
    assert decode_steps(scheduler, 9) == [young]
    tokens = list(young.sequence.token_ids)
    assert scheduler.retry(young, 1, local=False)
    scheduler.end(old)
    assert scheduler.schedule().reserved == [young]
    assert young.attempt == 2
    scheduler.commit(young, 7)
    assert young.sequence.token_ids == [*tokens, 7]
    scheduler.check()


def test_a_lost_pair_keeps_the_blocks_and_retry_fences_the_old_attempt():
    scheduler = make_scheduler()
    reservation = scheduler.open(make_sequence(8), local=False)
    scheduler.schedule()
    blocks = list(reservation.sequence.block_table)
    scheduler.lose(reservation)
    assert reservation.judge_key(AttemptKey(reservation.id, 1))[0] is TransferStatus.FENCED
    scheduler.retry(reservation, 1, local=False)
    scheduler.schedule()
    assert reservation.sequence.block_table == blocks
    assert reservation.judge_key(AttemptKey(reservation.id, 1))[0] is TransferStatus.FENCED
    assert reservation.judge_key(AttemptKey(reservation.id, 2))[0] is TransferStatus.OK


def test_a_repeated_retry_changes_nothing():
    scheduler = make_scheduler()
    reservation = scheduler.open(make_sequence(8), local=False)
    scheduler.schedule()
    assert scheduler.retry(reservation, 1, local=False)
    scheduler.schedule()
    assert not scheduler.retry(reservation, 1, local=False)
    assert reservation.attempt == 2


def test_a_retry_that_turns_local_computes_the_last_token_itself():
    scheduler = make_scheduler()
    first = run(scheduler, make_sequence(8))
    again = scheduler.open(make_sequence(8), local=False)
    scheduler.schedule()
    assert again.num_cached_blocks == 2, "all of the prompt is cached for a remote attempt"
    scheduler.retry(again, 1, local=True)
    plan = scheduler.schedule()
    assert again.num_cached_blocks == 1
    assert [(chunk.start, chunk.end) for chunk in plan.chunks] == [(4, 8)]
    scheduler.end(first)
    scheduler.check()


def test_a_local_prompt_that_is_all_launched_waits_for_its_first_token_alone():
    scheduler = make_scheduler()
    launched = scheduler.open(make_sequence(8), local=True)
    (chunk,) = scheduler.schedule().chunks
    launched.sequence.num_computed = chunk.end
    assert not scheduler.can_step
    other = scheduler.open(make_sequence(6, first=50), local=True)
    assert [chunk.sequence for chunk in scheduler.schedule().chunks] == [other.sequence]
    assert (launched.state, scheduler.num_waiting_tokens) == (State.FILLING, 6)


def test_a_retry_of_a_local_prompt_computes_at_least_its_last_token_again():
    scheduler = make_scheduler()
    reservation = scheduler.open(make_sequence(8), local=True)
    (chunk,) = scheduler.schedule().chunks
    reservation.sequence.num_computed = chunk.end
    scheduler.prefix.publish(reservation.sequence, 0)
    assert scheduler.retry(reservation, 1, local=True)
    assert [(chunk.start, chunk.end) for chunk in scheduler.schedule().chunks] == [(4, 8)]
    scheduler.check()


def test_an_attempt_that_was_never_minted_is_invalid():
    scheduler = make_scheduler()
    reservation = scheduler.open(make_sequence(8), local=False)
    scheduler.schedule()
    assert reservation.judge_key(AttemptKey(reservation.id, 2))[0] is TransferStatus.INVALID


def header(reservation, **changes) -> ChunkHeader:
    fields = {"first_layer": 0, "num_layers": 2, "first_block": 0, "num_blocks": 2, "num_bytes": 40, "checksum": 0}
    return ChunkHeader(sequence_number=0, key=reservation.key, **{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"num_bytes": 39}, "39 bytes announced where 40 are due"),
        ({"num_layers": 3, "num_bytes": 60}, r"layers 0\+3 exceed the model's 2"),
        ({"first_block": 1}, r"blocks 1\+2 are not within \[0, 2\)"),
    ],
)
def test_a_chunk_that_does_not_fit_is_invalid(changes, detail):
    scheduler = make_scheduler()
    reservation = scheduler.open(make_sequence(8), local=False)
    scheduler.schedule()
    status, text = reservation.judge_chunk(header(reservation, **changes), num_layers=2, block_bytes=10, num_blocks=2)
    assert status is TransferStatus.INVALID
    assert re.search(detail, text)


def test_a_commit_needs_every_block_of_every_layer():
    scheduler = make_scheduler()
    reservation = scheduler.open(make_sequence(8), local=False)
    scheduler.schedule()
    commit = Commit(key=reservation.key, num_bytes=40, first_token_id=1, first_token_logprob=None, prompt_logprobs=())
    assert reservation.judge_commit(commit, num_layers=2, num_blocks=2, vocab_size=8)[0] is TransferStatus.INVALID
    reservation.record(header(reservation))
    assert reservation.judge_commit(commit, num_layers=2, num_blocks=2, vocab_size=8)[0] is TransferStatus.OK


def test_a_prompt_that_is_all_cached_needs_only_the_first_token():
    scheduler = make_scheduler()
    scheduler.end(run(scheduler, make_sequence(8)))
    again = scheduler.open(make_sequence(8), local=False)
    scheduler.schedule()
    assert again.num_cached_blocks == 2
    commit = Commit(key=again.key, num_bytes=0, first_token_id=1, first_token_logprob=None, prompt_logprobs=())
    assert again.judge_commit(commit, num_layers=2, num_blocks=2, vocab_size=8)[0] is TransferStatus.OK
    assert again.kv_path is Verdict.CACHED


def test_generated_blocks_are_reused_by_the_next_turn():
    scheduler = make_scheduler()
    reservation = run(scheduler, make_sequence(6))
    decode_steps(scheduler, 3)
    conversation = list(reservation.sequence.token_ids)
    scheduler.end(reservation)
    turn = make_sequence(1)
    turn.token_ids = [*conversation, 99]
    again = scheduler.open(turn, local=False)
    scheduler.schedule()
    assert again.num_cached_blocks == 2


def test_what_can_never_fit_is_refused_at_once():
    scheduler = make_scheduler(num_blocks=4)
    with pytest.raises(InvalidArgument, match="21 tokens, this decode worker's KV cache holds 16"):
        scheduler.open(make_sequence(8, max_tokens=13), local=False)


def test_a_full_waiting_list_is_an_error_with_a_retry_delay():
    scheduler = make_scheduler(max_waiting=1)
    scheduler.open(make_sequence(), local=False)
    with pytest.raises(ResourceExhausted) as raised:
        scheduler.open(make_sequence(), local=False)
    assert raised.value.retry_after_s is not None


@pytest.mark.promise(8)
def test_a_restarted_worker_knows_no_reservation_of_its_former_self():
    former, present = make_scheduler(), make_scheduler()
    given = {former.open(make_sequence(), local=False).id for _ in range(8)}
    for _ in range(8):
        present.open(make_sequence(), local=False)
    assert not given & set(present.reservations)


@pytest.mark.promise(5)
def test_ending_frees_everything_from_every_state():
    scheduler = make_scheduler(num_blocks=12)
    running = run(scheduler, make_sequence(8, first=0))
    filling = scheduler.open(make_sequence(8, first=50), local=False)
    scheduler.schedule()
    waiting = scheduler.open(make_sequence(20, first=100, max_tokens=1), local=False)
    scheduler.schedule()
    assert [r.state for r in (running, filling, waiting)] == [State.RUNNING, State.FILLING, State.WAITING]
    for reservation in (running, filling, waiting, running):
        scheduler.end(reservation)
    assert scheduler.pool.num_held == 0
    scheduler.check()


def test_a_block_is_there_before_the_step_in_flight_that_needs_it():
    scheduler = make_scheduler()
    reservation = run(scheduler, make_sequence(2 * BLOCK - 1, max_tokens=8))
    for _ in range(BLOCK + 2):
        decoding = scheduler.schedule().decoding
        for launched in decoding:
            position = launched.sequence.num_computed + launched.num_in_flight
            assert position < len(launched.sequence.block_table) * BLOCK
        scheduler.launched(decoding)
    assert reservation.num_in_flight > 1
    assert reservation.sequence.num_computed == 2 * BLOCK - 1


def test_tokens_in_flight_count_against_max_tokens_and_the_context():
    scheduler = make_scheduler(context_length=12)
    by_limit = run(scheduler, make_sequence(4, max_tokens=3))
    by_context = run(scheduler, make_sequence(8, max_tokens=20, first=50))
    steps = 0
    while decoding := scheduler.schedule().decoding:
        steps += 1
        scheduler.launched(decoding)
    assert (by_limit.num_in_flight, by_context.num_in_flight) == (2, 3)
    assert not scheduler.can_step
    assert steps == 3


def test_a_preempted_reservation_has_nothing_in_flight_in_its_next_attempt():
    scheduler = make_scheduler(num_blocks=6)
    older, younger = run(scheduler, make_sequence(7, max_tokens=16)), run(scheduler, make_sequence(3, first=50))
    while younger.state is State.RUNNING:
        scheduler.launched(scheduler.schedule().decoding)
    assert younger.num_in_flight > 0
    scheduler.end(older)
    scheduler.retry(younger, younger.attempt, local=False)
    scheduler.schedule()
    scheduler.commit(younger, 7)
    assert younger.num_in_flight == 0
