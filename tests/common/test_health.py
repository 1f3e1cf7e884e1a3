from __future__ import annotations

import asyncio

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import errors, health, rpc

SERVING, NOT_SERVING, UNKNOWN = health.SERVING, health.NOT_SERVING, health.SERVICE_UNKNOWN
SERVICE = "pdserve.v1.RouterService"


@pytest.fixture
async def served(serve, channel_to):
    """(the Health of a running server, a stub for it)"""
    state = health.Health()
    address = await serve(lambda server: state.add_to(server, [SERVICE]))
    return state, health_pb2_grpc.HealthStub(channel_to(address))


async def check(stub, service):
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status


async def test_starts_not_ready_and_live(served):
    _, stub = served
    assert await check(stub, "") == NOT_SERVING
    assert await check(stub, health.LIVENESS) == SERVING


async def test_a_process_may_live_without_being_ready(served):
    state, stub = served
    state.set_ready(False)
    assert await check(stub, "") == await check(stub, SERVICE) == NOT_SERVING
    assert await check(stub, health.LIVENESS) == SERVING


@pytest.mark.promise(6)
async def test_without_progress_nothing_is_ready(served):
    state, stub = served
    state.set_ready(True)
    for live, status in ((False, NOT_SERVING), (True, SERVING)):
        state.set_live(live)
        assert {await check(stub, name) for name in ("", SERVICE, health.LIVENESS)} == {status}


async def test_an_unknown_name_is_not_found_and_the_known_ones_are_named(served):
    _, stub = served
    with pytest.raises(errors.NotFound, match=f"liveness, {SERVICE}"), rpc.translate():
        await check(stub, "pdserve.v1.Nope")


async def test_watch_streams_every_change(served):
    state, stub = served
    watching = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=5)
    assert (await watching.read()).status == NOT_SERVING
    for ready, status in ((True, SERVING), (False, NOT_SERVING), (True, SERVING)):
        state.set_ready(ready)
        assert (await watching.read()).status == status


async def test_watch_is_silent_when_its_own_status_stays(served):
    state, stub = served
    watching = stub.Watch(health_pb2.HealthCheckRequest(service=health.LIVENESS), timeout=5)
    assert (await watching.read()).status == SERVING
    state.set_ready(True)
    state.set_live(False)
    assert (await watching.read()).status == NOT_SERVING


async def test_watch_of_an_unknown_name_stays_open(served):
    _, stub = served
    watching = stub.Watch(health_pb2.HealthCheckRequest(service="later"), timeout=5)
    assert (await watching.read()).status == UNKNOWN


async def test_several_watchers_see_the_same(served):
    state, stub = served
    watchers = [stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5) for _ in range(3)]
    assert [(await one.read()).status for one in watchers] == [NOT_SERVING] * 3
    state.set_ready(True)
    assert [one.status for one in await asyncio.gather(*(one.read() for one in watchers))] == [SERVING] * 3
