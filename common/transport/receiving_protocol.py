"""Decode's side of a pair as a state machine; the rules are in `common.transport.protocol`."""

from __future__ import annotations

from dataclasses import dataclass

from common.transport.messages import (
    AbandonAttempt,
    Acknowledgement,
    AttemptBegin,
    AttemptKey,
    ChunkHeader,
    Commit,
    CommitAcknowledgement,
    Credit,
    FromPrefill,
    Goodbye,
    ReservationGone,
    TransferStatus,
)
from common.transport.protocol import Deliver, End, Free, Receive, ReceivingAction, Send


@dataclass(slots=True)
class _Arriving:
    header: ChunkHeader
    verdict: tuple[TransferStatus, str] | None = None


@dataclass(slots=True)
class _Incoming:
    # Announced and not landed in their turn.
    num_under_way: int = 0
    # Of the first chunk that was not OK.
    failure: tuple[TransferStatus, str] | None = None
    ending: Commit | AbandonAttempt | None = None


class ReceivingProtocol:
    """Counts credits and slots. Knows nothing of reservations: the engine judges what is delivered to it."""

    def __init__(self, num_credits: int, max_chunk_bytes: int) -> None:
        self._window = num_credits
        # Prefill's credits as decode counts them, and free slots not granted back yet.
        self._credits = num_credits
        self._num_free = 0
        self._max_chunk_bytes = max_chunk_bytes
        self._next_sequence_number = 0
        # Announced and not landed in their turn, in order.
        self._chunks: dict[int, _Arriving] = {}
        # Landed in their turn and not acknowledged yet: all OK.
        self._num_unanswered = 0
        self._attempts: dict[AttemptKey, _Incoming] = {}
        self._ended = ""

    @property
    def num_credits(self) -> int:
        return self._credits

    @property
    def ended(self) -> bool:
        return bool(self._ended)

    @property
    def has_attempts(self) -> bool:
        """One is open, or waits for its commit to be judged."""
        return bool(self._attempts)

    def handle(self, message: FromPrefill) -> list[ReceivingAction]:
        if self._ended:
            return []
        match message:
            case AttemptBegin(key):
                if key in self._attempts:
                    return self.end(f"prefill began {key} twice")
                self._attempts[key] = _Incoming()
                return [Deliver(message)]
            case ChunkHeader():
                return self._announced(message)
            case Commit() | AbandonAttempt():
                attempt = self._attempts.get(message.key)
                if attempt is None or attempt.ending is not None:
                    return self.end(f"prefill ended {message.key}, which is not open")
                attempt.ending = message
                return self._conclude(message.key)
            case Goodbye(reason):
                return self.end(reason)

    def received(self, sequence_number: int, checksum: int) -> list[ReceivingAction]:
        """The payload is in its slot."""
        if self._ended:
            return [Free(sequence_number)]
        header = self._chunks[sequence_number].header
        if checksum != header.checksum:
            detail = f"chunk {sequence_number}: checksum {checksum:016x} where {header.checksum:016x} was announced"
            return self.landed(sequence_number, TransferStatus.CORRUPT, detail)
        return [Deliver(header)]

    def landed(self, sequence_number: int, status: TransferStatus, detail: str) -> list[ReceivingAction]:
        """The engine has written the payload, or dropped it: the slot is free."""
        actions: list[ReceivingAction] = [Free(sequence_number)]
        if self._ended:
            return actions
        arriving = self._chunks[sequence_number]
        assert arriving.verdict is None
        arriving.verdict = (status, detail)
        self._num_free += 1
        for number in list(self._chunks):
            verdict = self._chunks[number].verdict
            if verdict is None:
                break
            key = self._chunks.pop(number).header.key
            attempt = self._attempts[key]
            attempt.num_under_way -= 1
            self._num_unanswered += 1
            if verdict[0] is not TransferStatus.OK:
                attempt.failure = attempt.failure or verdict
                actions += self._answer(*verdict)
            actions += self._conclude(key)
        # Half a window at a time: fewer messages, and prefill never runs dry while slots stand empty.
        if self._num_free * 2 >= self._window or not self._chunks:
            actions += self._answer()
            actions.append(Send(Credit(self._num_free)))
            self._credits += self._num_free
            self._num_free = 0
        return actions

    def committed(self, key: AttemptKey, status: TransferStatus, detail: str) -> list[ReceivingAction]:
        """The engine has judged the commit."""
        if self._ended:
            return []
        del self._attempts[key]
        return [*self._answer(), Send(CommitAcknowledgement(key, status, detail))]

    def reservation_gone(self, key: AttemptKey) -> list[ReceivingAction]:
        """Tells prefill to stop, if it is still at work on this attempt or an older one."""
        open_keys = (other for other, attempt in self._attempts.items() if attempt.ending is None)
        if any(other.reservation == key.reservation and other.attempt <= key.attempt for other in open_keys):
            return [Send(ReservationGone(key))]
        return []

    def end(self, reason: str) -> list[ReceivingAction]:
        """The pair is over, for whatever reason."""
        if self._ended:
            return []
        self._ended = reason or "closed"
        self._attempts.clear()
        self._chunks.clear()
        return [End(self._ended)]

    def _announced(self, header: ChunkHeader) -> list[ReceivingAction]:
        attempt = self._attempts.get(header.key)
        if header.sequence_number != self._next_sequence_number:
            return self.end(
                f"prefill announced chunk {header.sequence_number} where {self._next_sequence_number} was due"
            )
        if not self._credits:
            return self.end(f"prefill announced chunk {header.sequence_number} without a credit")
        if not 0 < header.num_bytes <= self._max_chunk_bytes:
            return self.end(f"prefill announced {header.num_bytes} bytes, allowed are 1 to {self._max_chunk_bytes}")
        if attempt is None or attempt.ending is not None:
            return self.end(f"prefill announced a chunk of {header.key}, which is not open")
        self._next_sequence_number += 1
        self._credits -= 1
        self._chunks[header.sequence_number] = _Arriving(header)
        attempt.num_under_way += 1
        return [Receive(header)]

    def _answer(self, status: TransferStatus = TransferStatus.OK, detail: str = "") -> list[ReceivingAction]:
        """Acknowledges every chunk that has landed in its turn, the last one of them with this status."""
        if not self._num_unanswered:
            return []
        self._num_unanswered = 0
        first_under_way = next(iter(self._chunks), self._next_sequence_number)
        return [Send(Acknowledgement(first_under_way - 1, status, detail))]

    def _conclude(self, key: AttemptKey) -> list[ReceivingAction]:
        """Ends an attempt once everything announced before its end has landed."""
        attempt = self._attempts[key]
        if attempt.ending is None or attempt.num_under_way:
            return []
        if isinstance(attempt.ending, AbandonAttempt):
            del self._attempts[key]
            return [*self._answer(), Deliver(attempt.ending)]
        if attempt.failure is not None:
            del self._attempts[key]
            refusal = Send(CommitAcknowledgement(key, *attempt.failure))
            return [*self._answer(), refusal, Deliver(AbandonAttempt(key))]
        return [Deliver(attempt.ending)]
