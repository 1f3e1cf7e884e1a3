"""Certificates between real servers and channels, and what happens when their files change."""

from __future__ import annotations

import logging
import shutil
import ssl

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import rpc
from common.config import ConfigError, DecodeConfig, PrefillConfig, RouterConfig
from common.health import Health
from common.tls import Tls, server_credentials_of
from tests.support.certificates import Authority


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
async def listen():
    """`address = await listen(config)`: health as a service of that configuration serves it."""
    servers = []

    async def start(config) -> str:
        server = rpc.create_server()
        Health().add_to(server)
        port = rpc.bind(server, "127.0.0.1:0", credentials=server_credentials_of(config))
        await server.start()
        servers.append(server)
        return f"localhost:{port}"

    yield start
    for server in servers:
        await server.stop(None)


async def check(address: str, tls: Tls | None) -> str:
    """OK, or the status of a call over a channel of its own."""
    async with rpc.connect(address, tls) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"


def shown_at(address: str, authority: Authority) -> str:
    """The certificate that a new connection is shown, in PEM form."""
    return ssl.get_server_certificate(("127.0.0.1", int(address.rpartition(":")[2])), ca_certs=str(authority.ca))


async def test_tls_lets_in_who_believes_the_authority(authority, listen, tmp_path):
    address = await listen(RouterConfig(**authority.issue("router")))
    assert await check(address, authority.tls()) == "OK"
    assert await check(address, Authority(tmp_path / "other").tls()) == "UNAVAILABLE"
    assert await check(address, None) == "UNAVAILABLE"


@pytest.mark.parametrize("config", [PrefillConfig, DecodeConfig])
async def test_a_worker_asks_for_a_certificate_of_the_authority(authority, listen, tmp_path, config):
    address = await listen(config(**authority.issue("worker")))
    stranger = Authority(tmp_path / "other").issue("router")
    forged = Tls(ca=str(authority.ca), certificate=stranger["tls_certificate"], key=stranger["tls_key"])
    assert await check(address, authority.tls("router")) == "OK"
    assert await check(address, authority.tls()) == "UNAVAILABLE"
    assert await check(address, forged) == "UNAVAILABLE"


async def test_a_certificate_for_another_host_is_refused_unless_that_is_its_name(authority, listen):
    files = authority.issue("workers.example", hosts="DNS:elsewhere.example")
    address = await listen(RouterConfig(**files))
    assert await check(address, authority.tls()) == "UNAVAILABLE"
    assert await check(address, Tls(ca=str(authority.ca), server_name="workers.example")) == "OK"


async def test_a_server_shows_its_new_certificate_without_a_restart(authority, listen):
    address = await listen(RouterConfig(**authority.issue("router")))
    before = shown_at(address, authority)
    assert shown_at(address, authority) == before
    authority.issue("router")
    assert shown_at(address, authority) != before
    assert await check(address, authority.tls()) == "OK"


async def test_a_server_believes_a_new_authority_without_a_restart(authority, listen, tmp_path):
    address = await listen(DecodeConfig(**authority.issue("decode")))
    other = Authority(tmp_path / "other")
    files = other.issue("router")
    newcomer = Tls(ca=str(authority.ca), certificate=files["tls_certificate"], key=files["tls_key"])
    assert await check(address, newcomer) == "UNAVAILABLE"
    authority.trust_also(other)
    assert await check(address, newcomer) == "OK"


async def test_a_new_channel_shows_the_new_certificate(authority, listen, tmp_path):
    address = await listen(DecodeConfig(**authority.issue("decode")))
    stranger = Authority(tmp_path / "other").issue("router")
    files = authority.issue("router")
    dialling = Tls(ca=str(authority.ca), certificate=files["tls_certificate"], key=files["tls_key"])
    for name in ("tls_certificate", "tls_key"):
        shutil.copyfile(stranger[name], files[name])
    assert await check(address, dialling) == "UNAVAILABLE"
    version = dialling.version
    authority.issue("router")
    assert dialling.version != version
    assert await check(address, dialling) == "OK"


async def test_files_that_cannot_be_used_leave_the_old_certificate_in_place(authority, listen, caplog):
    files = authority.issue("router")
    address = await listen(RouterConfig(**files))
    before = shown_at(address, authority)
    shutil.copyfile(__file__, files["tls_key"])
    with caplog.at_level(logging.ERROR):
        assert [shown_at(address, authority) for _ in range(3)] == [before] * 3
    assert caplog.text.count("going on with what was read before: tls_key=") == 1
    authority.issue("router")
    assert shown_at(address, authority) != before


@pytest.mark.parametrize("missing", ["tls_certificate", "tls_key", "tls_ca"])
def test_half_of_tls_is_a_mistake_that_names_the_other_half(authority, missing):
    files = authority.issue("router") | {missing: ""}
    with pytest.raises(ConfigError, match=f"^{missing}: expected a PEM file, since tls_.* is set"):
        RouterConfig(**files)


def test_a_server_name_needs_tls():
    with pytest.raises(ConfigError, match=r"^tls_server_name: .*set tls_certificate"):
        RouterConfig(tls_server_name="workers.example")


def test_a_file_that_is_not_there_is_named(authority):
    files = authority.issue("router") | {"tls_key": "/nowhere/key.pem"}
    with pytest.raises(ConfigError, match=r"^tls_key='/nowhere/key.pem': No such file"):
        server_credentials_of(RouterConfig(**files))


def test_a_key_of_another_certificate_is_named(authority):
    files = authority.issue("router") | {"tls_key": authority.issue("other")["tls_key"]}
    with pytest.raises(ConfigError, match=r"^tls_key=.*not the key of tls_certificate"):
        server_credentials_of(RouterConfig(**files))


@pytest.mark.parametrize("name", ["tls_certificate", "tls_ca"])
def test_a_file_without_certificates_is_named(authority, tmp_path, name):
    (tmp_path / "empty.pem").write_text("")
    files = authority.issue("router") | {name: str(tmp_path / "empty.pem")}
    with pytest.raises(ConfigError, match=rf"^{name}="):
        server_credentials_of(RouterConfig(**files))
