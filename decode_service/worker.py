"""One decode worker, assembled: engine, pairs, servicers."""

from __future__ import annotations

import asyncio
import math

import grpc.aio

from common.clock import monotonic
from common.config import DecodeConfig
from common.engine.preparation import has_plain_kernels
from common.engine.setup import WorkerParts
from common.health import Health
from common.metrics import DecodeMetrics
from common.tracing import OFF, Tracer
from common.worker import WorkerFront
from decode_service.assembly import make_engine, prepare
from decode_service.pairs import PairServer
from decode_service.pressure import Pressure, PressurePolicy
from decode_service.servicer import DecodeServicer, EventRouter
from pdserve.v1 import decode_pb2_grpc, worker_pb2_grpc


class DecodeWorker:
    """Made and used inside the event loop; the engine runs from `start` to `stop`."""

    def __init__(self, config: DecodeConfig, parts: WorkerParts, *, tracer: Tracer = OFF) -> None:
        self._config = config
        self._parts = parts
        self.health = Health()
        self.metrics = DecodeMetrics()
        parts.identity.num_spare_blocks = math.ceil(config.pressure_enter_free_share * parts.identity.num_total_blocks)
        self.front = WorkerFront(parts.identity, self.health, self.metrics, clock=monotonic, drain_s=config.drain_s)
        policy = PressurePolicy(config, num_blocks=parts.identity.num_total_blocks, clock=monotonic)
        pressure = Pressure(policy, self.metrics, clock=monotonic)
        events = EventRouter()
        self.engine = make_engine(
            config,
            parts,
            metrics=self.metrics,
            on_events=events.on_events,
            on_load=lambda load: self.front.set_load(pressure.told_with(load)),
            on_crash=self.front.engine_crashed,
        )
        self.pairs = PairServer(parts.pair_identity, self.engine, config, transports=parts.transports)
        self.engine.on_gone = self.pairs.reservation_gone
        self.engine.transport_of = self.pairs.transport_of
        self.front.num_pairs = lambda: self.pairs.num_pairs
        self.metrics.reservations.set_function(lambda: self.front.load.num_reserved)
        self.metrics.pipeline.stats = self.engine.pipeline.stats
        self._servicer = DecodeServicer(
            self.engine,
            events,
            self.pairs,
            self.front,
            pair_endpoint=config.pair_endpoint,
            tracer=tracer,
            clock=monotonic,
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self._servicer, server)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self.front, server)

    def prepare(self) -> None:
        """What takes seconds before `start`; belongs to no event loop."""
        prepare(self._config, self._parts, self.engine)
        self.metrics.plain_kernels.set(has_plain_kernels(self._parts))

    def start(self) -> None:
        """Starts the engine and becomes ready."""
        self.engine.start()
        self._liveness = asyncio.create_task(self.front.watch_liveness())
        self.health.set_ready(True)

    async def stop(self) -> None:
        self._liveness.cancel()
        await self.pairs.close()
        await asyncio.to_thread(self.engine.stop)
