"""The front end that both kinds of worker share: identity, load, liveness, and the way out of service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator

import grpc.aio

from common.clock import Clock
from common.errors import Internal, InvalidArgument, PdserveError, Unavailable
from common.health import Health
from common.load import Load
from common.metrics import WorkerMetrics, totals
from common.wire import pressure_to_proto
from pdserve.v1 import types_pb2, worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
# Load that changes fast is told at most this often, or as seldom as a watcher asks for.
MIN_INTERVAL_S = 0.02
# A step counter that stands still this long with work waiting makes the worker not live.
WEDGED_S = 10.0

Evict = Callable[[PdserveError], None]


def new_boot_id() -> str:
    """Tells this start of the process from every other."""
    return uuid.uuid4().hex


def told_every_s(request: worker_pb2.WatchLoadRequest) -> float:
    """How often load that changes fast is told to this watcher. Raises InvalidArgument."""
    _check_time("min_interval_s", request.min_interval_s)
    return min(max(request.min_interval_s, MIN_INTERVAL_S), HEARTBEAT_S)


def _check_time(field: str, seconds: float) -> None:
    """NaN would get into the event loop's heap of timers, and nothing there would be in order any more."""
    if not 0 <= seconds < math.inf:
        raise InvalidArgument(f"{field} must be finite and at least 0, got {seconds}", field=field)


class WorkerFront(worker_pb2_grpc.WorkerServiceServicer):
    """WorkerService, and the book of calls in flight. Belongs to the event loop, but for `set_load`."""

    def __init__(
        self,
        identity: worker_pb2.WorkerIdentity,
        health: Health,
        metrics: WorkerMetrics,
        *,
        clock: Clock,
        drain_s: float,
    ) -> None:
        self.identity = identity
        self.draining = False
        # The engine died; the process has to end with a failure.
        self.crashed = False
        self._health = health
        self._clock = clock
        self._drain_s = drain_s
        self._loop = asyncio.get_running_loop()
        self._load = Load()
        self._told = Load()
        self._load_changed = asyncio.Event()
        self._metrics = metrics
        self._calls: dict[object, Evict] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._drained: asyncio.Task[None] | None = None
        # The newest step that was looked at, and when it was new.
        self._seen_step = -1
        self._progressed_s = clock()
        # Live pairs, read whenever load is told.
        self.num_pairs: Callable[[], int] = lambda: 0
        # Load streams that are open.
        self.num_watchers = 0
        role = "decode" if identity.role == types_pb2.ROLE_DECODE else "prefill"
        metrics.info.labels(role, identity.instance_id, identity.model_fingerprint).set(1)
        metrics.running.set_function(lambda: self._load.num_running)
        metrics.waiting.set_function(lambda: self._load.num_waiting)
        metrics.free_blocks.set_function(lambda: self._load.num_free_blocks)
        metrics.cached_blocks.set_function(lambda: self._load.num_cached_blocks)
        metrics.total_blocks.set(identity.num_total_blocks)
        metrics.pairs.set_function(lambda: self.num_pairs())
        metrics.watchers.set_function(lambda: self.num_watchers)

    @property
    def load(self) -> Load:
        return self._load

    def set_load(self, load: Load) -> None:
        """Called by the engine after each turn, from its own thread."""
        self._load = load
        if load.differs_much_from(self._told):
            self._told = load
            self._loop.call_soon_threadsafe(self._wake_watchers)

    def engine_crashed(self, error: BaseException) -> None:
        """Called by the engine thread when it dies: every call ends, and so does the process, since an engine that
        failed in the middle of a step cannot be trusted with its state. Its supervisor starts it anew."""
        self._loop.call_soon_threadsafe(self._crash, f"the engine died: {type(error).__name__}: {error}")

    @contextlib.contextmanager
    def call(self, evict: Evict) -> Iterator[None]:
        """Around a call that a drain has to wait for; `evict` ends it when the drain's time is up.

        Raises:
            Unavailable: the worker is draining.
        """
        if self.draining:
            raise Unavailable(f"{self.identity.instance_id} is draining", reason="DRAINING")
        token = object()
        self._calls[token] = evict
        self._idle.clear()
        code = "OK"
        try:
            yield
        except PdserveError as error:
            code = error.code.name
            self._metrics.aborts.labels(cause=error.reason).inc()
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            self._metrics.aborts.labels(cause=code).inc()
            raise
        finally:
            self._metrics.requests.labels(code=code).inc()
            del self._calls[token]
            if not self._calls:
                self._idle.set()

    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        interval_s = told_every_s(request)
        self.num_watchers += 1
        try:
            identity: worker_pb2.WorkerIdentity | None = self.identity
            while True:
                # Before the message is made: what changes while the watcher is left in peace is told right afterwards.
                changed = self._load_changed
                yield self._load_message(identity)
                identity = None
                await asyncio.sleep(interval_s)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_S - interval_s)
        finally:
            self.num_watchers -= 1

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.DrainResponse]:
        _check_time("deadline_s", request.deadline_s)
        drained = self.start_drain(request.deadline_s if request.HasField("deadline_s") else None)
        while not drained.done():
            yield worker_pb2.DrainResponse(num_remaining=len(self._calls))
            await asyncio.wait([drained], timeout=HEARTBEAT_S)
        yield worker_pb2.DrainResponse(num_remaining=len(self._calls), done=True)

    def start_drain(self, deadline_s: float | None = None) -> asyncio.Task[None]:
        """Begins to drain, or joins the drain under way. The task ends when no call is left."""
        if self._drained is None:
            self.draining = True
            self._health.set_ready(False)
            self._wake_watchers()
            self._drained = asyncio.create_task(self._drain(self._drain_s if deadline_s is None else deadline_s))
        return self._drained

    async def drain(self) -> None:
        """Drains within the configured time."""
        await self.start_drain()

    async def watch_liveness(self) -> None:
        """Runs for the life of the process."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.check_progress()

    def check_progress(self) -> None:
        """`liveness` follows the step counter, as far as it has come since the last time."""
        if self._load.step_counter != self._seen_step:
            self._seen_step, self._progressed_s = self._load.step_counter, self._clock()
        self._health.set_live(self._clock() - self._progressed_s < WEDGED_S)

    async def _drain(self, deadline_s: float) -> None:
        log.info("draining %d calls for at most %g s", len(self._calls), deadline_s)
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        except TimeoutError:
            log.warning("drain deadline passed: handing over %d calls", len(self._calls))
            for evict in list(self._calls.values()):
                evict(Unavailable(f"{self.identity.instance_id} was drained before this ended", reason="HANDED_OVER"))
            await self._idle.wait()

    def _crash(self, message: str) -> None:
        self.crashed = True
        self._health.set_live(False)
        for evict in list(self._calls.values()):
            evict(Internal(message))
        os.kill(os.getpid(), signal.SIGTERM)

    def _wake_watchers(self) -> None:
        self._load_changed.set()
        self._load_changed = asyncio.Event()

    def _load_message(self, identity: worker_pb2.WorkerIdentity | None) -> worker_pb2.WatchLoadResponse:
        load = self._load
        state = types_pb2.WORKER_STATE_DRAINING if self.draining else types_pb2.WORKER_STATE_SERVING
        fields = {**load._asdict(), "pressure": pressure_to_proto(load.pressure)}
        return worker_pb2.WatchLoadResponse(
            identity=identity,
            state=state,
            num_pairs=self.num_pairs(),
            num_watchers=self.num_watchers,
            num_output_tokens=totals(self._metrics.output_tokens)[()],
            num_prompt_tokens=totals(self._metrics.computed_tokens)[()],
            **fields,
        )
