"""Whatever is wrong with a request has its own status and names its field; afterwards every block is back and the
services still answer."""

import math

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from common.errors import from_rpc_error
from pdserve.v1 import decode_pb2, prefill_pb2, router_pb2, types_pb2, worker_pb2, worker_pb2_grpc
from tests.fakes.cluster import Reply
from tests.support.cluster import RealCluster

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    async with RealCluster().running() as running:
        yield running


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def still_answers(cluster):
    """After each test every block is back, and a prompt is served."""
    yield
    await cluster.settled()
    reply = await cluster.generate("Return", max_tokens=2, ignore_eos=True, sampling={"temperature": 0})
    assert len(reply.token_ids) == 2


async def refusal(call):
    """The error with which a call ends, as its domain class."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await (Reply.of(call) if hasattr(call, "__aiter__") else call)
    return from_rpc_error(raised.value)


SAMPLING = [
    ({"temperature": -0.1}, "sampling.temperature"),
    ({"temperature": math.nan}, "sampling.temperature"),
    ({"top_p": 0.0}, "sampling.top_p"),
    ({"top_p": 1.5}, "sampling.top_p"),
    ({"min_p": 1.5}, "sampling.min_p"),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
    ({"presence_penalty": 3.0}, "sampling.presence_penalty"),
    ({"logit_bias": {2048: 1.0}}, "sampling.logit_bias"),
]


@pytest.mark.parametrize(("sampling", "field"), SAMPLING, ids=[str(case[0]) for case in SAMPLING])
async def test_a_sampling_parameter_out_of_range_is_named(cluster, sampling, field):
    error = await refusal(cluster.start(sampling=sampling))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def chat(*messages: tuple[str, str], **variables: str) -> router_pb2.Chat:
    turns = [router_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return router_pb2.Chat(messages=turns, template_kwargs=variables)


REQUESTS = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt_token_ids"),
    ({"prompt": [5, 2048]}, "prompt_token_ids"),
    ({"prompt": [5] * 2048}, "prompt_token_ids"),
    ({"prompt": "word " * 3000}, "prompt"),
    ({"max_tokens": 0}, "stopping.max_tokens"),
    ({"stop": [""]}, "stopping.stop"),
    ({"stop_token_ids": [9999]}, "stopping.stop_token_ids"),
    ({"num_logprobs": 21}, "num_logprobs"),
    ({"priority": 101}, "priority"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"request_id": "ü" * 65}, "request_id"),
    ({"stop": ["x" * 1025]}, "stopping.stop"),
    ({"stop": ["x"] * 17}, "stopping.stop"),
    ({"stop_token_ids": [5] * 65}, "stopping.stop_token_ids"),
    ({"chat": chat(("x" * 65, "Hi"))}, "chat.messages.role"),
    ({"chat": chat(*[("user", "Hi")] * 4097)}, "chat.messages"),
    ({"chat": chat(**{str(number): "1" for number in range(65)})}, "chat.template_kwargs"),
    ({"chat": chat(**{"x" * 65: "1"})}, "chat.template_kwargs"),
    ({"chat": chat(deep="[" * 65_537)}, "chat.template_kwargs"),
]


@pytest.mark.parametrize(("fields", "field"), REQUESTS, ids=[case[1] + str(i) for i, case in enumerate(REQUESTS)])
async def test_a_request_field_out_of_range_is_named(cluster, fields, field):
    if fields.get("prompt") == []:
        request = router_pb2.GenerateRequest(prompt_token_ids=types_pb2.TokenIds())
        error = await refusal(cluster.stub.Generate(request, timeout=10))
    else:
        error = await refusal(cluster.start(**fields))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.field.startswith(field)


async def test_a_prompt_longer_than_the_context_hears_both_numbers(cluster):
    error = await refusal(cluster.start([5] * 3000))
    assert "3000" in error.message.replace(",", "")
    assert "2048" in error.message.replace(",", "")


async def test_a_request_without_input_is_named(cluster):
    error = await refusal(cluster.stub.Generate(router_pb2.GenerateRequest(), timeout=10))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "input")


async def test_another_model_is_not_found(cluster):
    error = await refusal(cluster.start(model="gpt-7"))
    assert error.code is grpc.StatusCode.NOT_FOUND


async def test_a_request_id_in_flight_already_exists(cluster):
    first = cluster.start(request_id="twin", max_tokens=500, ignore_eos=True)
    await first.read()
    error = await refusal(cluster.start(request_id="twin"))
    first.cancel()
    assert error.code is grpc.StatusCode.ALREADY_EXISTS


async def test_a_deadline_that_is_past_is_exceeded(cluster):
    error = await refusal(cluster.start(timeout=0.0))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.promise(19)
@pytest.mark.parametrize("payload", [b"\xff\xff\xff", b"\x22\x02\xc3\x28"], ids=["no message", "bad UTF-8"])
@pytest.mark.parametrize(
    ("service", "method"),
    [("RouterService", "Generate"), ("PrefillService", "Prefill"), ("DecodeService", "Decode")],
)
async def test_bytes_that_do_not_parse_are_an_invalid_argument(cluster, service, method, payload):
    if method == "Decode" and payload[0] != 0xFF:
        payload = b"\x0a\x04\x0a\x02\xc3\x28"
    if method == "Prefill" and payload[0] != 0xFF:
        payload = b"\x0a\x02\xc3\x28"
    address = {"PrefillService": cluster.prefills[0].address, "DecodeService": cluster.decodes[0].address}.get(service)
    async with grpc.aio.insecure_channel(address or cluster.address) as channel:
        path = f"/pdserve.v1.{service}/{method}"
        if method == "Prefill":
            error = await refusal(channel.unary_unary(path)(payload, timeout=10))
        elif method == "Generate":
            error = await refusal(channel.unary_stream(path)(payload, timeout=10))
        else:
            error = await refusal(channel.stream_stream(path)(iter([payload]), timeout=10))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


def open_request(cluster, **changes) -> decode_pb2.DecodeRequest:
    fields = {
        "request_id": "by hand",
        "token_ids": types_pb2.TokenIds(ids=range(10, 50)),
        "num_prompt_tokens": 40,
        "sampling": types_pb2.SamplingParams(seed=1),
        "model_fingerprint": cluster.decodes[0].worker.front.identity.model_fingerprint,
    }
    return decode_pb2.DecodeRequest(open=decode_pb2.Open(**{**fields, **changes}))


OPENS = [
    ({"model_fingerprint": "other"}, grpc.StatusCode.FAILED_PRECONDITION, "model_fingerprint"),
    ({"token_ids": None}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
    ({"num_prompt_tokens": 41}, grpc.StatusCode.INVALID_ARGUMENT, "num_prompt_tokens"),
    ({"sampling": None}, grpc.StatusCode.INVALID_ARGUMENT, "sampling.seed"),
    ({"token_ids": types_pb2.TokenIds(ids=[9999])}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
    ({"request_id": "x" * 129}, grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
    ({"cache_salt": "x" * 1000}, grpc.StatusCode.INVALID_ARGUMENT, "cache_salt"),
    ({"num_prompt_logprobs": 21}, grpc.StatusCode.INVALID_ARGUMENT, "num_prompt_logprobs"),
]


@pytest.mark.parametrize(("changes", "code", "field"), OPENS, ids=[case[2] + str(i) for i, case in enumerate(OPENS)])
async def test_a_worker_checks_what_a_router_sends(cluster, changes, code, field):
    error = await refusal(cluster.decode_stub.Decode(iter([open_request(cluster, **changes)]), timeout=10))
    assert (error.code, error.field) == (code, field)


async def test_a_decode_stream_begins_with_open(cluster):
    retry = decode_pb2.DecodeRequest(retry=decode_pb2.Retry(attempt=1))
    error = await refusal(cluster.decode_stub.Decode(iter([retry]), timeout=10))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "open")


def prefill_request(cluster, **changes) -> prefill_pb2.PrefillRequest:
    fields = {
        "request_id": "by hand",
        "reservation": 10**6,
        "attempt": 1,
        "pair_endpoint": cluster.decodes[0].address,
        "token_ids": types_pb2.TokenIds(ids=range(10, 50)),
        "num_prompt_tokens": 40,
        "sampling": types_pb2.SamplingParams(seed=1),
        "model_fingerprint": cluster.prefills[0].worker.front.identity.model_fingerprint,
    }
    return prefill_pb2.PrefillRequest(**{**fields, **changes})


PREFILLS = [
    ({}, grpc.StatusCode.ABORTED, ""),
    ({"attempt": 0}, grpc.StatusCode.INVALID_ARGUMENT, "attempt"),
    ({"num_cached_tokens": 7}, grpc.StatusCode.INVALID_ARGUMENT, "num_cached_tokens"),
    ({"pair_endpoint": "nowhere"}, grpc.StatusCode.INVALID_ARGUMENT, "pair_endpoint"),
    ({"pair_endpoint": "127.0.0.1:1"}, grpc.StatusCode.UNAVAILABLE, ""),
    ({"model_fingerprint": "other"}, grpc.StatusCode.FAILED_PRECONDITION, "model_fingerprint"),
]


@pytest.mark.parametrize(("changes", "code", "field"), PREFILLS, ids=[str(case[0]) for case in PREFILLS])
async def test_prefill_refuses_what_it_cannot_ship(cluster, changes, code, field):
    error = await refusal(cluster.prefill_stub.Prefill(prefill_request(cluster, **changes), timeout=10))
    assert (error.code, error.field) == (code, field)


@pytest.mark.parametrize("deadline_s", [math.nan, -1.0, math.inf])
async def test_a_drain_within_no_time_at_all_is_refused_and_nothing_drains(cluster, deadline_s):
    stub = worker_pb2_grpc.WorkerServiceStub(cluster.decodes[0].channel)
    call = stub.Drain(worker_pb2.DrainRequest(deadline_s=deadline_s), timeout=10)
    with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
        await call.read()
    assert not cluster.decodes[0].worker.front.draining


@pytest.mark.parametrize("interval_s", [math.nan, -1.0, math.inf])
async def test_load_is_told_at_times_that_exist(cluster, interval_s):
    stub = worker_pb2_grpc.WorkerServiceStub(cluster.decodes[0].channel)
    call = stub.WatchLoad(worker_pb2.WatchLoadRequest(min_interval_s=interval_s), timeout=10)
    with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
        await call.read()


async def test_a_static_pipeline_without_partitions_is_refused_with_the_reason(cluster):
    request = decode_pb2.SetPipelineRequest(mode=decode_pb2.PIPELINE_MODE_STATIC)
    error = await refusal(cluster.decode_stub.SetPipeline(request, timeout=10))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_GPU")
