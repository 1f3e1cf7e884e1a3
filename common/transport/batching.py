"""Cuts what an attempt has to ship into chunks. Knows block ids and sizes, never tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

# A run of this many bytes goes straight from the cache; a smaller one is worth copying to share a chunk with others.
MIN_DIRECT_BYTES = 256 * 2**10


class Span(NamedTuple):
    """Payload of one chunk: some layers of some blocks, layer-major."""

    first_layer: int
    num_layers: int
    # Place in the reservation's block table.
    first_block: int
    # Where the blocks are in the cache that they come from.
    block_ids: tuple[int, ...]


class SpanQueue:
    """Natural batching: consecutive layers of the same blocks share a chunk when they wait at the same time.

    Nothing waits for company: a lone small slice goes at once when the link is free. What exceeds a chunk is split.
    """

    def __init__(self, *, block_bytes: int, max_chunk_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._max_blocks = max_chunk_bytes // block_bytes
        assert self._max_blocks > 0
        self._slices: deque[Span] = deque()

    def __bool__(self) -> bool:
        return bool(self._slices)

    def push(self, layer: int, first_block: int, block_ids: Sequence[int]) -> None:
        """One layer of some blocks, ready to be read."""
        self._slices.append(Span(layer, 1, first_block, tuple(block_ids)))

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
        if num_blocks * self._block_bytes >= MIN_DIRECT_BYTES and _is_run(span.block_ids):
            return span
        num_layers = 1
        while (num_layers + 1) * num_blocks <= self._max_blocks and self._slices:
            following = span._replace(first_layer=span.first_layer + num_layers)
            if self._slices[0] != following:
                break
            self._slices.popleft()
            num_layers += 1
        return span._replace(num_layers=num_layers)


def _is_run(block_ids: tuple[int, ...]) -> bool:
    return block_ids == tuple(range(block_ids[0], block_ids[0] + len(block_ids)))
