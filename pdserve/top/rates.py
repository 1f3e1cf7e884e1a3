"""How fast counters grow. Takes times, keeps no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

NUM_REMEMBERED = 60


class Rate:
    """Of one counter, a second; its latest values are kept. A counter that has begun anew is another one."""

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._count = 0
        self._life: Hashable = None
        self.latest: float | None = None
        self.history: deque[float] = deque(maxlen=NUM_REMEMBERED)

    def hear(self, count: int, at_s: float, life: Hashable) -> None:
        """It stood at `count` at that time, in this life (boot id) of its process."""
        if self._at_s is None or life != self._life or count < self._count:
            self._at_s, self._count, self._life, self.latest = at_s, count, life, None
            return
        # The same news again, told by a router that has heard nothing since.
        if at_s - self._at_s < 1e-3:
            return
        self.latest = (count - self._count) / (at_s - self._at_s)
        self.history.append(self.latest)
        self._at_s, self._count = at_s, count
