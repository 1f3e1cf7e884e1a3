"""Workers with so many places, before them a real queue; time is a clock that jumps from event to event."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from enum import Enum
from functools import partial

from common.clock import FakeClock
from common.errors import PdserveError
from router.fair_share import OUTPUT_WEIGHT
from router.meter import Meter
from router.queue import Dropped, RequestQueue
from router.request import Request

SWEEP_S = 0.05
# Output comes in so many portions.
PORTIONS = 4


class Fate(Enum):
    IN_TIME = "in time"
    # It was served in vain.
    LATE = "late"
    TURNED_AWAY = "turned away"


class Simulation:
    """Serves each request in `service_s(request)`, of which the first `first_share` pass before its first token."""

    def __init__(
        self,
        *,
        num_places: int,
        service_s: Callable[[Request], float],
        first_share: float = 0.2,
        max_requests: int = 1000,
        max_tokens: int = 1_000_000,
    ) -> None:
        self.clock = FakeClock(0.0)
        self.queue = RequestQueue(max_requests=max_requests, max_tokens=max_tokens, clock=self.clock)
        self.fates: dict[str, Fate] = {}
        self.begun_s: dict[str, float] = {}
        self.ended_s: dict[str, float] = {}
        # What each client was given, as fairness counts it.
        self.given: Counter[str] = Counter()
        self._num_free = num_places
        self._service_s = service_s
        self._first_share = first_share
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def run(self, arrivals: Iterable[tuple[float, Callable[[float], Request]]], *, until_s: float) -> None:
        """`arrivals`: when, and what comes then. What is under way at the end has no fate yet."""
        for at_s, make in arrivals:
            self._at(at_s, partial(self._arrive, make))
        self._at(SWEEP_S, self._sweep)
        while self._events and self._events[0][0] <= until_s:
            self.clock.now_s, _, event = heapq.heappop(self._events)
            event()

    def num(self, fate: Fate, client: str = "") -> int:
        """Requests of that fate, of one client or all; a request's id begins with its client."""
        return sum(one is fate and name.startswith(client) for name, one in self.fates.items())

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), event))

    def _arrive(self, make: Callable[[float], Request]) -> None:
        request = make(self.clock())
        if self._num_free and not len(self.queue):
            self.queue.passed_by(request)
            self._begin(request)
            return
        try:
            _, displaced = self.queue.join(request)
        except PdserveError:
            self.fates[request.request_id] = Fate.TURNED_AWAY
        else:
            self._drop(displaced)

    def _sweep(self) -> None:
        self._drop(self.queue.drop_late())
        self._at(self.clock() + SWEEP_S, self._sweep)

    def _drop(self, dropped: Iterable[Dropped]) -> None:
        for ticket, _ in dropped:
            self.fates[ticket.request.request_id] = Fate.TURNED_AWAY

    def _begin(self, request: Request) -> None:
        self._num_free -= 1
        self.begun_s[request.request_id] = self.clock()
        self.given[request.arrival.client] += request.num_prompt_tokens
        stack = ExitStack()
        meter = stack.enter_context(Meter(request, self.queue, self.clock))
        service_s = self._service_s(request)
        first_s = self._first_share * service_s
        num_tokens = request.stopping.max_tokens
        counts = [1, *_portions(num_tokens - 1)]
        for place, count in enumerate(counts):
            after_s = first_s + (service_s - first_s) * place / max(1, len(counts) - 1)
            self._at(self.clock() + after_s, partial(self._draw, request, meter, count))
        self._at(self.clock() + service_s, partial(self._end, request, stack))

    def _draw(self, request: Request, meter: Meter, count: int) -> None:
        meter.drawn(count)
        self.given[request.arrival.client] += OUTPUT_WEIGHT * count

    def _end(self, request: Request, stack: ExitStack) -> None:
        stack.close()
        self._num_free += 1
        self.ended_s[request.request_id] = self.clock()
        in_time = self.clock() <= request.deadline_s
        self.fates[request.request_id] = Fate.IN_TIME if in_time else Fate.LATE
        while self._num_free and (ticket := self.queue.head) is not None:
            self.queue.take(ticket)
            self._begin(ticket.request)


def poisson(rate: float, seed: int, *, begin_s: float = 0.0, until_s: float) -> Iterator[float]:
    """Times of arrivals, so many a second on average."""
    draw = random.Random(seed)
    at_s = begin_s
    while (at_s := at_s + draw.expovariate(rate)) < until_s:
        yield at_s


def _portions(num_tokens: int) -> list[int]:
    size = max(1, -(-num_tokens // PORTIONS))
    return [min(size, num_tokens - begin) for begin in range(0, num_tokens, size)]
