"""For how long dispatch has been held because decode is under pressure. A policy: a clock goes in, no I/O."""

from __future__ import annotations

from common.clock import Clock


class Hold:
    """A stopwatch. What a request was held for is the difference of two readings of `total_s`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_s: float | None = None
        self._past_s = 0.0

    @property
    def is_on(self) -> bool:
        return self._since_s is not None

    @property
    def total_s(self) -> float:
        """All times together, the one under way included."""
        return self._past_s if self._since_s is None else self._past_s + self._clock() - self._since_s

    def begin(self) -> None:
        self._since_s = self._clock()

    def end(self) -> float:
        """Returns how long this time was, in seconds."""
        before_s, self._past_s = self._past_s, self.total_s
        self._since_s = None
        return self._past_s - before_s
