"""One decode worker, assembled: engine, pairs, servicers."""

from __future__ import annotations

import asyncio

import grpc.aio

from common.clock import monotonic
from common.config import DecodeConfig
from common.engine.setup import WorkerParts
from common.health import Health
from common.metrics import DecodeMetrics
from common.worker import WorkerFront
from decode_service.engine import DecodeEngine
from decode_service.pairs import PairServer
from decode_service.pipeline import Mode, PipelineScheduler
from decode_service.scheduler import DecodeScheduler
from decode_service.servicer import DecodeServicer, EventRouter
from pdserve.v1 import decode_pb2_grpc, worker_pb2_grpc


class DecodeWorker:
    """Made and used inside the event loop; the engine runs from `start` to `stop`."""

    def __init__(self, config: DecodeConfig, parts: WorkerParts) -> None:
        self.health = Health()
        self.metrics = DecodeMetrics()
        self.front = WorkerFront(parts.identity, self.health, self.metrics, clock=monotonic, drain_s=config.drain_s)
        events = EventRouter()
        self.engine = DecodeEngine(
            DecodeScheduler(
                parts.pool,
                parts.prefix,
                max_num_seqs=config.max_num_seqs,
                max_batch_tokens=config.max_batch_tokens,
                max_waiting=config.max_waiting_requests,
                reservation_wait_s=config.reservation_wait_s,
                clock=monotonic,
            ),
            parts.prefiller,
            PipelineScheduler(
                parts.model,
                parts.cache,
                mode=Mode(config.decode_pipeline),
                attention_sm=config.decode_attention_sm,
                ffn_sm=config.decode_ffn_sm,
                profiling=config.decode_pipeline_profiling,
            ),
            parts.cache,
            config=parts.model.config,
            context_length=parts.identity.context_length,
            stream_interval_s=config.stream_interval_ms / 1e3,
            clock=monotonic,
            metrics=self.metrics,
            on_events=events.on_events,
            on_load=self.front.set_load,
            on_crash=self.front.engine_crashed,
        )
        self.pairs = PairServer(parts.pair_identity, self.engine, config)
        self.engine.on_gone = self.pairs.reservation_gone
        self.engine.transport_of = self.pairs.transport_of
        self.front.num_pairs = lambda: self.pairs.num_pairs
        self.metrics.reservations.set_function(lambda: self.front.load.num_reserved)
        self.metrics.pipeline_active.set_function(lambda: self.engine.pipeline.stats().active)
        self._servicer = DecodeServicer(
            self.engine, events, self.pairs, self.front, pair_endpoint=config.pair_endpoint, clock=monotonic
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self._servicer, server)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self.front, server)

    def start(self) -> None:
        """Starts the engine and becomes ready."""
        self.engine.start()
        self._liveness = asyncio.create_task(self.front.watch_liveness())
        self.health.set_ready(True)

    async def stop(self) -> None:
        self._liveness.cancel()
        await self.pairs.close()
        await asyncio.to_thread(self.engine.stop)
