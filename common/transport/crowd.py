"""How many pairs a worker holds: one more closes the one that has been idle for longest."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, TypeVar

from common.errors import ResourceExhausted

# One that was used a moment ago is about to be used: an attempt begins shortly after the pair was handed out.
LEAST_IDLE_S = 1.0


class Idling(Protocol):
    """A pair, as far as closing it goes."""

    @property
    def idle_s(self) -> float:
        """How long it has had no attempt; 0 while it has one."""


P = TypeVar("P", bound=Idling)


def longest_idle(pairs: Collection[P], *, max_pairs: int) -> P:
    """The pair to close for one more.

    Raises:
        ResourceExhausted: all of them are in use.
    """
    idlest = max(pairs, key=lambda pair: pair.idle_s, default=None)
    if idlest is None or idlest.idle_s < LEAST_IDLE_S:
        raise ResourceExhausted(
            f"this worker holds {max_pairs} pairs (max_pairs), and each is in use or being made", reason="PAIR_LIMIT"
        )
    return idlest
