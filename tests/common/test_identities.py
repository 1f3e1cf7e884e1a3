"""Who may call what: real servers, tokens, certificates, and a file that changes."""

from __future__ import annotations

import logging
import os

import grpc
import grpc.aio
import pytest
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import errors, rpc
from common.config import ConfigError, DecodeConfig, RouterConfig
from common.health import Health
from common.identities import ALLOWED, CALLER, Caller, Kind, bound_salt, gate_of, hash_of
from common.tls import Tls, server_credentials_of
from pdserve.v1 import decode_pb2, prefill_pb2, router_pb2, worker_pb2
from tests.support.certificates import Authority

GENERATE = "/pdserve.v1.RouterService/Generate"
DRAIN = "/pdserve.v1.WorkerService/Drain"
DECODE = "/pdserve.v1.DecodeService/Decode"


class AnyService(grpc.GenericRpcHandler):
    """Every method of `ALLOWED` that somebody has to be allowed; answers are lost, `callers` says who came through."""

    def __init__(self) -> None:
        self.callers: list[Caller | None] = []

    def service(self, details):
        if ALLOWED.get(details.method) is None:
            return None

        async def handle(request, context):
            self.callers.append(CALLER.get())
            return empty_pb2.Empty()

        return grpc.unary_unary_rpc_method_handler(
            handle, empty_pb2.Empty.FromString, empty_pb2.Empty.SerializeToString
        )


class Door:
    def __init__(self, address: str, service: AnyService) -> None:
        self.address = address
        self.service = service

    async def call(self, method: str, token: str | None = None, tls: Tls | None = None, **metadata: str) -> Caller:
        """Who the server takes the caller for. Raises what it says."""
        if token is not None:
            metadata["authorization"] = f"Bearer {token}"
        async with rpc.connect(self.address, tls) as channel:
            with rpc.translate():
                await channel.unary_unary(method)(b"", timeout=5, metadata=tuple(metadata.items()))
        return self.service.callers[-1]


@pytest.fixture
async def open_door():
    """`door = await open_door(config)`: what a service of that configuration asks its callers."""
    servers = []

    async def start(config) -> Door:
        server = rpc.create_server(gate=gate_of(config))
        service = AnyService()
        server.add_generic_rpc_handlers((service,))
        Health().add_to(server)
        port = rpc.bind(server, "127.0.0.1:0", credentials=server_credentials_of(config))
        await server.start()
        servers.append(server)
        return Door(f"localhost:{port}", service)

    yield start
    for server in servers:
        await server.stop(None)


@pytest.fixture
def file(tmp_path):
    """`path = file(text)`: a file of identities."""

    def write(text: str) -> str:
        new = tmp_path / "identities.new"
        new.write_text(text)
        return str(new.replace(tmp_path / "identities.toml"))

    return write


TWO = f"""
[clients]
alice = "sha256:{hash_of("token of alice")}"
bob = "sha256:{hash_of("token of bob")}"
[operators]
ops = "sha256:{hash_of("token of ops")}"
"""


def test_of_every_call_the_table_says_who_may_make_it():
    files = [router_pb2, prefill_pb2, decode_pb2, worker_pb2, health_pb2]
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert methods | {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"} == set(ALLOWED)
    assert all(allowed is None for method, allowed in ALLOWED.items() if not method.startswith("/pdserve."))
    assert all(ALLOWED[method] for method in ALLOWED if method.startswith("/pdserve."))


async def test_without_a_file_nobody_is_asked(open_door):
    door = await open_door(RouterConfig())
    for method, allowed in ALLOWED.items():
        if allowed is not None:
            assert await door.call(method) is None


async def test_a_token_says_who_calls(open_door, file):
    door = await open_door(RouterConfig(identities=file(TWO)))
    assert await door.call(GENERATE, "token of alice") == Caller("alice", Kind.CLIENT)
    assert await door.call(GENERATE, "token of bob") == Caller("bob", Kind.CLIENT)
    assert await door.call(GENERATE, "token of ops") == Caller("ops", Kind.OPERATOR)
    assert await door.call(GENERATE, authorization="bearer token of bob") == Caller("bob", Kind.CLIENT)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "UNAUTHENTICATED"),
        ({"authorization": "Bearer token of mallory"}, "UNKNOWN_TOKEN"),
        ({"authorization": f"Bearer {hash_of('token of alice')}"}, "UNKNOWN_TOKEN"),
        ({"authorization": "Bearer "}, "UNAUTHENTICATED"),
        ({"authorization": "Basic token of alice"}, "UNAUTHENTICATED"),
        ({"authorization": "Bearer " + "x" * 1025}, "UNAUTHENTICATED"),
    ],
)
async def test_who_shows_nothing_that_is_known_is_unauthenticated(open_door, file, metadata, reason):
    door = await open_door(RouterConfig(identities=file(TWO)))
    with pytest.raises(errors.Unauthenticated) as caught:
        await door.call(GENERATE, **metadata)
    assert caught.value.reason == reason
    assert door.service.callers == []


@pytest.mark.parametrize("method", sorted(method for method, allowed in ALLOWED.items() if allowed == {Kind.OPERATOR}))
async def test_what_operators_may_no_client_may(open_door, file, method):
    door = await open_door(RouterConfig(identities=file(TWO)))
    with pytest.raises(errors.PermissionDenied, match=r"'alice' is of clients; .* is for operators"):
        await door.call(method, "token of alice")
    assert await door.call(method, "token of ops") == Caller("ops", Kind.OPERATOR)


@pytest.mark.parametrize("token", ["token of alice", "token of ops", None])
async def test_what_services_may_nobody_else_may(open_door, file, token):
    door = await open_door(DecodeConfig(identities=file(TWO)))
    with pytest.raises((errors.PermissionDenied, errors.Unauthenticated), match="Decode is for services"):
        await door.call(DECODE, token)


async def test_a_certificate_says_who_calls(open_door, file, tmp_path):
    authority = Authority(tmp_path / "authority")
    names = '[services]\nrouter = "certificate"\n[operators]\n"ops.example" = "certificate"\n'
    door = await open_door(DecodeConfig(identities=file(names), **authority.issue("decode")))
    assert await door.call(DECODE, tls=authority.tls("router")) == Caller("router", Kind.SERVICE)
    assert await door.call(DRAIN, tls=authority.tls("ops.example")) == Caller("ops.example", Kind.OPERATOR)
    with pytest.raises(errors.PermissionDenied, match="'router' is of services; Drain is for operators"):
        await door.call(DRAIN, tls=authority.tls("router"))
    with pytest.raises(errors.Unauthenticated):
        await door.call(DECODE, tls=authority.tls("decode"))


async def test_an_operator_shows_a_token_over_the_certificate_of_somebody_else(open_door, file, tmp_path):
    authority = Authority(tmp_path / "authority")
    door = await open_door(DecodeConfig(identities=file(TWO), **authority.issue("decode")))
    assert await door.call(DRAIN, "token of ops", authority.tls("laptop")) == Caller("ops", Kind.OPERATOR)


async def test_anyone_is_let_in_without_a_name_and_a_wrong_token_is_still_wrong(open_door, file):
    door = await open_door(RouterConfig(identities=file('[clients]\nguest = "anyone"\n')))
    assert await door.call(GENERATE) == Caller("", Kind.CLIENT)
    with pytest.raises(errors.Unauthenticated):
        await door.call(GENERATE, "token of alice")


async def test_an_empty_file_lets_nobody_in(open_door, file):
    door = await open_door(RouterConfig(identities=file("")))
    with pytest.raises(errors.Unauthenticated):
        await door.call(GENERATE)


async def test_probes_show_nothing(open_door, file):
    door = await open_door(RouterConfig(identities=file(TWO)))
    async with rpc.connect(door.address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_the_file_is_read_again_when_it_changes(open_door, file):
    door = await open_door(RouterConfig(identities=file(TWO)))
    await door.call(GENERATE, "token of alice")
    file(TWO.replace("alice", "carol").replace(hash_of("token of alice"), hash_of("token of carol")))
    with pytest.raises(errors.Unauthenticated):
        await door.call(GENERATE, "token of alice")
    assert await door.call(GENERATE, "token of carol") == Caller("carol", Kind.CLIENT)


async def test_a_file_that_is_broken_or_gone_leaves_what_was_read(open_door, file, caplog):
    path = file(TWO)
    door = await open_door(RouterConfig(identities=path))
    file("[clients")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert await door.call(GENERATE, "token of alice") == Caller("alice", Kind.CLIENT)
    assert caplog.text.count("going on with what was read before") == 1
    os.unlink(path)
    assert await door.call(GENERATE, "token of alice") == Caller("alice", Kind.CLIENT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[clients", "not a TOML file"),
        ("[client]\n", "'client' is none of the sections clients, services, operators; did you mean 'clients'"),
        ('alice = "anyone"\n', "'alice' is none of the sections"),
        ('[clients]\nalice = "secret"\n', r"\[clients\] alice='secret': expected \"sha256:\" and 64 hex digits"),
        ("[clients]\nalice = 5\n", r"\[clients\] alice=5: expected"),
        ('[clients]\n"" = "anyone"\n', "a name has 1 to 128 bytes"),
        ('[clients]\nalice = "certificate"\n', "nobody has to show a certificate here; set tls_certificate"),
    ],
)
def test_a_file_that_cannot_be_used_ends_the_start(file, text, message):
    with pytest.raises(ConfigError, match=rf"^identities='.*{message}"):
        gate_of(RouterConfig(identities=file(text)))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"^identities='/nowhere': No such file"):
        gate_of(RouterConfig(identities="/nowhere"))


def test_tokens_do_not_cross_a_network_in_plaintext(file, tmp_path):
    path = file(TWO)
    with pytest.raises(ConfigError, match=r"^identities=.*plaintext to 0\.0\.0\.0:1; set tls_certificate"):
        gate_of(RouterConfig(identities=path, listen="0.0.0.0:1"))
    authority = Authority(tmp_path / "authority")
    assert gate_of(RouterConfig(identities=path, listen="0.0.0.0:1", **authority.issue("router")))


def test_no_two_callers_have_a_salt_in_common_whatever_they_ask_for():
    names, salts = ["", "a", "ab", "1:a", "1"], ["", "a", "b", "1:a", ":a", "1:"]
    bound = [bound_salt(Caller(name, Kind.CLIENT), salt) for name in names for salt in salts]
    assert len(set(bound)) == len(bound)
    assert bound_salt(None, "as asked") == "as asked"
