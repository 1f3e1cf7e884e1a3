"""Watches routers, and the decode workers that they name; what is gone is asked for again until it is back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from common.clock import Clock, monotonic
from common.errors import PdserveError
from pdserve.access import Access
from pdserve.client import AsyncClient
from pdserve.results import PipelineStats, Workers
from pdserve.top.cluster import Cluster, View
from pdserve.top.watch import Watch
from pdserve.worker_client import WorkerClient

# A call takes no longer than this, so that a frozen service shows as one.
CALL_TIMEOUT_S = 2.0


class Watching:
    """`running` asks all of them every `interval_s`; `view` is what they have told so far."""

    def __init__(
        self, routers: Sequence[str], access: Access, *, interval_s: float, pipelines: bool, clock: Clock = monotonic
    ) -> None:
        self._access = access
        self._interval_s = interval_s
        self._with_pipelines = pipelines
        self._clock = clock
        self._cluster = Cluster(old_after_s=max(3 * interval_s, interval_s + CALL_TIMEOUT_S))
        self._clients = {address: AsyncClient(address, access=access, retries=0) for address in routers}
        self._routers = [self._router(address) for address in routers]
        self._pipelines: dict[str, tuple[Watch[PipelineStats], asyncio.Task[None]]] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Watching]:
        async with contextlib.AsyncExitStack() as stack:
            for client in self._clients.values():
                await stack.enter_async_context(client)
            tasks = [asyncio.create_task(watch.run()) for watch in self._routers]
            try:
                yield self
            finally:
                tasks += [task for _, task in self._pipelines.values()]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def view(self) -> View:
        watches = [watch for _, (watch, _) in sorted(self._pipelines.items())]
        return self._cluster.view(self._routers, watches, self._clock())

    async def told(self, num_times: int) -> None:
        """Returns once each router was asked so often, and each pipeline once, whether it answered or not."""
        for watch in self._routers:
            await watch.asked(num_times)
        for pipeline, _ in list(self._pipelines.values()):
            await pipeline.asked(1)

    @property
    def failure(self) -> PdserveError | None:
        """Why no router has ever answered; None if one has, or while it is not known."""
        if any(watch.answer for watch in self._routers):
            return None
        return next((watch.error for watch in self._routers if watch.error), None)

    def _router(self, address: str) -> Watch[Workers]:
        client = self._clients[address]

        def hear(told: Workers, at_s: float) -> None:
            self._cluster.hear(address, told, at_s)
            if self._with_pipelines:
                self._follow_pipelines()

        return self._watch(address, lambda: client.list_workers(timeout_s=CALL_TIMEOUT_S), hear)

    def _watch(self, address: str, ask: Any, on_answer: Any) -> Watch[Any]:
        return Watch(address, ask, interval_s=self._interval_s, clock=self._clock, on_answer=on_answer)

    def _follow_pipelines(self) -> None:
        """Of all decode workers that a router names at this time."""
        named = {
            worker.address
            for watch in self._routers
            if watch.answer
            for worker in watch.answer.workers
            if worker.role == "DECODE"
        }
        for address in self._pipelines.keys() - named:
            self._pipelines.pop(address)[1].cancel()
        for address in named - self._pipelines.keys():
            client = WorkerClient(address, access=self._access)
            ask = lambda client=client: client.get_pipeline_stats(timeout_s=CALL_TIMEOUT_S)  # noqa: E731
            watch: Watch[PipelineStats] = self._watch(address, ask, lambda answer, at_s: None)
            self._pipelines[address] = watch, asyncio.create_task(_within(client, watch))


async def _within(client: WorkerClient, watch: Watch[PipelineStats]) -> None:
    async with client:
        await watch.run()
