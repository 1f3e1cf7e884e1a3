"""Keeps the picture of the workers true: one `WatchLoad` stream to each, redone for as long as the router lives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import NamedTuple

import grpc.aio

from common import rpc
from common.clock import Clock, monotonic
from common.load import Load
from common.wire import pressure_from_proto
from pdserve.v1 import decode_pb2_grpc, prefill_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from router.placement import Kind, usable_workers
from router.workers import Identity, Role, Worker, WorkerState

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 1.0
# How much longer than a silence a step counter may stand still.
WEDGED_HEARTBEATS = 5

_ROLE_NUMBERS = {Role.PREFILL: types_pb2.ROLE_PREFILL, Role.DECODE: types_pb2.ROLE_DECODE}


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
    """Every worker that was configured. A context manager: watches the workers and holds the channels meanwhile."""

    def __init__(
        self,
        prefill: Iterable[str],
        decode: Iterable[str],
        *,
        heartbeat_timeout_s: float,
        on_change: Callable[[], None],
        clock: Clock = monotonic,
    ) -> None:
        """`on_change` is called whenever a worker's state or load has changed."""
        wedged_after_s = WEDGED_HEARTBEATS * heartbeat_timeout_s
        self.prefill = [Worker(Role.PREFILL, address, wedged_after_s=wedged_after_s) for address in prefill]
        self.decode = [Worker(Role.DECODE, address, wedged_after_s=wedged_after_s) for address in decode]
        self.heartbeat_timeout_s = heartbeat_timeout_s
        self._on_change = on_change
        for worker in self.workers:
            worker.on_room = on_change
        self._clock = clock
        self._channels: dict[Worker, grpc.aio.Channel] = {}
        self._decode_stubs: dict[Worker, decode_pb2_grpc.DecodeServiceStub] = {}
        self._prefill_stubs: dict[Worker, prefill_pb2_grpc.PrefillServiceStub] = {}
        self._watches: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Fleet:
        for worker in self.workers:
            channel = self._channels[worker] = rpc.connect(worker.address)
            if worker.role is Role.DECODE:
                self._decode_stubs[worker] = decode_pb2_grpc.DecodeServiceStub(channel)
            else:
                self._prefill_stubs[worker] = prefill_pb2_grpc.PrefillServiceStub(channel)
            self._watches.append(asyncio.create_task(self._watch(worker), name=f"watch {worker}"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()

    @property
    def workers(self) -> list[Worker]:
        return [*self.prefill, *self.decode]

    def num_workers(self, role: Role, state: WorkerState) -> int:
        return sum(worker.role is role and worker.state is state for worker in self.workers)

    @property
    def can_serve(self) -> bool:
        """A decode worker takes new work; it can prefill locally when nobody else does."""
        return any(worker.is_serving for worker in self.decode)

    @property
    def is_degraded(self) -> bool:
        """No prefill worker is alive, so decode workers prefill locally."""
        return self.can_serve and not any(worker.is_serving for worker in self.prefill)

    @property
    def prefill_kinds(self) -> frozenset[Kind]:
        """Kinds of model for which a prefill worker takes new work."""
        return frozenset(worker.identity.kind for worker in usable_workers(self.prefill) if worker.identity)

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
        return self._decode_stubs[worker]

    def prefill_stub(self, worker: Worker) -> prefill_pb2_grpc.PrefillServiceStub:
        return self._prefill_stubs[worker]

    async def _watch(self, worker: Worker) -> None:
        stub = worker_pb2_grpc.WorkerServiceStub(self._channels[worker])
        retry_s = FIRST_RETRY_S
        while True:
            generation = worker.generation
            reason = await self._follow(worker, stub)
            with self._noting(worker):
                worker.lose(reason)
            retry_s = FIRST_RETRY_S if worker.generation > generation else min(2 * retry_s, LAST_RETRY_S)
            await asyncio.sleep(retry_s)

    async def _follow(self, worker: Worker, stub: worker_pb2_grpc.WorkerServiceStub) -> str:
        """Reads one load stream to its end, and says why it ended."""
        call = stub.WatchLoad(worker_pb2.WatchLoadRequest())
        try:
            while True:
                async with asyncio.timeout(self.heartbeat_timeout_s):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    return "it ended its load stream"
                if message.HasField("identity"):
                    if message.identity.role != _ROLE_NUMBERS[worker.role]:
                        return f"it is {types_pb2.Role.Name(message.identity.role)}, configured as {worker.role.value}"
                    worker.meet(_identity(message.identity), self._clock())
                elif worker.identity is None:
                    return "it did not say who it is"
                with self._noting(worker):
                    self._hear(worker, message)
        except TimeoutError:
            return f"nothing was heard of it for {self.heartbeat_timeout_s:g} s"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return "it cancelled its load stream"
        finally:
            call.cancel()

    def _hear(self, worker: Worker, message: worker_pb2.WatchLoadResponse) -> None:
        serves = message.state == types_pb2.WORKER_STATE_SERVING
        state = WorkerState.SERVING if serves else WorkerState.DRAINING
        load = Load(**{name: getattr(message, name) for name in Load._fields})
        load = load._replace(pressure=pressure_from_proto(message.pressure))
        worker.hear(state, load, message.num_pairs, self._clock())

    @contextlib.contextmanager
    def _noting(self, worker: Worker) -> Iterator[None]:
        """Around a change: tells of it in the log when it is one of state, and to whoever places requests."""
        before, was_degraded = (worker.state, worker.reason), self.is_degraded
        yield
        if (worker.state, worker.reason) != before:
            level = logging.WARNING if worker.state is WorkerState.UNREACHABLE else logging.INFO
            fields = {"worker": worker.address, "role": worker.role.value, "instance_id": worker.instance_id}
            log.log(level, "worker is %s%s", worker.state.value, worker.reason and f": {worker.reason}", extra=fields)
        if self.is_degraded and not was_degraded:
            log.warning("no prefill worker is alive: decode workers prefill locally")
        elif was_degraded and not self.is_degraded:
            log.info("decode workers no longer prefill locally")
        self._on_change()


def _identity(message: worker_pb2.WorkerIdentity) -> Identity:
    fields = {name: getattr(message, name) for name in Identity._fields if name != "eos_token_ids"}
    return Identity(**fields, eos_token_ids=tuple(message.eos_token_ids))
