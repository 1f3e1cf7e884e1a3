"""Which worker gets a request: the cheapest, equal costs going to the first address. Reads a few workers of many.

A decode worker costs the step time that a sequence more would have there, times 1 and how full it is, in sequences and
in KV blocks, less a bonus for the share of the prompt that was sent there before; one under pressure gets nothing new.
A prefill worker costs the time until it would be done: its pace times the prompt tokens it would have to get through,
those it has cached not among them. A worker whose pace is not known is taken to be as quick as the quickest, so that it
soon is known. Workers of different fingerprints never share a request.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from common.blocks import block_hashes, cache_seed
from router.ranking import Lane, Ranking
from router.workers import Cut, Identity, Kind, Worker

# A prompt that is cached as a whole is worth this share of a decode worker's capacity.
AFFINITY = 0.2


class Demand:
    """What is to be placed: tokens (a prompt and, on a resumption, the output so far) and the salt of their prefix."""

    def __init__(
        self, token_ids: Sequence[int], *, cache_salt: str = "", kind: Kind | None = None, request_id: str = ""
    ) -> None:
        """`kind`: only workers of this kind will do."""
        self.token_ids = token_ids
        self.kind = kind
        self.request_id = request_id
        self._cache_salt = cache_salt
        self._hashes: dict[tuple[str, int], list[bytes]] = {}

    def hashes(self, cut: Cut | Identity) -> list[bytes]:
        """Chained hashes of the whole blocks, as a worker of that identity cuts them; computed once."""
        key = cut.model_fingerprint, cut.block_size
        if key not in self._hashes:
            seed = cache_seed(cut.model_fingerprint, self._cache_salt)
            self._hashes[key] = block_hashes(self.token_ids, cut.block_size, seed=seed)
        return self._hashes[key]

    def num_blocks(self, cut: Cut | Identity) -> int:
        """Blocks that decode reserves: all of the tokens, and one to grow into."""
        return -(-len(self.token_ids) // cut.block_size) + 1

    def num_cached_blocks(self, worker: Worker) -> int:
        """Leading blocks that were sent there before."""
        return worker.prefixes.num_matching(self.hashes(worker.cut))

    def num_uncached_tokens(self, worker: Worker, num_cached_blocks: int) -> int:
        """What is left to compute there, by what was sent there before."""
        return len(self.token_ids) - num_cached_blocks * worker.block_size


class Choice(NamedTuple):
    """The worker that gets the request. `cost` is in milliseconds of the worker's pace, if that is known."""

    worker: Worker
    num_cached_blocks: int
    cost: float


class Refusal(Enum):
    """Why a worker does not get a request; the values are for a person."""

    UNREACHABLE = "it is unreachable"
    DRAINING = "it is draining"
    LEAVING = "this router will not watch it for much longer"
    OTHER_MODEL = "the request is bound to another model"
    NO_PREFILL = "no prefill worker is alive for its model, and one is for others"
    TRIED_BEFORE = "it has failed this request before"
    NO_PLACE = "its batch is full"
    QUEUE = "reservations wait there for blocks"
    NO_BLOCKS = "it has too few free blocks"
    PRESSURE = "it is under pressure"
    SOON_PRESSURE = "the request would put it under pressure"


class DecodeTerms(NamedTuple):
    """What a decode worker must meet."""

    prefill_kinds: Collection[Kind]
    exclude: Collection[Worker] = ()
    only_with_room: bool = True
    heed_pressure: bool = True

    def refusal(self, worker: Worker, num_blocks: int) -> Refusal | None:
        """Why a worker that takes new work, of the right kind, does not get a request that takes so many blocks more.
        An idle worker always has room, and what it could bear, it is asked to."""
        if worker in self.exclude:
            return Refusal.TRIED_BEFORE
        if worker.num_seqs:
            num_left = worker.num_free_blocks - num_blocks
            if self.only_with_room:
                if num_left < 0:
                    return Refusal.NO_BLOCKS
                if not worker.has_place:
                    return Refusal.QUEUE if worker.load.num_waiting else Refusal.NO_PLACE
            if self.heed_pressure and 0 <= num_left < worker.num_spare_blocks:
                return Refusal.SOON_PRESSURE
        if self.heed_pressure and worker.is_pressed:
            return Refusal.PRESSURE
        return None

    def kinds(self, ranking: Ranking, demand: Demand) -> list[Kind]:
        """Of those that will do, the ones that a prefill worker can serve, if there are any."""
        kinds = [kind for kind in ranking.kinds if demand.kind in (None, kind)]
        usable = [kind for kind in kinds if any(worker not in self.exclude for worker in ranking.lane(kind))]
        return [kind for kind in usable if kind in self.prefill_kinds] or usable


class PrefillTerms(NamedTuple):
    """What a prefill worker must meet; `avoid` are taken only if there is no other."""

    kind: Kind
    avoid: Collection[Worker] = ()


def choose_decode(ranking: Ranking, demand: Demand, terms: DecodeTerms) -> Choice | None:
    """The cheapest decode worker that meets the terms. None: none does, at the moment."""
    lanes = [ranking.lane(kind) for kind in terms.kinds(ranking, demand)]
    return _cheapest(lanes, demand, decode_work, terms.refusal)


def choose_prefill(ranking: Ranking, demand: Demand, terms: PrefillTerms) -> Choice | None:
    """The prefill worker that would be done first. None: none is alive."""
    lanes = [ranking.lane(terms.kind)]
    if terms.avoid:
        others = _cheapest(lanes, demand, prefill_work, lambda worker, _: worker in terms.avoid)
        if others is not None:
            return others
    return _cheapest(lanes, demand, prefill_work, lambda worker, _: False)


def decode_work(worker: Worker, demand: Demand, num_cached_blocks: int) -> float:
    """What the request adds to the work that a decode worker is ranked by."""
    return -AFFINITY * num_cached_blocks / demand.num_blocks(worker.cut)


def prefill_work(worker: Worker, demand: Demand, num_cached_blocks: int) -> float:
    """What the request adds to the work that a prefill worker is ranked by: tokens."""
    return demand.num_uncached_tokens(worker, num_cached_blocks)


def assumed_pace(lanes: Iterable[Lane]) -> float:
    """For workers whose pace is not known: that of the quickest; 1 when no pace is known."""
    return min((min(lane.paces.values()) for lane in lanes if lane.paces), default=1.0)


def usable_workers(workers: Iterable[Worker], kind: Kind | None = None) -> list[Worker]:
    """Those that take new work, of one kind if it is given."""
    return [worker for worker in workers if worker.is_serving and (kind is None or worker.kind == kind)]


def remember(choice: Choice, demand: Demand) -> None:
    """The request goes to the chosen worker, which will have its prefix from then on."""
    choice.worker.prefixes.add(demand.hashes(choice.worker.cut))


def _cheapest(
    lanes: Sequence[Lane],
    demand: Demand,
    added_work: Callable[[Worker, Demand, int], float],
    refusal: Callable[[Worker, int], object],
) -> Choice | None:
    """In the order of their rank, until those that follow cannot be cheaper any more; those that were sent the prompt's
    beginning before are looked at in any case."""
    assumed = assumed_pace(lanes)
    # Cost and address decide.
    candidates: list[tuple[float, str, Worker, int]] = []
    for lane in filter(None, lanes):
        one = next(iter(lane))
        num_blocks, added = demand.num_blocks(one.cut), added_work(one, demand, 0)
        for worker in lane.holders(demand.hashes(one.cut)):
            num_cached = demand.num_cached_blocks(worker)
            if not refusal(worker, num_blocks - num_cached):
                cost = (worker.pace or assumed) * (worker.work + added_work(worker, demand, num_cached))
                candidates.append((cost, worker.address, worker, num_cached))
        for ranks in (lane.paced, lane.unpaced):
            least = min(candidates)[0] if candidates else float("inf")
            for _, pace, address, worker in ranks:
                # No pace is less than the assumed one.
                if (pace or assumed) * worker.work + assumed * added >= least:
                    break
                if not refusal(worker, num_blocks):
                    cost = (pace or assumed) * (worker.work + added)
                    candidates.append((cost, address, worker, 0))
                    least = min(least, cost)
    if not candidates:
        return None
    cost, _, worker, num_cached = min(candidates)
    return Choice(worker, num_cached, cost)
