"""The life of a process group on one side of a pair: the two threads that block on it, and its release after them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from common.transport.group import PairBroken, PairGroup

log = logging.getLogger(__name__)


class GroupWatch:
    """Runs `work`, then `drain`, in a transfer thread, and watches the group in another.

    `on_end` hears, maybe more than once, that the group is over. `drain` waits for the transfers that are under way and
    forgets them. The group, and with it whatever its transfers hold on to, is let go after both threads are done.
    """

    def __init__(
        self,
        group: PairGroup,
        name: str,
        *,
        work: Callable[[], None],
        drain: Callable[[], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.group = group
        self._work = work
        self._drain = drain
        self._on_end = on_end
        self._released = threading.Event()
        self._threads = [
            threading.Thread(target=self._run_transfer, name=f"{name}-transfer", daemon=True),
            threading.Thread(target=self._run_watch, name=f"{name}-watch", daemon=True),
        ]
        self._closer = threading.Thread(target=self._run_close, name=f"{name}-close", daemon=True)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Call once, after `start`. Does not block."""
        self._closer.start()

    def wait_released(self, timeout_s: float) -> bool:
        """Blocks until threads and group are gone; False if they are not by then."""
        return self._released.wait(timeout_s)

    def _run_transfer(self) -> None:
        try:
            self._work()
        except PairBroken as error:
            self._on_end(error.message)
        except Exception as error:
            log.exception("bug in the transfer thread of a pair")
            self._on_end(f"bug in the transfer thread: {error}")
        self._drain()

    def _run_watch(self) -> None:
        self._on_end(self.group.wait_for_end())

    def _run_close(self) -> None:
        self.group.close()
        for thread in self._threads:
            thread.join()
        del self.group, self._work, self._drain, self._on_end
        self._released.set()
