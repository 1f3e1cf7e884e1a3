"""Writes arriving payloads into KV blocks beside the computation.

Scatters run in the order they came, on a stream of their own, so that a long one never holds up a decode step. Blocks
change owners between that stream and the one that computes, which takes two orders on the device:

    steps in flight may still write blocks that a new reservation got    the next scatter waits for them
    scatters may still write blocks that go to a running sequence        what is computed next waits for them

On a CPU a scatter is over when `write` returns, and there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.engine.kv_cache import KvCache
from common.engine.streams import copy_stream, mark


class KvWriter:
    """Belongs to the engine's thread, whose stream is the one that computes."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._stream = copy_stream(cache.device) if cache.device.type == "cuda" else None
        # The end of all computation that may write the blocks reserved last; None when the stream has waited for it.
        self._vacated: torch.cuda.Event | None = None
        # There are scatters that the computation has not waited for.
        self._has_written = False

    def blocks_reserved(self) -> None:
        """Blocks were given to reservations. Steps that are in flight may still write them."""
        self._vacated = mark(self._cache.device)

    def write(
        self, first_layer: int, num_layers: int, block_ids: Sequence[int], payload: Tensor
    ) -> torch.cuda.Event | None:
        """Scatters a payload into blocks; returns the end of what still reads it, None when nothing does."""
        if self._stream is None:
            self._cache.scatter(first_layer, num_layers, block_ids, payload)
            return None
        with torch.cuda.stream(self._stream):
            if self._vacated is not None:
                self._vacated.wait()
                self._vacated = None
            if payload.is_cuda:
                # Its pair may end, and the memory find other users, before the copy has run.
                payload.record_stream(self._stream)
            self._cache.scatter(first_layer, num_layers, block_ids, payload)
            self._has_written = True
            return mark(self._cache.device)

    def join(self) -> None:
        """What is computed from here on comes after everything written so far.

        Called before blocks with written KV are read, and before blocks that were being written are given away.
        """
        if self._stream is not None and self._has_written:
            torch.cuda.current_stream(self._cache.device).wait_stream(self._stream)
            self._has_written = False
