"""Who waits for a decode worker, and who is next. A policy: a clock goes in, no I/O.

                 fair share: who was given least            rank: priority and time of arrival
    who is next ─────────────────────────────────▶ a client ───────────────────────────────────▶ its ticket

Priorities are a client's word on its own requests, so nobody gets ahead of the others by claiming one. A point of
priority is worth a second of waiting: a request is passed by none that comes later by more seconds than it has points
more, and so waits at most that much longer.

Bounded by requests and by prompt tokens. Who has most of a full queue makes room for one that has less. A request whose
deadline passes, or which is predicted to end later than that, leaves at once instead of wasting a worker.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from common.clock import Clock
from common.errors import DeadlineExceeded, PdserveError, ResourceExhausted
from router.fair_share import FairShare
from router.request import Request
from router.service_rate import ServiceRate

MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0
# What a point of priority is worth.
POINT_S = 1.0


@dataclass(eq=False, slots=True)
class Ticket:
    """A place in the queue."""

    request: Request
    queued_s: float
    # Of all tickets, in the order of their arrival.
    number: int

    @property
    def client(self) -> str:
        return self.request.arrival.client

    @property
    def rank(self) -> tuple[float, int]:
        """Among the tickets of one client, lowest first."""
        return self.queued_s - self.request.priority * POINT_S, self.number


@dataclass(eq=False, slots=True)
class _Line:
    """The tickets of one client, by rank."""

    tickets: list[Ticket] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, ticket: Ticket) -> None:
        bisect.insort(self.tickets, ticket, key=_rank)
        self.num_tokens += ticket.request.num_prompt_tokens

    def remove(self, ticket: Ticket) -> None:
        del self.tickets[self.tickets.index(ticket)]
        self.num_tokens -= ticket.request.num_prompt_tokens


class Dropped(NamedTuple):
    """A ticket that is no longer in the queue, and why."""

    ticket: Ticket
    error: PdserveError


class Joined(NamedTuple):
    """A new ticket, and those that made room for it."""

    ticket: Ticket
    displaced: list[Dropped]


class RequestQueue:
    """Tickets in the order in which they will be served, as far as is known."""

    def __init__(self, *, max_requests: int, max_tokens: int, clock: Clock) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._numbers = itertools.count()
        self._num_requests = 0
        self.num_tokens = 0
        self.rate = ServiceRate()
        self.fair_share = FairShare()

    def __len__(self) -> int:
        return self._num_requests

    def __iter__(self) -> Iterator[Ticket]:
        """As if no output was charged meanwhile."""
        heap = [
            (self.fair_share.given(client), line.tickets[0].number, client, 0) for client, line in self._lines.items()
        ]
        heapq.heapify(heap)
        while heap:
            given, _, client, place = heap[0]
            tickets = self._lines[client].tickets
            if place + 1 < len(tickets):
                given += tickets[place].request.num_prompt_tokens
                heapq.heapreplace(heap, (given, tickets[place + 1].number, client, place + 1))
            else:
                heapq.heappop(heap)
            yield tickets[place]

    def __contains__(self, ticket: Ticket) -> bool:
        line = self._lines.get(ticket.client)
        return line is not None and ticket in line.tickets

    @property
    def head(self) -> Ticket | None:
        """Who is next."""
        return next(iter(self), None)

    @property
    def num_clients(self) -> int:
        """Clients that wait."""
        return len(self._lines)

    def join(self, request: Request) -> Joined:
        """Queues `request`.

        Raises:
            ResourceExhausted: the queue is full; says when to try again.
            DeadlineExceeded: it would be served too late.
        """
        now_s = self._clock()
        displaced = self._make_room(request, now_s)
        ticket = Ticket(request, now_s, next(self._numbers))
        self._add(ticket)
        if error := self._lateness(ticket, self._num_requests - 1, now_s):
            # Late behind everybody. It may be ahead of some.
            num_ahead = next(place for place, one in enumerate(self) if one is ticket)
            if error := self._lateness(ticket, num_ahead, now_s):
                self._forget(ticket)
                raise error
        if self._num_requests == 1:
            self.rate.began_to_queue(now_s)
        for one, _ in displaced:
            self._forget(one)
        return Joined(ticket, displaced)

    def take(self, ticket: Ticket) -> None:
        """`ticket` goes to a worker."""
        self._forget(ticket)
        self.fair_share.take(ticket.client, num_prompt_tokens=ticket.request.num_prompt_tokens)
        self.rate.taken(self._clock(), is_empty=not self._num_requests)

    def passed_by(self, request: Request) -> None:
        """`request` goes to a worker without having waited, since nobody else does."""
        self.fair_share.enter(request.arrival.client)
        self.fair_share.take(request.arrival.client, num_prompt_tokens=request.num_prompt_tokens)

    def leave(self, ticket: Ticket) -> None:
        """`ticket` gives up waiting."""
        self._forget(ticket)
        if not self._num_requests:
            self.rate.emptied(self._clock())

    def drop_late(self) -> list[Dropped]:
        """Removes every ticket that cannot be served in time, and says why."""
        now_s, num_ahead = self._clock(), 0
        late = []
        for ticket in self:
            if error := self._lateness(ticket, num_ahead, now_s):
                late.append(Dropped(ticket, error))
            else:
                num_ahead += 1
        for ticket, _ in late:
            self.leave(ticket)
        return late

    def _add(self, ticket: Ticket) -> None:
        if ticket.client not in self._lines:
            self._lines[ticket.client] = _Line()
            self.fair_share.enter(ticket.client)
        self._lines[ticket.client].add(ticket)
        self._num_requests += 1
        self.num_tokens += ticket.request.num_prompt_tokens

    def _forget(self, ticket: Ticket) -> None:
        line = self._lines[ticket.client]
        line.remove(ticket)
        if not line.tickets:
            del self._lines[ticket.client]
        self._num_requests -= 1
        self.num_tokens -= ticket.request.num_prompt_tokens

    def _make_room(self, request: Request, now_s: float) -> list[Dropped]:
        """Whoever has to leave for `request`: the last of the client that has most of the queue, again and again, as
        long as that has more of it than this client would. Raises ResourceExhausted."""
        num_requests, num_tokens = self._num_requests + 1, self.num_tokens + request.num_prompt_tokens
        if num_requests <= self._max_requests and num_tokens <= self._max_tokens:
            return []
        full = self._full(request, now_s)
        own = self._lines.get(request.arrival.client, _Line())
        own_share = self._share(len(own.tickets) + 1, own.num_tokens + request.num_prompt_tokens)
        left = {line: (len(line.tickets), line.num_tokens) for line in self._lines.values() if line is not own}
        displaced = []
        while num_requests > self._max_requests or num_tokens > self._max_tokens:
            largest = max(left, key=lambda line: self._share(*left[line]), default=None)
            if largest is None or self._share(*left[largest]) <= own_share:
                raise full
            num_left, num_tokens_left = left[largest]
            last = largest.tickets[num_left - 1]
            left[largest] = num_left - 1, num_tokens_left - last.request.num_prompt_tokens
            num_requests -= 1
            num_tokens -= last.request.num_prompt_tokens
            displaced.append(Dropped(last, full))
        return displaced

    def _share(self, num_requests: int, num_tokens: int) -> float:
        """Of the queue."""
        return max(num_requests / self._max_requests, num_tokens / self._max_tokens)

    def _full(self, request: Request, now_s: float) -> ResourceExhausted:
        if self._num_requests >= self._max_requests:
            full = f"{self._num_requests} requests are queued (max_queue_requests = {self._max_requests})"
        else:
            full = (
                f"{self.num_tokens} prompt tokens are queued and the next request has {request.num_prompt_tokens} "
                f"(max_queue_tokens = {self._max_tokens})"
            )
        # Clients take turns, so a place of one comes free once in a round.
        retry_s = self.rate.wait_s(max(0, len(self._lines) - 1), now_s) or 1.0
        return ResourceExhausted(full, retry_after_s=min(max(retry_s, MIN_RETRY_S), MAX_RETRY_S), reason="QUEUE_FULL")

    def _lateness(self, ticket: Ticket, num_ahead: int, now_s: float) -> PdserveError | None:
        left_s = ticket.request.deadline_s - now_s
        if left_s <= 0:
            return DeadlineExceeded(f"the deadline passed after {now_s - ticket.queued_s:.3g} s in the queue")
        wait_s = self.rate.wait_s(num_ahead, now_s)
        if wait_s is None:
            return None
        predicted_s = wait_s + self.rate.service_s(ticket.request.stopping)
        if predicted_s <= left_s:
            return None
        return DeadlineExceeded(
            f"with {num_ahead} requests ahead the end is {predicted_s:.3g} s away, the deadline {left_s:.3g} s",
            reason="PREDICTED_TOO_LATE",
        )


def _rank(ticket: Ticket) -> tuple[float, int]:
    return ticket.rank
