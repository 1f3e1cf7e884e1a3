"""The process group over TCP with gloo: a `ProcessGroupGloo` for each pair, made without default group or TCPStore.

The rendezvous is each side's HOST:PORT. What gloo does when a peer dies shapes the rest: a receive that
waits for its message fails within 20 ms, a transfer in the middle of a message hangs until its own timeout, and
`abort()` wakes nobody. So `wait_for_end` keeps a receive open that never gets a message, and `close` lets an operation
time out, which makes gloo close the connection and wake everybody else, here and at the peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.transport.gloo_address import key_listening_at, listening_address
from common.transport.group import PairBroken

_PAYLOAD_TAG = 0
_WATCH_TAG = 1
_CLOSE_TAG = 2
_A_YEAR = timedelta(days=365)


class GlooTransfer:
    """See `common.transport.group.Transfer`; in whatever order."""

    def __init__(self, work: dist.Work, tensor: Tensor) -> None:
        self._work = work
        self._tensor = tensor
        self._failure = ""

    def wait(self, timeout_s: float) -> None:
        if not self._failure:
            try:
                self._work.wait(timedelta(seconds=timeout_s))
            except RuntimeError as error:
                self._failure = _explain(error)
        if self._failure:
            raise PairBroken(self._failure)


class GlooGroup:
    """See `common.transport.group.PairGroup`. Messages with different tags go their own ways, each in order."""

    transport = "gloo"
    device = torch.device("cpu")

    def __init__(self, group: Any, rank: int, *, pinned: bool = False) -> None:
        """`pinned`: payload comes from or goes to a CUDA device."""
        self._group = group
        self._peer = 1 - rank
        self._pinned = pinned

    def send_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def receive_buffer(self, num_bytes: int) -> Tensor:
        return self.send_buffer(num_bytes)

    def send(self, payload: Tensor, tag: int = _PAYLOAD_TAG) -> GlooTransfer:
        return self._begin(self._group.send, payload, tag)

    def receive(self, buffer: Tensor, tag: int = _PAYLOAD_TAG) -> GlooTransfer:
        return self._begin(self._group.recv, buffer, tag)

    def wait_for_end(self) -> str:
        try:
            self._begin(self._group.recv, torch.empty(1, dtype=torch.uint8), _WATCH_TAG).wait(_A_YEAR.total_seconds())
        except PairBroken as error:
            return error.message
        return "the peer closed the process group"

    def close(self) -> None:
        with contextlib.suppress(PairBroken):
            self._begin(self._group.recv, torch.empty(1, dtype=torch.uint8), _CLOSE_TAG).wait(1e-3)

    def release(self) -> None:
        del self._group

    def _begin(
        self, operation: Callable[[list[Tensor], int, int], dist.Work], tensor: Tensor, tag: int
    ) -> GlooTransfer:
        try:
            return GlooTransfer(operation([tensor], self._peer, tag), tensor)
        except RuntimeError as error:
            raise PairBroken(_explain(error)) from error


class GlooJoining:
    """One side of a group that is being made, on one interface, given by address or host name.

    gloo's constructor blocks, so it has a thread of its own.
    """

    def __init__(self, rank: int, *, interface: str, timeout_s: float, pinned: bool = False) -> None:
        self._rank = rank
        self._interface = interface
        self._timeout_s = timeout_s
        self._pinned = pinned
        self._store = _OneKeyEachWay(timeout_s)
        self._group: Future[GlooGroup] = Future()
        for future in (self._store.own, self._group):
            # A waiter that is cancelled does not cancel the work itself.
            future.set_running_or_notify_cancel()
        threading.Thread(target=self._make, name="gloo-join", daemon=True).start()

    async def rendezvous(self) -> bytes:
        """What the peer has to be told; at most MAX_RENDEZVOUS_BYTES."""
        return await asyncio.wrap_future(self._store.own)

    async def connect(self, peer_rendezvous: bytes) -> GlooGroup:
        """The group. The peer has to connect at the same time.

        Raises:
            PairBroken: the peer could not be reached within the timeout.
        """
        self._store.peer.set_result(peer_rendezvous)
        return await asyncio.wrap_future(self._group)

    def cancel(self) -> None:
        """The group is not wanted any more."""
        self._store.peer.cancel()

    def _make(self) -> None:
        try:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._interface)]
            options._timeout = timedelta(seconds=self._timeout_s)
            # Of a pool for collectives, which a pair does not use.
            options._threads = 1
            made = dist.ProcessGroupGloo(self._store, self._rank, 2, options)
            group = GlooGroup(made, self._rank, pinned=self._pinned)
            del made
        except Exception as error:
            broken = PairBroken(f"gloo on {self._interface}: {_explain(error)}")
            for future in (self._store.own, self._group):
                if not future.done():
                    future.set_exception(broken)
        else:
            self._group.set_result(group)


class _OneKeyEachWay(dist.Store):
    """All that gloo asks of a store for two ranks: it sets this rank's key and reads both."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self.own: Future[bytes] = Future()
        self.peer: Future[bytes] = Future()
        self._timeout_s = timeout_s
        self._own_name = ""
        self._own_key = b""

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._own_name, self._own_key = key, value
        self.own.set_result(str(listening_address(value)).encode())

    def get(self, key: str) -> bytes:
        if key == self._own_name:
            return self._own_key
        try:
            return key_listening_at(self.peer.result(self._timeout_s), self._own_key)
        except TimeoutError:
            raise PairBroken(f"the peer's part of the rendezvous did not come within {self._timeout_s:g} s") from None
        except CancelledError:
            raise PairBroken("the peer is not wanted any more") from None

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


def _explain(error: Exception) -> str:
    """gloo's first sentence, without the place in its source."""
    return re.sub(r"^\[[^]]*\] ", "", str(error)).split(". ")[0]
