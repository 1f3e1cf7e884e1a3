"""Time as an argument: policies take a clock, so that tests can turn the hands."""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds, monotonic, of no particular origin.
Clock = Callable[[], float]

monotonic: Clock = time.monotonic


class FakeClock:
    """A clock that stands still until it is told to advance."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
