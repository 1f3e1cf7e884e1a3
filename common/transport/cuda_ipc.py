"""The process group between two processes on one GPU: the receiver copies from the sender's memory.

Beside the gloo group it was met over, which carries three short messages a chunk less the payload: where it is, and
that it has been read. Gloo also notices a peer that dies. What a dead peer exported stays readable until it is closed.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from common.engine.streams import sleep_until_done
from common.transport.gloo import GlooGroup, GlooTransfer
from common.transport.group import PairBroken
from common.transport.ipc_memory import HANDLE_BYTES, Export, Opened, export, give_back

_WHERE_TAG = 3
_READ_TAG = 4
# Handle and size of the allocation, size of the payload, which is at its beginning.
_WHERE = struct.Struct(f"<{HANDLE_BYTES}sQQ")


class IpcGroup:
    """See `common.transport.group.PairGroup`."""

    transport = "cuda-ipc"

    def __init__(self, companion: GlooGroup, device: torch.device) -> None:
        self.device = device
        self._companion = companion
        # By their address.
        self._exports: dict[int, Export] = {}
        # By their handle.
        self._opened: dict[bytes, Opened] = {}

    def send_buffer(self, num_bytes: int) -> Tensor:
        try:
            exported = export(num_bytes, self.device)
        except RuntimeError as error:
            raise PairBroken(f"exporting memory: {error}") from error
        self._exports[exported.buffer.data_ptr()] = exported
        return exported.buffer

    def receive_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def send(self, payload: Tensor) -> _Send:
        exported = self._exports[payload.data_ptr()]
        # The peer's stream cannot wait for this one.
        sleep_until_done(self.device)
        where = _WHERE.pack(exported.handle, exported.buffer.numel(), payload.numel())
        read = self._companion.receive(torch.empty(1, dtype=torch.uint8), _READ_TAG)
        return _Send(self._companion.send(torch.frombuffer(bytearray(where), dtype=torch.uint8), _WHERE_TAG), read)

    def receive(self, buffer: Tensor) -> _Receive:
        where = torch.empty(_WHERE.size, dtype=torch.uint8)
        return _Receive(self, self._companion.receive(where, _WHERE_TAG), where, buffer)

    def wait_for_end(self) -> str:
        return self._companion.wait_for_end()

    def close(self) -> None:
        self._companion.close()

    def release(self) -> None:
        for opened in self._opened.values():
            opened.close()
        for exported in self._exports.values():
            give_back(exported)
        self._opened.clear()
        self._exports.clear()
        self._companion.release()

    def read(self, where: bytes, buffer: Tensor, timeout_s: float) -> None:
        """Fills `buffer` and tells the peer."""
        handle, allocated, num_bytes = _WHERE.unpack(where)
        if num_bytes != buffer.numel() or num_bytes > allocated:
            raise PairBroken(f"the peer sends {num_bytes} of {allocated} bytes where {buffer.numel()} are due")
        if handle not in self._opened:
            self._opened[handle] = Opened(handle, allocated, self.device)
        buffer.copy_(self._opened[handle].buffer[:num_bytes], non_blocking=True)
        sleep_until_done(self.device)
        self._companion.send(torch.ones(1, dtype=torch.uint8), _READ_TAG).wait(timeout_s)


class _Send:
    """See `common.transport.group.Transfer`. The payload is in memory that stays with the group."""

    def __init__(self, where: GlooTransfer, read: GlooTransfer) -> None:
        self._where = where
        self._read = read

    def wait(self, timeout_s: float) -> None:
        self._where.wait(timeout_s)
        self._read.wait(timeout_s)


class _Receive:
    """See `common.transport.group.Transfer`. The copy is made by whoever waits."""

    def __init__(self, group: IpcGroup, arrived: GlooTransfer, where: Tensor, buffer: Tensor) -> None:
        self._group = group
        self._arrived = arrived
        self._where = where
        self._buffer = buffer

    def wait(self, timeout_s: float) -> None:
        self._arrived.wait(timeout_s)
        try:
            self._group.read(self._where.numpy().tobytes(), self._buffer, timeout_s)
        except RuntimeError as error:
            raise PairBroken(f"reading the peer's memory: {error}") from error
