"""64 streams through the router, beside a client that does what the router does against the same workers."""

from __future__ import annotations

import asyncio
import statistics
import time

from benchmarks.direct import DirectClient
from benchmarks.prompts import prompts
from benchmarks.report import Report
from common import rpc
from common.config import TINY_MODEL
from common.tokenization import Tokenizer
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2
from tests.support.processes import Services, running_services

STREAMS = 64
NUM_TOKENS = 200
REPEATS = 5


async def through_router(services: Services, texts: list[str]) -> float:
    """Tokens per second."""
    channel = rpc.connect(services.router.address)
    stub = router_pb2_grpc.RouterServiceStub(channel)

    async def complete(text: str) -> int:
        request = router_pb2.GenerateRequest(prompt=text, sampling=types_pb2.SamplingParams(temperature=0))
        request.stopping.max_tokens = NUM_TOKENS
        request.stopping.ignore_eos = True
        num_tokens = 0
        async for response in stub.Generate(request, timeout=120):
            num_tokens += len(response.chunk.token_ids)
        return num_tokens

    started = time.monotonic()
    counts = await asyncio.gather(*(complete(text) for text in texts))
    elapsed = time.monotonic() - started
    await channel.close()
    assert sum(counts) == STREAMS * NUM_TOKENS
    return sum(counts) / elapsed


async def direct(services: Services, texts: list[str]) -> float:
    """Tokens per second."""
    tokenizer = Tokenizer.load(TINY_MODEL)
    assert tokenizer is not None
    async with DirectClient(services.prefill.address, services.decode.address) as client:
        started = time.monotonic()
        timelines = await asyncio.gather(*(client.generate(tokenizer.encode(text), NUM_TOKENS) for text in texts))
        elapsed = time.monotonic() - started
    return sum(timeline.num_tokens for timeline in timelines) / elapsed


def run() -> None:
    report = Report("router-cost", "64 streams through the router and without it, bundled model")
    texts = prompts(STREAMS)
    with running_services(
        prefill_args=["--num-threads", "1"],
        decode_args=["--num-threads", "1"],
        router_args=["--local-prefill", "never"],
    ) as services:
        asyncio.run(direct(services, texts))
        asyncio.run(through_router(services, texts))
        pairs = [
            (asyncio.run(direct(services, texts)), asyncio.run(through_router(services, texts))) for _ in range(REPEATS)
        ]
    bare, routed = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for other, one in pairs)
    report.add(what="client opens Decode and calls Prefill itself", tokens_per_s=bare, ratio=1.0)
    report.add(what="through the router", tokens_per_s=routed, ratio=ratio, target=">= 0.7")
    report.notes = [f"{REPEATS} rounds of each in turn; medians, and the median of the ratios round by round."]
    report.save()


if __name__ == "__main__":
    run()
