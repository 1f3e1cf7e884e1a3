"""One attempt to fill a reservation: a Prefill call, from its start to its end or until it is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from common.errors import PdserveError
from common.tracing import Span
from router.prefill_call import PrefillResult
from router.workers import Share, Worker


class PrefillFailed(NamedTuple):
    """The Prefill call of an attempt failed, or its worker was lost."""

    attempt: int
    worker: Worker
    error: PdserveError


class Attempt:
    """Runs the call at once. A failure is handed to `deliver`; a result waits in `result`."""

    def __init__(
        self,
        number: int,
        share: Share,
        call: Callable[[], Awaitable[PrefillResult]],
        deliver: Callable[[PrefillFailed], None],
        span: Span,
    ) -> None:
        self.number = number
        self.worker = share.worker
        self.result: PrefillResult | None = None
        self._deliver = deliver
        self._span = span
        self._task = asyncio.create_task(self._run(call))
        self._task.add_done_callback(lambda _: share.end())

    def give_up(self) -> None:
        """Cancels the call, if it is still under way. Nothing is delivered any more."""
        self._task.cancel()

    @property
    def is_running(self) -> bool:
        return not self._task.done()

    async def ended(self, timeout_s: float) -> None:
        """Waits, not for longer, until the call has ended."""
        await asyncio.wait([self._task], timeout=timeout_s)

    async def _run(self, call: Callable[[], Awaitable[PrefillResult]]) -> None:
        try:
            with self._span, self.worker.loss_told_to(self._failed):
                self.result = await call()
        except PdserveError as error:
            self._failed(error)

    def _failed(self, error: PdserveError) -> None:
        self._span.fail(error)
        self._deliver(PrefillFailed(self.number, self.worker, error))
