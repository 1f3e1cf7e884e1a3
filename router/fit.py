"""A straight line through what was measured, the newest counting most. A policy: no clock, no I/O."""

from __future__ import annotations


class LinearFit:
    """Least squares of y on x, for quantities that never fall as x grows and are never negative.

    Each observation makes all earlier ones weigh 1 / `memory` less, so about so many count.
    """

    def __init__(self, memory: float) -> None:
        self._keep = 1 - 1 / memory
        self._weight = 0.0
        self._mean_y = 0.0
        self._spread_xx = 0.0
        self._spread_xy = 0.0
        self.mean_x = 0.0
        self.num_observed = 0

    def add(self, x: float, y: float) -> None:
        """Both at least 0."""
        self.num_observed += 1
        self._weight = self._keep * self._weight + 1
        off_x = x - self.mean_x
        self.mean_x += off_x / self._weight
        self._mean_y += (y - self._mean_y) / self._weight
        self._spread_xx = self._keep * self._spread_xx + off_x * (x - self.mean_x)
        self._spread_xy = self._keep * self._spread_xy + off_x * (y - self._mean_y)

    @property
    def slope(self) -> float:
        """At least 0, and no steeper than through the origin; 0 while x has always been the same."""
        if not self._spread_xx:
            return 0.0
        return min(max(self._spread_xy / self._spread_xx, 0.0), self._mean_y / self.mean_x)

    @property
    def at_zero(self) -> float:
        return self._mean_y - self.slope * self.mean_x

    def at(self, x: float) -> float:
        """What y is to be expected of x. Something must have been observed."""
        assert self.num_observed, "nothing was observed"
        return self._mean_y + self.slope * (x - self.mean_x)
