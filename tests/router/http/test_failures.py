"""What is refused over HTTP: with which status, for whom to try again, naming which parameter."""

import asyncio
import io
import json

import openai
import pytest

from common import errors
from pdserve.v1 import router_pb2
from router.http.api import Api
from router.http.asked import MAX_CHOICES
from router.http.failures import ANSWERS
from router.http.fields import FIELDS, OF_CHAT
from tests.fakes.cluster import FakeCluster, eventually
from tests.support.http_face import http_face

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


def test_every_error_has_a_status():
    assert set(ANSWERS) == set(errors.BY_CODE)


def test_every_knob_of_the_contract_has_a_parameter():
    paths = {field.path for field in [*FIELDS.values(), *OF_CHAT.values()]}
    request = router_pb2.GenerateRequest.DESCRIPTOR
    for group in ("sampling", "stopping"):
        knobs = {f"{group}.{field.name}" for field in request.fields_by_name[group].message_type.fields}
        assert knobs <= paths


COMPLETION_REFUSALS = [
    ({"prompt": "x", "top_p": 2}, "top_p"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "temperature": True}, "temperature"),
    ({"prompt": "x", "temperature": 10**400}, "temperature"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "stop": [1]}, "stop"),
    ({"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"5000": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": []}, "logit_bias"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "seed": 2**64}, "seed"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": MAX_CHOICES + 1}, "n"),
    ({"prompt": ["x"] * 65, "n": 2}, "n"),
    ({"prompt": ["x"] * (MAX_CHOICES + 1)}, "prompt"),
    ({"prompt": "x", "n": 2, "best_of": 3}, "best_of"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "user": 5}, "user"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": True, "stream_options": {"x": True}}, "stream_options"),
    ({"prompt": "x", "cache_salt": "x" * 257}, "cache_salt"),
    ({"prompt": "x", "priority": 101}, "priority"),
    ({"prompt": "x", "messages": HI}, "messages"),
    ({"prompt": "x", "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "x", "\ud800": 1}, "\ud800"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [5, 5000]}, "prompt"),
    ({"prompt": [5, "x"]}, "prompt"),
    ({"prompt": [["x"]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [5] * 2048}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({}, "prompt"),
]


@pytest.mark.parametrize(
    ("body", "param"), COMPLETION_REFUSALS, ids=[f"{n}-{case[1]!a}" for n, case in enumerate(COMPLETION_REFUSALS)]
)
async def test_a_parameter_of_a_completion_is_named(cluster, face, body, param):
    answer = await face.post(COMPLETIONS, data=json.dumps(body), headers={"Content-Type": "application/json"})
    assert (answer.status, answer.error["param"]) == (400, param)
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"
    assert "Retry-After" not in answer.headers
    assert cluster.decode.opened == []


CHAT_REFUSALS = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [*HI, {"role": "user", "content": "x", "name": "y"}]}, "messages[1].name"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "u" * 65, "content": "x"}]}, "messages.role"),
    ({"messages": HI, "prompt": "x"}, "prompt"),
    ({"messages": HI, "echo": True}, "echo"),
    ({"messages": HI, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": HI, "tool_choice": "auto"}, "tool_choice"),
    ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": HI, "modalities": ["text", "audio"]}, "modalities"),
    ({"messages": HI, "audio": {}}, "audio"),
    ({"messages": HI, "reasoning_effort": "low"}, "reasoning_effort"),
    ({"messages": HI, "store": True}, "store"),
    ({"messages": HI, "top_logprobs": 5}, "top_logprobs"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": HI, "logprobs": 5}, "logprobs"),
    ({"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens"),
    ({"messages": HI, "max_tokens": 5, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"messages": HI, "chat_template_kwargs": []}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(
    ("body", "param"), CHAT_REFUSALS, ids=[f"{n}-{case[1]}" for n, case in enumerate(CHAT_REFUSALS)]
)
async def test_a_parameter_of_a_chat_is_named(cluster, face, body, param):
    answer = await face.post(CHATS, body)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert cluster.decode.opened == []


async def test_parameters_that_ask_for_nothing_are_as_good_as_absent(face):
    nothing = {"tools": [], "response_format": {"type": "text"}, "store": False, "service_tier": "auto", "seed": None}
    body = {"messages": HI, "max_tokens": 1, "user": "me", "temperature": None, "functions": None, **nothing}
    assert (await face.post(CHATS, body)).status == 200


async def test_a_name_that_is_nearly_right_is_told_the_right_one(face):
    answer = await face.post(COMPLETIONS, {"prompt": "x", "temprature": 1})
    assert "did you mean 'temperature'?" in answer.error["message"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"5", b'{"prompt": NaN}', b'{"a": ' * 5000, b"\xff\xfe", b'{"n": 1' + b"0" * 5000 + b"}"],
    ids=lambda raw: ascii(raw[:12]),
)
async def test_a_body_that_is_no_json_object_is_told_so(face, raw):
    answer = await face.post(COMPLETIONS, data=raw, headers={"Content-Type": "application/json"})
    assert (answer.status, answer.error["code"]) == (400, "MALFORMED_MESSAGE")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
    ids=str,
)
async def test_a_body_of_another_type_is_415(face, headers):
    answer = await face.post(COMPLETIONS, data=b'{"prompt": "x"}', headers=headers)
    assert (answer.status, answer.error["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


async def test_a_body_that_is_too_large_is_413(cluster, face):
    body = io.BytesIO(b'{"prompt": "' + b"x" * 5_000_000 + b'"}')
    answer = await face.post(COMPLETIONS, data=body, headers={"Content-Type": "application/json"})
    assert (answer.status, answer.error["type"]) == (413, "invalid_request_error")


async def test_headers_that_are_too_large_or_too_many_are_400(face):
    for headers in ({"x": "y" * 9000}, {f"x-{number}": "y" for number in range(100)}):
        assert (await face.get("/health", headers=headers)).status == 400


async def test_other_paths_and_methods_are_404_and_405(face):
    lost = await face.get("/v1/embeddings")
    assert (lost.status, lost.error["message"]) == (404, "there is nothing at /v1/embeddings")
    wrong = await face.get(COMPLETIONS)
    assert wrong.status == 405
    assert set(wrong.headers["Allow"].split(",")) == {"OPTIONS", "POST"}


async def test_another_model_is_404(face):
    with pytest.raises(openai.NotFoundError, match="there is 'tiny'") as caught:
        await face.client.completions.create(model="gpt-7", prompt="x")
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("error", "status", "code", "repeat"),
    [
        (errors.ResourceExhausted("full", retry_after_s=2.5), 429, "RESOURCE_EXHAUSTED", ("true", "3")),
        (errors.DataLoss("broken"), 500, "CHECKSUM_MISMATCH", ("true", "1")),
        (errors.Internal("a bug"), 500, "INTERNAL", ("false", None)),
    ],
    ids=lambda value: getattr(value, "message", None),
)
async def test_what_a_worker_says_before_the_first_token_is_the_status(cluster, face, error, status, code, repeat):
    cluster.decode.refusal = error
    for stream in (False, True):
        answer = await face.post(COMPLETIONS, {"prompt": "x", "stream": stream})
        assert (answer.status, answer.error["code"]) == (status, code)
        assert (answer.headers["x-should-retry"], answer.headers.get("Retry-After")) == repeat


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(cluster, face):
    cluster.decode.die_at = [2] * 10
    cluster.decode.dies_with = errors.InvalidArgument("not like this")
    *events, last = [event async for event in face.events(COMPLETIONS, {"prompt": "x", "max_tokens": 5})]
    assert events
    assert last["error"]["code"] == "INVALID_ARGUMENT"
    cluster.decode.die_at = [2] * 10
    stream = await face.client.completions.create(model="tiny", prompt="x", max_tokens=5, stream=True)
    with pytest.raises(openai.APIError, match="not like this"):
        async for _ in stream:
            pass


async def test_one_choice_that_fails_ends_the_others(cluster, face):
    cluster.decode.go.clear()
    cluster.decode.pause_at = 2
    call = asyncio.create_task(face.post(COMPLETIONS, {"prompt": ["x", "y", "z"], "max_tokens": 5}))
    await eventually(lambda: cluster.decode.num_active == 3)
    cluster.decode.dies_with = errors.InvalidArgument("not like this")
    cluster.decode.die_at = [2]
    # Whoever looks first.
    cluster.decode.go.set()
    assert (await call).status == 400
    await eventually(lambda: not cluster.decode.num_active)


async def test_a_prompt_that_cannot_be_served_keeps_the_others_from_being_begun(cluster, face):
    answer = await face.post(COMPLETIONS, {"prompt": ["x", ""], "stream": True})
    assert (answer.status, answer.error["param"]) == (400, "prompt")
    assert cluster.decode.opened == []


async def test_a_deadline_that_passes_is_504(cluster, face):
    cluster.decode.go.clear()
    answer = await face.post(COMPLETIONS, {"prompt": "x"}, headers={"X-Request-Timeout": "0.1"})
    assert (answer.status, answer.error["code"]) == (504, "DEADLINE_EXCEEDED")
    assert answer.headers["x-should-retry"] == "false"
    assert cluster.decode.time_remaining_s <= 0.1


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon", ""])
async def test_a_deadline_that_is_none_is_refused(face, timeout):
    answer = await face.post(COMPLETIONS, {"prompt": "x"}, headers={"X-Request-Timeout": timeout})
    assert (answer.status, answer.error["param"]) == (400, "X-Request-Timeout")


async def test_a_request_is_called_what_the_caller_calls_it_and_in_flight_once(cluster, face):
    cluster.decode.go.clear()
    mine = {"X-Request-Id": "mine"}
    first = asyncio.create_task(face.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}, headers=mine))
    await eventually(lambda: cluster.decode.num_active)
    twin = await face.post(COMPLETIONS, {"prompt": "x"}, headers=mine)
    assert (twin.status, twin.error["param"], twin.headers["X-Request-Id"]) == (409, "X-Request-Id", "mine")
    cluster.decode.go.set()
    assert (await first).json["id"] == "cmpl-mine"
    assert cluster.decode.opened[0].request_id == "mine"


@pytest.mark.parametrize("name", ["x" * 129, "ü", ""])
async def test_a_request_cannot_be_called_everything(face, name):
    answer = await face.post(COMPLETIONS, {"prompt": "x"}, headers={"X-Request-Id": name})
    assert (answer.status, answer.error["param"]) == (400, "X-Request-Id")


async def test_a_client_has_so_many_requests_in_flight_and_each_choice_is_one():
    async with (
        FakeCluster().running(max_requests_per_client=3) as cluster,
        http_face(cluster.router) as face,
    ):
        answer = await face.post(COMPLETIONS, {"prompt": "x", "n": 4, "max_tokens": 1})
        assert (answer.status, answer.error["code"]) == (429, "CLIENT_LIMIT")
        assert (await face.post(COMPLETIONS, {"prompt": "x", "n": 3, "max_tokens": 1})).status == 200


async def test_without_a_worker_it_is_503_and_health_says_so():
    async with FakeCluster(num_decode=0, num_prefill=0).running() as cluster, http_face(cluster.router) as face:
        answer = await face.post(COMPLETIONS, {"prompt": "x"})
        assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, "NO_WORKER", "1")
        health = await face.get("/health")
        assert (health.status, health.json) == (503, {"status": "NOT_SERVING"})


async def test_the_openai_package_tries_again_what_may_be_tried_again(cluster, face):
    cluster.decode.refusal = errors.ResourceExhausted("full", retry_after_s=0.0)
    call = asyncio.create_task(
        face.client.with_options(max_retries=5).completions.create(model="tiny", prompt="x", max_tokens=1)
    )
    await eventually(lambda: cluster.decode.opened)
    cluster.decode.refusal = None
    assert (await call).usage.completion_tokens == 1


async def test_a_bug_is_500_and_logged(cluster, face, caplog, monkeypatch):
    monkeypatch.setattr(Api, "_model", lambda self: {}["no such key"])
    answer = await face.get("/v1/models")
    assert (answer.status, answer.error["code"]) == (500, "INTERNAL")
    assert "bug in the HTTP face" in caplog.text
