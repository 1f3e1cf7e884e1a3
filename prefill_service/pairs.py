"""Prefill's pairs: made when first needed, remade after any failure, closed when long idle or one too many."""

from __future__ import annotations

import asyncio
import functools

from common.clock import Clock, monotonic
from common.config import PrefillConfig
from common.errors import Unavailable
from common.tls import tls_of
from common.transport.crowd import longest_idle
from common.transport.messages import PairIdentity
from common.transport.sending import BlockSource, SendingPair
from common.transport.transports import Transports
from prefill_service.link import Link

CLOSE_S = 2.0


class PairRegistry:
    """One pair for each decode endpoint. Belongs to the event loop."""

    def __init__(
        self,
        identity: PairIdentity,
        source: BlockSource,
        config: PrefillConfig,
        *,
        transports: Transports,
        clock: Clock = monotonic,
    ) -> None:
        self._connect = functools.partial(
            Link,
            identity=identity,
            source=source,
            config=config,
            tls=tls_of(config),
            transports=transports,
            clock=clock,
        )
        self._max_pairs = config.max_pairs
        self._num_made = 0
        self._links: dict[str, Link] = {}

    @property
    def num_pairs(self) -> int:
        return sum(link.pair is not None for link in self._links.values())

    async def acquire(self, endpoint: str, *, timeout_s: float) -> SendingPair:
        """The pair with the decode worker at HOST:PORT. Who asks while it is being made waits for the same one.

        Raises:
            FailedPrecondition: decode refused; names what differs.
            ResourceExhausted: this worker, or decode, is paired with as many as it may be, and all are in use.
            Unavailable: decode cannot be reached, or not within `timeout_s`. Asking again tries anew.
        """
        link = self._links.get(endpoint)
        if link is None or link.is_over:
            self._make_room()
            self._num_made += 1
            link = self._links[endpoint] = self._connect(endpoint, f"pair-{self._num_made}")
            link.task.add_done_callback(functools.partial(self._forget, link))
        try:
            async with asyncio.timeout(timeout_s):
                pair = await asyncio.shield(link.made)
        except TimeoutError:
            raise Unavailable(f"no pair with decode worker {endpoint} within {timeout_s:.3g} s") from None
        pair.touch()
        return pair

    async def close(self, reason: str = "the prefill worker is shutting down") -> None:
        """Ends every pair, and waits a moment for what they hold."""
        links = list(self._links.values())
        pairs = [link.pair for link in links if link.pair is not None]
        for pair in pairs:
            pair.end(reason)
        for link in links:
            if not link.made.done():
                link.task.cancel()
        if links:
            await asyncio.wait([link.task for link in links], timeout=CLOSE_S)
        await asyncio.gather(*(asyncio.to_thread(pair.wait_released, CLOSE_S) for pair in pairs))

    def _make_room(self) -> None:
        """For one link more."""
        links = [link for link in self._links.values() if not link.is_over]
        if len(links) >= self._max_pairs:
            idle = longest_idle([link.pair for link in links if link.pair], max_pairs=self._max_pairs)
            idle.end(f"closed for another: a worker holds {self._max_pairs} pairs (max_pairs)")

    def _forget(self, link: Link, _: asyncio.Task[None]) -> None:
        if self._links.get(link.endpoint) is link:
            del self._links[link.endpoint]
