"""The front end of a worker: what it says of itself while it works, stands still and leaves."""

import pytest

from common.clock import FakeClock
from common.health import Health
from common.load import Load
from common.metrics import PrefillMetrics
from common.worker import WEDGED_S, WorkerFront
from pdserve.v1 import worker_pb2


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
