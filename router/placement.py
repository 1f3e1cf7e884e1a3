"""Which worker gets a request. Pure functions of what is known of the workers; equal costs go to the first address.

A decode worker costs how full it is, in sequences and in KV blocks, less a bonus for the share of the prompt that was
sent there before; one under pressure gets nothing new. A prefill worker costs the prompt tokens it would have to get
through, those it has cached not among them. Workers of different fingerprints never share a request.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from common.blocks import block_hashes, cache_seed
from router.workers import Cut, Identity, Worker

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


# Cost, address, worker, and how many blocks of the prefix were sent there before; compares by cost, then by address. A
# plain tuple: making a thousand of a class takes as long as all else.
Candidate = tuple[float, str, Worker, int]


class Choice(NamedTuple):
    """The worker that gets the request, and what it was chosen from."""

    worker: Worker
    num_cached_blocks: int
    considered: Sequence[Candidate]

    def __str__(self) -> str:
        costs = ", ".join(f"{address} costs {cost:.3f}" for cost, address, _, _ in self.considered)
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
    would do are under pressure, or would be with it. An idle worker always has room, and what it could bear, it is
    asked to.
    """
    usable = usable_workers(workers, demand.kind)
    if exclude:
        usable = [worker for worker in usable if worker not in exclude]
    usable = [worker for worker in usable if worker.kind in prefill_kinds] or usable
    cuts = _Cuts(demand, has_others=len(workers) > 1)
    candidates: list[Candidate] = []
    for worker in usable:
        num_blocks, hashes, first = cuts[worker.cut]
        num_cached = worker.prefixes.num_matching(hashes) if first in worker.prefixes.known else 0
        num_left = worker.num_free_blocks - num_blocks + num_cached
        if worker.num_seqs:
            if only_with_room and (num_left < 0 or not worker.has_place):
                continue
            if heed_pressure and 0 <= num_left < worker.num_spare_blocks:
                continue
        if heed_pressure and worker.is_pressed:
            continue
        bonus = AFFINITY * num_cached / num_blocks
        candidates.append((worker.fullness - bonus, worker.address, worker, num_cached))
    return _cheapest(candidates)


def choose_prefill(
    workers: Sequence[Worker], demand: Demand, *, kind: Kind, avoid: Collection[Worker] = ()
) -> Choice | None:
    """The prefill worker that would be done first; one of `avoid` only if there is no other. None: none is alive."""
    usable = usable_workers(workers, kind)
    if avoid:
        usable = [worker for worker in usable if worker not in avoid] or usable
    cuts = _Cuts(demand, has_others=len(workers) > 1)
    num_tokens = len(demand.token_ids)
    candidates: list[Candidate] = []
    for worker in usable:
        _, hashes, first = cuts[worker.cut]
        num_cached = worker.prefixes.num_matching(hashes) if first in worker.prefixes.known else 0
        num_to_compute = num_tokens - num_cached * worker.block_size if num_cached else num_tokens
        candidates.append((worker.num_waiting_tokens + num_to_compute, worker.address, worker, num_cached))
    return _cheapest(candidates)


def usable_workers(workers: Iterable[Worker], kind: Kind | None = None) -> list[Worker]:
    """Those that take new work, of one kind if it is given."""
    return [worker for worker in workers if worker.is_serving and (kind is None or worker.kind == kind)]


def remember(choice: Choice, demand: Demand) -> None:
    """The request goes to the chosen worker, which will have its prefix from then on."""
    if len(choice.considered) > 1:
        choice.worker.prefixes.add(demand.hashes(_identity(choice.worker)))


class _Cuts(dict[Cut, tuple[int, list[bytes], bytes | None]]):
    """For each way of cutting a prompt into blocks: how many a worker would reserve, their hashes, the first of those.

    Few workers know a prompt's first block, and asking them all for more takes longer than all else.
    """

    def __init__(self, demand: Demand, *, has_others: bool) -> None:
        """Hashing a long prompt takes a while, and an only worker gets every request anyway."""
        self._demand = demand
        self._has_others = has_others

    def __missing__(self, cut: Cut) -> tuple[int, list[bytes], bytes | None]:
        hashes = self._demand.hashes(cut) if self._has_others else []
        self[cut] = self._demand.num_blocks(cut), hashes, hashes[0] if hashes else None
        return self[cut]


def _cheapest(candidates: list[Candidate]) -> Choice | None:
    if not candidates:
        return None
    # No two have the same address.
    _, _, worker, num_cached = min(candidates)
    return Choice(worker, num_cached, candidates)


def _identity(worker: Worker) -> Identity:
    assert worker.identity is not None, "a serving worker has been met"
    return worker.identity
