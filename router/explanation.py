"""How requests were placed, and how one would be: who was considered, with what was known of each, and why this one.

Nothing is decided here: `router.placement` and `router.local_prefill` say what is told.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from common.clock import Clock
from common.errors import NotFound
from router.fleet import Fleet
from router.local_prefill import LocalPrefill, Way, prospect_of
from router.placement import (
    Choice,
    DecodeTerms,
    Demand,
    PrefillTerms,
    Refusal,
    assumed_pace,
    choose_decode,
    choose_prefill,
    decode_work,
    prefill_work,
)
from router.workers import Role, Worker, WorkerState

log = logging.getLogger(__name__)

# Request ids whose placing is remembered, of each the latest choices, since clients may use an id again and again, and
# of each choice so many candidates, the cheapest.
MAX_REQUESTS = 256
MAX_PLACINGS = 16
MAX_CANDIDATES = 16


class Candidate(NamedTuple):
    """The fields mean what Candidate of the protocol says."""

    address: str
    instance_id: str
    refusal: Refusal | None
    detail: str
    cost: float
    pace_ms: float
    num_free_blocks: int
    num_sequences: int
    num_waiting_tokens: int
    num_cached_tokens: int

    def __str__(self) -> str:
        figures = (
            f"costs {self.cost:.3f}, pace {self.pace_ms:.3f} ms, {self.num_sequences} sequences, "
            f"{self.num_waiting_tokens} tokens waiting, {self.num_free_blocks} blocks free, "
            f"{self.num_cached_tokens} tokens cached"
        )
        return f"{self.address}: {figures}{self.detail and f'; {self.detail}'}"


class Placing(NamedTuple):
    """One choice. The fields mean what Placing of the protocol says; `made_s` is on the router's clock."""

    role: Role
    chosen: str
    made_s: float
    num_tokens: int
    candidates: Sequence[Candidate]
    num_more_candidates: int = 0
    way: Way | None = None

    def __str__(self) -> str:
        more = f"; {self.num_more_candidates} more" if self.num_more_candidates else ""
        way = f", {self.way}" if self.way else ""
        considered = "; ".join(map(str, self.candidates))
        return f"{self.role.value} goes to {self.chosen or 'nobody'}{way}; considered: {considered}{more}"


class PlacementLog:
    """The latest placings by request, and a line for each in the log at level debug."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self._fleet = fleet
        self._clock = clock
        self._by_request: OrderedDict[str, deque[Placing]] = OrderedDict()

    def note_decode(self, demand: Demand, terms: DecodeTerms, choice: Choice) -> None:
        """It was chosen, and nothing of the request counts there yet."""
        self._add(demand, self.explain_decode(self._some(Role.DECODE, choice), demand, terms, choice))

    def note_prefill(self, demand: Demand, terms: PrefillTerms, choice: Choice | None, way: Way) -> None:
        """The same; None: decode computes the prompt."""
        self._add(demand, self.explain_prefill(self._some(Role.PREFILL, choice), demand, terms, choice, way))

    def of(self, request_id: str) -> Sequence[Placing]:
        """Oldest first. Raises NotFound when none is known."""
        if request_id not in self._by_request:
            raise NotFound(
                f"no request {request_id!r} among the latest {MAX_REQUESTS} that this router has placed",
                field="request_id",
            )
        return self._by_request[request_id]

    def explain_decode(
        self, workers: Sequence[Worker], demand: Demand, terms: DecodeTerms, choice: Choice | None
    ) -> Placing:
        """Why `choice`, among `workers` of all that there are."""
        ranking = self._fleet.ranking[Role.DECODE]
        kinds = terms.kinds(ranking, demand)
        assumed = assumed_pace(map(ranking.lane, kinds))

        def refusal(worker: Worker, num_cached_blocks: int) -> Refusal | None:
            if worker in terms.exclude:
                return Refusal.TRIED_BEFORE
            if worker.kind not in kinds:
                return Refusal.NO_PREFILL if demand.kind in (None, worker.kind) else Refusal.OTHER_MODEL
            return terms.refusal(worker, demand.num_blocks(worker.cut) - num_cached_blocks)

        candidates = [_candidate(worker, demand, assumed, decode_work, refusal) for worker in workers]
        return self._placing(Role.DECODE, demand, candidates, choice)

    def explain_prefill(
        self, workers: Sequence[Worker], demand: Demand, terms: PrefillTerms, choice: Choice | None, way: Way
    ) -> Placing:
        """Why `choice`, among `workers` of all that there are, or why none."""
        ranking = self._fleet.ranking[Role.PREFILL]
        assumed = assumed_pace([ranking.lane(terms.kind)])
        is_last_resort = choice is not None and choice.worker in terms.avoid

        def refusal(worker: Worker, _: int) -> Refusal | None:
            if worker.kind != terms.kind:
                return Refusal.OTHER_MODEL
            return Refusal.TRIED_BEFORE if worker in terms.avoid and not is_last_resort else None

        candidates = [_candidate(worker, demand, assumed, prefill_work, refusal) for worker in workers]
        return self._placing(Role.PREFILL, demand, candidates, choice)._replace(way=way)

    def _some(self, role: Role, choice: Choice | None) -> list[Worker]:
        """All of few; of many the cheapest that take new work, and the one that was chosen."""
        workers = self._fleet.members(role)
        if len(workers) <= MAX_CANDIDATES:
            return workers
        some = dict.fromkeys(self._fleet.ranking[role].first(MAX_CANDIDATES))
        return list(some if choice is None else some | {choice.worker: None})

    def _placing(self, role: Role, demand: Demand, candidates: list[Candidate], choice: Choice | None) -> Placing:
        candidates.sort(key=lambda one: (one.refusal is not None, one.cost, one.address))
        num_more = len(self._fleet.members(role)) - len(candidates)
        chosen = choice.worker.address if choice else ""
        return Placing(role, chosen, self._clock(), len(demand.token_ids), candidates, num_more)

    def _add(self, demand: Demand, placing: Placing) -> None:
        log.debug("%s", placing)
        self._by_request.setdefault(demand.request_id, deque(maxlen=MAX_PLACINGS)).append(placing)
        self._by_request.move_to_end(demand.request_id)
        if len(self._by_request) > MAX_REQUESTS:
            self._by_request.popitem(last=False)


def explain(
    demand: Demand, fleet: Fleet, local_prefill: LocalPrefill, placings: PlacementLog, *, reads_cache: bool
) -> Iterator[Placing]:
    """How a request would be placed at this moment, all workers listed. Changes nothing."""
    terms = DecodeTerms(fleet.prefill_kinds)
    decode = choose_decode(fleet.ranking[Role.DECODE], demand, terms)
    yield placings.explain_decode(fleet.decode, demand, terms, decode)
    if decode is None or decode.worker.kind is None:
        return
    prefill_terms = PrefillTerms(decode.worker.kind)
    prefill = choose_prefill(fleet.ranking[Role.PREFILL], demand, prefill_terms)
    prospect = prospect_of(demand, decode.worker, decode.num_cached_blocks, prefill, reads_cache=reads_cache)
    way = local_prefill.judge(prospect)
    chosen = None if way.is_local else prefill
    yield placings.explain_prefill(fleet.prefill, demand, prefill_terms, chosen, way)


def _candidate(
    worker: Worker,
    demand: Demand,
    assumed_pace_ms: float,
    added_work: Callable[[Worker, Demand, int], float],
    refusal_of: Callable[[Worker, int], Refusal | None],
) -> Candidate:
    num_cached = demand.num_cached_blocks(worker) if worker.kind else 0
    refusal = _absence(worker) or refusal_of(worker, num_cached)
    cost = (worker.pace or assumed_pace_ms) * (worker.work + added_work(worker, demand, num_cached))
    return Candidate(
        address=worker.address,
        instance_id=worker.instance_id,
        refusal=refusal,
        detail=_detail(worker, refusal),
        cost=cost,
        pace_ms=worker.pace,
        num_free_blocks=max(0, worker.num_free_blocks),
        num_sequences=worker.num_seqs,
        num_waiting_tokens=worker.num_waiting_tokens,
        num_cached_tokens=num_cached * worker.block_size,
    )


def _absence(worker: Worker) -> Refusal | None:
    """Why it takes nothing new from anybody."""
    if worker.state is WorkerState.UNREACHABLE:
        return Refusal.UNREACHABLE
    if worker.state is WorkerState.DRAINING:
        return Refusal.DRAINING
    return Refusal.LEAVING if worker.is_leaving else None


def _detail(worker: Worker, refusal: Refusal | None) -> str:
    if refusal is None:
        return ""
    if refusal is Refusal.UNREACHABLE:
        return f"{refusal.value}: {worker.reason}"
    if refusal is Refusal.PRESSURE:
        return f"{refusal.value}: {', '.join(reason.value for reason in worker.load.pressure) or 'its steps were slow'}"
    return refusal.value
