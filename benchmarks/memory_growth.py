"""Every process's memory after 200, 2,000 and 4,000 requests, and every block back."""

from __future__ import annotations

import asyncio
import random

import grpc.aio
import psutil

from benchmarks.report import Report
from common import rpc
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2
from tests.support.processes import Services, running_services

CONCURRENCY = 32
EARLY, LATE, LATER = 200, 2000, 4000


def resident_kib(services: Services) -> dict[str, float]:
    return {
        name: psutil.Process(getattr(services, name).process.pid).memory_info().rss / 1024
        for name in ("router", "prefill", "decode")
    }


async def load(address: str, first: int, last: int) -> None:
    """Requests of mixed lengths; one in ten is cancelled by its client."""
    channel = rpc.connect(address)
    stub = router_pb2_grpc.RouterServiceStub(channel)
    gate = asyncio.Semaphore(CONCURRENCY)

    async def complete(index: int) -> None:
        draw = random.Random(index)
        token_ids = [draw.randrange(3, 2000) for _ in range(draw.choice([4, 30, 150, 400]))]
        request = router_pb2.GenerateRequest(prompt_token_ids=types_pb2.TokenIds(ids=token_ids))
        request.stopping.max_tokens = draw.randrange(1, 40)
        async with gate:
            call = stub.Generate(request, timeout=120)
            await call.read()
            if index % 10 == 0:
                call.cancel()
                return
            while await call.read() is not grpc.aio.EOF:
                pass

    await asyncio.gather(*(complete(index) for index in range(first, last)))
    await channel.close()


async def blocks_in_use(address: str) -> dict[str, int]:
    """KV blocks that are not free, by worker."""
    channel = rpc.connect(address)
    stub = router_pb2_grpc.RouterServiceStub(channel)
    for _ in range(50):
        workers = (await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5)).workers
        used = {worker.instance_id: worker.num_total_blocks - worker.num_free_blocks for worker in workers}
        if not any(used.values()):
            break
        await asyncio.sleep(0.1)
    await channel.close()
    return used


def run() -> None:
    report = Report("memory-growth", "Resident memory after many requests, bundled model")
    # A small pool, so that every block has been touched before the first look.
    settings = ["--num-threads", "1", "--num-blocks", "600"]
    seen: list[dict[str, float]] = []
    with running_services(prefill_args=settings, decode_args=settings) as services:
        for first, last in ((0, EARLY), (EARLY, LATE), (LATE, LATER)):
            asyncio.run(load(services.router.address, first, last))
            seen.append(resident_kib(services))
        used = asyncio.run(blocks_in_use(services.router.address))
    for name in seen[0]:
        early, late, later = (kib[name] / 1024 for kib in seen)
        report.add(
            process=name,
            mib_after_200=early,
            mib_after_2000=late,
            mib_after_4000=later,
            growth_200_to_2000_percent=(late / early - 1) * 100,
            growth_2000_to_4000_percent=(later / late - 1) * 100,
            target="workers <= 2 from 200 to 2,000",
        )
    report.notes = [f"KV blocks in use at the end: {sum(used.values())}."]
    report.save()


if __name__ == "__main__":
    run()
