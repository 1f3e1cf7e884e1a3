"""The front end of a worker: what it says of itself while it works, stands still and leaves."""

import pytest

from common.clock import FakeClock
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
