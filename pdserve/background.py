"""An event loop in a thread of its own, for callers that have none: everything synchronous here runs on it.

One for the whole process, begun by the first who needs it. What is called waits in the caller's thread, where Ctrl-C
raises KeyboardInterrupt; that cancels what runs here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs until the process ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        # Daemon: at exit it is still there for those who have something to close, and holds nobody up.
        threading.Thread(target=self._loop.run_forever, name="pdserve", daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Waits for it. An exception in this thread meanwhile (Ctrl-C) cancels it."""
        self._check_process()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Begins it and waits for nothing; may be called from any thread, this one's own too. Not after a fork."""
        if os.getpid() == self._pid:
            asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        else:
            coroutine.close()

    def iterate(self, events: Callable[[], AsyncGenerator[T, None]]) -> Iterator[T]:
        """What the generator yields. Leaving early, or an exception in this thread meanwhile, cancels it."""
        self._check_process()
        # Filled as fast as events come, whatever the reader does: a completion ends after max_tokens.
        ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async with contextlib.aclosing(events()) as source:
                    async for event in source:
                        ready.put((event, None))
            except BaseException as error:
                ready.put((None, error))
                raise
            ready.put((None, None))

        pumping = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while True:
                event, error = ready.get()
                if error is not None:
                    raise error
                if event is None:
                    return
                yield event
        finally:
            pumping.cancel()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a fork takes no threads along: use pdserve in the process that began with it, or spawn")


@functools.cache
def background_loop() -> BackgroundLoop:
    return BackgroundLoop()
