"""The life of a process group on one side of a pair: the two threads that block on it, and its release after them."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
from collections.abc import Callable

import torch

from common.engine.streams import beside_computation
from common.transport.group import PairBroken, PairGroup

log = logging.getLogger(__name__)

EXIT_S = 2.0

_live: set[GroupWatch] = set()


class GroupWatch:
    """Runs `work`, then `drain`, in a transfer thread, and watches the group in another.

    `on_end` hears, maybe more than once, that the group is over, and calls `close`. `drain` waits for the transfers
    that are under way and forgets them. The thread has a stream of its own on `device`. The group, and with it whatever
    its transfers hold on to, is let go after both threads are done.
    """

    def __init__(
        self,
        group: PairGroup,
        name: str,
        *,
        device: torch.device,
        work: Callable[[], None],
        drain: Callable[[], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.group = group
        self._name = name
        self._device = device
        self._work = work
        self._drain = drain
        self._on_end = on_end
        self._closing = threading.Event()
        self._released = threading.Event()

    def start(self) -> None:
        _live.add(self)
        transfer, watch = self._thread("transfer", self._run_transfer), self._thread("watch", self._run_watch)
        self._thread("close", self._run_close, transfer, watch)

    def close(self) -> None:
        """Does not block."""
        self._closing.set()

    def wait_released(self, timeout_s: float) -> bool:
        """Blocks until threads and group are gone; False if they are not by then."""
        return self._released.wait(timeout_s)

    def end(self, reason: str) -> None:
        """Tells `on_end`."""
        self._on_end(reason)

    def _thread(self, what: str, run: Callable[..., None], *args: threading.Thread) -> threading.Thread:
        thread = threading.Thread(target=run, args=args, name=f"{self._name}-{what}", daemon=True)
        thread.start()
        return thread

    def _run_transfer(self) -> None:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(beside_computation(self._device))
                self._work()
            except PairBroken as error:
                self.end(error.message)
            except Exception as error:
                log.exception("bug in the transfer thread of a pair")
                self.end(f"bug in the transfer thread: {error}")
            self._drain()

    def _run_watch(self) -> None:
        self.end(self.group.wait_for_end())

    def _run_close(self, *threads: threading.Thread) -> None:
        self._closing.wait()
        self.group.close()
        for thread in threads:
            thread.join()
        try:
            self.group.release()
        except RuntimeError:
            # A device that failed takes nothing back. Whoever waits for the pair's end is not to wait for it.
            log.exception("what a pair's group holds could not be given back")
        del self.group
        self._work = self._drain = self._on_end = _nothing
        _live.discard(self)
        self._released.set()


def _nothing(*_: object) -> None:
    """In place of the pair, which is let go too."""


@atexit.register
def _end_all() -> None:
    """A thread that comes back from gloo while the interpreter is being torn down would abort the process."""
    for watch in list(_live):
        watch.end("the process is exiting")
    for watch in list(_live):
        watch.wait_released(EXIT_S)
