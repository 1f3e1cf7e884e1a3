"""Who waits for a decode worker, and who is next. A policy: a clock goes in, no I/O.

Higher priorities first, first come first served within one. Bounded by requests and by prompt tokens. A request whose
deadline passes, or whose first token is predicted to come later than that, leaves at once instead of wasting a worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from common.clock import Clock
from common.errors import DeadlineExceeded, PdserveError, ResourceExhausted
from router.request import Request
from router.service_rate import ServiceRate

MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0


@dataclass(eq=False, slots=True)
class Ticket:
    """A place in the queue."""

    request: Request
    queued_s: float


class RequestQueue:
    """Tickets in the order in which they will be served."""

    def __init__(self, *, max_requests: int, max_tokens: int, clock: Clock) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        # Highest priority first; within one, a dict keeps the order of arrival and forgets a ticket at once.
        self._lanes: dict[int, dict[Ticket, None]] = {}
        self._num_requests = 0
        self.num_tokens = 0
        self.rate = ServiceRate()

    def __len__(self) -> int:
        return self._num_requests

    def __iter__(self) -> Iterator[Ticket]:
        for priority in sorted(self._lanes, reverse=True):
            yield from self._lanes[priority]

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._lanes.get(ticket.request.priority, ())

    @property
    def head(self) -> Ticket | None:
        """Who is next."""
        return next(iter(self), None)

    def join(self, request: Request) -> Ticket:
        """Queues `request`.

        Raises:
            ResourceExhausted: the queue is full; says when to try again.
            DeadlineExceeded: it would be served too late.
        """
        now_s = self._clock()
        self._check_room(request, now_s)
        num_ahead = sum(len(lane) for priority, lane in self._lanes.items() if priority >= request.priority)
        ticket = Ticket(request, now_s)
        if error := self._lateness(ticket, num_ahead, now_s):
            raise error
        if not self._num_requests:
            self.rate.began_to_queue(now_s)
        self._lanes.setdefault(request.priority, {})[ticket] = None
        self._num_requests += 1
        self.num_tokens += request.num_prompt_tokens
        return ticket

    def take(self, ticket: Ticket) -> None:
        """`ticket` goes to a worker."""
        self._forget(ticket)
        self.rate.taken(self._clock(), is_empty=not self._num_requests)

    def leave(self, ticket: Ticket) -> None:
        """`ticket` gives up waiting."""
        self._forget(ticket)
        if not self._num_requests:
            self.rate.emptied(self._clock())

    def drop_late(self) -> list[tuple[Ticket, PdserveError]]:
        """Removes every ticket that cannot be served in time, and says why."""
        now_s, num_ahead = self._clock(), 0
        late = []
        for ticket in self:
            if error := self._lateness(ticket, num_ahead, now_s):
                late.append((ticket, error))
            else:
                num_ahead += 1
        for ticket, _ in late:
            self.leave(ticket)
        return late

    def _forget(self, ticket: Ticket) -> None:
        lane = self._lanes[ticket.request.priority]
        del lane[ticket]
        if not lane:
            del self._lanes[ticket.request.priority]
        self._num_requests -= 1
        self.num_tokens -= ticket.request.num_prompt_tokens

    def _check_room(self, request: Request, now_s: float) -> None:
        if self._num_requests >= self._max_requests:
            full = f"{self._num_requests} requests are queued (max_queue_requests = {self._max_requests})"
        elif self.num_tokens + request.num_prompt_tokens > self._max_tokens:
            full = (
                f"{self.num_tokens} prompt tokens are queued and this request has {request.num_prompt_tokens} "
                f"(max_queue_tokens = {self._max_tokens})"
            )
        else:
            return
        retry_s = self.rate.wait_s(0, now_s) or 1.0
        raise ResourceExhausted(full, retry_after_s=min(max(retry_s, MIN_RETRY_S), MAX_RETRY_S), reason="QUEUE_FULL")

    def _lateness(self, ticket: Ticket, num_ahead: int, now_s: float) -> PdserveError | None:
        left_s = ticket.request.deadline_s - now_s
        if left_s <= 0:
            return DeadlineExceeded(f"the deadline passed after {now_s - ticket.queued_s:.3g} s in the queue")
        predicted_s = self.rate.until_first_token_s(num_ahead, now_s)
        if predicted_s is not None and predicted_s > left_s:
            return DeadlineExceeded(
                f"with {num_ahead} requests ahead the first token is {predicted_s:.3g} s away, "
                f"the deadline {left_s:.3g} s",
                reason="PREDICTED_TOO_LATE",
            )
        return None
