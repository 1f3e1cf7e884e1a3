"""The workers of this router: who is watched, who joins and leaves, and what they offer together.

Who may be anywhere is what the directories say, and who answers stays known although no name leads there any more. So
a worker leaves when nobody names it and it is unreachable, or when this router is to watch others; and not before the
last request of this router has left it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import NamedTuple

from common.clock import Clock, monotonic
from common.errors import PdserveError
from common.tls import Tls
from pdserve.v1 import decode_pb2_grpc, prefill_pb2_grpc
from router.directory import Directory, LookUp, look_up
from router.failures import DRAINING, HANDED_OVER
from router.placement import usable_workers
from router.ranking import Ranking
from router.subset import SubsetSize, subset
from router.watch import Watch
from router.workers import Kind, Role, Worker, WorkerState

log = logging.getLogger(__name__)

# How much longer than a silence a step counter may stand still.
WEDGED_HEARTBEATS = 5
# Load messages that come at most, from all workers together; each costs this process about 200 µs.
MAX_MESSAGES_PER_S = 1000


class ServedModel(NamedTuple):
    """What requests are held against: the least that any decode worker offers."""

    model_ids: frozenset[str]
    context_length: int
    vocab_size: int
    # Tokens that the roomiest decode worker can hold for one request.
    num_kv_tokens: int
    eos_token_ids: frozenset[int]
    fingerprints: tuple[str, ...]
    protocol_version: int


class Fleet:
    """A context manager: watches the workers and holds the channels meanwhile."""

    def __init__(
        self,
        prefill: Iterable[str],
        decode: Iterable[str],
        *,
        name: str,
        min_watched: int,
        heartbeat_timeout_s: float,
        resolve_s: float,
        on_change: Callable[[], None],
        look_up: LookUp = look_up,
        tls: Tls | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """`prefill` and `decode` are targets, HOST:PORT each; `name` is this router's. `on_change` is called whenever a
        worker's state or load has changed, or a worker has joined or left."""
        self._name = name
        self._sizes = {role: SubsetSize(min_watched) for role in Role}
        self.heartbeat_timeout_s = heartbeat_timeout_s
        self._wedged_after_s = WEDGED_HEARTBEATS * heartbeat_timeout_s
        self._resolve_s = resolve_s
        # Kinds of model for which a prefill worker takes new work.
        self.prefill_kinds: frozenset[Kind] = frozenset()
        self._was_degraded = False
        self._on_change = on_change
        self._tls = tls
        self._clock = clock
        self._directories = {Role.PREFILL: Directory(prefill, look_up), Role.DECODE: Directory(decode, look_up)}
        # By address.
        self._members: dict[Role, dict[str, Worker]] = {Role.PREFILL: {}, Role.DECODE: {}}
        # What placement chooses from.
        self.ranking = {role: Ranking() for role in Role}
        self._watches: dict[Worker, Watch] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Fleet:
        self._update()
        self._membership = asyncio.create_task(self._follow_names(), name="membership")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._membership.cancel()
        await asyncio.gather(self._membership, return_exceptions=True)
        await asyncio.gather(*self._closing, *(watch.close() for watch in self._watches.values()))

    @property
    def prefill(self) -> list[Worker]:
        return self.members(Role.PREFILL)

    @property
    def decode(self) -> list[Worker]:
        return self.members(Role.DECODE)

    def members(self, role: Role) -> list[Worker]:
        return list(self._members[role].values())

    @property
    def workers(self) -> list[Worker]:
        return [*self.prefill, *self.decode]

    @property
    def has_met_all(self) -> bool:
        """Every name leads somewhere, and everybody who is watched has told who it is."""
        if any(directory.unknown_names for directory in self._directories.values()):
            return False
        return all(worker.identity for worker in self.workers)

    @property
    def unknown_decode_names(self) -> list[str]:
        """Names of decode workers that lead nowhere."""
        return self._directories[Role.DECODE].unknown_names

    def num_workers(self, role: Role, state: WorkerState) -> int:
        return sum(worker.role is role and worker.state is state for worker in self.workers)

    @property
    def can_serve(self) -> bool:
        """A decode worker takes new work; it can prefill locally when nobody else does."""
        return any(worker.is_serving for worker in self._members[Role.DECODE].values())

    @property
    def is_degraded(self) -> bool:
        """No decode worker that takes new work has a living prefill worker of its kind, so they prefill locally."""
        return self.can_serve and not any(one.kind in self.prefill_kinds for one in usable_workers(self.decode))

    @property
    def model(self) -> ServedModel | None:
        """Of the decode workers that serve, else of those that did; None before any was met."""
        met = [worker for worker in self.decode if worker.identity]
        identities = [worker.identity for worker in (usable_workers(met) or met) if worker.identity]
        if not identities:
            return None
        return ServedModel(
            model_ids=frozenset(identity.model_id for identity in identities),
            context_length=min(identity.context_length for identity in identities),
            vocab_size=min(identity.vocab_size for identity in identities),
            num_kv_tokens=max(identity.num_total_tokens for identity in identities),
            eos_token_ids=frozenset(token_id for identity in identities for token_id in identity.eos_token_ids),
            fingerprints=tuple(dict.fromkeys(identity.model_fingerprint for identity in identities)),
            protocol_version=identities[0].protocol_version,
        )

    def decode_stub(self, worker: Worker) -> decode_pb2_grpc.DecodeServiceStub:
        """Of a worker that has a request of this router."""
        return self._watches[worker].decode

    def prefill_stub(self, worker: Worker) -> prefill_pb2_grpc.PrefillServiceStub:
        """Of a worker that has a request of this router."""
        return self._watches[worker].prefill

    def heed(self, worker: Worker, error: PdserveError) -> None:
        """A call to `worker` ended so. That it leaves service may be heard from this before its load stream says so."""
        if error.reason in (DRAINING, HANDED_OVER):
            with self._noting(worker):
                worker.drain()

    async def _follow_names(self) -> None:
        while True:
            await asyncio.gather(*(directory.refresh() for directory in self._directories.values()))
            self._update()
            await asyncio.sleep(self._resolve_s)

    def _update(self) -> None:
        """Lets in who is new, and out whom nothing keeps here."""
        watched = {role: self._to_watch(role) for role in Role}
        min_interval_s = sum(map(len, watched.values())) / MAX_MESSAGES_PER_S
        for role, addresses in watched.items():
            members = self._members[role]
            for address in addresses:
                if address not in members:
                    self._join(Worker(role, address, wedged_after_s=self._wedged_after_s), min_interval_s)
            kept = set(addresses)
            for worker in list(members.values()):
                worker.set_leaving(worker.address not in kept)
                if worker.is_leaving and not worker.has_requests:
                    self._leave(worker)
        self._note_states()
        self._on_change()

    def _to_watch(self, role: Role) -> list[str]:
        """Of who is named, and who answers although it is not, those that this router is to watch."""
        members = self._members[role].values()
        answering = [worker for worker in members if worker.state is not WorkerState.UNREACHABLE]
        known = dict.fromkeys([*self._directories[role].addresses, *(worker.address for worker in answering)])
        size = self._sizes[role]
        size.adjust(len(known), [worker.num_watchers for worker in answering])
        return subset(known, of=self._name, size=size.size)

    def _join(self, worker: Worker, min_interval_s: float) -> None:
        worker.on_room = self._on_change
        self.ranking[worker.role].add(worker)
        self._members[worker.role][worker.address] = worker
        self._watches[worker] = Watch(
            worker,
            heartbeat_timeout_s=self.heartbeat_timeout_s,
            min_interval_s=min_interval_s,
            tls=self._tls,
            clock=self._clock,
            noting=self._noting,
        )

    def _leave(self, worker: Worker) -> None:
        log.info("worker has left", extra=_about(worker))
        self.ranking[worker.role].remove(worker)
        del self._members[worker.role][worker.address]
        closing = asyncio.create_task(self._watches.pop(worker).close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    @contextlib.contextmanager
    def _noting(self, worker: Worker) -> Iterator[None]:
        """Around a change: tells of it in the log when it is one of state, and to whoever places requests."""
        before = worker.state, worker.reason, worker.identity
        yield
        if (worker.state, worker.reason, worker.identity) != before:
            level = logging.WARNING if worker.state is WorkerState.UNREACHABLE else logging.INFO
            why = worker.reason and f": {worker.reason}"
            log.log(level, "worker is %s%s", worker.state.value, why, extra=_about(worker))
            self._note_states()
        self._on_change()

    def _note_states(self) -> None:
        """Somebody joined, left, or is in another state."""
        kinds = (worker.kind for worker in usable_workers(self.prefill))
        self.prefill_kinds = frozenset(kind for kind in kinds if kind is not None)
        if self.is_degraded is self._was_degraded:
            return
        self._was_degraded = not self._was_degraded
        if self._was_degraded:
            log.warning("no prefill worker is alive that decode workers could use: they prefill locally")
        else:
            log.info("decode workers no longer prefill locally")


def _about(worker: Worker) -> dict[str, str]:
    return {"worker": worker.address, "role": worker.role.value, "instance_id": worker.instance_id}
