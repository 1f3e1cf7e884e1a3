"""Connections: who leaves, who reads slowly, who comes with which certificate and token, and what comes at the end."""

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import sys
from collections.abc import AsyncIterator

import aiohttp
import pytest
import yarl

from common.config import ConfigError, RouterConfig
from common.identities import hash_of
from router.http import replies
from router.http.server import listening
from tests.fakes.cluster import FakeCluster, eventually
from tests.support.certificates import Authority
from tests.support.http_face import Face, http_face
from tests.support.spans import Spans

COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_leaves_ends_the_work_on_every_worker(cluster, face, stream):
    cluster.decode.go.clear()
    cluster.decode.pause_at = 2 if stream else 0
    body = {"prompt": ["x", "y"], "n": 2, "stream": stream}
    call = asyncio.create_task(face.post(COMPLETIONS, body))
    await eventually(lambda: cluster.decode.num_active == (4 if stream else 2))
    call.cancel()
    await eventually(lambda: not (cluster.decode.num_active or cluster.prefill.num_active))
    await eventually(lambda: replies_with(cluster, "499") == 1)


def replies_with(cluster: FakeCluster, status: str) -> float:
    return cluster.router.metrics.http_replies.labels(status=status)._value.get()


async def test_replies_are_counted_by_status_and_generations_as_over_grpc(cluster, face):
    await face.post(COMPLETIONS, {"prompt": "x", "n": 3, "max_tokens": 1})
    await face.get("/nowhere")
    assert (replies_with(cluster, "200"), replies_with(cluster, "404")) == (1, 1)
    assert cluster.router.metrics.requests.labels(code="OK")._value.get() == 3


async def let_long_outputs_pass(cluster: FakeCluster, num_tokens: int) -> None:
    cluster.decode.identity.context_length = cluster.decode.identity.num_total_blocks = num_tokens + 100
    await cluster.decode.restart()
    await eventually(lambda: cluster.router.fleet.model and cluster.router.fleet.model.context_length > num_tokens)


@contextlib.asynccontextmanager
async def slow_reader(face: Face, body: dict, **headers: str) -> AsyncIterator[asyncio.StreamReader]:
    """Has asked for a stream. Its buffers, and those of its system, hold next to nothing."""
    raw = json.dumps({**body, "stream": True}).encode()
    lines = [f"POST {COMPLETIONS} HTTP/1.0", "Content-Type: application/json", f"Content-Length: {len(raw)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    url = yarl.URL(face.url)
    await asyncio.get_running_loop().sock_connect(connection, (url.host, url.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=2**12)
    writer.write("\r\n".join([*lines, "", ""]).encode() + raw)
    try:
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_tokens_gather_while_the_reader_is_slow_and_none_is_lost(cluster, face):
    """The connection's buffers fill; then the router waits, and what decode sends goes into fewer events."""
    num_tokens = 6000
    await let_long_outputs_pass(cluster, num_tokens)
    async with slow_reader(face, {"prompt": [5], "max_tokens": num_tokens, "return_token_ids": True}) as reader:
        await eventually(lambda: cluster.decode.opened and not cluster.decode.num_active, within_s=60)
        answer = await asyncio.wait_for(reader.read(), 60)
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
    token_ids = [token_id for event in events for token_id in event["choices"][0]["token_ids"]]
    assert token_ids == [100 + place for place in range(num_tokens)]
    assert len(events) < num_tokens / 2
    assert answer.endswith(b"data: [DONE]\n\n")


async def test_a_reader_that_takes_nothing_is_left_after_its_deadline(cluster, face, monkeypatch):
    """Its first event is more than fits on the way."""
    monkeypatch.setattr(replies, "LAST_WORDS_S", 0.2)
    await let_long_outputs_pass(cluster, 200_000)
    body = {"prompt": [5] * 200_000, "max_tokens": 9, "echo": True, "return_token_ids": True}
    async with slow_reader(face, body, X_Request_Timeout="1") as reader:
        await eventually(lambda: replies_with(cluster, "499") == 1)
        assert cluster.router.metrics.requests.labels(code="DEADLINE_EXCEEDED")._value.get() == 1
        answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.startswith(b"HTTP/1.0 200 OK")
    assert b"DEADLINE_EXCEEDED" not in answer, "there was no room for the last event"


async def test_one_connection_serves_one_request_after_another(cluster, face):
    trace, made = aiohttp.TraceConfig(), []

    async def count(*_: object) -> None:
        made.append(1)

    trace.on_connection_create_end.append(count)
    async with aiohttp.ClientSession(trace_configs=[trace]) as session:
        for body in (
            {"prompt": "x", "max_tokens": 1},
            {"prompt": ""},
            {"prompt": "x", "max_tokens": 2, "stream": True},
        ):
            async with session.post(face.url + COMPLETIONS, json=body) as response:
                await response.read()
    assert len(made) == 1


async def test_head_and_options_are_answered(face):
    head = await face.get("/v1/models", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    options = await face.get(COMPLETIONS, method="OPTIONS")
    assert (options.status, options.headers["Allow"]) == (204, "OPTIONS, POST")


async def test_an_old_client_is_served_until_the_connection_closes(cluster, face):
    host, port = face.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, port)
    raw = b'{"prompt": "x", "max_tokens": 2, "stream": true}'
    head = f"POST {COMPLETIONS} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.startswith(b"HTTP/1.0 200 OK")
    assert answer.endswith(b"data: [DONE]\n\n")
    writer.close()


async def test_bytes_that_are_no_http_are_400_and_end_the_connection(face):
    host, port = face.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 10)
    assert b" 400 " in answer
    writer.close()


async def test_a_drain_finishes_what_runs_to_its_last_word_and_refuses_what_is_new(cluster):
    async with http_face(cluster.router) as face:
        cluster.decode.go.clear()
        cluster.decode.pause_at = 1
        stream = face.events(COMPLETIONS, {"prompt": "x", "n": 2, "max_tokens": 3})
        await anext(stream)
        drain = asyncio.create_task(cluster.router.drain())
        await eventually(lambda: not cluster.router.health.is_ready)
        answer = await face.post(COMPLETIONS, {"prompt": "x"})
        assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, "DRAINING", "1")
        assert (await face.get("/health")).status == 503
        cluster.decode.go.set()
        assert [event async for event in stream][-1] == "[DONE]"
        await asyncio.wait_for(drain, 10)


@pytest.fixture
def identities(tmp_path):
    tokens = "".join(f'{name} = "sha256:{hash_of(name)}"\n' for name in ("alice", "bob"))
    (tmp_path / "identities.toml").write_text(f'[clients]\n{tokens}[services]\nrouter = "sha256:{hash_of("router")}"\n')
    return {"identities": str(tmp_path / "identities.toml")}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_who_shows_no_token_that_is_known_is_401_and_who_may_not_403(cluster, identities):
    async with http_face(cluster.router, **identities) as face:
        for headers, status, code in (
            ({}, 401, "UNAUTHENTICATED"),
            (bearer("nobody"), 401, "UNKNOWN_TOKEN"),
            ({"Authorization": "Basic x"}, 401, "UNAUTHENTICATED"),
            (bearer("router"), 403, "PERMISSION_DENIED"),
            (bearer("alice"), 200, None),
        ):
            for call in (
                face.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}, headers=headers),
                face.get("/v1/models", headers=headers),
            ):
                answer = await call
                assert answer.status == status
                assert status == 200 or answer.error["code"] == code
                assert answer.headers.get("WWW-Authenticate") == ("Bearer" if status == 401 else None)
        assert (await face.get("/health")).status == 200


async def test_a_token_is_asked_for_before_the_body_is_read(cluster, identities):
    async with http_face(cluster.router, **identities) as face:
        assert (await face.post(COMPLETIONS, data=b"{")).status == 401


async def test_the_caller_s_name_is_the_client_s_and_binds_its_salt(cluster, identities):
    async with http_face(cluster.router, key="alice", **identities) as face:
        await face.client.completions.create(model="tiny", prompt="x", max_tokens=1, extra_body={"cache_salt": "s"})
    assert cluster.decode.opened[0].cache_salt == "5:alices"


async def test_tokens_do_not_cross_a_network_in_plaintext(cluster, identities):
    config = RouterConfig(http_listen="0.0.0.0:0", **identities)
    with pytest.raises(ConfigError, match=r"plaintext to 0\.0\.0\.0:0"):
        async with listening(config, cluster.router):
            pass


def trusting(authority: Authority, *, showing: dict[str, str] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.ca))
    if showing:
        context.load_cert_chain(showing["tls_certificate"], showing["tls_key"])
    return context


async def answer_of(face: Face, context: ssl.SSLContext) -> int:
    """Over a connection of its own."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
        session.post(face.url + COMPLETIONS, json={"prompt": "x", "max_tokens": 1}) as response,
    ):
        return response.status


async def test_certificates_and_the_authority_may_be_replaced_while_it_serves(cluster, tmp_path):
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files = old.issue("router")
    async with http_face(cluster.router, **files, tls_client_certificates=True) as face:
        mine, theirs = old.issue("alice"), new.issue("alice")
        of_yesterday = trusting(old, showing=theirs)
        assert await answer_of(face, trusting(old, showing=mine)) == 200
        with pytest.raises(aiohttp.ClientError):
            await answer_of(face, trusting(old))
        for setting, path in new.issue("router").items():
            shutil.copyfile(path, files[setting])
        assert await answer_of(face, trusting(new, showing=theirs)) == 200
        with pytest.raises(aiohttp.ClientError):
            await answer_of(face, trusting(new, showing=mine))
        with pytest.raises(aiohttp.ClientError):
            await answer_of(face, of_yesterday)


async def test_a_client_may_be_recognised_by_its_certificate(cluster, tmp_path):
    authority = Authority(tmp_path / "authority")
    (tmp_path / "identities.toml").write_text('[clients]\nalice = "certificate"\n')
    settings = {**authority.issue("router"), "tls_client_certificates": True}
    async with http_face(cluster.router, identities=str(tmp_path / "identities.toml"), **settings) as face:
        assert await answer_of(face, trusting(authority, showing=authority.issue("alice"))) == 200
        assert await answer_of(face, trusting(authority, showing=authority.issue("bob"))) == 401
    assert [opening.cache_salt for opening in cluster.decode.opened] == ["5:alice"]


async def test_an_address_that_is_taken_is_a_configuration_error(cluster, face):
    config = RouterConfig(http_listen=face.url.removeprefix("http://"))
    with pytest.raises(ConfigError, match=r"http_listen='127.0.0.1:\d+': .*in use"):
        async with listening(config, cluster.router):
            pass


def test_without_the_extra_the_setting_is_a_configuration_error_that_names_it(spawn):
    code = "import sys, runpy; sys.modules['aiohttp'] = None; runpy.run_module('router', run_name='__main__')"
    process = spawn("-c", code, "--listen", "127.0.0.1:0", "--metrics-listen", "", "--http-listen", "127.0.0.1:0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.strip().endswith("needs aiohttp, of the extra `http`: pip install 'pdserve[http]'")


def test_a_router_that_is_not_asked_for_http_does_not_import_it(spawn):
    process = spawn("-c", "import sys, router.__main__; print('aiohttp' in sys.modules)")
    assert process.communicate(timeout=60)[0].strip() == "False"
    assert "aiohttp" in sys.modules, "these tests do"


async def test_the_choices_of_a_request_are_spans_of_the_caller_s_trace():
    spans = Spans()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with FakeCluster(tracer=spans.tracer).running() as cluster, http_face(cluster.router) as face:
        headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
        await face.post(COMPLETIONS, {"prompt": "x", "n": 2, "max_tokens": 1}, headers=headers)
    generations = [span for span in spans.recorded if span.name.endswith("/Generate")]
    assert [f"{span.context.trace_id:032x}" for span in generations] == [trace_id] * 2
