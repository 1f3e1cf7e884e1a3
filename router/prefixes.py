"""Which prompt prefixes this router has sent to a worker: a guess at what its prefix cache holds. A policy, no I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixIndex:
    """The most recent chained block hashes (`common.blocks.block_hashes`), as many as the worker has blocks."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # Least recently used first.
        self.known: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.known)

    def num_matching(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks were sent there before."""
        for place, value in enumerate(hashes):
            if value not in self.known:
                return place
        return len(hashes)

    def add(self, hashes: Sequence[bytes]) -> None:
        """The worker gets these blocks. A prefix's end is forgotten before its beginning."""
        for value in reversed(hashes):
            self.known[value] = None
            self.known.move_to_end(value)
        while len(self.known) > self._capacity:
            self.known.popitem(last=False)
