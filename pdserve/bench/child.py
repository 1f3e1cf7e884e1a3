"""`python -m pdserve.bench.child`: sends its share of one load after another, on an event loop of its own.

It reads a job a line, connects, says that it is ready, is told when to start, and says how far it is and what it saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import time

from common.errors import PdserveError
from pdserve.bench.following import Sent, follow
from pdserve.bench.job import Done, Job, Progress
from pdserve.bench.load import Loop
from pdserve.bench.observer import Observer
from pdserve.bench.workload import Ask
from pdserve.client import AsyncClient

PROGRESS_S = 0.25
READY_TIMEOUT_S = 30.0


async def serve() -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        await run(Job.from_line(line))


async def run(job: Job) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [AsyncClient(one, access=job.access, retries=0) for one in job.routers]
        for client in clients:
            await stack.enter_async_context(client)
        try:
            for client in clients:
                await client.get_model(timeout_s=READY_TIMEOUT_S)
        except PdserveError as error:
            _say(json.dumps({"failed": f"{error.code.name}: {error.message}"}))
            return
        _say(json.dumps({"ready": True}))
        start_s = float(await asyncio.to_thread(sys.stdin.readline))

        async def follow_at_its_router(ask: Ask, sent: Sent) -> None:
            client = clients[sent.index % len(clients)]
            await follow(client, ask, sent, timeout_s=job.timeout_s, clock=time.monotonic)

        loop = Loop(job.point, job.share, job.workload.ask, follow_at_its_router, time.monotonic, asyncio.sleep)
        observer = Observer()
        telling = asyncio.create_task(_tell(loop))
        try:
            async with observer.watching():
                await loop.run(start_s)
        finally:
            telling.cancel()
    _say(Done(loop.sent, observer.observed).to_line())


async def _tell(loop: Loop) -> None:
    num_seen, num_failed, num_tokens = 0, 0, 0
    open_ones: list[Sent] = []
    while True:
        await asyncio.sleep(PROGRESS_S)
        # What has ended is looked at once.
        open_ones += loop.sent[num_seen:]
        num_seen = len(loop.sent)
        ended = [one for one in open_ones if one.status]
        open_ones = [one for one in open_ones if not one.status]
        num_failed += sum(not one.is_ok for one in ended)
        num_tokens += sum(one.num_tokens for one in ended)
        progress = Progress(num_seen, num_seen - len(open_ones), num_failed, num_tokens)
        _say(json.dumps({"progress": dataclasses.asdict(progress)}))


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    try:
        import uvloop
    except ImportError:
        # There is none for Windows.
        asyncio.run(serve())
    else:
        uvloop.run(serve())


if __name__ == "__main__":
    main()
