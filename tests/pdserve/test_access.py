"""What `pdserve` and the clients show and believe, from flags, arguments and the environment."""

from __future__ import annotations

import pytest

from common import errors, rpc
from common.config import RouterConfig
from common.identities import gate_of, hash_of
from common.settings import ConfigError
from common.tls import server_credentials_of
from pdserve.access import Access
from pdserve.client import AsyncClient
from pdserve.worker_client import WorkerClient
from tests.pdserve.fakes import FakeRouter, FakeWorker
from tests.support.certificates import Authority

IDENTITIES = f"""
[clients]
alice = "sha256:{hash_of("token-of-alice")}"
[operators]
ops = "sha256:{hash_of("token-of-ops")}"
"""


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
async def guarded(authority, tmp_path):
    """`address = await guarded(add_servicers)`: behind TLS, and asking for a token."""
    servers = []
    identities = tmp_path / "identities.toml"
    identities.write_text(IDENTITIES)
    config = RouterConfig(identities=str(identities), **authority.issue("service"))

    async def start(add) -> str:
        server = rpc.create_server(gate=gate_of(config))
        add(server)
        port = rpc.bind(server, "127.0.0.1:0", credentials=server_credentials_of(config))
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(None)


@pytest.fixture
def token_file(tmp_path):
    """`path = token_file("token")`"""

    def write(token: str) -> str:
        (tmp_path / "token").write_text(token + "\n")
        return str(tmp_path / "token")

    return write


async def test_flags_say_whom_to_believe_and_what_to_show(guarded, authority, token_file, pdserve):
    router, worker = await guarded(FakeRouter().add_to), await guarded(FakeWorker().add_to)
    alice = ("--tls-ca", str(authority.ca), "--token-file", token_file("token-of-alice"))
    exit_code, stdout, stderr = await pdserve("generate", "--router", router, *alice, "Hi")
    assert (exit_code, stdout) == (0, "Once upon\n"), stderr
    for command in (("workers", "--router", router), ("stats", "--decode", worker), ("drain", "--worker", worker)):
        exit_code, _, stderr = await pdserve(*command, *alice)
        assert exit_code == 1
        assert "PERMISSION_DENIED: 'alice' is of clients" in stderr
    ops = ("--tls-ca", str(authority.ca), "--token-file", token_file("token-of-ops"))
    for command in (("workers", "--router", router), ("stats", "--decode", worker), ("drain", "--worker", worker)):
        assert (await pdserve(*command, *ops))[0] == 0


async def test_what_flags_leave_out_the_environment_says(guarded, authority, pdserve, monkeypatch):
    router = await guarded(FakeRouter().add_to)
    monkeypatch.setenv("PDSERVE_TLS_CA", str(authority.ca))
    exit_code, _, stderr = await pdserve("generate", "--router", router, "Hi")
    assert exit_code == 1
    assert "UNAUTHENTICATED: Generate is for clients or operators: show a token" in stderr
    monkeypatch.setenv("PDSERVE_TOKEN", "token-of-alice")
    assert (await pdserve("generate", "--router", router, "Hi"))[0] == 0
    async with AsyncClient(router) as client:
        assert (await client.get_model()).model_id == "tiny"


async def test_clients_take_their_access_as_an_argument(guarded, authority):
    access = Access(tls_ca=str(authority.ca), token="token-of-ops")
    async with AsyncClient(await guarded(FakeRouter().add_to), access=access) as client:
        assert len((await client.list_workers()).workers) == 2
    async with WorkerClient(await guarded(FakeWorker().add_to), access=access) as worker:
        assert (await worker.set_pipeline(mode="disabled")).num_steps == 64


async def test_a_handshake_that_fails_says_why(guarded, tmp_path):
    router = await guarded(FakeRouter().add_to)
    access = Access(tls_ca=str(Authority(tmp_path / "other").ca))
    async with AsyncClient(router, access=access, retries=0) as client:
        with pytest.raises(errors.Unavailable, match="unable to get local issuer certificate"):
            await client.get_model()


async def test_a_token_does_not_cross_a_network_in_plaintext(token_file, pdserve):
    exit_code, _, stderr = await pdserve(
        "generate", "--router", "192.0.2.1:50051", "--token-file", token_file("token"), "Hi"
    )
    assert exit_code == 2
    assert stderr == (
        "pdserve: the token would cross the network in plaintext to 192.0.2.1:50051: give tls_ca as well\n"
    )


def test_half_of_tls_is_a_mistake(authority):
    files = authority.issue("alice")
    with pytest.raises(ConfigError, match=r"^tls_key: expected a PEM file"):
        Access(tls_ca=files["tls_ca"], tls_certificate=files["tls_certificate"])
    with pytest.raises(ConfigError, match=r"^tls_ca: expected a PEM file"):
        Access(tls_certificate=files["tls_certificate"], tls_key=files["tls_key"])
    with pytest.raises(ConfigError, match=r"^tls_ca='/nowhere': No such file"):
        Access(tls_ca="/nowhere")
    with pytest.raises(ConfigError, match=r"^token file '/nowhere': No such file"):
        Access.from_environment(token_file="/nowhere")


async def test_a_new_token_comes_with_its_line(pdserve, tmp_path):
    exit_code, stdout, _ = await pdserve("token", "alice")
    assert exit_code == 0
    words = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    assert words["line"] == f'"alice" = "sha256:{hash_of(words["token"])}"'
    (tmp_path / "identities.toml").write_text(f"[clients]\n{words['line']}\n")
    assert gate_of(RouterConfig(identities=str(tmp_path / "identities.toml")))
