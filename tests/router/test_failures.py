"""What happens to a request when workers fail under it."""

import asyncio

import grpc.aio
import pytest

from common import errors
from common.errors import from_rpc_error
from pdserve.v1 import decode_pb2, router_pb2, types_pb2
from tests.fakes.cluster import FakeCluster, Reply, eventually, generate_request

PREEMPTED = decode_pb2.PREFILL_NEEDED_REASON_PREEMPTED
PAIR_LOST = decode_pb2.PREFILL_NEEDED_REASON_PAIR_LOST
SCRIPT = list(range(100, 110))
HANDED_OVER = errors.Unavailable("drained before this ended", reason="HANDED_OVER")


async def _error(call) -> errors.PdserveError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Reply.of(call)
    return from_rpc_error(caught.value)


async def _idle(cluster: FakeCluster) -> None:
    """Nothing is left at any worker."""
    await eventually(lambda: not any(worker.num_active for worker in [*cluster.decodes, *cluster.prefills]))
    for worker in cluster.router.fleet.workers:
        assert (worker._num_seqs, worker._num_blocks, worker._num_uncounted_blocks, worker._num_tokens) == (0, 0, 0, 0)


async def _running(cluster: FakeCluster, **fields) -> tuple[grpc.aio.UnaryStreamCall, Reply]:
    """A stream of ten tokens, of which four have come; the rest does when its worker may go on."""
    cluster.decode.go.clear()
    cluster.decode.pause_at = 4
    call, reply = cluster.start(max_tokens=10, **fields), Reply()
    while len(reply.token_ids) < 4:
        reply.add(await call.read())
    return call, reply


async def _rest(call: grpc.aio.UnaryStreamCall, reply: Reply) -> None:
    while reply.completion is None:
        reply.add(await call.read())


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
        await _idle(cluster)


@pytest.mark.parametrize("failure", [errors.InvalidArgument, errors.FailedPrecondition])
async def test_what_can_never_work_is_not_retried(failure):
    async with FakeCluster(num_prefill=2).running() as cluster:
        for prefill in cluster.prefills:
            prefill.failures = [failure("a fault", field="sampling.top_k", reason="ODD")]
        error = await _error(cluster.start())
        assert (type(error), error.message, error.field, error.reason) == (failure, "a fault", "sampling.top_k", "ODD")
        assert sum(len(prefill.requests) for prefill in cluster.prefills) == 1
        await _idle(cluster)


async def test_attempts_without_progress_are_bounded_and_the_last_error_is_passed_on():
    async with FakeCluster().running() as cluster:
        cluster.prefill.failures = [errors.DataLoss(f"fault {number}") for number in range(9)]
        error = await _error(cluster.start())
        assert (type(error), error.message) == (errors.DataLoss, "fault 3")
        assert [prefill.attempt for prefill in cluster.prefill.requests] == [1, 2, 3, 4]
        await _idle(cluster)


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
        await _idle(cluster)
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
        error = await _error(cluster.start(max_tokens=10))
        assert (type(error), error.reason) == (errors.Unavailable, "KV_LOST")
        await _idle(cluster)


async def test_prompt_logprobs_come_once():
    async with FakeCluster().running() as cluster:
        cluster.decode.lose_at = [(4, PREEMPTED)]
        reply = await cluster.generate([1, 2, 3], max_tokens=10, num_prompt_logprobs=0)
        assert [logprob.token_id for logprob in reply.prompt_logprobs] == [2, 3]
        asked = [prefill.HasField("num_prompt_logprobs") for prefill in cluster.prefill.requests]
        assert asked == [True, False]


# Decode fails.


async def test_a_decode_worker_that_refuses_is_replaced_by_another():
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.refusal = errors.ResourceExhausted("KV is full")
        reply = await cluster.generate(max_tokens=10)
        assert reply.completion.path.decode_worker == second.identity.instance_id
        assert reply.completion.path.num_resumptions == 0
        await _idle(cluster)


async def test_without_another_decode_worker_its_own_error_is_passed_on():
    async with FakeCluster().running() as cluster:
        cluster.decode.refusal = errors.ResourceExhausted("KV is full", retry_after_s=7.0, reason="KV_FULL")
        error = await _error(cluster.start())
        assert isinstance(error, errors.ResourceExhausted)
        assert (error.message, error.retry_after_s, error.reason) == ("KV is full", 7.0, "KV_FULL")
        await _idle(cluster)


async def test_a_stream_whose_decode_worker_dies_goes_on_elsewhere():
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.die_at = [4]
        reply = await cluster.generate([1, 2, 3], max_tokens=10)
        assert reply.token_ids == SCRIPT
        [opening] = second.opened
        assert list(opening.token_ids.ids) == [1, 2, 3, *SCRIPT[:4]]
        assert opening.num_prompt_tokens == 3
        assert opening.sampling == first.opened[0].sampling
        path, usage = reply.completion.path, reply.completion.usage
        assert path.decode_worker == second.identity.instance_id
        assert (path.num_resumptions, path.kv_path) == (1, types_pb2.KV_PATH_RECOMPUTED)
        assert path.kv_bytes == 2 * 4096, "both reservations were filled"
        assert (usage.prompt_tokens, usage.completion_tokens) == (3, 10)
        await _idle(cluster)


async def test_text_and_stop_strings_go_on_where_they_were():
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.script = second.script = cluster.tokenizer.encode("a 🎉 for all, then a STOP sign")
        for place in range(1, len(cluster.tokenizer.encode("a 🎉 for all, then a STO"))):
            first.die_at = [place]
            reply = await cluster.generate(max_tokens=100, stop=["STOP"])
            assert (reply.text, reply.completion.path.num_resumptions) == ("a 🎉 for all, then a ", 1)


async def test_a_stream_resumes_at_a_worker_of_the_same_fingerprint_alone():
    cluster = FakeCluster(num_decode=2, num_prefill=0)
    async with cluster.running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.die_at = [4]
        second.identity.model_fingerprint = "other"
        await second.restart()
        await eventually(lambda: len(cluster.router.fleet.model.fingerprints) == 2)
        error = await _error(cluster.start(max_tokens=10))
        assert isinstance(error, errors.Unavailable)
        assert second.opened == []


async def test_a_stream_waits_a_moment_for_its_only_worker_to_come_back():
    async with FakeCluster().running() as cluster:
        call, reply = await _running(cluster)
        cluster.decode.go.set()
        await cluster.decode.restart()
        await _rest(call, reply)
        assert reply.token_ids == SCRIPT
        assert reply.completion.path.num_resumptions == 1


async def test_a_stream_waits_for_its_only_worker_for_longer_than_it_takes_to_miss_it():
    async with FakeCluster().running(heartbeat_timeout_s=0.55, replace_wait_s=60.0) as cluster:
        call, reply = await _running(cluster)
        await cluster.decode.kill()
        await eventually(lambda: cluster.router.parts.dispatcher.num_replacing)
        explained = await cluster.stub.Explain(router_pb2.ExplainRequest(prompt=generate_request()))
        assert explained.num_replacing_requests == 1
        # Longer than it would wait if nobody were away.
        await asyncio.sleep(2 * cluster.router.fleet.heartbeat_timeout_s)
        cluster.decode.go.set()
        await cluster.decode.restart()
        await _rest(call, reply)
        assert (reply.token_ids, reply.completion.path.num_resumptions) == (SCRIPT, 1)
        assert not cluster.router.parts.dispatcher.num_replacing


async def test_a_request_that_has_not_begun_waits_for_the_only_worker_as_well():
    async with FakeCluster().running(replace_wait_s=60.0) as cluster:
        cluster.prefill.may_commit.clear()
        call = cluster.start(max_tokens=10)
        await eventually(lambda: cluster.prefill.requests)
        await cluster.decode.kill()
        await eventually(lambda: cluster.router.parts.dispatcher.num_replacing)
        cluster.prefill.may_commit.set()
        await cluster.decode.restart()
        reply = await Reply.of(call)
        assert (reply.token_ids, reply.completion.path.num_resumptions) == (SCRIPT, 0)


async def test_a_stream_that_finds_no_place_says_for_how_long_it_waited_and_for_whom():
    async with FakeCluster().running(replace_wait_s=0.2) as cluster:
        call, reply = await _running(cluster)
        await cluster.decode.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _rest(call, reply)
        error = from_rpc_error(caught.value)
        assert isinstance(error, errors.Unavailable)
        assert "(replace_wait_s = 0.2)" in error.message
        assert f"{cluster.decode.address} is unreachable" in error.message
        await _idle(cluster)


async def test_a_stream_waits_for_its_only_worker_no_longer_than_its_deadline():
    async with FakeCluster().running(replace_wait_s=60.0) as cluster:
        call, reply = await _running(cluster, timeout=1.0)
        await cluster.decode.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _rest(call, reply)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: not cluster.router.parts.dispatcher.num_replacing)


@pytest.mark.parametrize("fault", ["is_silent", "is_wedged"])
async def test_a_stream_leaves_a_decode_worker_that_shows_no_life(fault):
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.go.clear()
        first.pause_at = 4
        call = cluster.start(max_tokens=10)
        await eventually(lambda: first.num_active)
        setattr(first, fault, True)
        reply = await Reply.of(call)
        assert reply.token_ids == SCRIPT
        assert reply.completion.path.decode_worker == second.identity.instance_id
        await eventually(lambda: first.num_cut_off == 1)


async def test_a_worker_lost_after_the_last_token_does_not_matter():
    async with FakeCluster().running() as cluster:
        cluster.decode.die_before_completion = True
        reply = await cluster.generate(max_tokens=10)
        assert reply.token_ids == SCRIPT
        assert reply.completion.finish_reason == types_pb2.FINISH_REASON_LENGTH
        path = reply.completion.path
        assert (path.decode_worker, path.kv_path) == (cluster.decode.identity.instance_id, types_pb2.KV_PATH_REMOTE)
        assert (path.num_resumptions, path.kv_bytes) == (0, 4096)


async def test_a_worker_lost_after_the_stop_token_does_not_matter():
    async with FakeCluster().running() as cluster:
        cluster.decode.script = [100, 2]
        cluster.decode.die_before_completion = True
        reply = await cluster.generate(max_tokens=10)
        assert (reply.token_ids, reply.completion.stop_token_id) == ([100], 2)
        assert reply.completion.usage.completion_tokens == 2


async def test_a_worker_lost_after_a_stop_string_does_not_matter():
    async with FakeCluster().running() as cluster:
        cluster.decode.script = cluster.tokenizer.encode("one two")
        cluster.decode.die_before_completion = True
        reply = await cluster.generate(max_tokens=len(cluster.decode.script), stop=["two"])
        assert (reply.text, reply.completion.stop_string) == ("one ", "two")


# The client leaves, or its time is up.


@pytest.mark.promise(1, 18)
@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
async def test_a_client_that_leaves_frees_every_worker_at_once(phase):
    async with FakeCluster().running() as cluster:
        (cluster.prefill.may_commit if phase == "prefilling" else cluster.decode.go).clear()
        call = cluster.start(max_tokens=10)
        await eventually(lambda: cluster.prefill.requests)
        call.cancel()
        await _idle(cluster)
        assert cluster.decode.num_cut_off == 1
        assert cluster.prefill.num_cut_off == (phase == "prefilling")


@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
async def test_a_deadline_frees_every_worker_at_once(phase):
    async with FakeCluster().running() as cluster:
        (cluster.prefill.may_commit if phase == "prefilling" else cluster.decode.go).clear()
        error = await _error(cluster.start(max_tokens=10, timeout=0.3))
        assert isinstance(error, errors.DeadlineExceeded)
        await _idle(cluster)


@pytest.mark.promise(7)
async def test_without_a_deadline_max_request_s_applies():
    async with FakeCluster().running(max_request_s=0.3) as cluster:
        cluster.decode.go.clear()
        error = await _error(cluster.start(timeout=None))
        assert isinstance(error, errors.DeadlineExceeded)
        assert cluster.decode.time_remaining_s < 0.4
        await _idle(cluster)


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
        await _idle(cluster)


# Workers leave service.


async def test_a_stream_that_is_handed_over_goes_on_elsewhere_and_nothing_has_failed():
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.die_at, first.dies_with = [4], HANDED_OVER
        reply = await cluster.generate([1, 2, 3], max_tokens=10)
        assert reply.token_ids == SCRIPT
        assert reply.completion.path.decode_worker == second.identity.instance_id
        assert reply.completion.path.num_resumptions == 1
        await _idle(cluster)


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
