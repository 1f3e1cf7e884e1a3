"""`python -m prefill_service`: one prefill worker."""

from __future__ import annotations

import asyncio
import sys

from common.config import PrefillConfig
from common.engine.setup import build
from common.service import main, serve
from common.tracing import Tracer, tracing
from prefill_service.worker import PrefillWorker

SERVICES = ("pdserve.v1.PrefillService", "pdserve.v1.WorkerService")


async def run(config: PrefillConfig) -> None:
    """Serves until told to stop."""
    with tracing(config) as tracer:
        await _serve(config, tracer)


async def _serve(config: PrefillConfig, tracer: Tracer) -> None:
    parts = await asyncio.to_thread(build, config)
    worker = PrefillWorker(config, parts, tracer=tracer)
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
    main(PrefillConfig, run)
