"""Goodput and time to the first token at up to three times the capacity, through all three services.

Requests come as they please (Poisson), whether the others were answered or not, and each has a deadline. Goodput is the
output of those that ended within it. Every load is measured in several rounds, in turn with the others.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import grpc.aio
import matplotlib
import uvloop

from benchmarks.report import Report
from common import rpc
from common.errors import from_rpc_error
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2
from tests.support.processes import running_services

LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)
PROMPT_TOKENS = 32
OUTPUT_TOKENS = 128
VOCAB_SIZE = 2048
MAX_NUM_SEQS = 16
# Deadline of a request, in multiples of what one takes on workers that are full.
DEADLINE_IN_SERVICES = 4
# The capacity is what so many clients get that ask again as soon as they are answered.
NUM_CLIENTS = MAX_NUM_SEQS + 4
PATIENCE_S = 60.0
WARM_S = 7.0
MEASURE_S = 20.0
ROUNDS = 3
TARGET = 0.9


@dataclass
class Asked:
    """One request; seconds on one clock, counted from when it was to be sent."""

    due_s: float
    first_s: float | None = None
    ended_s: float = 0.0
    # Empty when it ended well within its deadline.
    failure: str = ""


class Load:
    """One client of the router, on one connection."""

    def __init__(self, stub: router_pb2_grpc.RouterServiceStub, seed: int) -> None:
        self._stub = stub
        self._draw = random.Random(seed)
        self.deadline_s = PATIENCE_S

    async def at_rate(self, rate: float, seconds: float) -> list[Asked]:
        """Sends so many requests a second for so long, and waits for all of them."""
        asking = []
        begun_s = due_s = time.monotonic()
        while (due_s := due_s + self._draw.expovariate(rate)) < begun_s + seconds:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            asking.append(asyncio.create_task(self.ask(due_s)))
        return await asyncio.gather(*asking)

    async def one_after_another(self, until_s: float) -> list[Asked]:
        asked = []
        while time.monotonic() < until_s:
            asked.append(await self.ask(time.monotonic()))
        return asked

    async def ask(self, due_s: float) -> Asked:
        request = router_pb2.GenerateRequest(sampling=types_pb2.SamplingParams(temperature=0))
        request.prompt_token_ids.ids.extend(self._draw.randrange(3, VOCAB_SIZE) for _ in range(PROMPT_TOKENS))
        request.stopping.max_tokens = OUTPUT_TOKENS
        request.stopping.ignore_eos = True
        asked = Asked(due_s)
        try:
            async for response in self._stub.Generate(request, timeout=self.deadline_s - (time.monotonic() - due_s)):
                if asked.first_s is None and response.chunk.token_ids:
                    asked.first_s = time.monotonic()
        except grpc.aio.AioRpcError as error:
            asked.failure = from_rpc_error(error).reason or error.code().name
        asked.ended_s = time.monotonic()
        return asked


class Point:
    """What became of the requests of one load, over all rounds. Those of the first seconds of a round do not count."""

    def __init__(self) -> None:
        self._asked: list[Asked] = []
        self._num_tokens: list[int] = []

    def add(self, asked: Iterable[Asked], begun_s: float) -> None:
        window = [one for one in asked if begun_s + WARM_S <= one.due_s]
        until_s = begun_s + WARM_S + MEASURE_S
        done = [one for one in asked if not one.failure and begun_s + WARM_S <= one.ended_s < until_s]
        self._asked += window
        self._num_tokens.append(OUTPUT_TOKENS * len(done))

    @property
    def goodputs(self) -> list[float]:
        """Tokens per second, round by round."""
        return [num_tokens / MEASURE_S for num_tokens in self._num_tokens]

    @property
    def goodput(self) -> float:
        return statistics.mean(self.goodputs)

    def row(self) -> dict[str, object]:
        """Shares of what was sent, and times of what was admitted, that is, had a first token."""
        failures = collections.Counter(one.failure for one in self._asked if one.failure and one.first_s is None)
        first_ms = [(one.first_s - one.due_s) * 1e3 for one in self._asked if one.first_s is not None]
        whole_ms = [(one.ended_s - one.due_s) * 1e3 for one in self._asked if not one.failure]
        cut_off = sum(bool(one.failure) and one.first_s is not None for one in self._asked)
        num = len(self._asked)
        refused = failures.pop("PREDICTED_TOO_LATE", 0) + failures.pop("QUEUE_FULL", 0)
        return {
            "ended in time": f"{sum(not one.failure for one in self._asked) / num:.1%}",
            "turned away": f"{refused / num:.1%}",
            "begun and cut off": f"{cut_off / num:.1%}",
            "failed otherwise": ", ".join(f"{count} {reason}" for reason, count in failures.items()) or "0",
            "first token p50, ms": round(statistics.median(first_ms)),
            "first token p99, ms": round(_p99(first_ms)),
            "whole p99, ms": round(_p99(whole_ms)),
        }

    @property
    def first_token_ms(self) -> tuple[float, float]:
        row = self.row()
        return row["first token p50, ms"], row["first token p99, ms"]  # type: ignore[return-value]


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


async def capacity(load: Load) -> float:
    """Requests per second."""
    begun_s = time.monotonic()
    until_s = begun_s + WARM_S + MEASURE_S
    batches = await asyncio.gather(*(load.one_after_another(until_s) for _ in range(NUM_CLIENTS)))
    asked = [one for batch in batches for one in batch]
    if failures := {one.failure for one in asked if one.failure}:
        raise RuntimeError(f"requests failed without overload: {failures}")
    return sum(begun_s + WARM_S <= one.ended_s < until_s for one in asked) / MEASURE_S


class Measured(NamedTuple):
    """The capacity in requests per second, the deadline that goes with it, and what becomes of multiples of it."""

    rate: float
    deadline_s: float
    points: dict[float, Point]


async def measure(address: str, rounds: int) -> Measured:
    points = {times: Point() for times in LOADS}
    async with rpc.connect(address) as channel:
        load = Load(router_pb2_grpc.RouterServiceStub(channel), seed=1)
        rate = await capacity(load)
        load.deadline_s = DEADLINE_IN_SERVICES * MAX_NUM_SEQS / rate
        print(f"  {rate:.1f} requests/s, {rate * OUTPUT_TOKENS:.0f} tokens/s, {load.deadline_s:.1f} s each", flush=True)
        for number, times in itertools.product(range(rounds), LOADS):
            # Every other round goes down, so that a machine that slows down does so for all.
            times = LOADS[-1 - LOADS.index(times)] if number % 2 else times
            begun_s = time.monotonic()
            points[times].add(await load.at_rate(times * rate, WARM_S + MEASURE_S), begun_s)
            print(f"  round {number + 1}, {times} x: {points[times].goodputs[-1]:.0f} tokens/s in time", flush=True)
    return Measured(rate, load.deadline_s, points)


def plot(path: str, measured: Measured) -> None:
    rate, deadline_s, points = measured
    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads = list(points)
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 7))
    above.plot(loads, [min(1.0, times) * rate * OUTPUT_TOKENS for times in loads], "--", color="gray", label="capacity")
    above.plot(loads, [point.goodput for point in points.values()], "o-", label="goodput, mean of the rounds")
    for times, point in points.items():
        above.plot([times] * len(point.goodputs), point.goodputs, ".", color="tab:blue", alpha=0.4)
    above.set_ylabel("tokens/s of requests that end in time")
    above.set_ylim(bottom=0)
    above.legend()
    for place, name in enumerate(("p50", "p99")):
        below.plot(
            loads, [point.first_token_ms[place] for point in points.values()], "o-", label=f"first token, {name}"
        )
    below.axhline(deadline_s * 1e3, linestyle="--", color="gray", label="deadline of the whole request")
    below.set_ylabel("ms, of what is admitted")
    below.set_ylim(bottom=0)
    below.set_xlabel("load, in multiples of the capacity")
    below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run(rounds: int) -> None:
    report = Report("overload", f"Up to {LOADS[-1]:g} times the capacity, bundled model")
    workers = ["--num-threads", "1"]
    decode = [*workers, "--max-num-seqs", str(MAX_NUM_SEQS)]
    with running_services(prefill_args=workers, decode_args=decode, router_args=["--no-access-log"]) as services:
        measured = uvloop.run(measure(services.router.address, rounds))
    rate, deadline_s, points = measured
    peak = max(point.goodput for point in points.values())
    for times, point in points.items():
        report.add(
            load=times,
            **{"requests/s": rate * times, "goodput, tokens/s": point.goodput, "of the peak": point.goodput / peak},
            target=f">= {TARGET}" if times == LOADS[-1] else "",
            **point.row(),
        )
    report.notes = [
        f"Capacity: {rate:.1f} requests/s, what {NUM_CLIENTS} clients get that ask again as soon as they are answered. "
        f"Prompts of {PROMPT_TOKENS} tokens, {OUTPUT_TOKENS} tokens out, {deadline_s:.1f} s for the whole request, "
        f"which is {DEADLINE_IN_SERVICES} times what one takes in a full batch of {MAX_NUM_SEQS}. "
        f"{rounds} rounds of {MEASURE_S:g} s for each load, in turn, each after {WARM_S:g} s that do not count. "
        "Services and client share the cores.",
        "",
        "Tokens per second in time, round by round: "
        + "; ".join(
            f"{times:g} x " + ", ".join(f"{one:.0f}" for one in point.goodputs) for times, point in points.items()
        )
        + ".",
    ]
    plot(str(report.path("png")), measured)
    report.save()


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
