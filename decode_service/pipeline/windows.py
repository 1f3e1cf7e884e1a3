"""Which steps between two decisions are measured for what, and how long a pause between two attempts is."""

from __future__ import annotations

import statistics

from decode_service.pipeline.decisions import Purpose

# Steps between two decisions. The first may be a sample, the middle one a probe.
WINDOW = 32


class Window:
    """The steps since the last decision."""

    def __init__(self) -> None:
        self.probe_s: float | None = None
        self._num_begun = 0
        self._seconds: list[float] = []

    def begin(self, *, is_sampled: bool, is_probed: bool) -> Purpose:
        """What the next step is for. Several may begin before the first has ended."""
        at = self._num_begun
        self._num_begun += 1
        if at == 0 and is_sampled:
            return Purpose.SAMPLE
        return Purpose.PROBE if at == WINDOW // 2 and is_probed else Purpose.CHOICE

    def add(self, seconds: float) -> None:
        """A step as chosen took so long."""
        self._seconds.append(seconds)

    @property
    def is_over(self) -> bool:
        return len(self._seconds) == WINDOW - 1

    @property
    def step_s(self) -> float:
        """Of steps as chosen: the median, so that one which was held up does not count."""
        return statistics.median(self._seconds)


class Pause:
    """Each is twice as long as the one before, up to the longest. In windows."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._length = 0
        self._until = 0

    def is_over(self, now: int) -> bool:
        return now >= self._until

    def start(self, now: int, *, after_calm: bool = False) -> None:
        """After calm it is the shortest again."""
        is_first = after_calm or not self._length
        self._length = self._shortest if is_first else min(2 * self._length, self._longest)
        self._until = now + self._length
