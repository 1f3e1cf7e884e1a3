"""How soon the blocks of a request that its client leaves are free, on both sides."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import grpc.aio

from benchmarks.soak_clients import DEADLINE_S, Door
from common import rpc
from pdserve.v1 import router_pb2, worker_pb2, worker_pb2_grpc
from tests.support.processes import Service

# In half of them the client leaves as soon as anybody holds a block, in half once tokens come.
NUM_LEFT = 20
NUM_PROMPT_TOKENS = 600


class Loads:
    """What the workers tell, who tell it at once when something begins or ends."""

    def __init__(self) -> None:
        self._is_free: dict[str, bool] = {}
        self._changed = asyncio.Condition()

    async def follow(self, worker: Service) -> None:
        async with rpc.connect(worker.address) as channel:
            num_total = 0
            async for load in worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(worker_pb2.WatchLoadRequest()):
                num_total = load.identity.num_total_blocks or num_total
                async with self._changed:
                    num_held = num_total - load.num_free_blocks
                    self._is_free[worker.address] = not (num_held or load.num_running or load.num_waiting)
                    self._changed.notify_all()

    async def until(self, workers: Sequence[Service], *, free: bool) -> None:
        """All of them are free, or one of them is not."""
        test = all if free else lambda seen: not all(seen)
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(
                lambda: (
                    all(one.address in self._is_free for one in workers)
                    and test([self._is_free[one.address] for one in workers])
                )
            )


@contextlib.asynccontextmanager
async def _followed(workers: Sequence[Service]) -> AsyncIterator[Loads]:
    loads = Loads()
    following = [asyncio.create_task(loads.follow(worker)) for worker in workers]
    try:
        yield loads
    finally:
        for one in following:
            one.cancel()
        await asyncio.gather(*following, return_exceptions=True)


class Freed(NamedTuple):
    """`taken_ms` of each request: from its client's leaving until all workers tell that they hold nothing.

    `chunk_ms`: from asking to the first token, median. Most of it is the one chunk of the prompt; leaving acts between
    chunks.
    """

    taken_ms: list[float]
    chunk_ms: float


async def freed(door: Door, workers: Sequence[Service]) -> Freed:
    """Nobody else asks meanwhile."""
    draw, taken_ms, first_ms = random.Random(0), list[float](), list[float]()
    async with _followed(workers) as loads:
        for number in range(NUM_LEFT):
            await loads.until(workers, free=True)
            begun_s = time.monotonic()
            call = door.stub.Generate(_request(draw), timeout=DEADLINE_S)
            if number % 2:
                await call.read()
                first_ms.append((time.monotonic() - begun_s) * 1e3)
            await loads.until(workers, free=False)
            left_s = time.monotonic()
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await call.read()
            await loads.until(workers, free=True)
            taken_ms.append((time.monotonic() - left_s) * 1e3)
    return Freed(taken_ms, statistics.median(first_ms))


def _request(draw: random.Random) -> router_pb2.GenerateRequest:
    message = router_pb2.GenerateRequest()
    message.prompt_token_ids.ids.extend(draw.randrange(3, 2048) for _ in range(NUM_PROMPT_TOKENS))
    message.stopping.max_tokens = 1000
    message.stopping.ignore_eos = True
    return message
