"""Runs the steps of a state machine one at a time, and performs what they ask for in the same order."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

Action = TypeVar("Action")


class Serial(Generic[Action]):
    """Steps run under `lock`, actions outside of it, by whichever thread is performing already.

    So an action may take another step (which returns before its own actions are performed), and the thread that took a
    step may return before they are, when another one is at it. Actions must not block.
    """

    def __init__(self, lock: threading.Condition, perform: Callable[[Action], None]) -> None:
        self._lock = lock
        self._perform = perform
        self._waiting: deque[Action] = deque()
        self._performing = False

    def run(self, step: Callable[[], Sequence[Action]]) -> Sequence[Action]:
        """Takes a step, wakes whoever waits on the lock, and returns what the step asked for."""
        with self._lock:
            actions = step()
            self._waiting.extend(actions)
            self._lock.notify_all()
            if self._performing:
                return actions
            self._performing = True
        while True:
            with self._lock:
                if not self._waiting:
                    self._performing = False
                    return actions
                action = self._waiting.popleft()
            try:
                self._perform(action)
            except Exception:
                # Of a callback, and its own affair: the pair, and the attempts of others, go on.
                log.exception("bug while performing %s", action)
