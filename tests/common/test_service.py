"""A small service made with `common.service`, as a process: what operators see when it starts, ends or cannot start."""

from __future__ import annotations

import asyncio
import signal

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common import health, rpc
from tests.support.certificates import Authority

NAME = "pdserve.v1.RouterService"

SERVICE = """
import asyncio, sys
from common import health, metrics, service
from common.config import RouterConfig
from pdserve.v1 import router_pb2_grpc

async def drain():
    print("draining", flush=True)
    await asyncio.to_thread(sys.stdin.readline)

async def run(config):
    state = health.Health()
    state.set_ready(True)
    def add(server):
        router_pb2_grpc.add_RouterServiceServicer_to_server(router_pb2_grpc.RouterServiceServicer(), server)
    names = ["pdserve.v1.RouterService"]
    await service.serve(config, add, names, health=state, metrics=metrics.RouterMetrics(), drain=drain)

service.main(RouterConfig, run)
"""


@pytest.fixture
async def started(spawn, channel_to):
    """`process, channel = await started(*flags)`: the service above, serving."""

    async def start(*flags):
        process = spawn("-c", SERVICE, "--listen", "127.0.0.1:0", "--metrics-listen", "", *flags)
        while "serving" not in (line := await asyncio.to_thread(process.stderr.readline)):
            assert line, "the service ended"
        port = dict(pair.split("=") for pair in line.split() if "=" in pair)["port"]
        channel = channel_to(f"127.0.0.1:{port}")
        channel.target = f"127.0.0.1:{port}"
        return process, channel

    return start


async def ready(channel):
    reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    return reply.status == health.SERVING


async def end_of(process):
    return await asyncio.wait_for(asyncio.to_thread(process.wait), 10)


async def test_serves_health_and_reflection_and_ends_in_order(started):
    process, channel = await started()
    assert await ready(channel)
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    reply = await stub.ServerReflectionInfo(iter([request]), timeout=5).read()
    assert {NAME, "grpc.health.v1.Health"} <= {one.name for one in reply.list_services_response.service}

    process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.stdout.readline) == "draining\n"
    assert not await ready(channel)
    process.stdin.write("done\n")
    process.stdin.flush()
    assert await end_of(process) == 0


async def test_a_second_signal_cuts_the_drain_short(started):
    process, _ = await started()
    process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(process.stdout.readline) == "draining\n"
    process.send_signal(signal.SIGINT)
    process.stdin.close()
    assert await end_of(process) == 0


async def test_health_alone_can_be_served_on_a_port_of_its_own(started, unused_address, channel_to):
    await started("--health-listen", unused_address)
    channel = channel_to(unused_address)
    assert await ready(channel)


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen", "--health-listen"])
async def test_a_port_in_use_ends_the_start_with_one_line(serve, spawn, flag):
    address = await serve(lambda server: None)
    process = spawn("-c", SERVICE, "--listen", "127.0.0.1:0", "--metrics-listen", "", flag, address)
    _, errors = await asyncio.wait_for(asyncio.to_thread(process.communicate), 10)
    assert errors == f"router: cannot listen on {address}: Address already in use\n"
    assert process.returncode == 2


async def test_a_wrong_setting_ends_the_start_with_one_line(spawn):
    process = spawn("-c", SERVICE, "--max-queue-request", "5")
    _, errors = await asyncio.wait_for(asyncio.to_thread(process.communicate), 10)
    assert errors == "router: unknown argument '--max-queue-request'; did you mean '--max-queue-requests'?\n"
    assert process.returncode == 2


async def test_beside_mtls_health_alone_is_plaintext(started, unused_address, channel_to, tmp_path):
    authority = Authority(tmp_path)
    files = authority.issue("router")
    flags = [word for name, path in files.items() for word in ("--" + name.replace("_", "-"), path)]
    _, plaintext = await started(*flags, "--tls-client-certificates", "--health-listen", unused_address)
    with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
        await ready(plaintext)
    assert await ready(channel_to(unused_address))
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
        await (
            reflection_pb2_grpc.ServerReflectionStub(channel_to(unused_address))
            .ServerReflectionInfo(iter([request]), timeout=5)
            .read()
        )
    async with rpc.connect(plaintext.target, authority.tls("operator")) as channel:
        assert await ready(channel)
        reply = (
            await reflection_pb2_grpc.ServerReflectionStub(channel)
            .ServerReflectionInfo(iter([request]), timeout=5)
            .read()
        )
        assert NAME in {one.name for one in reply.list_services_response.service}
