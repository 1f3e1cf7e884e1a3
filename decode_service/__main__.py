"""`python -m decode_service`: one decode worker."""

from __future__ import annotations

import asyncio
import sys

from common.config import DecodeConfig
from common.engine.setup import build
from common.service import main, serve
from common.tracing import Tracer, tracing
from decode_service.worker import DecodeWorker

SERVICES = ("pdserve.v1.DecodeService", "pdserve.v1.WorkerService")


async def run(config: DecodeConfig) -> None:
    """Serves until told to stop."""
    with tracing(config) as tracer:
        await _serve(config, tracer)


async def _serve(config: DecodeConfig, tracer: Tracer) -> None:
    parts = await asyncio.to_thread(build, config)
    worker = DecodeWorker(config, parts, tracer=tracer)
    await asyncio.to_thread(worker.prepare)
    worker.start()
    try:
        await serve(
            config, worker.add_to, SERVICES, health=worker.health, metrics=worker.metrics, drain=worker.front.drain
        )
    finally:
        await worker.stop()
    if worker.front.crashed:
        sys.exit(1)


if __name__ == "__main__":
    main(DecodeConfig, run)
