"""The requests in flight: no two of a client under one id, not too many of a client, none once the end has begun."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator

from common.errors import AlreadyExists, ResourceExhausted, Unavailable

log = logging.getLogger(__name__)


class InFlight:
    """Belongs to the event loop."""

    def __init__(self, *, max_per_client: int) -> None:
        self._max_per_client = max_per_client
        # By client and id; what ends it.
        self._requests: dict[tuple[str, str], asyncio.Timeout] = {}
        self._num_of: Counter[str] = Counter()
        self._is_closed = False
        self._drain_s = 0.0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def __len__(self) -> int:
        return len(self._requests)

    @contextlib.asynccontextmanager
    async def entry(self, client: str, request_id: str) -> AsyncIterator[None]:
        """Around the work for a request.

        Raises:
            Unavailable: the router is stopping, or cannot wait for this any longer.
            AlreadyExists: the client has a request of this id in flight.
            ResourceExhausted: the client has as many in flight as it may.
        """
        key = client, request_id
        if self._is_closed:
            raise Unavailable("the router is stopping", reason="DRAINING")
        if key in self._requests:
            raise AlreadyExists(f"a request {request_id!r} of this client is in flight", field="request_id")
        if self._num_of[client] >= self._max_per_client:
            raise ResourceExhausted(
                f"this client has {self._num_of[client]} requests in flight "
                f"(max_requests_per_client = {self._max_per_client})",
                reason="CLIENT_LIMIT",
            )
        end = self._requests[key] = asyncio.timeout(None)
        self._num_of[client] += 1
        self._is_empty.clear()
        try:
            async with end:
                yield
        except TimeoutError:
            if not end.expired():
                raise
            message = f"the router had to stop before this ended, {self._drain_s:g} s after it was told to (drain_s)"
            raise Unavailable(message, retry_after_s=1.0, reason="DRAIN_DEADLINE") from None
        finally:
            del self._requests[key]
            self._num_of[client] -= 1
            if not self._num_of[client]:
                del self._num_of[client]
            if not self._requests:
                self._is_empty.set()

    async def drain(self, drain_s: float) -> None:
        """Lets nothing in any more, and waits until everything has left; what has not within `drain_s` is ended."""
        self._is_closed = True
        self._drain_s = drain_s
        try:
            async with asyncio.timeout(drain_s):
                await self._is_empty.wait()
        except TimeoutError:
            log.warning("drain deadline passed: ending %d requests", len(self._requests))
            for end in self._requests.values():
                end.reschedule(asyncio.get_running_loop().time())
            await self._is_empty.wait()
