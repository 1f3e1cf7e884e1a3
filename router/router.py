"""One router: its parts, put together."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator
from functools import partial

import grpc.aio

from common.clock import Clock, monotonic
from common.config import ConfigError, RouterConfig
from common.errors import FailedPrecondition
from common.health import Health
from common.metrics import RouterMetrics
from common.tls import tls_of
from common.tokenization import Tokenizer
from common.tracing import OFF, Tracer
from pdserve.v1 import router_pb2_grpc
from router.directory import LookUp, look_up
from router.dispatcher import Dispatcher
from router.explanation import PlacementLog
from router.fleet import Fleet
from router.generation import Generations
from router.in_flight import InFlight
from router.local_prefill import LocalPrefill, Mode
from router.pacer import Pacer
from router.parts import Parts
from router.queue import RequestQueue
from router.servicer import RouterServicer
from router.workers import Role, WorkerState

log = logging.getLogger(__name__)


class Router:
    """Watches its workers while `running`; ready whenever a decode worker is."""

    def __init__(
        self,
        config: RouterConfig,
        tokenizer: Tokenizer | None,
        *,
        look_up: LookUp = look_up,
        tracer: Tracer = OFF,
        clock: Clock = monotonic,
    ) -> None:
        self.health = Health()
        self.metrics = RouterMetrics()
        self._is_stopping = False
        self._clock = clock
        self._startup_grace_s = config.startup_grace_s
        self._started_s = clock()
        self.fleet = Fleet(
            config.prefill,
            config.decode,
            name=config.instance_id,
            min_watched=config.min_watched,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            resolve_s=config.resolve_s,
            look_up=look_up,
            tls=tls_of(config),
            on_change=self._workers_changed,
            clock=clock,
        )
        self._queue = RequestQueue(
            max_requests=config.max_queue_requests, max_tokens=config.max_queue_tokens, clock=clock
        )
        placings = PlacementLog(self.fleet, clock)
        self._dispatcher = Dispatcher(
            self._queue, self.fleet, placings, self.metrics, clock, replace_wait_s=config.replace_wait_s
        )
        self._in_flight = InFlight(max_per_client=config.max_requests_per_client)
        self._drain_s = config.drain_s
        local_prefill = LocalPrefill(Mode(config.local_prefill), clock)
        self.parts = Parts(
            self.fleet, self._dispatcher, local_prefill, placings, Pacer(), tokenizer, self.metrics, tracer, clock
        )
        self.generations = Generations(config, self.parts, self._in_flight)
        self._servicer = RouterServicer(config, self.parts, self.generations)
        self._mirror_in_metrics()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watches the workers meanwhile."""
        async with self.fleet:
            end_of_grace = asyncio.get_running_loop().call_later(self._startup_grace_s, self._workers_changed)
            try:
                yield
            finally:
                end_of_grace.cancel()

    def add_to(self, server: grpc.aio.Server) -> None:
        router_pb2_grpc.add_RouterServiceServicer_to_server(self._servicer, server)

    async def drain(self) -> None:
        """Takes nothing new, and waits until every request has ended; after `drain_s` the rest is ended."""
        self._is_stopping = True
        self.health.set_ready(False)
        log.info("waiting for %d requests, for at most %g s", len(self._in_flight), self._drain_s)
        await self._in_flight.drain(self._drain_s)

    @property
    def _has_met_enough(self) -> bool:
        """Workers that start together with the router are waited for: without prefill it would begin degraded."""
        return self._clock() >= self._started_s + self._startup_grace_s or self.fleet.has_met_all

    def _workers_changed(self) -> None:
        is_ready = self.fleet.can_serve and self._has_met_enough and not self._is_stopping
        if is_ready is not self.health.is_ready:
            self.health.set_ready(is_ready)
        self._dispatcher.wake()

    def _mirror_in_metrics(self) -> None:
        self.metrics.queue_requests.set_function(lambda: len(self._queue))
        self.metrics.queue_tokens.set_function(lambda: self._queue.num_tokens)
        self.metrics.queue_clients.set_function(lambda: self._queue.num_clients)
        self.metrics.held_requests.set_function(lambda: self._dispatcher.num_held)
        self.metrics.replacing_requests.set_function(lambda: self._dispatcher.num_replacing)
        self.metrics.degraded.set_function(lambda: self.fleet.is_degraded)
        for role, state in itertools.product(Role, WorkerState):
            gauge = self.metrics.workers.labels(role=role.value, state=state.value)
            gauge.set_function(partial(self.fleet.num_workers, role, state))


async def load_tokenizer(folder: str) -> Tokenizer | None:
    """The tokenizer of a model folder; None, which is logged, when it has none. Raises ConfigError."""
    try:
        tokenizer = await asyncio.to_thread(Tokenizer.load, folder)
    except FailedPrecondition as error:
        raise ConfigError(f"model={folder!r}: {error.message}") from error
    if tokenizer is None:
        log.warning("%s has no tokenizer.json: only prompt_token_ids is accepted and no text is returned", folder)
    return tokenizer
