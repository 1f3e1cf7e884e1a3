"""The process group between two CUDA devices: a `ProcessGroupNCCL` for each pair, beside the gloo group it met over.

Gloo carries NCCL's id, and notices a peer that dies. NCCL alone would wait for ever: its transfers are kernels that
spin, and `abort` is what ends them. Each side has one stream for all its transfers, so they run one after the other.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.transport.gloo import GlooGroup
from common.transport.group import PairBroken
from common.transport.interfaces import interface_name

log = logging.getLogger(__name__)

_ID_TAG = 3
_ID_BYTES = 128
# A transfer is asked whether it ended, first soon and then less often: a thread that sleeps on a CUDA event cannot be
# woken, and may hold what `abort` needs.
_FIRST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 500e-6

_ENVIRONMENT = {
    # With blocking waits PyTorch starts neither its watchdog nor its heartbeat monitor, which end the process when a
    # peer is lost. `Work.wait`, which would block, is called only for what has ended.
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    # Should there be a watchdog nevertheless, it leaves the process alone.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # No record of every transfer with a stack trace.
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
    # One transfer after the other is what a pair wants.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
}


class NcclTransfer:
    """See `common.transport.group.Transfer`."""

    def __init__(self, group: NcclGroup, work: dist.Work, tensor: Tensor) -> None:
        self._group = group
        self._work = work
        self._tensor = tensor

    def wait(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        pause_s = _FIRST_PAUSE_S
        try:
            while not self._work.is_completed():
                if time.monotonic() > deadline_s:
                    self._group.close()
                    raise PairBroken(f"an NCCL transfer of {self._tensor.numel()} bytes took {timeout_s:.1f} s")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if self._group.closed:
                raise PairBroken("the process group was closed during an NCCL transfer")
            # It ended, well or not; this raises if not.
            self._work.wait()
        except RuntimeError as error:
            raise PairBroken(_explain(error)) from error


class NcclGroup:
    """See `common.transport.group.PairGroup`."""

    def __init__(
        self, companion: GlooGroup, rank: int, device: torch.device, *, transport: str, timeout_s: float
    ) -> None:
        """Blocks until the peer has come, or for ever: see `connect`."""
        self.transport = transport
        self.device = device
        self.closed = False
        self._companion = companion
        self._peer = 1 - rank
        options = dist.ProcessGroupNCCL.Options()  # type: ignore[attr-defined]
        # So that a transfer's few blocks are not placed behind those of a long kernel.
        options.is_high_priority_stream = True
        options._timeout = timedelta(seconds=timeout_s)
        # PyTorch keeps only the C++ half of it alive.
        self._store = _IdExchange(companion, timeout_s)
        group = dist.ProcessGroupNCCL(self._store, rank, 2, options)  # type: ignore[attr-defined]
        self._group: Any = group
        group.eager_connect_single_device(device)

    def send_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def receive_buffer(self, num_bytes: int) -> Tensor:
        return self.send_buffer(num_bytes)

    def send(self, payload: Tensor) -> NcclTransfer:
        return self._begin("send", payload)

    def receive(self, buffer: Tensor) -> NcclTransfer:
        return self._begin("recv", buffer)

    def wait_for_end(self) -> str:
        return self._companion.wait_for_end()

    def close(self) -> None:
        self.closed = True
        # The peer first: it notices at once and aborts as well.
        self._companion.close()
        try:
            self._group.abort()
        except RuntimeError as error:
            log.error("NCCL could not be aborted: %s", _explain(error))

    def release(self) -> None:
        del self._group
        self._companion.release()

    def _begin(self, operation: str, tensor: Tensor) -> NcclTransfer:
        if self.closed:
            raise PairBroken("the process group is closed")
        try:
            return NcclTransfer(self, getattr(self._group, operation)([tensor], self._peer, 0), tensor)
        except RuntimeError as error:
            raise PairBroken(_explain(error)) from error


def connect(
    companion: GlooGroup, rank: int, device: torch.device, transport: str, *, interface: str, timeout_s: float
) -> NcclGroup:
    """Makes the group, for both sides at once; NCCL binds the interface that gloo binds.

    Raises:
        PairBroken: it could not be made within the timeout.
    """
    os.environ.update(_ENVIRONMENT)
    name = interface_name(interface)
    if name is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    made: Future[NcclGroup] = Future()

    def make() -> None:
        try:
            with torch.cuda.device(device):
                made.set_result(NcclGroup(companion, rank, device, transport=transport, timeout_s=timeout_s))
        except Exception as error:
            made.set_exception(PairBroken(f"NCCL: {_explain(error)}; kv_transports without nccl does without it"))

    # A thread of its own: nothing ends an NCCL that waits for a peer which will not come.
    threading.Thread(target=make, name="nccl-connect", daemon=True).start()
    try:
        return made.result(timeout_s)
    except TimeoutError:
        made.add_done_callback(_close_late)
        raise PairBroken(
            f"NCCL did not connect within {timeout_s:g} s (NCCL_SOCKET_IFNAME={os.environ.get('NCCL_SOCKET_IFNAME')}); "
            "NCCL_DEBUG=INFO shows what it tried, kv_transports without nccl does without it"
        ) from None


class _IdExchange(dist.Store):
    """All that NCCL asks of a store for two ranks: prefill sets its id, decode reads it."""

    def __init__(self, companion: GlooGroup, timeout_s: float) -> None:
        super().__init__()
        self._companion = companion
        self._timeout_s = timeout_s

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        assert len(value) == _ID_BYTES, f"{key}: NCCL's id has {len(value)} bytes"
        self._companion.send(torch.frombuffer(bytearray(value), dtype=torch.uint8), _ID_TAG).wait(self._timeout_s)

    def get(self, key: str) -> bytes:
        value = torch.empty(_ID_BYTES, dtype=torch.uint8)
        self._companion.receive(value, _ID_TAG).wait(self._timeout_s)
        return value.numpy().tobytes()


def _close_late(made: Future[NcclGroup]) -> None:
    if made.exception() is None:
        made.result().close()


def _explain(error: BaseException) -> str:
    """What NCCL says, without PyTorch's advice and backtrace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("ncclU", "ncclS", "ncclR", "ncclI", "Last error", "NCCL"))]
    return " ".join(told or lines[:1])[:500] or type(error).__name__
