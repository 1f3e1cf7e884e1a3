"""What an engine tells the streams of its sequences: at once what somebody waits for, the rest gathered.

A message costs front end, router and client more than a small model's step costs the device, and the front end's work
takes the interpreter from the engine. So the tokens of running streams gather for an interval. With more streams than
may have a message each in an interval, they take turns at a rate: all at once, they would hold up the one that has
something urgent. What is urgent for one stream takes along what that stream has gathered and nothing else: at some
hundred streams there is always one that begins or ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from typing import Generic, TypeVar

from common.clock import Clock

Stream = TypeVar("Stream")
Event = TypeVar("Event")


class Outbox(Generic[Stream, Event]):
    """Belongs to the engine's thread. A stream's events leave in their order."""

    def __init__(
        self, deliver: Callable[[dict[Stream, list[Event]]], None], *, interval_s: float, rate: float, clock: Clock
    ) -> None:
        """`interval_s`: for how long tokens gather at least. `rate`: how many messages a second may leave then."""
        self._deliver = deliver
        self._interval_s = interval_s
        self._rate = rate
        self._clock = clock
        self._gathered: defaultdict[Stream, list[Event]] = defaultdict(list)
        self._urgent: set[Stream] = set()
        self._sent_s = 0.0

    def put(self, stream: Stream, event: Event, *, can_wait: bool = False) -> None:
        self._gathered[stream].append(event)
        if not can_wait:
            self._urgent.add(stream)

    def send(self) -> None:
        """Delivers what is due."""
        if not self._gathered:
            return
        due = dict.fromkeys((*self._urgent, *islice(self._gathered, self._num_due())))
        self._urgent.clear()
        if due:
            self._deliver({stream: self._gathered.pop(stream) for stream in due})

    def _num_due(self) -> int:
        """Of the streams in the order in which they began to gather."""
        now = self._clock()
        passed_s, all_s = now - self._sent_s, len(self._gathered) / self._rate
        num_due = 0
        if passed_s >= max(self._interval_s, all_s):
            num_due = len(self._gathered)
        elif all_s > self._interval_s:
            num_due = int(passed_s * self._rate)
        if num_due:
            self._sent_s = now
        return num_due
