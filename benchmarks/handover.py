"""The hand-over: prefill's first token known until the second token is at the client, less one decode step."""

from __future__ import annotations

import asyncio
import statistics

from benchmarks.direct import DirectClient, Timeline
from benchmarks.report import Report
from tests.support.processes import running_services

REPEATS = 60
WARM_UP = 5
LENGTHS = (64, 512, 1536)


def handover_ms(timeline: Timeline) -> float:
    """Prefill called until the second token is here, on the client's clock, less prefill's queue and computing, less
    a steady step.

    What is left holds the transfer, the commit and the way of the tokens to the client, and a little more than the
    hand-over: the way of the Prefill call to the prefill worker.
    """
    times = [when for when, count in timeline.arrivals for _ in range(count)]
    step = (times[-1] - times[2]) / (len(times) - 3)
    before = (timeline.prefill.queue_ms + timeline.prefill.prefill_ms) / 1e3
    return (times[1] - timeline.prefill_called - before - step) * 1e3


async def measure(
    prefill: str, decode: str, length: int, *, repeats: int = REPEATS, num_tokens: int = 24
) -> tuple[list[float], list[Timeline]]:
    """Milliseconds of every request, and what they are made of; one after the other, a few to warm up left out."""
    async with DirectClient(prefill, decode) as client:
        timelines = [await client.generate(token_ids(index, length), num_tokens) for index in range(repeats + WARM_UP)]
    kept = timelines[WARM_UP:]
    return [handover_ms(timeline) for timeline in kept], kept


def token_ids(index: int, length: int) -> list[int]:
    """A prompt of its own for each index."""
    return [(index * 131 + place * 7 + length) % 1801 + 100 for place in range(length)]


def run() -> None:
    report = Report("handover", "Hand-over from prefill to decode, bundled model")
    with running_services(prefill_args=["--num-threads", "1"], decode_args=["--num-threads", "1"]) as services:
        for length in LENGTHS:
            values, timelines = asyncio.run(measure(services.prefill.address, services.decode.address, length))
            transfer = statistics.median(timeline.prefill.kv_transfer_ms for timeline in timelines)
            report.add(
                prompt_tokens=length,
                p50_ms=statistics.median(values),
                p90_ms=statistics.quantiles(values, n=10)[-1],
                of_which_transfer_ms=transfer,
                kv_kib=timelines[0].prefill.kv_bytes / 1024,
                target="p50 <= 10",
            )
    report.notes = [f"{REPEATS} requests one after the other; no prefix is cached on either side."]
    report.save()


if __name__ == "__main__":
    run()
