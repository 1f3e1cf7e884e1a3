"""Asks one service for the same thing again and again, and keeps the last answer, however old it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from common.clock import Clock
from common.errors import PdserveError

Answer = TypeVar("Answer")


class Watch(Generic[Answer]):
    """`run` asks, `answer` is the last one, and `error` says why there is no newer one."""

    def __init__(
        self,
        address: str,
        ask: Callable[[], Awaitable[Answer]],
        *,
        interval_s: float,
        clock: Clock,
        on_answer: Callable[[Answer, float], None] = lambda answer, at_s: None,
    ) -> None:
        self.address = address
        self.answer: Answer | None = None
        self.error: PdserveError | None = None
        self.answered_s: float | None = None
        self._ask = ask
        self._interval_s = interval_s
        self._clock = clock
        self._on_answer = on_answer
        self._num_asked = 0
        self._asked = asyncio.Event()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                self.answer = await self._ask()
                self.answered_s, self.error = self._clock(), None
                self._on_answer(self.answer, self.answered_s)
            except PdserveError as error:
                self.error = error
            self._num_asked += 1
            self._asked.set()
            await asyncio.sleep(self._interval_s)

    async def asked(self, num_times: int) -> None:
        """Returns once it has asked so often, whatever came of it."""
        while self._num_asked < num_times:
            self._asked.clear()
            await self._asked.wait()

    def age_s(self, now_s: float) -> float | None:
        """Of the answer; None while there is none."""
        return None if self.answered_s is None else now_s - self.answered_s
