"""What a client does about a call that failed: who is asked next, after how long, and when it gives up.

    UNAVAILABLE                        the next router at once; a backoff once all were asked since the last wait
    RESOURCE_EXHAUSTED with RetryInfo  what the service says, never less
    ALREADY_EXISTS at a later try      a backoff: that router has yet to notice that the try before was lost
    anything else, or after output     no more

Knows errors, targets and a clock; nothing of gRPC.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from common.clock import Clock
from common.errors import AlreadyExists, PdserveError, ResourceExhausted, Unavailable
from pdserve.targets import Rotation


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """`retries`: how often a call waits and goes on, 0 for never. Asking another router needs no wait: not counted.

    A backoff begins with `first_wait_s` and doubles up to `max_wait_s`. `chance()` in [0, 1) spreads the callers: a
    backoff lasts from half of it to all of it, and what a service asks for up to a quarter longer than it says.
    """

    retries: int = 5
    first_wait_s: float = 0.1
    max_wait_s: float = 2.0
    chance: Callable[[], float] = random.random

    @classmethod
    def of(cls, retries: int | RetryPolicy) -> RetryPolicy:
        return retries if isinstance(retries, RetryPolicy) else cls(retries=retries)

    def backoff_s(self, num_waits: int) -> float:
        """After so many waits."""
        return min(self.max_wait_s, self.first_wait_s * 2**num_waits) * (1 - 0.5 * self.chance())

    def told_s(self, retry_after_s: float) -> float:
        return retry_after_s * (1 + 0.25 * self.chance())


class Attempts:
    """The tries of one call, all within `timeout_s`."""

    def __init__(self, policy: RetryPolicy, rotation: Rotation, timeout_s: float, clock: Clock) -> None:
        self._policy, self._rotation, self._clock = policy, rotation, clock
        self._deadline_s = clock() + timeout_s
        self._asked: set[str] = set()
        self._target = ""
        self._num_tries = self._num_waits = 0

    def begin(self) -> tuple[str, float]:
        """The next try: whom to ask, and the seconds that are left for it."""
        self._target = self._rotation.next(self._asked)
        self._asked.add(self._target)
        self._num_tries += 1
        return self._target, max(0.0, self._deadline_s - self._clock())

    def wait_s(self, error: PdserveError, *, has_output: bool = False) -> float | None:
        """How long to wait before the next try; None: there is none, and `error` is what the caller gets.

        `has_output`: the caller has some already, which another try would say again, or contradict.
        """
        if isinstance(error, Unavailable):
            self._rotation.failed(self._target)
        if has_output or not self._may_help(error):
            return None
        if isinstance(error, Unavailable) and error.retry_after_s is None and self._others_are_left:
            return 0.0 if self._clock() < self._deadline_s else None
        if self._num_waits >= self._policy.retries:
            return None
        told_s = error.retry_after_s
        wait_s = self._policy.backoff_s(self._num_waits) if told_s is None else self._policy.told_s(told_s)
        if self._clock() + wait_s >= self._deadline_s:
            return None
        self._num_waits += 1
        self._asked.clear()
        return wait_s

    @property
    def _others_are_left(self) -> bool:
        return len(self._asked) < len(self._rotation.targets)

    def _may_help(self, error: PdserveError) -> bool:
        if isinstance(error, ResourceExhausted):
            return error.retry_after_s is not None
        return isinstance(error, Unavailable) or (isinstance(error, AlreadyExists) and self._num_tries > 1)
