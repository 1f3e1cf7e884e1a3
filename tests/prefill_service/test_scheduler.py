"""Policy on a fake clock: which prompts start, and how they are cut."""

import pytest

from common.blocks import BlockPool
from common.clock import FakeClock
from common.engine.prefix import PrefixCache
from common.errors import InvalidArgument, ResourceExhausted
from common.params import SamplingParams, StoppingParams
from common.sequence import Request, Sequence
from prefill_service.scheduler import Job, PrefillScheduler

BLOCK = 4


def make_scheduler(*, num_blocks=16, max_batch_tokens=16, max_num_seqs=8, max_waiting=8) -> PrefillScheduler:
    pool = BlockPool(num_blocks, BLOCK)
    return PrefillScheduler(
        pool, PrefixCache(pool, "model"), max_batch_tokens, max_num_seqs, max_waiting, clock=FakeClock()
    )


def make_job(num_tokens, *, first=0, priority=0, **request) -> Job:
    tokens = tuple(range(first, first + num_tokens))
    params = {"sampling": SamplingParams(), "stopping": StoppingParams(), "priority": priority, **request}
    return Job(Sequence(Request(request_id="r", token_ids=tokens, num_prompt_tokens=num_tokens, **params), frozenset()))


def compute(scheduler) -> list[tuple[int, int]]:
    """One step as the engine does it; returns the chunks' positions."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        chunk.sequence.num_computed = chunk.end
        scheduler.prefix.publish(chunk.sequence, chunk.start)
    for job in list(scheduler.running):
        if job.sequence.prefilled:
            scheduler.finish_computing(job)
    return [(chunk.start, chunk.end) for chunk in chunks]


def test_a_long_prompt_is_cut_on_block_boundaries():
    scheduler = make_scheduler(max_batch_tokens=10)
    scheduler.submit(make_job(19))
    assert [compute(scheduler) for _ in range(3)] == [[(0, 8)], [(8, 16)], [(16, 19)]]


def test_several_prompts_share_the_budget():
    scheduler = make_scheduler(max_batch_tokens=16)
    scheduler.submit(make_job(5, first=0))
    scheduler.submit(make_job(30, first=50))
    assert compute(scheduler) == [(0, 5), (0, 8)]


def test_higher_priority_starts_first_and_arrival_breaks_ties():
    scheduler = make_scheduler(max_num_seqs=1)
    jobs = [make_job(4, first=0), make_job(4, first=50, priority=1), make_job(4, first=90, priority=1)]
    for job in jobs:
        scheduler.submit(job)
    started = []
    for _ in jobs:
        scheduler.schedule()
        started.append(scheduler.running[0])
        scheduler.drop(scheduler.running[0])
    assert started == [jobs[1], jobs[2], jobs[0]]


def test_a_repeated_prompt_computes_its_last_block_alone():
    scheduler = make_scheduler()
    first, second = make_job(8), make_job(8)
    scheduler.submit(first)
    compute(scheduler)
    scheduler.release(first)
    scheduler.submit(second)
    assert compute(scheduler) == [(4, 8)]
    assert second.num_cached_tokens == 4


def test_prompt_logprobs_need_every_position():
    scheduler = make_scheduler()
    first = make_job(8)
    scheduler.submit(first)
    compute(scheduler)
    scheduler.submit(make_job(8, num_prompt_logprobs=0))
    assert compute(scheduler) == [(0, 8)]


def test_a_job_waits_until_all_its_blocks_are_free():
    scheduler = make_scheduler(num_blocks=4)
    first, second = make_job(12, first=0), make_job(12, first=50)
    scheduler.submit(first)
    scheduler.submit(second)
    assert compute(scheduler) == [(0, 12)]
    assert compute(scheduler) == [], "the first still holds its blocks: they are being shipped"
    scheduler.release(first)
    assert compute(scheduler) == [(0, 12)]


def test_dropped_jobs_leave_no_block_behind():
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_job(8, first=0), make_job(8, first=50)
    scheduler.submit(running)
    scheduler.submit(waiting)
    scheduler.schedule()
    for job in (running, waiting):
        scheduler.drop(job)
        scheduler.release(job)
    assert (scheduler.num_waiting, scheduler.running) == (0, [])
    scheduler.pool.check([])


def test_what_can_never_fit_is_refused():
    with pytest.raises(InvalidArgument, match="65 tokens need 17 KV blocks, this prefill worker has 16"):
        make_scheduler().submit(make_job(65))


def test_a_full_queue_is_an_error_with_a_retry_delay():
    scheduler = make_scheduler(max_waiting=1)
    scheduler.submit(make_job(4))
    with pytest.raises(ResourceExhausted) as raised:
        scheduler.submit(make_job(4))
    assert raised.value.retry_after_s is not None
