"""One prefill worker, assembled: engine, pairs, servicers."""

from __future__ import annotations

import asyncio

import grpc.aio

from common.clock import monotonic
from common.config import PrefillConfig
from common.engine.preparation import has_plain_kernels, prepare_prefill, preparing
from common.engine.setup import WorkerParts
from common.health import Health
from common.metrics import PrefillMetrics
from common.tracing import OFF, Tracer
from common.worker import WorkerFront
from pdserve.v1 import prefill_pb2_grpc, worker_pb2_grpc
from prefill_service.engine import PrefillEngine
from prefill_service.pairs import PairRegistry
from prefill_service.scheduler import PrefillScheduler
from prefill_service.servicer import PrefillServicer


class PrefillWorker:
    """Made and used inside the event loop; the engine runs from `start` to `stop`."""

    def __init__(self, config: PrefillConfig, parts: WorkerParts, *, tracer: Tracer = OFF) -> None:
        self._config = config
        self._parts = parts
        self.health = Health()
        self.metrics = PrefillMetrics()
        self.front = WorkerFront(parts.identity, self.health, self.metrics, clock=monotonic, drain_s=config.drain_s)
        self.engine = PrefillEngine(
            PrefillScheduler(
                parts.pool,
                parts.prefix,
                max_batch_tokens=config.max_batch_tokens,
                max_num_seqs=config.max_num_seqs,
                max_waiting=config.max_waiting_requests,
                clock=monotonic,
            ),
            parts.prefiller,
            clock=monotonic,
            metrics=self.metrics,
            on_load=self.front.set_load,
            on_crash=self.front.engine_crashed,
        )
        self.pairs = PairRegistry(parts.pair_identity, parts.cache, config, transports=parts.transports)
        self.front.num_pairs = lambda: self.pairs.num_pairs
        self._servicer = PrefillServicer(
            self.engine,
            self.pairs,
            self.front,
            block_size=config.block_size,
            pair_connect_s=config.pair_connect_s,
            tracer=tracer,
            clock=monotonic,
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self._servicer, server)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self.front, server)

    def prepare(self) -> None:
        """What takes seconds before `start`; belongs to no event loop."""
        with preparing(self._parts.device):
            prepare_prefill(self._config, self._parts)
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
