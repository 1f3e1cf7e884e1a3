"""The way from many threads into one control stream: messages in order, one writer."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Outbox(Generic[Message]):
    """Any thread posts, one task of the event loop iterates. Iteration ends once closed and empty."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._messages: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._waking = False
        self._closed = False

    def post(self, message: Message) -> None:
        """Never blocks. Without effect once closed."""
        if not self._closed:
            self._messages.append(message)
            self._wake()

    def close(self) -> None:
        """What was posted before is still written."""
        self._closed = True
        self._wake()

    async def __aiter__(self) -> AsyncIterator[Message]:
        while not (self._closed and not self._messages):
            while self._messages:
                yield self._messages.popleft()
            if not self._closed:
                await self._arrived.wait()
                self._arrived.clear()

    def _wake(self) -> None:
        if not self._waking:
            self._waking = True
            # A loop that is closed has taken the stream with it.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._woken)

    def _woken(self) -> None:
        self._waking = False
        self._arrived.set()
