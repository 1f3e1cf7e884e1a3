"""A mean that forgets. Knows values, not where they come from."""

from __future__ import annotations

# Of a new value against those before.
WEIGHT = 0.25
# No value counts as more than so many times the mean: a step may be held up, but none is faster than it can be.
MOST = 1.25


class Average:
    """Exponentially weighted; the plain mean as long as there are few values."""

    def __init__(self, value: float, *, num_values: int = 1) -> None:
        """`num_values` 0: a guess, which the first value replaces."""
        self.value = value
        self._num_values = num_values

    def add(self, value: float) -> None:
        if self._num_values:
            value = min(value, self.value * MOST)
        self._num_values += 1
        self.value += max(WEIGHT, 1 / self._num_values) * (value - self.value)

    def guess(self) -> Average:
        """The same value, of which nothing is known elsewhere."""
        return Average(self.value, num_values=0)
