"""The engine thread: the one owner of device, KV pool and model.

Everybody else talks to it by submitting calls, which run between two steps in the order they came. Answers go back
through the callbacks that the calls carry.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator

import torch

log = logging.getLogger(__name__)

# An idle engine wakes this often to expire what waits and to show that it lives.
IDLE_WAKE_S = 0.1
SWITCH_S = 5e-4


class EngineLoop(threading.Thread):
    """Drains its inbox, steps while there is work, sleeps otherwise. What can wait is done one call a turn.

    `step_counter` grows with every turn of the loop, save one that can only wait for the device, and with every layer
    of a long step: standing still means wedged.
    """

    def __init__(self, name: str, *, device: torch.device, on_crash: Callable[[BaseException], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._device = device
        self.step_counter = 0
        self._inbox: deque[Callable[[], None]] = deque()
        self._can_wait: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._on_crash = on_crash

    def submit(self, call: Callable[[], None], *, can_wait: bool = False) -> None:
        """Runs `call` in the engine thread before its next step. Thread-safe; never blocks.

        `can_wait`: of such calls one runs a turn, behind the step, in their order; others overtake them.
        """
        with self._wake:
            (self._can_wait if can_wait else self._inbox).append(call)
            self._wake.notify()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the loop after the step under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self.is_alive():
            self.join(timeout_s)

    def run(self) -> None:
        # What exists by now lives as long as the process: collections need not look at it again.
        gc.collect()
        gc.freeze()
        if self._device.type == "cuda":
            # A busy front end gives the interpreter up only after this long, several times a step. Beside a thread that
            # never sleeps, 2.4 ms of work that let go six times took 34 ms with the default of 5 ms, and 7 with this.
            sys.setswitchinterval(SWITCH_S)
        try:
            with on_device(self._device):
                while not self._stopping:
                    if not self.turn():
                        self.rest()
        except BaseException as error:
            log.exception("engine thread died")
            self._on_crash(error)

    def turn(self) -> bool:
        """Drains the inbox and makes a step if there is work; returns whether there is more to do."""
        while self._inbox:
            self._inbox.popleft()()
        if not self.waits_for_device():
            self.tick()
        if self.has_work():
            self.step()
        else:
            self.idle()
        self.publish()
        if self._can_wait:
            self._can_wait.popleft()()
        return self.has_work() or bool(self._can_wait)

    def has_work(self) -> bool:
        """A step would move something forward."""
        raise NotImplementedError

    def step(self) -> None:
        """One forward pass and what follows from it."""
        raise NotImplementedError

    def waits_for_device(self) -> bool:
        """All that is left to do is with the device, which may never answer."""
        return False

    def idle(self) -> None:
        """Called instead of `step` when there is no work: expire what waits."""

    def publish(self) -> None:
        """Called after each turn: hand results to the front end."""

    def tick(self, _layer: int = 0) -> None:
        """Shows life, also in the middle of a long step."""
        self.step_counter += 1

    def rest(self) -> None:
        """Sleeps until something is submitted, or for a moment."""
        with self._wake:
            if not self._inbox and not self._can_wait and not self._stopping:
                self._wake.wait(IDLE_WAKE_S)


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """This thread computes there: on a GPU, on a stream of its own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            # Streams are not ordered: what others were given, such as the weights, is done before this one begins.
            torch.cuda.synchronize(device)
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        yield
