"""The requests in flight: no two of a client under one id, not too many of a client, none once the end has begun."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator

from common.errors import AlreadyExists, ResourceExhausted, Unavailable


class InFlight:
    """Belongs to the event loop."""

    def __init__(self, *, max_per_client: int) -> None:
        self._max_per_client = max_per_client
        self._requests: set[tuple[str, str]] = set()
        self._num_of: Counter[str] = Counter()
        self._is_closed = False
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def __len__(self) -> int:
        return len(self._requests)

    @contextlib.contextmanager
    def entry(self, client: str, request_id: str) -> Iterator[None]:
        """Around the work for a request.

        Raises:
            Unavailable: the router is stopping.
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
        self._requests.add(key)
        self._num_of[client] += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._requests.remove(key)
            self._num_of[client] -= 1
            if not self._num_of[client]:
                del self._num_of[client]
            if not self._requests:
                self._is_empty.set()

    async def drain(self) -> None:
        """Lets nothing in any more, and waits until everything has left."""
        self._is_closed = True
        await self._is_empty.wait()
