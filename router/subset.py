"""Which workers a router watches where there are many, and how many. A policy, no I/O.

Rendezvous hashing: each router ranks the workers by a hash of its own name and their address, and takes the first so
many. The choice depends on nothing else: routers need not know of one another, and a worker that joins or leaves
changes one place of a choice at most.

How many is what keeps every worker watched by several routers and none by all. W workers of a role and R routers that
take K each make R·K load streams; a worker has m = R·K/W watchers on average, and none with a probability of at most
e^-m. No router knows R, but each worker tells how many watch it: K follows, so that m stays between `FEWEST` and `MOST`
or K is `min_watched`, or W. So streams grow with the number of workers, not with its product with that of routers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

# Watchers of a worker on average. Of the fewest, one worker in 160,000 has none.
FEWEST, ENOUGH, MOST = 12, 16, 24


def subset(addresses: Iterable[str], *, of: str, size: int) -> list[str]:
    """The `size` of `addresses` that the router called `of` watches, each once, in their order; all of few."""
    known = list(dict.fromkeys(addresses))
    if len(known) <= size:
        return known
    taken = set(sorted(known, key=lambda address: _rank(of, address))[:size])
    return [address for address in known if address in taken]


class SubsetSize:
    """How many workers of one role this router watches; at least `min_watched`."""

    def __init__(self, min_watched: int) -> None:
        self.size = self._least = min_watched

    def adjust(self, num_known: int, num_watchers: Sequence[int]) -> None:
        """`num_known` workers there are; those that are watched and serve have so many watchers each, this router
        among them."""
        if not num_watchers or num_known <= self._least:
            return
        # This router is not counted: it has chosen just these, so with it they have one more than all have on average.
        mean = sum(num_watchers) / len(num_watchers) - 1
        if not FEWEST <= mean <= MOST:
            wanted = num_known if mean <= 0 else math.ceil(self.size * ENOUGH / mean)
            self.size = min(max(wanted, self._least), num_known)


def _rank(router: str, address: str) -> bytes:
    return hashlib.blake2b(f"{router} {address}".encode(), digest_size=8).digest()
