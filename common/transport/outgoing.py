"""One attempt to fill a reservation, as the prefill engine holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from common.transport.batching import Ready, Span, SpanQueue
from common.transport.messages import AttemptKey, AttemptOutcome, Commit


class _Pair(Protocol):
    """What an attempt asks of its pair."""

    def ship(
        self,
        attempt: OutgoingAttempt,
        layer: int,
        first_block: int,
        block_ids: Sequence[int],
        ready: Ready | None = None,
    ) -> None: ...

    def commit(self, attempt: OutgoingAttempt, commit: Commit) -> None: ...

    def abandon(self, attempt: OutgoingAttempt) -> None: ...

    def is_gone(self, attempt: OutgoingAttempt) -> bool: ...


class OutgoingAttempt:
    """Every method may be called from any thread, never blocks, and does nothing once the attempt is gone.

    The source blocks must stay as they are until `on_done`, which comes exactly once, from any thread.
    """

    def __init__(
        self, pair: _Pair, key: AttemptKey, spans: SpanQueue, on_done: Callable[[AttemptOutcome], None]
    ) -> None:
        self.key = key
        self.on_done = on_done
        # Payload handed to `ship` so far.
        self.num_bytes = 0
        # What is not announced yet; under the pair's lock.
        self.spans = spans
        self.due_commit: Commit | None = None
        self._pair = pair

    @property
    def gone(self) -> bool:
        """It has ended, or decode wants nothing more of it: `on_done` says why."""
        return self._pair.is_gone(self)

    @property
    def has_work(self) -> bool:
        return bool(self.spans or self.due_commit)

    def take(self) -> Span | Commit:
        """What to announce next; the commit comes last."""
        if self.spans:
            return self.spans.pop()
        commit, self.due_commit = self.due_commit, None
        assert commit is not None
        return commit

    def ship(self, layer: int, first_block: int, block_ids: Sequence[int], ready: Ready | None = None) -> None:
        """Sends one layer of some blocks; `first_block` is their place in the reservation's block table.

        On a device `ready` says when they will have been computed; layers become ready in the order they are shipped.
        """
        self._pair.ship(self, layer, first_block, block_ids, ready)

    def commit(self, commit: Commit) -> None:
        """Ends the attempt once everything shipped has been announced. Nothing is shipped after it."""
        self._pair.commit(self, commit)

    def abandon(self) -> None:
        """Gives it up: what is not announced yet is never sent. Without effect once the commit was sent."""
        self._pair.abandon(self)
