"""Prefill's side of a pair as a state machine; the rules are in `common.transport.protocol`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from common.transport.messages import (
    AbandonAttempt,
    Acknowledgement,
    AttemptBegin,
    AttemptKey,
    AttemptOutcome,
    ChunkHeader,
    Commit,
    CommitAcknowledgement,
    Credit,
    FromDecode,
    Goodbye,
    ReservationGone,
    TransferStatus,
)
from common.transport.protocol import End, Finish, Send, SendingAction


class _Phase(Enum):
    OPEN = "open"
    COMMITTED = "committed"
    STOPPED = "stopped"


@dataclass(slots=True)
class _Outgoing:
    phase: _Phase = _Phase.OPEN
    # Why it was stopped.
    verdict: tuple[TransferStatus, str] = (TransferStatus.OK, "")
    num_unacknowledged: int = 0
    num_bytes: int = 0


class SendingProtocol:
    """Counts credits, and knows of each attempt what is announced and not yet acknowledged."""

    def __init__(self, num_credits: int, max_chunk_bytes: int) -> None:
        self._window = num_credits
        self._credits = num_credits
        self._max_chunk_bytes = max_chunk_bytes
        self._next_sequence_number = 0
        # Attempts of the chunks announced last, one for each that decode has not answered.
        self._unacknowledged: deque[AttemptKey] = deque()
        self._attempts: dict[AttemptKey, _Outgoing] = {}
        self._ended = ""

    @property
    def num_credits(self) -> int:
        return self._credits

    @property
    def ended(self) -> bool:
        return bool(self._ended)

    def is_open(self, key: AttemptKey) -> bool:
        """Chunks of this attempt may still be announced."""
        attempt = self._attempts.get(key)
        return attempt is not None and attempt.phase is _Phase.OPEN

    def is_gone(self, key: AttemptKey) -> bool:
        """This attempt has ended, or was stopped and ends with its last acknowledgement."""
        attempt = self._attempts.get(key)
        return attempt is None or attempt.phase is _Phase.STOPPED

    @property
    def awaits_decode(self) -> bool:
        """Something was announced or committed that decode has not answered."""
        return bool(self._unacknowledged) or any(a.phase is _Phase.COMMITTED for a in self._attempts.values())

    def begin(self, key: AttemptKey) -> list[SendingAction]:
        if self._ended:
            return [Finish(key, AttemptOutcome(None, self._ended, 0))]
        assert key not in self._attempts
        self._attempts[key] = _Outgoing()
        return [Send(AttemptBegin(key))]

    def announce(
        self,
        key: AttemptKey,
        *,
        first_layer: int,
        num_layers: int,
        first_block: int,
        num_blocks: int,
        num_bytes: int,
        checksum: int,
    ) -> list[SendingAction]:
        """Nothing when the attempt is not open any more; the caller holds a credit."""
        if not self.is_open(key):
            return []
        assert self._credits > 0
        assert 0 < num_bytes <= self._max_chunk_bytes
        sequence_number = self._next_sequence_number
        self._next_sequence_number += 1
        self._credits -= 1
        self._unacknowledged.append(key)
        attempt = self._attempts[key]
        attempt.num_unacknowledged += 1
        attempt.num_bytes += num_bytes
        header = ChunkHeader(
            sequence_number, key, first_layer, num_layers, first_block, num_blocks, num_bytes, checksum
        )
        return [Send(header)]

    def commit(self, commit: Commit) -> list[SendingAction]:
        """Nothing when the attempt is not open any more."""
        if not self.is_open(commit.key):
            return []
        self._attempts[commit.key].phase = _Phase.COMMITTED
        return [Send(commit)]

    def abandon(self, key: AttemptKey, detail: str = "abandoned by prefill") -> list[SendingAction]:
        """Too late once the commit was sent: decode's answer decides then."""
        return self._stop(key, TransferStatus.FENCED, detail)

    def handle(self, message: FromDecode) -> list[SendingAction]:
        if self._ended:
            return []
        match message:
            case Acknowledgement(sequence_number, status, detail):
                return self._acknowledged(sequence_number, status, detail)
            case Credit(num_chunks):
                self._credits += num_chunks
                if self._credits > self._window:
                    return self.end(f"decode granted {self._credits} credits in a window of {self._window}")
                return []
            case CommitAcknowledgement(key, status, detail):
                attempt = self._attempts.get(key)
                if attempt is None or attempt.phase is not _Phase.COMMITTED or attempt.num_unacknowledged:
                    return self.end(f"decode acknowledged a commit of {key} that was not due")
                return [self._finish(key, status, detail)]
            case ReservationGone(gone):
                over = [key for key in self._attempts if key.reservation == gone.reservation]
                stopped = (key for key in over if key.attempt <= gone.attempt)
                return [
                    action for key in stopped for action in self._stop(key, TransferStatus.FENCED, "fenced by decode")
                ]
            case Goodbye(reason):
                return self.end(reason)

    def end(self, reason: str) -> list[SendingAction]:
        """The pair is over, for whatever reason: every attempt ends with it."""
        if self._ended:
            return []
        self._ended = reason or "closed"
        actions: list[SendingAction] = [
            Finish(key, AttemptOutcome(None, self._ended, attempt.num_bytes)) for key, attempt in self._attempts.items()
        ]
        self._attempts.clear()
        self._unacknowledged.clear()
        return [*actions, End(self._ended)]

    def _acknowledged(self, sequence_number: int, status: TransferStatus, detail: str) -> list[SendingAction]:
        first = self._next_sequence_number - len(self._unacknowledged)
        if not first <= sequence_number < self._next_sequence_number:
            due = f"{first} to {self._next_sequence_number - 1} were due" if self._unacknowledged else "none was due"
            return self.end(f"decode acknowledged chunk {sequence_number} where {due}")
        actions: list[SendingAction] = []
        for number in range(first, sequence_number + 1):
            key = self._unacknowledged.popleft()
            attempt = self._attempts[key]
            attempt.num_unacknowledged -= 1
            if attempt.phase is _Phase.STOPPED and not attempt.num_unacknowledged:
                actions.append(self._finish(key, *attempt.verdict))
            elif number == sequence_number and status is not TransferStatus.OK:
                actions += self._stop(key, status, detail)
        return actions

    def _stop(self, key: AttemptKey, status: TransferStatus, detail: str) -> list[SendingAction]:
        if not self.is_open(key):
            return []
        attempt = self._attempts[key]
        attempt.phase, attempt.verdict = _Phase.STOPPED, (status, detail)
        actions: list[SendingAction] = [Send(AbandonAttempt(key))]
        if not attempt.num_unacknowledged:
            actions.append(self._finish(key, status, detail))
        return actions

    def _finish(self, key: AttemptKey, status: TransferStatus, detail: str) -> Finish:
        return Finish(key, AttemptOutcome(status, detail, self._attempts.pop(key).num_bytes))
