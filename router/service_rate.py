"""How fast the queue is served, measured while requests wait in it. A policy: no clock of its own, no I/O."""

from __future__ import annotations

from collections import deque

# Requests taken from the queue that the figures are made of, and how many make a figure at all.
WINDOW = 128
ENOUGH = 16


class ServiceRate:
    """Times are seconds on one monotonic clock. Time in which nobody waited does not count."""

    def __init__(self) -> None:
        self._idle_since_s: float | None = 0.0
        self._idle_s = 0.0
        # When each was taken, on a clock that stands still while the queue is empty.
        self._taken: deque[float] = deque(maxlen=WINDOW)
        # From being taken to the first token.
        self._first_token_s: deque[float] = deque(maxlen=WINDOW)

    def began_to_queue(self, now_s: float) -> None:
        """The queue was empty and is not any more."""
        if self._idle_since_s is not None:
            self._idle_s += now_s - self._idle_since_s
            self._idle_since_s = None

    def taken(self, now_s: float, *, is_empty: bool) -> None:
        """A request left the queue for a worker; `is_empty` when it was the last one."""
        self._taken.append(now_s - self._idle_s)
        if is_empty:
            self.emptied(now_s)

    def emptied(self, now_s: float) -> None:
        """Nobody waits any more."""
        self._idle_since_s = now_s

    def first_token(self, seconds: float) -> None:
        """A request got its first token this long after it was taken."""
        self._first_token_s.append(seconds)

    def wait_s(self, num_ahead: int, now_s: float) -> float | None:
        """How long a request with so many ahead of it will wait; None while too little was measured."""
        if len(self._taken) < ENOUGH:
            return None
        busy_now_s = (now_s if self._idle_since_s is None else self._idle_since_s) - self._idle_s
        return (num_ahead + 1) * (busy_now_s - self._taken[0]) / len(self._taken)

    def until_first_token_s(self, num_ahead: int, now_s: float) -> float | None:
        """The same, with the quickest first token of late added: what could work is not refused."""
        wait_s = self.wait_s(num_ahead, now_s)
        return None if wait_s is None else wait_s + min(self._first_token_s, default=0.0)
