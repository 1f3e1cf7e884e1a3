"""When requests of an open loop are due. The users behind it do not wait for one another's answers."""

from __future__ import annotations

import random
from collections.abc import Iterator

POISSON, CONSTANT = "poisson", "constant"
KINDS = (POISSON, CONSTANT)


def arrivals(kind: str, rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start, without end: `rate` a second, exponential gaps (poisson) or equal ones (constant)."""
    assert kind in KINDS, kind
    # The same draws for every rate: the gaps of twice the rate are half as long.
    generator = random.Random(f"{seed} arrivals")
    at_s = 0.0
    while True:
        yield at_s
        at_s += (generator.expovariate(1.0) if kind == POISSON else 1.0) / rate
