"""Router, prefill and decode with mTLS on every channel between them."""

from __future__ import annotations

import shutil

import grpc
import grpc.aio
import pytest

from common import rpc
from pdserve.v1 import decode_pb2, router_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from tests.fakes.cluster import Reply, eventually, generate_request
from tests.support.certificates import Authority
from tests.support.cluster import RealCluster

GREEDY = {"temperature": 0}


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path / "authority")


async def test_a_prompt_crosses_a_cluster_whose_every_channel_is_mtls(authority):
    tls = authority.tls("operator")
    async with RealCluster(tls=tls, **authority.issue("worker")).running(**authority.issue("router")) as cluster:
        reply = await cluster.generate("The for statement", max_tokens=6, ignore_eos=True, sampling=GREEDY)
        assert reply.completion.path.kv_path == types_pb2.KV_PATH_REMOTE
        for one in (*cluster.prefills, *cluster.decodes):
            for stranger in (None, authority.tls()):
                async with rpc.connect(one.address, stranger) as channel:
                    call = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(worker_pb2.WatchLoadRequest())
                    with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                        await call.read()


async def test_a_rotation_of_every_certificate_and_of_the_authority_restarts_nobody(authority, tmp_path):
    files = {name: authority.issue(name) for name in ("worker", "router")}
    async with RealCluster(tls=authority.tls("operator"), **files["worker"]).running(**files["router"]) as cluster:
        await cluster.generate(max_tokens=2, sampling=GREEDY)
        new = Authority(tmp_path / "new")
        for name, old in files.items():
            for setting, path in new.issue(name).items():
                shutil.copyfile(path, old[setting])
        generations = {worker: worker.generation for worker in cluster.router.fleet.workers}
        for one in (*cluster.prefills, *cluster.decodes):
            await one.kill()
            await one.listen()
        await eventually(lambda: all(one.generation > before for one, before in generations.items()))
        async with rpc.connect(cluster.address, new.tls()) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            reply = await Reply.of(stub.Generate(generate_request("After it", max_tokens=2), timeout=30))
            assert reply.completion.path.kv_path == types_pb2.KV_PATH_REMOTE


async def test_workers_serve_whom_the_file_names_and_nobody_else_of_the_authority(authority, tmp_path):
    names = '[services]\nrouter = "certificate"\nprefill = "certificate"\n[operators]\nops = "certificate"\n'
    (tmp_path / "identities.toml").write_text(names)
    of_roles = {
        f"{role}_{setting}": path for role in ("prefill", "decode") for setting, path in authority.issue(role).items()
    }
    ops, alice = authority.tls("ops"), authority.tls("alice")
    cluster = RealCluster(tls=ops, identities=str(tmp_path / "identities.toml"), **of_roles)
    async with cluster.running(**authority.issue("router")):
        reply = await cluster.generate("The for statement", max_tokens=6, ignore_eos=True, sampling=GREEDY)
        assert reply.completion.path.kv_path == types_pb2.KV_PATH_REMOTE
        stream = cluster.decode_stub.Decode(iter([decode_pb2.DecodeRequest()]), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError, match=r"PERMISSION_DENIED|'ops' is of operators"):
            await stream.read()
        async with rpc.connect(cluster.decodes[0].address, alice) as channel:
            drain = worker_pb2_grpc.WorkerServiceStub(channel).Drain(worker_pb2.DrainRequest(), timeout=10)
            with pytest.raises(grpc.aio.AioRpcError, match="Drain is for operators"):
                await drain.read()
        assert not cluster.decodes[0].worker.front.draining
        drain = worker_pb2_grpc.WorkerServiceStub(cluster.decodes[0].channel).Drain(worker_pb2.DrainRequest())
        assert [message.done async for message in drain][-1]
        assert cluster.decodes[0].worker.front.draining
