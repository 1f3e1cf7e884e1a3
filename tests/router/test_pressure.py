"""Decode says that it is under pressure: new prompts are held back, and what has begun goes on."""

import asyncio

import grpc.aio
import pytest

from common import errors
from common.clock import FakeClock
from common.errors import from_rpc_error
from common.load import Load, PressureReason
from pdserve.v1 import decode_pb2, router_pb2, types_pb2
from router.hold import Hold
from router.ramp import Ramp
from router.workers import WorkerState
from tests.fakes.cluster import FakeCluster, Reply, eventually
from tests.fakes.decode import FakeDecode
from tests.router.values import worker

FEW_FREE = types_pb2.PRESSURE_REASON_FEW_FREE_BLOCKS
SLOW = types_pb2.PRESSURE_REASON_SLOW_STEPS
PREEMPTED = decode_pb2.PREFILL_NEEDED_REASON_PREEMPTED


def _seen(cluster: FakeCluster, decode: FakeDecode | None = None):
    """The worker as the router sees it."""
    address = (decode or cluster.decode).address
    return next(one for one in cluster.router.fleet.decode if one.address == address)


async def _press(cluster: FakeCluster, decode: FakeDecode | None = None, reason: int = FEW_FREE) -> None:
    (decode or cluster.decode).tell_load(pressure=[reason])
    await eventually(lambda: _seen(cluster, decode).is_pressed)


async def _hold(cluster: FakeCluster, *names: str, **fields) -> list:
    """Requests that come under pressure, one after the other."""
    calls = []
    for name in names:
        calls.append(cluster.start(request_id=name, max_tokens=1, **fields))
        await _held(cluster, len(calls))
    return calls


async def _held(cluster: FakeCluster, number: int) -> None:
    await eventually(lambda: cluster.router.parts.dispatcher.num_held == number)


def _metric(cluster: FakeCluster, name: str) -> float:
    return cluster.router.metrics.registry.get_sample_value(f"pdserve_router_{name}")


def _order(decode: FakeDecode) -> list[str]:
    return [opening.request_id for opening in decode.opened]


async def _error(call) -> errors.PdserveError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Reply.of(call)
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("num_prefill", [1, 0], ids=["remote", "local"])
async def test_prompts_are_held_back_and_go_on_in_their_order(num_prefill):
    async with FakeCluster(num_prefill=num_prefill, max_num_seqs=1).running() as cluster:
        await _press(cluster)
        calls = await _hold(cluster, "a", "b", "c")
        assert cluster.decode.opened == []
        assert _metric(cluster, "held_requests") == 3
        cluster.decode.tell_load(pressure=[])
        replies = [await Reply.of(call) for call in calls]
        assert _order(cluster.decode) == ["a", "b", "c"]
        assert _metric(cluster, "held_requests") == 0
        assert _metric(cluster, "held_seconds_count") == 3
        assert all(reply.completion.path.queue_ms > 0 for reply in replies)


async def test_the_time_held_is_part_of_the_queue_time_that_is_told():
    async with FakeCluster().running() as cluster:
        await _press(cluster)
        [call] = await _hold(cluster, "a")
        cluster.decode.tell_load(pressure=[])
        queue_ms = (await Reply.of(call)).completion.path.queue_ms
        assert queue_ms >= _metric(cluster, "held_seconds_sum") * 1e3 > 0


async def test_a_reason_that_this_router_does_not_know_holds_too():
    async with FakeCluster().running() as cluster:
        await _press(cluster, reason=99)
        assert _seen(cluster).load.pressure == (PressureReason.UNSPECIFIED,)


async def test_another_decode_worker_is_preferred():
    async with FakeCluster(num_decode=2).running() as cluster:
        pressed, other = sorted(cluster.decodes, key=lambda decode: decode.address)
        await _press(cluster, pressed)
        for _ in range(3):
            await cluster.generate(max_tokens=1)
        assert (len(pressed.opened), len(other.opened)) == (0, 3)
        assert _metric(cluster, "held_seconds_count") == 0


async def test_what_has_begun_goes_on_under_pressure():
    async with FakeCluster().running() as cluster:
        cluster.prefill.may_commit.clear()
        call = cluster.start(max_tokens=3)
        await eventually(lambda: cluster.prefill.requests)
        await _press(cluster)
        cluster.prefill.may_commit.set()
        assert len((await Reply.of(call)).token_ids) == 3


async def test_a_reservation_granted_under_pressure_is_filled():
    async with FakeCluster().running() as cluster:
        cluster.decode.may_reserve.clear()
        call = cluster.start(max_tokens=3)
        await eventually(lambda: cluster.decode.opened)
        await _press(cluster)
        cluster.decode.may_reserve.set()
        assert len((await Reply.of(call)).token_ids) == 3


async def test_a_preempted_request_begins_again_under_pressure():
    async with FakeCluster().running() as cluster:
        cluster.decode.pause_at = 2
        cluster.decode.go.clear()
        cluster.decode.lose_at = [(3, PREEMPTED)]
        responses = aiter(cluster.start(max_tokens=5))
        await anext(responses)
        await _press(cluster)
        cluster.decode.go.set()
        assert (await Reply.of(responses)).completion.path.num_resumptions == 1


async def test_a_stream_whose_worker_died_goes_on_at_one_under_pressure():
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.pause_at = 2
        first.go.clear()
        responses = aiter(cluster.start(max_tokens=5))
        await anext(responses)
        await _press(cluster, second)
        await first.kill()
        reply = await Reply.of(responses)
        assert reply.completion.path.decode_worker == second.identity.instance_id


async def test_a_request_that_leaves_while_held_leaves_no_trace():
    async with FakeCluster().running() as cluster:
        await _press(cluster)
        first, second = await _hold(cluster, "first", "second")
        first.cancel()
        await _held(cluster, 1)
        cluster.decode.tell_load(pressure=[])
        await Reply.of(second)
        assert _order(cluster.decode) == ["second"]


async def test_a_deadline_ends_the_hold():
    async with FakeCluster().running() as cluster:
        await _press(cluster)
        assert isinstance(await _error(cluster.start(timeout=0.2)), errors.DeadlineExceeded)
        await _held(cluster, 0)
        assert cluster.decode.opened == []


async def test_a_queue_full_of_held_requests_says_when_to_come_again():
    async with FakeCluster().running(max_queue_requests=1) as cluster:
        await _press(cluster)
        calls = await _hold(cluster, "a")
        error = await _error(cluster.start())
        assert (error.reason, error.retry_after_s) == ("QUEUE_FULL", 1.0)
        cluster.decode.tell_load(pressure=[])
        await Reply.of(calls[0])


async def test_pressure_does_not_outlive_the_worker_that_told_of_it():
    async with FakeCluster().running() as cluster:
        await _press(cluster)
        calls = await _hold(cluster, "a")
        cluster.decode.told.clear()
        await cluster.decode.restart()
        await Reply.of(calls[0])


async def test_a_worker_that_falls_silent_under_pressure_holds_nobody():
    async with FakeCluster().running() as cluster:
        await _press(cluster)
        calls = await _hold(cluster, "a")
        cluster.decode.is_silent = True
        assert (await _error(calls[0])).reason == "NO_WORKER"


async def test_requests_that_wait_for_room_are_not_called_held():
    async with FakeCluster(max_num_seqs=1).running() as cluster:
        cluster.decode.go.clear()
        calls = [cluster.start(max_tokens=1)]
        await eventually(lambda: cluster.decode.num_active == 1)
        await _press(cluster)
        calls.append(cluster.start(max_tokens=1))
        await eventually(lambda: len(cluster.router.parts.dispatcher.queue) == 1)
        assert cluster.router.parts.dispatcher.num_held == 0
        cluster.decode.go.set()
        cluster.decode.tell_load(pressure=[])
        for call in calls:
            await Reply.of(call)


async def test_after_slow_steps_prompts_come_one_by_one_until_the_batch_bears_them():
    async with FakeCluster().running() as cluster:
        await _press(cluster, reason=SLOW)
        cluster.decode.may_reserve.clear()
        calls = await _hold(cluster, "a", "b", "c")
        cluster.decode.tell_load(pressure=[], num_reserved=1)
        await eventually(lambda: not _seen(cluster).load.pressure)
        assert cluster.router.parts.dispatcher.num_held == 3, "something is on its way there already"
        cluster.decode.tell_load(num_reserved=0)
        await eventually(lambda: cluster.decode.opened)
        cluster.decode.may_reserve.set()
        await asyncio.gather(*map(Reply.of, calls))
        # What was on its way has joined the batch, so two may come at once, in whatever order their streams are opened.
        order = _order(cluster.decode)
        assert (set(order[:2]), order[2]) == ({"a", "b"}, "c")


async def test_a_prompt_that_would_leave_too_few_blocks_free_is_held_back():
    async with FakeCluster(num_total_blocks=100, num_spare_blocks=30).running() as cluster:
        cluster.decode.go.clear()
        calls = [cluster.start([1] * 16 * 49, max_tokens=1)]
        await eventually(lambda: cluster.decode.num_active == 1)
        calls.append(cluster.start([2] * 16 * 24, max_tokens=1))
        await _held(cluster, 1)
        cluster.decode.go.set()
        for call in calls:
            await Reply.of(call)
        assert _metric(cluster, "held_seconds_count") == 1


async def test_workers_are_listed_with_their_pressure():
    async with FakeCluster().running() as cluster:
        await _press(cluster, reason=SLOW)
        listed = (await cluster.stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5)).workers
        assert [list(one.pressure) for one in listed] == [[], [SLOW]]


def test_a_hold_counts_the_time_that_it_is_on():
    clock = FakeClock()
    hold = Hold(clock)
    clock.advance(1)
    hold.begin()
    clock.advance(2)
    assert (hold.is_on, hold.total_s) == (True, 2)
    assert hold.end() == 2
    clock.advance(4)
    hold.begin()
    clock.advance(8)
    assert (hold.end(), hold.total_s, hold.is_on) == (8, 10, False)


def test_after_slow_steps_one_more_is_pressure_until_its_kv_is_there():
    one = worker(load=Load(num_running=1, num_free_blocks=50, pressure=(PressureReason.SLOW_STEPS,)))
    quick = Load(num_running=1, num_free_blocks=50)
    seen = [one.is_pressed]
    one.hear(WorkerState.SERVING, quick._replace(num_reserved=1), 0, 0.0)
    seen.append(one.is_pressed)
    one.hear(WorkerState.SERVING, quick, 0, 0.0)
    for _ in range(2):
        one.take(num_blocks=1)
        seen.append(one.is_pressed)
    assert seen == [True, True, False, True], "the second time two may come"


def _ramp(*heard: tuple[Load, int]) -> list[int | None]:
    ramp, most = Ramp(), []
    for load, num_coming in heard:
        ramp.hear(load, num_coming=num_coming, max_num_seqs=8)
        most.append(ramp.most)
    return most


def test_a_ramp_doubles_each_time_that_all_have_joined():
    slow, quick = Load(pressure=(PressureReason.SLOW_STEPS,)), Load()
    assert _ramp((quick, 5), (slow, 5), (quick, 1), (quick, 0), (quick, 2), (quick, 0), (quick, 0)) == [
        None,
        1,
        1,
        2,
        2,
        4,
        None,
    ]


def test_a_ramp_begins_anew_when_steps_are_slow_again():
    slow, quick = Load(pressure=(PressureReason.SLOW_STEPS,)), Load()
    assert _ramp((slow, 0), (quick, 0), (quick, 0), (slow, 0)) == [1, 2, 4, 1]


def test_other_pressure_needs_no_ramp():
    assert _ramp((Load(pressure=(PressureReason.FEW_FREE_BLOCKS,)), 0)) == [None]
