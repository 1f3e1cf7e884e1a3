"""What one request takes of the workers, told to the queue as it comes: time for its predictions, tokens for its
fairness. Knows nothing of what the client reads, or how fast."""

from __future__ import annotations

from types import TracebackType

from common.clock import Clock
from router.queue import RequestQueue
from router.request import Request


class Meter:
    """A context manager, from the moment that a worker is found until the request is over."""

    def __init__(self, request: Request, queue: RequestQueue, clock: Clock) -> None:
        self._request = request
        self._rate = queue.rate
        self._fair_share = queue.fair_share
        self._clock = clock
        self._begun_s = clock()
        self._first_s: float | None = None
        self._last_s = 0.0
        self._num_tokens = 0
        # Those that came with the first one took no time.
        self._num_first_tokens = 0

    def drawn(self, num_tokens: int) -> None:
        """So many tokens came from decode."""
        if not num_tokens:
            return
        self._last_s = self._clock()
        self._num_tokens += num_tokens
        self._fair_share.put_out(self._request.arrival.client, num_tokens=num_tokens)
        if self._first_s is None:
            self._first_s, self._num_first_tokens = self._last_s, num_tokens
            self._rate.first_token(self._first_s - self._begun_s)

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first_s is not None:
            self._rate.streamed(self._last_s - self._first_s, num_tokens=self._num_tokens - self._num_first_tokens)
        elif self._clock() >= self._request.deadline_s:
            # Without those that came too late, what is left would look quick.
            self._rate.first_token(self._clock() - self._begun_s)
        if error is None:
            self._rate.completed(num_tokens=self._num_tokens)
