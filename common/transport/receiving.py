"""Decode's side of a pair at work: receives what was announced, checks it, and hands it to the engine.

A transfer thread posts receives in the order of the announcements, several at a time, and each into a staging slot of
its own; the slot comes back when the engine has written the payload.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common.clock import Clock, monotonic
from common.transport.checksum import checksum
from common.transport.group import PairBroken, PairGroup, Transfer
from common.transport.limits import transfer_timeout_s
from common.transport.messages import (
    AbandonAttempt,
    AttemptBegin,
    AttemptKey,
    ChunkHeader,
    Commit,
    FromDecode,
    FromPrefill,
    Goodbye,
    TransferStatus,
)
from common.transport.protocol import Deliver, End, Free, Receive, ReceivingAction, Send
from common.transport.receiving_protocol import ReceivingProtocol
from common.transport.serial import Serial
from common.transport.staging import Slot, StagingSlots
from common.transport.watch import GroupWatch


class Done(Protocol):
    def __call__(self, status: TransferStatus, detail: str, still_read: torch.cuda.Event | None = None) -> None:
        """How it fared. `still_read`: the end of device work that still reads the payload."""


class KvSink(Protocol):
    """Where KV arrives: the decode engine. Called from any thread, in order; puts into its inbox and returns at once.

    The engine checks the fence and writes in one step of its own thread, then calls `done` from there, exactly once.
    On a device the write may be under way when `done` says that it is made: the next use of the payload's memory waits.
    Nothing of an attempt comes after its commit or `attempt_abandoned`, and nothing of a pair after `pair_lost`.
    """

    def attempt_begun(self, pair_id: int, key: AttemptKey) -> None:
        """Chunks may follow. When the engine does not know it, `PairServer.reservation_gone` stops it."""

    def chunk_landed(self, pair_id: int, header: ChunkHeader, payload: Tensor, done: Done) -> None:
        """`payload` (uint8, on the group's device) is what was announced, bit for bit, and valid until `done`."""

    def commit_received(self, pair_id: int, commit: Commit, done: Done) -> None:
        """Everything shipped for this attempt has been written."""

    def attempt_abandoned(self, pair_id: int, key: AttemptKey) -> None:
        """Nothing more of it comes."""

    def pair_lost(self, pair_id: int, reason: str) -> None:
        """Nothing more of this pair comes; once for each pair."""


class _Posted(NamedTuple):
    header: ChunkHeader
    payload: Tensor
    transfer: Transfer


class ReceivingPair:
    """One pair. Ends once, for good, whatever goes wrong."""

    def __init__(
        self,
        pair_id: int,
        name: str,
        group: PairGroup,
        sink: KvSink,
        *,
        num_slots: int,
        max_chunk_bytes: int,
        post: Callable[[FromDecode], None],
        on_end: Callable[[str], None],
        clock: Clock = monotonic,
    ) -> None:
        """`post` puts a message on the control stream, `on_end` hears once why the pair ended; neither may block."""
        self.transport = group.transport
        self._id = pair_id
        self._sink = sink
        self._post = post
        self._on_end = on_end
        self._clock = clock
        self._last_used_s = clock()
        self._protocol = ReceivingProtocol(num_slots, max_chunk_bytes)
        self._steps: Serial[ReceivingAction] = Serial(threading.Condition(), self._perform)
        self._staging = StagingSlots(num_slots, max_chunk_bytes, group.receive_buffer)
        # None: the pair has ended.
        self._announced: queue.SimpleQueue[ChunkHeader | None] = queue.SimpleQueue()
        self._posted: deque[_Posted] = deque()
        self._slots: dict[int, Slot] = {}
        self._watch = GroupWatch(
            group, name, device=group.device, work=self._transfer, drain=self._drain, on_end=self.end
        )
        self._watch.start()

    @property
    def ended(self) -> bool:
        return self._protocol.ended

    @property
    def idle_s(self) -> float:
        """How long it has had no attempt; 0 while it has one."""
        return 0.0 if self._protocol.has_attempts else self._clock() - self._last_used_s

    def handle(self, message: FromPrefill) -> None:
        """Takes a message from the control stream."""
        self._last_used_s = self._clock()
        self._steps.run(lambda: self._protocol.handle(message))

    def reservation_gone(self, key: AttemptKey) -> None:
        """Stops prefill's work on this attempt and older ones."""
        self._steps.run(lambda: self._protocol.reservation_gone(key))

    def end(self, reason: str) -> None:
        """Ends the pair. Only the first call has an effect."""
        self._steps.run(lambda: self._protocol.end(reason))

    def wait_released(self, timeout_s: float) -> bool:
        """Blocks until an ended pair's threads and group are gone; False if they are not by then."""
        return self._watch.wait_released(timeout_s)

    def _perform(self, action: ReceivingAction) -> None:
        match action:
            case Send(message):
                self._post(message)  # type: ignore[arg-type]
            case Receive(header):
                self._announced.put(header)
            case Free(sequence_number):
                self._staging.release(self._slots.pop(sequence_number))
            case Deliver(event):
                self._deliver(event)
            case End(reason):
                self._announced.put(None)
                self._sink.pair_lost(self._id, reason)
                self._post(Goodbye(reason))
                self._watch.close()
                self._on_end(reason)

    def _deliver(self, event: AttemptBegin | ChunkHeader | Commit | AbandonAttempt) -> None:
        match event:
            case AttemptBegin(key):
                self._sink.attempt_begun(self._id, key)
            case ChunkHeader(sequence_number=number, num_bytes=num_bytes):
                payload = self._slots[number].buffer[:num_bytes]
                self._sink.chunk_landed(self._id, event, payload, partial(self._landed, number))
            case Commit(key=key):
                self._sink.commit_received(self._id, event, partial(self._committed, key))
            case AbandonAttempt(key):
                self._sink.attempt_abandoned(self._id, key)

    def _landed(
        self, sequence_number: int, status: TransferStatus, detail: str, still_read: torch.cuda.Event | None = None
    ) -> None:
        self._slots[sequence_number].still_read = still_read
        self._steps.run(lambda: self._protocol.landed(sequence_number, status, detail))

    def _committed(
        self, key: AttemptKey, status: TransferStatus, detail: str, still_read: torch.cuda.Event | None = None
    ) -> None:
        self._last_used_s = self._clock()
        self._steps.run(lambda: self._protocol.committed(key, status, detail))

    def _transfer(self) -> None:
        """The transfer thread."""
        while self._post_announced():
            header, payload, transfer = self._posted[0]
            transfer.wait(transfer_timeout_s(header.num_bytes))
            self._posted.popleft()
            # Before the checksum, so that the link works meanwhile.
            if not self._post_announced(block=False):
                return
            digest = checksum(payload)
            self._steps.run(lambda: self._protocol.received(header.sequence_number, digest))  # noqa: B023

    def _post_announced(self, *, block: bool = True) -> bool:
        """Posts a receive for everything announced; blocks until one is posted. False: the pair ended."""
        with contextlib.suppress(queue.Empty):
            while (header := self._announced.get(block=block and not self._posted)) is not None:
                slot = self._staging.acquire()
                assert slot is not None, "a credit without a free slot"
                self._slots[header.sequence_number] = slot
                slot.wait_until_read()
                payload = slot.buffer[: header.num_bytes]
                self._posted.append(_Posted(header, payload, self._watch.group.receive(payload)))
            return False
        return True

    def _drain(self) -> None:
        while self._posted:
            header, _, transfer = self._posted.popleft()
            with contextlib.suppress(PairBroken):
                transfer.wait(transfer_timeout_s(header.num_bytes))
