"""The router as a process: what it imports, how it starts, and how it ends."""

import asyncio
import signal
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import Unavailable, from_rpc_error
from pdserve.v1 import router_pb2, router_pb2_grpc
from tests.fakes.cluster import FakeCluster, Reply, eventually


def test_nothing_heavy_is_imported():
    code = "import sys, router.__main__, router.router; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "router.session" in modules
    assert not {"torch", "transformers", "numpy", "safetensors"} & set(modules)


def test_it_starts_without_workers_says_so_and_ends_in_order(spawn, unused_address):
    nobody = "127.0.0.1:1"
    process = spawn("-m", "router", "--listen", unused_address, "--metrics-listen", "", "--decode", nobody)
    with grpc.insecure_channel(unused_address) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
        health = health_pb2_grpc.HealthStub(channel)
        status = health.Check(health_pb2.HealthCheckRequest(), timeout=10).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            list(
                router_pb2_grpc.RouterServiceStub(channel).Generate(router_pb2.GenerateRequest(prompt="x"), timeout=10)
            )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0


def test_a_model_folder_that_cannot_be_used_is_a_configuration_error(spawn, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    process = spawn("-m", "router", "--listen", "127.0.0.1:0", "--model", str(tmp_path))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "tokenizer.json cannot be used" in errors


async def test_a_drain_finishes_what_runs_and_takes_nothing_new():
    async with FakeCluster().running() as cluster:
        cluster.decode.go.clear()
        call = cluster.start(max_tokens=3)
        await eventually(lambda: cluster.decode.num_active)
        drain = asyncio.create_task(cluster.router.drain())
        await eventually(lambda: not cluster.router.health.is_ready)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not drain.done()
        cluster.decode.go.set()
        assert len((await Reply.of(call)).token_ids) == 3
        await asyncio.wait_for(drain, 10)


async def test_a_drain_ends_what_has_not_ended_in_its_time_and_says_so():
    async with FakeCluster().running(drain_s=0.05) as cluster:
        cluster.decode.go.clear()
        calls = [cluster.start(max_tokens=3) for _ in range(3)]
        await eventually(lambda: cluster.decode.num_active == 3)
        await asyncio.wait_for(cluster.router.drain(), 10)
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Reply.of(call)
            error = from_rpc_error(caught.value)
            assert (type(error), error.reason) == (Unavailable, "DRAIN_DEADLINE")
            assert "0.05 s after it was told to (drain_s)" in error.message
        await eventually(lambda: not cluster.decode.num_active)
