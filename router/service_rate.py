"""How fast the queue is served, and how long what is taken from it takes. A policy: no clock of its own, no I/O."""

from __future__ import annotations

import statistics
from collections import deque

from common.params import StoppingParams

# Requests taken from the queue that the rate is made of, and how many make a rate at all.
WINDOW = 128
ENOUGH = 16
# Requests that the time of one is told from. Few, so that slow ones are soon forgotten.
RECENT = 32
# So many of ten of them took no longer.
TENTHS = 9


class Recent:
    """The last values of something."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=RECENT)
        self.median = 0.0
        self.most = 0.0

    def add(self, value: float) -> None:
        self._values.append(value)
        self.median = statistics.median(self._values)
        self.most = sorted(self._values)[(len(self._values) - 1) * TENTHS // 10]


class ServiceRate:
    """Times are seconds on one monotonic clock. Time in which nobody waited does not count for the rate."""

    def __init__(self) -> None:
        self._idle_since_s: float | None = 0.0
        self._idle_s = 0.0
        # When each was taken, on a clock that stands still while the queue is empty.
        self._taken: deque[float] = deque(maxlen=WINDOW)
        # From being taken to the first token, from token to token, and tokens of what has ended.
        self._first_token_s, self._token_s, self._num_tokens = Recent(), Recent(), Recent()

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
        """A request got its first token this long after it was taken, or had none by then when its time was up."""
        self._first_token_s.add(seconds)

    def streamed(self, seconds: float, *, num_tokens: int) -> None:
        """A request got so many tokens after the first one in that time, whether it has ended well or not."""
        if num_tokens:
            self._token_s.add(seconds / num_tokens)

    def completed(self, *, num_tokens: int) -> None:
        """A request ended by itself after so many tokens."""
        self._num_tokens.add(num_tokens)

    def wait_s(self, num_ahead: int, now_s: float) -> float | None:
        """How long a request with so many ahead of it will wait; None while too little was measured."""
        if len(self._taken) < ENOUGH:
            return None
        busy_now_s = (now_s if self._idle_since_s is None else self._idle_since_s) - self._idle_s
        return (num_ahead + 1) * (busy_now_s - self._taken[0]) / len(self._taken)

    def service_s(self, stopping: StoppingParams) -> float:
        """From being taken to the last token, as nine of ten of late; of a request that may end early, as many tokens
        are expected as the others had."""
        is_certain = stopping.ignore_eos and not stopping.stop and not stopping.stop_token_ids
        expected = stopping.max_tokens if is_certain else min(self._num_tokens.median, stopping.max_tokens)
        num_tokens = max(expected, stopping.min_tokens, 1)
        return self._first_token_s.most + (num_tokens - 1) * self._token_s.most
