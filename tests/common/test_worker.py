"""The front end of a worker: what it says of itself while it works, stands still and leaves."""

import asyncio
import contextlib

import grpc
import pytest

from common.clock import FakeClock
from common.errors import PdserveError, Unavailable
from common.health import Health
from common.load import Load
from common.metrics import PrefillMetrics
from common.worker import HEARTBEAT_S, MIN_INTERVAL_S, WEDGED_S, WorkerFront, told_every_s
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from tests.fakes.cluster import eventually


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
async def front(clock):
    health = Health()
    health.set_ready(True)
    identity = worker_pb2.WorkerIdentity(instance_id="one")
    return WorkerFront(identity, health, PrefillMetrics(), clock=clock, drain_s=5.0), health


@pytest.mark.promise(6)
async def test_a_worker_lives_as_long_as_its_step_counter_moves(front, clock):
    worker, health = front
    for step, later_s, lives in ((1, 0.0, True), (1, WEDGED_S - 1, True), (1, 1.0, False), (2, 5.0, True)):
        clock.advance(later_s)
        worker.set_load(Load(step_counter=step))
        worker.check_progress()
        assert health.is_live is lives


@pytest.mark.parametrize(
    ("asked_s", "told_s"), [(None, MIN_INTERVAL_S), (0.0, MIN_INTERVAL_S), (0.1, 0.1), (60.0, HEARTBEAT_S)]
)
def test_load_is_told_as_seldom_as_was_asked_for_and_never_less_than_the_heartbeat(asked_s, told_s):
    assert told_every_s(worker_pb2.WatchLoadRequest(min_interval_s=asked_s)) == told_s


async def test_a_worker_tells_how_many_watch_it(front, serve, channel_to):
    worker, _ = front
    address = await serve(lambda server: worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server))
    stub = worker_pb2_grpc.WorkerServiceStub(channel_to(address))
    calls = [stub.WatchLoad(worker_pb2.WatchLoadRequest()) for _ in range(3)]
    assert sorted([(await call.read()).num_watchers for call in calls]) == [1, 2, 3]
    assert (await calls[0].read()).num_watchers == 3
    for call in calls[1:]:
        call.cancel()
    await eventually(lambda: worker.num_watchers == 1)
    calls[0].cancel()


async def test_what_changes_right_after_a_message_does_not_wait_for_the_heartbeat(front, monkeypatch):
    monkeypatch.setattr("common.worker.HEARTBEAT_S", 3600.0)
    worker, _ = front
    async with contextlib.aclosing(worker.WatchLoad(worker_pb2.WatchLoadRequest(), None)) as messages:
        for num_running in range(5):
            worker.set_load(Load(num_running=num_running))
            await asyncio.sleep(0)
            assert (await asyncio.wait_for(anext(messages), 20)).num_running == num_running


class Work:
    """A call at a worker, until it is told to finish or is evicted."""

    def __init__(self, worker: WorkerFront) -> None:
        self._worker = worker
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        with self._worker.call(self._ended.set_exception):
            await self._ended

    def finish(self) -> None:
        self._ended.set_result(None)


@pytest.fixture
async def drain_stub(front, serve, channel_to):
    worker, _ = front
    address = await serve(lambda server: worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server))
    return worker_pb2_grpc.WorkerServiceStub(channel_to(address))


@pytest.mark.promise(13)
async def test_a_drain_takes_nothing_new_and_ends_with_the_last_call(front, drain_stub):
    worker, health = front
    work = Work(worker)
    await asyncio.sleep(0)
    drain = aiter(drain_stub.Drain(worker_pb2.DrainRequest(), timeout=20))
    assert (await anext(drain)).num_remaining == 1
    assert not health.is_ready
    with pytest.raises(Unavailable) as caught, worker.call(work.finish):
        pass
    assert caught.value.reason == "DRAINING"
    work.finish()
    assert [response.done async for response in drain][-1]
    await work.task


async def test_a_drain_goes_on_when_its_caller_leaves_and_another_joins_it(front, drain_stub):
    worker, _ = front
    work = Work(worker)
    await asyncio.sleep(0)
    first = drain_stub.Drain(worker_pb2.DrainRequest(), timeout=20)
    await first.read()
    first.cancel()
    second = aiter(drain_stub.Drain(worker_pb2.DrainRequest(deadline_s=0.0), timeout=20))
    assert not (await anext(second)).done, "the deadline of the drain under way stands"
    assert worker.draining
    work.finish()
    assert [response.done async for response in second][-1]
    await work.task


async def test_what_a_drain_cannot_wait_for_is_handed_over(front, drain_stub):
    worker, _ = front
    work = Work(worker)
    await asyncio.sleep(0)
    drain = drain_stub.Drain(worker_pb2.DrainRequest(deadline_s=0.0), timeout=20)
    with pytest.raises(PdserveError) as caught:
        await work.task
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "HANDED_OVER")
    assert [response.done async for response in drain][-1]
