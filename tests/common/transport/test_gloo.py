"""The process group over loopback."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common.address import Address
from common.transport.authentication import Credentials, authenticate, new_token
from common.transport.gloo import GlooJoining
from common.transport.group import DECODE_RANK, PREFILL_RANK, PairBroken
from tests.common.transport.fakes import WAIT_S, gloo_groups


async def test_messages_arrive_in_order_with_several_under_way() -> None:
    prefill, decode = await gloo_groups()
    buffers = [torch.empty(1 << 16, dtype=torch.uint8) for _ in range(4)]
    receives = [decode.receive(buffer) for buffer in buffers]
    sends = [prefill.send(torch.full((1 << 16,), i, dtype=torch.uint8)) for i in range(4)]
    for transfer in (*sends, *receives):
        transfer.wait(WAIT_S)
    assert [int(buffer.unique()) for buffer in buffers] == [0, 1, 2, 3]


@pytest.mark.parametrize("closing", [0, 1])
async def test_close_wakes_everybody_on_both_sides(closing: int) -> None:
    groups = await gloo_groups()
    with ThreadPoolExecutor(4) as threads:
        ends = [threads.submit(group.wait_for_end) for group in groups]
        waits = [threads.submit(group.receive(torch.empty(8, dtype=torch.uint8)).wait, WAIT_S) for group in groups]
        groups[closing].close()
        assert all(end.result(WAIT_S) for end in ends)
        for wait in waits:
            with pytest.raises(PairBroken):
                wait.result(WAIT_S)
    with pytest.raises(PairBroken):
        groups[closing].send(torch.zeros(8, dtype=torch.uint8)).wait(WAIT_S)
    groups[closing].close()


async def test_a_transfer_that_times_out_stays_broken() -> None:
    prefill, decode = await gloo_groups()
    transfer = prefill.receive(torch.empty(8, dtype=torch.uint8))
    with pytest.raises(PairBroken, match="Timed out waiting 10ms"):
        transfer.wait(0.01)
    with pytest.raises(PairBroken, match="Timed out waiting 10ms"):
        transfer.wait(WAIT_S)
    decode.close()


# The lower address is the one that is dialled: with one of these ports this side dials, with the other it listens.
@pytest.mark.parametrize("port", [1, 65535])
async def test_a_peer_that_never_comes_is_named_within_the_timeout(port: int) -> None:
    joining = GlooJoining(PREFILL_RANK, interface="127.0.0.1", timeout_s=0.2)
    await joining.rendezvous()
    with pytest.raises(PairBroken, match=r"gloo on 127\.0\.0\.1: "):
        await asyncio.wait_for(joining.connect(f"127.0.0.1:{port}".encode()), WAIT_S)


@pytest.mark.parametrize("nonsense", [b"", b"nonsense", b"\xff" * 170, b"decode:50053", b"127.0.0.1:65536"])
async def test_nonsense_for_a_rendezvous_is_refused(nonsense: bytes) -> None:
    joining = GlooJoining(PREFILL_RANK, interface="127.0.0.1", timeout_s=1)
    await joining.rendezvous()
    with pytest.raises(PairBroken, match="is not at an IP address and port"):
        await asyncio.wait_for(joining.connect(nonsense), WAIT_S)


@pytest.mark.promise(20)
async def test_the_rendezvous_is_the_address_that_gloo_listens_on() -> None:
    joining = GlooJoining(PREFILL_RANK, interface="127.0.0.1", timeout_s=1)
    address = Address.parse((await joining.rendezvous()).decode())
    assert address.host == "127.0.0.1"
    with socket.create_connection(address):
        joining.cancel()


async def test_an_interface_that_does_not_exist_is_named() -> None:
    with pytest.raises(PairBroken, match=r"gloo on 192\.0\.2\.1"):
        await GlooJoining(PREFILL_RANK, interface="192.0.2.1", timeout_s=1).rendezvous()


async def test_a_cancelled_join_ends_its_thread() -> None:
    joining = GlooJoining(PREFILL_RANK, interface="127.0.0.1", timeout_s=WAIT_S)
    await joining.rendezvous()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "gloo-join")
    joining.cancel()
    await asyncio.to_thread(thread.join, WAIT_S / 2)
    assert not thread.is_alive()


async def authenticate_both(prefill_credentials: Credentials, decode_credentials: Credentials) -> list[object]:
    prefill, decode = await gloo_groups()
    return await asyncio.gather(
        asyncio.to_thread(authenticate, prefill, PREFILL_RANK, prefill_credentials, timeout_s=WAIT_S),
        asyncio.to_thread(authenticate, decode, DECODE_RANK, decode_credentials, timeout_s=WAIT_S),
        return_exceptions=True,
    )


async def test_two_sides_with_the_same_token_and_boot_ids_believe_one_another() -> None:
    credentials = Credentials(new_token(), "p1", "d1")
    assert await authenticate_both(credentials, credentials) == [None, None]


@pytest.mark.promise(20)
@pytest.mark.parametrize(
    "stranger",
    [Credentials(b"other token", "p1", "d1"), Credentials(b"token", "p0", "d1"), Credentials(b"token", "p1", "d0")],
)
async def test_a_stranger_is_refused_by_both_sides(stranger: Credentials) -> None:
    results = await authenticate_both(stranger, Credentials(b"token", "p1", "d1"))
    assert all(isinstance(result, PairBroken) for result in results)
    assert any("its proof is wrong" in str(result) for result in results)


def test_no_side_accepts_its_own_proof() -> None:
    credentials = Credentials(new_token(), "p1", "d1")
    assert credentials.proof(PREFILL_RANK, "gloo") != credentials.proof(DECODE_RANK, "gloo")
