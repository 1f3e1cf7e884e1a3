"""What has happened to a request and was not looked at yet. Several tasks put, one takes everything at once.

Taking everything is what makes tokens coalesce: they gather here while the client is slow, and while there is a pause.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Belongs to the event loop; one task takes."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: list[T] = []
        # One of them cannot wait.
        self._is_urgent = False
        self._paused_until_s = 0.0
        self._taker: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    def put(self, item: T, *, can_wait: bool = False) -> None:
        """What can wait is not handed out during a pause, unless something comes that cannot."""
        self._items.append(item)
        self._is_urgent |= not can_wait
        self._consider()

    def pause(self, seconds: float) -> None:
        """Lets what can wait gather for so long."""
        self._paused_until_s = self._loop.time() + seconds

    async def take(self) -> list[T]:
        """Everything that was put, in order; waits until there is something that cannot wait any longer."""
        self._taker = self._loop.create_future()
        self._consider()
        await self._taker
        items, self._items = self._items, []
        self._is_urgent = False
        return items

    def _consider(self) -> None:
        """Wakes the taker, or sees to it that it is woken in time."""
        if self._taker is None or self._taker.done() or not self._items:
            return
        left_s = 0.0 if self._is_urgent else self._paused_until_s - self._loop.time()
        if left_s <= 0:
            self._wake()
        elif self._alarm is None:
            self._alarm = self._loop.call_later(left_s, self._wake)

    def _wake(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)
