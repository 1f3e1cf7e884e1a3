"""The workers of a role in the order of what they cost, kept so as their load changes: placing reads a few of many.

Something changes at a worker at most some thousand times a second, all workers together, and moving one costs a few
microseconds. Looking at each of a thousand workers for each request costs a millisecond.

A worker costs its pace times its work (`router.workers.Worker`). One whose pace is not known is ranked by its work
alone, apart from the others: whoever chooses knows what to take its pace for.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Sequence
from functools import partial

from router.workers import Kind, Worker

# Cost, pace, address, worker. A plain tuple, since it is compared often; no two have the same address.
Rank = tuple[float, float, str, Worker]


class Lane:
    """The workers of one kind that take new work."""

    def __init__(self) -> None:
        # Cheapest first.
        self.paced: list[Rank] = []
        # Of unknown pace, in the place of which stands 0; the least work first.
        self.unpaced: list[Rank] = []
        self.paces: dict[Worker, float] = {}
        # Hashes of the blocks that were sent to each.
        self._known: dict[Worker, Collection[bytes]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._known)

    def holders(self, hashes: Sequence[bytes]) -> list[Worker]:
        """Those that were sent a prompt which begins with the first of these blocks."""
        if not hashes:
            return []
        first = hashes[0]
        return [worker for worker, known in self._known.items() if first in known]

    def add(self, rank: Rank) -> None:
        _, pace, _, worker = rank
        insort(self.paced if pace else self.unpaced, rank)
        if pace:
            self.paces[worker] = pace
        self._known[worker] = worker.prefixes.known

    def remove(self, rank: Rank) -> None:
        _, pace, _, worker = rank
        ranks = self.paced if pace else self.unpaced
        del ranks[bisect_left(ranks, rank)]
        self.paces.pop(worker, None)
        del self._known[worker]


class Ranking:
    """Follows its workers from `add` to `remove`."""

    def __init__(self, workers: Collection[Worker] = ()) -> None:
        self._lanes: dict[Kind, Lane] = {}
        self._ranks: dict[Worker, tuple[Lane, Rank]] = {}
        for worker in workers:
            self.add(worker)

    def add(self, worker: Worker) -> None:
        worker.on_reckoned = partial(self._update, worker)
        self._update(worker)

    def remove(self, worker: Worker) -> None:
        worker.on_reckoned = lambda: None
        self._take_out(worker)

    @property
    def kinds(self) -> list[Kind]:
        """Of the workers that take new work."""
        return [kind for kind, lane in self._lanes.items() if lane]

    def first(self, number: int) -> list[Worker]:
        """Of each kind so many of the cheapest."""
        return [rank[-1] for lane in self._lanes.values() for rank in (*lane.paced[:number], *lane.unpaced[:number])]

    def lane(self, kind: Kind) -> Lane:
        return self._lanes.get(kind) or Lane()

    def _update(self, worker: Worker) -> None:
        if not worker.is_serving or worker.kind is None:
            self._take_out(worker)
            return
        cost = worker.pace * worker.work if worker.pace else worker.work
        rank = (cost, worker.pace, worker.address, worker)
        lane = self._lanes.setdefault(worker.kind, Lane())
        if self._ranks.get(worker) != (lane, rank):
            self._take_out(worker)
            lane.add(rank)
            self._ranks[worker] = lane, rank

    def _take_out(self, worker: Worker) -> None:
        if worker in self._ranks:
            lane, rank = self._ranks.pop(worker)
            lane.remove(rank)
