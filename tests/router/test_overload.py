"""What waits, where it waits, and what is turned away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest

from common import errors, rpc
from common.errors import from_rpc_error
from pdserve.v1 import router_pb2_grpc
from router.fair_share import OUTPUT_WEIGHT
from router.service_rate import ENOUGH, RECENT
from router.session import Session
from tests.fakes.cluster import PATIENCE_S, FakeCluster, Reply, eventually, generate_request
from tests.router.values import request


async def _error(call) -> errors.PdserveError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Reply.of(call)
    return from_rpc_error(caught.value)


def _queue(cluster: FakeCluster):
    return cluster.router.parts.dispatcher.queue


async def _occupied(cluster: FakeCluster):
    """The one slot of the one decode worker is taken until `go`."""
    cluster.decode.go.clear()
    call = cluster.start(request_id="first", max_tokens=1)
    await eventually(lambda: cluster.decode.num_active == 1)
    return call


async def _in_queue(cluster: FakeCluster, number: int) -> None:
    await eventually(lambda: len(_queue(cluster)) == number)


def _turned_away(cluster: FakeCluster, reason: str) -> float:
    return cluster.router.metrics.registry.get_sample_value("pdserve_router_turned_away_total", {"reason": reason})


def _order(cluster: FakeCluster) -> list[str]:
    return [opening.request_id for opening in cluster.decode.opened]


async def test_overload_waits_in_the_router_and_not_at_decode():
    async with FakeCluster(max_num_seqs=1).running() as cluster:
        calls = [await _occupied(cluster)]
        calls += [cluster.start(request_id=f"{place}", max_tokens=1) for place in range(5)]
        await _in_queue(cluster, 5)
        assert _order(cluster) == ["first"]
        cluster.decode.go.set()
        for call in calls:
            await Reply.of(call)
        assert len(_order(cluster)) == 6


async def test_kv_blocks_are_waited_for_too():
    async with FakeCluster(num_total_blocks=100).running() as cluster:
        calls = [await _occupied(cluster)]
        calls.append(cluster.start([1] * 16 * 97, request_id="big", max_tokens=16))
        await _in_queue(cluster, 1)
        cluster.decode.go.set()
        for call in calls:
            await Reply.of(call)


async def test_higher_priorities_leave_the_queue_first():
    async with FakeCluster(max_num_seqs=1).running() as cluster:
        calls = [await _occupied(cluster)]
        for place, priority in enumerate([0, -1, 5]):
            calls.append(cluster.start(request_id=f"priority {priority}", priority=priority, max_tokens=1))
            await _in_queue(cluster, place + 1)
        cluster.decode.go.set()
        for call in calls:
            await Reply.of(call)
        assert _order(cluster) == ["first", "priority 5", "priority 0", "priority -1"]


async def test_a_full_queue_says_when_to_come_again():
    async with FakeCluster(max_num_seqs=1).running(max_queue_requests=1) as cluster:
        calls = [await _occupied(cluster), cluster.start(max_tokens=1)]
        await _in_queue(cluster, 1)
        error = await _error(cluster.start())
        assert isinstance(error, errors.ResourceExhausted)
        assert (error.reason, error.retry_after_s) == ("QUEUE_FULL", 1.0)
        cluster.decode.go.set()
        for call in calls:
            await Reply.of(call)


@contextlib.asynccontextmanager
async def _another_client(cluster: FakeCluster, folder: Path) -> AsyncIterator[Callable]:
    """The same router, reached from what is another host for it; yields what makes its calls."""
    server = rpc.create_server()
    cluster.router.add_to(server)
    server.add_insecure_port(f"unix:{folder / 'router'}")
    await server.start()
    async with rpc.connect(f"unix:{folder / 'router'}") as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        yield lambda **fields: stub.Generate(generate_request(**fields), timeout=PATIENCE_S)
    await server.stop(None)


async def test_a_client_that_floods_waits_behind_one_that_asks_for_little(tmp_path_factory):
    async with (
        FakeCluster(max_num_seqs=1).running() as cluster,
        _another_client(cluster, tmp_path_factory.mktemp("s")) as start,
    ):
        calls = [await _occupied(cluster)]
        for place in range(3):
            calls.append(cluster.start(request_id=f"flood {place}", priority=100, max_tokens=1))
            await _in_queue(cluster, place + 1)
        calls.append(start(request_id="calm", max_tokens=1))
        await _in_queue(cluster, 4)
        assert cluster.router.metrics.registry.get_sample_value("pdserve_router_queue_clients") == 2
        cluster.decode.go.set()
        for call in calls:
            await Reply.of(call)
        assert _order(cluster) == ["first", "calm", "flood 0", "flood 1", "flood 2"]


async def test_a_flood_that_fills_the_queue_makes_room_for_another_client(tmp_path_factory):
    async with (
        FakeCluster(max_num_seqs=1).running(max_queue_requests=2) as cluster,
        _another_client(cluster, tmp_path_factory.mktemp("s")) as start,
    ):
        calls = [await _occupied(cluster)]
        for place in range(2):
            calls.append(cluster.start(request_id=f"flood {place}", max_tokens=1))
            await _in_queue(cluster, place + 1)
        calls.append(start(request_id="calm", max_tokens=1))
        error = await _error(calls.pop(2))
        assert (error.code.name, error.reason, error.retry_after_s) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 1.0)
        assert _turned_away(cluster, "QUEUE_FULL") == 1
        cluster.decode.go.set()
        for call in calls:
            await Reply.of(call)
        assert _order(cluster) == ["first", "calm", "flood 0"]


async def _backlog(cluster: FakeCluster) -> None:
    """Served, so that the queue knows how fast it moves."""
    calls = [await _occupied(cluster)]
    calls += [cluster.start(max_tokens=3) for _ in range(ENOUGH)]
    await _in_queue(cluster, ENOUGH)
    cluster.decode.go.set()
    for call in calls:
        await Reply.of(call)


async def test_what_would_end_after_its_deadline_is_refused_before_a_worker_hears_of_it():
    async with FakeCluster(max_num_seqs=1).running() as cluster:
        await _backlog(cluster)
        for _ in range(RECENT):
            _queue(cluster).rate.streamed(1.0, num_tokens=1)
        call = await _occupied(cluster)
        error = await _error(cluster.start(request_id="late", max_tokens=100, ignore_eos=True, timeout=20.0))
        assert (error.code.name, error.reason) == ("DEADLINE_EXCEEDED", "PREDICTED_TOO_LATE")
        assert _turned_away(cluster, "PREDICTED_TOO_LATE") == 1
        cluster.decode.go.set()
        await Reply.of(call)
        assert "late" not in _order(cluster)


async def test_what_waits_is_dropped_as_soon_as_it_is_known_to_end_too_late():
    async with FakeCluster(max_num_seqs=1).running() as cluster:
        await _backlog(cluster)
        call = await _occupied(cluster)
        late = cluster.start(request_id="late", max_tokens=100, ignore_eos=True, timeout=60.0)
        await _in_queue(cluster, 1)
        for _ in range(RECENT):
            _queue(cluster).rate.streamed(1.0, num_tokens=1)
        assert (await _error(late)).reason == "PREDICTED_TOO_LATE"
        cluster.decode.go.set()
        await Reply.of(call)
        assert "late" not in _order(cluster)


async def test_prompt_and_output_are_charged_to_the_client():
    async with FakeCluster().running() as cluster:
        await cluster.generate([1] * 10, max_tokens=5)
        assert _queue(cluster).fair_share.given("127.0.0.1") == 10 + 5 * OUTPUT_WEIGHT


async def test_a_deadline_ends_the_wait():
    async with FakeCluster(max_num_seqs=1).running() as cluster:
        call = await _occupied(cluster)
        assert isinstance(await _error(cluster.start(timeout=0.2)), errors.DeadlineExceeded)
        await _in_queue(cluster, 0)
        cluster.decode.go.set()
        await Reply.of(call)
        assert _order(cluster) == ["first"]


async def test_a_client_that_leaves_the_queue_leaves_no_trace():
    async with FakeCluster(max_num_seqs=1).running() as cluster:
        first = await _occupied(cluster)
        second = cluster.start(request_id="second")
        await _in_queue(cluster, 1)
        second.cancel()
        await _in_queue(cluster, 0)
        cluster.decode.go.set()
        await Reply.of(first)
        await cluster.generate(request_id="third", max_tokens=1)
        assert _order(cluster) == ["first", "third"]


async def test_a_prompt_that_no_worker_can_hold_is_answered_by_decode_itself():
    async with FakeCluster(num_total_blocks=10).running() as cluster:
        cluster.decode.refusal = errors.InvalidArgument("does not fit", field="stopping.max_tokens")
        error = await _error(cluster.start([1] * 1000))
        assert (error.message, error.field) == ("does not fit", "stopping.max_tokens")


async def test_without_a_decode_worker_requests_are_turned_away_at_once():
    async with FakeCluster().running() as cluster:
        await cluster.decode.kill()
        dispatcher, fleet = cluster.router.parts.dispatcher, cluster.router.fleet
        await eventually(lambda: dispatcher.stranded_s >= fleet.heartbeat_timeout_s)
        error = await _error(cluster.start())
        assert isinstance(error, errors.Unavailable)
        assert error.reason == "NO_WORKER"
        assert f"{cluster.decode.address} is unreachable" in error.message


async def test_what_waits_when_the_last_decode_worker_is_lost_is_turned_away_after_a_moment():
    async with FakeCluster(max_num_seqs=1).running() as cluster:
        first = await _occupied(cluster)
        second = cluster.start()
        await _in_queue(cluster, 1)
        await cluster.decode.kill()
        for call in (first, second):
            assert isinstance(await _error(call), errors.Unavailable)


async def test_what_waits_while_the_decode_worker_restarts_is_served():
    async with FakeCluster(max_num_seqs=1).running() as cluster:
        first = await _occupied(cluster)
        second = cluster.start(request_id="second", max_tokens=1)
        await _in_queue(cluster, 1)
        cluster.decode.go.set()
        await cluster.decode.restart()
        await Reply.of(second)
        first.cancel()


async def test_what_comes_in_the_moment_in_which_nobody_serves_waits_for_it_to_pass():
    async with FakeCluster().running(heartbeat_timeout_s=30.0, replace_wait_s=30.0) as cluster:
        await cluster.decode.kill()
        await eventually(lambda: not cluster.router.fleet.can_serve)
        call = cluster.start(max_tokens=1)
        await _in_queue(cluster, 1)
        await cluster.decode.restart()
        assert len((await Reply.of(call)).token_ids) == 1


async def test_what_changes_in_one_turn_is_one_search_for_a_place(monkeypatch):
    async with FakeCluster().running() as cluster:
        dispatcher, searches = cluster.router.parts.dispatcher, []
        monkeypatch.setattr(dispatcher, "_place_waiting", lambda: searches.append(None))
        for _ in range(1000):
            dispatcher.wake()
        await eventually(lambda: searches)
        assert len(searches) < 10


async def test_requests_go_where_there_is_room():
    async with FakeCluster(num_decode=3, max_num_seqs=2).running() as cluster:
        for decode in cluster.decodes:
            decode.go.clear()
        calls = [cluster.start(max_tokens=1) for _ in range(6)]
        await eventually(lambda: sum(decode.num_active for decode in cluster.decodes) == 6)
        assert [decode.num_active for decode in cluster.decodes] == [2, 2, 2]
        for decode in cluster.decodes:
            decode.go.set()
        for call in calls:
            await Reply.of(call)


async def test_a_draining_decode_worker_gets_nothing_new_and_finishes_what_it_has():
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.go.clear()
        call = cluster.start(max_tokens=2)
        await eventually(lambda: first.num_active)
        first.drain()
        await eventually(lambda: not cluster.router.fleet.decode[cluster.decodes.index(first)].is_serving)
        await cluster.generate(max_tokens=2)
        assert (len(first.opened), len(second.opened)) == (1, 1)
        first.go.set()
        assert (await Reply.of(call)).completion.path.decode_worker == first.identity.instance_id


async def test_a_client_that_does_not_read_takes_no_room():
    async with FakeCluster(max_num_seqs=1).running() as cluster:
        reads = asyncio.Event()
        asked = request("slow", max_tokens=5, deadline_s=cluster.router.parts.clock() + 60)
        slow = asyncio.create_task(Session(asked, cluster.router.parts).run(lambda piece: reads.wait()))
        await eventually(lambda: cluster.decode.opened and not cluster.decode.num_active)
        await cluster.generate(max_tokens=1)
        reads.set()
        assert (await slow).usage.completion_tokens == 5


async def test_a_small_request_of_higher_priority_does_not_wait_behind_one_that_has_no_room():
    async with FakeCluster(num_total_blocks=100).running() as cluster:
        calls = [await _occupied(cluster)]
        calls.append(cluster.start([1] * 16 * 97, request_id="big", max_tokens=16))
        await _in_queue(cluster, 1)
        calls.append(cluster.start([1], request_id="small", priority=1, max_tokens=1))
        await eventually(lambda: "small" in _order(cluster))
        cluster.decode.go.set()
        for call in calls:
            await Reply.of(call)
