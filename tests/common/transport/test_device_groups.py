"""The groups between devices, with the device left out: what they say over gloo, and how they end."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from common.transport import nccl
from common.transport.authentication import Credentials, authenticate
from common.transport.group import DECODE_RANK, PREFILL_RANK, PairBroken
from tests.common.transport.fakes import CPU, WAIT_S, gloo_groups

CREDENTIALS = Credentials(b"token", "p1", "d1")


class Export(NamedTuple):
    buffer: torch.Tensor
    handle: bytes


class Memory(types.ModuleType):
    """`common.transport.ipc_memory` within one process, on the CPU."""

    HANDLE_BYTES = 64
    Export = Export

    def __init__(self) -> None:
        super().__init__("common.transport.ipc_memory")
        self.exported: dict[bytes, torch.Tensor] = {}
        self.num_back = self.num_closed = 0
        memory = self

        class Opened:
            def __init__(self, handle, num_bytes, device) -> None:
                self.buffer = memory.exported[handle]
                assert len(self.buffer) == num_bytes

            def close(self) -> None:
                memory.num_closed += 1

        self.Opened = Opened

    def export(self, num_bytes, device) -> Export:
        handle = bytes([len(self.exported)]) * self.HANDLE_BYTES
        self.exported[handle] = torch.empty(num_bytes, dtype=torch.uint8)
        return Export(self.exported[handle], handle)

    def give_back(self, unused) -> None:
        self.num_back += 1


@pytest.fixture
def memory(monkeypatch):
    memory = Memory()
    monkeypatch.setitem(sys.modules, memory.__name__, memory)
    monkeypatch.delitem(sys.modules, "common.transport.cuda_ipc", raising=False)
    yield memory
    sys.modules.pop("common.transport.cuda_ipc", None)


async def ipc_groups():
    from common.transport.cuda_ipc import IpcGroup

    return [IpcGroup(gloo, CPU) for gloo in await gloo_groups()]


async def test_ipc_payloads_arrive_in_order_with_several_under_way(memory) -> None:
    prefill, decode = await ipc_groups()
    slots = [prefill.send_buffer(1000).fill_(number) for number in range(3)]
    buffers = [decode.receive_buffer(500 + number) for number in range(3)]
    with ThreadPoolExecutor(2) as threads:
        receives = [decode.receive(buffer) for buffer in buffers]
        sends = [prefill.send(slot[: 500 + number]) for number, slot in enumerate(slots)]
        for transfers in (receives, sends):
            threads.submit(lambda transfers=transfers: [transfer.wait(WAIT_S) for transfer in transfers])
    assert [buffer.unique().tolist() for buffer in buffers] == [[0], [1], [2]]
    for group in (prefill, decode):
        group.close()
        group.release()
    assert (memory.num_back, memory.num_closed) == (3, 3)


async def test_both_sides_prove_themselves_through_exported_memory(memory) -> None:
    prefill, decode = await ipc_groups()
    await asyncio.gather(
        asyncio.to_thread(authenticate, prefill, PREFILL_RANK, CREDENTIALS, timeout_s=WAIT_S),
        asyncio.to_thread(authenticate, decode, DECODE_RANK, CREDENTIALS, timeout_s=WAIT_S),
    )
    assert len(memory.exported) == 2
    prefill.close()


@pytest.mark.parametrize("closing", [0, 1])
async def test_closing_an_ipc_group_wakes_everybody(memory, closing) -> None:
    groups = prefill, decode = await ipc_groups()
    transfers = [prefill.send(prefill.send_buffer(8)), prefill.receive(prefill.receive_buffer(8))]
    transfers.append(decode.receive(decode.receive_buffer(9)))
    with ThreadPoolExecutor(4) as threads:
        ends = [threads.submit(group.wait_for_end) for group in groups]
        waits = [threads.submit(transfer.wait, WAIT_S) for transfer in transfers[:2]]
        groups[closing].close()
        assert all(end.result(WAIT_S) for end in ends)
        for wait in waits:
            with pytest.raises(PairBroken):
                wait.result(WAIT_S)
    with pytest.raises(PairBroken):
        transfers[2].wait(WAIT_S)


async def test_a_payload_of_another_size_breaks_the_pair(memory) -> None:
    prefill, decode = await ipc_groups()
    sending = prefill.send(prefill.send_buffer(8))
    with pytest.raises(PairBroken, match="the peer sends 8 of 8 bytes where 9 are due"):
        decode.receive(decode.receive_buffer(9)).wait(WAIT_S)
    prefill.close()
    with pytest.raises(PairBroken):
        sending.wait(WAIT_S)


class Work:
    """A transfer that ends when it is told to."""

    def __init__(self) -> None:
        self.completed = False
        self.error = ""

    def is_completed(self) -> bool:
        return self.completed

    def wait(self) -> None:
        assert self.completed, "it would block"
        if self.error:
            raise RuntimeError(self.error)


class FakeNccl:
    """`ProcessGroupNCCL`: exchanges its id, and keeps the transfers that it is given."""

    class Options:
        is_high_priority_stream = False
        _timeout = None

    def __init__(self, store, rank, size, options) -> None:
        self.store, self.rank = store, rank
        self.works: list[Work] = []
        self.aborted = False

    def eager_connect_single_device(self, device) -> None:
        if self.rank == PREFILL_RANK:
            self.store.set("0", bytes(range(128)))
        else:
            assert self.store.get("0") == bytes(range(128))

    def send(self, tensors, peer, tag) -> Work:
        self.works.append(Work())
        return self.works[-1]

    recv = send

    def abort(self) -> None:
        self.aborted = True
        for work in self.works:
            work.completed = True


@pytest.fixture
def fake_nccl(monkeypatch):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNccl, raising=False)
    for name in [*nccl._ENVIRONMENT, "NCCL_SOCKET_IFNAME"]:
        monkeypatch.delenv(name, raising=False)
    # What `connect` sets is gone after the test.
    monkeypatch.setattr(nccl.os, "environ", dict(nccl.os.environ))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))


async def nccl_groups():
    options = {"interface": "127.0.0.1", "timeout_s": 2.0}
    members = zip(await gloo_groups(), (PREFILL_RANK, DECODE_RANK), strict=True)
    connecting = [asyncio.to_thread(nccl.connect, gloo, rank, CPU, "nccl:p2p", **options) for gloo, rank in members]
    return await asyncio.gather(*connecting)


async def test_the_id_of_nccl_travels_over_gloo_and_its_interface_is_gloos(fake_nccl) -> None:
    prefill, decode = await nccl_groups()
    assert prefill.transport == decode.transport == "nccl:p2p"
    assert nccl.os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    prefill.close()


async def test_a_peer_that_never_comes_to_nccl_is_named_within_the_timeout(fake_nccl) -> None:
    _, decode = await gloo_groups()
    with pytest.raises(PairBroken, match=r"NCCL did not connect within 0\.1 s|NCCL: "):
        nccl.connect(decode, DECODE_RANK, CPU, "nccl", interface="127.0.0.1", timeout_s=0.1)


async def test_an_nccl_transfer_is_waited_for_without_blocking_in_it(fake_nccl) -> None:
    prefill, _ = await nccl_groups()
    transfer = prefill.send(torch.zeros(8, dtype=torch.uint8))
    threading.Timer(0.05, lambda: setattr(prefill._group.works[0], "completed", True)).start()
    transfer.wait(WAIT_S)
    prefill.close()


async def test_an_nccl_transfer_that_fails_breaks_the_pair(fake_nccl) -> None:
    prefill, _ = await nccl_groups()
    transfer = prefill.send(torch.zeros(8, dtype=torch.uint8))
    prefill._group.works[0].error = "NCCL error: remote process exited\nException raised from somewhere"
    prefill._group.works[0].completed = True
    with pytest.raises(PairBroken, match=r"^NCCL error: remote process exited$"):
        transfer.wait(WAIT_S)
    prefill.close()


async def test_closing_an_nccl_group_aborts_transfers_that_would_spin_for_ever(fake_nccl) -> None:
    prefill, decode = await nccl_groups()
    transfer = prefill.send(torch.zeros(8, dtype=torch.uint8))
    with ThreadPoolExecutor(2) as threads:
        wait, end = threads.submit(transfer.wait, WAIT_S), threads.submit(decode.wait_for_end)
        prefill.close()
        with pytest.raises(PairBroken, match="closed during an NCCL transfer"):
            wait.result(WAIT_S)
        assert end.result(WAIT_S)
    with pytest.raises(PairBroken, match="closed"):
        prefill.send(torch.zeros(8, dtype=torch.uint8))


@pytest.mark.promise(16)
async def test_an_nccl_transfer_that_takes_too_long_ends_the_group(fake_nccl) -> None:
    prefill, _ = await nccl_groups()
    started_s = time.monotonic()
    with pytest.raises(PairBroken, match=r"an NCCL transfer of 8 bytes took 0\.1 s"):
        prefill.receive(torch.zeros(8, dtype=torch.uint8)).wait(0.1)
    assert time.monotonic() - started_s < WAIT_S / 2
    assert prefill._group.aborted
