"""What an engine tells the streams of its sequences: at once what somebody waits for, the rest gathered.

A message costs front end, router and client more than a small model's step costs the device, and the front end's work
takes the interpreter from the engine. So the tokens of running streams gather for an interval, which grows with the
number of streams until their messages keep within a rate. What is urgent for one stream takes along what that stream
has gathered and nothing else: at some hundred streams there is always one that begins or ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Generic, TypeVar

from common.clock import Clock

Stream = TypeVar("Stream")
Event = TypeVar("Event")


class Outbox(Generic[Stream, Event]):
    """Belongs to the engine's thread. A stream's events leave in their order."""

    def __init__(
        self, deliver: Callable[[dict[Stream, list[Event]]], None], *, interval_s: float, rate: float, clock: Clock
    ) -> None:
        """`interval_s`: what gathers leaves at most this often. `rate`: and in at most so many messages a second."""
        self._deliver = deliver
        self._interval_s = interval_s
        self._rate = rate
        self._clock = clock
        self._gathered: defaultdict[Stream, list[Event]] = defaultdict(list)
        self._urgent: set[Stream] = set()
        self._emptied_s = 0.0

    def put(self, stream: Stream, event: Event, *, can_wait: bool = False) -> None:
        self._gathered[stream].append(event)
        if not can_wait:
            self._urgent.add(stream)

    def send(self) -> None:
        """Delivers what is due."""
        if not self._gathered:
            return
        now = self._clock()
        due: dict[Stream, list[Event]]
        if now - self._emptied_s >= max(self._interval_s, len(self._gathered) / self._rate):
            due, self._gathered = self._gathered, defaultdict(list)
            self._emptied_s = now
        elif self._urgent:
            due = {stream: self._gathered.pop(stream) for stream in self._urgent}
        else:
            return
        self._urgent.clear()
        self._deliver(due)
