"""Cuts what an attempt has to ship into chunks. Knows block ids and sizes, never tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

# A run of this many bytes goes straight from the cache; a smaller one is worth copying to share a chunk with others.
MIN_DIRECT_BYTES = 256 * 2**10


class Ready(Protocol):
    """When blocks on a device have been computed (`torch.cuda.Event`)."""

    def query(self) -> bool:
        """They have."""

    def wait(self) -> None:
        """The calling thread's stream goes on when they have."""


class Span(NamedTuple):
    """Payload of one chunk: some layers of some blocks, layer-major."""

    first_layer: int
    num_layers: int
    # Place in the reservation's block table.
    first_block: int
    # Where the blocks are in the cache that they come from.
    block_ids: tuple[int, ...]
    # Of its last layer; None: they can be read at once.
    ready: Ready | None = None


class SpanQueue:
    """Natural batching: consecutive layers of the same blocks share a chunk when they wait at the same time.

    Nothing waits for company: a lone small slice goes at once when the link is free, and layers that are still being
    computed keep nobody back. What exceeds a chunk is split.
    """

    def __init__(self, *, block_bytes: int, max_chunk_bytes: int, direct: bool = True) -> None:
        """`direct`: large runs go straight from the cache."""
        self._block_bytes = block_bytes
        self._direct = direct
        self._max_blocks = max_chunk_bytes // block_bytes
        assert self._max_blocks > 0
        self._slices: deque[Span] = deque()

    def __bool__(self) -> bool:
        return bool(self._slices)

    def push(self, layer: int, first_block: int, block_ids: Sequence[int], ready: Ready | None = None) -> None:
        """One layer of some blocks. The one pushed first is ready first."""
        self._slices.append(Span(layer, 1, first_block, tuple(block_ids), ready))

    def pop(self) -> Span:
        """The next chunk."""
        span = self._slices.popleft()
        num_blocks = len(span.block_ids)
        if num_blocks > self._max_blocks:
            rest = span._replace(
                first_block=span.first_block + self._max_blocks, block_ids=span.block_ids[self._max_blocks :]
            )
            self._slices.appendleft(rest)
            return span._replace(block_ids=span.block_ids[: self._max_blocks])
        if self._direct and num_blocks * self._block_bytes >= MIN_DIRECT_BYTES and _is_run(span.block_ids):
            return span
        num_layers, ready = 1, span.ready
        while (num_layers + 1) * num_blocks <= self._max_blocks and self._slices:
            following = self._slices[0]
            if following != span._replace(first_layer=span.first_layer + num_layers, ready=following.ready):
                break
            if following.ready is not None and following.ready is not ready and not following.ready.query():
                break
            ready = self._slices.popleft().ready
            num_layers += 1
        return span._replace(num_layers=num_layers, ready=ready)


def _is_run(block_ids: tuple[int, ...]) -> bool:
    return block_ids == tuple(range(block_ids[0], block_ids[0] + len(block_ids)))
