"""What happens to a request when prefill fails under it, and when its client leaves or its time is up."""

import asyncio

import pytest

from common import errors
from pdserve.v1 import types_pb2
from tests.fakes.cluster import FakeCluster, Reply, eventually
from tests.router.following import HANDED_OVER, PAIR_LOST, PREEMPTED, SCRIPT, error_of, idle

# Prefill fails.


@pytest.mark.promise(2)
@pytest.mark.parametrize(
    "failure",
    [errors.Unavailable, errors.DataLoss, errors.Aborted, errors.Internal, errors.ResourceExhausted, errors.Cancelled],
)
async def test_a_failed_prefill_is_retried_on_the_same_reservation_by_another_worker(failure):
    async with FakeCluster(num_prefill=2).running() as cluster:
        first, second = sorted(cluster.prefills, key=lambda prefill: prefill.address)
        first.failures = [failure("a fault")]
        reply = await cluster.generate(max_tokens=10)
        assert reply.token_ids == SCRIPT
        assert [prefill.attempt for prefill in (*first.requests, *second.requests)] == [1, 2]
        assert len(cluster.decode.opened) == 1
        assert reply.completion.path.prefill_worker == second.identity.instance_id
        assert reply.completion.path.num_resumptions == 0
        await idle(cluster)


@pytest.mark.parametrize("failure", [errors.InvalidArgument, errors.FailedPrecondition])
async def test_what_can_never_work_is_not_retried(failure):
    async with FakeCluster(num_prefill=2).running() as cluster:
        for prefill in cluster.prefills:
            prefill.failures = [failure("a fault", field="sampling.top_k", reason="ODD")]
        error = await error_of(cluster.start())
        assert (type(error), error.message, error.field, error.reason) == (failure, "a fault", "sampling.top_k", "ODD")
        assert sum(len(prefill.requests) for prefill in cluster.prefills) == 1
        await idle(cluster)


async def test_attempts_without_progress_are_bounded_and_the_last_error_is_passed_on():
    async with FakeCluster().running() as cluster:
        cluster.prefill.failures = [errors.DataLoss(f"fault {number}") for number in range(9)]
        error = await error_of(cluster.start())
        assert (type(error), error.message) == (errors.DataLoss, "fault 3")
        assert [prefill.attempt for prefill in cluster.prefill.requests] == [1, 2, 3, 4]
        await idle(cluster)


async def test_a_prefill_worker_that_dies_is_replaced_by_decode_itself():
    async with FakeCluster().running() as cluster:
        cluster.prefill.may_commit.clear()
        call = cluster.start(max_tokens=10)
        await eventually(lambda: cluster.prefill.requests)
        await cluster.prefill.kill()
        reply = await Reply.of(call)
        assert reply.token_ids == SCRIPT
        path = reply.completion.path
        assert path.kv_path == types_pb2.KV_PATH_LOCAL
        assert path.prefill_worker == path.decode_worker == cluster.decode.identity.instance_id
        assert path.prefill_ms == 5.0
        assert cluster.decode.retries[-1].local_prefill


async def test_a_prefill_worker_that_falls_silent_is_left():
    async with FakeCluster(num_prefill=2).running() as cluster:
        first, second = sorted(cluster.prefills, key=lambda prefill: prefill.address)
        first.may_commit.clear()
        call = cluster.start(max_tokens=10)
        await eventually(lambda: first.requests)
        first.is_silent = True
        assert (await Reply.of(call)).completion.path.prefill_worker == second.identity.instance_id
        await idle(cluster)
        assert first.num_cut_off == 1


async def test_a_prefill_that_fails_after_its_commit_does_not_matter():
    async with FakeCluster().running() as cluster:
        cluster.decode.go.clear()
        cluster.decode.pause_at = 1
        cluster.prefill.failure_after_commit = errors.Unavailable("lost while answering")
        cluster.prefill.may_answer.clear()
        call = cluster.start(max_tokens=10)
        reply = Reply()
        reply.add(await call.read())
        cluster.prefill.may_answer.set()
        await eventually(lambda: not cluster.prefill.num_active)
        cluster.decode.go.set()
        while reply.completion is None:
            reply.add(await call.read())
        assert reply.token_ids == SCRIPT
        assert cluster.decode.retries == []
        assert reply.completion.path.prefill_worker == cluster.prefill.identity.instance_id


async def test_without_prefill_workers_decode_prefills_until_one_comes():
    async with FakeCluster().running() as cluster:
        await cluster.prefill.kill()
        await eventually(lambda: cluster.router.fleet.is_degraded)
        assert (await cluster.generate(max_tokens=1)).completion.path.kv_path == types_pb2.KV_PATH_LOCAL
        assert cluster.decode.opened[0].local_prefill
        await cluster.prefill.restart()
        # Not that it is not degraded: it is not either while the decode worker is missed.
        await eventually(lambda: cluster.num_serving == 2)
        assert (await cluster.generate(max_tokens=1)).completion.path.kv_path == types_pb2.KV_PATH_REMOTE


async def test_a_prefill_worker_that_is_gone_by_the_time_of_the_reservation_is_not_asked():
    async with FakeCluster().running() as cluster:
        cluster.decode.may_reserve.clear()
        call = cluster.start(max_tokens=10)
        await eventually(lambda: cluster.decode.opened)
        await cluster.prefill.kill()
        await eventually(lambda: cluster.router.fleet.is_degraded)
        cluster.decode.may_reserve.set()
        assert (await Reply.of(call)).completion.path.kv_path == types_pb2.KV_PATH_LOCAL
        assert [retry.local_prefill for retry in cluster.decode.retries] == [True]
        assert not cluster.decode.opened[0].local_prefill


async def test_a_prefill_worker_of_another_fingerprint_is_never_asked():
    cluster = FakeCluster()
    cluster.prefill.identity.model_fingerprint = "other"
    async with cluster.running():
        assert (await cluster.generate(max_tokens=1)).completion.path.kv_path == types_pb2.KV_PATH_LOCAL
        assert cluster.prefill.requests == []
        assert cluster.router.fleet.is_degraded, "local prefill is never silent"


# Decode loses the KV and goes on.


@pytest.mark.parametrize("reason", [PREEMPTED, PAIR_LOST])
async def test_a_lost_kv_cache_is_computed_again_and_the_stream_goes_on(reason):
    async with FakeCluster().running() as cluster:
        cluster.decode.lose_at = [(4, reason)]
        reply = await cluster.generate([1, 2, 3], max_tokens=10)
        assert reply.token_ids == SCRIPT
        again = cluster.prefill.requests[1]
        assert list(again.token_ids.ids) == [1, 2, 3, *SCRIPT[:4]]
        assert (again.attempt, again.num_prompt_tokens) == (2, 3)
        path, usage = reply.completion.path, reply.completion.usage
        assert (path.num_resumptions, path.kv_path) == (1, types_pb2.KV_PATH_RECOMPUTED)
        assert (usage.prompt_tokens, usage.completion_tokens) == (3, 10)


async def test_a_request_may_be_preempted_any_number_of_times():
    async with FakeCluster().running() as cluster:
        cluster.decode.lose_at = [(4, PREEMPTED)] * 6
        reply = await cluster.generate(max_tokens=10)
        assert reply.token_ids == SCRIPT
        assert reply.completion.path.num_resumptions == 6


async def test_a_kv_cache_that_is_lost_after_a_stop_string_is_not_computed_again():
    async with FakeCluster().running() as cluster:
        cluster.decode.script = cluster.tokenizer.encode("one two three")
        num_drawn = len(cluster.tokenizer.encode("one two"))
        cluster.decode.lose_at = [(num_drawn, PREEMPTED)]
        reply = await cluster.generate(max_tokens=100, stop=["two"])
        assert (reply.text, reply.completion.stop_string) == ("one ", "two")
        assert len(cluster.prefill.requests) == 1
        assert reply.completion.path.num_resumptions == 0


async def test_a_kv_cache_that_is_lost_again_and_again_without_a_token_is_an_error():
    async with FakeCluster().running() as cluster:
        cluster.decode.lose_at = [(4, PAIR_LOST)] * 6
        error = await error_of(cluster.start(max_tokens=10))
        assert (type(error), error.reason) == (errors.Unavailable, "KV_LOST")
        await idle(cluster)


async def test_prompt_logprobs_come_once():
    async with FakeCluster().running() as cluster:
        cluster.decode.lose_at = [(4, PREEMPTED)]
        reply = await cluster.generate([1, 2, 3], max_tokens=10, num_prompt_logprobs=0)
        assert [logprob.token_id for logprob in reply.prompt_logprobs] == [2, 3]
        asked = [prefill.HasField("num_prompt_logprobs") for prefill in cluster.prefill.requests]
        assert asked == [True, False]


# The client leaves, or its time is up.


@pytest.mark.promise(1, 18)
@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
async def test_a_client_that_leaves_frees_every_worker_at_once(phase):
    async with FakeCluster().running() as cluster:
        (cluster.prefill.may_commit if phase == "prefilling" else cluster.decode.go).clear()
        call = cluster.start(max_tokens=10)
        await eventually(lambda: cluster.prefill.requests)
        call.cancel()
        await idle(cluster)
        assert cluster.decode.num_cut_off == 1
        assert cluster.prefill.num_cut_off == (phase == "prefilling")


@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
async def test_a_deadline_frees_every_worker_at_once(phase):
    async with FakeCluster().running() as cluster:
        (cluster.prefill.may_commit if phase == "prefilling" else cluster.decode.go).clear()
        error = await error_of(cluster.start(max_tokens=10, timeout=0.3))
        assert isinstance(error, errors.DeadlineExceeded)
        await idle(cluster)


@pytest.mark.promise(7)
async def test_without_a_deadline_max_request_s_applies():
    async with FakeCluster().running(max_request_s=0.3) as cluster:
        cluster.decode.go.clear()
        error = await error_of(cluster.start(timeout=None))
        assert isinstance(error, errors.DeadlineExceeded)
        assert cluster.decode.time_remaining_s < 0.4
        await idle(cluster)


async def test_many_requests_at_once_all_come_through_with_every_kind_of_fault():
    async with FakeCluster(num_decode=2, num_prefill=2).running() as cluster:
        for place, decode in enumerate(cluster.decodes):
            decode.lose_at = [(2, PREEMPTED), (3, PAIR_LOST)] * 3
            decode.die_at = [1, 4, 6] if place else []
        for prefill in cluster.prefills:
            prefill.failures = [errors.DataLoss("a fault"), errors.Unavailable("another")]
        replies = await asyncio.gather(*(cluster.generate([1, 2, 3], max_tokens=10) for _ in range(40)))
        assert all(reply.token_ids == SCRIPT for reply in replies)
        assert all(reply.completion.usage.completion_tokens == 10 for reply in replies)
        await idle(cluster)


# Workers leave service.


async def test_a_stream_that_is_handed_over_goes_on_elsewhere_and_nothing_has_failed():
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.die_at, first.dies_with = [4], HANDED_OVER
        reply = await cluster.generate([1, 2, 3], max_tokens=10)
        assert reply.token_ids == SCRIPT
        assert reply.completion.path.decode_worker == second.identity.instance_id
        assert reply.completion.path.num_resumptions == 1
        await idle(cluster)


async def test_any_number_of_workers_may_hand_a_request_over():
    async with FakeCluster(num_prefill=6).running() as cluster:
        for prefill in cluster.prefills[:-1]:
            prefill.failures = [HANDED_OVER]
        cluster.prefills[-1].tell_load(num_waiting_tokens=10_000)
        await eventually(lambda: max(one.load.num_waiting_tokens for one in cluster.router.fleet.prefill) == 10_000)
        reply = await cluster.generate(max_tokens=10)
        assert reply.token_ids == SCRIPT
        assert reply.completion.path.prefill_worker == cluster.prefills[-1].identity.instance_id


@pytest.mark.parametrize("role", ["prefills", "decodes"])
async def test_a_worker_that_refuses_is_asked_once_though_its_load_stream_has_yet_to_say_so(role):
    async with FakeCluster(num_decode=2, num_prefill=2).running() as cluster:
        leaving = min(getattr(cluster, role), key=lambda worker: worker.address)
        leaving.is_silent = leaving.refuses = True
        replies = [await cluster.generate([n], max_tokens=10) for n in range(6)]
        assert all(reply.token_ids == SCRIPT for reply in replies)
        assert leaving.num_refused == 1
        assert all(reply.completion.path.kv_path == types_pb2.KV_PATH_REMOTE for reply in replies)


async def test_the_only_prefill_worker_that_refuses_is_not_asked_again_and_decode_prefills():
    async with FakeCluster().running() as cluster:
        cluster.prefill.is_silent = cluster.prefill.refuses = True
        reply = await cluster.generate(max_tokens=10)
        assert (reply.token_ids, reply.completion.path.kv_path) == (SCRIPT, types_pb2.KV_PATH_LOCAL)
        assert cluster.prefill.num_refused == 1
