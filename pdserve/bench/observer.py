"""Watches the process that measures: a client that has no time of its own measures itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

PROBE_S = 0.02


class Observed(NamedTuple):
    """`lags_s`: how late the event loop came to timers. Shares are of one core: of the event loop's thread, and of the
    whole process, gRPC's own threads included."""

    lags_s: list[float]
    loop_share: float
    process_share: float


class Observer:
    """`observed` after `watching`."""

    def __init__(self) -> None:
        self.observed = Observed([], 0.0, 0.0)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        lags_s: list[float] = []
        probe = asyncio.create_task(_probe(lags_s))
        begun_s, loop_s, process_s = time.monotonic(), time.thread_time(), time.process_time()
        try:
            yield
        finally:
            probe.cancel()
            taken_s = max(time.monotonic() - begun_s, 1e-9)
            loop_share = (time.thread_time() - loop_s) / taken_s
            self.observed = Observed(lags_s, loop_share, (time.process_time() - process_s) / taken_s)


async def _probe(lags_s: list[float]) -> None:
    while True:
        due_s = time.monotonic() + PROBE_S
        await asyncio.sleep(PROBE_S)
        lags_s.append(time.monotonic() - due_s)
