"""Prefill's side of a pair at work: takes layers of blocks as they are computed, and ships them.

The thread that computes only queues; a transfer thread gathers, checks, announces and sends. On a CPU a large run of
one layer goes straight from the cache, everything else through a staging slot. On a device it gathers in a stream of
its own, which waits for the layer: the stream that computes never waits for anything here.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common.clock import Clock, monotonic
from common.transport.batching import Ready, Span, SpanQueue
from common.transport.checksum import checksum
from common.transport.group import PairBroken, PairGroup, Transfer
from common.transport.limits import gather_slots, transfer_timeout_s
from common.transport.messages import (
    AttemptKey,
    AttemptOutcome,
    Commit,
    FromDecode,
    FromPrefill,
    Goodbye,
    TransferStatus,
)
from common.transport.outgoing import OutgoingAttempt
from common.transport.protocol import End, Finish, Send, SendingAction
from common.transport.sending_protocol import SendingProtocol
from common.transport.serial import Serial
from common.transport.staging import Slot, StagingSlots
from common.transport.watch import GroupWatch


class BlockSource(Protocol):
    """Where blocks are read from; `common.engine.kv_cache.KvCache` is one and says more."""

    device: torch.device
    # Of one layer's block.
    block_bytes: int

    def gather(self, first_layer: int, num_layers: int, block_ids: Sequence[int], out: Tensor) -> Tensor: ...

    def view(self, first_layer: int, num_layers: int, block_ids: Sequence[int]) -> Tensor | None: ...


class _InFlight(NamedTuple):
    transfer: Transfer
    timeout_s: float
    slot: Slot | None


class SendingPair:
    """Many attempts over one pair, interleaved chunk by chunk. Ends once, for good, whatever goes wrong."""

    def __init__(
        self,
        name: str,
        group: PairGroup,
        source: BlockSource,
        *,
        num_credits: int,
        max_chunk_bytes: int,
        post: Callable[[FromPrefill], None],
        on_end: Callable[[str], None],
        clock: Clock = monotonic,
    ) -> None:
        """`post` puts a message on the control stream, `on_end` hears once why the pair ended; neither may block."""
        self.transport = group.transport
        self._source = source
        self._max_chunk_bytes = max_chunk_bytes
        self._post = post
        self._on_end = on_end
        self._clock = clock
        self._lock = threading.Condition()
        self._protocol = SendingProtocol(num_credits, max_chunk_bytes)
        self._steps: Serial[SendingAction] = Serial(self._lock, self._perform)
        self._attempts: dict[AttemptKey, OutgoingAttempt] = {}
        # Attempts with something to announce, in the order of their turns.
        self._ready: dict[OutgoingAttempt, None] = {}
        # Blocks in the host's memory can be sent from where they lie.
        self._direct = source.device.type == "cpu"
        self._staging = StagingSlots(gather_slots(group.transport), max_chunk_bytes, group.send_buffer)
        self._in_flight: deque[_InFlight] = deque()
        self._last_used_s = self._waiting_since_s = clock()
        self._watch = GroupWatch(
            group, name, device=source.device, work=self._transfer, drain=self._drain, on_end=self.end
        )
        self._watch.start()

    @property
    def ended(self) -> bool:
        return self._protocol.ended

    @property
    def idle_s(self) -> float:
        """How long it has had no attempt; 0 while it has one."""
        return 0.0 if self._attempts else self._clock() - self._last_used_s

    @property
    def unanswered_s(self) -> float:
        """How long decode has been silent although something waits for its answer; 0 when nothing does."""
        with self._lock:
            return self._clock() - self._waiting_since_s if self._protocol.awaits_decode else 0.0

    def touch(self) -> None:
        """It is about to be used: not idle."""
        self._last_used_s = self._clock()

    def begin(self, key: AttemptKey, on_done: Callable[[AttemptOutcome], None]) -> OutgoingAttempt:
        """Opens an attempt. On a pair that has ended, `on_done` is called at once, with status None."""
        spans = SpanQueue(
            block_bytes=self._source.block_bytes, max_chunk_bytes=self._max_chunk_bytes, direct=self._direct
        )
        attempt = OutgoingAttempt(self, key, spans, on_done)
        with self._lock:
            is_new = self._attempts.setdefault(key, attempt) is attempt
        if is_new:
            self._steps.run(lambda: self._protocol.begin(key))
        else:
            on_done(AttemptOutcome(TransferStatus.FENCED, f"{key} is being shipped already", 0))
        return attempt

    def ship(
        self,
        attempt: OutgoingAttempt,
        layer: int,
        first_block: int,
        block_ids: Sequence[int],
        ready: Ready | None = None,
    ) -> None:
        """See OutgoingAttempt, like the next three."""
        with self._lock:
            if self._is_open(attempt):
                attempt.num_bytes += len(block_ids) * self._source.block_bytes
                attempt.spans.push(layer, first_block, block_ids, ready)
                self._ready.setdefault(attempt)
                self._lock.notify_all()

    def commit(self, attempt: OutgoingAttempt, commit: Commit) -> None:
        with self._lock:
            if self._is_open(attempt):
                attempt.due_commit = commit
                self._ready.setdefault(attempt)
                self._lock.notify_all()

    def abandon(self, attempt: OutgoingAttempt) -> None:
        self._steps.run(lambda: self._protocol.abandon(attempt.key) if self._is_open(attempt) else [])

    def is_gone(self, attempt: OutgoingAttempt) -> bool:
        with self._lock:
            return self._attempts.get(attempt.key) is not attempt or self._protocol.is_gone(attempt.key)

    def handle(self, message: FromDecode) -> None:
        """Takes a message from the control stream."""
        self._waiting_since_s = self._clock()
        self._steps.run(lambda: self._protocol.handle(message))

    def end(self, reason: str) -> None:
        """Ends the pair: open attempts end with status None. Only the first call has an effect."""
        self._steps.run(lambda: self._protocol.end(reason))

    def wait_released(self, timeout_s: float) -> bool:
        """Blocks until an ended pair's threads and group are gone; False if they are not by then."""
        return self._watch.wait_released(timeout_s)

    def _is_open(self, attempt: OutgoingAttempt) -> bool:
        return self._attempts.get(attempt.key) is attempt and self._protocol.is_open(attempt.key)

    def _perform(self, action: SendingAction) -> None:
        match action:
            case Send(message):
                self._post(message)  # type: ignore[arg-type]
            case Finish(key, outcome):
                with self._lock:
                    attempt = self._attempts.pop(key)
                    self._last_used_s = self._clock()
                attempt.on_done(outcome)
            case End(reason):
                self._post(Goodbye(reason))
                self._watch.close()
                self._on_end(reason)

    def _announce(self, step: Callable[[], Sequence[SendingAction]]) -> Sequence[SendingAction]:
        with self._lock:
            if not self._protocol.awaits_decode:
                self._waiting_since_s = self._clock()
        return self._steps.run(step)

    def _transfer(self) -> None:
        """The transfer thread. While it waits for a send, more gets queued, and shares the next chunks."""
        while (task := self._next_task()) is not None:
            attempt, work = task
            if isinstance(work, Span):
                self._send(attempt, work)
            else:
                self._announce(lambda: self._protocol.commit(work) if self._is_open(attempt) else [])  # noqa: B023

    def _next_task(self) -> tuple[OutgoingAttempt, Span | Commit] | None:
        """Blocks until there is something to announce, and meanwhile on what is in flight. None: the pair ended."""
        while True:
            with self._lock:
                while not (task := self._take_task()) and not self._in_flight and not self._protocol.ended:
                    self._lock.wait()
                if task or self._protocol.ended:
                    return task
            self._finish_oldest()

    def _take_task(self) -> tuple[OutgoingAttempt, Span | Commit] | None:
        for attempt in list(self._ready):
            if not self._is_open(attempt):
                del self._ready[attempt]
            elif self._protocol.num_credits or not attempt.spans:
                work = attempt.take()
                del self._ready[attempt]
                if attempt.has_work:
                    # To the end of the line.
                    self._ready[attempt] = None
                return attempt, work
        return None

    def _send(self, attempt: OutgoingAttempt, span: Span) -> None:
        slot = payload = None
        if self._direct:
            payload = self._source.view(span.first_layer, span.num_layers, span.block_ids)
        if payload is None:
            while (slot := self._staging.acquire()) is None:
                self._finish_oldest()
            if span.ready is not None:
                span.ready.wait()
            payload = self._source.gather(span.first_layer, span.num_layers, span.block_ids, slot.buffer)
        num_bytes, digest = payload.numel(), checksum(payload)

        def announce() -> Sequence[SendingAction]:
            if not self._is_open(attempt):
                return []
            return self._protocol.announce(
                attempt.key,
                first_layer=span.first_layer,
                num_layers=span.num_layers,
                first_block=span.first_block,
                num_blocks=len(span.block_ids),
                num_bytes=num_bytes,
                checksum=digest,
            )

        if self._announce(announce):
            transfer = self._watch.group.send(payload)
            self._in_flight.append(_InFlight(transfer, transfer_timeout_s(num_bytes), slot))
        elif slot is not None:
            self._staging.release(slot)

    def _finish_oldest(self) -> None:
        transfer, timeout_s, slot = self._in_flight[0]
        transfer.wait(timeout_s)
        self._in_flight.popleft()
        if slot is not None:
            self._staging.release(slot)

    def _drain(self) -> None:
        while self._in_flight:
            transfer, timeout_s, _ = self._in_flight.popleft()
            with contextlib.suppress(PairBroken):
                transfer.wait(timeout_s)
