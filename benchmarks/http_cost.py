"""Streams over HTTP beside the same streams over gRPC: tokens per second, and what the router's process spends on them.

The clients and the workers share the machine with the router, so the router's CPU time is what compares the two faces.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import aiohttp
import psutil

from benchmarks.prompts import prompts
from benchmarks.report import Report
from common import rpc
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2
from tests.support.processes import Services, free_port, running_services

STREAMS = (1, 64)
NUM_TOKENS = 200
REPEATS = 5


class Cost(NamedTuple):
    tokens_per_s: float
    num_messages: int
    # Of the router's process, for a stream and for each of its messages.
    stream_ms: float
    message_us: float


async def over_grpc(address: str, texts: list[str]) -> int:
    """Messages of all streams."""
    channel = rpc.connect(address)
    stub = router_pb2_grpc.RouterServiceStub(channel)

    async def complete(text: str) -> int:
        request = router_pb2.GenerateRequest(prompt=text, sampling=types_pb2.SamplingParams(temperature=0))
        request.stopping.max_tokens = NUM_TOKENS
        request.stopping.ignore_eos = True
        responses = [response async for response in stub.Generate(request, timeout=120)]
        assert responses[-1].completion.usage.completion_tokens == NUM_TOKENS
        return len(responses)

    counts = await asyncio.gather(*map(complete, texts))
    await channel.close()
    return sum(counts)


async def over_http(address: str, texts: list[str]) -> int:
    """Messages of all streams."""
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def complete(text: str) -> int:
            body = {"prompt": text, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
            body["stream_options"] = {"include_usage": True}
            events = []
            async with session.post(f"http://{address}/v1/completions", json=body) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        events.append(line)
            assert json.loads(events[-1][6:])["usage"]["completion_tokens"] == NUM_TOKENS
            return len(events)

        return sum(await asyncio.gather(*map(complete, texts)))


def measured(services: Services, run: Callable[[str, list[str]], Awaitable[int]], address: str, count: int) -> Cost:
    router = psutil.Process(services.router.process.pid)
    before, started = router.cpu_times(), time.monotonic()
    num_messages = asyncio.run(_awaited(run(address, prompts(count))))
    after, elapsed = router.cpu_times(), time.monotonic() - started
    spent_s = after.user + after.system - before.user - before.system
    return Cost(count * NUM_TOKENS / elapsed, num_messages, spent_s / count * 1e3, spent_s / num_messages * 1e6)


async def _awaited(running: Awaitable[int]) -> int:
    return await running


def run() -> None:
    report = Report("http-cost", "Streams over HTTP and over gRPC, bundled model")
    http = f"127.0.0.1:{free_port()}"
    with running_services(
        prefill_args=["--num-threads", "1"],
        decode_args=["--num-threads", "1"],
        router_args=["--local-prefill", "never", "--http-listen", http],
    ) as services:
        faces = {"gRPC": (over_grpc, services.router.address), "HTTP": (over_http, http)}
        for count in STREAMS:
            costs: dict[str, list[Cost]] = {face: [] for face in faces}
            for _ in range(1 + REPEATS):
                for face, (client, address) in faces.items():
                    costs[face].append(measured(services, client, address, count))
            # The first round warms up.
            for face in faces:
                cost = Cost(*(statistics.median(values) for values in zip(*costs[face][1:], strict=True)))
                report.add(streams=count, face=face, **cost._asdict())
    report.notes = [
        f"{NUM_TOKENS} tokens a stream; {REPEATS} rounds of each in turn after one to warm up, medians. stream_ms and",
        "message_us are CPU time of the router's process, whatever else it does meanwhile included.",
    ]
    report.save()


if __name__ == "__main__":
    run()
