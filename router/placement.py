"""Which worker gets a request. Pure functions of what is known of the workers; equal costs go to the first address.

A decode worker costs how full it is, in sequences and in KV blocks, less a bonus for the share of the prompt that was
sent there before; one under pressure gets nothing new. A prefill worker costs the prompt tokens it would have to get
through, those it has cached not among them. Workers of different fingerprints never share a request.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from common.blocks import block_hashes, cache_seed
from router.workers import Identity, Worker

# A prompt that is cached as a whole is worth this share of a decode worker's capacity.
AFFINITY = 0.2

Kind = tuple[str, int]


class Demand:
    """What is to be placed: tokens (a prompt and, on a resumption, the output so far) and the salt of their prefix."""

    def __init__(self, token_ids: Sequence[int], *, cache_salt: str = "", kind: Kind | None = None) -> None:
        """`kind`: only workers of this kind will do."""
        self.token_ids = token_ids
        self.kind = kind
        self._cache_salt = cache_salt
        self._hashes: dict[tuple[str, int], list[bytes]] = {}

    def hashes(self, identity: Identity) -> list[bytes]:
        """Chained hashes of the whole blocks, as a worker of that identity cuts them; computed once."""
        key = identity.model_fingerprint, identity.block_size
        if key not in self._hashes:
            seed = cache_seed(identity.model_fingerprint, self._cache_salt)
            self._hashes[key] = block_hashes(self.token_ids, identity.block_size, seed=seed)
        return self._hashes[key]

    def num_blocks(self, identity: Identity) -> int:
        """Blocks that decode reserves: all of the tokens, and one to grow into."""
        return -(-len(self.token_ids) // identity.block_size) + 1


class Candidate(NamedTuple):
    """A worker that was considered. Compares by cost, then by address."""

    cost: float
    address: str
    worker: Worker
    num_cached_blocks: int


class Choice(NamedTuple):
    """The worker that gets the request, and what it was chosen from."""

    worker: Worker
    num_cached_blocks: int
    considered: tuple[Candidate, ...]

    def __str__(self) -> str:
        costs = ", ".join(f"{candidate.address} costs {candidate.cost:.3f}" for candidate in self.considered)
        return f"{self.worker}: {self.num_cached_blocks} blocks were sent there before; {costs}"


def choose_decode(
    workers: Sequence[Worker],
    demand: Demand,
    *,
    prefill_kinds: Collection[Kind],
    exclude: Collection[Worker] = (),
    only_with_room: bool = True,
    heed_pressure: bool = True,
) -> Choice | None:
    """The cheapest decode worker, among those that a prefill worker can serve (`prefill_kinds`) if there are any.

    None: no worker will do, or with `only_with_room`, none has room at the moment, or with `heed_pressure`, those that
    would do are under pressure, or would be with it.
    """
    usable = [worker for worker in usable_workers(workers, demand.kind) if worker not in exclude]
    usable = [worker for worker in usable if _kind(worker) in prefill_kinds] or usable
    candidates = [_decode_candidate(worker, demand, len(workers) > 1) for worker in usable]
    if only_with_room:
        candidates = [candidate for candidate in candidates if _has_room(candidate, demand)]
    if heed_pressure:
        candidates = [candidate for candidate in candidates if not _is_pressed(candidate, demand)]
    return _cheapest(candidates)


def choose_prefill(
    workers: Sequence[Worker], demand: Demand, *, kind: Kind, avoid: Collection[Worker] = ()
) -> Choice | None:
    """The prefill worker that would be done first; one of `avoid` only if there is no other. None: none is alive."""
    usable = usable_workers(workers, kind)
    usable = [worker for worker in usable if worker not in avoid] or usable
    return _cheapest([_prefill_candidate(worker, demand, len(workers) > 1) for worker in usable])


def usable_workers(workers: Iterable[Worker], kind: Kind | None = None) -> list[Worker]:
    """Those that take new work, of one kind if it is given."""
    return [worker for worker in workers if worker.is_serving and (kind is None or _kind(worker) == kind)]


def remember(choice: Choice, demand: Demand) -> None:
    """The request goes to the chosen worker, which will have its prefix from then on."""
    if len(choice.considered) > 1:
        choice.worker.prefixes.add(demand.hashes(_identity(choice.worker)))


def _decode_candidate(worker: Worker, demand: Demand, has_others: bool) -> Candidate:
    identity = _identity(worker)
    num_cached = _num_cached(worker, demand, has_others)
    full = worker.num_seqs / identity.max_num_seqs + 1 - worker.num_free_blocks / identity.num_total_blocks
    bonus = AFFINITY * num_cached / demand.num_blocks(identity)
    return Candidate(full - bonus, worker.address, worker, num_cached)


def _prefill_candidate(worker: Worker, demand: Demand, has_others: bool) -> Candidate:
    num_cached = _num_cached(worker, demand, has_others)
    num_to_compute = len(demand.token_ids) - num_cached * _identity(worker).block_size
    return Candidate(worker.num_waiting_tokens + num_to_compute, worker.address, worker, num_cached)


def _num_cached(worker: Worker, demand: Demand, has_others: bool) -> int:
    """Hashing a long prompt takes a while, and an only worker gets every request anyway."""
    return worker.prefixes.num_matching(demand.hashes(_identity(worker))) if has_others else 0


def _has_room(candidate: Candidate, demand: Demand) -> bool:
    """Whether a reservation would be granted at once, as far as is known here. An idle worker is always asked."""
    worker, identity = candidate.worker, _identity(candidate.worker)
    if not worker.num_seqs:
        return True
    has_slot = worker.num_seqs < identity.max_num_seqs and not worker.load.num_waiting
    return has_slot and _num_left(candidate, demand) >= 0


def _is_pressed(candidate: Candidate, demand: Demand) -> bool:
    """Whether it is under pressure, or would be with this. What an idle worker could bear, it is asked to."""
    worker, num_spare = candidate.worker, _identity(candidate.worker).num_spare_blocks
    return worker.is_pressed or (worker.num_seqs > 0 and 0 <= _num_left(candidate, demand) < num_spare)


def _num_left(candidate: Candidate, demand: Demand) -> int:
    """Blocks that would be free with it."""
    num_needed = demand.num_blocks(_identity(candidate.worker)) - candidate.num_cached_blocks
    return candidate.worker.num_free_blocks - num_needed


def _cheapest(candidates: list[Candidate]) -> Choice | None:
    if not candidates:
        return None
    best = min(candidates, key=lambda candidate: candidate[:2])
    return Choice(best.worker, best.num_cached_blocks, tuple(candidates))


def _identity(worker: Worker) -> Identity:
    assert worker.identity is not None, "a serving worker has been met"
    return worker.identity


def _kind(worker: Worker) -> Kind:
    return _identity(worker).kind
