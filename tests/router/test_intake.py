"""What is refused at the door: the status, the field and the limit."""

import grpc.aio
import pytest

from common import errors
from common.errors import from_rpc_error
from pdserve.v1 import router_pb2, types_pb2
from router.servicer import client_of
from tests.fakes.cluster import FakeCluster, Reply, eventually


@pytest.fixture
async def cluster():
    async with FakeCluster().running() as cluster:
        yield cluster


async def _refusal(cluster: FakeCluster, prompt: object = "Once", **fields: object) -> errors.PdserveError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(prompt, **fields)
    assert cluster.decode.opened == []
    return from_rpc_error(caught.value)


@pytest.mark.parametrize(
    ("fields", "field", "limit"),
    [
        ({"prompt": None}, "input", "must be set"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt_token_ids": types_pb2.TokenIds()}, "prompt_token_ids.ids", "no tokens"),
        ({"prompt": [1] * 2048}, "prompt_token_ids.ids", "2,048 tokens, more than the context of 2,048"),
        ({"prompt": [1, 5000]}, "prompt_token_ids.ids", "below the vocabulary size 2,048, got 5,000 at position 1"),
        ({"chat": router_pb2.Chat()}, "chat.messages", "at least one"),
        ({"request_id": ""}, "request_id", "1 to 128 bytes"),
        ({"request_id": "é" * 65}, "request_id", "got 130 bytes"),
        ({"cache_salt": "x" * 257}, "cache_salt", "0 to 256 bytes"),
        ({"priority": 101}, "priority", "in [-100, 100]"),
        ({"num_logprobs": 21}, "num_logprobs", "at most 20"),
        ({"num_prompt_logprobs": 21}, "num_prompt_logprobs", "at most 20"),
        ({"sampling": types_pb2.SamplingParams(top_p=0)}, "sampling.top_p", "(0, 1]"),
        ({"sampling": types_pb2.SamplingParams(logit_bias={9999: 1})}, "sampling.logit_bias", "2048"),
        ({"max_tokens": 0}, "stopping.max_tokens", "at least 1"),
        ({"max_tokens": 5, "min_tokens": 6}, "stopping.min_tokens", "5"),
        ({"stop": [""]}, "stopping.stop", "empty"),
        ({"stop": ["x" * 1025]}, "stopping.stop", "1,024 characters"),
        ({"stop_token_ids": [2048]}, "stopping.stop_token_ids", "2048"),
    ],
)
async def test_what_can_never_work_is_refused_by_field_and_limit(cluster, fields, field, limit):
    error = await _refusal(cluster, **fields)
    assert isinstance(error, errors.InvalidArgument)
    assert error.field == field
    assert limit in error.message


async def test_another_model_is_not_found(cluster):
    error = await _refusal(cluster, model="gpt-5")
    assert isinstance(error, errors.NotFound)
    assert error.field == "model"
    await cluster.generate(model="tiny", max_tokens=1)


async def test_the_operator_can_bound_prompts():
    async with FakeCluster().running(max_prompt_tokens=10) as cluster:
        error = await _refusal(cluster, [1] * 11)
        assert "more than 10 tokens (max_prompt_tokens)" in error.message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "text"}, "prompt"),
        ({"chat": router_pb2.Chat(messages=[router_pb2.ChatMessage()])}, "chat"),
        ({"prompt": [1], "stop": ["x"]}, "stopping.stop"),
    ],
)
async def test_text_needs_a_tokenizer(fields, field):
    cluster = FakeCluster()
    cluster.tokenizer = None
    async with cluster.running():
        error = await _refusal(cluster, **fields)
        assert isinstance(error, errors.FailedPrecondition)
        assert error.field == field


async def test_a_request_id_is_in_flight_once(cluster):
    cluster.decode.go.clear()
    call = cluster.start(request_id="mine", max_tokens=1)
    await eventually(lambda: cluster.decode.num_active)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request_id="mine")
    assert isinstance(from_rpc_error(caught.value), errors.AlreadyExists)
    cluster.decode.go.set()
    await Reply.of(call)
    await cluster.generate(request_id="mine", max_tokens=1)


async def test_a_client_has_no_more_in_flight_than_it_may():
    async with FakeCluster().running(max_requests_per_client=2) as cluster:
        cluster.decode.go.clear()
        calls = [cluster.start(max_tokens=1) for _ in range(2)]
        await eventually(lambda: cluster.decode.num_active == 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate()
        error = from_rpc_error(caught.value)
        assert isinstance(error, errors.ResourceExhausted)
        assert (error.reason, error.retry_after_s) == ("CLIENT_LIMIT", 1.0)
        cluster.decode.go.set()
        for call in calls:
            await Reply.of(call)
        await cluster.generate(max_tokens=1)


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        ("ipv4:10.0.0.7:40112", "10.0.0.7"),
        ("ipv6:%5B::1%5D:40112", "::1"),
        ("ipv6:[2001:db8::7]:1", "2001:db8::7"),
        ("unix:/run/socket", "/run/socket"),
    ],
)
def test_a_client_is_the_host_of_its_peer(peer, client):
    assert client_of(peer) == client
