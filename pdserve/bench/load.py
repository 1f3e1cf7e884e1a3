"""Sends one process's share of a load. Takes a clock, and knows neither channels nor figures.

An open loop sends when requests are due, whether those before are answered or not; one that goes out late counts from
when it was due. A closed loop keeps so many requests open, and sends the next when one ends.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from common.clock import Clock
from pdserve.bench.arrivals import arrivals
from pdserve.bench.following import Sent
from pdserve.bench.workload import Ask

Follow = Callable[[Ask, Sent], Awaitable[None]]
Sleep = Callable[[float], Awaitable[None]]
AskFor = Callable[[int], Ask]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One load: `rate` requests a second, or `concurrency` at a time; exactly one is set, and so is one of `duration_s`
    and `num_requests`, after `warmup_s` that do not count."""

    rate: float | None = None
    arrivals: str = "poisson"
    concurrency: int | None = None
    warmup_s: float = 0.0
    duration_s: float | None = None
    num_requests: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.rate:g}/s" if self.rate is not None else f"{self.concurrency} at a time"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Process `place` of `of` sends every so manyeth request."""

    place: int = 0
    of: int = 1

    def part_of(self, number: int) -> int:
        return number // self.of + (self.place < number % self.of)


class Loop:
    """The requests of one share, as they are sent."""

    def __init__(self, point: Point, share: Share, ask: AskFor, follow: Follow, clock: Clock, sleep: Sleep) -> None:
        self._point = point
        self._share = share
        self._ask = ask
        self._follow = follow
        self._clock = clock
        self._sleep = sleep
        self.sent: list[Sent] = []

    async def run(self, start_s: float) -> None:
        """Begins at `start_s`, and returns when every request has ended."""
        if self._point.rate is None:
            await self._closed(start_s)
        else:
            await self._open(start_s)

    async def _open(self, start_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            for index, offset_s in self._due():
                sent = Sent(index, offset_s >= self._point.warmup_s, start_s + offset_s)
                # Made before it is due: a long prompt takes a while.
                ask = self._ask(index)
                await self._until(sent.due_s)
                self.sent.append(sent)
                group.create_task(self._follow(ask, sent))  # type: ignore[arg-type]

    async def _until(self, due_s: float) -> None:
        # Also when it is late already: what was sent before has to get a turn.
        await self._sleep(max(0.0, due_s - self._clock()))
        # uvloop's timers are whole milliseconds and may come early; latencies would come out too short.
        while (left_s := due_s - self._clock()) > 0:
            await self._sleep(left_s)

    def _due(self) -> Iterator[tuple[int, float]]:
        point, share = self._point, self._share
        assert point.rate is not None
        num_measured = 0
        for index, offset_s in enumerate(arrivals(point.arrivals, point.rate, point.seed)):
            num_measured += offset_s >= point.warmup_s
            if point.duration_s is not None and offset_s >= point.warmup_s + point.duration_s:
                return
            if point.num_requests is not None and num_measured > point.num_requests:
                return
            if index % share.of == share.place:
                yield index, offset_s

    async def _closed(self, start_s: float) -> None:
        point, share = self._point, self._share
        assert point.concurrency is not None
        indices = itertools.count(share.place, share.of)
        most = None if point.num_requests is None else share.part_of(point.num_requests)
        window_s = start_s + point.warmup_s
        num_measured = 0

        async def one_after_another() -> None:
            nonlocal num_measured
            while True:
                index = next(indices)
                ask = self._ask(index)
                now_s = self._clock()
                is_measured = now_s >= window_s
                if point.duration_s is not None and now_s >= window_s + point.duration_s:
                    return
                if most is not None and num_measured + is_measured > most:
                    return
                num_measured += is_measured
                sent = Sent(index, is_measured, now_s)
                self.sent.append(sent)
                await self._follow(ask, sent)

        await self._until(start_s)
        async with asyncio.TaskGroup() as group:
            for _ in range(share.part_of(point.concurrency)):
                group.create_task(one_after_another())
