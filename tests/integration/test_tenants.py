"""What one client has is no other's: its streams, its prefixes, and what their timing would tell."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from common.identities import hash_of
from pdserve.v1 import types_pb2
from tests.fakes.cluster import Reply, generate_request
from tests.support.cluster import RealCluster

GREEDY = {"temperature": 0}
PROMPT = list(range(100, 196))
OTHER_PROMPT = list(range(300, 396))
# Workers are open here: routers show certificates, which are the matter of other tests.
IDENTITIES = f"""
[clients]
alice = "sha256:{hash_of("alice")}"
bob = "sha256:{hash_of("bob")}"
"""


@pytest.fixture
def identities(tmp_path) -> str:
    (tmp_path / "identities.toml").write_text(IDENTITIES)
    return str(tmp_path / "identities.toml")


def start(cluster: RealCluster, client: str, prompt=PROMPT, **fields):
    request = generate_request(prompt, **{"max_tokens": 4, "sampling": GREEDY, **fields})
    return cluster.stub.Generate(request, timeout=30, metadata=(("authorization", f"Bearer {client}"),))


async def generate(cluster: RealCluster, client: str, prompt=PROMPT, **fields) -> Reply:
    return await Reply.of(start(cluster, client, prompt, **fields))


@pytest.mark.parametrize("num_prefill", [1, 0], ids=["remote", "local"])
async def test_prompts_of_different_salts_share_nothing(num_prefill):
    async with RealCluster(num_prefill=num_prefill).running() as cluster:
        first = await cluster.generate(PROMPT, max_tokens=4, sampling=GREEDY, cache_salt="a")
        other = await cluster.generate(PROMPT, max_tokens=4, sampling=GREEDY, cache_salt="b")
        none = await cluster.generate(PROMPT, max_tokens=4, sampling=GREEDY)
        same = await cluster.generate(PROMPT, max_tokens=4, sampling=GREEDY, cache_salt="a")
        assert first.token_ids == other.token_ids == none.token_ids == same.token_ids
        for reply in (first, other, none):
            assert reply.completion.usage.cached_prompt_tokens == 0
            assert reply.completion.path.kv_path != types_pb2.KV_PATH_CACHED
            assert reply.completion.path.kv_bytes == first.completion.path.kv_bytes
        assert same.completion.usage.cached_prompt_tokens == 80
        assert same.completion.path.kv_path in (types_pb2.KV_PATH_CACHED, types_pb2.KV_PATH_LOCAL)


@pytest.mark.parametrize("salt", ["", "agreed"])
async def test_two_clients_share_nothing_even_with_the_same_salt(identities, salt):
    async with RealCluster().running(identities=identities) as cluster:
        first = await generate(cluster, "alice", cache_salt=salt)
        other = await generate(cluster, "bob", cache_salt=salt)
        forged = await generate(cluster, "bob", cache_salt=f"5:alice{salt}")
        again = await generate(cluster, "alice", cache_salt=salt)
        for reply in (other, forged):
            assert reply.completion.usage.cached_prompt_tokens == 0
            assert reply.completion.path.kv_bytes == first.completion.path.kv_bytes > 0
        assert again.completion.usage.cached_prompt_tokens == 80
        assert again.completion.path.kv_bytes == 0


async def test_one_request_id_of_two_clients_is_two_streams(identities):
    async with RealCluster().running(identities=identities) as cluster:
        alone = {
            "alice": await generate(cluster, "alice", max_tokens=40, ignore_eos=True),
            "bob": await generate(cluster, "bob", OTHER_PROMPT, max_tokens=40, ignore_eos=True),
        }
        assert alone["alice"].token_ids != alone["bob"].token_ids
        together = dict(
            zip(
                alone,
                await asyncio.gather(
                    generate(cluster, "alice", request_id="same", max_tokens=40, ignore_eos=True),
                    generate(cluster, "bob", OTHER_PROMPT, request_id="same", max_tokens=40, ignore_eos=True),
                ),
                strict=True,
            )
        )
        for name, reply in together.items():
            assert reply.token_ids == alone[name].token_ids
            assert reply.text == alone[name].text
            assert reply.request_ids == ["same"]


async def test_nobody_can_read_or_end_the_stream_of_another_by_its_id(identities):
    async with RealCluster().running(identities=identities) as cluster:
        expected = await generate(cluster, "alice", max_tokens=200, ignore_eos=True)
        stream = start(cluster, "alice", request_id="mine", max_tokens=200, ignore_eos=True)
        read, responses = Reply(), aiter(stream)
        read.add(await anext(responses))
        intruder = start(cluster, "bob", OTHER_PROMPT, request_id="mine", max_tokens=200, ignore_eos=True)
        await intruder.read()
        intruder.cancel()
        async for response in responses:
            read.add(response)
        assert read.token_ids == expected.token_ids


async def test_a_client_s_own_id_in_flight_is_refused_and_the_stream_goes_on(identities):
    async with RealCluster().running(identities=identities) as cluster:
        stream = start(cluster, "alice", request_id="mine", max_tokens=100, ignore_eos=True)
        read, responses = Reply(), aiter(stream)
        read.add(await anext(responses))
        with pytest.raises(grpc.aio.AioRpcError, match="ALREADY_EXISTS"):
            await generate(cluster, "alice", request_id="mine")
        async for response in responses:
            read.add(response)
        assert len(read.token_ids) == 100
