"""What happens to a request when its decode worker fails under it."""

import asyncio

import grpc.aio
import pytest

from common import errors
from common.errors import from_rpc_error
from pdserve.v1 import router_pb2, types_pb2
from tests.fakes.cluster import FakeCluster, Reply, eventually, generate_request
from tests.router.following import SCRIPT, error_of, idle, rest, running


async def test_a_decode_worker_that_refuses_is_replaced_by_another():
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.refusal = errors.ResourceExhausted("KV is full")
        reply = await cluster.generate(max_tokens=10)
        assert reply.completion.path.decode_worker == second.identity.instance_id
        assert reply.completion.path.num_resumptions == 0
        await idle(cluster)


async def test_without_another_decode_worker_its_own_error_is_passed_on():
    async with FakeCluster().running() as cluster:
        cluster.decode.refusal = errors.ResourceExhausted("KV is full", retry_after_s=7.0, reason="KV_FULL")
        error = await error_of(cluster.start())
        assert isinstance(error, errors.ResourceExhausted)
        assert (error.message, error.retry_after_s, error.reason) == ("KV is full", 7.0, "KV_FULL")
        await idle(cluster)


async def test_a_stream_whose_decode_worker_dies_goes_on_elsewhere():
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.die_at = [4]
        reply = await cluster.generate([1, 2, 3], max_tokens=10)
        assert reply.token_ids == SCRIPT
        [opening] = second.opened
        assert list(opening.token_ids.ids) == [1, 2, 3, *SCRIPT[:4]]
        assert opening.num_prompt_tokens == 3
        assert opening.sampling == first.opened[0].sampling
        path, usage = reply.completion.path, reply.completion.usage
        assert path.decode_worker == second.identity.instance_id
        assert (path.num_resumptions, path.kv_path) == (1, types_pb2.KV_PATH_RECOMPUTED)
        assert path.kv_bytes == 2 * 4096, "both reservations were filled"
        assert (usage.prompt_tokens, usage.completion_tokens) == (3, 10)
        await idle(cluster)


async def test_text_and_stop_strings_go_on_where_they_were():
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.script = second.script = cluster.tokenizer.encode("a 🎉 for all, then a STOP sign")
        for place in range(1, len(cluster.tokenizer.encode("a 🎉 for all, then a STO"))):
            first.die_at = [place]
            reply = await cluster.generate(max_tokens=100, stop=["STOP"])
            assert (reply.text, reply.completion.path.num_resumptions) == ("a 🎉 for all, then a ", 1)


async def test_a_stream_resumes_at_a_worker_of_the_same_fingerprint_alone():
    cluster = FakeCluster(num_decode=2, num_prefill=0)
    async with cluster.running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.die_at = [4]
        second.identity.model_fingerprint = "other"
        await second.restart()
        await eventually(lambda: len(cluster.router.fleet.model.fingerprints) == 2)
        error = await error_of(cluster.start(max_tokens=10))
        assert isinstance(error, errors.Unavailable)
        assert second.opened == []


async def test_a_stream_waits_a_moment_for_its_only_worker_to_come_back():
    async with FakeCluster().running() as cluster:
        call, reply = await running(cluster)
        cluster.decode.go.set()
        await cluster.decode.restart()
        await rest(call, reply)
        assert reply.token_ids == SCRIPT
        assert reply.completion.path.num_resumptions == 1


async def test_a_stream_waits_for_its_only_worker_for_longer_than_it_takes_to_miss_it():
    async with FakeCluster().running(heartbeat_timeout_s=0.55, replace_wait_s=60.0) as cluster:
        call, reply = await running(cluster)
        await cluster.decode.kill()
        await eventually(lambda: cluster.router.parts.dispatcher.num_replacing)
        explained = await cluster.stub.Explain(router_pb2.ExplainRequest(prompt=generate_request()))
        assert explained.num_replacing_requests == 1
        # Longer than it would wait if nobody were away.
        await asyncio.sleep(2 * cluster.router.fleet.heartbeat_timeout_s)
        cluster.decode.go.set()
        await cluster.decode.restart()
        await rest(call, reply)
        assert (reply.token_ids, reply.completion.path.num_resumptions) == (SCRIPT, 1)
        assert not cluster.router.parts.dispatcher.num_replacing


async def test_a_request_that_has_not_begun_waits_for_the_only_worker_as_well():
    async with FakeCluster().running(replace_wait_s=60.0) as cluster:
        cluster.prefill.may_commit.clear()
        call = cluster.start(max_tokens=10)
        await eventually(lambda: cluster.prefill.requests)
        await cluster.decode.kill()
        await eventually(lambda: cluster.router.parts.dispatcher.num_replacing)
        cluster.prefill.may_commit.set()
        await cluster.decode.restart()
        reply = await Reply.of(call)
        assert (reply.token_ids, reply.completion.path.num_resumptions) == (SCRIPT, 0)


async def test_a_stream_that_finds_no_place_says_for_how_long_it_waited_and_for_whom():
    async with FakeCluster().running(replace_wait_s=0.2) as cluster:
        call, reply = await running(cluster)
        await cluster.decode.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(call, reply)
        error = from_rpc_error(caught.value)
        assert isinstance(error, errors.Unavailable)
        assert "(replace_wait_s = 0.2)" in error.message
        assert f"{cluster.decode.address} is unreachable" in error.message
        await idle(cluster)


async def test_a_stream_waits_for_its_only_worker_no_longer_than_its_deadline():
    async with FakeCluster().running(replace_wait_s=60.0) as cluster:
        call, reply = await running(cluster, timeout=1.0)
        await cluster.decode.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(call, reply)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: not cluster.router.parts.dispatcher.num_replacing)


@pytest.mark.parametrize("fault", ["is_silent", "is_wedged"])
async def test_a_stream_leaves_a_decode_worker_that_shows_no_life(fault):
    async with FakeCluster(num_decode=2).running() as cluster:
        first, second = sorted(cluster.decodes, key=lambda decode: decode.address)
        first.go.clear()
        first.pause_at = 4
        call = cluster.start(max_tokens=10)
        await eventually(lambda: first.num_active)
        setattr(first, fault, True)
        reply = await Reply.of(call)
        assert reply.token_ids == SCRIPT
        assert reply.completion.path.decode_worker == second.identity.instance_id
        await eventually(lambda: first.num_cut_off == 1)


async def test_a_worker_lost_after_the_last_token_does_not_matter():
    async with FakeCluster().running() as cluster:
        cluster.decode.die_before_completion = True
        reply = await cluster.generate(max_tokens=10)
        assert reply.token_ids == SCRIPT
        assert reply.completion.finish_reason == types_pb2.FINISH_REASON_LENGTH
        path = reply.completion.path
        assert (path.decode_worker, path.kv_path) == (cluster.decode.identity.instance_id, types_pb2.KV_PATH_REMOTE)
        assert (path.num_resumptions, path.kv_bytes) == (0, 4096)


async def test_a_worker_lost_after_the_stop_token_does_not_matter():
    async with FakeCluster().running() as cluster:
        cluster.decode.script = [100, 2]
        cluster.decode.die_before_completion = True
        reply = await cluster.generate(max_tokens=10)
        assert (reply.token_ids, reply.completion.stop_token_id) == ([100], 2)
        assert reply.completion.usage.completion_tokens == 2


async def test_a_worker_lost_after_a_stop_string_does_not_matter():
    async with FakeCluster().running() as cluster:
        cluster.decode.script = cluster.tokenizer.encode("one two")
        cluster.decode.die_before_completion = True
        reply = await cluster.generate(max_tokens=len(cluster.decode.script), stop=["two"])
        assert (reply.text, reply.completion.stop_string) == ("one ", "two")
